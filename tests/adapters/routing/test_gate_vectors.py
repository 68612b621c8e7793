"""PHATGOOSE's vectors: gates and gradients of their training against autograd on transformers' model,
and the gates that they give afterwards.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.routing.gate_vectors import GateVectors, attach_gate_vectors
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError
from lorry.models.causal_lm import CausalLM, PackedInput
from lorry.models.hf.model import HfModel
from tests.support import tiny

SEQUENCES = {"a": [5, 9, 3, 7, 11, 2], "c": [8, 1, 4, 6, 13, 12, 10, 9]}


def model_with_vectors(
    tmp_path: Path, native: bool = True
) -> tuple[CausalLM, torch.nn.Module, GateVectors]:
    """Three experts of different ranks, one of them on two linears of a layer, and vectors of random
    values."""
    source = tiny.fresh("llama", num_hidden_layers=2)
    model: CausalLM = tiny.decoder(source, tmp_path) if native else HfModel(deepcopy(source))
    for rank, name in ((2, "a"), (4, "b"), (3, "c")):
        targets = ["q_proj", "down_proj"] if name == "c" else "all-linear"
        spec = LoraSpec(
            r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=targets
        )
        adapter = attach(model, spec, name, seed=rank)
        with torch.no_grad():
            adapter.values.mul_(0.3)
        adapter.touch()
    vectors = attach_gate_vectors(model, "abc", top_k=2, temperature=0.5)
    with torch.no_grad():
        vectors.values.copy_(torch.randn(vectors.values.numel(), generator=torch.manual_seed(3)))
    return model, source, vectors


@pytest.mark.parametrize("native", [True, False])
def test_vectors_train_on_their_own_rows(native: bool, tmp_path: Path) -> None:
    """Rows of two domains in one pass, each under its expert alone times the sigmoid: gradients in
    float32 within 1e-5 of float64 on transformers, and none for the vectors of the third expert; in
    Lorry's decoder and where transformers' own code runs."""
    model, source, vectors = model_with_vectors(tmp_path, native)
    model.gradient_checkpointing = not native
    rows, packed = list(SEQUENCES.values()), PackedInput.of(list(SEQUENCES.values()))
    starts = [0, *(stop for _, stop in packed.segments)]
    call = AdapterContext(Mix.packed([vectors.training_mix(n) for n in SEQUENCES], starts))
    logits = model.logits(model.hidden(packed, call).last, call)
    found = sum(
        F.cross_entropy(logits[start : stop - 1], torch.tensor(row[1:]), reduction="sum")
        for row, (start, stop) in zip(rows, packed.segments, strict=True)
    )
    assert isinstance(found, Tensor)
    found.backward()

    theirs, bank = source.double(), get_bank(model)
    weights = {n: t.detach().double().requires_grad_() for n, t in vectors.tensors().items()}
    now = "a"

    def add(path: str, x: Tensor, y: Tensor) -> Tensor:
        slot = bank[now].slots.get(path)
        if slot is None:
            return y
        gate = (x @ weights[f"{path}.weight"]["abc".index(now)]).sigmoid()
        low = x @ slot.A.detach().double().t() @ slot.B.detach().double().t()
        return y + gate[..., None] * slot.scale * low

    for path in bank.modules:
        theirs.get_submodule(path).register_forward_hook(lambda m, x, y, p=path: add(p, x[0], y))
    for now, row in SEQUENCES.items():  # noqa: B007  # the hooks read it
        ids = torch.tensor([row])
        F.cross_entropy(
            theirs(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"
        ).backward()
    for name, grad in vectors.split_like(vectors.grads).items():
        wanted = weights[name].grad
        assert wanted is not None
        assert not grad[1].any()
        assert float((grad.double() - wanted).norm() / wanted.norm()) < 1e-5, name


def test_gates_are_softmax_over_cosines(tmp_path: Path) -> None:
    """z = norm(v) . norm(x) / sqrt(I), the two largest of those who are there."""
    _, _, vectors = model_with_vectors(tmp_path)
    x, path = torch.randn(5, 32), "model.layers.1.mlp.gate_proj"
    gates = vectors.linear_gates([path, "model.layers.1.self_attn.q_proj"], x).view(5, 2, 3)
    v = vectors.tensors()[f"{path}.weight"][:2].double()

    def norm(t: Tensor) -> Tensor:
        return (t - t.mean(-1, keepdim=True)) / (
            t.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt()

    z = norm(x.double()) @ norm(v).t() / 32**0.5 / 0.5
    # the third expert is not on this linear, and is no choice
    torch.testing.assert_close(gates[:, 0, :2].double(), z.softmax(-1), rtol=1e-5, atol=1e-6)
    assert not gates[:, 0, 2].any()
    assert (gates[:, 1] != 0).sum(-1).tolist() == [2] * 5
    torch.testing.assert_close(gates.sum(-1), torch.ones(5, 2))
    elsewhere = vectors.linear_gates(["lm_head"], x)
    assert not elsewhere.any()


def test_what_no_vectors_can_be(tmp_path: Path) -> None:
    model = tiny.decoder(tiny.fresh("llama"), tmp_path)
    for name in ("a", "b", "router"):
        attach(model, LoraSpec(r=2, target_modules=["q_proj"]), name)
    with pytest.raises(ConfigError, match="cannot be called 'router'"):
        attach_gate_vectors(model, ["a", "b"])
    get_bank(model).remove("router")
    with pytest.raises(ConfigError, match="1 to 2 of 2"):
        attach_gate_vectors(model, ["a", "b"], top_k=3)
