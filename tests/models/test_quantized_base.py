"""A base held in 4 and 8 bits: its logits and the gradients over it are those of transformers and PEFT
on the opened matrices; adapters know which base they were trained on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorry import cli
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.quantization.linear import quantized_linears
from lorry.adapters.quantization.packed import QUANTIZATIONS, pack
from lorry.adapters.spec import LoraSpec
from lorry.adapters.targets.candidates import find_linears, head_and_embedding
from lorry.config import RunConfig, build_settings
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.models.loading.load import load_model
from lorry.notes import ignore_note
from tests.support import tinyrun
from tests.support.threads import on_mesh

FORMATS = list(QUANTIZATIONS)
FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox"]
IDS = torch.tensor([[5, 17, 9, 30, 2, 11, 40, 3]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in [*FAMILIES, "mixtral"]:
        tinyrun.model_directory(folder / family, family, spread=0.1)
    return folder


def opened(folder: Path, quantize: str | None, **options: Any) -> Any:
    settings = {"dtype": "float32", "device": "cpu", "add_note": ignore_note} | options
    return load_model(folder, quantize=quantize, **settings).model


def plain_twin(folder: Path, quantize: str) -> Any:
    """transformers' model with each linear's matrix [out, in] packed and opened again, but for the head's."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head, _ = head_and_embedding(theirs)
    with torch.no_grad():
        for path, layer in find_linears(theirs).items():
            if path == head or isinstance(layer, torch.nn.Embedding):
                continue
            transposed = type(layer).__name__ == "Conv1D"
            matrix = layer.weight.t() if transposed else layer.weight
            values = pack(matrix, QUANTIZATIONS[quantize]).open(torch.float32)
            layer.weight.copy_(values.t() if transposed else values)
    return theirs


@pytest.mark.parametrize(
    ("family", "quantize", "native"),
    [
        *((family, "nf4", True) for family in FAMILIES),
        ("llama", "fp4", True),
        ("gpt2", "int8", True),
        ("llama", "int8", False),
        ("gpt2", "nf4", False),
    ],
)
def test_gradients_are_those_of_peft_on_the_opened_base(
    models: Path, family: str, quantize: str, native: bool
) -> None:
    ours = opened(models / family, quantize, native=native)
    theirs = plain_twin(models / family, quantize)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
        whole = opened(models / family, None)(IDS).logits
        assert float((ours(IDS).logits - whole).norm() / whole.norm()) > 1e-3
    spec = LoraSpec(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    adapter = attach(ours, spec)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    peft = get_peft_model(theirs, config)
    values = {name: t.detach() for name, t in adapter.tensors().items()}
    parameters = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p
        for name, p in peft.named_parameters()
        if p.requires_grad
    }
    assert parameters.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    for model in (ours, peft):
        torch.log_softmax(model(IDS).logits[0, :-1], -1).gather(
            1, IDS[0, 1:, None]
        ).sum().backward()
    for path, slot in adapter.slots.items():
        for side in ("A", "B"):
            got, true = getattr(slot, side).grad, parameters[f"{path}.lora_{side}"].grad
            assert float(true.norm()) > 0
            assert float((got - true).norm() / true.norm()) < 1e-5, f"{path}.{side}"


@pytest.mark.parametrize("quantize", FORMATS)
def test_what_is_held(models: Path, quantize: str) -> None:
    """Codes and scales, no wide matrix; head and embeddings as they were; one buffer per shape."""
    model = opened(models / "llama", quantize, dtype="bfloat16")
    linears = quantized_linears(model)
    assert len(linears) == 7
    for path, product in linears.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, BankLinear)
        held = sum(p.nbytes for p in layer.parameters(recurse=False))
        assert held == sum(t.nbytes for t in product.packed.tensors().values())
        assert not any(p.requires_grad for p in layer.parameters())
    assert model.embed.weight.dtype == torch.bfloat16
    with torch.no_grad():
        model(IDS)
    (buffers,) = {id(p.buffers): p.buffers for p in linears.values()}.values()
    assert len(buffers.buffers) == len({p.shape for p in linears.values()})


def test_experts_of_transformers_say_what_is_left(models: Path) -> None:
    """A mixture's attention is packed, and it computes; its experts are no linears."""
    notes: list[str] = []
    model = opened(models / "mixtral", "nf4", add_note=notes.append)
    assert len(quantized_linears(model)) >= 4
    assert any("whole before its matrices are packed" in note for note in notes)
    with torch.no_grad():
        assert bool(model(IDS).logits.isfinite().all())


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_weight_that_is_read_past_its_layer_is_told(tmp_path: Path, quantize: str) -> None:
    """Mamba multiplies with its `dt_proj`'s weight itself."""
    tinyrun.model_directory(tmp_path / "mamba", "mamba")
    with pytest.raises(
        ConfigError, match=r"past the layer, which has codes .* leave model\.quantize out"
    ):
        opened(tmp_path / "mamba", quantize)


