"""DoRA among other adapters and bases: packed beside others, recomputed, with dropout, over packed weights
and over a start; norms by another way; and what it refuses. One side is a plain twin by autograd alone,
float64, or PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dora import MAGNITUDE, native, peft_model, peft_tensors, relative, shake_dora, whole_spec
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.adapter import AdapterOrigin
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.merge import concatenate, merge
from lorry.adapters.mix import AdapterContext, Mix, MixTerm
from lorry.adapters.peft.files import load_adapter
from lorry.adapters.quantization.linear import quantize_linears, round_base_linears
from lorry.adapters.quantization.packed import QUANTIZATIONS
from lorry.adapters.router import RoutingRule, attach_router
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants import magnitude
from lorry.adapters.variants.magnitude import OutputScale, weight_norm
from lorry.backends.distributed.communicator import ONE_PROCESS
from lorry.errors import ConfigError, ContractError
from lorry.kernels import load_library
from lorry.models.causal_lm import PackedInput
from tests.support.layouts import TARGETS, backend_for, steps_of, uneven
from tests.support.seam import Fixed

LINEAR = LoraSpec(r=3, use_dora=True)


def spread(model: nn.Module) -> None:
    """Values for every attached adapter, each its own."""
    for seed, adapter in enumerate(get_bank(model).adapters.values()):
        shake_dora(iter(adapter.tensors().items()), seed)
        adapter.touch()


def outputs(model: Any, sequences: list[list[int]], mix: Mix) -> Tensor:
    call = AdapterContext(mix)
    return model.logits(model.hidden(PackedInput.of(sequences), call).last, call)


@pytest.mark.parametrize("recompute", [False, True])
def test_jobs_in_one_batch_are_each_alone(recompute: bool, tiny: Any) -> None:
    """fp32: two DoRAs, a plain LoRA and the base, packed; logits and gradients of each by itself."""
    model = native(tiny("qwen3"))
    model.gradient_checkpointing = recompute
    attach(model, LoraSpec(**whole_spec("qwen3")), "one")
    attach(model, LoraSpec(r=2, use_dora=True, lora_alpha=3), "two")
    attach(model, LoraSpec(r=2), "plain")
    spread(model)
    sequences = [[3, 5, 9, 2, 7], [8, 1, 1, 4, 30, 2, 6], [11, 40, 2], [5, 5, 6, 1]]
    names = ["one", "two", None, "plain"]
    starts = [0, 5, 12, 15, 19]
    packed = outputs(model, sequences, Mix.per_sequence(names, starts))
    packed.square().mean().backward()
    bank, numel = get_bank(model), packed.numel()
    together = {name: bank[name].grads.clone() for name in bank.names()}
    for name, sequence, start in zip(names, sequences, starts, strict=False):
        alone = outputs(model, [sequence], Mix.none() if name is None else Mix.one(name))
        torch.testing.assert_close(packed[start : start + len(sequence)], alone, rtol=0, atol=1e-5)
        if name is None:
            continue
        bank[name].grads.zero_()
        (alone.square().sum() / numel).backward()
        assert relative(together[name], bank[name].grads) < 1e-5, name


def twin_linear(layer: BankLinear, slot: Any, x: Tensor, dropped: Tensor) -> Tensor:
    """c (W x + s B A drop(x)) + b by autograd alone; the norm has no gradient."""
    weight = layer.weight.t() if layer.transposed else layer.weight
    a, b, m = slot.A.double(), slot.B.double(), slot.magnitude.double()
    norm = (weight + slot.scale * b @ a).detach().norm(dim=1).clamp(min=1e-30)
    u = x @ weight.t() + slot.scale * (dropped @ a.t()) @ b.t()
    return m / norm * u + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_a_plain_twin(transposed: bool, dropout: float) -> None:
    """float64, with magnitudes of 0, a row of zeros in W, and rows that nearly cancel W."""
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    weight[2] = 0
    stored = weight.t().contiguous() if transposed else weight
    layer = BankLinear(
        nn.Parameter(stored, requires_grad=False),
        nn.Parameter(torch.randn(7, dtype=torch.float64), requires_grad=False),
        transposed=transposed,
        path="here",
    )
    holder = nn.Module()
    holder.here = layer
    adapter = attach(
        holder, LoraSpec(r=2, target_modules=("here",), use_dora=True, lora_dropout=dropout)
    )
    shake_dora(iter(adapter.tensors().items()))
    slot = layer.slots["default"]
    with torch.no_grad():
        slot.B[2] = 0
        slot.magnitude[2] = 0.0
        slot.magnitude[4] = 0.0
        # row 3 of W + s B A is 1e-3 of W's: A's rows span it
        slot.A[0] = weight[3]
        slot.B[3] = torch.tensor([-0.999 / slot.scale, 0.0])
    adapter.touch()
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    dropped = x
    call = AdapterContext(Mix.one("default"))
    if dropout:
        from lorry.adapters.dropout import DropoutNoise

        noise = DropoutNoise(1, 2, (3, 4), (0, 2, 6))
        call = AdapterContext(Mix.one("default"), noise)
        made = noise.at("here", dropout)
        assert made is not None
        dropped = x * made.apply(torch.ones(6, 5, dtype=torch.float64), slice(None))
        assert not torch.equal(dropped, x)
    y = layer(x, call)
    alive = [o for o in range(7) if o != 2]
    expected = twin_linear(layer, slot, x, dropped)
    torch.testing.assert_close(y[:, alive], expected[:, alive], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y[:, 2], layer.bias[2].expand(6))
    weigh = torch.randn_like(y)
    (y * weigh).sum().backward()
    own = [x.grad, slot.A.grad, slot.B.grad, slot.magnitude.grad]
    wanted = torch.autograd.grad(
        (expected * weigh)[:, alive].sum(), [x, slot.A, slot.B, slot.magnitude]
    )
    for ours, theirs in zip(own, wanted, strict=True):
        # masters and their gradients are fp32
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)
    assert float(slot.magnitude.grad[4]) != 0, "a magnitude of 0 can leave it"
    assert float(slot.magnitude.grad[2]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_the_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, where D is far below W, of its size, and nearly its opposite; and the sum W + D is
    made for those rows alone."""
    torch.manual_seed(1)
    layer = BankLinear(nn.Parameter(torch.randn(300, 64).to(dtype)), None, path="here")
    holder = nn.Module()
    holder.here = layer
    adapter = attach(holder, LoraSpec(r=4, target_modules=("here",), use_dora=True))
    slot, weight = layer.slots["default"], layer.weight.double()
    with torch.no_grad():
        slot.A[0] = layer.weight[7].float()
        slot.B.copy_(torch.randn(300, 4) * torch.logspace(-4, 1, 300)[:, None] * 0.1)
        slot.B[7] = torch.tensor([-0.9999 / slot.scale, 0, 0, 0])
    adapter.touch()
    made = list[int]()
    real = magnitude.row_squares
    monkeypatch.setattr(magnitude, "row_squares", lambda *a: (made.append(len(a[2])), real(*a))[1])
    exact = (weight + slot.scale * slot.B.double() @ slot.A.double()).norm(dim=1)
    got = weight_norm(layer, slot)
    assert got.dtype == torch.float32
    error = (got.double() - exact.detach()).abs() / exact.detach()
    # of row 7 a part in 10^4 is left, of what is rounded to 2^-24: 6e-4, or 6e-8 where a product is
    # added without being rounded first
    assert float(error[7]) < 1e-3
    error[7] = 0
    assert float(error.max()) < (1e-5 if dtype == torch.float32 else 2e-3)
    assert len(made) == 1, "the base's own squares were known since the start"
    assert 1 <= made[0] < 60


