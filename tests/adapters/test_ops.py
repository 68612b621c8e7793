"""The low-rank product against the plain equation in float64, forward and backward, for every kind
of mix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.layers.stacks import ComputeCopies, StackedAdapters
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix, MixTerm
from lorry.adapters.product import PartParams, TermParams
from lorry.adapters.spec import LoraSpec

I, O, T, V = 7, 5, 12, 11  # noqa: E741
STARTS = (0, 3, 7, 8, 12)
RANKS = {"a": 2, "b": 3, "c": 1}
MIXES = {
    "none": lambda g: Mix.none(),
    "one": lambda g: Mix.one("a"),
    "constants": lambda g: Mix.constants({"a": 0.3, "b": -1.0, "c": 2.5}),
    "per sequence": lambda g: Mix.per_sequence(["b", None, "a", "c"], STARTS),
    "neighbours": lambda g: Mix.per_sequence(["a", "a", "b", None], STARTS),
    "routed": lambda g: Mix.routed(["a", "b", "c"], g),
    "routed rows": lambda g: Mix((MixTerm("c", slice(2, 9), g[2:9, 0]), MixTerm("a", None, -0.5))),
    "twice the same": lambda g: Mix((MixTerm("a"), MixTerm("a", slice(0, 4), 2.0))),
}


class Layer(nn.Module):
    """One layer under a name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@dataclass
class Result:
    """What is compared: the output and every gradient."""

    y: Tensor
    grads: dict[str, Tensor]


@contextmanager
def ambient(call: AdapterContext) -> Iterator[None]:
    token = AMBIENT_CONTEXT.set(call)
    try:
        yield
    finally:
        AMBIENT_CONTEXT.reset(token)


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (
        torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        * scale
    )


def build(kind: str, dtype: torch.dtype, dropout: float = 0.0) -> Layer:
    """A linear with bias, a Conv1D or an embedding, with adapters a, b, c of ranks 2, 3, 1 and
    random masters.
    """
    torch.manual_seed(0)
    inner: nn.Module = {
        "linear": lambda: nn.Linear(I, O),
        "conv": lambda: Conv1D(O, I),
        "embedding": lambda: nn.Embedding(V, O),
    }[kind]()
    model = Layer(inner).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(draw(*p.shape, seed=20 + i))
    for k, (name, rank) in enumerate(RANKS.items()):
        attach(model, LoraSpec(r=rank, lora_alpha=3, lora_dropout=dropout), name, modules=["inner"])
        for j, p in enumerate(get_bank(model)[name].slots["inner"].__dict__[side] for side in "AB"):
            with torch.no_grad():
                p.copy_(draw(*p.shape, seed=30 + 2 * k + j, scale=0.5))
    return model


def ours(
    model: Layer, x: Tensor, mix: Mix, gates: Tensor, dy: Tensor, noise: DropoutNoise | None = None
) -> Result:
    with ambient(AdapterContext(mix, noise)):
        y = model(x)
    for adapter in get_bank(model).adapters.values():
        adapter.grads.zero_()
    if y.requires_grad:
        y.backward(dy.to(y.dtype))
    grads = {} if x.grad is None else {"x": x.grad}
    if gates.grad is not None:
        grads["gates"] = gates.grad
    for name, adapter in get_bank(model).adapters.items():
        grads |= {f"{name}.{k}": v for k, v in adapter.split_like(adapter.grads).items()}
    return Result(y.detach(), grads)


def plain(
    model: Layer,
    x: Tensor,
    mix: Mix,
    gates: Tensor,
    dy: Tensor,
    masks: dict[str, Tensor] | None = None,
) -> Result:
    """The equation, line by line, in float64 with torch's own autograd: y = W x + b + sum g s B (A
    (x * mask / (1-p))).
    """
    layer = get_bank(model).modules["inner"]
    weight = layer.weight.detach().double()
    leaves = {
        n: {s: getattr(a.slots["inner"], s).detach().double().requires_grad_() for s in "AB"}
        for n, a in get_bank(model).adapters.items()
    }
    source = x.detach().double().requires_grad_() if x.is_floating_point() else x
    embedded = not x.is_floating_point()
    if embedded:
        y = weight[x]
    else:
        matrix = weight.T if isinstance(layer.replaced[0], Conv1D) else weight
        y = source @ matrix.T + layer.bias.detach().double()
    rows = []
    for term in mix.terms:
        slot, part = get_bank(model)[term.adapter].slots["inner"], term.rows or slice(None)
        a, b = leaves[term.adapter]["A"], leaves[term.adapter]["B"]
        if embedded:
            low = nn.functional.one_hot(source[part], V).double() @ a.T @ b.T
        else:
            kept = source if masks is None else source * masks[term.adapter] / (1 - slot.dropout)
            low = kept[part] @ a.T @ b.T
        gate = term.gate[:, None] if isinstance(term.gate, Tensor) else term.gate
        full = torch.zeros_like(y)
        full[part] = slot.scale * gate * low
        rows.append(full)
    y = y + sum(rows) if rows else y
    if y.requires_grad:
        y.backward(dy)
    grads = {} if embedded or source.grad is None else {"x": source.grad}
    if gates.grad is not None:
        grads["gates"] = gates.grad
    for name, sides in leaves.items():
        grads |= {
            f"{name}.inner.lora_{s}": t.grad if t.grad is not None else torch.zeros_like(t)
            for s, t in sides.items()
        }
    return Result(y.detach(), grads)


