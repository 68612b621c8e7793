"""Mixtures of named sets, from files to batches: counts, roles, what is held out, what would leak,
what is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorry.config import DataConfig, TrainConfig
from lorry.data.catalog import shipped_catalog
from lorry.data.prepare import PreparedData, prepare_data
from lorry.data.reading.places import DataLocation, DataLocations
from lorry.errors import ConfigError, DataError

Make = Callable[..., PreparedData]


def bool_q(count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"is {n} even",
            "passage": f"A passage about the number {n}.",
            "answer": n % 2 == 0,
        }
        for n in range(count)
    ]


def common_gen(count: int) -> list[dict[str, Any]]:
    return [
        {"concepts": ["dog", f"ball{n}"], "target": f"A dog plays with ball{n}."}
        for n in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def local(tmp_path: Path) -> dict[str, str]:
    return {
        "bool_q": write(tmp_path / "bq.jsonl", bool_q(12)),
        "common_gen.train": write(tmp_path / "cg.jsonl", common_gen(20)),
        "common_gen.validation": write(tmp_path / "cgv.jsonl", common_gen(5)),
    }


@pytest.fixture
def make(tokenizer_of: Callable[..., Any], local: dict[str, str], tmp_path: Path) -> Make:
    def made(seed: int = 0, **data: Any) -> PreparedData:
        config = DataConfig(**{"mix": ["common_gen", "bool_q"], "local": local, **data})
        train = TrainConfig(seed=seed, per_device_train_batch_size=4, eval_strategy="no")
        return prepare_data(
            config, train, tokenizer_of("chatml"), quarantine=tmp_path / "bad.jsonl"
        )

    return made


def roles(prepared: PreparedData, epoch_steps: int | None = None) -> Counter[str]:
    steps = epoch_steps or prepared.stream.steps_per_epoch or 0
    return Counter(
        role
        for step in range(steps)
        for batch in prepared.stream.batches(step)
        for role in batch.role
    )


def test_every_row_is_read_once_and_counted(make: Make) -> None:
    prepared = make()
    assert roles(prepared) == {"common_gen": 20, "bool_q": 12}
    parts = prepared.report.parts
    assert {name: (part["rows"], part["drawn"]) for name, part in parts.items()} == {
        "common_gen": (20, 20),
        "bool_q": (12, 12),
    }
    assert prepared.report.tokens == sum(part["tokens"] for part in parts.values())
    lines = prepared.report.lines()
    assert any(
        "bool_q: 12 rows, 12 drawn per epoch (37.5%)" in line and "none cut" in line
        for line in lines
    )


def test_n_takes_the_first_rows_of_each_set(make: Make) -> None:
    assert roles(make(n=7)) == {"common_gen": 7, "bool_q": 7}


def test_weights_shape_an_epoch_of_the_same_length(make: Make) -> None:
    assert roles(make(n=10, weights={"boolq": 3, "common_gen": 1})) == {
        "common_gen": 5,
        "bool_q": 15,
    }
    assert roles(make(n=10, weights=[1, 3])) == {"common_gen": 5, "bool_q": 15}


def test_batches_hold_the_mixture_and_not_one_set(make: Make) -> None:
    prepared = make(n=12)
    assert all(
        set(batch.role) == {"common_gen", "bool_q"}
        for step in range(6)
        for batch in prepared.stream.batches(step)
    )


def test_templates_are_drawn_by_the_seed_and_can_be_fixed(
    make: Make, tokenizer_of: Callable[..., Any]
) -> None:
    assert make().digest == make().digest != make(seed=1).digest
    fixed, words = make(template=0), tokenizer_of("chatml")
    item = shipped_catalog().find_set("bool_q").item(bool_q(1)[0], 0)
    texts = [
        words.decode(batch.tokens)
        for step in range(fixed.stream.steps_per_epoch or 0)
        for batch in fixed.stream.batches(step)
    ]
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
    assert Counter(role for batch in prepared.evaluation for role in batch.role) == {
        "common_gen": 3,
        "bool_q": 3,
    }
    assert roles(prepared) == {"common_gen": 17, "bool_q": 9}
    held = {tuple(b.tokens[a:z].tolist()) for b in prepared.evaluation for a, z in b.segments}
    learnt = {
        tuple(b.tokens[a:z].tolist())
        for s in range(7)
        for b in prepared.stream.batches(s)
        for a, z in b.segments
    }
    assert not held & learnt


def test_a_split_of_its_own_is_evaluated_on(
    make: Make, local: dict[str, str], tmp_path: Path
) -> None:
    both = {**local, "bool_q.validation": write(tmp_path / "bqv.jsonl", bool_q(30)[20:])}
    prepared = make(local=both, eval_split="validation", eval_n=4)
    assert Counter(role for batch in prepared.evaluation for role in batch.role) == {
        "common_gen": 4,
        "bool_q": 4,
    }


def test_evaluating_on_the_rows_that_are_learnt_is_refused(make: Make) -> None:
    with pytest.raises(
        ConfigError,
        match=r"bool_q: the evaluation set is the training set .*bq.jsonl.*data.test_size",
    ):
        make(eval_split="validation")


def test_rows_of_another_set_are_rows_all_the_same(make: Make, local: dict[str, str]) -> None:
    """A file may be named as two sets, and be what one of them learns and another is evaluated on."""
    twice = {**local, "bool_q.validation": local["common_gen.train"]}
    with pytest.raises(
        ConfigError, match=r"bool_q: the evaluation set is the training set .*cg.jsonl"
    ):
        make(local=twice, eval_split="validation")
    with pytest.raises(ConfigError, match=r"data.eval=.*cg.jsonl: these are the training rows"):
        make(eval=local["common_gen.train"])


def test_a_slice_of_a_split_overlaps_the_whole_of_it() -> None:
    whole, head, tail = (
        DataLocation("tatsu-lab/alpaca", None, split)
        for split in ("train", "train[:90%]", "train[90%:]")
    )
    assert whole.overlaps(tail)
    assert tail.overlaps(whole)
    assert not head.overlaps(tail)
    assert not tail.overlaps(DataLocation("tatsu-lab/alpaca", None, "test"))
    assert not tail.overlaps(DataLocation("tatsu-lab/alpaca", "other", "train"))


def test_a_set_without_a_split_to_evaluate_on_is_left_out_of_it(
    make: Make, local: dict[str, str], tmp_path: Path
) -> None:
    files = {
        "boolq_long.train": local["bool_q"],
        "bool_q.train": write(tmp_path / "t.jsonl", bool_q(40)[30:]),
        "bool_q.validation": write(tmp_path / "v.jsonl", bool_q(30)[20:]),
    }
    made = make(mix=["boolq_long", "bool_q"], local=files, eval_split="validation")
    assert Counter(role for batch in made.evaluation for role in batch.role) == {"bool_q": 10}


def test_a_suite_is_its_sets_and_its_weight_is_theirs(make: Make, tmp_path: Path) -> None:
    svamp = [
        {"Body": f"A cart has {n} wheels.", "Question": "How many?", "Answer": n}
        for n in range(1, 5)
    ]
    gsm8k = [
        {"question": f"What is {n} + 1?", "answer": f"{n} + 1\n#### {n + 1}"} for n in range(4)
    ]
    files = {
        "svamp": write(tmp_path / "s.jsonl", svamp), "gsm8k": write(tmp_path / "g.jsonl", gsm8k),
        "bool_q": write(tmp_path / "b.jsonl", bool_q(4)),
    }  # fmt: skip
    assert roles(make(mix=["math", "bool_q"], local=files)) == {"svamp": 4, "gsm8k": 4, "bool_q": 4}
    weighed = make(mix=["math", "bool_q"], local=files, weights={"math": 1, "bool_q": 2})
    assert roles(weighed) == {"svamp": 3, "gsm8k": 3, "bool_q": 6}


def test_the_rows_to_ask_are_test_or_validation_before_training_rows(
    local: dict[str, str], tmp_path: Path
) -> None:
    rows, one = local["bool_q"], shipped_catalog().find_set("bool_q")
    write(tmp_path / "two" / "train.jsonl", bool_q(6))
    write(tmp_path / "two" / "dev.jsonl", bool_q(3))
    write(tmp_path / "lone" / "train.jsonl", bool_q(6))
    asked = {
        "test": {"bool_q": rows},
        "validation": {"bool_q": str(tmp_path / "two")},
        "train": {"bool_q": str(tmp_path / "lone")},
    }
    assert {split: DataLocations(files).to_ask(one) for split, files in asked.items()} == {
        split: split for split in asked
    }
    # files for worked examples alone: the hub is asked, not the examples
    examples = DataLocations({"bool_q.train": rows})
    assert examples.of(one, examples.to_ask(one)).path == "google/boolq"
    validation = DataLocations({"bool_q.validation": rows, "bool_q.train": rows})
    assert validation.to_ask(one) == "validation"


def test_worked_examples_come_from_local_training_rows_before_the_hub(
    local: dict[str, str], tmp_path: Path
) -> None:
    mmlu, rows = shipped_catalog().find_set("mmlu"), local["bool_q"]
    write(tmp_path / "only" / "a_test.jsonl", bool_q(2))
    assert DataLocations({}).for_shots(mmlu, "test") == "shots"
    assert DataLocations({"mmlu.train": rows, "mmlu.test": rows}).for_shots(mmlu, "test") == "train"
    assert DataLocations({"mmlu": str(tmp_path / "only")}).for_shots(mmlu, "test") == "test"


def test_a_folder_tells_its_splits_apart(tmp_path: Path) -> None:
    write(tmp_path / "bq" / "train.jsonl", bool_q(6))
    write(tmp_path / "bq" / "dev.jsonl", bool_q(3))
    places, one = (
        DataLocations({"bool_q": str(tmp_path / "bq")}),
        shipped_catalog().find_set("bool_q"),
    )
    assert places.of(one, "train") != places.of(one, "validation")
    assert [len(list(places.open(one, split))) for split in ("train", "validation")] == [6, 3]


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"mix": ["boolq", "nope"]}, ConfigError, r"unknown set 'nope'.*common_gen"),
        ({"local": {"nope": "x.jsonl"}}, ConfigError, "unknown set 'nope'"),
        ({"local": {"bool_q.dev": "x.jsonl"}}, ConfigError, r"data.local.bool_q.dev: 'dev' is not a split"),
        ({"local": {"bool_q": "/no/such/file.jsonl"}, "mix": ["bool_q"]}, DataError, r"bool_q \(data.local.bool_q\): /no/such"),
        ({"weights": {"svamp": 2}}, ConfigError, "data.weights names 'svamp', which is not in data.mix"),
        ({"weights": [1, 2, 3]}, ConfigError, "data.weights has 3 numbers for 2 sets: common_gen, bool_q"),
        ({"mix": ["bool_q", "BoolQ"]}, ConfigError, "data.mix names 'bool_q' twice"),
        ({"template": 4, "mix": ["bool_q", "paws"], "local": {"bool_q": "x", "paws": "y"}}, ConfigError,
         "data.template=4: paws has templates 0 to 3"),
        ({"test_size": 15}, ConfigError, "15 of 12 rows of bool_q, which leaves none"),
    ],
)  # fmt: skip
def test_bad_input_says_which_set(
    make: Make, settings: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        make(**settings)


def test_an_empty_set_stops_the_mixture(make: Make, local: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bool_q .*no usable row"):
        make(local={**local, "bool_q": write(tmp_path / "none.jsonl", [])})


def test_a_label_outside_the_options_names_the_row(
    make: Make, local: dict[str, str], tmp_path: Path
) -> None:
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
