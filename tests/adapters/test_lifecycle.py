"""What outlives what: names that are used again, copies of a model, adapters beside one that has
diverged, bases that train.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import attach, detach, get_bank
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.mix import AdapterContext, Mix, MixTerm
from lorry.adapters.spec import LoraSpec
from tests.support.twins import native

DTYPES = [torch.float32, torch.bfloat16]


def linear(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48)).to(dtype).requires_grad_(False)


def fill(model: nn.Module, name: str, value: float) -> None:
    adapter = get_bank(model)[name]
    with torch.no_grad():
        adapter.values.fill_(value)
    adapter.touch()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_name_used_again_is_another_adapter(dtype: torch.dtype) -> None:
    """Freed memory and freed identities come back; the compute copies of the one before must not."""
    model, x = linear(dtype), torch.randn(4, 32).to(dtype)
    base = model(x)
    for i in range(40):
        attach(model, LoraSpec(r=4, target_modules="all-linear"), "again")
        value = 0.01 * (i + 1)
        fill(model, "again", value)
        expected = base.float() + 8.0 * 4 * value * value * x.float().sum(1, keepdim=True)
        assert torch.allclose(
            model(x).float(),
            expected,
            atol=1e-5 if dtype == torch.float32 else 0.05 + 0.02 * expected.abs().max(),
        )
        detach(model, "again")
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_diverged_neighbour_spoils_only_itself(dtype: torch.dtype, value: float) -> None:
    model = linear(dtype)
    for name in ("good", "bad"):
        attach(
            model,
            LoraSpec(r=4, target_modules="all-linear", init_lora_weights=False),
            name,
            seed=len(name),
        )
    layer = model[0]  # type: ignore[index]
    assert isinstance(layer, BankLinear)
    x = torch.randn(100, 32).to(dtype)
    call = AdapterContext(Mix.per_sequence(["good", "bad"], [0, 30, 100]))

    def pass_through() -> tuple[Tensor, Tensor, Tensor]:
        inner = x.clone().requires_grad_()
        get_bank(model)["good"].grads.zero_()
        y = layer(inner, call)
        (layer(y[:, :32], call)[:30].float().square().sum() + y[30:].float().sum()).backward()
        assert inner.grad is not None
        return (
            y.detach()[:30].clone(),
            inner.grad[:30].clone(),
            get_bank(model)["good"].grads.clone(),
        )

    before = pass_through()
    fill(model, "bad", value)
    for one, other in zip(pass_through(), before, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


def test_a_copied_model_trains_its_own_adapter() -> None:
    model = linear()
    attach(model, LoraSpec(r=4, target_modules="all-linear", init_lora_weights=False), "a")
    twin = deepcopy(model)
    x = torch.randn(3, 32)
    assert torch.equal(twin(x), model(x))
    adapter, before = get_bank(twin)["a"], model(x)
    twin(x).sum().backward()
    assert adapter.grads.norm() > 0
    assert not get_bank(model)["a"].grads.any()
    with torch.no_grad():
        adapter.values.add_(adapter.grads)
    adapter.touch()
    assert not torch.equal(twin(x), before)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_has_run_is_pickled_and_copied(dtype: torch.dtype) -> None:
    """While a graph of the original reads its own compute copies. The masters of either twin are views of
    its own buffer: a write to that, of which nobody tells, is one to them."""
    model, x = linear(dtype), torch.randn(4, 32).to(dtype)
    base = model(x)
    attach(model, LoraSpec(r=4, target_modules="all-linear", init_lora_weights=False), "a")
    y = model(x)
    for twin in (pickle.loads(pickle.dumps(model)), deepcopy(model)):  # noqa: S301
        adapter = get_bank(twin)["a"]
        assert not adapter.slots["0"].stacks
        assert torch.equal(twin(x), y)
        with torch.no_grad():
            adapter.values.zero_()
        assert torch.equal(twin(x), base)
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copied_decoder_computes_with_the_same_kernels(
    dtype: torch.dtype, family: str, tiny: Any, ids: Tensor
) -> None:
    """To the last bit. The copy's activation was none that has a kernel (gradients 1.5e-6 off in float32,
    0.04 in bfloat16), and a GPT-2's could not be pickled."""
    model = native(tiny(family)).to(dtype)
    attach(model, LoraSpec(r=2, target_modules="all-linear", init_lora_weights=False), "a")

    def passes(decoder: nn.Module) -> tuple[Tensor, Tensor]:
        logits = decoder(ids).logits
        logits.float().square().sum().backward()
        return logits.detach(), get_bank(decoder)["a"].grads

    twins = (deepcopy(model), pickle.loads(pickle.dumps(model)))  # noqa: S301
    expected = passes(model)
    for twin in twins:
        for one, other in zip(passes(twin), expected, strict=True):
            assert torch.equal(one, other)


