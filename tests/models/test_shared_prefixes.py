"""Sequences that begin alike and are run as a tree of prefixes: scores are those of transformers, of
each sequence by itself.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.adapters.adapter import AdapterOrigin
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.peft.files import save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.data.batch import BASE, TokenizedExample, collate
from lorry.data.stream.prefixes import MOST_REPEATED, lay_out_tree, split_by_tree_tokens
from lorry.errors import ContractError
from lorry.generation.scorer import ModelScorer
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.model import Decoder
from lorry.models.scoring.score import HiddenState, TokenScore, evaluate_wants, log_prob
from lorry.models.shared_prefixes import (
    hidden_sharing_prefixes,
    share_prefixes,
    split_into_passes,
)
from tests.support import tiny

LIMIT = 1e-4  # nats, in float32
WANTS = {"log_prob": TokenScore(log_prob)}


def answers_to_questions(seed: int = 0, longest: int = 90) -> list[list[int]]:
    """Three questions of one system prompt with five answers each, not in the order of a tree: one
    is the beginning of another, and one stands twice. Long and short ones, as torch's and our own
    attention take them.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(0, tiny.VOCAB, (count,), generator=generator).tolist()

    system, made = draw(11), list[list[int]]()
    for _ in range(3):
        question, answer = [*system, *draw(9)], draw(12)
        made += [[*question, *answer], [*question, *answer[:5]], [*question, *draw(3)]]
        made += [[*question, *draw(longest)], [*question, *answer]]
    return [made[n] for n in torch.randperm(len(made), generator=generator).tolist()]


def batch_of(sequences: list[list[int]]) -> object:
    return collate(
        [
            TokenizedExample(one, [0.0, *[1.0] * (len(one) - 1)], key=n, adapter=BASE)
            for n, one in enumerate(sequences)
        ]
    )


