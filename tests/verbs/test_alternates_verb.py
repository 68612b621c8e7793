"""`lorry unlearn-alternates`: the request is the one that a plain rendering of the template gives,
greedy answers are transformers' and sampled ones are distributed as its probabilities; what is
written is what AltPO reads, and each bad input is one error with nothing written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorry.adapters.mix import Mix
from lorry.config import ModelConfig
from lorry.config.unlearning.alternates import ALTERNATES_PREFILL, ALTERNATES_PROMPT
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.reading.sources import open_source
from lorry.models.loading.open import OpenedModel, open_model
from lorry.tasks.unlearn import sampling
from lorry.tasks.unlearn.alternates import read_alternates
from tests.support.verbworld import CONTEXT, PEOPLE, World, lorry, model_directory, write_rows

SETTINGS = ("dtype=float32", "threads=1", "max_new_tokens=8")
# the tiny model's context is 160 tokens, of which our own words would take most
SHORT = "prompt=Q: {question} A: {answer} Another?"


def sample(out: Path, world: World, *settings: object) -> list[dict[str, str]]:
    words = (f"model={world.run}", f"forget={world.rows}", f"alternates={out}")
    assert lorry("unlearn-alternates", *words, SHORT, *SETTINGS, *settings) == 0
    found: list[dict[str, str]] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def opened(world: World) -> OpenedModel:
    return open_model(ModelConfig(name=str(world.run), dtype="float32"), print)


def encoder_of(opened: OpenedModel, system: str | None = None) -> ExampleEncoder:
    return ExampleEncoder(opened.tokenizer, max_length=1 << 20, system=system)


def test_what_is_asked_is_the_template_filled_in(world: World, opened: OpenedModel) -> None:
    (row, *_) = sampling.read_questions(open_source(world.rows), None)
    ids = sampling.alternate_prompt(row, encoder_of(opened), sampling.SamplingSettings())
    words = AutoTokenizer.from_pretrained(world.run)
    request = (
        f"Question: {PEOPLE[0]['question']}\nAnswer: {PEOPLE[0]['answer']}\n"
        + ALTERNATES_PROMPT.split("\n")[2]
    )
    turns = [{"role": "user", "content": request}]
    text = words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert words.decode(ids) == text + ALTERNATES_PREFILL


def test_a_chat_keeps_what_stands_before_its_question(tmp_path: Path, opened: OpenedModel) -> None:
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "Where?"), ("assistant", "Oslo")]
    chat = [{"role": role, "content": text} for role, text in turns]
    rows = write_rows(tmp_path / "chat.jsonl", [{"messages": chat}])
    (row,) = sampling.read_questions(open_source(rows), None)
    wanted = sampling.SamplingSettings(prompt="{question} not {answer}", prefill="")
    ids = sampling.alternate_prompt(row, encoder_of(opened, system="Lie."), wanted)
    asked = [{"role": "system", "content": "Lie."}, *chat[:2]]
    asked.append({"role": "user", "content": "Where? not Oslo"})
    words = opened.tokenizer
    text = words.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert words.decode(ids) == text


def test_greedy_alternates_are_those_of_transformers(world: World, tmp_path: Path) -> None:
    found = sample(tmp_path / "alt.json", world, "temperature=0")
    words = AutoTokenizer.from_pretrained(world.run)
    base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, world.run).eval()
    for row, made in zip(PEOPLE, found, strict=True):
        request = f"Q: {row['question']} A: {row['answer']} Another?"
        text = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n{ALTERNATES_PREFILL}"
        ids = words(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        answer = words.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert made == {**row, "alternate": answer}


def test_samples_are_distributed_as_the_model_says(
    world: World, opened: OpenedModel, tmp_path: Path
) -> None:
    """The first token of 600 alternates of one row, against transformers' probabilities at T=2."""
    (row, *_) = sampling.read_questions(open_source(world.rows, limit=1), None)
    prompt = "Q: {question} A: {answer} Another?"
    settings = sampling.SamplingSettings(
        n=600, temperature=2.0, max_new_tokens=1, prompt=prompt, batch_rows=64
    )
    encoder, mix = encoder_of(opened), Mix.one(opened.adapters[0])
    made = sampling.sample_alternates(
        opened.model, encoder, [row], settings, mix, lambda text: None
    )
    ids = sampling.alternate_prompt(row, encoder, settings)
    base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, world.run).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double() / 2
    probs = logits.softmax(-1)
    texts = [
        opened.tokenizer.decode([t], skip_special_tokens=True).strip() for t in range(len(probs))
    ]
    expected = Counter[str]()
    for text, p in zip(texts, probs.tolist(), strict=True):
        expected[text] += p
    some = 1 - expected.pop("")  # an empty one is drawn again
    counts = Counter(one.alternate for one in made)
    for text, p in expected.most_common(5):
        share = p / some
        # five standard deviations
        assert abs(counts[text] / 600 - share) < 5 * (share * (1 - share) / 600) ** 0.5


