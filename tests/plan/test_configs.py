"""Where a config is found without weights: well-known names, directories, adapters, the hub; and
rates that were measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from lorry import processor
from lorry.errors import ModelError
from lorry.families.packing import find_packing
from lorry.kernels.build import kernel_status
from lorry.models.loading.load import has_fast_bfloat16
from lorry.plan import machine
from lorry.plan.configs import find_config
from lorry.plan.known import KNOWN_CONFIGS
from lorry.plan.memory import packed_precision
from tests.support.tiny import LLAMA


def write(path: Path, name: str, value: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_well_known_name_needs_no_network() -> None:
    assert find_config("Llama-3-8B").config == KNOWN_CONFIGS["llama-3-8b"]
    assert find_config("smollm2-135m-instruct").config["num_hidden_layers"] == 30


def test_a_directory(tmp_path: Path) -> None:
    found = find_config(str(write(tmp_path / "m", "config.json", LLAMA)))
    assert (found.config, found.adapter_rank) == (LLAMA, None)


def test_an_adapter_stands_for_its_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "config.json", LLAMA)
    adapter = write(
        tmp_path / "a", "adapter_config.json", {"base_model_name_or_path": str(base), "r": 24}
    )
    assert (find_config(str(adapter)).config, find_config(str(adapter)).adapter_rank) == (LLAMA, 24)
    # a converted directory of another machine's cache, without and with the converter's digest
    for digests in ("b179c9523d0e", "b179c9523d0e-0123abcd"):
        gone = {"base_model_name_or_path": f"/elsewhere/smollm2-135m-instruct-{digests}", "r": 4}
        assert (
            find_config(str(write(tmp_path / "b", "adapter_config.json", gone))).config
            == KNOWN_CONFIGS["smollm2-135m"]
        )


def test_a_hub_id_reads_the_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "config.json", LLAMA)
    asked = []
    fetch = lambda name, file, revision: (  # noqa: E731
        asked.append((name, file, revision)) or str(tmp_path / "config.json")
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert find_config("someone/model", revision="main").config == LLAMA
    assert asked == [("someone/model", "config.json", "main")]


def test_the_hub_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(
        ModelError,
        match=r"llama-3-8 ?b?'.*did you mean 'llama-3-8b'.*no route to host.*known by name",
    ):
        find_config("llama-3-8")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither config.json nor adapter_config.json"),
        ({"config.json": "{"}, r"config.json:1: not JSON"),
        ({"config.json": "[]"}, "expected a JSON object, found list"),
        ({"config.json": "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")}, "not JSON"),
        ({"adapter_config.json": {"r": 4}}, "no base_model_name_or_path and r"),
        (
            {"adapter_config.json": {"peft_type": "VERA", "base_model_name_or_path": "x", "r": 4}},
            "adapter_config.json: peft_type='VERA': VeRA is left out .* nearest: LoRA of r=1",
        ),
        (
            {"adapter_config.json": {"use_qalora": True, "base_model_name_or_path": "x", "r": 4}},
            "use_qalora=True: QALoRA is left out",
        ),
        (
            {"adapter_config.json": {"base_model_name_or_path": "x/y/z", "r": 4}},
            "no model at 'x/y/z'",
        ),
    ],
)
def test_directories_that_are_no_model(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, value in files.items():
        write(tmp_path, name, value)
    with pytest.raises(ModelError, match=message):
        find_config(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "model.gguf"])
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(ModelError):
        find_config(name)


# --- this machine


def test_the_processor_is_read_as_torch_reads_it() -> None:
    assert processor.has_bfloat16() == has_fast_bfloat16(torch.device("cpu"))
    assert machine.attention_kernel() == kernel_status().attention
    assert processor.processor_name()
    assert machine.available_threads() >= 1


GPTQ4: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ({}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": GPTQ4}, "nf4"),
        ({"text_config": {"quantization_config": GPTQ4}}, "nf4"),
        ({"compression_config": GPTQ4}, "nf4"),
        ({"quantization_config": {**GPTQ4, "group_size": 32}}, "int8"),
        ({"quantization_config": {**GPTQ4, "bits": 8}}, "int8"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}}, "int8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "int8"),
        ({"quantization_config": {"load_in_4bit": True}}, "nf4"),
    ],
)
def test_the_bytes_of_packed_matrices(config: dict[str, Any], precision: str | None) -> None:
    assert packed_precision(config) == precision
    assert (find_packing(config) is None) == (precision is None)
