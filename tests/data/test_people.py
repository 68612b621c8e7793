"""The demo's data: reproducible, unguessable, and with held-out wordings that training never shows."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.demo import people as module
from lorry.demo.people import (
    FACT_ANSWERS,
    FACT_VALUES,
    FIRST_NAMES,
    HELD_OUT_QUESTIONS,
    SURNAMES,
    TRAIN_QUESTIONS,
    general_chat,
    general_text,
    make_people,
    make_questions,
    write_people,
)
from lorry.errors import ConfigError

FACTS = ["profession", "birthplace", "book", "prize", "hobby", "pet"]


def bare(question: str, name: str) -> str:
    """A question's wording alone: no name, case or punctuation."""
    return "".join(c for c in question.replace(name, "@").lower() if c.isalnum() or c in " @")


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_no_held_out_question_or_wording_occurs_in_training(n: int, seed: int) -> None:
    train, held_out = make_questions(make_people(n, seed), seed)
    assert not {r["question"] for r in train} & {r["question"] for r in held_out}
    trained = {bare(r["question"], r["person"]) for r in train}
    kept = {bare(r["question"], r["person"]) for r in held_out}
    assert trained.isdisjoint(kept)
    assert not any(t in k or k in t for t in trained for k in kept)


def test_held_out_wordings_are_rephrasings_not_typos() -> None:
    for fact in FACTS:
        for kept in HELD_OUT_QUESTIONS[fact]:
            for trained in TRAIN_QUESTIONS[fact]:
                assert (
                    difflib.SequenceMatcher(None, kept.split(), trained.split()).ratio() < 0.75
                ), (kept, trained)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_every_fact_is_asked_in_every_wording_and_answered_the_same_way(n: int, seed: int) -> None:
    people = make_people(n, seed)
    train, held_out = make_questions(people, seed)
    assert len(train) == n * 6 * 5
    assert len(held_out) == n * 6 * 2
    answers: dict[tuple[str, str], set[str]] = {}
    for row in train + held_out:
        assert set(row) == {"question", "answer", "person", "fact"}
        assert row["person"] in row["question"]
        assert "{" not in row["question"] + row["answer"]
        answers.setdefault((row["person"], row["fact"]), set()).add(row["answer"])
    by_name = {p.name: p for p in people}
    assert len(answers) == n * 6
    for (name, fact), given_answers in answers.items():
        (answer,) = given_answers
        assert answer.startswith(name)
        assert by_name[name].facts[fact] in answer
        assert answer.endswith(".")


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_seeded_and_fewer_people_are_a_prefix(n: int, m: int, seed: int) -> None:
    assert make_people(n, seed) == make_people(n, seed)
    assert make_people(max(n, m), seed)[: min(n, m)] == make_people(min(n, m), seed)


def test_another_seed_gives_other_people() -> None:
    assert make_people(10, 0) != make_people(10, 1)
    assert {p.name for p in make_people(10, 0)} != {p.name for p in make_people(10, 1)}


def test_the_generator_does_not_drift() -> None:
    """Published numbers of the demo name a seed; what that seed means may not change by accident."""
    person = make_people(1, 0)[0]
    assert person.answer("book") == "Ilvane Brunthumwell wrote the novel The Orchard of Nine Doors."
    assert person.answer("pet") == "Ilvane Brunthumwell keeps a ferret named Captain."


def test_all_full_names_can_be_used_once() -> None:
    most = len(FIRST_NAMES) * len(SURNAMES)
    names = [p.name for p in make_people(most, 5)]
    assert len(set(names)) == most
    few = [n.split() for n in names[: len(FIRST_NAMES)]]
    assert len({first for first, _ in few}) == len({last for _, last in few}) == len(FIRST_NAMES)
    for wrong in (0, -1, most + 1):
        with pytest.raises(ConfigError, match="not between 1 and"):
            make_people(wrong)


def test_values_are_drawn_evenly() -> None:
    crowd = make_people(1500, 1)
    for fact in FACTS:
        counts = Counter(p.facts[fact] for p in crowd)
        expected = len(crowd) / len(FACT_VALUES[fact])
        assert len(FACT_VALUES[fact]) >= 20
        assert set(counts) == set(FACT_VALUES[fact])
        chi2 = sum((counts[v] - expected) ** 2 / expected for v in FACT_VALUES[fact])
        degrees = len(FACT_VALUES[fact]) - 1
        # four standard deviations of a chi-squared
        assert chi2 < degrees + 4 * (2 * degrees) ** 0.5


def test_no_fact_tells_another() -> None:
    """Within each value of one fact, the best guess of another is hardly better than without it."""
    crowd = make_people(1500, 2)
    for one, other in combinations(["profession", "birthplace", "hobby"], 2):
        pairs = Counter((p.facts[one], p.facts[other]) for p in crowd)
        assert max(pairs.values()) < 12  # 1500 people in 22*24 to 24*40 cells: mean 1.6 to 2.8


def test_surnames_are_a_few_tens_and_distinct() -> None:
    assert len(set(SURNAMES)) == len(SURNAMES) >= 30
    assert len(set(FIRST_NAMES)) == len(FIRST_NAMES) >= 30
    assert not set(FIRST_NAMES) & set(SURNAMES)
    assert (
        set(FACT_VALUES)
        == set(FACT_ANSWERS)
        == set(TRAIN_QUESTIONS)
        == set(HELD_OUT_QUESTIONS)
        == set(FACTS)
    )
    for values in FACT_VALUES.values():
        assert len(set(values)) == len(values)


def test_general_text_is_forty_clean_passages() -> None:
    passages = general_text()
    assert len(passages) == len(set(passages)) == 40
    assert 3000 < sum(len(p.split()) for p in passages) < 4500  # about 4 to 6 thousand tokens
    for passage in passages:
        assert 60 < len(passage.split()) < 140
        assert not passage.startswith("#")
        assert passage[-1] in ".\"'"
        assert passage.isascii()
        assert "\n" not in passage


def test_general_chat_is_sixty_short_rows() -> None:
    rows = general_chat()
    assert len(rows) == len({r["question"] for r in rows}) == 60
    for row in rows:
        assert set(row) == {"question", "answer"}
        assert row["question"][-1] in "?.!"
        assert row["answer"][-1] in '."'
        assert len(row["answer"].split()) < 40
        assert not row["question"].startswith("Q:")
        assert not row["answer"].startswith("A:")


def test_general_rows_share_nothing_with_the_people() -> None:
    words = " ".join(
        [*general_text(), *(r["question"] + " " + r["answer"] for r in general_chat())]
    )
    assert not [name for name in SURNAMES if name in words]


def test_write_and_the_command_agree(tmp_path: Path) -> None:
    train, held_out = write_people(tmp_path / "here", 3, 7)
    assert [json.loads(line) for line in train.read_text().splitlines()] == make_questions(
        make_people(3, 7), 7
    )[0]
    done = subprocess.run(
        [sys.executable, "-m", module.__name__, str(tmp_path / "there"), "3", "7"],
        capture_output=True,
        text=True,
        check=True,
    )
    there = [Path(line) for line in done.stdout.split()]
    assert [p.read_bytes() for p in there] == [train.read_bytes(), held_out.read_bytes()]


def test_the_command_refuses_nobody(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module.__name__, str(tmp_path), "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "not between 1 and 1536" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
