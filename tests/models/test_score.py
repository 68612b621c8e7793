"""Scores against float64 autograd over full logits: values, gradients, skipped rows, adapted heads,
hidden states.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.spec import LoraSpec
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.families import find_family
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.model import Decoder
from lorry.models.scoring import score
from lorry.models.scoring.score import (
    HiddenState,
    TokenScore,
    correct,
    entropy,
    evaluate_wants,
    log_prob,
)

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def tiny(dtype: torch.dtype = torch.float32) -> Decoder:
    family = find_family("llama")
    assert family is not None
    model = Decoder(family, CONFIG).to(dtype)
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=draw) * 0.2 + (1.0 if p.dim() == 1 else 0.0))
    return model


def rows(lengths: list[int], seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for i, n in enumerate(lengths):
        weights = (torch.rand(n, generator=draw) < 0.6).float()
        weights[0] = 0
        examples.append(
            TokenizedExample(
                torch.randint(0, 61, (n,), generator=draw).tolist(), weights.tolist(), key=i
            )
        )
    return collate(examples)


def full_logits(model: Decoder, batch: Batch, call: AdapterContext) -> torch.Tensor:
    packed = PackedInput(batch.tokens, batch.positions, batch.segments)
    return model.logits(model.hidden(packed, call).last, call)


def soft_cross_entropy(logits: torch.Tensor, rows: score.VocabRows) -> torch.Tensor:
    return -(rows.extra["teacher"].to(logits.dtype) * logits.log_softmax(-1)).sum(-1)


FNS = {"log_prob": log_prob, "entropy": entropy, "soft_ce": soft_cross_entropy}


@pytest.mark.parametrize(
    "names", [["log_prob"], ["log_prob", "entropy"], ["log_prob", "entropy", "soft_ce"]]
)
@pytest.mark.parametrize("head", [False, True])
def test_scores_and_gradients_equal_autograd_over_full_logits(
    names: list[str], head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunked forms (one pass, or recompute from three scores and for an adapted head) against
    plain logits in float64.
    """
    monkeypatch.setattr(score, "CHUNK_TOKENS", 5)
    model = tiny(torch.float64)
    targets = ("q_proj", "down_proj", "lm_head") if head else ("q_proj", "down_proj")
    attach(model, LoraSpec(r=3, target_modules=targets, init_lora_weights=False))
    batch = rows([9, 4, 7])
    teacher = torch.rand(
        batch.tokens.numel(), 61, generator=torch.Generator().manual_seed(1)
    ).softmax(-1)
    batch = batch.with_extra(teacher=BatchExtra(teacher, "token"))
    call, bank = AdapterContext(Mix.one("default")), get_bank(model)["default"]
    factors = torch.randn(
        len(names), batch.tokens.numel(), generator=torch.Generator().manual_seed(2)
    ).double()

    got = evaluate_wants(model, batch, {n: TokenScore(FNS[n]) for n in names}, call)
    sum(
        (torch.tanh(0.2 * got[n]) * f).sum() for n, f in zip(names, factors, strict=True)
    ).backward()
    ours = bank.grads.clone()
    bank.grads.zero_()

    logits = full_logits(model, batch, call)[batch.rows - 1]
    table = score.VocabRows(batch.tokens[batch.rows], {"teacher": teacher[batch.rows]})
    total = torch.zeros((), dtype=torch.float64)
    for n, f in zip(names, factors, strict=True):
        plain = FNS[n](logits, table)
        assert torch.allclose(got[n][batch.rows].double(), plain, atol=1e-6)
        total = total + (torch.tanh(0.2 * plain) * f[batch.rows]).sum()
    total.backward()
    assert ours.abs().max() > 1e-2
    assert (ours - bank.grads).abs().max() < 2e-6 * bank.grads.abs().max()


