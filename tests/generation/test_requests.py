"""Requests of different parameters and adapters, arriving whenever they like: each is answered as if
it were alone, and as transformers answers it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError, DataError, ModelError, NonFiniteError
from lorry.generation.engine import GenerationEngine, generate_completions, stream_tokens
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams, choose_tokens, row_generator
from lorry.generation.scorer import ModelScorer
from lorry.kernels import decode as kernel
from lorry.kernels import kernel_status, load_library
from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401 - an autouse fixture
from tests.support.twins import native

WAYS = ("kernels", "torch", "transformers", "recompute")


@dataclass(frozen=True)
class Asked:
    """A request before it is made."""

    prompt: list[int]
    params: SamplingParams
    adapter: Mix | str | None = None


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The native decoder with the C++ kernels and without, and transformers' code with its cache
    and without."""
    if request.param != "kernels":
        monkeypatch.setattr(kernel, "supports_decode", lambda dtype, device: False)
    elif load_library() is None:
        pytest.skip(f"kernels: {kernel_status().reason}")
    return str(request.param)


def opened(way: str) -> Decoder | HfModel:
    """A random float32 model of the way, with two adapters that matter."""
    theirs = tiny.random_model(tiny.LLAMA).float()
    model = native(theirs) if way in ("kernels", "torch") else HfModel(theirs)
    if way == "recompute":
        assert isinstance(model, HfModel)
        model.recompute_reason = "a test asks for it"
    for seed, name in enumerate(("a", "b")):
        attach(model, LoraSpec(r=3, lora_alpha=24, init_lora_weights=False), name, seed=seed)
        with torch.no_grad():
            get_bank(model)[name].values.mul_(3)
        get_bank(model)[name].touch()
    return model


PROMPTS = [[5, 9, 2, 24], [7], [12, 13, 14, 15, 16, 17, 18, 19], [3, 3], [20, 21, 8], [9, 9, 10]]
GREEDY = SamplingParams(max_new_tokens=9)
# of every setting at least two values, of every adapter at least one request
MIXED = [
    Asked(PROMPTS[0], GREEDY, "a"),
    Asked(PROMPTS[1], SamplingParams(max_new_tokens=14, temperature=1.2, seed=4, logprobs=True)),
    Asked(PROMPTS[2], SamplingParams(max_new_tokens=6, temperature=0.8, top_p=0.9, seed=4), "b"),
    Asked(PROMPTS[3], SamplingParams(max_new_tokens=11, repetition_penalty=1.4), "b"),
    Asked(PROMPTS[4], GREEDY, Mix.constants({"a": 0.5, "b": -0.7})),
    Asked(PROMPTS[5], SamplingParams(max_new_tokens=10, temperature=1.5, top_k=5), "a"),
]


def answered_alone(model: Decoder | HfModel, asked: Asked, row: int) -> Completion:
    """By an engine that has nothing else."""
    engine = GenerationEngine(model)
    engine.add_request(asked.prompt, asked.params, adapter=asked.adapter, row=row)
    while engine.has_unfinished_requests():
        for output in engine.step():
            return output.completion
    raise AssertionError("nothing came back")


def answered_together(
    model: Decoder | HfModel, asked: Sequence[Asked], arrivals: Sequence[int], batch_rows: int
) -> list[Completion]:
    """By one engine; request i arrives before step ``arrivals[i]``."""
    engine, found = GenerationEngine(model, batch_rows=batch_rows), dict[int, Completion]()
    numbers: dict[int, int] = {}
    for at in range(1000):
        for row, one in enumerate(asked):
            if arrivals[row] == at:
                number = engine.add_request(one.prompt, one.params, adapter=one.adapter, row=row)
                numbers[number] = row
        for output in engine.step():
            assert output.request_id not in engine.requests
            found[numbers[output.request_id]] = output.completion
        assert len(engine.running) <= batch_rows
        if at >= max(arrivals) and not engine.has_unfinished_requests():
            break
    assert engine.cache is None
    return [found[row] for row in range(len(asked))]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    """The same tokens and reasons; log-probabilities to the rounding of differently shaped
    products."""
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        assert (one.logprobs is None) == (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


# --- against transformers


def greedy(inner: Any, prompt: Sequence[int], count: int, ends: Sequence[int] = ()) -> list[int]:
    """transformers' own generate for one prompt."""
    ids = torch.tensor([list(prompt)])
    made = inner.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
    )
    return [int(token) for token in made[0, len(prompt) :]]


