"""transformers' models behind the decoder's face: same logits, mixes, gradients and generation, and nothing dropped silently."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from lorry.bank.attach import attach, bank_of, detach, lora_parameters
from lorry.bank.layers import AMBIENT, BankLinear
from lorry.bank.mix import Call, Mix, Term
from lorry.bank.noise import Noise
from lorry.bank.spec import LoraSpec
from lorry.data.batch import Example, collate
from lorry.errors import ContractError, ModelError
from lorry.models.decoder import Decoder, Packed
from lorry.models.hf import HfModel, ambient, unreached
from lorry.models.score import Score, evaluate, log_prob
from tiny import one_thread  # noqa: F401 - a fixture

PLAIN = {"gemma3_text", "phi", "bloom", "opt", "qwen3_moe"}  # logits are head(hidden) and nothing else
WHOLE = {"llama4_text"}  # its body cannot be called apart: whole logits are kept
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [9, 8, 7], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20]]
STARTS = [0, 12, 15, 28, 29]


def foreign(name: str) -> HfModel:
    return HfModel(tiny.random_model(tiny.FOREIGN[name]))


@torch.no_grad()
def logits(model: Any, sequences: Sequence[Sequence[int]], call: Call) -> Tensor:
    return model.logits(model.hidden(Packed.of(sequences), call).last, call)


@pytest.mark.parametrize("name", tiny.FOREIGN)
def test_packed_logits_are_the_models_own(name: str) -> None:
    """Softcaps, scales and projections included: compared with the model run alone on each sequence."""
    inner = tiny.random_model(tiny.FOREIGN[name])
    notes: list[str] = []
    model = HfModel(inner, notes)
    with torch.no_grad():
        expected = torch.cat([inner(input_ids=torch.tensor([s]), use_cache=False).logits[0] for s in SEQUENCES])
    assert (logits(model, SEQUENCES, Call()) - expected).abs().max() <= 1e-5
    assert (model.head is not None) == (name in PLAIN)
    assert bool(notes) == (model.body is None) == (name in WHOLE)
    ids, mask = torch.tensor([[0, 0, 9, 8, 7], [5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        padded = model(ids, mask).logits
    assert (padded[0, 2:] - expected[12:15]).abs().max() <= 1e-5
    assert not padded[0, :2].any()


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_what_follows_the_head_is_not_dropped(name: str) -> None:
    """The head's product alone is another distribution for these: had it been taken, this would show."""
    model = foreign(name)
    hidden = model.hidden(Packed.of(SEQUENCES), Call()).last
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    assert hidden is not None
    assert (head(hidden) - model.logits(hidden, Call())).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "phi", "qwen3_moe", "llama4_text"])
def test_scores_and_their_gradients_are_those_of_whole_logits(name: str) -> None:
    """log p through the chunked scores equals log-softmax of the model's logits, and so does the adapter's gradient."""
    model = foreign(name)
    adapter = attach(model, LoraSpec(r=2, init_lora_weights=False))
    batch = collate([Example(s, [0.0] + [1.0] * (len(s) - 1)) for s in SEQUENCES if len(s) > 1])
    grads = []
    for scored in (True, False):
        adapter.grads.zero_()
        call = Call(Mix.one("default"))
        if scored:
            got = evaluate(model, batch, {"p": Score(log_prob)}, call)["p"].sum()
        else:
            parts = [model(batch.tokens[None, a:b]).logits[0, :-1].log_softmax(-1) for a, b in batch.segments]
            targets = [batch.tokens[a + 1 : b] for a, b in batch.segments]
            got = torch.stack([p.gather(1, t[:, None]).sum() for p, t in zip(parts, targets, strict=True)]).sum()
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
    """The same weights natively and through transformers, each with the same two adapters `a` and `b`."""
    path = tiny.directory(tiny.trained("llama"), tmp_path)
    native, forced = tiny.decoder(tiny.trained("llama"), tmp_path), HfModel(AutoModelForCausalLM.from_pretrained(path))
    for model in (native, forced):
        for seed, name in enumerate(("a", "b")):
            attach(
                model, LoraSpec(r=4, init_lora_weights=False, target_modules=("q_proj", "down_proj", "lm_head")), name, seed=seed
            )
    return native, forced


def test_names_are_transformers_own(pair: tuple[Decoder, HfModel]) -> None:
    native, forced = pair
    assert list(bank_of(forced)["a"].slots) == list(bank_of(native)["a"].slots)
    assert set(forced.state_dict()) == set(tiny.trained("llama").state_dict()) == set(native.state_dict())
    assert forced.inner.lm_head is bank_of(forced).modules["lm_head"]
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
        "part of a sequence": Mix((Term("a", slice(4, 14)), Term("b", slice(20, 29), 0.5))),
        "gates on some rows": Mix((Term("a", slice(10, 20), gates[10:20, 0]), Term("b", slice(0, 12)))),
    }


