"""DoRA beside PEFT's, with PEFT's own forward pass and autograd as the judge: for every family on Lorry's
decoder and on transformers' classes; and what it refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import attach
from lorry.adapters.merge import merge, merged_tensors, unmerge
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.families import find_family
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.model import Decoder
from tests.support import tiny

EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in"}
MAGNITUDE = "lora_magnitude_vector"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PEFT warns about Conv1D's layout and tied heads, which are meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def native(foreign: Any) -> Decoder:
    """Our decoder with the same weights."""
    family = find_family(foreign.config.model_type)
    assert family is not None
    model = Decoder(family, foreign.config.to_dict())
    model.load_state_dict(foreign.state_dict())
    return model


def foreign(model: nn.Module) -> nn.Module:
    """transformers' own classes."""
    return model


HOMES = pytest.mark.parametrize("home", [native, foreign])


def whole_spec(family: str, **changes: Any) -> dict[str, Any]:
    """Every linear, the head and the embedding, in PEFT's words."""
    linears = {
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    }.get(family, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    ends = ["lm_head", EMBEDDING.get(family, "embed_tokens")]
    return {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": linears + ends,
        "use_dora": True,
        **changes,
    }


def shake_dora(parameters: Iterator[tuple[str, Tensor]], seed: int = 3) -> None:
    """Random A and B, and magnitudes some way from where they begin."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in parameters:
            noise = torch.randn(p.shape, generator=draw) * 0.2
            if MAGNITUDE in name:
                p.mul_(1 + noise)
            else:
                p.copy_(noise)


def peft_model(model: nn.Module, case: dict[str, Any]) -> Any:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **case)).eval()
    shake_dora((n, p) for n, p in wrapped.named_parameters() if "lora_" in n)
    return wrapped


def peft_tensors(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their canonical names."""
    return {
        n.replace(".default", "")
        .removeprefix("base_model.model.")
        .replace("lora_embedding_", "lora_")
        .removesuffix(".weight"): p
        for n, p in wrapped.named_parameters()
        if "lora_" in n
    }


def backward(model: nn.Module, ids: Tensor) -> None:
    logits = model(input_ids=ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@HOMES
def test_logits_gradients_files_and_merge_are_pefts(
    home: Callable[..., Any], family: str, tiny: Any, ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    theirs = peft_model(tiny(family), whole_spec(family))
    theirs.save_pretrained(tmp_path / "theirs")
    model = home(tiny(family))
    adapter = load_adapter(model, tmp_path / "theirs")
    assert adapter.spec.use_dora
    expected = logits(theirs, ids)
    assert (expected - logits(tiny(family), ids)).abs().max() > 1e-2, "the adapter must matter"
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    # one step's gradients, of magnitudes too
    backward(theirs, ids)
    backward(model, ids)
    wanted, own = peft_tensors(theirs), adapter.split_like(adapter.grads)
    assert set(own) == set(wanted)
    assert sum(name.endswith(MAGNITUDE) for name in own) == len(adapter.slots)
    for name, grad in own.items():
        assert relative(grad, wanted[name].grad) < 1e-5, name
    # back again
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours")
    torch.testing.assert_close(logits(again, ids), expected, rtol=0, atol=1e-5)
    unmerged = logits(model, ids)
    streamed = dict(merged_tensors(model))
    report = merge(model)
    assert all(row.delta > 0 for row in report.rows)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in streamed.items())
    tied = ("lm_head", EMBEDDING.get(family, "embed_tokens"))
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        # PEFT merges both ends into the one weight that they share
        if tiny(family).config.tie_word_embeddings and name.split(".")[-2] in tied:
            continue
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model, ids), unmerged)


@HOMES
def test_it_begins_as_the_base(
    home: Callable[..., Any], tiny: Any, ids: Tensor, logits: Any
) -> None:
    model = home(tiny("gpt2"))
    base = logits(model, ids)
    adapter = attach(model, LoraSpec(**whole_spec("gpt2")))
    torch.testing.assert_close(logits(model, ids), base, rtol=0, atol=0)
    theirs = peft.get_peft_model(
        tiny("gpt2"), peft.LoraConfig(task_type="CAUSAL_LM", **whole_spec("gpt2"))
    )
    starts = {n: p.detach() for n, p in peft_tensors(theirs).items() if MAGNITUDE in n}
    own = {n: t for n, t in adapter.tensors().items() if n.endswith(MAGNITUDE)}
    assert set(own) == set(starts)
    for name, values in own.items():
        torch.testing.assert_close(values, starts[name], rtol=1e-6, atol=0)