# what is written of an adapter at a linear, without a word
WRITES: dict[str, Callable[[Adapter], Tensor]] = {
    "A": lambda adapter: adapter.slots["0"].A,
    "B": lambda adapter: adapter.slots["0"].B,
    "the buffer": lambda adapter: adapter.values,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("copied", [False, True], ids=["original", "copy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_is_of_other_values_than_the_forward_pass_s(
    dtype: torch.dtype, copied: bool, write: str
) -> None:
    """In float32, where products read the masters themselves, what was written before backward was in its
    gradients, silently. In bfloat16 they are of what was there."""
    model, x = linear(dtype), torch.randn(4, 32).to(dtype)
    attach(model, LoraSpec(r=4, target_modules="all-linear", init_lora_weights=False), "a")
    model = deepcopy(model) if copied else model
    adapter = get_bank(model)["a"]
    model(x).float().square().sum().backward()
    expected = adapter.grads.clone()
    adapter.grads.zero_()
    loss = model(x).float().square().sum()
    with torch.no_grad():
        WRITES[write](adapter).mul_(1.5)
    if dtype == torch.float32:
        with pytest.raises(
            RuntimeError, match=r"^0: its adapter was written between a forward pass and the back"
        ):
            loss.backward()
        assert not adapter.grads.any()
        model(x).float().square().sum().backward()  # and the next is as ever
        assert not torch.equal(adapter.grads, expected)
    else:
        loss.backward()
        assert torch.equal(adapter.grads, expected)


@pytest.mark.parametrize("kind", ["a second adapter", "a start that is taken off"])
def test_a_write_to_what_nobody_reads_in_place_is_none_of_backward_s(kind: str) -> None:
    """Two adapters, and factors behind which a start's lie, are joined in memory of their own: in float32,
    too, gradients are of what was there. Writes to them were refused."""
    model, x = linear(torch.float32), torch.randn(4, 32)
    mix = Mix.one("a")
    if kind == "a second adapter":
        for name in ("a", "b"):
            attach(model, LoraSpec(r=4, target_modules="all-linear", init_lora_weights=False), name)
        mix = Mix.constants({"a": 1.0, "b": 0.5})
    else:
        attach(model, LoraSpec(r=4, target_modules="all-linear", init_lora_weights="pissa"), "a")
    bank = get_bank(model)
    bank.activate(mix)
    adapter = bank["a"]
    slot = adapter.slots["0"]
    assert (slot.initial is None) == (kind == "a second adapter")
    model(x).square().sum().backward()
    expected = adapter.grads.clone()
    assert expected.any()
    adapter.grads.zero_()
    for write in (slot.A, slot.B):
        loss = model(x).square().sum()
        before = write.detach().clone()
        with torch.no_grad():
            write.mul_(1.5)
        loss.backward()
        assert torch.equal(adapter.grads, expected)
        with torch.no_grad():
            write.copy_(before)
        adapter.grads.zero_()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_optimizer_that_steps_in_the_midst_of_backward(
    dtype: torch.dtype, use_dora: bool
) -> None:
    """Each parameter as soon as it has its gradient: others of the same buffer are yet to be asked for."""
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 8)).to(dtype).requires_grad_(False)
    spec = LoraSpec(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=use_dora)
    attach(model, spec, "a")
    twin, x = deepcopy(model), torch.randn(4, 32).to(dtype)
    model(x).float().square().sum().backward()
    whole, adapter = get_bank(model)["a"], get_bank(twin)["a"]
    expected = whole.values - 0.1 * whole.grads

    def step(param: Tensor) -> None:
        with torch.no_grad():
            assert param.grad is not None
            param.sub_(0.1 * param.grad)

    for param in adapter.masters().values():
        param.register_post_accumulate_grad_hook(step)
    twin(x).float().square().sum().backward()
    assert whole.grads.any()
    torch.testing.assert_close(adapter.values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True], ids=["one", "with a gate"])
