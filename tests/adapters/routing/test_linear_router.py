"""Arrow and SpectR: gates against PEFT's Arrow and against the formulas on whole deltas, gradients
through the gates against autograd, experts that come and go, and what is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.arrow import create_arrow_model
from torch import Tensor
from torch.nn import functional as F

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import AdapterContext
from lorry.adapters.peft.files import save_adapter
from lorry.adapters.routing.linear_router import SpectralRouter, attach_spectral_router
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError
from lorry.models.causal_lm import CausalLM, PackedInput
from lorry.models.hf.model import HfModel
from tests.support import tiny

SEQUENCES = [[5, 9, 3, 7, 11, 2], [8, 1, 4, 6, 13, 12, 10, 9]]


def opened(source: torch.nn.Module, folder: Path, native: bool) -> CausalLM:
    """The model in Lorry's decoder, or a copy that runs through transformers."""
    return tiny.decoder(source, folder) if native else HfModel(deepcopy(source))


def add_expert(
    model: CausalLM, name: str, rank: int, targets: str | list[str] = "all-linear"
) -> None:
    """An expert of random values whose deltas have a clearly largest singular value: PEFT's 15
    steps of power iteration then find it to the last digits."""
    spec = LoraSpec(r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=targets)
    adapter = attach(model, spec, name, seed=ord(name))
    with torch.no_grad():
        for slot in adapter.slots.values():
            slot.A.mul_(0.5)
            slot.A[0].mul_(8)
            slot.B.mul_(3)
    adapter.touch()


def packed_logits(model: CausalLM, router: SpectralRouter) -> Tensor:
    call, packed = AdapterContext(router.mix()), PackedInput.of(SEQUENCES)
    return model.logits(model.hidden(packed, call).last, call)


@pytest.mark.parametrize(
    ("top_k", "temperature", "native"),
    [(1, 1.0, True), (2, 0.5, True), (3, 2.0, True), (2, 0.5, False)],
)
def test_arrow_is_pefts(top_k: int, temperature: float, native: bool, tmp_path: Path) -> None:
    """The logits of PEFT's Arrow over the same three adapters, attention and MLP, in float32; in
    Lorry's decoder and where transformers' own code runs."""
    source = tiny.fresh("llama", num_hidden_layers=2)
    model = opened(source, tmp_path / "base", native)
    for name in "abc":
        add_expert(model, name, 4)
        save_adapter(model, tmp_path / name, name, base_name="somewhere/base")
    router = attach_spectral_router(model, "arrow", "abc", top_k=top_k, temperature=temperature)
    config = peft.ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    theirs = create_arrow_model(source, [str(tmp_path / name) for name in "abc"], config).eval()
    with torch.no_grad():
        ours = packed_logits(model, router)
        plain = model.logits(
            model.hidden(PackedInput.of(SEQUENCES), AdapterContext()).last, AdapterContext()
        )
        wanted = torch.cat([theirs(torch.tensor([row])).logits[0] for row in SEQUENCES])
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    assert (ours - plain).abs().max() > 0.1