@HOMES
def test_beside_biases_that_train(
    home: Callable[..., Any], tiny: Any, ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    """A magnitude leaves the bias as it is: logits and gradients are PEFT's."""
    case = {"r": 3, "target_modules": ["c_attn", "c_fc"], "use_dora": True, "bias": "lora_only"}
    theirs = peft_model(tiny("gpt2"), case)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad and name.endswith(".bias"):
                p.add_(0.3)
    theirs.save_pretrained(tmp_path)
    model = home(tiny("gpt2"))
    adapter = load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=0, atol=1e-5)
    backward(theirs, ids)
    backward(model, ids)
    wanted = {
        n.replace(".default", "").removeprefix("base_model.model.").removesuffix(".weight"): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    own = adapter.split_like(adapter.grads)
    assert set(own) == set(wanted)
    for name, grad in own.items():
        assert relative(grad, wanted[name]) < 1e-5, name
    expected = logits(theirs, ids)
    merge(model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)
    unmerge(model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_layer_keeps_little_more_than_loras(model_type: str) -> None:
    """What the MLP adds to the stream, [T,D]; what attention adds stands in place of the stream behind it, unless
    the two are parallel."""
    config = {"llama": tiny.LLAMA, "gpt_neox": tiny.NEOX}[model_type]
    tokens, kept = list(range(1, 24)), dict[bool, int]()
    for use_dora in (False, True):
        model = native(tiny.random_model(config).float())
        attach(model, LoraSpec(r=2, use_dora=use_dora), "one")
        call = AdapterContext(Mix.one("one"))
        seen = dict[int, Tensor]()

        def keep(tensor: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            seen[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden(PackedInput.of([tokens]), call)
        kept[use_dora] = sum(t.numel() for t in seen.values() if len(t) == len(tokens))
    parallel = model_type == "gpt_neox"  # its default
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    assert isinstance(layers, int)
    assert isinstance(width, int)
    assert kept[True] - kept[False] == layers * (2 if parallel else 1) * len(tokens) * width


@pytest.mark.parametrize(
    "first", [nn.Linear(6, 8), nn.Embedding(6, 8)], ids=["linear", "embedding"]
)
def test_a_model_may_change_its_output_in_place(first: nn.Module) -> None:
    """As torch's own layers allow it; backward of a magnitude reads the output."""
    theirs = nn.Sequential(first, nn.ReLU(inplace=True), nn.Linear(8, 3))
    model = copy.deepcopy(theirs)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=True)
    config.init_lora_weights = False
    theirs = peft.get_peft_model(theirs, config)
    adapter = attach(model, LoraSpec(r=2, lora_alpha=8, target_modules=("0", "2"), use_dora=True))
    found = dict(theirs.base_model.model.named_parameters())
    kind = (
        "lora_embedding_{}.default" if isinstance(first, nn.Embedding) else "lora_{}.default.weight"
    )
    names = {
        "0.lora_A": f"0.{kind.format('A')}",
        "0.lora_B": f"0.{kind.format('B')}",
        "2.lora_A": "2.lora_A.default.weight",
        "2.lora_B": "2.lora_B.default.weight",
        **{f"{n}.lora_magnitude_vector": f"{n}.lora_magnitude_vector.default.weight" for n in "02"},
    }
    with torch.no_grad():
        for name, value in adapter.tensors().items():
            value.copy_(found[names[name]])
    adapter.touch()
    ids = torch.arange(6)
    x = ids if isinstance(first, nn.Embedding) else torch.eye(6)
    for each in (theirs, model):
        each(x).square().sum().backward()
    for name, gradient in adapter.split_like(adapter.grads).items():
        assert relative(gradient, found[names[name]].grad) < 1e-5, name
