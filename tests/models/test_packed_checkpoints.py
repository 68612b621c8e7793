"""Checkpoints that other tools have packed: what they are opened to is the published layout's values, in
NumPy and, where it is installed, in bitsandbytes; logits and gradients are transformers' on the same
values whole; what cannot be read is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorry import cli
from lorry.adapters.attach import attach
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.quantization import packed as packing
from lorry.adapters.quantization.linear import quantized_linears
from lorry.adapters.spec import LoraSpec
from lorry.adapters.targets.candidates import find_linears, head_and_embedding
from lorry.errors import ConfigError, ModelError
from lorry.models.loading.load import load_model
from lorry.models.packed.formats import REFUSED
from lorry.notes import ignore_note
from tests.support import tinyrun
from tests.support.packed_checkpoints import FORMATS, write_packed

IDS = torch.tensor([[5, 17, 9, 30, 2, 11, 40, 3]])
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def linears_of(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (O, I)} of a checkpoint's linears but the head."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head, _ = head_and_embedding(model)
    shapes = {}
    for path, layer in find_linears(model).items():
        if path != head and not isinstance(layer, torch.nn.Embedding):
            shape = tuple(layer.weight.shape)
            transposed = type(layer).__name__ == "Conv1D"
            shapes[path] = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    return shapes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FORMAT and FORMAT-whole of Llama; gpt2 and gpt2-whole in GPTQ, with the biases it has."""
    folder = tmp_path_factory.mktemp("packed")
    plain = tinyrun.model_directory(folder / "plain", **SIZES, num_key_value_heads=2)
    linears = linears_of(plain)
    for name in FORMATS:
        write_packed(name, plain, folder / name, folder / f"{name}-whole", linears)
    gpt2 = tinyrun.model_directory(folder / "plain-gpt2", "gpt2")
    write_packed(
        "gptq",
        gpt2,
        folder / "gpt2",
        folder / "gpt2-whole",
        linears_of(gpt2),
        transposed=True,
    )
    return folder


