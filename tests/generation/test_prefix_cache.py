"""A prefix that earlier requests have computed is gone on from: every answer is transformers' own, only what
is new is run, and nothing is shared where a mix or a weight differs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.spec import LoraSpec
from lorry.generation.engine import GenerationEngine, generate_completions, stream_tokens
from lorry.generation.prefix_cache import PrefixCache
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import CausalLM
from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401 - an autouse fixture
from tests.support.twins import native

NEW, CALL = 6, (11, 12)
FIRST = [5, 9, 2, 24, 7, 13, 3, 3]


class Talk:
    """A model with a plain adapter `a` and `called`, which tokens invoke; the same in transformers' code,
    float64; and how many prompt tokens were run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any] = tiny.LLAMA):
        theirs = tiny.random_model(config).float()
        self.model = native(theirs)
        for seed, name in enumerate(("a", "called")):
            tokens = CALL if name == "called" else None
            spec = LoraSpec(
                r=3, lora_alpha=24, init_lora_weights=False, alora_invocation_tokens=tokens
            )
            attach(self.model, spec, name, seed=seed)
            with torch.no_grad():
                get_bank(self.model)[name].values.mul_(3)
            get_bank(self.model)[name].touch()
        self.theirs = theirs.double().eval()
        self.prefixes = PrefixCache(self.model)
        self.ran = list[int]()
        plain = Decoder.forward_cached

        def counted(model: Any, packed: Any, *args: Any, decoding: bool, **options: Any) -> Any:
            if not decoding:
                self.ran.append(packed.tokens.numel())
            return plain(model, packed, *args, decoding=decoding, **options)

        monkeypatch.setattr(Decoder, "forward_cached", counted)

    def say(self, prompt: Sequence[int], adapter: str | None = None) -> list[int]:
        """The answer to a prompt; `ran` has how many of its tokens were run."""
        self.ran.clear()
        mix = Mix.none() if adapter is None else adapter
        params = SamplingParams(max_new_tokens=NEW)
        return list(
            stream_tokens(self.model, prompt, params, adapter=mix, prefix_cache=self.prefixes)
        )

    def truth(self, prompt: Sequence[int], adapter: str | None = None) -> list[int]:
        """By transformers in float64, from the whole prompt: what is before the last `CALL` is read by the
        base, what is behind by weights with the adapter in them."""
        at = 0
        if adapter == "called":
            places = [n for n in range(len(prompt)) if tuple(prompt[n : n + 2]) == CALL]
            at = places[-1] if places else len(prompt)
        elif adapter is None:
            at = len(prompt)
        adapted = self.merged(adapter) if at < len(prompt) else self.theirs
        cache, made = None, list[int]()
        with torch.no_grad():
            if 0 < at < len(prompt):
                cache = self.theirs(torch.tensor([list(prompt[:at])]), use_cache=True)
                cache = cache.past_key_values
            rest = list(prompt) if cache is None else list(prompt[at:])
            while len(made) < NEW:
                out = adapted(torch.tensor([rest]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                rest = [int(out.logits[0, -1].argmax())]
                made += rest
        return made

    def merged(self, adapter: str | None) -> Any:
        """transformers' model with the adapter's product in its weights."""
        assert adapter is not None
        model = copy.deepcopy(self.theirs)
        for path, slot in get_bank(self.model)[adapter].slots.items():
            delta = slot.scale * slot.B.detach().double() @ slot.A.detach().double()
            with torch.no_grad():
                model.get_parameter(f"{path}.weight").add_(delta)
        return model


@pytest.fixture
def talk(way: str, monkeypatch: pytest.MonkeyPatch) -> Talk:
    return Talk(monkeypatch)


@pytest.mark.parametrize("adapter", [None, "a"])
def test_turns_go_on_from_one_another(talk: Talk, adapter: str | None) -> None:
    prompt = FIRST
    for turn in range(4):
        answer = talk.say(prompt, adapter)
        assert answer == talk.truth(prompt, adapter)
        # what was chosen last has not been read
        assert talk.ran == [len(prompt) if turn == 0 else 1 + 3]
        assert len(talk.prefixes.prefixes) == 1
        prompt = [*prompt, *answer, 17, 4 + turn, 21]


def test_the_same_prompt_again_runs_its_last_token(talk: Talk) -> None:
    assert talk.say(FIRST) == talk.say(FIRST) == talk.truth(FIRST)
    assert talk.ran == [1]


def test_learned_positions(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(monkeypatch, tiny.NEOX)
    answer = talk.say(FIRST)
    assert answer == talk.truth(FIRST)
    again = [*FIRST, *answer, 8]
    assert talk.say(again) == talk.truth(again)
    assert talk.ran == [2]


def test_another_adapter_shares_nothing(talk: Talk) -> None:
    talk.say(FIRST)
    prompt = [*FIRST, 4]
    assert talk.say(prompt, "a") == talk.truth(prompt, "a")
    assert talk.ran == [len(prompt)]
    assert talk.say(prompt) == talk.truth(prompt)
    assert talk.ran == [1]


def test_an_adapter_that_is_invoked_shares_what_is_before_it(talk: Talk) -> None:
    talk.say(FIRST)
    called = [*FIRST, *CALL, 6]
    answer = talk.say(called, "called")
    assert answer == talk.truth(called, "called") != talk.truth(called)
    assert talk.ran == [1 + len(called) - len(FIRST) - 1]
    # invoked anew, its own answer is the base's to read, and all before its first call is shared
    again = [*called, *answer, 9, *CALL, 6]
    assert talk.say(again, "called") == talk.truth(again, "called")
    assert talk.ran == [len(again) - len(FIRST)]
    # the base goes on from there
    base = [*again[:-3], 8]
    assert talk.say(base) == talk.truth(base)
    assert talk.ran == [1]
    # not invoked, it is the base
    assert talk.say([*FIRST, 3], "called") == talk.truth([*FIRST, 3])
    assert talk.ran == [1]


@pytest.mark.parametrize("what", ["adapter", "base", "removed"])
def test_what_other_weights_made_is_forgotten(talk: Talk, what: str) -> None:
    talk.say(FIRST, "a")
    bank = get_bank(talk.model)
    with torch.no_grad():
        if what == "base":
            talk.model.get_parameter("model.layers.0.self_attn.k_proj.weight").mul_(-1)
            talk.theirs.get_parameter("model.layers.0.self_attn.k_proj.weight").mul_(-1)
        elif what == "adapter":
            bank["a"].values.mul_(-1)
        else:
            bank.remove("a")
            attach(talk.model, LoraSpec(r=3, init_lora_weights=False), "a", seed=5)
    prompt = [*FIRST, 4]
    assert talk.say(prompt, "a") == talk.truth(prompt, "a")
    assert talk.ran == [len(prompt)]
    assert len(talk.prefixes.prefixes) == 1


def test_so_many_tokens_are_kept_and_the_last_used_ones(talk: Talk) -> None:
    one, two, three = ([n, *FIRST[1:]] for n in (1, 2, 4))
    # of which the beginning alone is shared
    part = [*one[:4], 25]
    talk.prefixes.max_tokens = 2 * (len(FIRST) + NEW - 1) + len(part) + NEW - 1
    for prompt in (one, two, part, three):
        talk.say(prompt)
        assert talk.prefixes.tokens <= talk.prefixes.max_tokens
    assert talk.say(one) == talk.truth(one)
    assert talk.ran == [1]
    assert talk.say(two) == talk.truth(two)
    assert talk.ran == [len(two)]
    # a request of more of them is kept up to there
    talk.prefixes.clear()
    talk.prefixes.max_tokens = 5
    talk.say(FIRST)
    assert talk.prefixes.tokens == 5
    assert talk.prefixes.prefixes[0].keys_values.shape[3] == 5
    assert talk.say(FIRST) == talk.truth(FIRST)
    assert talk.ran == [len(FIRST) - 5]


def test_an_answer_that_is_not_read_to_its_end_is_kept_so_far(talk: Talk) -> None:
    params = SamplingParams(max_new_tokens=NEW)
    pieces = stream_tokens(talk.model, FIRST, params, prefix_cache=talk.prefixes, adapter=Mix())
    heard = [next(pieces), next(pieces)]
    pieces.close()  # type: ignore[attr-defined]
    prompt = [*FIRST, *heard, 20]
    assert talk.say(prompt) == talk.truth(prompt)
    assert talk.ran == [2]


def test_requests_with_and_without_a_prefix_share_a_pass(talk: Talk) -> None:
    answer = talk.say(FIRST, "a")
    asked: list[tuple[list[int], str | None]] = [
        ([3, 4, 5], "a"),
        ([*FIRST, *answer, 5], "a"),
        (FIRST, None),
        ([*FIRST, *CALL, 6], "called"),
        ([*FIRST[:4], 19], "a"),
    ]
    engine = GenerationEngine(talk.model, prefix_cache=talk.prefixes, batch_rows=4)
    numbers = {
        engine.add_request(
            prompt, SamplingParams(max_new_tokens=NEW), adapter=Mix() if name is None else name
        ): (prompt, name)
        for prompt, name in asked
    }
    talk.ran.clear()
    while engine.has_unfinished_requests():
        for output in engine.step():
            prompt, name = numbers[output.request_id]
            assert output.completion.tokens == talk.truth(prompt, name)
    # `called` came last, when the base had read what is before its call
    assert sum(talk.ran) == 3 + 2 + 1 + len(FIRST) + 3


def test_bfloat16_goes_on_within_its_rounding(talk: Talk) -> None:
    model = talk.model.bfloat16()
    prefixes = PrefixCache(model)
    params = SamplingParams(max_new_tokens=1, logprobs=True)
    (first,) = generate_completions(model, [FIRST], params, adapters=Mix())
    engine = GenerationEngine(model, prefix_cache=prefixes)
    for length in (len(FIRST) - 3, len(FIRST)):
        engine.add_request(FIRST[:length], params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
    assert talk.ran[-1] == 3
    assert outputs[0].completion.logprobs == pytest.approx(first.logprobs, abs=0.1)


def test_a_model_of_transformers_answers_without(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tiny.random_model(tiny.LLAMA).float()
    model: CausalLM = HfModel(theirs)
    prefixes, params = PrefixCache(model), SamplingParams(max_new_tokens=NEW)
    expected = generate_completions(model, [FIRST], params)[0].tokens
    for _ in range(2):
        assert list(stream_tokens(model, FIRST, params, prefix_cache=prefixes)) == expected
    assert prefixes.tokens == 0
