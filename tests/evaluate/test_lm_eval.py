"""Our model inside the lm-evaluation-harness against the harness' own transformers model (and PEFT)
on the same weights.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lorry
from lorry.adapters.mix import Mix
from lorry.errors import ConfigError, DataError, NonFiniteError
from tests.support.llama2 import llama2_tokenizer
from tests.support.tiny import GPT2, random_model
from tests.support.verbworld import World, tokenizer, world, write_rows  # noqa: F401

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel

from lorry.evaluate.benchmarks import likelihood
from lorry.evaluate.benchmarks.lm_eval import LorryLM, evaluate, lm, loglikelihoods
from lorry.evaluate.benchmarks.until import parse_generation_kwargs
from lorry.generation.sampling import SamplingParams

TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ["lorry_choice", "lorry_prose", "lorry_tell"]
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
)
PAIRS = [
    ("Once upon a", " time"),
    ("Once upon a ", "time"),
    ("Once upon a", " time, there was a little girl named Lily."),
    ("Once upon a", " dog"),
    ("Once upon a", " time"),
    ("Was it red?", " yes"),
    ("Was it red?", " no"),
    ("Was it red?", " n"),
    ("", "Once"),
    ("", "Lily went home."),
    ("Ein Märchen: ", "größer 🐟 ok"),
    ("\n\n", "One day"),
    ("a", "\n"),
    (STORY * 12, "She was happy."),
    (STORY * 12, "x"),
    ("One", STORY * 3),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what lies in this test's folder: its data files, and its copy of them by `datasets`."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    # seconds, for a description of this machine
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.chdir(tmp_path)


@cache
def _stories(hf: Path, home: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).save_pretrained(home)
    llama2_tokenizer(json.loads((hf.parent / "tok512.json").read_text())).save_pretrained(home)
    return home


@pytest.fixture
def told(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K with its tokenizer: a real trained model whose texts begin with BOS."""
    return _stories(stories, tmp_path_factory.getbasetemp() / "told")


@cache
def _gpt2(home: Path) -> Path:
    words = tokenizer(None, "<|endoftext|>")
    ids = {
        "vocab_size": len(words),
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "n_positions": 96,
    }
    random_model({**GPT2, **ids}).save_pretrained(home)
    words.save_pretrained(home)
    return home


@pytest.fixture
def positions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 96 learnt positions, which breaks when a token too many is run; no BOS."""
    return _gpt2(tmp_path_factory.getbasetemp() / "positions")


def theirs(path: Path, adapter: Path | None = None) -> Any:
    """The harness' own model, with the adapter in PEFT."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(path)
    lm = HFLM(pretrained=model, tokenizer=words, batch_size=3, device="cpu")
    if adapter is not None:
        lm._model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return lm


def ours(path: Path, **settings: Any) -> LorryLM:
    return lm(*lorry.load(path, dtype="float32"), **settings)


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def same_scores(mine: LorryLM, other: Any, pairs: Sequence[tuple[str, str]] = PAIRS) -> None:
    """Every log-likelihood within 1e-4, every greedy flag equal."""
    asked = requests("loglikelihood", pairs)
    got, expected = (
        mine.loglikelihood(asked, disable_tqdm=True),
        other.loglikelihood(asked, disable_tqdm=True),
    )
    for pair, (a, greedy_a), (b, greedy_b) in zip(pairs, got, expected, strict=True):
        # fp32: a sum of -200 has a last digit of 1e-5
        assert abs(a - b) <= 1e-4 * max(1, abs(b) / 50), pair
        assert greedy_a == greedy_b, pair