def opened(folder: Path, **options: Any) -> Any:
    settings = {"dtype": "float32", "device": "cpu", "add_note": ignore_note} | options
    return load_model(folder, **settings).model


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", [*FORMATS, "gpt2"])
def test_values_are_those_of_the_layout(
    models: Path, name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, from the kernel and from plain torch, against float64 of the definition rounded once; and in
    bfloat16 those rounded."""
    if not compiled:
        monkeypatch.setattr(packing, "supports_packed", lambda codes, dtype: False)
    whole = load_file(models / f"{name}-whole" / "model.safetensors")
    linears = quantized_linears(opened(models / name))
    assert len(linears) == len(linears_of(models / f"{name}-whole"))
    for path, product in linears.items():
        held = product.packed
        assert (
            sum(t.nbytes for t in held.tensors().values()) < 0.45 * held.open(torch.float32).nbytes
        )
        expected = whole[f"{path}.weight"]
        expected = expected.t() if name == "gpt2" else expected
        # a few roundings of fp32: scales of NF4 are products themselves
        torch.testing.assert_close(held.open(torch.float32), expected, rtol=4e-7, atol=0)
        torch.testing.assert_close(
            held.open(torch.bfloat16), held.open(torch.float32).bfloat16(), rtol=0, atol=0
        )


@pytest.mark.parametrize("name", ["gptq-order", "awq", "fp8", "nf4", "int8", "gpt2"])
def test_logits_and_gradients_are_those_of_the_whole_checkpoint(models: Path, name: str) -> None:
    """In float32 against transformers, and an adapter's gradients against our own over whole weights."""
    ours, whole = opened(models / name), opened(models / f"{name}-whole")
    theirs = AutoModelForCausalLM.from_pretrained(models / f"{name}-whole", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    gradients = []
    for model in (ours, whole):
        adapter = attach(model, LoraSpec(r=3, target_modules="all-linear", init_lora_weights=False))
        torch.log_softmax(model(IDS).logits[0, :-1], -1).gather(
            1, IDS[0, 1:, None]
        ).sum().backward()
        gradients.append({path: slot.A.grad for path, slot in adapter.slots.items()})
    for path, true in gradients[1].items():
        assert float((gradients[0][path] - true).norm() / true.norm()) < 1e-5, path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_stated(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["gptq", "awq", "fp8", "nf4"])
def test_a_code_one_place_further_is_another_model(models: Path, tmp_path: Path, name: str) -> None:
    """The comparison above can fail."""
    copy = shutil.copytree(models / name, tmp_path / name)

    def shift(tensors: dict[str, Tensor]) -> None:
        key = next(k for k in tensors if k.endswith((".qweight", "q_proj.weight")))
        bits = tensors[key].view(torch.uint8)
        bits.copy_(bits.view(-1).roll(1).view(bits.shape) & 0x7E)

    theirs = AutoModelForCausalLM.from_pretrained(models / f"{name}-whole", dtype=torch.float32)
    with torch.no_grad():
        other = opened(rewrite(copy, shift))(IDS).logits
        assert float((other - theirs(IDS).logits).abs().max()) > 1e-3


def test_what_stands_beside_packed_matrices(models: Path, tmp_path: Path) -> None:
    """A layer left whole, biases of zeros that some tools add, scales of inputs, a packed head."""
    whole = load_file(models / "gptq-whole" / "model.safetensors")
    path = "model.layers.0.mlp.down_proj"

    def change(tensors: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{path}.{part}"]
        tensors[f"{path}.weight"] = whole[f"{path}.weight"].clone()
        for name in [n for n in tensors if n.endswith(".qweight")]:
            tensors[name.replace("qweight", "bias")] = torch.zeros(
                tensors[name].shape[1], dtype=torch.float16
            )

    copy = rewrite(shutil.copytree(models / "gptq", tmp_path / "gptq"), change)
    theirs = AutoModelForCausalLM.from_pretrained(models / "gptq-whole", dtype=torch.float32)
    model = opened(copy)
    assert path not in quantized_linears(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    rewrite(copy, lambda t: t["model.layers.0.self_attn.q_proj.bias"].fill_(1.0))
    with pytest.raises(ModelError, match=r"1 unknown \(model\.layers\.0\.self_attn\.q_proj\.bias"):
        opened(copy)


def test_older_files_of_gptq_have_no_order(models: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".g_idx")]:
            del tensors[name]

    copy = rewrite(shutil.copytree(models / "gptq", tmp_path / "gptq"), change)
    with torch.no_grad():
        assert torch.equal(opened(copy)(IDS).logits, opened(models / "gptq")(IDS).logits)


Q = "model.layers.0.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


def store(tensors: dict[str, Tensor], part: str, dtype: torch.dtype) -> None:
    """A part in another dtype."""
    tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"].to(dtype)


def state(tensors: dict[str, Tensor], text: str | None = None, **changes: object) -> None:
    """Another text as the JSON of bitsandbytes, or its settings changed."""
    settings = json.loads(bytes(tensors[STATE].tolist()))
    written = json.dumps({**settings, **changes}) if text is None else text
    tensors[STATE] = torch.tensor(list(written.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gptq", lambda t: t[f"{Q}.scales"][0].fill_(float("nan")), "scales hold NaN"),
        ("awq", lambda t: t[f"{Q}.scales"][0].fill_(float("inf")), "scales hold NaN or infinity"),
        ("fp8", lambda t: t[f"{Q}.weight_scale_inv"].fill_(float("nan")), "scale_inv hold NaN"),
        ("fp8", lambda t: t[f"{Q}.weight"].view(torch.uint8).fill_(0x7F), "weight holds NaN"),
        ("nf4", lambda t: t[f"{Q}.weight.nested_absmax"].fill_(float("nan")), "nested_absmax"),
        ("nf4-single", lambda t: t[f"{Q}.weight.absmax"].fill_(float("nan")), "absmax hold NaN"),
        ("int8", lambda t: t[f"{Q}.SCB"].fill_(float("nan")), "SCB hold NaN"),
        ("int8", lambda t: t[f"{Q}.weight_format"].fill_(1), "weight_format is 1"),
        ("nf4", lambda t: t.pop(f"{Q}.weight.absmax"), "its absmax are missing"),
        ("gptq", lambda t: t.pop(f"{Q}.qzeros"), "its qzeros are missing"),
        ("nf4", lambda t: t[f"{Q}.weight.quant_map"].mul_(1.01), "quant_map is another table"),
        ("gptq-order", lambda t: t[f"{Q}.g_idx"].fill_(9), "g_idx name groups from 9 to 9"),
        (
            "nf4",
            lambda t: t.__setitem__(
                f"{Q}.weight.quant_state.bitsandbytes__nf4",
                torch.tensor(list(b'{"quant_type": "nf4", "blocksize": 128}'), dtype=torch.uint8),
            ),
            r"blocksize=128 .* 64 is what can be read",
        ),
        (
            "nf4",
            lambda t: t[f"{Q}.weight.quant_state.bitsandbytes__nf4"].fill_(1),
            "quant_state is no JSON",
        ),
        # read without it, every input would have the scale of another group
        ("gptq-order", lambda t: t.pop(f"{Q}.g_idx"), "its g_idx are missing"),
        ("gptq-order", lambda t: store(t, "g_idx", torch.float32), "g_idx is torch.float32"),
        ("gptq", lambda t: store(t, "scales", torch.int64), "scales are torch.int64"),
        ("fp8", lambda t: store(t, "weight_scale_inv", torch.int32), "scale_inv are torch.int32"),
        ("int8", lambda t: store(t, "SCB", torch.int32), "SCB are torch.int32"),
        ("int8", lambda t: t.__setitem__(f"{Q}.weight_format", torch.ones(3)), "weight_format is"),
        ("nf4", lambda t: state(t, "[" * 9000), "quant_state is no JSON"),
        ("nf4", lambda t: state(t, nested_offset="x"), "nested_offset=x"),
        ("nf4", lambda t: state(t, nested_offset=10**400), "nested_offset=1000"),
    ],
)
def test_damaged_files_are_named(
    models: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Tensor]], Any], words: str
) -> None:
    copy = rewrite(shutil.copytree(models / name, tmp_path / name), change)
    with pytest.raises(ModelError, match=f"q_proj.*{words}"):
        opened(copy)


