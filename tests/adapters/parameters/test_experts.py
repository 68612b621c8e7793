"""Adapters at fused experts and routers against PEFT and against the formula in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import attach, detach, get_bank
from lorry.adapters.merge import concatenate, merge, merged_tensors, unmerge
from lorry.adapters.merging.weighted import merge_adapters
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix, MixTerm
from lorry.adapters.parameters.experts import ExpertMatrices
from lorry.adapters.routing.gate_vectors import attach_gate_vectors
from lorry.adapters.spec import LoraSpec
from lorry.adapters.targets.candidates import find_adaptable
from lorry.adapters.targets.skipped import list_skipped_modules
from lorry.errors import ConfigError, ContractError
from lorry.models.causal_lm import PackedInput
from lorry.models.hf.model import HfModel, use_adapter_context
from tests.support import expert_models
from tests.support.expert_models import Mixture, OddExperts, Router
from tests.support.tiny import one_thread, text_ids  # noqa: F401 - a fixture

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ROUTER = {"gpt_oss": "mlp.router.weight", "granitemoe": "block_sparse_moe.router.weight"}


def spec(**more: Any) -> LoraSpec:
    return LoraSpec(r=3, lora_alpha=5, init_lora_weights=False, **more)


def named(kind: str) -> list[str]:
    return [*EXPERTS, ROUTER.get(kind, "mlp.gate.weight")]


def peft_twin(model: Any, adapter: Adapter, parameters: list[str], linears: list[str]) -> Any:
    """PEFT's model over a copy of the base, with the adapter's values."""
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=linears, target_parameters=parameters
    )
    twin = peft.get_peft_model(copy.deepcopy(model), config)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for path, slot in adapter.slots.items():
            for side in "AB":
                own[peft_name(path, side)].copy_(getattr(slot, side))
    return twin


def peft_name(path: str, side: str) -> str:
    """With both tensors of experts adapted, the first one's wrapper lies inside."""
    path = path.replace(".gate_up_proj", ".base_layer").replace(".down_proj", "")
    return f"base_model.model.{path}.lora_{side}.default.weight"


