"""A mixture at level `expert`: transformers' own MoE classes, built of the merged experts, are the
truth for its values and, by autograd in float64, for its gradients.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.mix import AdapterContext, Mix, MixTerm
from lorry.adapters.router import RoutingRule, TokenRouter, attach_router
from lorry.adapters.spec import LoraSpec
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.data.batch import collate
from lorry.errors import ConfigError, ContractError
from lorry.evaluate.packing import PackedSequences, packing_leak
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder import attention
from lorry.models.decoder import model as decoder_model
from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel
from lorry.train.setup.loop import LEAK_FACTOR, SCORE_TOLERANCES
from tests.support import tiny
from tests.support.seam import examples

SEQUENCES = [[5, 9, 3, 7, 11, 2], [8, 1, 4, 6, 13, 12, 10, 9]]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = {"a": 2, "b": 4, "c": 3}  # name: rank
TOP2 = RoutingRule("mlp", 2, level="expert")
TOP1 = RoutingRule("mlp", 1, straight_through=True, level="expert")


def with_experts(
    name: str, rule: RoutingRule, folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, nn.Module, TokenRouter]:
    """A tiny model of two layers, transformers' own, and a router over experts of the MLPs; c has
    no adapter in the last layer, where it is the base's MLP."""
    source = tiny.fresh(name, num_hidden_layers=2)
    model = tiny.decoder(source, folder, dtype)
    for expert, rank in EXPERTS.items():
        layers = (0,) if expert == "c" else None
        spec = LoraSpec(
            r=rank,
            lora_alpha=2 * rank,
            init_lora_weights=False,
            target_modules=MLP,
            layers_to_transform=layers,
        )
        adapter = attach(model, spec, expert, seed=rank)
        with torch.no_grad():
            # experts as far apart as the base is large: of nearly equal ones a router's gradient is
            # a difference of nearly equal numbers
            adapter.values[adapter.split :].mul_(10)
        adapter.touch()
    router = attach_router(model, list(EXPERTS), rule)
    with torch.no_grad():
        router.values.copy_(torch.randn(router.values.numel(), generator=torch.manual_seed(3)))
    return model, source, router


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Mixtral", {"num_local_experts": 3, "sliding_window": None}),
    # its shared expert cannot be left out
    "qwen2": (
        "Qwen2Moe",
        {"num_experts": 3, "norm_topk_prob": True, "shared_expert_intermediate_size": 8},
    ),
    "qwen3": ("Qwen3Moe", {"num_experts": 3, "norm_topk_prob": True}),
}