@pytest.mark.parametrize("bias", [False, True])
def test_the_kernels_are_torchs_arithmetic(bias: bool) -> None:
    """bf16 on a CPU: to the rounding of one product, and the sums in fp32."""
    if load_library() is None:
        pytest.skip("no compiler here")
    torch.manual_seed(2)
    u, b = torch.randn(37, 201), torch.randn(201)
    c, n = 1 + torch.randn(201) * 0.2, torch.rand(201) + 1
    scale = OutputScale(c, n, 1 / (c * n), b if bias else None, b * (1 - c) if bias else None, None)
    y = (u + b if bias else u).bfloat16()
    wide = y.float()
    scale.scale_output(y)
    scale.scale_output(wide)
    assert torch.equal(y, wide.bfloat16())
    g = torch.randn(37, 201).bfloat16()
    into, into_wide = torch.empty_like(g), torch.empty(37, 201)
    dm = scale.backward(g, y, into)
    expected = scale.backward(g.float(), y.float(), into_wide)
    assert torch.equal(into, into_wide.bfloat16())
    torch.testing.assert_close(dm, expected, rtol=1e-4, atol=1e-4)
    u_back = y.float() - (b if bias else 0)
    torch.testing.assert_close(
        expected, (g.float() * u_back).sum(0) / (c * n), rtol=1e-4, atol=1e-3
    )