def test_a_cast_of_its_scales_is_found(models: Path) -> None:
    model = opened(models / "llama", "int8")
    model.to(torch.bfloat16)
    with pytest.raises(ContractError, match="scales of a quantized matrix were cast"):
        model(IDS)


# --- whose adapter it is


def test_an_adapter_knows_its_base(models: Path, tmp_path: Path) -> None:
    base = opened(models / "llama", "nf4")
    attach(base, LoraSpec(r=2, init_lora_weights=False))
    save_adapter(base, tmp_path / "adapter")
    facts = json.loads((tmp_path / "adapter" / "lorry_adapter.json").read_text())
    assert facts["quantization"]["format"] == "nf4"
    assert facts["quantization"]["block"] == 64
    again = opened(models / "llama", "nf4")
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, base(IDS).logits)
    for other, words in (
        (None, "its full dtype"),
        ("fp4", "held in fp4"),
        ("int8", "held in int8"),
    ):
        with pytest.raises(ModelError, match=f"trained on a base held in nf4.*{words}"):
            load_adapter(opened(models / "llama", other), tmp_path / "adapter")
    load_adapter(opened(models / "llama", None), tmp_path / "adapter", other_base=True)
    # by its files alone: the base is opened as it was
    named = load_model(tmp_path / "adapter", device="cpu", add_note=ignore_note)
    assert named.source["quantize"] == "nf4"
    assert named.source["dtype"] == "float32"


@pytest.mark.parametrize("native", [True, False])
def test_the_base_is_the_same_in_every_dtype(models: Path, tmp_path: Path, native: bool) -> None:
    """Codes are of what the files hold (float32 here), whatever the model computes in."""
    narrow = opened(models / "llama", "nf4", dtype="bfloat16", native=native)
    wide = opened(models / "llama", "nf4", native=native)
    assert narrow.dtype == torch.bfloat16
    for path, product in quantized_linears(narrow).items():
        other = quantized_linears(wide)[path].packed.tensors()
        assert all(torch.equal(t, other[n]) for n, t in product.packed.tensors().items())
    attach(narrow, LoraSpec(r=2, init_lora_weights=False))
    save_adapter(narrow, tmp_path)
    load_adapter(wide, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            narrow(IDS).logits.float(), wide(IDS).logits, rtol=0.05, atol=0.05
        )


def test_an_adapter_of_a_whole_base_is_refused_on_a_packed_one(
    models: Path, tmp_path: Path
) -> None:
    base = opened(models / "llama", None)
    attach(base, LoraSpec(r=2, init_lora_weights=False))
    save_adapter(base, tmp_path)
    with pytest.raises(ModelError, match=r"open it with no model\.quantize"):
        load_adapter(opened(models / "llama", "nf4"), tmp_path)


def test_another_base_of_the_same_format_is_another(models: Path, tmp_path: Path) -> None:
    base = opened(models / "llama", "nf4")
    attach(base, LoraSpec(r=2))
    save_adapter(base, tmp_path / "adapter")
    tinyrun.model_directory(tmp_path / "other", spread=0.11)
    with pytest.raises(ModelError, match="trained on other base weights"):
        load_adapter(opened(tmp_path / "other", "nf4"), tmp_path / "adapter")


def test_full_training_is_refused(models: Path, tmp_path: Path) -> None:
    rows = tinyrun.write_rows(tmp_path / "rows.jsonl", tinyrun.rows(8))
    settings = {"model.name": str(models / "llama"), "model.quantize": "nf4", "data": str(rows)}
    with pytest.raises(ConfigError, match="packed weights cannot train"):
        build_settings(
            RunConfig, {**settings, "lora": None, "output_dir": str(tmp_path / "run")}, print
        )


# --- the verbs