@pytest.mark.parametrize("kind", mixes())
def test_every_mix_gives_the_decoders_logits_and_gradients(kind: str, pair: tuple[Decoder, HfModel]) -> None:
    call, found = Call(mixes()[kind]), []
    for model in pair:
        hidden = model.hidden(Packed.of(SEQUENCES), call).last
        assert hidden is not None
        out = model.logits(hidden, call)
        if call.mix.terms:
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out.detach(), torch.cat([a.grads for a in bank_of(model).adapters.values()])))
    (native, native_grad), (forced, forced_grad) = found
    assert (native - forced).abs().max() <= 1e-5
    if call.mix.terms:
        assert relative(forced_grad, native_grad) <= 1e-5
    base = logits(pair[0], SEQUENCES, Call())
    assert ((native - base).abs().max() > 0.1) == (kind != "none")  # or equality would prove nothing


def test_a_routers_gates_get_the_decoders_gradient(pair: tuple[Decoder, HfModel]) -> None:
    grads = []
    for model in pair:
        gates = torch.full((29, 2), 0.5, requires_grad=True)
        call = Call(Mix.routed(["a", "b"], gates))
        hidden = model.hidden(Packed.of(SEQUENCES), call).last
        assert hidden is not None
        model.logits(hidden, call).logsumexp(-1).sum().backward()
        grads.append(gates.grad)
    assert relative(grads[1], grads[0]) <= 1e-5


def test_dropout_depends_on_the_sequence_not_on_its_neighbours(pair: tuple[Decoder, HfModel]) -> None:
    forced = pair[1]
    for slot in bank_of(forced)["a"].slots.values():
        slot.dropout = 0.5

    def last(which: list[int]) -> Tensor:
        chosen = [SEQUENCES[i] for i in which]
        starts = [0, *torch.tensor([len(s) for s in chosen]).cumsum(0).tolist()]
        call = Call(Mix.one("a"), Noise(1, 2, tuple(which), tuple(starts)))
        with torch.no_grad():
            out = forced.hidden(Packed.of(chosen), call).last
        assert out is not None
        return out

    together, alone = last([0, 1, 2, 3]), last([2])
    assert (together[15:28] - alone).abs().max() <= 1e-5
    assert (together[15:28] - logits_free(forced)).abs().max() > 1e-2


def logits_free(model: HfModel) -> Tensor:
    with torch.no_grad():
        out = model.hidden(Packed.of([SEQUENCES[2]]), Call(Mix.one("a"))).last
    assert out is not None
    return out


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_gradient_checkpointing_recomputes_under_the_same_call(name: str) -> None:
    """The ambient call is gone when backward runs; recompute must see the one of the forward pass, dropout included."""
    model = HfModel(tiny.fresh("llama")) if name == "llama" else foreign(name)
    for adapter, seed in (("a", 1), ("b", 2)):
        attach(model, LoraSpec(r=2, init_lora_weights=False, lora_dropout=0.3), adapter, seed=seed)
    call = Call(Mix.per_sequence(["a", "b", None, "a"], STARTS), Noise(0, 0, (1, 2, 3, 4), tuple(STARTS)))
    grads = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        assert model.gradient_checkpointing == recompute
        for adapter_of in bank_of(model).adapters.values():
            adapter_of.grads.zero_()
        hidden = model.hidden(Packed.of(SEQUENCES), call).last
        assert hidden is not None
        with ambient(Call(Mix.constants({"a": 9.0, "b": 9.0}))):  # whatever is ambient in backward must not matter
            (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        grads.append(torch.cat([p.grad.reshape(-1) for p in lora_parameters(model) if p.grad is not None]))
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)
    model.gradient_checkpointing = False
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    assert AMBIENT.get() is None


def test_gradient_checkpointing_is_refused_without_layers() -> None:
    model = foreign("phi")
    model.layers = []
    with pytest.raises(ModelError, match="no list of layers"):
        model.gradient_checkpointing = True


def test_taps_and_stop_are_those_of_the_decoder(pair: tuple[Decoder, HfModel]) -> None:
    packed, call = Packed.of(SEQUENCES), Call(Mix.per_sequence(["b", None, "a", "b"], STARTS))
    with torch.no_grad():
        native, forced = (m.hidden(packed, call, taps=[0, 1], stop=1) for m in pair)
        whole = pair[1].hidden(packed, call, taps=[1])
    assert native.last is None
    assert forced.last is None
    assert whole.last is not None
    for layer in (0, 1):
        gap = (native.taps[layer] - forced.taps[layer]).abs().max()
        assert gap <= 1e-6 * max(10.0, float(forced.taps[layer].abs().max()))
    assert torch.equal(whole.taps[1], forced.taps[1])
    with pytest.raises(ModelError, match="layer 7"):
        pair[1].hidden(packed, call, taps=[7])


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
    logits(model, SEQUENCES, Call(Mix.one("default")))  # one gate for all tokens is well defined
    for call in (
        Call(Mix.per_sequence(["default", None, None, None], STARTS)),
        Call(Mix.routed(["default"], torch.ones(29, 1))),
        Call(Mix.one("default"), Noise(0, 0, (0, 1, 2, 3), tuple(STARTS))),
    ):
        with pytest.raises(ContractError, match=r"down_proj\.1\.inner: sees"):
            logits(model, SEQUENCES, call)


def test_matrices_no_adapter_can_sit_on_are_named() -> None:
    assert unreached(foreign("phi")) == []
    named = unreached(foreign("qwen3_moe"))
    assert "model.layers.0.mlp.experts.gate_up_proj" in named
    assert "model.layers.1.mlp.experts.down_proj" in named