class Stock:
    """The stock class of a family, in float64, and the leaves that its tensors were made of."""

    def __init__(self, name: str, source: nn.Module, model: Decoder, router: TokenRouter) -> None:
        kind, own = KINDS[name]
        config = source.config.to_dict()
        for key in ("model_type", "architectures", "transformers_version"):
            config.pop(key, None)
        own = {**own, "num_experts_per_tok": router.rule.top_k}
        own["moe_intermediate_size"] = config["intermediate_size"]
        made = getattr(transformers, f"{kind}Config")(**{**config, **own})
        made._attn_implementation = made._experts_implementation = "eager"
        self.model = getattr(transformers, f"{kind}ForCausalLM")(made).double().eval()
        bank, weights = get_bank(model), source.double().state_dict()
        self.masters = {
            expert: {
                n: t.detach().double().requires_grad_() for n, t in bank[expert].tensors().items()
            }
            for expert in EXPERTS
        }
        self.gates = {
            site: w.detach().double().requires_grad_() for site, w in router.weights.items()
        }

        def merged(path: str, expert: str) -> Tensor:
            own, weight = self.masters[expert], weights[f"{path}.weight"]
            if f"{path}.lora_A" not in own:
                return weight
            scale = bank[expert].slots[path].scale
            return weight + scale * own[f"{path}.lora_B"] @ own[f"{path}.lora_A"]

        tensors = {n: t for n, t in weights.items() if ".mlp." not in n}
        for layer in range(2):
            at = f"model.layers.{layer}.mlp"
            tensors[f"{at}.gate.weight"] = self.gates[layer, "mlp"]
            inner = [
                torch.cat([merged(f"{at}.{p}_proj", e) for p in ("gate", "up")]) for e in EXPERTS
            ]
            tensors[f"{at}.experts.gate_up_proj"] = torch.stack(inner)
            outer = [merged(f"{at}.down_proj", e) for e in EXPERTS]
            tensors[f"{at}.experts.down_proj"] = torch.stack(outer)
            # switched off by what comes out of it
            own_shared = [n for n in self.model.state_dict() if n.startswith(f"{at}.shared_expert")]
            for n in own_shared:
                empty = torch.zeros_like(self.model.state_dict()[n])
                tensors[n] = empty if n.endswith("down_proj.weight") else empty + 1
        assert set(tensors) == set(self.model.state_dict())
        self.tensors = tensors
        self.rule = router.rule

    def route_in_float64(self) -> None:
        """Have the routers compute as they do, but in float64 where they round to float32; and of
        one expert with the gradient of 1 + p - stop(p), where theirs is 1 and has none."""
        for layer in self.model.model.layers:
            layer.mlp.gate.register_forward_hook(self._route)

    def _route(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        logits, _, chosen = outputs
        p = logits.softmax(-1).gather(-1, chosen)
        straight = self.rule.straight_through
        return logits, 1 + p - p.detach() if straight else p / p.sum(-1, keepdim=True), chosen

    def logits(self, tokens: list[int]) -> Tensor:
        inputs = {"input_ids": torch.tensor([tokens])}
        return torch.func.functional_call(self.model, self.tensors, (), inputs).logits[0]


def our_logits(model: Decoder, call: AdapterContext, rows: list[list[int]]) -> list[Tensor]:
    packed = PackedInput.of(rows)
    logits = model.logits(model.hidden(packed, call).last, call)
    return [logits[start:stop] for start, stop in packed.segments]


def loss_of(logits: list[Tensor]) -> Tensor:
    return sum(
        F.cross_entropy(own[:-1], torch.tensor(tokens[1:]), reduction="sum")
        for own, tokens in zip(logits, SEQUENCES, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("llama", TOP2),
        ("llama", TOP1),
        ("llama", replace(TOP2, top_k=3, normalize=False)),
        ("qwen2", TOP2),
        ("qwen2", TOP1),
        ("qwen3", TOP2),
    ],
    ids=[
        "mixtral-top2",
        "mixtral-top1-st",
        "mixtral-all",
        "qwen2-top2",
        "qwen2-top1-st",
        "qwen3-top2",
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_values_and_gradients_are_those_of_the_stock_class(
    name: str, rule: RoutingRule, recompute: bool, tmp_path: Path
) -> None:
    """Logits within 1e-5 of the largest; router and experts through two layers against autograd."""
    model, source, router = with_experts(name, rule, tmp_path)
    model.gradient_checkpointing = recompute
    stock = Stock(name, source, model, router)
    with torch.no_grad():
        there = [stock.logits(tokens) for tokens in SEQUENCES]
    here = our_logits(model, AdapterContext(router.mix()), SEQUENCES)
    for own, wanted in zip(here, there, strict=True):
        assert float((own.detach().double() - wanted).abs().max()) < 1e-5 * float(
            wanted.abs().max()
        )
    stock.route_in_float64()
    loss_of([stock.logits(tokens) for tokens in SEQUENCES]).backward()
    loss = loss_of(here)
    for _ in range(2):  # a second backward through the same graph gives the same again
        router.grads.zero_()
        for expert in EXPERTS:
            get_bank(model)[expert].grads.zero_()
        loss.backward(retain_graph=True)
    for site, weight in router.weights.items():
        wanted = stock.gates[site].grad
        assert weight.grad is not None
        assert float((weight.grad.double() - wanted).norm() / wanted.norm()) < 2e-5, site
    for expert in EXPERTS:
        grads = get_bank(model)[expert].split_like(get_bank(model)[expert].grads)
        for tensor, leaf in stock.masters[expert].items():
            if leaf.grad is None or not leaf.grad.any():
                assert not grads[tensor].any()
                continue
            error = float((grads[tensor].double() - leaf.grad).norm() / leaf.grad.norm())
            assert error < 2e-5, (expert, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_one_hot_gates_both_levels_are_one(dtype: torch.dtype, tmp_path: Path) -> None:
    """With one expert of gate 1 whole MLPs are the sum of base and term: outputs, and the gradients
    of the experts in the last layer (below it some comes through its router, where the levels
    differ), dropout and sequences of another mix included."""
    bound = 2e-5 if dtype == torch.float32 else 0.1
    rows = [*SEQUENCES, [3, 2, 9, 1], [7, 7, 2]]
    found = []
    for level in ("delta", "expert"):
        model, _, router = with_experts(
            "llama", replace(TOP1, level=level), tmp_path / level, dtype
        )
        bank = get_bank(model)
        for slot in bank["b"].slots.values():
            slot.dropout = 0.3
        packed = PackedInput.of(rows)
        starts = [0, *(stop for _, stop in packed.segments)]
        mixes = [router.mix(), router.mix(), Mix.one("b"), Mix.none()]
        noise = DropoutNoise(0, 1, (5, 6, 7, 8), tuple(starts))
        call = AdapterContext(Mix.packed(mixes, starts), noise)
        last = model.hidden(packed, call).last
        last.float().square().sum().backward()
        grads = {
            f"{e}.{tensor}": values.clone()
            for e in EXPERTS
            for tensor, values in bank[e].split_like(bank[e].grads).items()
            if ".layers.1." in tensor
        }
        assert len(grads) == 12  # A and B of three linears, of a and b
        found.append((last.detach().float(), grads))
    (delta, delta_grads), (expert, expert_grads) = found
    assert float((delta - expert).norm() / delta.norm()) < bound
    for name, wanted in delta_grads.items():
        difference = (wanted - expert_grads[name]).norm()
        # no token may have an expert
        assert float(difference) <= bound * float(wanted.norm()), name


def test_sequences_of_a_batch_have_their_own_mixes(tmp_path: Path) -> None:
    """Under the router, a plain expert and the base: each as alone."""
    model, _, router = with_experts("llama", TOP2, tmp_path)
    mixes, rows = [router.mix(), Mix.one("b"), Mix.none()], [*SEQUENCES, [3, 2, 9, 1]]
    packed = PackedInput.of(rows)
    starts = [0, *(stop for _, stop in packed.segments)]
    with torch.no_grad():
        together = our_logits(model, AdapterContext(Mix.packed(mixes, starts)), rows)
        for tokens, mix, found in zip(rows, mixes, together, strict=True):
            (alone,) = our_logits(model, AdapterContext(mix), [tokens])
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_tokens_without_an_expert_cost_it_nothing(tmp_path: Path) -> None:
    """FLOPs of a pass: with one expert a token those of one MLP with its adapter, with two twice."""
    spent = {}
    for rule in (TOP1, TOP2):
        model, _, router = with_experts("llama", rule, tmp_path / str(rule.top_k))
        for call in (Mix.none(), router.mix()):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model.hidden(PackedInput.of(SEQUENCES), AdapterContext(call))
            spent[rule.top_k if call.router else 0] = counter.get_total_flops()
    g = model.geometry
    tokens, layers = sum(map(len, SEQUENCES)), g.layers
    mlp = layers * 2 * 3 * tokens * g.width * g.mlp_width
    most = layers * 2 * 3 * tokens * max(EXPERTS.values()) * (g.width + g.mlp_width)
    router_own = layers * 2 * tokens * g.width * len(EXPERTS)
    assert spent[1] - spent[0] <= most + router_own
    assert mlp <= spent[2] - spent[0] <= mlp + 2 * most + router_own


def test_neighbours_move_the_rounding_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """How many rows an expert's products have hangs on the neighbours' tokens, which may round
    otherwise; attention that sees a neighbour moves scores by more."""
    dense, _, _ = with_experts("llama", replace(TOP1, level="delta"), tmp_path / "delta")
    model, source, router = with_experts("llama", TOP1, tmp_path / "expert")
    assert (dense.shapes_follow_tokens, model.shapes_follow_tokens) == (False, True)
    stock = HfModel(Stock("llama", source, model, router).model)
    assert (HfModel(source).shapes_follow_tokens, stock.shapes_follow_tokens) == (False, True)

    class Routed(LocalBackend):
        def score(self, batches: Any, wants: Any, mix: Mix | None = None) -> Any:
            return super().score(batches, wants, router.mix())

    rows = [replace(row, tokens=[t % model.vocab_size for t in row.tokens]) for row in examples(6)]
    backend, batch = Routed(model, ["a"], OptimSettings()), collate(rows)
    limit = LEAK_FACTOR * SCORE_TOLERANCES[torch.float32]
    assert packing_leak(PackedSequences(backend, batch)) <= limit
    original = attention.PackedSegments

    def merged(segments: Any, device: Any, places: Any) -> Any:
        return original([(segments[0][0], segments[-1][1])], device)

    monkeypatch.setattr(decoder_model, "PackedSegments", merged)
    assert packing_leak(PackedSequences(backend, batch)) > limit


def test_what_expert_level_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would shrink every MLP"):
        RoutingRule("mlp", 1, normalize=False, level="expert").check(3)
    with pytest.raises(ConfigError, match=r"router\.input=attn gates none"):
        RoutingRule("attn", level="expert").check(3)
    model, _, router = with_experts("llama", TOP2, tmp_path)
    gated = MixTerm("a", None, torch.ones(sum(map(len, SEQUENCES))))
    mix = replace(router.mix(), terms=(*router.mix().terms, gated))
    with pytest.raises(ContractError, match="'a' has a gate per token"):
        our_logits(model, AdapterContext(mix), SEQUENCES)
    for linear in model.blocks[0].linears.mlp_in.linears:
        linear.weight.requires_grad_(True)
    with pytest.raises(ContractError, match="base weights do not train under a router"):
        our_logits(model, AdapterContext(router.mix()), SEQUENCES)