@pytest.fixture(scope="module")
def run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over an NF4 base, from the command line."""
    folder = tmp_path_factory.mktemp("run")
    rows = tinyrun.write_rows(folder / "rows.jsonl", tinyrun.rows(16))
    assert cli.main(["sft", *words(models, rows), f"output_dir={folder / 'run'}"]) == 0
    return folder / "run"


def words(models: Path, rows: Path) -> list[str]:
    given = {**tinyrun.DEFAULTS, "model": models / "llama", "data": rows}
    given |= {"load_in_4bit": True, "max_steps": 6, "save_steps": 3, "warmup_ratio": 0}
    return [f"{name}={value}" for name, value in given.items()]


def test_a_run_goes_on_bit_for_bit(models: Path, run: Path, tmp_path: Path) -> None:
    """From its third step, in a copy, to the same adapter."""
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    (copy / "adapter_model.safetensors").unlink()
    again = ["sft", *words(models, run.parent / "rows.jsonl"), f"output_dir={copy}"]
    assert cli.main([*again, "resume_from_checkpoint=auto"]) == 0
    name = "adapter_model.safetensors"
    assert (copy / name).read_bytes() == (run / name).read_bytes()


def test_a_merge_is_onto_the_values_it_was_trained_over(
    models: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["merge", str(run), f"output_dir={tmp_path / 'merged'}"]) == 0
    assert "the base counts as nf4 held it" in capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    over = opened(models / "llama", "nf4")
    load_adapter(over, run)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, over(IDS).logits, rtol=1e-5, atol=1e-5)
        plain = opened(models / "llama", None)
        load_adapter(plain, run, other_base=True)
        assert float((plain(IDS).logits - merged(IDS).logits).abs().max()) > 1e-2
    assert get_bank(over).names() == ["default"]


def losses_told(text: str) -> list[float]:
    """The two losses of the line that compares bases."""
    found = re.search(r"([\d.]+) over the base held in nf4, as trained; ([\d.]+) merged onto", text)
    assert found is not None, text
    return [float(loss) for loss in found.groups()]


def eval_loss(capsys: pytest.CaptureFixture[str], *words: str) -> float:
    capsys.readouterr()
    assert cli.main(["eval", *words]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.strip().startswith("loss"))
    return float(line.split()[-1].split("[")[0])


def test_a_merge_onto_the_original_weights_tells_both_losses(
    models: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are PEFT's merge onto the files' own; the losses are those that eval gives of each."""
    rows, merged = run.parent / "rows.jsonl", tmp_path / "merged"
    words = ["merge", str(run), "onto=original", f"output_dir={merged}", "dtype=float32"]
    assert cli.main(words) == 2
    assert "onto=original needs rows" in capsys.readouterr().err
    assert cli.main([*words, f"data={rows}"]) == 0
    told = losses_told(capsys.readouterr().err)
    plain = AutoModelForCausalLM.from_pretrained(models / "llama", dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, run).merge_and_unload()
    state = peft.state_dict()
    for name, tensor in load_file(merged / "model.safetensors").items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-6)
    assert told[0] == pytest.approx(eval_loss(capsys, str(run), f"data={rows}"), abs=2e-3)
    original = eval_loss(capsys, str(run), f"data={rows}", "other_base=true")
    assert told[1] == pytest.approx(original, abs=2e-3)
    assert told[1] == pytest.approx(eval_loss(capsys, str(merged), f"data={rows}"), abs=2e-3)
    assert abs(told[0] - told[1]) > 1e-3


def test_another_combination_is_refused_and_accepted_when_asked(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(run), f"data={run.parent / 'rows.jsonl'}", "model.quantize=int8"]
    assert cli.main(words) != 0
    assert "other_base=true accepts" in capsys.readouterr().err
    assert cli.main([*words, "other_base=true"]) == 0


def test_a_run_over_whole_weights_has_no_other_base(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = opened(models / "llama", None)
    attach(base, LoraSpec(r=2, init_lora_weights=False))
    save_adapter(base, tmp_path / "adapter")
    rows = tinyrun.write_rows(tmp_path / "rows.jsonl", tinyrun.rows(4))
    assert cli.main(["merge", str(tmp_path / "adapter"), "onto=original", f"data={rows}"]) == 2
    assert "there are no others" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["peft", "gguf-lora"])
def test_an_adapter_alone_is_compared_on_the_base_it_had_which_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    assert cli.main(["export", str(run), f"to={to}", f"output_dir={tmp_path / to}"]) == 0
    assert "trained over a base held in nf4" in capsys.readouterr().err


def test_eval_opens_the_base_as_it_was(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run.parent / "rows.jsonl"
    assert cli.main(["eval", str(run), f"data={rows}"]) == 0
    assert capsys.readouterr().out


def test_what_is_not_cut_over_processes_is_refused_by_name(models: Path) -> None:
    for layout, sharing in (("fsdp", "shard"), ("megatron", "convert")):
        with pytest.raises(ConfigError, match=f"quantize=nf4 with backend={layout}: "):
            opened(models / "mixtral", "nf4", **{sharing: Mock()})
    # two heads of 4 inputs each: no rank has whole blocks of the output projection
    with pytest.raises(ConfigError, match=r"tensor_parallel=2: .*dense.* blocks of 64 values"):
        on_mesh(1, 2, lambda _, ranks: opened(models / "gpt_neox", "nf4", ranks=ranks))


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """{module: alpha/r B A} of PEFT's files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")] @ a
        for name, a in tensors.items()
        if "lora_A" in name
    }


def test_several_are_merged_into_one_for_the_same_base(
    models: Path, run: Path, tmp_path: Path
) -> None:
    """One adapter twice, with weights 1 and 2, is three times its delta over the same packed base."""
    again, merged = shutil.copytree(run, tmp_path / "again"), tmp_path / "merged"
    assert cli.main(["merge", str(run), str(again), "weights=[1,2]", f"output_dir={merged}"]) == 0
    facts = [json.loads((f / "lorry_adapter.json").read_text()) for f in (run, merged)]
    assert facts[0]["quantization"] == facts[1]["quantization"]
    got, one = deltas(merged), deltas(run)
    assert got.keys() == one.keys()
    for name, delta in one.items():
        torch.testing.assert_close(got[name], 3 * delta, rtol=1e-5, atol=1e-7)
    load_adapter(opened(models / "llama", "nf4"), merged)
