"""A bfloat16 checkpoint's matrices held as they are under float32 (`model.quantize=keep`): the same base, bit
for bit, in half the bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorry import cli
from lorry.adapters.attach import attach
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.quantization.linear import quantized_linears
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError
from lorry.models.loading.load import load_model
from lorry.notes import ignore_note
from tests.support import tinyrun
from tests.support.threads import on_mesh

# two ranks share the heads of the first
SIZES: dict[str, dict[str, int]] = {
    "llama": {"num_key_value_heads": 2, "num_attention_heads": 4},
    "gpt2": {},
}
# more than the rows that are multiplied from packed bytes, whose sums have another order
IDS = torch.tensor([[5, 17, 9, 30, 2, 11, 40, 3] * 4])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama, gpt2: bfloat16; wide: float32."""
    folder = tmp_path_factory.mktemp("halves")
    for family, sizes in SIZES.items():
        made = tinyrun.model_directory(folder / f"{family}-wide", family, **sizes)
        narrow = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
        narrow.save_pretrained(folder / family)
        tinyrun.tokenizer().save_pretrained(folder / family)
    return folder


def opened(folder: Path, quantize: str | None = "keep", **options: Any) -> Any:
    settings = {"dtype": "float32", "device": "cpu", "add_note": ignore_note} | options
    return load_model(folder, quantize=quantize, **settings).model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_the_whole_base(models: Path, family: str) -> None:
    """Every matrix and every logit, and its digest, which adapters name."""
    held, whole = opened(models / family), opened(models / family, None)
    linears = quantized_linears(held)
    assert linears
    for path, product in linears.items():
        layer = whole.get_submodule(path)
        weight = layer.weight.t() if layer.transposed else layer.weight
        assert weight.dtype == torch.float32
        assert torch.equal(product.matrix(), weight)
        assert sum(t.nbytes for t in product.packed.tensors().values()) == weight.nbytes // 2
    assert held.get_submodule(held.family.embed).weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(held(IDS).logits, whole(IDS).logits)
        # a token at a time is multiplied from the bytes as they lie
        first = held(IDS[:, :1]).logits
        torch.testing.assert_close(first, whole(IDS[:, :1]).logits, rtol=1e-5, atol=1e-5)
    assert base_digest(held) == base_digest(whole)


def test_what_there_is_to_keep(models: Path) -> None:
    """Computing in bfloat16 they are held as they are anyway; of another format nothing is kept."""
    assert not quantized_linears(opened(models / "llama", dtype="bfloat16"))
    with pytest.raises(
        ConfigError, match=r"the matrices of .*llama-wide are whole, and no bfloat16"
    ):
        opened(models / "llama-wide")
    with pytest.raises(ConfigError, match=r"quantize=bfloat16 with backend=megatron"):
        opened(models / "llama", convert=object())


def test_ranks_hold_their_parts(models: Path) -> None:
    whole = opened(models / "llama")

    def logits(_: int, ranks: Any) -> torch.Tensor:
        model = opened(models / "llama", ranks=ranks)
        parts = quantized_linears(model)
        count = sum(p.packed.codes.numel() for p in parts.values())
        assert 2 * count == sum(p.packed.codes.numel() for p in quantized_linears(whole).values())
        with torch.no_grad():
            made: torch.Tensor = model(IDS).logits
        return made

    with torch.no_grad():
        expected = whole(IDS).logits
    for made in on_mesh(1, 2, logits):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_adapters_go_both_ways(models: Path, tmp_path: Path) -> None:
    held, whole = opened(models / "llama"), opened(models / "llama", None)
    for name, base in (("held", held), ("whole", whole)):
        attach(base, LoraSpec(r=2, init_lora_weights=False))
        save_adapter(base, tmp_path / name)
    facts = json.loads((tmp_path / "held" / "lorry_adapter.json").read_text())
    assert facts["quantization"]["format"] == "bfloat16"
    for name, quantize in (("held", None), ("whole", "keep")):
        other = opened(models / "llama", quantize)
        load_adapter(other, tmp_path / name)
        with torch.no_grad():
            assert torch.equal(other(IDS).logits, (held if name == "held" else whole)(IDS).logits)


def test_a_run_is_that_over_the_whole_base(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its adapter byte for byte; evaluated and merged as that one."""
    rows, adapters = tinyrun.write_rows(tmp_path / "rows.jsonl", tinyrun.rows(16)), []
    for name, more in (("whole", {}), ("kept", {"model.quantize": "keep"})):
        given = {**tinyrun.DEFAULTS, "model": models / "llama", "data": rows, **more}
        words = [f"{k}={v}" for k, v in {**given, "max_steps": 3}.items()]
        assert cli.main(["sft", *words, f"output_dir={tmp_path / name}"]) == 0
        adapters.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert cli.main(["eval", str(tmp_path / "kept"), f"data={rows}"]) == 0
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(tmp_path / "kept"), f"output_dir={merged}"]) == 0
    assert "counts as" not in capsys.readouterr().err