def test_compute_copies_stay_in_their_memory_unless_a_graph_reads_them(gated: bool) -> None:
    """In bfloat16 they are other tensors than the masters."""
    model, x = linear(torch.bfloat16), torch.randn(4, 32).bfloat16()
    attach(model, LoraSpec(r=4, target_modules="all-linear"), "a")
    layer, adapter = model[0], get_bank(model)["a"]  # type: ignore[index]
    assert isinstance(layer, BankLinear)
    slot = layer.slots["a"]
    gate = torch.full((4,), 0.5) if gated else 1.0
    call = AdapterContext(Mix((MixTerm("a", None, gate),)))

    def memory() -> tuple[int, int]:
        (entry,) = slot.stacks.values()
        a, b = entry.copies.lora_A, entry.copies.parts[0].lora_B
        # a scale is in the copies of B where there are gates
        assert torch.equal(a, slot.A.detach().bfloat16())
        assert torch.equal(b, (slot.B.detach() * (slot.scale if gated else 1.0)).bfloat16())
        return a.data_ptr(), b.data_ptr()

    def train(other_pass: bool) -> Tensor:
        fill(model, "a", 0.3)
        adapter.grads.zero_()
        y = layer(x, call)
        first = memory()
        if other_pass:
            # what was written here would be what the graph above reads
            fill(model, "a", 0.7)
            layer(x, call)
            assert not set(first) & set(memory())
        y.float().square().sum().backward()
        return adapter.grads.clone()

    expected = train(False)
    assert expected.any()
    there = memory()
    for value in (0.1, 0.2):
        fill(model, "a", value)
        layer(x, call)
        assert memory() == there
    assert torch.equal(train(True), expected)


def test_compute_copies_of_an_adapter_lie_in_one_piece() -> None:
    """Between the activations of a pass they would leave holes. A second user of a master, whose graph
    might read what the first one writes, and masters that were moved have memory of their own."""
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 8)).bfloat16().requires_grad_(False)
    attach(model, LoraSpec(r=4, target_modules="all-linear"), "a")
    layers = [layer for layer in model if isinstance(layer, BankLinear)]
    x = torch.randn(3, 32).bfloat16()
    model(x)

    def copies(layer: BankLinear) -> list[Tensor]:
        (entry,) = layer.slots["a"].stacks.values()
        return [entry.copies.lora_A, entry.copies.parts[0].lora_B]

    made = [copy for layer in layers for copy in copies(layer)]
    (piece,) = {copy.untyped_storage().data_ptr() for copy in made}
    starts = sorted((c.data_ptr(), c.data_ptr() + c.nbytes) for c in made)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(starts))
    assert made[0].untyped_storage().nbytes() == sum(copy.nbytes for copy in made)

    layers[0].slots["a"].stacks.clear()
    adapter = get_bank(model)["a"]
    before = model(x)
    assert all(c.untyped_storage().data_ptr() != piece for c in copies(layers[0]))
    adapter.use_buffers(adapter.values.clone(), adapter.grads.clone())
    layers[1].slots["a"].stacks.clear()
    assert torch.equal(model(x), before)
    assert all(c.untyped_storage().data_ptr() != piece for c in copies(layers[1]))


@pytest.mark.parametrize("trained", ["weight", "bias", "both"])
def test_the_base_under_an_adapter_gets_its_gradient(trained: str) -> None:
    model = linear()
    attach(model, LoraSpec(r=4, target_modules="all-linear", init_lora_weights=False), "a")
    layer = model[0]  # type: ignore[index]
    layer.weight.requires_grad_(trained != "bias")
    layer.bias.requires_grad_(trained != "weight")
    x, grad = torch.randn(5, 32), torch.randn(5, 48)
    model(x).backward(grad)
    truth = {"weight": grad.t() @ x, "bias": grad.sum(0)}
    for name, expected in truth.items():
        found = getattr(layer, name).grad
        assert (found is not None) is (trained in (name, "both"))
        assert found is None or torch.allclose(found, expected, atol=1e-5)
    assert get_bank(model)["a"].grads.norm() > 0


def test_second_derivatives_are_refused(tiny: Any, ids: Tensor) -> None:
    model = tiny("llama")
    adapter = attach(model, LoraSpec(r=2, init_lora_weights=False))
    slot = next(iter(adapter.slots.values()))
    (first,) = torch.autograd.grad(model(ids).logits.square().sum(), slot.A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_only_the_biases_train(tiny: Any, ids: Tensor) -> None:
    model = tiny("gpt2")
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(".bias"))
    model(ids).logits.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if n.endswith(".bias")
    }
