"""What every group of settings shares: no unknown keys, frozen, plain values; and the kinds of
value that need a check.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from lorry.config.parsing.names import accepts_type, describe_allowed, show_value
from lorry.config.parsing.sizes import parse_size
from lorry.visible import is_visible

# what torch, Arrow and safetensors hold; Python's own integers have no end
LARGEST_INTEGER = 2**63 - 1
# what torch, TRL and papers call them beside torch's own names
DTYPE_WORDS = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}


# bytes; file systems take 255, and a temporary name beside it takes up to 50 more
LONGEST_NAME = 200
LONGEST_PATH = 3800  # bytes; Linux takes 4,095, the names inside a run directory some of them


def _clean_path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("must not be empty or hold a NUL character")
    # the shell expands ~ at the start of a word only, so not in output_dir=~/runs
    return os.path.expanduser(text)


def _clean_directory(path: Path) -> Path:
    """A directory that can be made, as far as its name goes: what is written on its way lies beside
    it under a longer name.
    """
    cleaned = Path(_clean_path(_check_printable(str(path))))
    # bytes, not characters: that is what file systems count, and a letter may have four
    parts = [len(os.fsencode(part)) for part in cleaned.parts]
    if max(parts, default=0) > LONGEST_NAME or sum(parts) + len(parts) > LONGEST_PATH:
        raise ValueError(
            f"a name in a path may have at most {LONGEST_NAME} bytes and a whole "
            f"path {LONGEST_PATH}; {_shorten_path(str(path))} is longer"
        )
    return cleaned


def _shorten_path(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}...{text[-12:]}"


def _check_printable(text: str) -> str:
    """Names of what is written are printed on standard output, for other programs to read, as they
    are.
    """
    if not is_visible(text):
        raise ValueError(
            "must not hold control characters, line breaks, or characters that reverse text"
        )
    return text


def _read_dtype(value: Any) -> Any:
    """bf16, fp32, torch.bfloat16 and the like in full; anything else as it is."""
    word = value.removeprefix("torch.") if isinstance(value, str) else value
    return DTYPE_WORDS.get(word, word) if isinstance(word, str) else value


def _read_size(value: Any) -> Any:
    """A plain number is a number of bytes."""
    # YAML has made a number of it before it comes here
    return f"{value}B" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _check_size(text: str) -> str:
    parse_size(text)
    return text


def _clean_name(text: str) -> str:
    # it becomes a folder and a part of names in files; "." and ".." are other folders
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text) or not text.strip("."):
        raise ValueError(f"{text[:80]!r} is not a name: 1 to 64 letters, digits, '.', '_' or '-'")
    return text


def _refuse_beyond_64_bits(value: Any) -> None:
    """A whole number that no tensor, file format or loop could take, anywhere in a setting. Raises
    ValueError.
    """
    waiting, seen = [value], set[int]()  # a YAML anchor may hold itself
    while waiting:
        part = waiting.pop()
        if isinstance(part, int) and not -LARGEST_INTEGER <= part <= LARGEST_INTEGER:
            raise ValueError(
                f"got {show_value(part)}; the largest whole number is {LARGEST_INTEGER}"
            )
        if isinstance(part, (dict, list)) and id(part) not in seen:
            seen.add(id(part))
            waiting += part.values() if isinstance(part, dict) else part


PathText = Annotated[str, AfterValidator(_clean_path)]
DirPath = Annotated[Path, AfterValidator(_clean_directory)]
DtypeName = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_read_dtype)
]
# matrices of linears: nf4 and fp4 in blocks of 64 as bitsandbytes has them, int8 with a scale an output;
# keep: as the files have them packed
QuantizeFormat = Literal["nf4", "fp4", "int8", "keep"]
# how a GGUF file stores matrices; auto: as the base does, of an adapter f32
Outtype = Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0"]
MemorySize = Annotated[str, BeforeValidator(_read_size), AfterValidator(_check_size)]
CheckedName = Annotated[str, AfterValidator(_clean_name)]


def config_field(default: Any, description: str, **limits: Any) -> Any:
    """A field with a default, one line of help, and limits (ge, gt, lt, pattern ...)."""
    return Field(default=default, description=description, **limits)


def derived_field(shown: str, description: str, **limits: Any) -> Any:
    """A field that is worked out from others when it is left alone or null; ``shown`` is its
    default in words.
    """
    return config_field(
        None, description, validate_default=True, json_schema_extra={"shown": shown}, **limits
    )


class SettingsGroup(BaseModel):
    """Settings that belong together. ``main`` is the field that ``group=value`` means;
    ``positional`` takes bare words; of several names in it, each one word.
    """

    # frozen: several jobs share one description, and run.yaml says what it was; extra="forbid": a
    # setting that is misspelt must not silently be the default
    # defer_build: of the schemas of twenty verbs a command uses one or two
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)
    main: ClassVar[str] = ""
    positional: ClassVar[str] = ""

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Paths become text; true/false is not a number (pydantic would read it as 1 or 0)."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and not accepts_type(field, bool):
            raise ValueError(f"got {str(value).lower()}; give {describe_allowed(field)}")
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("*", mode="after")
    @classmethod
    def _bounded_numbers(cls, value: Any) -> Any:
        """Once read: a number may have been given as text. Groups inside have looked at their own
        settings by then.
        """
        _refuse_beyond_64_bits(value)
        return value
