"""transformers' models behind the decoder's face: same logits, mixes, gradients and generation, and
nothing dropped silently.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorry
from lorry.adapters.attach import attach, detach, get_bank, lora_parameters
from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix, MixTerm
from lorry.adapters.spec import LoraSpec
from lorry.adapters.targets.skipped import list_skipped_modules
from lorry.data.batch import TokenizedExample, collate
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel, use_adapter_context
from lorry.models.scoring.score import TokenScore, evaluate_wants, log_prob
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401 - a fixture
from tests.support.tinyrun import model_directory

# logits are head(hidden) and nothing else
PLAIN = {
    "gemma3_text",
    "phi",
    "bloom",
    "opt",
    "qwen3_moe",
}
WHOLE = {"llama4_text"}  # its body cannot be called apart: whole logits are kept
SEQUENCES = [
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
    [9, 8, 7],
    [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [20],
]
STARTS = [0, 12, 15, 28, 29]


def foreign(name: str) -> HfModel:
    return HfModel(tiny.random_model(tiny.FOREIGN[name]))


@torch.no_grad()
def logits(model: Any, sequences: Sequence[Sequence[int]], call: AdapterContext) -> Tensor:
    return model.logits(model.hidden(PackedInput.of(sequences), call).last, call)


@pytest.mark.parametrize("name", tiny.FOREIGN)
def test_packed_logits_are_the_models_own(name: str) -> None:
    """Softcaps, scales and projections included: compared with the model run alone on each
    sequence.
    """
    inner = tiny.random_model(tiny.FOREIGN[name])
    notes: list[str] = []
    model = HfModel(inner, notes.append)
    with torch.no_grad():
        expected = torch.cat(
            [inner(input_ids=torch.tensor([s]), use_cache=False).logits[0] for s in SEQUENCES]
        )
    assert (logits(model, SEQUENCES, AdapterContext()) - expected).abs().max() <= 1e-5
    assert (model.head is not None) == (name in PLAIN)
    assert bool(notes) == (model.body is None) == (name in WHOLE)
    ids, mask = (
        torch.tensor([[0, 0, 9, 8, 7], [5, 6, 7, 8, 9]]),
        torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    )
    with torch.no_grad():
        padded = model(ids, mask).logits
    assert (padded[0, 2:] - expected[12:15]).abs().max() <= 1e-5
    assert not padded[0, :2].any()


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_what_follows_the_head_is_not_dropped(name: str) -> None:
    """The head's product alone is another distribution for these: had it been taken, this would
    show.
    """
    model = foreign(name)
    hidden = model.hidden(PackedInput.of(SEQUENCES), AdapterContext()).last
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    assert hidden is not None
    assert (head(hidden) - model.logits(hidden, AdapterContext())).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "phi", "qwen3_moe", "llama4_text"])
def test_scores_and_their_gradients_are_those_of_whole_logits(name: str) -> None:
    """log p through the chunked scores equals log-softmax of the model's logits, and so does the
    adapter's gradient.
    """
    model = foreign(name)
    adapter = attach(model, LoraSpec(r=2, init_lora_weights=False))
    batch = collate(
        [TokenizedExample(s, [0.0] + [1.0] * (len(s) - 1)) for s in SEQUENCES if len(s) > 1]
    )
    grads = []
    for scored in (True, False):
        adapter.grads.zero_()
        call = AdapterContext(Mix.one("default"))
        if scored:
            got = evaluate_wants(model, batch, {"p": TokenScore(log_prob)}, call)["p"].sum()
        else:
            parts = [
                model(batch.tokens[None, a:b]).logits[0, :-1].log_softmax(-1)
                for a, b in batch.segments
            ]
            targets = [batch.tokens[a + 1 : b] for a, b in batch.segments]
            got = torch.stack(
                [p.gather(1, t[:, None]).sum() for p, t in zip(parts, targets, strict=True)]
            ).sum()
        got.backward()
        grads.append((got.detach(), adapter.grads.clone()))
    assert abs(float(grads[0][0] - grads[1][0])) < 1e-3
    assert relative(grads[0][1], grads[1][1]) < 1e-4
    assert all(bool(g.any()) for g in adapter.split_like(grads[0][1]).values())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- a llama forced through transformers, against the native decoder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Decoder, HfModel]:
    """The same weights natively and through transformers, each with the same two adapters `a` and
    `b`.
    """
    path = tiny.directory(tiny.trained("llama"), tmp_path)
    native, forced = (
        tiny.decoder(tiny.trained("llama"), tmp_path),
        HfModel(AutoModelForCausalLM.from_pretrained(path)),
    )
    for model in (native, forced):
        for seed, name in enumerate(("a", "b")):
            attach(
                model,
                LoraSpec(
                    r=4, init_lora_weights=False, target_modules=("q_proj", "down_proj", "lm_head")
                ),
                name,
                seed=seed,
            )
    return native, forced


def test_names_are_transformers_own(pair: tuple[Decoder, HfModel]) -> None:
    native, forced = pair
    assert list(get_bank(forced)["a"].slots) == list(get_bank(native)["a"].slots)
    assert (
        set(forced.state_dict())
        == set(tiny.trained("llama").state_dict())
        == set(native.state_dict())
    )
    assert forced.inner.lm_head is get_bank(forced).modules["lm_head"]
    for name in ("a", "b"):
        detach(forced, name)
    assert type(forced.inner.lm_head) is nn.Linear
    assert not any(isinstance(m, BankLinear) for m in forced.modules())


def mixes() -> dict[str, Mix]:
    gates = torch.rand(29, 2, generator=torch.Generator().manual_seed(0))
    return {
        "none": Mix.none(),
        "one": Mix.one("a"),
        "constants": Mix.constants({"a": -0.7, "b": 0.4}),
        "per sequence": Mix.per_sequence(["b", None, "a", "b"], STARTS),
        "routed": Mix.routed(["a", "b"], gates),
        "part of a sequence": Mix((MixTerm("a", slice(4, 14)), MixTerm("b", slice(20, 29), 0.5))),
        "gates on some rows": Mix(
            (MixTerm("a", slice(10, 20), gates[10:20, 0]), MixTerm("b", slice(0, 12)))
        ),
    }


@pytest.mark.parametrize("kind", mixes())
def test_every_mix_gives_the_decoders_logits_and_gradients(
    kind: str, pair: tuple[Decoder, HfModel]
) -> None:
    call, found = AdapterContext(mixes()[kind]), []
    for model in pair:
        hidden = model.hidden(PackedInput.of(SEQUENCES), call).last
        assert hidden is not None
        out = model.logits(hidden, call)
        if call.mix.terms:
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append(
            (out.detach(), torch.cat([a.grads for a in get_bank(model).adapters.values()]))
        )
    (native, native_grad), (forced, forced_grad) = found
    assert (native - forced).abs().max() <= 1e-5
    if call.mix.terms:
        assert relative(forced_grad, native_grad) <= 1e-5
    base = logits(pair[0], SEQUENCES, AdapterContext())
    # or equality would prove nothing
    assert ((native - base).abs().max() > 0.1) == (kind != "none")


def test_a_routers_gates_get_the_decoders_gradient(pair: tuple[Decoder, HfModel]) -> None:
    grads = []
    for model in pair:
        gates = torch.full((29, 2), 0.5, requires_grad=True)
        call = AdapterContext(Mix.routed(["a", "b"], gates))
        hidden = model.hidden(PackedInput.of(SEQUENCES), call).last
        assert hidden is not None
        model.logits(hidden, call).logsumexp(-1).sum().backward()
        grads.append(gates.grad)
    assert relative(grads[1], grads[0]) <= 1e-5


def test_dropout_depends_on_the_sequence_not_on_its_neighbours(
    pair: tuple[Decoder, HfModel],
) -> None:
    forced = pair[1]
    for slot in get_bank(forced)["a"].slots.values():
        slot.dropout = 0.5

    def last(which: list[int]) -> Tensor:
        chosen = [SEQUENCES[i] for i in which]
        starts = [0, *torch.tensor([len(s) for s in chosen]).cumsum(0).tolist()]
        call = AdapterContext(Mix.one("a"), DropoutNoise(1, 2, tuple(which), tuple(starts)))
        with torch.no_grad():
            out = forced.hidden(PackedInput.of(chosen), call).last
        assert out is not None
        return out

    together, alone = last([0, 1, 2, 3]), last([2])
    assert (together[15:28] - alone).abs().max() <= 1e-5
    assert (together[15:28] - logits_free(forced)).abs().max() > 1e-2


def logits_free(model: HfModel) -> Tensor:
    with torch.no_grad():
        out = model.hidden(PackedInput.of([SEQUENCES[2]]), AdapterContext(Mix.one("a"))).last
    assert out is not None
    return out


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_gradient_checkpointing_recomputes_under_the_same_call(name: str) -> None:
    """The ambient call is gone when backward runs; recompute must see the one of the forward pass,
    dropout included.
    """
    model = HfModel(tiny.fresh("llama")) if name == "llama" else foreign(name)
    for adapter, seed in (("a", 1), ("b", 2)):
        attach(model, LoraSpec(r=2, init_lora_weights=False, lora_dropout=0.3), adapter, seed=seed)
    call = AdapterContext(
        Mix.per_sequence(["a", "b", None, "a"], STARTS),
        DropoutNoise(0, 0, (1, 2, 3, 4), tuple(STARTS)),
    )
    grads = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        assert model.gradient_checkpointing == recompute
        for adapter_of in get_bank(model).adapters.values():
            adapter_of.grads.zero_()
        hidden = model.hidden(PackedInput.of(SEQUENCES), call).last
        assert hidden is not None
        # whatever is ambient in backward must not matter
        with use_adapter_context(AdapterContext(Mix.constants({"a": 9.0, "b": 9.0}))):
            (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        grads.append(
            torch.cat([p.grad.reshape(-1) for p in lora_parameters(model) if p.grad is not None])
        )
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)
    model.gradient_checkpointing = False
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    assert AMBIENT_CONTEXT.get() is None


def test_gradient_checkpointing_is_refused_without_layers() -> None:
    model = foreign("phi")
    model.layers = []
    with pytest.raises(ModelError, match="no list of layers"):
        model.gradient_checkpointing = True


def test_taps_and_stop_are_those_of_the_decoder(pair: tuple[Decoder, HfModel]) -> None:
    packed, call = (
        PackedInput.of(SEQUENCES),
        AdapterContext(Mix.per_sequence(["b", None, "a", "b"], STARTS)),
    )
    with torch.no_grad():
        native, forced = (m.hidden(packed, call, output_layers=[0, 1], stop=1) for m in pair)
        whole = pair[1].hidden(packed, call, output_layers=[1])
    assert native.last is None
    assert forced.last is None
    assert whole.last is not None
    for layer in (0, 1):
        gap = (native.layer_outputs[layer] - forced.layer_outputs[layer]).abs().max()
        assert gap <= 1e-6 * max(10.0, float(forced.layer_outputs[layer].abs().max()))
    assert torch.equal(whole.layer_outputs[1], forced.layer_outputs[1])
    with pytest.raises(ModelError, match="layer 7"):
        pair[1].hidden(packed, call, output_layers=[7])


# --- what cannot be done is refused or named


class Routed(nn.Module):
    """A layer that shows its linear only some of the tokens, as a routed expert does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(x[:, :1]), x[:, 1:]], 1)


