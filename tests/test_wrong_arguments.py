"""Public functions given what a person coming from PEFT would give them: one clear error each, and
never one from the depths."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from peft import LoraConfig
from torch import nn

import lorry
from lorry.errors import ConfigError, LorryError

SPEC = lorry.LoraSpec(r=2, target_modules=["q_proj"])
# functions of the interface with types are called without
lib = cast(Any, lorry)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)


def model() -> nn.Module:
    """With the adapters a and b."""
    made = Small()
    for name in ("a", "b"):
        lorry.attach(made, SPEC, name)
    return made


ODD: dict[str, Any] = {
    "none": None,
    "text": "runs/people",
    "path": Path("runs/people"),
    "list": ["a", "b"],
    "map": {"a": "b"},
    "number": 3,
    "fraction": 1.5,
    "module": nn.Linear(2, 2),
    "object": object(),
    "pair": (nn.Linear(2, 2), object()),
}
ODD_VALUES = pytest.mark.parametrize("odd", ODD.values(), ids=ODD)


def depths_of(calls: Sequence[Callable[[], Any]]) -> list[str]:
    """What the calls raise that no person can read; those that are right raise nothing."""
    found = list[str]()
    for number, call in enumerate(calls):
        try:
            call()
        except LorryError as error:
            if re.search(r"has no attribute|not iterable|unhashable|expected str", str(error)):
                found.append(f"{number}: {error}")
        except Exception as error:  # noqa: BLE001 - whatever it is
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.append(f"{number}: {error!r} at {where.filename}:{where.lineno}")
    return found


@ODD_VALUES
def test_no_error_from_the_depths(odd: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    lorry.save_adapter(model(), saved, "a")
    calls: list[Callable[[], Any]] = [
        *(
            lambda function=function: function(odd)
            for function in (lib.attach, lib.detach, lib.merge, lib.unmerge, lib.lora_parameters)
        ),
        lambda: lib.attach(model(), odd),
        lambda: lib.attach(model(), SPEC, odd),
        lambda: lib.detach(model(), odd),
        lambda: lib.merge(model(), odd),
        lambda: lib.merge(model(), {"a": odd}),
        lambda: lib.merge(model(), {odd if isinstance(odd, int) else "c": 1.0}),
        lambda: lib.merge_adapters(odd, {"a": 1.0}, "c"),
        lambda: lib.merge_adapters(model(), odd, "c"),
        lambda: lib.merge_adapters(model(), {"a": odd}, "c"),
        lambda: lib.merge_adapters(model(), {"a": 1.0}, odd),
        *(
            lambda name=name: lib.merge_adapters(model(), {"a": 1.0, "b": 1.0}, "c", **{name: odd})
            for name in ("method", "density", "majority_sign_method", "rank", "scale")
        ),
        lambda: lib.load_adapter(odd, saved),
        lambda: lib.load_adapter(Small(), odd),
        lambda: lib.load_adapter(Small(), saved, odd),
        lambda: lib.save_adapter(odd, tmp_path / "other"),
        # a path that can be written to is right
        lambda: isinstance(odd, str | Path) or lib.save_adapter(model(), odd, "a"),
        lambda: lib.save_adapter(model(), tmp_path / "other", odd),
        lambda: lib.load(tmp_path / "nothing" if isinstance(odd, str) else odd),
        lambda: lib.load(tmp_path / "nothing", odd),
        lambda: lib.generate(odd, object(), "Hello"),
        lambda: lib.generate(model(), odd, "Hello"),
        lambda: lib.generate(model(), object(), odd),
        *(
            lambda name=name: lib.generate(model(), object(), "Hello", **{name: odd})
            for name in ("temperature", "top_k", "top_p", "max_new_tokens", "stop", "do_sample")
        ),
        *(
            lambda name=name: lib.LoraSpec(**{name: odd})
            for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
                         "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
                         "modules_to_save", "target_parameters", "trainable_token_indices", "bias",
                         "use_dora", "init_lora_weights", "train", "adalora")
        ),
        lambda: lib.Mix.constants(odd),
        *(
            lambda verb=verb, name=name: verb(**{"model": "nothing/at-all", "output_dir": tmp_path / "run", name: odd})
            for verb in (lib.sft, lib.distill, lib.unlearn)
            for name in ("model", "data", "lora", "r", "learning_rate", "jobs")
        ),
    ]  # fmt: skip
    assert not (found := depths_of(calls)), "\n".join(found)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lib.merge(model(), "b"), r"a number for each adapter: weights=\{'b': 1.0\}"),
        (lambda: lib.merge(model(), ["a", "b"]), r"weights=\{'a': 1.0, 'b': 1.0\}"),
        (lambda: lib.merge("runs/people"), r"model, tokenizer = lorry.load\('runs/people'\)"),
        (lambda: lib.merge((Small(), None)), "lorry.load gives two"),
        (lambda: lib.attach(model(), "c"), "the adapter's name comes third"),
        (lambda: lib.attach(model(), {"r": 2}), r"lorry.LoraSpec\(\*\*settings\)"),
        (lambda: lib.attach(model(), LoraConfig(r=2)), "lorry.LoraSpec has PEFT's names"),
        (lambda: lib.load(Small()), r"lorry.load_adapter\(model, path\)"),
        (lambda: lib.generate(model(), object(), [{"role": "user"}]), "apply_chat_template"),
        (lambda: lib.generate(model(), object(), "Hello", temprature=1), "did you mean 'temp"),
        (lambda: lib.LoraSpec(target_modules=None), "target_modules is None; give 'auto'"),
    ],
)
def test_what_to_do_instead(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