def test_bf16_learns_magnitudes_near_one(tiny: Any, ids: Tensor) -> None:
    """c = 1.001 is 1 in bf16: it acts in fp32; gradients are near those of fp32."""
    exact, rounded = native(tiny("gpt2")), native(tiny("gpt2")).bfloat16()
    grads = []
    for model in (exact, rounded):
        adapter = attach(model, LoraSpec(r=3, use_dora=True))
        with torch.no_grad():
            for name, tensor in adapter.tensors().items():
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))
                tensor.mul_(1.002) if MAGNITUDE in name else tensor.copy_(noise * 0.1)
        adapter.touch()
        logits = model(ids).logits
        F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
        grads.append({n: g for n, g in adapter.split_like(adapter.grads).items() if MAGNITUDE in n})
    layer = rounded.get_submodule("transformer.h.0.mlp.c_fc")
    (part,) = layer.slots["default"].stacks.values()
    assert float((part.copies.parts[0].output_scale.factor - 1).abs().max()) > 1e-4
    exact_all, rounded_all = (torch.cat([g.flatten() for g in each.values()]) for each in grads)
    assert relative(rounded_all, exact_all) < 0.1


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_over_packed_weights(
    quantization: str, tiny: Any, ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    """fp32: PEFT over the values that the bytes stand for."""
    spec = whole_spec("llama")
    base = tiny("llama")
    round_base_linears(base, QUANTIZATIONS[quantization])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft_model(base, spec)
        theirs.save_pretrained(tmp_path)
        expected = logits(theirs, ids)
    model = native(tiny("llama"))
    quantize_linears(model, QUANTIZATIONS[quantization], torch.float32)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)


def test_over_a_start(tiny: Any, ids: Tensor, logits: Any, tmp_path: Path) -> None:
    """A plain LoRA counts as the base: PEFT's DoRA over the merged weights. A DoRA does not."""
    first = peft_model(tiny("llama"), {"r": 3, "target_modules": ["q_proj", "down_proj"]})
    first.save_pretrained(tmp_path / "start")
    theirs = peft_model(first.merge_and_unload(), whole_spec("llama"))
    model = native(tiny("llama"))
    load_adapter(model, tmp_path / "start", "start", trainable=False)
    get_bank(model).move_to_base("start", AdapterOrigin("somewhere", "0" * 64))
    adapter, given = attach(model, LoraSpec(**whole_spec("llama"))), peft_tensors(theirs)
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            tensor.copy_(given[name])
    adapter.touch()
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=0, atol=2e-5)
    below = native(tiny("llama"))
    attach(below, LINEAR, "start", trainable=False)
    with pytest.raises(ConfigError, match="merge it into the base first"):
        get_bank(below).move_to_base("start", AdapterOrigin("somewhere", "0" * 64))


def with_two(tiny: Any, second: LoraSpec) -> Any:
    model = native(tiny("llama"))
    attach(model, LINEAR, "one")
    attach(model, second, "two")
    return model


@pytest.mark.parametrize(
    "second", [LINEAR, LoraSpec(r=2), LoraSpec(r=2, target_modules=("embed",))]
)
def test_one_at_a_time(second: LoraSpec, tiny: Any, ids: Tensor, logits: Any) -> None:
    model = with_two(tiny, second)
    if second.target_modules == "auto":
        with pytest.raises(ContractError, match="'one' is a DoRA, and 'two' is active beside it"):
            logits(model, ids)
        with pytest.raises(ConfigError, match="'one' is a DoRA, and 'two' is at"):
            merge(model)
    else:
        logits(model, ids)  # on other modules
    # in rows of their own, or one of them
    starts = [0, 9, 18]
    outputs(model, ids.tolist(), Mix.per_sequence(["one", "two"], starts))
    get_bank(model).activate(Mix.one("one"))
    logits(model, ids)
    get_bank(model).activate(Mix.none())