def off(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", expert_models.MODELS)
def test_logits_gradients_and_merged_weights_are_pefts(kind: str, implementation: str) -> None:
    """In fp32, whichever of transformers' implementations PEFT's copy runs."""
    base = expert_models.model(kind, experts=implementation)
    model = copy.deepcopy(base)
    linears = ["self_attn.q_proj"]
    adapter = attach(model, spec(target_modules=linears, target_parameters=named(kind)), "default")
    twin = peft_twin(base, adapter, named(kind), linears)
    ids = text_ids()
    ours, theirs = (m(input_ids=ids, labels=ids) for m in (model, twin))
    assert off(ours.logits, theirs.logits) <= 1e-5
    assert off(ours.logits, base(input_ids=ids).logits) > 1e-2
    ours.loss.backward()
    theirs.loss.backward()
    own = dict(twin.named_parameters())
    assert len(adapter.slots) == 4 * len(model.model.layers)
    for path, slot in adapter.slots.items():
        for side in "AB":
            gradient = own[peft_name(path, side)].grad
            assert gradient.abs().max() > 0, path
            assert off(getattr(slot, side).grad, gradient) <= 1e-5, (path, side)
    merged = twin.merge_and_unload().state_dict()
    streamed = dict(merged_tensors(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model)
    assert before.keys() == merged.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, merged[name], rtol=1e-5, atol=1e-6), name
        assert torch.equal(tensor, streamed.get(name, tensor)), name
    unmerge(model)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def by_hand(layer: ExpertMatrices, gates: dict[str, Tensor], token: int, e: int) -> Tensor:
    """W_e + sum g s B_e A_e of one token, float64, from PEFT's layout: row e r + i of A, column i E + e
    of B."""
    weight = layer.weight[e].double()
    for name, gate in gates.items():
        slot, experts = layer.slots[name], layer.num_experts
        rank = slot.A.shape[0] // experts
        for i in range(rank):
            outer = torch.outer(slot.B[:, i * experts + e].double(), slot.A[e * rank + i].double())
            weight = weight + gate[token].double() * slot.scale * outer
    return weight


MIXES: dict[str, Any] = {
    "one": lambda gates: Mix.one("a"),
    "constants": lambda gates: Mix.constants({"a": -0.7, "b": 0.4}),
    "per sequence": lambda gates: Mix.per_sequence(["b", None, "a"], [0, 4, 9, 14]),
    "routed": lambda gates: Mix.routed(["a", "b"], gates),
    "gates on some rows": lambda gates: Mix(
        (MixTerm("a", slice(5, 11), gates[5:11, 0]), MixTerm("b", slice(0, 7), 0.5))
    ),
    "none": lambda gates: Mix.none(),
}


@pytest.mark.parametrize("kind", MIXES)
def test_every_mix_is_the_formula_token_by_token(kind: str) -> None:
    """In fp32 against float64; a model of nobody's library."""
    model, tokens = Mixture(), 14
    for name in "ab":
        attach(model, spec(target_parameters=EXPERTS, target_modules=()), name, seed=ord(name))
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, 8, generator=draw)
    gates = torch.rand(tokens, 2, generator=draw, requires_grad=True)
    index = torch.stack([torch.randperm(3, generator=draw)[:2] for _ in range(tokens)])
    share = torch.rand(tokens, 2, generator=draw)
    mix = MIXES[kind](gates)
    with use_adapter_context(AdapterContext(mix)):
        got = model.experts(x, index, share)
    layers = {m.leaf: m for m in find_adaptable(model).values() if isinstance(m, ExpertMatrices)}
    g = {name: torch.zeros(tokens) for name in "ab"}
    for term in mix.terms:
        rows = term.rows or slice(None)
        g[term.adapter] = g[term.adapter].index_add(
            0, torch.arange(tokens)[rows], torch.ones(tokens)[rows] * term.gate
        )
    expected = torch.zeros(tokens, 8, dtype=torch.float64)
    for t in range(tokens):
        for e, weight in zip(index[t].tolist(), share[t], strict=True):
            gate, up = (by_hand(layers["gate_up_proj"], g, t, e) @ x[t].double()).chunk(2)
            inner = nn.functional.silu(gate) * up
            expected[t] += weight.double() * (by_hand(layers["down_proj"], g, t, e) @ inner)
    assert off(got.double(), expected) <= 1e-5
    if not mix.terms:
        return
    masters = [p for a in get_bank(model).adapters.values() for p in a.masters().values()]
    wanted = [*masters, gates]
    pull = torch.linspace(-1, 1, got.numel()).view_as(got)
    ours = torch.autograd.grad((got * pull).sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad((expected * pull).sum(), wanted, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None or not mine.any()) == (other is None or not other.any())
        if other is not None and mine is not None and other.any():
            assert off(mine, other) <= 1e-5


def test_packed_sequences_of_several_adapters_are_those_alone() -> None:
    """Behind the decoder's face, fp32: jobs on experts and router, one of them on the router alone."""
    model = HfModel(expert_models.model("qwen3_moe"))
    attach(model, spec(), "a", seed=1)
    attach(model, spec(target_modules=(), target_parameters=["mlp.gate.weight"]), "b", seed=2)
    sequences = [[5, 6, 7, 8, 9], [9, 8, 7], [3, 4, 5, 6]]
    owners = ["a", "b", None]

    def run(sequences: list[list[int]], mix: Mix) -> Tensor:
        with torch.no_grad():
            call = AdapterContext(mix)
            return model.logits(model.hidden(PackedInput.of(sequences), call).last, call)

    packed = run(sequences, Mix.per_sequence(owners, [0, 5, 8, 12]))
    alone = [
        run([s], Mix.none() if n is None else Mix.one(n))
        for s, n in zip(sequences, owners, strict=True)
    ]
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5
    assert (packed[:8] - run(sequences, Mix.none())[:8]).abs().max() > 1e-2


def test_without_terms_it_is_the_reference_bit_for_bit() -> None:
    """B = 0 changes no bit, in bfloat16 too; and the base is what it was to rounding."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model = expert_models.model("mixtral").to(dtype)
        ids = text_ids()
        with torch.no_grad():
            plain = model(input_ids=ids).logits
            attach(model, LoraSpec(r=2))
            started = model(input_ids=ids).logits
            with use_adapter_context(AdapterContext(Mix.none())):
                reference = model(input_ids=ids).logits
        assert torch.equal(started, reference)
        assert off(started, plain) <= bound


@pytest.fixture
def saved() -> Iterator[list[Tensor]]:
    """What autograd keeps."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def test_no_update_of_all_experts_is_made_in_training(saved: list[Tensor]) -> None:
    """Nothing that autograd keeps has as many values as a tensor of experts; of PEFT's it does."""
    model = expert_models.model("mixtral", experts="eager")
    base = copy.deepcopy(model)
    adapter = attach(model, spec(target_modules=(), target_parameters=EXPERTS))
    twin = peft_twin(base, adapter, EXPERTS, [])
    ids, most = torch.tensor([[5, 6, 7]]), {}
    for name, one in {"ours": model, "PEFT's": twin}.items():
        saved.clear()
        one(input_ids=ids).logits.sum()
        weights = {p.untyped_storage().data_ptr() for p in one.parameters()}
        # by the memory that is kept: a slice keeps the whole
        memory = [t.untyped_storage() for t in saved if t.dtype == torch.float32]
        most[name] = max(m.nbytes() // 4 for m in memory if m.data_ptr() not in weights)
    fused = min(get_bank(model).modules[path].weight.numel() for path in adapter.slots)
    assert most["ours"] < fused <= most["PEFT's"]


def test_detached_the_module_has_its_own_forward_again() -> None:
    model = expert_models.model("mixtral")
    holder, router = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.gate
    attach(model, spec(target_parameters=EXPERTS), "a")
    attach(model, spec(target_modules=["gate"]), "b")
    twin = copy.deepcopy(model)
    assert "forward" in holder.__dict__
    assert "forward" in router.__dict__
    ids = text_ids()
    before = twin(input_ids=ids).logits
    detach(model, "a")
    assert "forward" not in holder.__dict__
    assert "forward" in router.__dict__
    detach(model, "b")
    assert not {"forward", "weight"} & router.__dict__.keys()
    # a copy has adapters and experts of its own
    assert torch.equal(twin(input_ids=ids).logits, before)
    with torch.no_grad():
        twin.model.layers[0].mlp.experts.down_proj.zero_()
    assert not torch.equal(twin(input_ids=ids).logits, before)


def test_terms_of_several_adapters_join_as_one() -> None:
    """`concatenate`, fp32: ranks of an expert side by side."""
    model = Mixture()
    attach(model, spec(target_modules=(), target_parameters=EXPERTS), "a")
    other = LoraSpec(r=2, init_lora_weights=False, target_parameters=("experts.down_proj",))
    attach(model, other, "b", seed=1)
    whole = concatenate(model, "whole", {"a": 0.5, "b": -2.0})
    for path, slot in whole.slots.items():
        layer = get_bank(model).modules[path]
        if not isinstance(layer, ExpertMatrices):
            continue
        factors = {"a": 0.5, "b": -2.0}
        expected = sum(
            g * layer.delta(layer.slots[n]) for n, g in factors.items() if n in layer.slots
        )
        assert torch.allclose(layer.delta(slot), expected, atol=1e-6)


# --- what an adapter cannot be at

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout does not work at parameters"),
    "dora": ({"use_dora": True}, "use_dora does not work at parameters"),
    "lora_bias": ({"lora_bias": True}, "lora_bias does not work at parameters"),
    "adalora": (
        {"adalora": {"target_r": 1, "total_step": 9}},
        "variant=adalora does not work at parameters",
    ),
    "unknown": ({"target_parameters": ["experts.gate_proj"]}, "names 'experts.gate_proj', which"),
    "text": ({"target_parameters": "experts.down_proj"}, "give a list of parameter names"),
    "initialisation": ({"init_lora_weights": "pissa"}, "is for linear layers"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str) -> None:
    settings, message = REFUSED[kind]
    model = expert_models.model("mixtral")
    with pytest.raises(ConfigError, match=message):
        attach(model, LoraSpec(**{"r": 2, "target_parameters": EXPERTS, **settings}))
    # "auto" reaches the experts as well, so it meets the same
    if kind in ("dropout", "dora"):
        with pytest.raises(ConfigError, match=f"experts.gate_up_proj: {message}"):
            attach(model, LoraSpec(r=2, **settings))
        without = LoraSpec(r=2, exclude_modules=["experts"], **settings)
        assert len(attach(model, without).slots) == 4 * len(model.model.layers)


def test_a_module_that_computes_otherwise_is_refused_before_it_is_touched() -> None:
    model = Mixture(OddExperts)
    with pytest.raises(ConfigError, match=r"OddExperts computes its experts in a way of its own"):
        attach(model, spec(target_modules="all-linear"))
    assert "forward" not in model.experts.__dict__
    assert all(p.requires_grad for p in model.parameters())


def test_a_weight_that_is_used_otherwise_is_refused() -> None:
    model = Mixture(use="odd")
    attach(model, spec(target_parameters=["gate.weight"]))
    with pytest.raises(ContractError, match=r"gate: Router uses its weight otherwise .*\(abs\)"):
        model(torch.ones(2, 8))
    assert AMBIENT_CONTEXT.get() is None


class Scores(Router):
    """The scores alone."""

    forward = Router.scores


@pytest.mark.parametrize("use", ["type", "float"])
def test_a_weight_that_is_cast_first_is_multiplied_in_that_dtype(use: str) -> None:
    """A router of a base in bf16 that scores in fp32, as DeepSeek's: by the formula in float64, of which bf16
    would be some 1e-3 away."""
    model = nn.Sequential(Scores(use=use)).to(torch.bfloat16)
    plain = copy.deepcopy(model)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    adapter = attach(model, spec(target_modules=(), target_parameters=["0.weight"]))
    slot, wide = adapter.slots["0"], x.double()
    a, b = slot.A.detach().double(), slot.B.detach().double()
    exact = wide @ (plain[0].weight.detach().double() + slot.scale * b @ a).T
    scores = model(x)
    assert scores.dtype == torch.float32
    assert off(scores.double(), exact) <= 1e-5
    scores.square().sum().backward()
    assert off(slot.B.grad.double(), slot.scale * (2 * exact).T @ wide @ a.T) <= 1e-5
    get_bank(model).activate(Mix.none())
    assert torch.equal(model(x), plain(x))


def test_weights_of_an_adapters_own_in_the_same_module_are_refused() -> None:
    model = expert_models.model("gpt_oss")
    with pytest.raises(ConfigError, match=r"mlp.router has adapters at its parameters"):
        attach(model, LoraSpec(r=2, bias="all", target_parameters=["mlp.router.weight"]))


def test_names_of_single_experts_mean_the_tensor_of_all() -> None:
    """Both halves named: gate and up are one tensor. One half alone is an error, or, where a shared
    expert has the name, told."""
    for names in (["w1", "w3"], ["gate_proj", "up_proj"]):
        model = expert_models.model("mixtral")
        adapter = attach(model, LoraSpec(r=2, target_modules=names))
        assert {path.rpartition(".")[2] for path in adapter.slots} == {"gate_up_proj"}
    with pytest.raises(ConfigError, match="w1 and w3 of all experts: name both"):
        attach(expert_models.model("mixtral"), LoraSpec(r=2, target_modules=["w1"]))
    model = expert_models.model("qwen2_moe")
    adapter = attach(model, LoraSpec(r=2, target_modules=["gate_proj"]))
    assert {p.rpartition(".")[2] for p in adapter.slots} == {"gate_proj"}
    (left,) = list_skipped_modules(model, adapter)
    assert left.what.startswith(
        "experts (4 tensors such as model.layers.0.mlp.experts.gate_up_proj"
    )


def test_what_knows_linears_alone_refuses_by_name() -> None:
    model = expert_models.model("mixtral")
    for name in "ab":
        attach(model, spec(target_modules=["q_proj", "gate"]), name)
    with pytest.raises(
        ConfigError, match=r"adapter 'a' is on .*mlp.gate, and lorry merge of several"
    ):
        merge_adapters(model, {"a": 1.0, "b": 1.0}, "both")
    with pytest.raises(ConfigError, match=r"'a' has an adapter at .*mlp.gate, which no router"):
        attach_gate_vectors(model, ["a", "b"])


def test_layers_recomputed_in_backward_have_the_same_gradient() -> None:
    grads = []
    for recompute in (False, True):
        model = HfModel(expert_models.model("qwen2_moe"))
        adapter = attach(model, spec())
        model.gradient_checkpointing = recompute
        model(text_ids()).logits.square().mean().backward()
        grads.append(adapter.grads.clone())
    assert torch.equal(*grads)


class Even:
    """A router of the layers that gates everything with a half."""

    adapters, halves, level = ("default",), ("attn", "mlp"), "delta"

    def parameters(self, layer: int) -> list[Tensor]:
        return []

    def logits(self, layer: int, half: str, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], 1)

    def gates(self, logits: Tensor) -> Tensor:
        return logits + 0.5


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.filterwarnings("ignore")
def test_a_router_of_the_layers_gates_experts_too(kind: str) -> None:
    model = HfModel(expert_models.model(kind))
    attach(model, spec())
    outs = []
    for mix in (Mix.layer_routed(Even()), Mix.constants({"default": 0.5}), Mix.none()):
        call = AdapterContext(mix)
        with torch.no_grad():
            hidden = model.hidden(PackedInput.of([[5, 6, 7, 8], [9, 8]]), call).last
            outs.append(model.logits(hidden, call))
    assert (outs[0] - outs[1]).abs().max() <= 1e-5
    assert (outs[0] - outs[2]).abs().max() > 1e-2


def test_one_half_alone_trains() -> None:
    """`train: [B]`: no gradient for A, the same one for B."""
    grads = []
    for halves in (("A", "B"), ("B",)):
        model = expert_models.model("mixtral")
        adapter = attach(model, spec(target_parameters=EXPERTS, train=halves))
        model(input_ids=text_ids()).logits.square().mean().backward()
        slot = adapter.slots["model.layers.0.mlp.experts.down_proj"]
        grads.append((slot.A.grad, slot.B.grad))
    assert grads[0][0] is not None
    assert grads[1][0] is None
    assert torch.equal(grads[0][1], grads[1][1])