@pytest.mark.parametrize("name", ["gptq", "awq", "fp8", "nf4", "int8"])
def test_sizes_that_do_not_fit_are_found_before_weights_are_read(
    models: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorry.models.packed import reading

    copy = shutil.copytree(models / name, tmp_path / name)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    monkeypatch.setattr(reading, "read_stored", None)
    with pytest.raises(ModelError, match=r"_proj.* belong to different models|neither 4 nor 8"):
        opened(copy)


@pytest.mark.parametrize("method", [*REFUSED, "unheard-of"])
def test_formats_that_cannot_be_read_are_refused_by_name(
    models: Path, tmp_path: Path, method: str
) -> None:
    """Before a weight is read: there is none."""
    copy = edit_stated(shutil.copytree(models / "gptq", tmp_path / "copy"), quant_method=method)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"packed by '{method}' cannot be read .*; (give|open)"):
        opened(copy)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gptq", {"bits": 3}, "GPTQ of 3 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "layout 'marlin'"),
        ("gptq", {"group_size": 0}, "group_size=0"),
        ("awq", {"version": "gemv"}, "layout 'gemv'"),
        ("fp8", {"weight_block_size": [128, 3]}, "weight_block_size"),
        ("fp8", {"weight_block_size": 128}, "weight_block_size=128; two even numbers"),
        ("nf4", {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type='int4'"),
    ],
)
def test_kinds_of_a_format_that_cannot_be_read(
    models: Path, tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    copy = edit_stated(shutil.copytree(models / name, tmp_path / "copy"), **changes)
    with pytest.raises(ModelError, match=words):
        opened(copy)


def test_quantize_on_a_packed_checkpoint(models: Path) -> None:
    """Its own format, and `keep`, are what it has; another one is refused, and `keep` on a whole one."""
    with torch.no_grad():
        plain = opened(models / "nf4")(IDS).logits
        for quantize in ("nf4", "keep"):
            assert torch.equal(opened(models / "nf4", quantize=quantize)(IDS).logits, plain)
    for name, quantize in (("nf4", "int8"), ("gptq", "nf4"), ("int8", "nf4")):
        with pytest.raises(ConfigError, match=f"quantize={quantize}: .* in {name} already"):
            opened(models / name, quantize=quantize)
    with pytest.raises(ConfigError, match=r"quantize=keep: the matrices of .* are whole"):
        opened(models / "plain", quantize="keep")
    with pytest.raises(ConfigError, match=r"quantize=gptq with backend\.tensor_parallel"):
        opened(models / "gptq", ranks=object())
    with pytest.raises(ModelError, match="own decoder alone computes with, and native=False"):
        opened(models / "gptq", native=False)


def test_an_adapter_knows_the_packed_weights(models: Path, tmp_path: Path) -> None:
    base = opened(models / "awq")
    attach(base, LoraSpec(r=2, init_lora_weights=False))
    save_adapter(base, tmp_path / "adapter")
    facts = json.loads((tmp_path / "adapter" / "lorry_adapter.json").read_text())
    assert facts["quantization"]["format"] == "awq"
    assert len(facts["quantization"]["sha256"]) == 64
    again = opened(models / "awq")
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, base(IDS).logits)
    with pytest.raises(ModelError, match=r"trained on a base held in awq.*its full dtype"):
        load_adapter(opened(models / "awq-whole"), tmp_path / "adapter")