def test_unsupervised_rows_never_reach_the_head() -> None:
    """A NaN in the hidden state of an unsupervised position must not show."""
    model, batch = tiny(), rows([8])
    hidden = torch.randn(8, 32)
    skipped = [t for t in range(8) if t + 1 not in batch.rows.tolist()]
    hidden[skipped] = float("nan")
    table = score.score_supervised_tokens(model, hidden, batch, [log_prob], AdapterContext())
    assert len(table) == len(batch.rows)
    assert torch.isfinite(table).all()


def test_shifting_the_targets_by_one_is_seen() -> None:
    """The comparison can fail: scoring token t with the logits at t instead of t-1 gives other
    values.
    """
    model, batch = tiny(), rows([12])
    got = evaluate_wants(model, batch, {"logprob": TokenScore(log_prob)}, AdapterContext())[
        "logprob"
    ]
    logits = full_logits(model, batch, AdapterContext()).log_softmax(-1)
    shifted = logits[batch.rows, batch.tokens[batch.rows]]
    right = logits[batch.rows - 1, batch.tokens[batch.rows]]
    assert torch.allclose(got[batch.rows], right, atol=1e-5)
    assert (got[batch.rows] - shifted).abs().max() > 0.1


def test_a_row_without_supervision_gives_zeros_and_no_gradient() -> None:
    model = tiny()
    attach(model, LoraSpec(r=2))
    batch = collate([TokenizedExample([1, 2, 3], [0.0, 0.0, 0.0])])
    got = evaluate_wants(
        model, batch, {"logprob": TokenScore(log_prob)}, AdapterContext(Mix.one("default"))
    )["logprob"]
    assert got.tolist() == [0, 0, 0]


def test_hidden_states_stop_the_pass_and_equal_the_full_one() -> None:
    model, batch = tiny(), rows([5, 6])
    packed = PackedInput(batch.tokens, batch.positions, batch.segments)
    wanted = model.hidden(packed, AdapterContext(), output_layers=[0, 1]).layer_outputs
    got = evaluate_wants(model, batch, {"early": HiddenState(0)}, AdapterContext())
    assert list(got) == ["early"]
    assert torch.equal(got["early"], wanted[0])
    called = []
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(
        lambda *a: called.append(1)
    )
    evaluate_wants(model, batch, {"early": HiddenState(0)}, AdapterContext())
    assert not called


def test_accuracy_counts_the_argmax() -> None:
    logits = F.one_hot(torch.tensor([3, 1, 2]), 5).float()
    assert correct(logits, score.VocabRows(torch.tensor([3, 0, 2]), {})).tolist() == [1, 0, 1]


def test_mixes_and_dropout_narrow_to_the_rows_the_head_sees() -> None:
    """An adapted head under a per-sequence mix with dropout: the same as applying it to all tokens
    and picking rows.
    """
    model = tiny(torch.float64)
    for name in ("a", "b"):
        attach(
            model,
            LoraSpec(r=2, target_modules=("lm_head",), init_lora_weights=False, lora_dropout=0.5),
            name,
            seed=ord(name),
        )
    batch = rows([6, 5, 8, 4])
    starts = batch.starts.tolist()
    noise = DropoutNoise(0, 3, tuple(batch.key.tolist()), tuple(starts))
    call = AdapterContext(Mix.per_sequence(["a", None, "b", "a"], starts), noise)
    got = evaluate_wants(model, batch, {"logprob": TokenScore(log_prob)}, call)["logprob"]
    wide = full_logits(model, batch, call).log_softmax(-1)
    expected = wide[batch.rows - 1, batch.tokens[batch.rows]]
    assert torch.allclose(got[batch.rows].double(), expected, atol=1e-6)
    base = evaluate_wants(model, batch, {"logprob": TokenScore(log_prob)}, AdapterContext())[
        "logprob"
    ]
    second = slice(starts[1], starts[2])
    assert torch.equal(got[second], base[second])
    assert (got - base).abs().max() > 1e-3