def agree(got: Result, want: Result, bound: float) -> None:
    """Relative error of the whole tensor (Frobenius), for the output and each gradient; the same
    gradients exist.
    """
    assert set(got.grads) == set(want.grads)
    for name, value in {"y": got.y, **got.grads}.items():
        truth = want.y if name == "y" else want.grads[name]
        error = float((value.double() - truth.double()).norm())
        assert error <= bound * max(float(truth.double().norm()), 1e-3), (
            f"{name}: {error} of {float(truth.double().norm())}"
        )


def compare(
    kind: str,
    make: Any,
    dtype: torch.dtype,
    bound: float,
    dropout: float = 0.0,
    keys: Sequence[int] = (5, 6, 7, 8),
) -> None:
    model = build(kind, dtype, dropout)
    if kind == "embedding":
        x = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))
    else:
        x = draw(T, I, seed=1).to(dtype).requires_grad_()
    gates = [draw(T, 3, seed=2).to(dtype).requires_grad_() for _ in range(2)]
    wide = gates[1].detach().double().requires_grad_()
    dy = draw(T, O, seed=3).to(dtype).double()
    noise = DropoutNoise(1, 2, tuple(keys), STARTS) if dropout else None
    site = get_bank(model).modules["inner"].path
    masks = (
        {
            n: DropoutNoise(1, 2, tuple(keys), STARTS)
            .at(site, dropout)
            .mask(I, torch.device("cpu"))
            for n in RANKS
        }
        if dropout
        else None
    )
    agree(
        ours(model, x, make(gates[0]), gates[0], dy, noise),
        plain(model, x, make(wide), wide, dy, masks),
        bound,
    )


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_every_mix(kind: str, mix: str, dtype: torch.dtype, bound: float) -> None:
    compare(kind, MIXES[mix], dtype, bound)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_with_dropout(kind: str, mix: str) -> None:
    compare(kind, MIXES[mix], torch.float32, 1e-5, dropout=0.4)


@st.composite
def mixes(draw_: st.DrawFn) -> list[tuple[str, int, int, float | int]]:
    """Terms as (adapter, start, stop, gate): a float, or the column of the gates."""
    rows = st.tuples(st.integers(0, T), st.integers(0, T)).map(sorted)
    gate = st.floats(-2, 2, allow_nan=False) | st.integers(0, 2)
    return draw_(
        st.lists(
            st.tuples(st.sampled_from("abc"), rows, gate).map(lambda t: (t[0], *t[1], t[2])),
            max_size=5,
        )
    )


