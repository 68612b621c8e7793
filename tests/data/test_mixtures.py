"""Mixtures of named sets, from files to batches: counts, roles, what is held out, what would leak, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorry.config import DataConfig, TrainConfig
from lorry.data.catalog import named
from lorry.data.places import Places
from lorry.data.prepare import Prepared, prepare
from lorry.errors import ConfigError, DataError

Make = Callable[..., Prepared]


def bool_q(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"is {n} even", "passage": f"A passage about the number {n}.", "answer": n % 2 == 0} for n in range(count)
    ]


def common_gen(count: int) -> list[dict[str, Any]]:
    return [{"concepts": ["dog", f"ball{n}"], "target": f"A dog plays with ball{n}."} for n in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def local(tmp_path: Path) -> dict[str, str]:
    return {
        "bool_q": write(tmp_path / "bq.jsonl", bool_q(12)), "common_gen.train": write(tmp_path / "cg.jsonl", common_gen(20)),
        "common_gen.validation": write(tmp_path / "cgv.jsonl", common_gen(5)),
    }  # fmt: skip


@pytest.fixture
def make(tokenizer_of: Callable[..., Any], local: dict[str, str], tmp_path: Path) -> Make:
    def made(seed: int = 0, **data: Any) -> Prepared:
        config = DataConfig(**{"mix": ["common_gen", "bool_q"], "local": local, **data})
        train = TrainConfig(seed=seed, per_device_train_batch_size=4, eval_strategy="no")
        return prepare(config, train, tokenizer_of("chatml"), quarantine=tmp_path / "bad.jsonl")

    return made


def roles(prepared: Prepared, epoch_steps: int | None = None) -> Counter[str]:
    steps = epoch_steps or prepared.steps_per_epoch or 0
    return Counter(role for step in range(steps) for batch in prepared.stream.batches(step) for role in batch.role)


def test_every_row_is_read_once_and_counted(make: Make) -> None:
    prepared = make()
    assert roles(prepared) == {"common_gen": 20, "bool_q": 12}
    parts = prepared.report.parts
    assert {name: (part["rows"], part["drawn"]) for name, part in parts.items()} == {"common_gen": (20, 20), "bool_q": (12, 12)}
    assert prepared.report.tokens == sum(part["tokens"] for part in parts.values())
    lines = prepared.report.lines()
    assert any("bool_q: 12 rows, 12 drawn an epoch (37.5%)" in line and "none cut" in line for line in lines)


def test_n_takes_the_first_rows_of_each_set(make: Make) -> None:
    assert roles(make(n=7)) == {"common_gen": 7, "bool_q": 7}


def test_weights_shape_an_epoch_of_the_same_length(make: Make) -> None:
    assert roles(make(n=10, weights={"boolq": 3, "common_gen": 1})) == {"common_gen": 5, "bool_q": 15}
    assert roles(make(n=10, weights=[1, 3])) == {"common_gen": 5, "bool_q": 15}


def test_batches_hold_the_mixture_and_not_one_set(make: Make) -> None:
    prepared = make(n=12)
    assert all(set(batch.role) == {"common_gen", "bool_q"} for step in range(6) for batch in prepared.stream.batches(step))


def test_templates_are_drawn_by_the_seed_and_can_be_fixed(make: Make, tokenizer_of: Callable[..., Any]) -> None:
    assert make().digest == make().digest != make(seed=1).digest
    fixed, words = make(template=0), tokenizer_of("chatml")
    item = named("bool_q").item(bool_q(1)[0], 0)
    texts = [words.decode(batch.tokens) for step in range(fixed.steps_per_epoch or 0) for batch in fixed.stream.batches(step)]
    assert any(item.prompt in text for text in texts)
    assert fixed.digest == make(seed=1, template=0).digest


def test_truncation_is_shown_set_by_set(make: Make, local: dict[str, str], tmp_path: Path) -> None:
    long = [{**row, "passage": "word " * 200} for row in bool_q(4)]
    prepared = make(local={**local, "bool_q": write(tmp_path / "long.jsonl", long)}, max_length=160)
    line = next(line for line in prepared.report.lines() if line.startswith("  bool_q"))
    assert "4 prompts cut by" in line
    assert prepared.report.parts["common_gen"]["shortened"] == 0


def test_held_out_rows_are_of_every_set_and_not_trained_on(make: Make) -> None:
    prepared = make(test_size=3)
    assert Counter(role for batch in prepared.evaluation for role in batch.role) == {"common_gen": 3, "bool_q": 3}
    assert roles(prepared) == {"common_gen": 17, "bool_q": 9}
    held = {tuple(b.tokens[a:z].tolist()) for b in prepared.evaluation for a, z in b.segments}
    learnt = {tuple(b.tokens[a:z].tolist()) for s in range(7) for b in prepared.stream.batches(s) for a, z in b.segments}
    assert not held & learnt


def test_a_split_of_its_own_is_evaluated_on(make: Make, local: dict[str, str], tmp_path: Path) -> None:
    both = {**local, "bool_q.validation": write(tmp_path / "bqv.jsonl", bool_q(30)[20:])}
    prepared = make(local=both, eval_split="validation", eval_n=4)
    assert Counter(role for batch in prepared.evaluation for role in batch.role) == {"common_gen": 4, "bool_q": 4}


def test_evaluating_on_the_rows_that_are_learnt_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"bool_q: the rows to evaluate on are the rows trained on .*bq.jsonl.*data.test_size"):
        make(eval_split="validation")


def test_a_folder_tells_its_splits_apart(tmp_path: Path) -> None:
    write(tmp_path / "bq" / "train.jsonl", bool_q(6))
    write(tmp_path / "bq" / "dev.jsonl", bool_q(3))
    places, one = Places({"bool_q": str(tmp_path / "bq")}), named("bool_q")
    assert places.of(one, "train") != places.of(one, "validation")
    assert [len(list(places.open(one, split))) for split in ("train", "validation")] == [6, 3]


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"mix": ["boolq", "nope"]}, ConfigError, r"unknown set 'nope'.*common_gen"),
        ({"local": {"nope": "x.jsonl"}}, ConfigError, "unknown set 'nope'"),
        ({"local": {"bool_q.dev": "x.jsonl"}}, ConfigError, r"data.local.bool_q.dev: 'dev' is no split"),
        ({"local": {"bool_q": "/no/such/file.jsonl"}, "mix": ["bool_q"]}, DataError, r"bool_q \(data.local.bool_q\): /no/such"),
        ({"weights": {"svamp": 2}}, DataError, "data.weights names 'svamp', which is not in data.mix"),
    ],
)  # fmt: skip
def test_bad_input_says_which_set(make: Make, settings: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        make(**settings)


def test_an_empty_set_stops_the_mixture(make: Make, local: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bool_q .*no usable row"):
        make(local={**local, "bool_q": write(tmp_path / "none.jsonl", [])})


def test_a_label_outside_the_options_names_the_row(make: Make, local: dict[str, str], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*bool_q(2), {"question": "q", "passage": "p", "answer": 7}]
    bad = write(tmp_path / "bad-label.jsonl", rows)
    with pytest.raises(DataError, match=r"bad-label.jsonl:3: .*7"):
        make(local={**local, "bool_q": bad})
    kept = make(local={**local, "bool_q": bad}, on_bad_row="skip")
    assert kept.report.parts["bool_q"]["rows"] == 2
    assert sum(kept.report.left_out.values()) == 1


def test_columns_nobody_knows_are_listed(make: Make, local: dict[str, str], tmp_path: Path) -> None:
    odd = write(tmp_path / "odd.jsonl", [{"frage": "ist", "antwort": "ja"}])
    with pytest.raises(DataError, match=r"odd.jsonl:1: .*frage.*antwort.*question"):
        make(local={**local, "bool_q": odd})