def log_probs_alone(theirs: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """[F] by transformers, each sequence alone, float64 softmax; 0 at first tokens."""
    found = []
    for one in sequences:
        ids = torch.tensor([one])
        with torch.no_grad():
            logits = theirs(input_ids=ids).logits[0, :-1].double()
        chosen = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(torch.cat([torch.zeros(1, dtype=torch.float64), chosen]))
    return torch.cat(found)


def score(ours: Decoder, sequences: list[list[int]], mix: Mix) -> torch.Tensor:
    scorer = ModelScorer(ours, mix, share_prefixes=True)
    return scorer.score([batch_of(sequences)], WANTS)[0]["log_prob"]  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox parallel"])
def test_scores_are_those_of_transformers_alone(name: str, tmp_path: Path) -> None:
    """Rotary and learned positions; a quarter of the tokens is run."""
    # learned positions end at 64
    longest = 30 if name == "gpt2" else 90
    theirs, sequences = tiny.fresh(name), answers_to_questions(longest=longest)
    ours = tiny.decoder(theirs, tmp_path)
    attach(ours, LoraSpec(), "x")
    ran: list[int] = []
    original = ours.hidden

    def watched(packed: PackedInput, call: AdapterContext, **rest: object) -> object:
        ran.append(packed.tokens.numel())
        return original(packed, call, **rest)  # type: ignore[arg-type]

    ours.hidden = watched  # type: ignore[method-assign, assignment]
    got = score(ours, sequences, Mix.none())
    expected = log_probs_alone(theirs, sequences)
    assert expected.std() > 1  # or the comparison would prove little
    assert (got - expected).abs().max() <= LIMIT
    # 11 of the system prompt; of a question 9, answers 12, 3 and long, less what two happen to share
    most = 11 + 3 * (9 + 12 + 3 + longest)
    assert len(ran) == 1
    assert most - 9 <= ran[0] <= most


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_under_adapters_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """A mix of constants over a start that is a part of the base: PEFT's sum of the two."""
    from peft import PeftModel

    theirs, sequences = tiny.fresh(name), answers_to_questions(1, longest=30)
    ours = tiny.decoder(theirs, tmp_path)
    generator = torch.Generator().manual_seed(3)
    for adapter, rank in {"start": 4, "new": 2}.items():
        attach(ours, LoraSpec(r=rank), adapter)
        with torch.no_grad():
            for master in get_bank(ours)[adapter].masters().values():
                master.copy_(torch.randn(master.shape, generator=generator) * 0.2)
        save_adapter(ours, tmp_path / adapter, adapter)
    get_bank(ours).move_to_base("start", AdapterOrigin("start", "0"))
    got = score(ours, sequences, Mix.constants({"new": 0.5}))
    wrapped = PeftModel.from_pretrained(
        copy.deepcopy(theirs), tmp_path / "start", adapter_name="start"
    )
    wrapped.load_adapter(tmp_path / "new", adapter_name="new")
    wrapped.add_weighted_adapter(["start", "new"], [1.0, 0.5], "both", combination_type="cat")
    wrapped.set_adapter("both")
    expected = log_probs_alone(wrapped.eval(), sequences)
    assert (got - expected).abs().max() <= LIMIT
    assert (got - score(ours, sequences, Mix.none())).abs().max() > 0.1


def test_bfloat16_is_as_far_as_another_batch_is(tmp_path: Path) -> None:
    """The padding of a bfloat16 batch stands behind the tree; the difference to the plain pass is
    what rounding gives, not another model's.
    """
    ours = tiny.decoder(tiny.fresh("llama"), tmp_path).to(torch.bfloat16)
    attach(ours, LoraSpec(), "x")
    sequences = answers_to_questions(2)
    shared = score(ours, sequences, Mix.none())
    exact = log_probs_alone(tiny.fresh("llama"), sequences)
    (plain,) = ModelScorer(ours).score([batch_of(sequences)], WANTS)  # type: ignore[list-item]
    far = (plain["log_prob"] - exact).abs().mean()
    assert (shared - exact).abs().mean() <= 1.5 * far + 1e-3


def test_hidden_states_and_early_stop_are_of_every_token(tmp_path: Path) -> None:
    ours = tiny.decoder(tiny.fresh("llama"), tmp_path)
    attach(ours, LoraSpec(), "x")
    batch, wants = batch_of(answers_to_questions()), {"h": HiddenState(0)}
    with torch.no_grad():
        plain = evaluate_wants(ours, batch, wants, AdapterContext())["h"]  # type: ignore[arg-type]
        shared = evaluate_wants(
            ours,
            batch,
            wants,
            AdapterContext(),
            share_prefixes=True,  # type: ignore[arg-type]
        )["h"]
    assert shared.shape == plain.shape
    assert (shared - plain).abs().max() <= LIMIT


def test_what_need_not_be_alike_is_run_apart(tmp_path: Path) -> None:
    """A mix by sequence gives equal tokens different states; gradients have no way through a tree."""
    ours = tiny.decoder(tiny.fresh("llama"), tmp_path)
    attach(ours, LoraSpec(r=2), "x")
    bank = get_bank(ours)
    with torch.no_grad():
        for master in bank["x"].masters().values():
            master.fill_(0.1)
    packed = PackedInput.of([[1, 2, 3, 4], [1, 2, 3, 4]])
    mix = Mix.per_sequence(["x", None], [0, 4, 8])
    with torch.no_grad():
        last = hidden_sharing_prefixes(ours, packed, AdapterContext(mix)).last
        assert last is not None
        alone = ours.hidden(PackedInput.of([[1, 2, 3, 4]]), AdapterContext(Mix.none())).last
        assert (last[4:] - alone).abs().max() <= LIMIT
        assert (last[:4] - alone).abs().max() > 0.01
    tree = share_prefixes(packed)
    with pytest.raises(ContractError, match="scored, not trained on"):
        ours.hidden(tree, AdapterContext(Mix.one("x")))
    states = hidden_sharing_prefixes(ours, packed, AdapterContext(Mix.one("x")))
    assert states.last is not None
    assert states.last.requires_grad
    assert states.last.shape[0] == 8


def test_a_model_that_cannot_share_gets_plain_passes(tmp_path: Path) -> None:
    """Groups of such a model are bounded by all of their tokens: it runs them all."""
    ours = tiny.decoder(tiny.fresh("llama"), tmp_path)
    sequences = [[1, 2, 3, n] for n in range(6)]
    assert [len(group) for group in split_into_passes(ours, Mix.none(), sequences, 9)] == [6]
    by_sequence = Mix.per_sequence(["x", None], [0, 4, 8])
    groups = split_into_passes(ours, by_sequence, sequences, 9)
    assert [len(group) for group in groups] == [2, 2, 2]
    ours.shares_prefixes = False
    assert [len(group) for group in split_into_passes(ours, Mix.none(), sequences, 9)] == [2, 2, 2]
    packed = PackedInput.of(sequences)
    with torch.no_grad():
        assert hidden_sharing_prefixes(ours, packed, AdapterContext()).last is not None


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@settings(max_examples=50)
@given(st.lists(TOKENS, min_size=1, max_size=8))
def test_a_tree_holds_every_prefix_once(sequences: list[list[int]]) -> None:
    tree = lay_out_tree(sequences)
    prefixes = {tuple(one[:n]) for one in sequences for n in range(1, len(one) + 1)}
    assert len(tree.tokens) == len(tree.positions) == len(prefixes)
    ends = [0]
    for one in sequences:
        ends.append(ends[-1] + len(one))
    for one, (start, stop) in zip(sequences, pairwise(ends), strict=True):
        places = tree.places[start:stop]
        assert [tree.tokens[place] for place in places] == one
        assert [tree.positions[place] for place in places] == list(range(len(one)))
    # a place is one prefix and no other
    by_place: dict[int, tuple[int, ...]] = {}
    for one, start in zip(sequences, ends[:-1], strict=True):
        for n in range(len(one)):
            prefix = tuple(one[: n + 1])
            assert by_place.setdefault(tree.places[start + n], prefix) == prefix


@settings(max_examples=50)
@given(st.lists(TOKENS, max_size=12), st.integers(1, 12))
def test_groups_hold_everything_once_and_no_more_than_they_may(
    sequences: list[list[int]], most: int
) -> None:
    groups = list(split_by_tree_tokens(sequences, most))
    assert sorted(n for group in groups for n in group) == list(range(len(sequences)))
    for group in groups:
        parts = [sequences[n] for n in group]
        assert len(group) == 1 or len(lay_out_tree(parts).tokens) <= most
        assert len(group) == 1 or sum(map(len, parts)) <= MOST_REPEATED * most