@given(
    terms=mixes(),
    kind=st.sampled_from(["linear", "conv", "embedding"]),
    dropout=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_any_terms(
    terms: list[tuple[str, int, int, float | int]], kind: str, dropout: float
) -> None:
    def make(g: Tensor) -> Mix:
        return Mix(
            tuple(
                MixTerm(a, slice(i, j), g[i:j, c] if isinstance(c, int) else c)
                for a, i, j, c in terms
            )
        )

    compare(kind, make, torch.float64, 1e-6, dropout if kind != "embedding" else 0.0)


def test_batches_of_any_shape() -> None:
    model = build("linear", torch.float64)
    x = draw(2, 3, 2, I, seed=4)
    get_bank(model).activate(Mix.constants({"a": 1, "b": -2}))
    torch.testing.assert_close(model(x), model(x.reshape(-1, I)).reshape(2, 3, 2, O))
    assert model(x[:, 0, 0]).shape == (2, O)


def test_the_mix_of_the_forward_pass_holds_in_backward() -> None:
    model = build("linear", torch.float32)
    x = draw(T, I, seed=1).float()
    with ambient(AdapterContext(Mix.one("a"))):
        y = model(x)
    get_bank(model).activate(Mix.one("b"))
    y.sum().backward()
    assert get_bank(model)["a"].grads.abs().sum() > 0
    assert get_bank(model)["b"].grads.abs().sum() == 0


def test_the_frozen_base_gets_no_gradient_and_no_adapter_changes_it() -> None:
    model = build("linear", torch.float32)
    layer = get_bank(model).modules["inner"]
    x = draw(T, I, seed=1).float()
    with ambient(AdapterContext(Mix.none())):
        assert torch.equal(model(x), nn.functional.linear(x, layer.weight, layer.bias))
    with ambient(AdapterContext(Mix.one("a"))):
        model(x).sum().backward()
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad


def test_no_copy_of_the_input_per_adapter() -> None:
    """What autograd keeps for backward: x once, the weight, and rank-sized pieces."""
    model = build("linear", torch.float32)
    x = draw(T, I, seed=1).float()
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with (
        ambient(AdapterContext(Mix.constants(dict.fromkeys(RANKS, 1.0)))),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        model(x)
    assert sum(t.data_ptr() == x.data_ptr() for t in kept) == 1
    sizes = sorted(t.shape[0] for t in kept if t.dim() == 2 and t.shape[0] == T)
    assert sizes == [T, T], "x, and A x of all adapters as one"


def test_experts_of_one_stack_keep_their_ranks_rates_and_gradients() -> None:
    """Four gated experts of different ranks at one linear; one is frozen and one has a dropout rate
    of its own, so that it is a product by itself: values and gradients of plain float64 autograd."""
    model = build("linear", torch.float32)
    bank = get_bank(model)
    attach(model, LoraSpec(r=4, lora_alpha=2, init_lora_weights=False), "d", modules=["inner"])
    bank["c"].slots["inner"].dropout = 0.5
    for side in "AB":
        getattr(bank["b"].slots["inner"], side).requires_grad_(False)
    names, starts, keys = list("abcd"), (0, 5, T), (3, 8)
    x = draw(T, I, seed=1).float().requires_grad_()
    gates = draw(T, 4, seed=2).float().requires_grad_()
    noise = DropoutNoise(0, 1, keys, starts)
    layer = bank.modules["inner"]
    mask = noise.at("inner", 0.5).mask(I, x.device) * 2.0
    with ambient(AdapterContext(Mix.routed(names, gates), noise)):
        stacks, _ = layer.group.stacks(AdapterContext(Mix.routed(names, gates), noise), "inner")
        y = model(x)
    assert [stack.num_slots for stack in stacks] == [3, 1]
    dy = draw(T, O, seed=3)
    y.backward(dy.float())
    leaves = {
        n: [
            getattr(bank[n].slots["inner"], side).detach().double().requires_grad_()
            for side in "AB"
        ]
        for n in names
    }
    source, shares = x.detach().double().requires_grad_(), gates.detach().double().requires_grad_()
    wanted = source @ layer.weight.double().T + layer.bias.double()
    for k, (name, (a, b)) in enumerate(leaves.items()):
        read = source * mask if name == "c" else source
        scale = bank[name].slots["inner"].scale
        wanted = wanted + shares[:, k, None] * scale * (read @ a.T @ b.T)
    wanted.backward(dy)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), source.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gates.grad.double(), shares.grad, rtol=1e-5, atol=1e-4)
    for name, (a, b) in leaves.items():
        grads = bank[name].split_like(bank[name].grads)
        for side, leaf in (("A", a), ("B", b)):
            expected = torch.zeros_like(leaf) if name == "b" else leaf.grad
            found = grads[f"inner.lora_{side}"].double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_one_batch_serves_several_adapters_end_to_end(
    tiny: Any, ids: Tensor, logits: Any, shake: Any
) -> None:
    """Two rows of one batch, one with adapter b and one with the base, on a whole foreign model."""
    model = tiny("llama")
    plain_logits = logits(model, ids)
    for name, rank in (("a", 2), ("b", 4)):
        attach(model, LoraSpec(r=rank, target_modules="all-linear"), name)
        shake([p for s in get_bank(model)[name].slots.values() for p in (s.A, s.B)])
    get_bank(model).activate(Mix.one("b"))
    alone = logits(model, ids)
    with ambient(AdapterContext(Mix.per_sequence(["b", None], [0, 9, 18]))):
        both = logits(model, ids)
    torch.testing.assert_close(both[0], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(both[1], plain_logits[1], rtol=0, atol=1e-5)


def test_the_parameters_of_terms_come_back_in_their_places() -> None:
    """A and B of each part, then the gate; what belongs to others stays in the iterator."""

    def no_copies() -> ComputeCopies:
        raise AssertionError("where masters are does not hang on their copies")

    stacks = [StackedAdapters(slice(None), n, no_copies, None, lambda: None) for n in (2, 1)]
    names = iter(["A0", "B0", "A1", "B1", "gate", "A", "B", "other gate", "base"])
    terms = TermParams.unflat(stacks, names)
    assert terms == [
        TermParams((PartParams("A0", "B0"), PartParams("A1", "B1")), "gate"),
        TermParams((PartParams("A", "B"),), "other gate"),
    ]
    assert list(names) == ["base"]
    assert TermParams.flat(terms) == ["A0", "B0", "A1", "B1", "gate", "A", "B", "other gate"]
    assert TermParams.flat(TermParams.none(stacks)) == [None] * 8


def test_copies_of_another_scale_are_not_written_over() -> None:
    """The masters alone are copied anew at a step; a share's scale is that of its slot."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    attach(net, LoraSpec(r=4, lora_alpha=8, target_modules="all-linear"))
    (slot,) = net[0].slots.values()
    x = torch.randn(6, 64).bfloat16()
    for scale in (2.0, -3.0):
        slot.scale = scale
        with torch.no_grad():
            slot.B.normal_()
        got = net(x).detach().double()
        weight = net[0].weight.double() + scale * slot.B.double() @ slot.A.double()
        want = x.double() @ weight.t() + net[0].bias.double()
        assert (got - want).norm() < 0.01 * want.norm()
