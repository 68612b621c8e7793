"""A router of the layers: its gradients against autograd on transformers' model, its rules, and what
it refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.router import RoutingRule, TokenRouter, attach_router
from lorry.adapters.routing.stacking import stack_masters
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError, ContractError
from lorry.models.causal_lm import CausalLM, PackedInput
from lorry.models.hf.model import HfModel
from tests.support import tiny

SEQUENCES = [[5, 9, 3, 7, 11, 2], [8, 1, 4, 6, 13, 12, 10, 9]]
MLP = ["gate_proj", "up_proj", "down_proj"]


def model_with_experts(
    tmp_path: Path, rule: RoutingRule, hidden: Sequence[int] = (), native: bool = True
) -> tuple[CausalLM, torch.nn.Module, TokenRouter]:
    """Three experts of different ranks (all linears with input both, else the MLP's), and a router
    of random values, each matrix over the root of its width as layers are drawn. Without that its
    logits reach 20 and some gates are next to 0: the gradient of their experts, of norm 1e-12 to
    1e-2, is then so ill-conditioned that one rounding of the embedding moves it by 1e-5, whatever
    computes it.
    """
    source = tiny.fresh("llama", num_hidden_layers=2)
    model: CausalLM = tiny.decoder(source, tmp_path) if native else HfModel(copy.deepcopy(source))
    targets = "all-linear" if rule.input == "both" else MLP
    for rank, name in ((2, "a"), (4, "b"), (3, "c")):
        spec = LoraSpec(r=rank, init_lora_weights=False, target_modules=targets)
        adapter = attach(model, spec, name, seed=rank)
        with torch.no_grad():
            adapter.values.mul_(0.3)
        adapter.touch()
    router = attach_router(model, ["a", "b", "c"], rule, hidden)
    with torch.no_grad():
        router.values.copy_(torch.randn(router.values.numel(), generator=torch.manual_seed(3)))
        for tensor in router.tensors().values():
            if tensor.ndim == 2:
                tensor.mul_(tensor.shape[1] ** -0.5)
    return model, source, router


class Twin:
    """transformers' model in float64 with plain autograd terms by hooks on each linear."""

    def __init__(self, theirs: torch.nn.Module, model: CausalLM, router: TokenRouter) -> None:
        self.theirs, self.rule = theirs.double(), router.rule
        bank = get_bank(model)
        self.masters = {
            name: {n: t.detach().double().requires_grad_() for n, t in bank[name].tensors().items()}
            for name in router.adapters
        }
        self.scale = {n: {m: s.scale for m, s in bank[n].slots.items()} for n in router.adapters}
        self.weights = {
            site: w.detach().double().requires_grad_() for site, w in router.weights.items()
        }
        self.hidden = {
            site: [[p.detach().double().requires_grad_() for p in pair] for pair in layers]
            for site, layers in router.hidden_layers.items()
        }
        self.gates: dict[tuple[int, str], Tensor] = {}
        self.logits: dict[tuple[int, str], Tensor] = {}
        for layer, half in router.sites:
            norm = "input_layernorm" if half == "attn" else "post_attention_layernorm"
            module = theirs.get_submodule(f"model.layers.{layer}.{norm}")
            module.register_forward_hook(lambda m, x, y, at=(layer, half): self.route(at, y))
        for path in bank[router.adapters[0]].slots:
            layer, half = int(path.split(".")[2]), "mlp" if ".mlp." in path else "attn"
            theirs.get_submodule(path).register_forward_hook(
                lambda m, x, y, p=path, at=(layer, half): self.add(p, at, x[0], y)
            )

    def route(self, at: tuple[int, str], normed: Tensor) -> None:
        for weight, bias in self.hidden[at]:
            normed = torch.relu(normed @ weight.t() + bias)
        z = F.linear(normed, self.weights[at]) / self.rule.temperature
        p = z.softmax(-1)
        value, chosen = p.topk(self.rule.top_k, -1)
        if self.rule.straight_through:
            value = 1 + value - value.detach()
        elif self.rule.normalize:
            value = value / value.sum(-1, keepdim=True)
        self.logits[at] = z
        self.gates[at] = torch.zeros_like(p).scatter(-1, chosen, value)

    def add(self, path: str, at: tuple[int, str], x: Tensor, y: Tensor) -> Tensor:
        for k, (name, own) in enumerate(self.masters.items()):
            a, b = own[f"{path}.lora_A"], own[f"{path}.lora_B"]
            y = y + self.gates[at][..., k, None] * self.scale[name][path] * (x @ a.t() @ b.t())
        return y

    def loss(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for tokens in SEQUENCES:
            ids = torch.tensor([tokens])
            logits = self.theirs(input_ids=ids).logits[0]
            total = total + F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
            total = total + sum(z.logsumexp(-1).square().sum() for z in self.logits.values())
        return total


def our_loss(model: CausalLM, router: TokenRouter) -> Tensor:
    call, packed = AdapterContext(router.mix()), PackedInput.of(SEQUENCES)
    states = model.hidden(packed, call)
    logits, total = model.logits(states.last, call), torch.zeros(())
    for start, stop in packed.segments:
        own = packed.tokens[start:stop]
        total = total + F.cross_entropy(logits[start : stop - 1], own[1:], reduction="sum")
    return total + torch.stack(list(states.router_logits), 1).logsumexp(-1).square().sum()


@pytest.mark.parametrize(
    ("rule", "hidden"),
    [
        (RoutingRule("mlp", 1, straight_through=True), ()),
        (RoutingRule("mlp", 1, normalize=False, temperature=1.7), ()),
        (RoutingRule("both", 2), ()),
        (RoutingRule("mlp", 2, normalize=False), ()),
        (RoutingRule("both", 3), ()),
        (RoutingRule("both", 2), (6, 5)),
    ],
    ids=["top1-st", "top1-plain", "both-top2", "top2-plain", "both-all", "both-mlp"],
)
@pytest.mark.parametrize(("native", "recompute"), [(True, False), (True, True), (False, True)])
def test_gradients_are_those_of_autograd(
    rule: RoutingRule, hidden: tuple[int, ...], native: bool, recompute: bool, tmp_path: Path
) -> None:
    """Router and experts of different ranks, through two layers, with a loss of the logits beside
    that of the tokens: each tensor in float32 within 1e-5 of float64 on transformers; in Lorry's
    decoder and where transformers' own code runs."""
    model, source, router = model_with_experts(tmp_path, rule, hidden, native)
    model.gradient_checkpointing = recompute
    twin = Twin(source, model, router)
    expected = twin.loss()
    expected.backward()
    found = our_loss(model, router)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for site, weight in router.weights.items():
        wanted = twin.weights[site].grad
        assert weight.grad is not None
        assert float((weight.grad.double() - wanted).norm() / wanted.norm()) < 1e-5, site
        for pair, theirs in zip(router.hidden_layers[site], twin.hidden[site], strict=True):
            for param, other in zip(pair, theirs, strict=True):
                assert float((param.grad.double() - other.grad).norm() / other.grad.norm()) < 1e-5
    for name in router.adapters:
        grads = get_bank(model)[name].split_like(get_bank(model)[name].grads)
        for tensor, wanted in ((n, t.grad) for n, t in twin.masters[name].items()):
            if wanted is None or not wanted.any():
                assert not grads[tensor].any()
                continue
            error = float((grads[tensor].double() - wanted).norm() / wanted.norm())
            assert error < 1e-5, (name, tensor)


@pytest.mark.parametrize("alphas", [(4, 8, 6), (3, 8, 1)], ids=["one-scale", "scales-differ"])
def test_frozen_experts_side_by_side_route_as_apart(
    alphas: tuple[int, ...], tmp_path: Path
) -> None:
    """Masters in one buffer, which the products read as it is: the loss and the router's gradient are
    those of float64 on transformers, no value changes, and none has a copy or a gradient."""
    source = tiny.fresh("llama", num_hidden_layers=2)
    model = tiny.decoder(source, tmp_path)
    for rank, alpha, name in zip((2, 4, 3), alphas, "abc", strict=True):
        spec = LoraSpec(r=rank, lora_alpha=alpha, init_lora_weights=False, target_modules=MLP)
        attach(model, spec, name, seed=rank)
    router = attach_router(model, ["a", "b", "c"], RoutingRule("mlp", 2))
    router.values.copy_(torch.randn(router.values.numel(), generator=torch.manual_seed(3)))
    bank, twin = get_bank(model), Twin(source, model, router)
    before = {name: {n: t.clone() for n, t in bank[name].tensors().items()} for name in "abc"}
    our_loss(model, router)  # leaves copies of masters that are about to move
    for adapter in bank.adapters.values():
        adapter.freeze()
    stack_masters(model, router.mix())
    expected = twin.loss()
    expected.backward()
    found = our_loss(model, router)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for site, weight in router.weights.items():
        wanted = twin.weights[site].grad
        assert float((weight.grad.double() - wanted).norm() / wanted.norm()) < 1e-5, site
    memory = set()
    for name, adapter in bank.adapters.items():
        assert all(torch.equal(t, before[name][n]) for n, t in adapter.tensors().items())
        assert not adapter.grads.numel()
        with pytest.raises(ContractError, match=f"adapter '{name}' is frozen in a mixture"):
            _ = adapter.values
        for slot in adapter.slots.values():
            read = [
                (e.copies.lora_A, *(p.lora_B for p in e.copies.parts)) for e in slot.stacks.values()
            ]
            memory |= {t.untyped_storage().data_ptr() for t in (slot.A, slot.B, *sum(read, ()))}
    assert len(memory) == 1
    again = deepcopy(model)
    torch.testing.assert_close(our_loss(again, router), our_loss(model, router))


def test_gates_are_softmax_over_the_chosen_logits() -> None:
    """Order of the stock classes: softmax, top-k, divide; equal to a softmax over the chosen."""
    z = torch.randn(20, 4, dtype=torch.float64)
    gates = RoutingRule("mlp", 2).gates(z)
    value, chosen = z.topk(2, -1)
    torch.testing.assert_close(gates.gather(-1, chosen), value.softmax(-1))
    assert (gates != 0).sum(-1).tolist() == [2] * 20


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (RoutingRule("mlp", 1), "no gradient"),
        (RoutingRule("mlp", 4), "1 to 3 of 3"),
        (RoutingRule("mlp", 0), "1 to 3 of 3"),
        (RoutingRule("mlp", 2, straight_through=True), "for top_k=1 alone"),
        (RoutingRule("mlp", 2, temperature=0.0), "above 0"),
        (RoutingRule("head", 2), "mlp, attn or both"),
    ],
)
def test_a_rule_that_cannot_train_is_refused(rule: RoutingRule, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TokenRouter(["a", "b", "c"], rule, layers=1, width=4)


def test_hidden_layers_lie_in_one_buffer() -> None:
    """Matrices, which decay, then biases, which do not; drawn from the seed alone, and no width of 0."""
    sizes = {"layers": 2, "width": 4, "hidden": (3,)}
    one, two = (TokenRouter("ab", RoutingRule(), **sizes) for _ in range(2))  # type: ignore[arg-type]
    for router, seed in ((one, 5), (two, 5)):
        router.init_hidden(seed)
    assert torch.equal(one.values, two.values)
    assert one.values[: 2 * (12 + 6)].count_nonzero() == 2 * 12
    assert [part for part, _, decays in one.ranges() if not decays] == [slice(36, 42)]
    assert [t.shape for n, t in one.tensors().items() if "bias" in n] == [(3,), (3,)]
    two.init_hidden(6)
    assert not torch.equal(one.values, two.values)
    with pytest.raises(ConfigError, match="1 or more"):
        TokenRouter("ab", RoutingRule(), layers=1, width=4, hidden=(0,))


def test_an_expert_outside_the_gated_half_is_refused(tmp_path: Path) -> None:
    """By name before a run, and by the layer for a router that was made without asking."""
    model = tiny.decoder(tiny.fresh("llama"), tmp_path)
    for name in ("a", "b"):
        attach(model, LoraSpec(r=2, target_modules="all-linear"), name)
    for name in ("c", "d"):
        attach(model, LoraSpec(r=2, target_modules=[*MLP, "lm_head"]), name)
    with pytest.raises(
        ConfigError,
        match=r"expert 'a' has an adapter at .*q_proj.*router.input=mlp.*, or give router.input=both",
    ):
        attach_router(model, ["a", "b"], RoutingRule())
    with pytest.raises(ConfigError, match=r"expert 'c' has an adapter at lm_head.*up_proj\]$"):
        attach_router(model, ["c", "d"], RoutingRule())  # no input gates the head
    g = model.geometry
    router = TokenRouter(["a", "b"], RoutingRule(), layers=g.layers, width=g.width)
    with pytest.raises(ContractError, match="attn half"):
        model.hidden(PackedInput.of(SEQUENCES), AdapterContext(router.mix()))


def test_a_routed_term_never_loses_its_router(tmp_path: Path) -> None:
    """An adapter that comes or goes leaves the active router; a routed term without one is refused."""
    model, _, router = model_with_experts(tmp_path, RoutingRule("mlp", 2))
    bank = get_bank(model)
    bank.activate(router.mix())
    attach(model, LoraSpec(r=2, target_modules=MLP), "d")
    assert bank.active.router is router
    bank.remove("d")
    assert bank.active == router.mix()
    with pytest.raises(ContractError, match="but the mix has no router"):
        model.hidden(PackedInput.of(SEQUENCES), AdapterContext(Mix(router.mix().terms)))


@pytest.mark.parametrize("native", [True, False])
def test_sequences_of_a_batch_have_their_own_mixes(native: bool, tmp_path: Path) -> None:
    """One under the router, one under a plain expert of it, one under the base: each as alone."""
    model, _, router = model_with_experts(tmp_path, RoutingRule("mlp", 2), (), native)
    mixes = [router.mix(), Mix.one("b"), Mix.none()]
    rows = [*SEQUENCES, [3, 2, 9, 1]]
    with torch.no_grad():
        packed = PackedInput.of(rows)
        starts = [0, *(stop for _, stop in packed.segments)]
        together = model.hidden(packed, AdapterContext(Mix.packed(mixes, starts))).last
        for tokens, mix, (start, stop) in zip(rows, mixes, packed.segments, strict=True):
            alone = model.hidden(PackedInput.of([tokens]), AdapterContext(mix)).last
            torch.testing.assert_close(together[start:stop], alone, rtol=1e-5, atol=1e-5)
    other = TokenRouter(
        ["a", "b"], RoutingRule(), layers=2, width=router.weights[0, "mlp"].shape[1]
    )
    with pytest.raises(ContractError, match="one router"):
        Mix.packed([router.mix(), other.mix()], [0, 3, 6])


@pytest.mark.parametrize(
    ("name", "within"),
    [
        ("llama", ("self_attn", "mlp")),
        ("gpt2", ("attn", "mlp")),
        ("gpt_neox parallel", ("attention", "mlp")),
        ("gemma2", ("self_attn", "mlp")),
        ("falcon", ("self_attention", "mlp")),
        ("mixtral", ("self_attn", "mlp")),
        ("mamba", None),
        ("opt", None),
    ],
)
def test_halves_of_a_model_of_transformers(name: str, within: tuple[str, str] | None) -> None:
    """By what the modules do, whatever they are called: no name is known."""
    model = HfModel(tiny_foreign(name))
    halves, width = model.router_halves
    if within is None:
        assert not halves
        attach(model, LoraSpec(r=2), "a")
        with pytest.raises(ConfigError, match="no two such modules in every layer"):
            attach_router(model, ["a"], RoutingRule("mlp", 1, normalize=False))
        return
    assert len(halves) == 2 * len(model.layers)
    assert width == 32
    for (layer, half), path in halves.items():
        assert path.endswith(f".{layer}.{within[half == 'mlp']}")


def tiny_foreign(name: str) -> torch.nn.Module:
    """A random model of two layers, 32 wide."""
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    own: dict[str, dict[str, object]] = {
        "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 64},
        "gpt_neox parallel": {**sizes, "use_parallel_residual": True},
        "falcon": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 64,
        },
        "mixtral": {**sizes, "num_local_experts": 4},
        "mamba": {**sizes, "state_size": 4, "time_step_rank": 4},
        "opt": {**sizes, "ffn_dim": 48, "word_embed_proj_dim": 32},
    }
    config = CONFIG_MAPPING[name.partition(" ")[0]].from_dict(own.get(name, sizes))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_a_copy_of_a_routed_model_of_transformers_runs_its_own_halves(tmp_path: Path) -> None:
    """float32. With other weights in the copy's halves the copy alone changes, to what transformers
    makes of these weights (in float64)."""
    model, source, router = model_with_experts(tmp_path, RoutingRule("both", 2), native=False)
    before = our_loss(model, router)  # from here on every half is called with its gates
    again = deepcopy(model)
    changed = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    with torch.no_grad():
        for theirs in (again, source):
            for name, weight in theirs.named_parameters():
                if name.endswith(changed):
                    weight.mul_(-2)
    expected = float(Twin(source, model, router).loss().detach())
    assert float(our_loss(again, router).detach()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(our_loss(model, router), before, rtol=0, atol=0)
    assert abs(expected - float(before.detach())) > 1e-2


def test_whole_mlps_are_those_of_the_own_decoder(tmp_path: Path) -> None:
    """level=expert is refused where transformers' code runs; so is an adapter in the other half."""
    model = HfModel(tiny.fresh("llama"))
    for name in ("a", "b"):
        attach(model, LoraSpec(r=2, target_modules="all-linear"), name)
    with pytest.raises(ConfigError, match=r"give router.level=delta"):
        attach_router(model, ["a", "b"], RoutingRule("mlp", 2, level="expert"))
    with pytest.raises(
        ConfigError, match=r"expert 'a' has an adapter at .*q_proj.*router.input=mlp"
    ):
        attach_router(model, ["a", "b"], RoutingRule())