def staggered(engine: GenerationEngine, asked: Sequence[Asked]) -> dict[int, Completion]:
    """Two requests at once, then one more before every other step."""
    left, found, at = list(asked), dict[int, Completion](), 0
    while left or engine.has_unfinished_requests():
        for _ in range(2 if at == 0 else at % 2):
            if left:
                one = left.pop(0)
                engine.add_request(one.prompt, one.params, adapter=one.adapter)
        found |= {output.request_id: output.completion for output in engine.step()}
        at += 1
    return found


def test_late_requests_say_what_transformers_says(way: str) -> None:
    """Of every length and number of new tokens, with stop tokens; rows come, leave and are given
    away."""
    inner = tiny.random_model(tiny.LLAMA).float()
    model = native(inner) if way in ("kernels", "torch") else HfModel(inner)
    if way == "recompute":
        assert isinstance(model, HfModel)
        model.recompute_reason = "a test asks for it"
    free = [greedy(inner, prompt, 12) for prompt in PROMPTS]
    ends = [[], [free[1][3]], [], [free[3][7]], [free[4][0]], []]
    asked = [
        Asked(prompt, SamplingParams(max_new_tokens=count, stop_token_ids=stops))
        for prompt, count, stops in zip(PROMPTS, (12, 12, 1, 12, 12, 5), ends, strict=True)
    ]
    expected = [
        greedy(inner, one.prompt, one.params.max_new_tokens, sorted(one.params.stop_token_ids))
        for one in asked
    ]
    for rows in (2, 64):
        found = staggered(GenerationEngine(model, batch_rows=rows), asked)
        for number, one in enumerate(asked):
            assert found[number].tokens == expected[number]
            stopped = expected[number][-1] in one.params.stop_token_ids
            assert found[number].finish_reason == ("stop" if stopped else "length")


def test_late_requests_tell_transformers_stories(stories: Path) -> None:
    inner = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    prompts = [[1, 403, 407], [1], [1, 261, 388, 403, 300, 271], [1, 317]]
    asked = [
        Asked(prompt, SamplingParams(max_new_tokens=count))
        for prompt, count in zip(prompts, (40, 12, 25, 33), strict=True)
    ]
    found = staggered(GenerationEngine(native(inner), batch_rows=3), asked)
    for number, one in enumerate(asked):
        expected = greedy(inner, one.prompt, one.params.max_new_tokens)
        assert found[number] == Completion(expected, "length")


# --- each as if it were alone


def test_every_request_has_its_own_parameters_and_adapters(way: str) -> None:
    model = opened(way)
    alone = [answered_alone(model, one, row) for row, one in enumerate(MIXED)]
    assert_same(answered_together(model, MIXED, [0] * 6, 64), alone)
    assert_same(answered_together(model, MIXED, [0, 3, 1, 7, 0, 2], 2), alone)
    assert_same(
        generate_completions(
            model,
            [one.prompt for one in MIXED],
            [one.params for one in MIXED],
            adapters=[one.adapter for one in MIXED],
        ),
        alone,
    )
    # and none is what the base would have said
    for row in (0, 2, 3, 4, 5):
        assert alone[row] != answered_alone(model, replace(MIXED[row], adapter=None), row)


def test_a_mix_of_several_is_the_plain_forward_of_that_mix(way: str) -> None:
    """Beside requests of other mixes, in float32, without a cache."""
    model, mix = opened(way), Mix.constants({"a": 0.5, "b": -0.7})
    made = generate_completions(model, PROMPTS[:3], GREEDY, adapters=["a", mix, None])
    for prompt, adapter, one in zip(PROMPTS, ("a", mix, None), made, strict=False):
        get_bank(model).activate(
            Mix() if adapter is None else Mix.one(adapter) if isinstance(adapter, str) else adapter
        )
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one.tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == one.tokens


HYPOTHESIS_MODELS: dict[str, tuple[Decoder | HfModel, list[Completion]]] = {}