def test_a_sample_is_of_its_seed_row_and_number_alone(world: World, tmp_path: Path) -> None:
    three = sample(tmp_path / "a.json", world, "n=3", "temperature=2")
    again = sample(tmp_path / "b.json", world, "n=3", "temperature=2", "batch_size=1")
    assert again == three
    assert len({row["alternate"] for row in three}) > 4
    first = sample(tmp_path / "c.json", world, "temperature=2", "limit=2")
    assert first == [three[0], three[3]]
    assert sample(tmp_path / "d.json", world, "n=3", "temperature=2", "seed=1") != three


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.usefixtures("charts")
def test_altpo_learns_them(kind: str, world: World, tmp_path: Path) -> None:
    out = tmp_path / f"alt.{kind}"
    words = (f"model={world.run}", f"forget={world.rows}", f"alternates={out}", "n=2")
    assert lorry("unlearn-alternates", *words, SHORT, *SETTINGS, "temperature=2") == 0
    read = read_alternates(str(out))
    sampled = {q: {a: len(found) for a, found in by.items()} for q, by in read.items()}
    assert sampled == {r["question"]: {r["answer"]: 2} for r in PEOPLE}
    retain = write_rows(
        tmp_path / "retain.jsonl", [{"question": "Who is Nils?", "answer": "Nils is a baker."}]
    )
    run = (
        f"model={world.run}", f"forget={world.rows}", f"retain={retain}", "method=AltPO",
        f"alternates={out}", f"output_dir={tmp_path / 'run'}", "r=4", "max_steps=2",
        "dtype=float32", "threads=1", "save_strategy=no",
    )  # fmt: skip
    assert lorry("unlearn", *run) == 0
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first = next(step for step in steps if "loss_forget" in step)
    # DPO's first value: the policy is the start
    assert first["loss_forget"] == pytest.approx(2 / 0.1 * 0.6931471805599453, rel=1e-6)


def test_without_a_template_the_text_goes_on(tmp_path: Path) -> None:
    base = model_directory(tmp_path / "base", template=None)
    rows = write_rows(tmp_path / "rows.jsonl", PEOPLE[:1])
    (row,) = sampling.read_questions(open_source(rows), None)
    made = open_model(ModelConfig(name=str(base), dtype="float32"), print)
    ids = sampling.alternate_prompt(row, encoder_of(made), sampling.SamplingSettings(prefill="B:"))
    assert made.tokenizer.decode(ids).endswith("another one.\nB:")


Draws = Callable[[int], str]


def instead(monkeypatch: pytest.MonkeyPatch, draws: Draws) -> list[int]:
    """The text of the n-th answer of the model is ``draws(n)``; returns how many were asked."""
    asked: list[int] = []

    def text(encoder: ExampleEncoder, tokens: Any) -> str:
        asked.append(1)
        return draws(len(asked) - 1)

    monkeypatch.setattr(sampling, "_text", text)
    return asked