class Twin:
    """transformers' model in float64 with plain autograd terms; scores from the whole deltas."""

    def __init__(self, theirs: torch.nn.Module, model: CausalLM, router: SpectralRouter) -> None:
        self.theirs, self.router = theirs.double(), router
        bank = get_bank(model)
        self.masters = {
            name: {n: t.detach().double().requires_grad_() for n, t in bank[name].tensors().items()}
            for name in router.adapters
        }
        self.scale = {n: {m: s.scale for m, s in bank[n].slots.items()} for n in router.adapters}
        for path in {path for name in router.adapters for path in bank[name].slots}:
            theirs.get_submodule(path).register_forward_hook(
                lambda m, x, y, p=path: self.add(p, x[0], y)
            )

    def add(self, path: str, x: Tensor, y: Tensor) -> Tensor:
        own = {n: t for n, t in self.masters.items() if f"{path}.lora_A" in t}
        scores = []
        for tensors in own.values():
            delta = (tensors[f"{path}.lora_B"] @ tensors[f"{path}.lora_A"]).detach()
            if self.router.router_kind == "arrow":
                scores.append((x @ torch.linalg.svd(delta).Vh[0]).abs())
            else:
                scores.append((x @ delta.t()).norm(dim=-1))
        z = torch.stack(scores, -1) / self.router.temperature
        value, chosen = z.topk(min(self.router.top_k, len(own)), -1)
        gates = torch.zeros_like(z).scatter(-1, chosen, value.softmax(-1))
        for k, (name, tensors) in enumerate(own.items()):
            low = x @ tensors[f"{path}.lora_A"].t() @ tensors[f"{path}.lora_B"].t()
            y = y + gates[..., k, None] * self.scale[name][path] * low
        return y

    def loss(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for tokens in SEQUENCES:
            ids = torch.tensor([tokens])
            logits = self.theirs(input_ids=ids).logits[0]
            total = total + F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        return total


def our_loss(model: CausalLM, router: SpectralRouter) -> Tensor:
    logits, total = packed_logits(model, router), torch.zeros(())
    packed = PackedInput.of(SEQUENCES)
    for start, stop in packed.segments:
        own = packed.tokens[start + 1 : stop]
        total = total + F.cross_entropy(logits[start : stop - 1], own, reduction="sum")
    return total


@pytest.mark.parametrize(("native", "recompute"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("kind", ["arrow", "spectr"])
def test_gradients_are_those_of_autograd(
    kind: str, native: bool, recompute: bool, tmp_path: Path
) -> None:
    """Experts of different ranks, one without an adapter in most linears, through two layers: loss
    and gradients, also those that come to lower layers through the gates of higher ones."""
    source = tiny.fresh("llama", num_hidden_layers=2)
    model = opened(source, tmp_path, native)
    model.gradient_checkpointing = recompute
    add_expert(model, "a", 2)
    add_expert(model, "b", 4)
    add_expert(model, "c", 3, ["q_proj", "down_proj"])
    router = attach_spectral_router(model, kind, "abc", top_k=2, temperature=1.5)
    twin = Twin(source, model, router)
    expected = twin.loss()
    expected.backward()
    found = our_loss(model, router)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name in router.adapters:
        grads = get_bank(model)[name].split_like(get_bank(model)[name].grads)
        for tensor, wanted in ((n, t.grad) for n, t in twin.masters[name].items()):
            if wanted is None or not wanted.any():
                assert not grads[tensor].any()
                continue
            error = float((grads[tensor].double() - wanted).norm() / wanted.norm())
            assert error < 2e-5, (name, tensor)


@pytest.mark.parametrize("kind", ["arrow", "spectr"])
def test_experts_come_and_go(kind: str, tmp_path: Path) -> None:
    """One that is removed is scored no more, as if it had never been; one that changes has other
    rows; and an expert whose delta is zero breaks nothing."""
    source = tiny.fresh("llama")
    one, two = (tiny.decoder(source, tmp_path / n) for n in "xy")
    for model, names in ((one, "abc"), (two, "ac")):
        for name in names:
            add_expert(model, name, 2)
    left = attach_spectral_router(two, kind, "ac")
    with torch.no_grad():
        routers = [attach_spectral_router(one, kind, "abc", top_k=2)]
        three = packed_logits(one, routers[0])
        get_bank(one).activate(routers[0].mix())
        get_bank(one).remove("b")
        routers.append(attach_spectral_router(one, kind, "ac", top_k=2))
        for router in routers:
            gates = router.linear_gates(["model.layers.0.mlp.gate_proj"], torch.randn(5, 32))
            assert gates.shape == (5, len(router.adapters))
            torch.testing.assert_close(gates.sum(1), torch.ones(5))
        assert not torch.equal(packed_logits(one, routers[1]), three)
        assert torch.equal(packed_logits(one, routers[1]), packed_logits(two, left))
        before = packed_logits(two, left)
        get_bank(two)["a"].values.mul_(0.5)
        get_bank(two)["a"].touch()
        assert not torch.equal(packed_logits(two, left), before)
        get_bank(two)["a"].values.zero_()
        get_bank(two)["a"].touch()
        assert bool(torch.isfinite(packed_logits(two, left)).all())


def test_a_linear_that_no_expert_is_on_has_no_gates(tmp_path: Path) -> None:
    model = tiny.decoder(tiny.fresh("llama"), tmp_path)
    for name in "ab":
        add_expert(model, name, 2, ["q_proj", "v_proj"])
    router = attach_spectral_router(model, "arrow", "ab")
    paths = [f"model.layers.0.self_attn.{end}_proj" for end in "qkv"]
    gates = router.linear_gates(paths, torch.randn(4, 32)).view(4, 3, 2)
    torch.testing.assert_close(gates.sum(-1), torch.tensor([1.0, 0.0, 1.0]).expand(4, 3))


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        ("ab", {"top_k": 3}, "1 to 2 of 2"),
        ("ab", {"top_k": 0}, "1 to 2 of 2"),
        ("ab", {"temperature": 0.0}, "above 0"),
        ("ab", {"temperature": float("nan")}, "above 0"),
        ("ah", {}, "expert 'h' has an adapter at lm_head"),
        ("an", {}, "NaN or infinity"),
        ("ax", {}, "no adapter named 'x'"),
    ],
)
def test_what_no_router_can_be(
    names: Sequence[str], settings: dict[str, float], words: str, tmp_path: Path
) -> None:
    model = tiny.decoder(tiny.fresh("llama"), tmp_path)
    for name in "abn":
        add_expert(model, name, 2, ["q_proj"])
    add_expert(model, "h", 2, ["lm_head"])
    with torch.no_grad():
        get_bank(model)["n"].values[3] = float("nan")
    with pytest.raises(ConfigError, match=words):
        attach_spectral_router(model, "arrow", names, **settings)  # type: ignore[arg-type]
