"""A GGUF file's matrices kept packed: the base that is converted from it, bit for bit, in float32 and
bfloat16, in fewer bytes; its adapters are the converted base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from lorry import cli
from lorry.adapters.attach import attach
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.quantization import packed as packing
from lorry.adapters.quantization.linear import quantized_linears
from lorry.adapters.spec import LoraSpec
from lorry.config.schema.model import ModelConfig
from lorry.errors import ConfigError, ModelError
from lorry.models.gguf.header import check_gguf
from lorry.models.gguf.writer import read_gguf_tensor
from lorry.models.loading.load import load_model
from lorry.models.loading.open import open_model
from lorry.models.packed import gguf as kept
from lorry.notes import ignore_note
from tests.support import tinyrun

# more than are ever multiplied as they are packed, which is in another order than torch's
IDS = torch.tensor([[5, 17, 9, 30, 2, 11, 40, 3] * 4])
# bits of a code, a scale and what else a block of 32 has
BITS = {"q8_0": 8.5, "q4_0": 4.75}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q8_0.gguf, q4_0.gguf, f16.gguf of a tiny run, merged."""
    folder = tmp_path_factory.mktemp("kept")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    model = tinyrun.model_directory(folder / "model", **sizes, num_key_value_heads=2)
    rows = tinyrun.write_rows(folder / "rows.jsonl", tinyrun.rows(8))
    given = {**tinyrun.DEFAULTS, "model": model, "data": rows, "max_steps": 1}
    run = folder / "run"
    assert cli.main(["sft", *(f"{k}={v}" for k, v in given.items()), f"output_dir={run}"]) == 0
    for outtype in (*BITS, "f16"):
        to = folder / f"{outtype}.gguf"
        words = ["export", str(run), "to=gguf", f"outtype={outtype}", f"output_dir={to}"]
        assert cli.main(words) == 0
    return folder


def opened(name: str | Path, **options: Any) -> Any:
    settings = {"dtype": "float32", "device": "cpu", "add_note": ignore_note} | options
    return load_model(name, **settings).model


def file_of(files: Path, outtype: str) -> Path:
    place = files / f"{outtype}.gguf"
    return place if place.is_file() else next(place.glob("*.gguf"))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("outtype", list(BITS))
def test_it_is_the_converted_base(
    files: Path, outtype: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix and every logit, bit for bit, in both formats; and the values are the gguf package's."""
    if not compiled:
        monkeypatch.setattr(packing, "supports_packed", lambda codes, dtype: False)
    file = file_of(files, outtype)
    for dtype in ("float32", "bfloat16"):
        held = opened(file, quantize="keep", dtype=dtype)
        whole = opened(file, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(held(IDS).logits, whole(IDS).logits), dtype
    linears = quantized_linears(held)
    assert len(linears) == 7
    header = check_gguf(file)
    for path, product in linears.items():
        matrix = product.packed
        assert torch.equal(matrix.open(torch.bfloat16), whole.get_submodule(path).weight)
        held_bits = sum(t.nbytes for t in matrix.tensors().values()) * 8
        assert held_bits <= BITS[outtype] * matrix.shape[0] * matrix.shape[1]
    down = read_gguf_tensor(file, header, "blk.0.ffn_down.weight")
    product = linears["model.layers.0.mlp.down_proj"]
    assert torch.equal(product.packed.open(torch.float32), down.bfloat16().float())


def test_the_embedded_model_is_kept() -> None:
    """Q4_1 of real weights, in bfloat16: 210 matrices, the logits of the converted base bit for bit."""
    held = opened("smollm2-135m-instruct", quantize="keep", dtype="bfloat16")
    linears = quantized_linears(held)
    assert len(linears) == 210
    packed = sum(t.nbytes for p in linears.values() for t in p.packed.tensors().values())
    wide = sum(2 * p.shape[0] * p.shape[1] for p in linears.values())
    assert packed / wide <= 0.3126  # 5 bits of 16
    whole = opened("smollm2-135m-instruct", dtype="bfloat16")
    with torch.no_grad():
        assert torch.equal(held(IDS).logits, whole(IDS).logits)


def test_another_order_of_rows_is_found(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp turns the rows of q and k of a Llama: untouched they are not the converted ones."""
    monkeypatch.setattr(kept.GgufArchitecture, "from_gguf", lambda self, name, tensor: tensor)
    with pytest.raises(
        ModelError, match=r"blk\.0\.attn_.\.weight, opened, is not model\.layers\.0"
    ):
        opened(file_of(files, "q8_0"), quantize="keep")


def test_a_scale_that_is_no_number_is_named(files: Path, tmp_path: Path) -> None:
    blocks = torch.zeros(1, 1, 34, dtype=torch.uint8)
    blocks[0, 0, :2] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(ModelError, match=r"file: blk\.0: its scales hold NaN"):
        kept._grid("file: blk.0", blocks, gguf.GGMLQuantizationType.Q8_0, (1, 32))


def test_what_cannot_be_kept(files: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of the matrices of .*f16\.gguf is Q4_0"):
        opened(file_of(files, "f16"), quantize="keep")
    with pytest.raises(ConfigError, match=r"quantize=keep: the matrices of .* are whole"):
        opened(files / "model", quantize="keep")
    with pytest.raises(ConfigError, match="quantize=gguf with backend=fsdp"):
        opened(file_of(files, "q8_0"), quantize="keep", shard=object())


def test_adapters_are_those_of_the_converted_base(files: Path, tmp_path: Path) -> None:
    """Both ways, with the same logits; the files record the digest of what was packed."""
    file = file_of(files, "q4_0")
    held, whole = opened(file, quantize="keep"), opened(file)
    for name, base in (("held", held), ("whole", whole)):
        attach(base, LoraSpec(r=2, init_lora_weights=False))
        save_adapter(base, tmp_path / name)
    facts = json.loads((tmp_path / "held" / "lorry_adapter.json").read_text())
    assert facts["quantization"]["format"] == "gguf"
    assert len(facts["quantization"]["sha256"]) == 64
    for name, quantize in (("held", None), ("whole", "keep")):
        other = opened(file, quantize=quantize)
        load_adapter(other, tmp_path / name)
        with torch.no_grad():
            expected = (held if name == "held" else whole)(IDS).logits
            assert torch.equal(other(IDS).logits, expected)
    # named beside the converted directory, where no GGUF file is at hand: nobody asked for keep
    directory = held.config["_name_or_path"]
    config = ModelConfig(name=directory, adapter=str(tmp_path / "held"), dtype="float32")
    with torch.no_grad():
        assert torch.equal(open_model(config, ignore_note).model(IDS).logits, held(IDS).logits)


def test_a_run_over_kept_matrices(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter of a run over the converted base, byte for byte; evaluated and merged as that one."""
    rows, adapters = tinyrun.write_rows(tmp_path / "rows.jsonl", tinyrun.rows(16)), []
    for name, more in (("whole", {}), ("kept", {"model.quantize": "keep"})):
        given = {**tinyrun.DEFAULTS, "model": file_of(files, "q8_0"), "data": rows, **more}
        words = [f"{k}={v}" for k, v in {**given, "max_steps": 4}.items()]
        assert cli.main(["sft", *words, f"output_dir={tmp_path / name}"]) == 0
        adapters.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert cli.main(["eval", str(tmp_path / "kept"), f"data={rows}"]) == 0
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(tmp_path / "kept"), f"output_dir={merged}"]) == 0
    assert "counts as" not in capsys.readouterr().err