def test_a_run_over_a_packed_checkpoint(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, evaluated and merged, from the command line; the merged model says what the run does."""
    rows = tinyrun.write_rows(tmp_path / "rows.jsonl", tinyrun.rows(16))
    given = {**tinyrun.DEFAULTS, "model": models / "gptq", "data": rows, "max_steps": 4}
    run = tmp_path / "run"
    assert cli.main(["sft", *(f"{k}={v}" for k, v in given.items()), f"output_dir={run}"]) == 0
    assert cli.main(["eval", str(run), f"data={rows}"]) == 0
    assert cli.main(["merge", str(run), f"output_dir={tmp_path / 'merged'}"]) == 0
    assert "the base counts as gptq held it" in capsys.readouterr().err
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    over = opened(models / "gptq")
    load_adapter(over, run)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, over(IDS).logits, rtol=1e-5, atol=1e-5)
    for to in ("peft", "gguf-lora"):
        assert cli.main(["export", str(run), f"to={to}", f"output_dir={tmp_path / to}"]) == 0


def test_packed_weights_do_not_train(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tinyrun.write_rows(tmp_path / "rows.jsonl", tinyrun.rows(4))
    words = [f"model={models / 'gptq'}", f"data={rows}", "lora=null", "max_steps=1"]
    assert cli.main(["sft", *words, f"output_dir={tmp_path / 'run'}"]) == 2
    assert "holds its matrices packed, and packed weights cannot train" in capsys.readouterr().err


# --- bitsandbytes itself


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_directories_of_bitsandbytes_are_held_byte_for_byte(
    tmp_path: Path, name: str, double: bool, storage: torch.dtype
) -> None:
    """Written by transformers with bitsandbytes; opened values bit-equal to its own. Its kernel for CPUs
    reads other scales where a row is no multiple of 64, against its own codes: not so here."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import BitsAndBytesConfig

    sizes = {**SIZES, "intermediate_size": 128}
    theirs = AutoModelForCausalLM.from_pretrained(
        tinyrun.model_directory(tmp_path / "plain", **sizes),
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=name,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=storage,
        ),
        device_map="cpu",
    )
    theirs.save_pretrained(tmp_path / "bnb")
    model = opened(tmp_path / "bnb")
    linears = quantized_linears(model)
    assert len(linears) == 7
    for path, product in linears.items():
        weight = theirs.get_submodule(path).weight
        assert torch.equal(
            product.packed.open(torch.bfloat16),
            functional.dequantize_4bit(weight.data, weight.quant_state),
        ), path


def test_eight_bit_directories_of_bitsandbytes(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        models / "plain",
        dtype=torch.float16,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map="cpu",
    )
    theirs.save_pretrained(tmp_path / "bnb")
    for path, product in quantized_linears(opened(tmp_path / "bnb")).items():
        weight = theirs.get_submodule(path).weight
        own = torch.ops.bitsandbytes.int8_vectorwise_dequant(weight.data, weight.SCB)
        assert torch.equal(product.packed.open(torch.float32), own.float()), path


def test_numbers_of_eight_bits_are_torchs() -> None:
    """All 254 of e4m3, kernel and plain torch, against torch's own."""
    from lorry.adapters.quantization.grid import PackedGrid
    from lorry.adapters.quantization.packed import Quantization

    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)[None]
    grid = PackedGrid(Quantization("fp8"), (1, 254), codes, torch.ones(1, 2), "e4m3", (128, 128))
    expected = codes.view(torch.float8_e4m3fn).float()
    assert np.array_equal(grid.open(torch.float32).numpy(), expected.numpy())