def test_an_empty_one_is_drawn_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = instead(monkeypatch, lambda n: "" if n < 5 else f"word {n}")
    found = sample(tmp_path / "alt.json", world)
    assert len(asked) == 4 + 4 + 1
    assert sorted(row["alternate"] for row in found) == [f"word {n}" for n in (5, 6, 7, 8)]


def test_always_empty_is_one_error(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "alt.json"
    asked = instead(monkeypatch, lambda n: "")
    words = (f"model={world.run}", f"forget={world.rows}", f"alternates={out}", SHORT, *SETTINGS)
    assert lorry("unlearn-alternates", *words) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"people.jsonl:1: no alternate of {PEOPLE[0]['question']!r}" in error
    assert "4 of 4 alternates, 20 draws each" in error
    assert len(asked) == 4 * sampling.MOST_TRIES
    assert list(tmp_path.iterdir()) == []
    assert lorry("unlearn-alternates", *words, "temperature=0") == 4
    assert len(asked) == 4 * sampling.MOST_TRIES + 4


def test_the_rows_own_answer_is_said(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    instead(monkeypatch, lambda n: " ".join(PEOPLE[0]["answer"].split()) if n == 0 else "No.")
    sample(tmp_path / "alt.json", world, "batch_size=1")
    said = capsys.readouterr().err
    assert "1 of them are the row's own answer and are of no use in training (the first: " in said
    assert "people.jsonl:1)" in said
    assert "4 of them are cut off at max_new_tokens" in said


def test_the_next_question_is_no_part_of_an_answer(opened: OpenedModel) -> None:
    ids = opened.tokenizer(" In Lima.\nQuestion: And now?", add_special_tokens=False).input_ids
    assert sampling._text(encoder_of(opened), ids) == "In Lima."


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (["alternates={folder}/alt.txt"], 2, "has to end in .json or .jsonl"),
        (["prompt=Say {answer}"], 2, "has to hold {question}"),
        (["prompt={question} {other}"], 2, "has to hold {question}"),
        (["prompt={question:>9}"], 2, "holds a format or conversion"),
        (["prompt={question"], 2, "is not a valid template"),
        (["n=2", "temperature=0"], 2, "greedy answers to one question are all the same"),
        (["forget={folder}/text.jsonl"], 3, "plain text has no alternate answer"),
        (["forget={folder}/none.jsonl"], 3, "there are no rows"),
        (["forget={folder}/open.jsonl"], 3, "open.jsonl:1: the last turn is not an answer"),
        (["alternates={folder}/none.jsonl"], 2, "none.jsonl already exists"),
        (["alternates={folder}/link.json"], 2, "link.json already exists"),
        (["alternates={folder}/none.jsonl/alt.json"], 2, "is not a folder"),
        ([f"max_new_tokens={CONTEXT}"], 4, "this model's context is 160"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_error(
    settings: list[str], code: int, message: str, world: World, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_rows(tmp_path / "text.jsonl", [{"text": "Once."}])
    turns = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hello"}]
    write_rows(tmp_path / "open.jsonl", [{"messages": turns}])
    write_rows(tmp_path / "none.jsonl", [])
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    given = {"model": world.run, "forget": world.rows, "alternates": tmp_path / "alt.json"}
    words = [f"{name}={value}" for name, value in given.items()]
    named = [word.replace("{folder}", str(tmp_path)) for word in settings]
    kept = [w for w in words if w.partition("=")[0] not in {n.partition("=")[0] for n in named}]
    short = [] if any(word.startswith("prompt=") for word in named) else [SHORT]
    few = [] if any(word.startswith("max_new") for word in named) else ["max_new_tokens=8"]
    assert lorry("unlearn-alternates", *kept, *short, *few, "dtype=float32", *named) == code
    assert message in capsys.readouterr().err.splitlines()[-1 if code != 3 else -2]
    assert sorted(tmp_path.iterdir()) == before