def greedy_pairs(other: Any, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Contexts with what the model says next, so that greedy flags are true somewhere."""
    kwargs = {"until": [], "max_gen_toks": 5, "do_sample": False}
    said = other.generate_until(
        requests("generate_until", [(p, dict(kwargs)) for p in prompts]), disable_tqdm=True
    )
    return list(zip(prompts, said, strict=True))


def data(folder: Path) -> None:
    """The rows of the three tasks: options of one token and of several, texts below and above the
    context, stories to go on.
    """
    names = ["Lily", "Tom", "Sam", "Mia", "Max"]
    rows = [
        {
            "question": f"Who has {i} red balls?",
            "options": [" " + names[(i + k) % 5] for k in range(2 + i % 3)],
            "label": 0,
        }
        for i in range(12)
    ] + [
        {
            "question": "Did it end well?",
            "options": [" yes", " no", " they all went home and slept"],
            "label": 2,
        }
    ]
    write_rows(folder / "choice.jsonl", rows)
    write_rows(
        folder / "shots.jsonl",
        [{**row, "question": row["question"].replace("red", "big")} for row in rows],
    )
    write_rows(
        folder / "prose.jsonl", [{"text": STORY * n} for n in (1, 2, 8, 30)] + [{"text": "Hi."}]
    )
    starts = ["Once upon a time", "Lily and Tom", "The dog", "One day, a", "She was", STORY.strip()]
    write_rows(folder / "tell.jsonl", [{"start": start, "end": "home"} for start in starts])


def run(model: Any, tasks: Sequence[str] = NAMES, **options: Any) -> Any:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options
    )


def same_results(mine: Any, other: Any) -> None:
    """Every metric, and every answer of the model to every request."""
    for task, found in mine["results"].items():
        numbers = {k: v for k, v in found.items() if isinstance(v, float)}
        assert len(numbers) >= 1
        assert numbers == pytest.approx(
            {k: other["results"][task][k] for k in numbers}, rel=1e-5
        ), task
        for a, b in zip(mine["samples"][task], other["samples"][task], strict=True):
            assert a["arguments"] == b["arguments"]
            for x, y in zip(_flat(a["resps"]), _flat(b["resps"]), strict=True):
                assert x == (pytest.approx(y, abs=1e-4, rel=2e-6) if isinstance(y, float) else y), (
                    task,
                    a["arguments"],
                )


def _flat(answers: Any) -> list[Any]:
    return (
        [x for one in answers for x in _flat(one)]
        if isinstance(answers, (list, tuple))
        else [answers]
    )


# --- requests


def test_the_stories_tokenizer_is_that_of_the_model(told: Path, stories: Path) -> None:
    expected = json.loads((stories.parent / "expected.json").read_text())
    words = AutoTokenizer.from_pretrained(told)
    assert words(expected["text"])["input_ids"] == expected["ids"]
    assert words.decode(expected["ids"], skip_special_tokens=True) == expected["text"]


@pytest.mark.parametrize("batch_tokens", [1, 300, 4096])
def test_likelihoods_of_a_trained_model(told: Path, batch_tokens: int) -> None:
    other = theirs(told)
    pairs = [*PAIRS, ("<s> Once upon", " a"), *greedy_pairs(other, ["Once upon a time", "Lily"])]
    same_scores(ours(told, batch_tokens=batch_tokens), other, pairs)
    asked = requests("loglikelihood", pairs)
    assert {greedy for _, greedy in other.loglikelihood(asked, disable_tqdm=True)} == {True, False}


def test_likelihoods_where_positions_are_learnt(
    positions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # of blank contexts the harness would stop
    pairs = [(a, b) for a, b in PAIRS if len(b) < 40 and not a.isspace()]
    # 96 tokens to run, 97, cut to 97
    pairs += [
        ("a", "x" * 95),
        ("a", "x" * 96),
        ("Sam", "x" * 96),
    ]
    same_scores(ours(positions), theirs(positions), pairs)
    assert (
        "3 of 16 contexts were cut from the left to the 96 tokens of the model's context"
        in caplog.text
    )


def test_options_of_one_token_share_a_pass(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run_batch: Callable[..., Any] = likelihood._score_batch
    monkeypatch.setattr(
        likelihood,
        "_score_batch",
        lambda model, rows, mix: (seen.append(len(rows)), run_batch(model, rows, mix))[1],
    )
    pairs = [("Was it" + " so" * n, f" {letter}") for n in range(4) for letter in "abcde"]
    same_scores(ours(told), theirs(told), pairs)
    assert seen == [4]


def test_an_adapter_equals_peft(world: World) -> None:  # noqa: F811
    other = theirs(world.base, world.run)
    chat = "<|im_start|>user\nWhere does {} live?<|im_end|>\n<|im_start|>assistant\n"
    questions = [chat.format(name) for name in ("Mara", "Tobias", "Ilse")]
    pairs = [
        *((q, f" {town}") for q in questions for town in ("Oslo", "Lima")),
        *greedy_pairs(other, questions),
        *PAIRS[:10],
    ]
    same_scores(ours(world.run), other, pairs)
    same_scores(ours(world.run, adapter="people"), other, pairs)
    same_scores(ours(world.run, adapter=Mix.none()), theirs(world.base), pairs)
    with pytest.raises(AssertionError):
        same_scores(ours(world.run, adapter=Mix.none()), other, pairs)
    with pytest.raises(AssertionError):
        same_scores(ours(world.run, adapter=Mix.constants({"people": 0.5})), other, pairs)


def test_a_continuation_shifted_by_one_token_is_noticed(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = likelihood.HarnessTokenizer.pair

    def shifted(
        self: likelihood.HarnessTokenizer, context: str, continuation: str
    ) -> likelihood.TokenPair:
        pair = made(self, context, continuation)
        whole, at = [*pair.context, *pair.continuation], len(pair.context) - 1
        return likelihood.TokenPair(whole[:at], whole[at:]) if at else pair

    monkeypatch.setattr(likelihood.HarnessTokenizer, "pair", shifted)
    with pytest.raises(AssertionError, match="Once upon"):
        same_scores(ours(told), theirs(told))


def test_rolling_windows(told: Path, positions: Path) -> None:
    texts = [(STORY * n,) for n in (1, 2, 9, 25)] + [("Hi.",), (STORY[:60],)]
    asked = requests("loglikelihood_rolling", texts)
    for path in (told, positions):
        expected = theirs(path).loglikelihood_rolling(asked, disable_tqdm=True)
        assert ours(path, batch_tokens=700).loglikelihood_rolling(
            asked, disable_tqdm=True
        ) == pytest.approx(expected, rel=2e-6, abs=1e-4)


def test_greedy_answers(told: Path, world: World) -> None:  # noqa: F811
    kwargs: list[dict[str, Any]] = [
        {"until": ["."], "max_gen_toks": 40},
        {"until": [" the", "\n"], "max_gen_toks": 40, "do_sample": False},
        {"until": "ed", "max_gen_toks": 30, "temperature": 0.0},
        {"until": [], "max_gen_toks": 60},
        {"until": ["girl", "irl"], "max_new_tokens": 20, "do_sample": False, "temperature": 0.7},
    ]
    prompts = ["Once upon a time", "Lily", "x", STORY * 3]
    asked = requests(
        "generate_until", [(prompt, dict(one)) for one in kwargs for prompt in prompts]
    )
    expected = theirs(told).generate_until(asked, disable_tqdm=True)
    assert ours(told, batch_rows=4).generate_until(asked, disable_tqdm=True) == expected
    assert len(set(expected)) > 12
    asked = requests(
        "generate_until",
        [(f"Where does {n} live?", {"until": ["."], "max_gen_toks": 30}) for n in ("Mara", "Ilse")],
    )
    assert ours(world.run).generate_until(asked) == theirs(world.base, world.run).generate_until(
        asked, disable_tqdm=True
    )


def test_an_answer_stops_being_made_at_its_stop_string(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    mine = ours(told)
    forward_cached = mine.model.forward_cached
    monkeypatch.setattr(
        mine.model,
        "forward_cached",
        lambda *a, **k: (steps.append(1), forward_cached(*a, **k))[1],
    )
    monkeypatch.setattr(
        "lorry.models.decoder.decode.DecodeRunner.takes", staticmethod(lambda model: False)
    )
    (text,) = mine.generate_until(
        requests("generate_until", [("Once upon a time", {"until": ["."], "max_gen_toks": 200})])
    )
    assert 5 < len(steps) < 60
    assert "." not in text


def test_sampled_answers_follow_the_seed_and_differ_among_repeats(told: Path) -> None:
    asked = requests(
        "generate_until",
        [("Once", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0})] * 3,
    )
    first = ours(told).generate_until(asked)
    assert len(set(first)) == 3
    assert ours(told).generate_until(asked) == first != ours(told, seed=1).generate_until(asked)


TEXT = st.text(st.sampled_from("ab Oc.\n\tü🐟<s>/") | st.characters(codec="utf-8"), max_size=12)


@pytest.mark.parametrize("begins", [True, False], ids=["BOS", "no BOS"])
@given(TEXT.filter(bool), TEXT)
def test_any_text_is_cut_where_the_harness_cuts(
    begins: bool, context: str, continuation: str
) -> None:
    words = WORDS[begins]
    other = object.__new__(HFLM)
    other.tokenizer, other.add_bos_token, other.custom_prefix_token_id = words, None, None
    before, after = other._encode_pair(context, continuation)
    before = before or [other.prefix_token_id]  # where the harness stops with an assertion
    if after:
        assert likelihood.HarnessTokenizer(words).pair(
            context, continuation
        ) == likelihood.TokenPair(before, after)
    else:
        with pytest.raises(DataError, match="has no score"):
            likelihood.HarnessTokenizer(words).pair(context, continuation)


@cache
def _bos_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [
        "<unk>",
        "\n<s>\n",
        "\n</s>\n",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *" abOc.",
        "ab",
        " O",
        " Oc",
    ]
    return llama2_tokenizer([(piece.encode().hex(), float(-i)) for i, piece in enumerate(pieces)])


WORDS = {True: _bos_tokenizer(), False: tokenizer(None, "<|endoftext|>")}


# --- tasks


def test_tasks_give_the_harness_results(told: Path, tmp_path: Path) -> None:
    data(tmp_path)
    other = theirs(told)
    same_results(run(ours(told)), run(other))
    shots = {"num_fewshot": 2, "limit": 6}
    same_results(run(ours(told), NAMES[:1], **shots), run(other, NAMES[:1], **shots))


def test_a_run_is_evaluated_without_and_with_its_adapter(world: World, tmp_path: Path) -> None:  # noqa: F811
    data(tmp_path)
    found = evaluate(
        str(world.run), NAMES, include_path=str(TASKS), log_samples=True, bootstrap_iters=0, limit=4
    )
    assert list(found) == ["base", "people"]
    same_results(found["base"], run(theirs(world.base), limit=4))
    same_results(found["people"], run(theirs(world.base, world.run), limit=4))
    only = evaluate(
        str(world.run),
        ["lorry_p*"],
        include_path=str(TASKS),
        adapter="people",
        bootstrap_iters=0,
        limit=1,
    )
    assert list(only) == ["people"]
    assert list(only["people"]["results"]) == ["lorry_prose"]
    assert only["people"]["config"]["adapters"] == {"people": 1.0}


def test_the_harness_opens_a_run_by_its_name(world: World, tmp_path: Path) -> None:  # noqa: F811
    data(tmp_path)
    assert get_model("lorry") is LorryLM
    args = f"path={world.run},adapter=base,dtype=float32,batch_tokens=200"
    same_results(
        run("lorry", NAMES[:1], model_args=args, batch_size=1, device="cuda:0", limit=3),
        run(theirs(world.base), NAMES[:1], limit=3),
    )


def test_chats_are_written_as_transformers_writes_them(world: World, tmp_path: Path) -> None:  # noqa: F811
    mine, words = ours(world.run), AutoTokenizer.from_pretrained(world.base)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where does Mara live?"},
    ]
    assert mine.apply_chat_template(chat) == words.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    half = [*chat, {"role": "assistant", "content": "Mara lives"}]
    went_on = words.apply_chat_template(half, tokenize=False, continue_final_message=True)
    assert mine.apply_chat_template(half, add_generation_prompt=False) == went_on
    assert mine.chat_template(True) == words.chat_template
    assert mine.tokenizer_name.endswith("__people")
    data(tmp_path)
    homes = (("Mara", "Oslo"), ("Ilse", "Kyoto"))
    write_rows(
        tmp_path / "tell.jsonl",
        [{"start": f"Where does {n} live?", "end": f"{n} lives in {t}"} for n, t in homes],
    )
    found = evaluate(
        str(world.run),
        ["lorry_tell"],
        include_path=str(TASKS),
        chat=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    other = run(theirs(world.base, world.run), ["lorry_tell"], apply_chat_template=True)
    same_results(found["people"], other)
    scores = {side: one["results"]["lorry_tell"]["exact_match,none"] for side, one in found.items()}
    assert scores == {"base": 0.0, "people": 1.0}  # learnt by heart, in that chat


# --- for others


def test_likelihoods_alone_equal_a_plain_forward_pass(world: World) -> None:  # noqa: F811
    model, words = lorry.load(world.run, dtype="float32")
    pairs = [("Where does Mara live?", " Mara lives in Oslo."), ("Where does Mara live?", " no")]
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32), str(world.run)
    ).eval()
    for (context, continuation), got in zip(
        pairs, loglikelihoods(model, words, pairs, "people"), strict=True
    ):
        before, whole = (
            len(words(context)["input_ids"]),
            torch.tensor([words(context + continuation)["input_ids"]]),
        )
        with torch.no_grad():
            logp = plain(whole).logits[0, before - 1 : -1].double().log_softmax(-1)
        target = whole[0, before:]
        assert got.total == pytest.approx(float(logp.gather(1, target[:, None]).sum()), abs=1e-4)
        assert (got.tokens, got.greedy) == (len(target), bool((logp.argmax(1) == target).all()))


# --- bad input


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"min_p": 0.1}, "min_p is not supported"), ({"max_gen_tok": 3}, "did you mean 'max_gen_toks'"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)  # fmt: skip
def test_generation_settings_that_would_be_ignored(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_generation_kwargs(asked, 10, 0)


def test_generation_settings_that_mean_greedy() -> None:
    for one in (
        {},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.0},
        {"num_beams": 1},
    ):
        assert parse_generation_kwargs(one, 10, 0)[1].temperature == 0
    stops, params = parse_generation_kwargs(
        {"until": "x", "do_sample": True, "top_k": 0, "top_p": 0.9, "max_tokens": 7}, 10, 3
    )
    assert stops == ["x"]
    assert params == SamplingParams(max_new_tokens=7, temperature=1.0, top_p=0.9, seed=3)


def test_bad_requests_say_what_is_wrong(positions: Path, world: World, tmp_path: Path) -> None:  # noqa: F811
    mine = ours(positions)
    with pytest.raises(DataError, match="has no score"):
        mine.loglikelihood(requests("loglikelihood", [("a", "")]))
    with pytest.raises(
        DataError, match=r"continuation 0 has .* tokens, but the model's context is 96"
    ):
        mine.loglikelihood(requests("loglikelihood", [("a", STORY * 5)]))
    with pytest.raises(ConfigError, match="max_gen_toks is 256, but the model's context is 96"):
        mine.generate_until(requests("generate_until", [("a", {})]))
    with pytest.raises(ConfigError, match="did you mean 'batch_tokens'"):
        ours(positions, batch_token=3)
    with pytest.raises(ConfigError, match="no adapter named 'person'"):
        ours(world.run, adapter="person")
    with pytest.raises(
        ConfigError, match=r"no adapter named 'poeple' .did you mean 'people'.*base, people"
    ):
        get_model("lorry").create_from_arg_string(f"path={world.run},adapter=poeple")
    with pytest.raises(ConfigError, match="model_args names no model"):
        get_model("lorry").create_from_arg_string("dtype=float32")
    with pytest.raises(DataError, match=r"the data of lorry_tell could not be read.*tell\.jsonl"):
        evaluate(str(world.run), ["lorry_tell"], include_path=str(TASKS))
    with torch.no_grad():
        mine.model.head.weight[5] = torch.nan
    with pytest.raises(NonFiniteError, match="continuation 0"):
        mine.loglikelihood(requests("loglikelihood", [("a", "b")]))


def test_an_unknown_task_suggests_the_nearest(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = TaskManager.__init__
    without = lambda self, **options: make(self, **{**options, "include_defaults": False})  # noqa: E731  (the index of all: 20 s)
    monkeypatch.setattr(TaskManager, "__init__", without)
    with pytest.raises(
        ConfigError, match=r"no task named 'lorry_choise' .did you mean 'lorry_choice'"
    ):
        evaluate(str(world.run), ["lorry_choise"], include_path=str(TASKS))


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "lm_eval" or name.startswith("lm_eval.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "lorry.evaluate.benchmarks.lm_eval")
    with pytest.raises(ConfigError, match=r"pip install 'lm_eval>=0\.4\.13'"):
        importlib.import_module("lorry.evaluate.benchmarks.lm_eval")