@pytest.mark.parametrize("kind", ["torch", "transformers"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_no_order_of_arrival_changes_an_answer(kind: str, data: st.DataObject) -> None:
    if kind not in HYPOTHESIS_MODELS:
        model = opened(kind)
        HYPOTHESIS_MODELS[kind] = (
            model,
            [answered_alone(model, one, row) for row, one in enumerate(MIXED)],
        )
    model, alone = HYPOTHESIS_MODELS[kind]
    arrivals = data.draw(st.lists(st.integers(0, 12), min_size=6, max_size=6))
    rows = data.draw(st.integers(1, 6))
    assert_same(answered_together(model, MIXED, arrivals, rows), alone)


def test_a_row_names_the_draws_whatever_the_id() -> None:
    model, params = opened("torch"), SamplingParams(max_new_tokens=8, temperature=1.5, seed=2)
    listed = generate_completions(model, [PROMPTS[0]] * 3, params, adapters=Mix.none())
    assert len({tuple(one.tokens) for one in listed}) == 3  # the place in the list is the row
    engine = GenerationEngine(model)
    for row in (2, 0, 1, None):
        engine.add_request(PROMPTS[0], params, row=row)
    found = dict[int, Completion]()
    while engine.has_unfinished_requests():
        found |= {output.request_id: output.completion for output in engine.step()}
    assert [found[i].tokens for i in range(3)] == [listed[row].tokens for row in (2, 0, 1)]
    assert found[3].tokens not in [one.tokens for one in listed]  # its row is its id, 3


def test_a_flat_neighbour_changes_no_draw() -> None:
    """Its nucleus is beyond the shortlist, so that it is sorted whole; equal scores, of which
    bfloat16 logits are full, are then in another order than a shortlist's."""
    torch.manual_seed(0)
    params = SamplingParams(temperature=1.0, top_p=0.8)
    peaked = (2 * torch.randn(100, 5000)).bfloat16().float()
    flat = 0.01 * torch.randn(1, 5000)
    for row in range(100):
        (alone,), _ = params.choose(peaked[row : row + 1], [()], [(row + 0.5) / 100])
        together, _ = params.choose(
            torch.cat([peaked[row : row + 1], flat]), [(), ()], [(row + 0.5) / 100, 0.3]
        )
        assert int(together[0]) == int(alone)


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.9}, {"top_k": 60, "top_p": 0.9}, {}])
def test_a_row_that_is_no_number_is_told_and_its_neighbour_drawn(cut: dict[str, Any]) -> None:
    logits = torch.tensor([[0.0, 9, 0, 0], [float("nan")] * 4])
    params = SamplingParams(temperature=1.0, **cut)
    tokens, finite = params.choose(logits, [(), ()], [0.5, 0.5])
    assert (int(tokens[0]), finite.tolist()) == (1, [True, False])


@pytest.mark.parametrize("flat_neighbour", [False, True])
def test_rows_of_different_parameters_draw_their_own_numbers(flat_neighbour: bool) -> None:
    """Against one row at a time."""
    torch.manual_seed(0)
    logits = (
        torch.randn(5, 3000)
        * torch.tensor([4.0, 0.01 if flat_neighbour else 4.0, 2, 6, 3])[:, None]
    )
    params = [
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(),
        SamplingParams(temperature=2.0, top_k=3),
        SamplingParams(temperature=0.5, repetition_penalty=1.7),
    ]
    seen = [[], [], [1], [], logits[4].topk(3).indices.tolist()]
    tokens, finite = choose_tokens(logits, params, seen, [row_generator(1, r) for r in range(5)])
    assert finite.all()
    for row in range(5):
        one, _ = choose_tokens(
            logits[row : row + 1],
            params[row : row + 1],
            seen[row : row + 1],
            [row_generator(1, row)],
        )
        assert int(one[0]) == int(tokens[row])


# --- how an answer ends


def test_finish_reasons() -> None:
    model = opened("torch")
    free = answered_alone(model, Asked(PROMPTS[0], GREEDY), 0)
    assert (free.finish_reason, len(free.tokens)) == ("length", 9)
    last = free.tokens[-1]
    first = free.tokens.index(last)

    def ended(**settings: Any) -> Completion:
        return answered_alone(model, Asked(PROMPTS[0], replace(GREEDY, **settings)), 0)

    assert ended(stop_token_ids=[last]) == Completion(free.tokens[: first + 1], "stop")
    assert ended(stop=[free.tokens[2:4]]) == Completion(free.tokens[:4], "stop")
    # with its last possible token it has still stopped by itself
    assert ended(max_new_tokens=4, stop=[free.tokens[2:4]]).finish_reason == "stop"
    assert ended(max_new_tokens=3, stop=[free.tokens[2:4]]).finish_reason == "length"
    engine = GenerationEngine(model)
    engine.add_request(PROMPTS[0], GREEDY, stopping_criterion=lambda tokens: len(tokens) == 5)
    engine.add_request(PROMPTS[1], GREEDY)
    found = dict[int, Completion]()
    while engine.has_unfinished_requests():
        found |= {output.request_id: output.completion for output in engine.step()}
    assert found[0] == Completion(free.tokens[:5], "stop")
    assert found[1].finish_reason == "length"


def test_a_mix_that_keeps_coming_overtakes_nobody() -> None:
    """Requests of one mix run side by side only among those that came together."""
    engine = GenerationEngine(opened("torch"), batch_rows=1)
    two = SamplingParams(max_new_tokens=2)
    first = [engine.add_request([5], two, adapter=name) for name in ("a", "b", "a")]
    finished = [output.request_id for _ in range(2) for output in engine.step()]
    later = [engine.add_request([5], two, adapter="a") for _ in range(2)]
    while engine.has_unfinished_requests():
        finished += [output.request_id for output in engine.step()]
    assert finished == [first[0], first[2], first[1], *later]