REFUSED: dict[str, Callable[[Any], object]] = {
    "whose weight in a mix is 0 or 1": lambda m: outputs(m, [[1, 2]], Mix.constants({"one": 0.5})),
    "give it 1, or": lambda m: outputs(
        m, [[1, 2]], Mix((MixTerm("one", None, torch.tensor([0.5, 0.5])),))
    ),
    "which has no weight but 1": lambda m: merge(m, {"one": -1.0}),
    "it cannot be concatenated": lambda m: concatenate(m, "new", {"one": 0.5}),
    "no router can weigh it": lambda m: attach_router(
        m, ["one"], RoutingRule(input="both", top_k=1, normalize=False)
    ),
    "do not train beside a DoRA": lambda m: (
        m.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad_(True),
        outputs(m, [[1, 2]], Mix.one("one")),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_meaning_is_refused(message: str, tiny: Any) -> None:
    model = native(tiny("llama"))
    attach(model, LINEAR, "one")
    with pytest.raises((ConfigError, ContractError), match=message):
        REFUSED[message](model)


def test_an_embedding_refuses_too(tiny: Any) -> None:
    model = native(tiny("llama"))
    for name in ("one", "two"):
        attach(model, LoraSpec(r=2, target_modules=("embed",), use_dora=True), name)
    with pytest.raises(ContractError, match="'one' is a DoRA, and 'two' is active beside it"):
        outputs(model, [[1, 2]], get_bank(model).active)


def test_the_norm_is_made_once_between_writes(
    tiny: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the passes; and after a write of the masters by whoever, or a backward pass, again."""
    model = native(tiny("llama"))
    adapter = attach(model, LoraSpec(**whole_spec("llama")))
    made = list[str]()
    real = weight_norm

    def counted(layer: Any, slot: Any) -> Tensor:
        made.append(layer.path)
        return real(layer, slot)

    monkeypatch.setattr(magnitude, "weight_norm", counted)
    monkeypatch.setattr("lorry.adapters.layers.embedding.weight_norm", counted)
    for _ in range(3):
        with torch.no_grad():
            model(ids)
    assert sorted(made) == sorted(adapter.slots)
    with torch.no_grad():
        next(iter(adapter.slots.values())).magnitude.add_(1.0)
        model(ids)
    assert len(made) == len(adapter.slots) + 1  # each parameter has a version of its own
    with torch.no_grad():
        adapter.values.mul_(1.0)
        model(ids)
    assert len(made) == 2 * len(adapter.slots) + 1
    adapter.touch()
    with torch.no_grad():
        model(ids)
    assert len(made) == 3 * len(adapter.slots) + 1


def test_the_norm_is_made_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three micro-batches; in a loop of one's own after every backward pass, which an optimizer that
    no version counter sees may follow."""
    spec = LoraSpec(r=3, target_modules=(*TARGETS, "embed"), use_dora=True)
    backend, task = backend_for(ONE_PROCESS, {"default": spec}), Fixed(steps_of(uneven))
    adapter, made, real = backend.bank["default"], list[str](), weight_norm

    def counted(layer: Any, slot: Any) -> Tensor:
        made.append(layer.path)
        return real(layer, slot)

    monkeypatch.setattr(magnitude, "weight_norm", counted)
    monkeypatch.setattr("lorry.adapters.layers.embedding.weight_norm", counted)
    for step in range(3):
        batches = task.step_batches(step, {})
        assert len(batches) == 3
        backend.forward_backward(batches, task, step)
        backend.step({"default": 1e-2})
        assert len(made) == (step + 1) * len(adapter.slots)
    made.clear()
    for _ in range(2):
        outputs(backend.model, [[1, 2, 3]], Mix.one("default")).sum().backward()
    assert len(made) == 2 * len(adapter.slots)
