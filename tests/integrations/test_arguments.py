"""The shared flags: the requirement's names and defaults, and what they describe."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from lorry.errors import ConfigError
from lorry.integrations.arguments import add_lora_arguments, spec_from_arguments


def parse(*words: str) -> argparse.Namespace:
    return add_lora_arguments(argparse.ArgumentParser()).parse_args(words)


def test_the_documented_names_and_defaults() -> None:
    args = vars(parse())
    documented = {
        "use_lora": False,
        "lora_r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "lora_target_modules": None,
        "lora_only_trainable": True,
    }
    assert documented.items() <= args.items()


def test_a_spec_has_what_the_flags_say() -> None:
    words = "--use-lora --lora-r 4 --lora-alpha 6 --lora-dropout 0.1 --lora-use-rslora"
    patterns = ["--lora-rank-pattern", '{"down_proj": 2}', "--lora-alpha-pattern", '{"q_proj": 3}']
    targets = ["--lora-target-modules", "q_proj", "down_proj"]
    spec = spec_from_arguments(parse(*words.split(), *patterns, *targets))
    assert (spec.r, spec.lora_alpha, spec.lora_dropout) == (4, 6, 0.1)
    assert spec.target_modules == ("q_proj", "down_proj")
    assert spec.scale("model.layers.0.mlp.down_proj") == 6 / 2**0.5
    assert spec.scale("model.layers.0.self_attn.q_proj") == 3 / 4**0.5


def test_a_word_is_never_a_list_of_letters() -> None:
    listed = parse("--use-lora", "--lora-target-modules", "all-linear")
    assert spec_from_arguments(listed).target_modules == "all-linear"
    written = SimpleNamespace(use_lora=True, lora_target_modules="all-linear")
    assert spec_from_arguments(written).target_modules == "all-linear"
    named = SimpleNamespace(use_lora=True, lora_target_modules="q_proj")
    assert spec_from_arguments(named).target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_lora": False}, "--use-lora"),
        ({"lora_only_trainable": False}, "leave it on"),
        ({"lora_r": 0}, "at least 1"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"lora_rank_pattern": [1]}, "object of names"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_arguments(SimpleNamespace(**{"use_lora": True, **given}))


def test_a_mapping_is_not_taken_for_flags_that_are_off() -> None:
    with pytest.raises(ConfigError, match=r"Namespace\(\*\*args\)"):
        spec_from_arguments({"use_lora": True})


def test_a_pattern_that_is_no_json_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--use-lora", "--lora-rank-pattern", "{down_proj: 2}")
    assert "'{down_proj: 2}' is not JSON" in capsys.readouterr().err