def test_a_layer_that_sees_only_some_tokens_refuses_mixes_by_position() -> None:
    model = HfModel(tiny.fresh("llama"))
    model.inner.model.layers[0].mlp.down_proj = nn.Sequential(
        model.inner.model.layers[0].mlp.down_proj, Routed(nn.Linear(32, 32))
    )
    attach(model, LoraSpec(r=2, target_modules=("inner",)))
    # one gate for all tokens is well defined
    logits(model, SEQUENCES, AdapterContext(Mix.one("default")))
    for call in (
        AdapterContext(Mix.per_sequence(["default", None, None, None], STARTS)),
        AdapterContext(Mix.routed(["default"], torch.ones(29, 1))),
        AdapterContext(Mix.one("default"), DropoutNoise(0, 0, (0, 1, 2, 3), tuple(STARTS))),
    ):
        with pytest.raises(ContractError, match=r"down_proj\.1\.inner: receives"):
            logits(model, SEQUENCES, call)


# --- what `auto` and `all-linear` pass over

STATES = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
MIXTURES = {
    "mixtral": {**tiny.MOE, "model_type": "mixtral", "num_local_experts": 4},
    "qwen2_moe": {
        **tiny.MOE, "model_type": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": tiny.FOREIGN["qwen3_moe"],
    "llama4": tiny.FOREIGN["llama4_text"],
    "granitemoe": {**tiny.MOE, "model_type": "granitemoe", "num_local_experts": 4},
}  # fmt: skip
# {model: (its config, linear layers with a number in their path that text does not train)}
PARTLY_READ = {
    "mamba": ({**STATES, "model_type": "mamba", "state_size": 8}, {"dt_proj"}),
    "mamba2": (
        {
            **STATES,
            "model_type": "mamba2",
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
        },
        set(),
    ),
    "rwkv": ({**STATES, "model_type": "rwkv", "attention_hidden_size": 32}, set()),
    "jamba": (
        {**tiny.MOE, "model_type": "jamba", "mamba_d_state": 8, "num_hidden_layers": 8},
        {"dt_proj"},
    ),
    "bart": (
        {
            "model_type": "bart",
            "vocab_size": tiny.VOCAB,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "encoder_layers": 1,
            "encoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        {
            "encoder_attn.k_proj",
            "encoder_attn.v_proj",
            "encoder_attn.q_proj",
            "encoder_attn.out_proj",
        },
    ),
}


@pytest.mark.parametrize("kind", PARTLY_READ)
def test_auto_adapts_what_text_trains_and_names_the_rest(kind: str) -> None:
    """The truth is a backward pass through adapters on every linear layer: those without a gradient
    are left out, no others.
    """
    config, dead = PARTLY_READ[kind]
    every = HfModel(tiny.random_model(config))
    adapter = attach(every, LoraSpec(r=2, init_lora_weights=False, target_modules=r".*\.\d+\..*"))
    every(tiny.text_ids()).logits.square().sum().backward()
    alive = [
        path
        for path, slot in adapter.slots.items()
        if slot.A.grad is not None and bool(slot.A.grad.any())
    ]
    model = HfModel(tiny.random_model(config))
    auto = attach(model, LoraSpec(r=2))
    assert list(auto.slots) == alive
    named = [
        one for one in list_skipped_modules(model, auto) if "linear layers such as" in one.what
    ]
    assert bool(named) == bool(dead)
    assert {
        next(d for d in dead if path.endswith(d)) for path in adapter.slots if path not in alive
    } == dead
    assert (
        not any("expert" in f"{one.what} {one.why}" for one in list_skipped_modules(model, auto))
        or kind == "jamba"
    )


def test_routed_experts_that_few_tokens_meet_are_reached_all_the_same() -> None:
    """Experts as layers of their own: sixteen tokens do not meet all of them, longer texts will."""
    model = HfModel(tiny.fresh("llama"))
    mlp = model.get_submodule("model.layers.1.mlp")
    experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(3))

    def routed(x: Tensor) -> Tensor:
        return experts[1](x)

    mlp.experts = experts
    mlp.forward = routed
    auto = attach(model, LoraSpec(r=2))
    assert {f"model.layers.1.mlp.experts.{i}.up_proj" for i in range(3)} <= set(auto.slots)
    assert "model.layers.1.mlp.up_proj" in auto.slots  # as layer 0's, which is reached


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_fused_experts_are_adapted_or_named_with_their_share(kind: str, targets: str) -> None:
    """Also where they are left out by name, or their module has a form of its own (Llama 4's takes
    rows that are sorted already)."""
    inner = tiny.random_model(MIXTURES[kind])
    fused = {n: p.numel() for n, p in inner.named_parameters() if p.dim() == 3}
    share = sum(fused.values()) / sum(p.numel() for p in inner.parameters())
    model = HfModel(inner)
    told = f"experts ({len(fused)} tensors such as {next(iter(fused))}, {share:.0%} of"
    if kind != "llama4":
        every = attach(model, LoraSpec(r=2, target_modules=targets), "every")
        assert fused.keys() <= every.slots.keys()
        (router,) = list_skipped_modules(model, every)
        assert router.what.startswith("2 weights such as model.layers.0.")
        spec = LoraSpec(r=2, target_modules=targets, exclude_modules=["experts"])
        first, *_ = list_skipped_modules(model, attach(model, spec, "without"))
        assert first.what.startswith(told)
        assert "the targets do not name them; the adapter is on " in first.why
        return
    adapter = attach(model, LoraSpec(r=2, target_modules=targets))
    first = list_skipped_modules(model, adapter)[0]
    assert first.what.startswith(told)
    assert "a form that no adapter can sit on; the adapter is on " in first.why
    assert "q_proj" in first.why
    name = next(iter(fused)).removesuffix(".weight").rpartition(".")[2]
    with pytest.raises(
        ConfigError, match=f"target_modules names '{name}'.* holds all experts of a layer"
    ):
        attach(model, LoraSpec(r=2, target_modules=(name,)), "other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_experts_of_any_width_run(dtype: torch.dtype, tmp_path: Path) -> None:
    """torch's grouped product refuses rows of 36 bytes (18 values in bfloat16), and of 72."""
    folder = model_directory(tmp_path / "model", "mixtral", intermediate_size=18)
    model, _ = lorry.load(folder, dtype=str(dtype).removeprefix("torch."))
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    tokens = torch.arange(1, 12)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reference(tokens).logits)


def test_a_dense_model_leaves_nothing_out() -> None:
    for model in (foreign("phi"), foreign("granite")):
        assert list_skipped_modules(model, attach(model, LoraSpec(r=2))) == []


class Halves:
    """A router of the layers that gates ``adapters`` with a half."""

    adapters, halves, level = ("default",), ("attn", "mlp"), "delta"

    def parameters(self, layer: int) -> list[Tensor]:
        return []

    def logits(self, layer: int, half: str, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], 1)

    def gates(self, logits: Tensor) -> Tensor:
        return logits + 0.5


@pytest.mark.parametrize("adapters", [["default", "default"], ["default", None]])
def test_a_router_of_the_layers_is_refused(adapters: list[str | None]) -> None:
    """transformers' layers ask no router: an adapter that one gates is never computed without its
    gate.
    """
    model = foreign("opt")
    router = Halves()
    attach(model, LoraSpec(r=2))
    call = AdapterContext(
        Mix.packed([Mix.layer_routed(router) if a else Mix.none() for a in adapters], [0, 12, 15])
    )
    with pytest.raises(ContractError, match="but this linear is not in a decoder layer"):
        logits(model, SEQUENCES[:2], call)
