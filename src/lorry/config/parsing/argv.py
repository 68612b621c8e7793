"""The command line as settings: ``key=value``, ``--key value``, ``--key=value``, ``--switch``, bare
words, one CONFIG.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorry.config.parsing.names import SchemaNames, accepts_type, schema_names
from lorry.config.parsing.place import (
    GivenSetting,
    flag_field,
    is_known_setting,
    unknown_setting_error,
)
from lorry.errors import ConfigError

# DOTALL: a value may have several lines, as a system message has
ASSIGNMENT = re.compile(r"(?:--)?([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
SUFFIXES = (".yaml", ".yml", ".json")
# a name whose first letter was left out (2_regularization=1); a file may be called so too
SLIP = re.compile(r"(\d[\w.-]*)=(.*)(?<!\.yaml)(?<!\.yml)(?<!\.json)", re.DOTALL)
SWITCH_WORDS = {"true", "false", "yes", "no", "on", "off", "1", "0", "null"}


def read_argv(
    schema: type[BaseModel], argv: Sequence[str]
) -> tuple[Path | None, list[GivenSetting]]:
    """The config file, if one is named, and the settings in their order. Raises ConfigError on a
    word that is neither.
    """
    names = schema_names(schema)
    remaining, settings_given, bare_words = list(argv), [], []
    while remaining:
        word = remaining.pop(0)
        if match := ASSIGNMENT.fullmatch(word):
            # --learning-rate is what other tools' users type
            settings_given.append(
                GivenSetting(match[1].replace("-", "_"), match[2], word, typed=True)
            )
        elif word.startswith("--") and len(word) > 2:
            # a verb with positional words (lorry report a b) would lose them to a list before them
            settings_given.append(
                _read_flag(names, word, remaining, greedy=not _positional_name(schema))
            )
        elif word.startswith("-") and len(word) > 1:
            raise ConfigError(f"{word}: not an option; settings are key=value or --key value")
        elif not _positional_name(schema) and (match := SLIP.fullmatch(word)):
            # of a verb without words of its own it can be nothing else, and is told as any unknown
            # setting is
            settings_given.append(GivenSetting(match[1], match[2], word, typed=True))
        else:
            bare_words.append(word)
    files = [setting.value for setting in settings_given if setting.key == "config"]
    # only the first bare word: lorry eval RUN data.json is a run and then a file
    if bare_words and bare_words[0].endswith(SUFFIXES):
        files.append(bare_words.pop(0))
    if len(files) > 1:
        raise ConfigError(f"two run descriptions are given, {files[0]} and {files[1]}; keep one")
    settings = _bare_words(schema, bare_words) + [
        setting for setting in settings_given if setting.key != "config"
    ]
    return Path(files[0]) if files else None, settings


def _positional_name(schema: type[BaseModel]) -> str:
    return getattr(schema, "positional", "")


def _bare_words(schema: type[BaseModel], words: list[str]) -> list[GivenSetting]:
    """Bare words belong to the schema's positional settings: one word each, and all that are left
    where the last is a list.
    """
    if not words:
        return []
    if not _positional_name(schema):
        raise ConfigError(
            f"{words[0]}: unexpected word; settings are key=value without spaces, after an optional CONFIG.yaml"
        )
    names = schema_names(schema)
    dotted = [names.candidates(name)[0] for name in _positional_name(schema).split()]
    rest: list[str] = []
    if accepts_type(names.fields[dotted[-1]], list):
        single = len(dotted) - 1
        words, rest = words[:single], words[single:]
    if len(words) > len(dotted):
        raise ConfigError(
            f"{words[len(dotted)]}: unexpected word after "
            f"{words[len(dotted) - 1]!r}; settings are key=value without spaces"
        )
    settings = [GivenSetting(name, word, word) for name, word in zip(dotted, words, strict=False)]
    return [*settings, GivenSetting(dotted[-1], rest, " ".join(rest))] if rest else settings


def _is_bare(words: list[str]) -> bool:
    return bool(words) and not words[0].startswith("--") and not ASSIGNMENT.fullmatch(words[0])


def _read_flag(names: SchemaNames, word: str, remaining: list[str], greedy: bool) -> GivenSetting:
    """``--key value``, a switch ``--key`` or ``--no-key``, or ``--key a b c`` for a list; takes its
    values from ``left``.
    """
    key = word[2:].replace("-", "_")
    field = flag_field(names, key)
    if (
        field is None
        and key.startswith("no_")
        and (opposite := flag_field(names, key[3:]))
        and accepts_type(opposite, bool)
    ):
        return GivenSetting(key[3:], "false", word, typed=True)
    if field is None and key not in ("config", "experiment"):
        # an unknown flag must not swallow the next word: its error would name the wrong one
        if not is_known_setting(names, key):
            raise unknown_setting_error(names, key, word)
        value = (
            remaining.pop(0)
            if _is_bare(remaining) and (greedy or remaining[0].lower() in SWITCH_WORDS)
            else "true"
        )
        return GivenSetting(key, value, word, typed=True)
    if field is not None and _is_switch(field, remaining):
        return GivenSetting(key, "true", word, typed=True)
    if not remaining or remaining[0].startswith("--"):
        raise ConfigError(f"{word}: a value is missing")
    values = [remaining.pop(0)]
    while greedy and field is not None and accepts_type(field, list) and _is_bare(remaining):
        values.append(remaining.pop(0))
    if len(values) > 1:
        return GivenSetting(key, values, f"{word} {' '.join(values)}")
    return GivenSetting(key, values[0], f"{word} {values[0]}", typed=True)


def _is_switch(field: FieldInfo, remaining: list[str]) -> bool:
    """Whether ``--key`` stands alone: the field is true/false and no such word (nor text it would
    take) follows.
    """
    if not accepts_type(field, bool) or (remaining and remaining[0].lower() in SWITCH_WORDS):
        return False
    # push_to_hub is true, or a name: --push_to_hub OWNER/NAME
    return not (accepts_type(field, str) and _is_bare(remaining))
