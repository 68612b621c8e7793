"""Methods that are left out: refused by name with their nearest, as a setting, as a value, in jobs and in an
adapter's file as PEFT writes it; and the table of docs/migrating.md says the same."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig, PeftType

from lorry.adapters.peft.config import parse_peft_config
from lorry.config import RunConfig, parse_settings
from lorry.config.left_out import LEFT_OUT, find_left_out
from lorry.errors import ConfigError, ModelError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"
# PEFT's fields of LoraConfig, with a value that switches each on
FIELDS: dict[str, Any] = {
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"num_groups": 64},
    "monteclora_config": {"num_samples": 4},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "layer_replication": [[0, 2], [1, 2]],
    "arrow_config": {"top_k": 2},
}
METHODS = sorted(word for word in LEFT_OUT if word.upper() in PeftType.__members__)


def run(*words: str) -> RunConfig:
    told = list[str]()
    return parse_settings(
        RunConfig, ["model=m", "data=d.jsonl", "output_dir=o", *words], told.append
    )


def test_every_word_is_one_of_peft_s() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields >= FIELDS.keys()
    of_fields = {re.sub("^use_|_config$", "", name) for name in FIELDS}
    assert set(METHODS) | of_fields == LEFT_OUT.keys()


@pytest.mark.parametrize("word", sorted(LEFT_OUT))
@pytest.mark.parametrize("setting", ["variant={}", "lora.variant={}", "--variant={}"])
def test_a_method_is_refused_by_name_with_its_nearest(setting: str, word: str) -> None:
    for spelled in (word, word.upper(), word.replace("_", "-")):
        with pytest.raises(ConfigError) as caught:
            run(setting.format(spelled))
        assert f"{LEFT_OUT[word].name} is left out" in str(caught.value)
        assert f"nearest: {LEFT_OUT[word].nearest}" in str(caught.value)


@pytest.mark.parametrize("name", ["peft_type", "finetuning_type", "lora_variant"])
def test_other_tools_words_for_the_method(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=OFT: orthogonal fine-tuning is left out"):
        run(f"{name}=OFT")


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_setting_of_peft_s_is_refused_where_it_is_on(name: str, tmp_path: Path) -> None:
    method = find_left_out(name)
    assert method is not None
    file = tmp_path / "run.yaml"
    file.write_text(f"model: m\ndata: d.jsonl\noutput_dir: o\nlora:\n  {name}: {FIELDS[name]}\n")
    with pytest.raises(ConfigError) as caught:
        parse_settings(RunConfig, [str(file)], print)
    assert f"{file}:5: " in str(caught.value)
    assert str(method) in str(caught.value)
    # as a file that lists every field has it
    for off in ("null", "false"):
        assert run(f"{name}={off}").lora == run().lora


def test_short_words_of_other_meaning_are_no_method() -> None:
    assert find_left_out("lora") is find_left_out("adalora") is find_left_out(None) is None
    with pytest.raises(ConfigError, match="unknown setting 'oft'"):
        run("oft=1")


def test_in_jobs(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\noutput_dir: o\ndata: d.jsonl\njobs:\n- {name: a, r: 4}\n- {name: b, variant: hira}\n"
    )
    with pytest.raises(ConfigError, match=r"variant=hira: HiRA is left out .* r=64"):
        parse_settings(RunConfig, [str(file)], print)


@pytest.mark.parametrize("word", METHODS)
def test_a_file_of_peft_s_type_is_refused_with_its_nearest(word: str) -> None:
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[word.upper()]]
    config = kind(task_type="CAUSAL_LM").to_dict()
    with pytest.raises(ModelError) as caught:
        parse_peft_config({**config, "peft_type": config["peft_type"].value}, "adapter_config.json")
    said = str(caught.value)
    assert said.startswith(f"adapter_config.json: peft_type is '{word.upper()}'; only LORA")
    assert f"nearest: {LEFT_OUT[word].nearest}; {LEFT_OUT[word].file}" in said


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_file_with_a_key_of_it_is_refused_with_its_nearest(name: str) -> None:
    method = find_left_out(name)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    plain = {**config, "peft_type": "LORA", "target_modules": ["q_proj"]}
    parse_peft_config(plain, "adapter_config.json")
    with pytest.raises(ModelError) as caught:
        parse_peft_config({**plain, name: FIELDS[name]}, "adapter_config.json")
    assert f"adapter_config.json: {name}=" in str(caught.value)
    assert str(method) in str(caught.value)


def test_the_page_has_them_all() -> None:
    text = PAGE.read_text().split("## Methods of PEFT's that are left out")[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    said = {row[0]: row for row in rows[1:]}
    assert said.keys() == {method.name for method in LEFT_OUT.values()}
    for word, method in LEFT_OUT.items():
        _, names, trains, nearest, *_ = said[method.name]
        assert (trains, nearest) == (method.trains, method.nearest)
        asked = re.findall(r"`(\w+)`", names)
        assert word in [re.sub("^use_|_config$", "", name.lower()) for name in asked]