# --- what changes between requests


def test_an_idle_engine_answers_with_the_adapter_as_it_is_now(way: str) -> None:
    model = opened(way)
    engine = GenerationEngine(model)

    def answer() -> list[int]:
        engine.add_request(PROMPTS[0], GREEDY, adapter="a", row=0)
        while engine.has_unfinished_requests():
            for output in engine.step():
                return output.completion.tokens
        raise AssertionError

    before = answer()
    with torch.no_grad():
        get_bank(model)["a"].values.mul_(-2)
    get_bank(model)["a"].touch()
    assert answer() == answered_alone(model, Asked(PROMPTS[0], GREEDY, "a"), 0).tokens != before


def test_a_scorer_generates_under_its_own_mix() -> None:
    model = opened("torch")
    get_bank(model).activate(Mix.one("b"))
    expected = {
        name: generate_completions(model, PROMPTS[:2], GREEDY, adapters=mix)
        for name, mix in (("a", "a"), ("base", Mix.none()), ("b", None))
    }
    assert ModelScorer(model, Mix.one("a")).generate(PROMPTS[:2], GREEDY) == expected["a"]
    assert ModelScorer(model).generate(PROMPTS[:2], GREEDY) == expected["base"]
    asked = ModelScorer(model).generate(PROMPTS[:2], GREEDY, adapters="b")
    assert asked == expected["b"] != expected["base"] != expected["a"]


# --- mistakes


def test_a_request_that_cannot_be_is_refused_and_the_others_go_on() -> None:
    model = opened("torch")
    engine = GenerationEngine(model)
    assert engine.add_request(PROMPTS[0], GREEDY) == 0
    engine.step()
    with pytest.raises(DataError, match="prompt 1 is empty"):
        engine.add_request([], GREEDY)
    with pytest.raises(ModelError, match="shorten the prompt"):
        engine.add_request([5] * model.context, GREEDY)
    with pytest.raises(ConfigError, match="no adapter named 'nobody'"):
        engine.add_request([5], GREEDY, adapter="nobody")
    with pytest.raises(ConfigError, match="tokens of one batch"):
        engine.add_request([5], GREEDY, adapter=Mix.routed(["a"], torch.ones(1, 1)))
    found = [output for _ in range(8) for output in engine.step()]
    assert [output.request_id for output in found] == [0]
    assert found[0].completion == answered_alone(model, Asked(PROMPTS[0], GREEDY), 0)
    assert engine.step() == []


def test_parameters_for_other_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="params has 2 entries for 1 prompts"):
        generate_completions(opened("torch"), [[3]], [GREEDY] * 2)


def test_after_a_failed_step_nothing_more_is_said() -> None:
    """Its cache is ahead of its requests: what came next would be wrong without a word."""
    model = opened("torch")
    engine = GenerationEngine(model)
    engine.add_request(PROMPTS[0], GREEDY)
    engine.add_request(PROMPTS[1], GREEDY, adapter="a")
    engine.step()
    engine.step()
    with torch.no_grad():
        get_bank(model)["a"].values.fill_(float("nan"))
    get_bank(model)["a"].touch()
    with pytest.raises(NonFiniteError, match=r"prompt 1 \(1 in all\) are not finite after 2 new"):
        engine.step()
    with pytest.raises(ModelError, match="create a new GenerationEngine"):
        engine.step()


def test_a_late_row_that_is_not_finite_is_told_by_its_own_tokens() -> None:
    model = opened("torch")
    with torch.no_grad():
        get_bank(model)["b"].values.fill_(float("nan"))
    get_bank(model)["b"].touch()
    engine = GenerationEngine(model)
    engine.add_request(PROMPTS[0], GREEDY)
    for _ in range(3):
        engine.step()
    engine.add_request(PROMPTS[1], GREEDY, adapter="b")
    with pytest.raises(NonFiniteError, match=r"prompt 1 \(1 in all\) are not finite after 0 new"):
        engine.step()


def test_streaming_under_interruption_leaves_the_model_usable() -> None:
    model = opened("torch")
    pieces = stream_tokens(model, PROMPTS[0], GREEDY, adapter="a")
    begun = [next(pieces), next(pieces)]
    assert isinstance(pieces, Iterator)
    whole = answered_alone(model, Asked(PROMPTS[0], GREEDY, "a"), 0).tokens
    assert begun == whole[:2]
    assert [*begun, *pieces] == whole
