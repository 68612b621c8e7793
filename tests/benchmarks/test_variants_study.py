"""The study of variants: what it runs are valid runs, made once; its numbers are those of plain
statistics; its page says what its record says."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_page
import variants_study
import variants_table
from scipy import stats
from variants_study import BATCHES, FULL, PARTS, SMALL, Point, Size, Study
from variants_table import PLAIN, Found, best_rate

from lorry.config import RunConfig, SweepSettings, parse_settings, runs_by_adapter

ROOT = Path(__file__).resolve().parents[2]
BEST = {"full": 1e-4}  # of the made-up losses: elsewhere 1e-3


class Trained:
    """In the place of Lorry's commands: writes what they write, with losses that have one best rate."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, RunConfig]] = []
        self.stops_after = 1000

    def __call__(self, words: list[str], log: Path, deadline: float) -> None:
        if len(self.runs) == self.stops_after:
            raise variants_study.Unfinished
        verb, path = words
        schema = SweepSettings if verb == "sweep" else RunConfig
        run = parse_settings(schema, [path], print)
        self.runs.append((verb, run))
        run.output_dir.mkdir()
        lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0}]
        if isinstance(run, SweepSettings):
            (alone,) = run.passes()
            jobs = [
                {"name": name, "eval_loss": self.loss(name, one.train.learning_rate)}
                for name, one in runs_by_adapter(alone).items()
            ]
            (run.output_dir / "sweep.json").write_text(json.dumps({"jobs": jobs}))
        else:
            lines.append({"step": 1, "eval_loss": self.loss("full", run.train.learning_rate)})
        lines[-1] |= {"tokens": 600, "peak_memory_bytes": 2**30}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.output_dir / "metrics.jsonl").write_text(text)

    def loss(self, name: str, rate: float) -> float:
        return 1 + math.log(rate / BEST.get(name, 1e-3)) ** 2 / 100


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    made = Trained()
    monkeypatch.setattr(variants_study, "call", made)
    return made


def a_study(
    work: Path, size: Size = SMALL, task: str = "gsm8k", ways: list[str] | None = None
) -> Study:
    return Study(argparse.Namespace(work=work, threads=1, ways=ways), size, task, 0.0)


def run_all(study: Study) -> None:
    for part in PARTS:
        study.run_part(part)


@pytest.mark.parametrize(
    ("size", "task"), [(SMALL, "common_gen"), (FULL, "gsm8k")], ids=["small", "full"]
)
def test_what_is_made_is_valid_and_made_once(
    size: Size, task: str, tmp_path: Path, trained: Trained
) -> None:
    trained.stops_after = 9
    with pytest.raises(variants_study.Unfinished):
        run_all(a_study(tmp_path, size, task))
    trained.stops_after = 1000
    study = a_study(tmp_path, size, task)
    run_all(study)
    keys = [(p["way"], p["rate"], p["seed"]) for p in study.points]
    assert len(keys) == len({*keys})
    assert {way.name for way in study.ways} == {key[0] for key in keys}
    # a second time nothing is left to do, in the rounds beyond the grids' edges neither
    count = len(trained.runs)
    run_all(a_study(tmp_path, size, task))
    assert len(trained.runs) == count
    # as many jobs as there are points, each pass with one base
    jobs = [
        one
        for verb, run in trained.runs
        for one in (runs_by_adapter(run.passes()[0]).values() if verb == "sweep" else [run])
    ]
    assert len(jobs) == len(keys)
    assert {run.model.quantize for _, run in trained.runs} == {None, "nf4"}
    kinds = {(one.lora.variant, one.lora.use_dora) for one in jobs if one.lora}
    assert kinds == {("lora", False), ("lora", True), ("adalora", False)}
    whole = [one for one in jobs if one.lora is None]
    for of_all in (whole, [one for one in jobs if one.lora is not None]):
        assert {
            one.train.per_device_train_batch_size * one.train.gradient_accumulation_steps
            for one in of_all
        } == {size.batch[task], *BATCHES}
    # its grid ends at 3e-4, so that the ones beyond were tried
    assert max(rate for way, rate, _ in keys if way == "loraplus-16") > 9e-4
    # what the study compares hangs on no default
    assert {one.lora.lora_alpha for one in jobs if one.lora} == {2, 8, 32, 48, 128}
    # fresh seeds at the best rate alone
    fresh = {key for key in keys if key[0] == PLAIN and key[2]}
    assert fresh == {(PLAIN, 1e-3, seed) for seed in range(1, size.seeds)}
    assert not [path for path in (tmp_path / task).iterdir() if path.is_dir()]


def test_numbers_of_a_run_are_its_own(tmp_path: Path, trained: Trained) -> None:
    study = a_study(tmp_path)
    plain, full = study.ways[0], next(way for way in study.ways if way.whole)
    study.train("one", [Point(plain, 1e-2), Point(plain, 1e-3)])
    study.train("two", [Point(full, 1e-4)])
    study.train("seeds-three", [Point(plain, 1e-3, 1)], seeds=2)
    first, second, whole, *seeds = study.points
    assert first["loss"] == pytest.approx(1 + math.log(10) ** 2 / 100)
    assert (second["loss"], second["jobs"], second["tokens"]) == (1.0, 2, 600)
    assert (whole["loss"], whole["base_loss"], whole["jobs"]) == (1.0, 3.0, 1)
    assert [(p["seed"], p["jobs"], p["memory_bytes"], p["grid"]) for p in seeds] == [
        (1, 2, 2**30, False), (2, 2, 2**30, False)
    ]  # fmt: skip
    study.train("seeds-four", [Point(plain, 2e-3)], seeds=2)
    assert [(p["seed"], p["grid"]) for p in study.points[-2:]] == [(0, False), (1, False)]
    # a rate that was tried later is none of the curve's
    assert set(study.curve(plain)) == {1e-2, 1e-3}
    assert set(Found(ways(plain.name), study.points).curves[plain.name]) == {1e-2, 1e-3}
    assert a_study(tmp_path).points == study.points


@pytest.mark.parametrize(
    ("losses", "beyond"),
    [((3, 2, 1), 9e-3), ((1, 2, 3), 9e-5), ((2, 1, 2), None), ((1,), None)],
)
def test_a_grid_grows_where_its_best_is_at_its_edge(
    losses: tuple[float, ...], beyond: float | None
) -> None:
    curve = dict(zip((3e-4, 1e-3, 3e-3), losses, strict=False))
    assert variants_study.next_rate(curve) == beyond


def test_without_the_data_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="gsm8k is not there; set LORRY_DATA to a folder with"):
        variants_study.write_rows(tmp_path / "rows", SMALL)


# --- statistics


def points(losses: dict[str, list[float]], rate: float = 1e-3, **more: Any) -> list[dict[str, Any]]:
    """Of each way under seeds 1, 2, ..."""
    base = {"seconds": 60.0, "jobs": 2, "memory_bytes": 2**30, "tokens": 100}
    return [
        {"way": way, "rate": rate, "seed": seed, "grid": False, "loss": loss, **base, **more}
        for way, each in losses.items()
        for seed, loss in enumerate(each, 1)
    ]


def ways(*names: str, part: str = "variants") -> list[dict[str, str]]:
    return [{"name": name, "words": name.upper(), "part": part} for name in names]


def test_the_best_rate_is_the_lowest_point_of_the_parabola() -> None:
    curve = {r: 2 + math.log(r / 7e-4) ** 2 for r in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
    assert best_rate(curve) == pytest.approx(7e-4)
    # what broke down says as much as what hardly learnt, however high it is
    broken = {1e-3: 2.6, 3e-3: 2.4, 9e-3: 2.1, 2.7e-2: 11.0}
    assert variants_table.lowest_point(broken) == variants_table.lowest_point(
        broken | {2.7e-2: 2.6}
    )
    assert variants_table.low(broken) > 2.05
    # at an edge the rate itself: nothing is known of what lies beyond
    assert best_rate({r: r for r in (1e-4, 3e-4, 1e-3)}) == 1e-4
    assert best_rate({1e-4: 3.0, 3e-4: 3.0, 1e-3: 3.0}) == 1e-4
    assert variants_table.at_edge({1e-4: 1.0, 3e-4: 2.0}) == "<= "
    assert variants_table.at_edge({1e-4: 2.0, 3e-4: 1.0}) == ">= "


def test_the_noise_is_what_ways_and_seeds_leave() -> None:
    """Against an analysis of variance by hand: rows and columns of the table less their means."""
    draws = np.random.default_rng(0)
    names = (PLAIN, "a", "b", "c")
    of_seeds = np.array([0.0, 0.5, -0.3])  # what a seed does to all alike
    table = draws.normal(2, 0.1, (4, 3)) + of_seeds
    found = Found(ways(*names), points({n: list(row) for n, row in zip(names, table, strict=True)}))
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    assert found.noise is not None
    deviation, freedom = found.noise
    assert freedom == 6
    assert deviation == pytest.approx(math.sqrt((rest**2).sum() / 6))
    # a difference of two means over three seeds
    value, low, high = found.over_seeds("a")  # type: ignore[misc]
    plain, own = table[0].mean(), table[1].mean()
    width = stats.t.ppf(0.975, freedom) * deviation * math.sqrt(2 / 3) / plain
    assert value == pytest.approx(own / plain - 1)
    assert (low, high) == pytest.approx((value - width, value + width))
    # the seed that chose the rate counts, too; at other rates it does not
    chosen = [
        {"way": n, "seed": 0, "grid": True, "rate": r, "loss": 2.2}
        for n in names
        for r in (1e-3, 3e-3)
    ]
    three = Found(ways(*names), [*found.points, *chosen])
    assert three.noise is not None
    assert three.noise[1] == 9
    value, *_ = three.over_seeds("a")  # type: ignore[misc]
    assert value == pytest.approx((own * 3 + 2.2) / (plain * 3 + 2.2) - 1)
    # one seed tells nothing of noise, nor does one way
    assert Found(ways("a", "b"), points({"a": [1.0], "b": [2.0]})).noise is None
    assert Found(ways("a"), points({"a": [1.0, 2.0]})).noise is None


def test_what_a_seed_has_not_run_is_left_out_of_the_noise() -> None:
    """A way with fewer seeds: against least squares of numpy's own on the same table."""
    losses = {PLAIN: [2.0, 2.1, 2.05], "a": [2.2, 2.28, 2.26], "b": [1.9, 2.03]}
    found = Found(ways(*losses), points(losses))
    design, values = [], []
    for n, each in enumerate(losses.values()):
        for seed, loss in enumerate(each):
            design.append([1, n == 1, n == 2, seed == 1, seed == 2])
            values.append(loss)
    _, (squares,), rank, _ = np.linalg.lstsq(np.array(design, float), np.array(values))
    assert rank == 5
    assert found.noise == (pytest.approx(math.sqrt(squares / 3)), 3)


def test_an_interval_of_a_rate_widens_with_the_noise() -> None:
    curve = [
        {
            "way": PLAIN,
            "rate": r,
            "seed": 0,
            "grid": True,
            "loss": 2 + 0.1 * math.log(r / 1e-3) ** 2,
        }
        for r in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    ]
    bounds = []
    for spread in (1e-4, 0.1):
        fresh = points({PLAIN: [2.0, 2.0 + spread, 2.0], "a": [2.0, 2.0 - spread, 2.0]})
        found = Found(ways(PLAIN, "a"), [*curve, *fresh])
        value, low, high = variants_table.interval(found.drawn_rates(PLAIN))
        assert value == pytest.approx(1e-3)
        bounds.append(high / low)
    assert bounds[0] < 1.01 < 2 < bounds[1]
    # without a noise there is no interval, and none is shown
    assert variants_table.rate_interval(Found(ways(PLAIN), curve), PLAIN) == "1.0e-3"
    assert variants_table.share((0.01, -math.inf, math.inf)) == "+1.0% (no interval)"


def test_some_ways_alone_are_trained(tmp_path: Path, trained: Trained) -> None:
    study = a_study(tmp_path, ways=[PLAIN, "nf4"])
    run_all(study)
    assert {p["way"] for p in study.points} == {PLAIN, "nf4"}
    # the rest comes later, and what is there is not made again
    count = len(study.points)
    whole = a_study(tmp_path)
    run_all(whole)
    assert whole.points[:count] == study.points
    keys = [(p["way"], p["rate"], p["seed"]) for p in whole.points]
    assert len(keys) == len({*keys}) > count


@pytest.fixture
def record() -> dict[str, Any]:
    """DoRA is better beyond doubt, NF4 as good as it can tell; the rest was not run."""
    losses = {PLAIN: [2.0, 2.01], "dora": [1.9, 1.91], "nf4": [2.0, 2.0101]}
    found = [
        *points(losses),
        *points({"full": [1.99]}, rate=1e-4, base_loss=3.0),
        *[
            {**p, "seed": 0, "grid": True}
            for p in points({PLAIN: [2.5], "full": [1.99]}, rate=2e-4)
        ],
        *[
            {**p, "seed": 0, "grid": True}
            for p in points({PLAIN: [2.1], "full": [1.97]}, rate=3e-3)
        ],
        *[
            {**p, "seed": 0, "grid": True}
            for p in points({PLAIN: [2.0], "full": [1.98], "dora": [1.9], "nf4": [2.0]})
        ],
    ]
    listed = [*ways(PLAIN, part="ranks"), *ways("full", part="full"), *ways("dora", "nf4")]
    settings = {
        "small": True, "threads": 1, "model": "m", "default_rate": 2e-4,
        "size": variants_study.asdict(SMALL) | {"dtype": "bfloat16"},
    }  # fmt: skip
    return variants_table.make_record({"gsm8k": {"ways": listed, "points": found}}, settings)


def test_the_tables_say_what_was_found(record: dict[str, Any], tmp_path: Path) -> None:
    (found,) = variants_table.found_of(record).values()
    seen = {row[0]: row[2] for row in record["rows"]}
    dora = next(text for claim, text in seen.items() if claim.startswith("DoRA"))
    assert dora.startswith("loss -5.0% [")
    assert "cannot be told apart" not in dora
    assert dora.endswith("time x1.00, memory x1.00")
    assert "cannot be told apart" in seen["a base in NF4 costs nothing"]
    assert seen["AdaLoRA is far behind"] == "not run"
    tenfold = next(text for claim, text in seen.items() if claim.startswith("LoRA's best rate"))
    assert tenfold.startswith("r 16's over whole weights': x")
    assert tenfold.endswith("(at the edge of the grid: FULL)")
    # whose best has not trained again is compared by its curve
    curves = Found(found.ways, [point for point in found.points if not point["seed"]])
    # the one at its edge, the other by the lowest point of its parabola, as numpy fits it
    fit = np.polynomial.Polynomial.fit(np.log([2e-4, 1e-3, 3e-3]), [2.5, 2.0, 2.1], 2)
    over = f"{1.97 / fit(fit.deriv().roots()[0]) - 1:+.1%}"
    assert variants_table.compared(curves, "full") == f"{over} (no interval), best of its curve"
    # two rates make no curve
    assert seen["attention alone loses at equal parameters, MLPs alone do not"] == (
        "attention not run; MLP not run"
    )
    assert len(record["rows"]) == len(variants_table.CLAIMS)
    _, rows = variants_table.seeds_table(found)
    assert rows[0] == [PLAIN.upper(), "1.0e-3", "2.0033", "3", "", "30", "1024", "2"]
    lost = f"{fit(fit.deriv().roots()[0]) / 2.5 - 1:+.1%}"
    assert re.fullmatch(
        rf"loss 2\.500 at 2\.0e-4, 1\.99\d at 1\.\de-3 \({lost} \[.*\]\)".replace("+", r"\+"),
        variants_table.passed_over(found, 2e-4),
    )
    page = variants_table.docs_section([record])
    # what nothing tried was better than stands: DoRA was, and the default rate was worse than others
    verdicts = {line.split(" | ")[0]: line.split(" | ")[-1] for line in page.splitlines()}
    assert verdicts["| variant, init_lora_weights, quantize"] == "no |"
    assert verdicts["| learning_rate"] == "no |"
    assert verdicts["| r"] == "not run |"
    assert "Before training the loss is 3.000." in page
    before = f"a\n{variants_table.PAGE.begin}old\n{study_page.END}b\n"
    marked = variants_table.PAGE.put(before, page)
    assert marked == f"a\n{variants_table.PAGE.begin}{page}{study_page.END}b\n"
    with pytest.raises(SystemExit, match="lacks the lines"):
        variants_table.PAGE.put("a page", page)
    again = {
        **record,
        "settings": {
            **record["settings"],
            "size": {**record["settings"]["size"], "dtype": "float32"},
        },
    }
    both = variants_table.label_tasks([record, again])
    assert [*both] == ["gsm8k, bfloat16", "gsm8k, float32"]
    assert "variants_study.py --dtype float32`" in variants_table.docs_section([record, again])
    variants_table.draw({label: found for label, (found, _) in both.items()}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def curves(losses: dict[str, dict[float, float]]) -> list[dict[str, Any]]:
    """Points of seed 0: {way: {rate: loss}}."""
    return [
        {"way": way, "rate": r, "seed": 0, "grid": True, "loss": loss}
        for way, curve in losses.items()
        for r, loss in curve.items()
    ]


def test_a_default_stands_where_nothing_tried_was_better() -> None:
    """At the noise of the seeds: 0.3% tells two trainings apart here, and 0.1% does not."""
    noise = points({PLAIN: [2.0, 2.001, 2.0], "dora": [2.0, 2.0, 2.001]})
    at, near = {3e-4: 2.1, 1e-3: 2.0, 3e-3: 2.1}, {3e-4: 2.1, 1e-3: 1.998, 3e-3: 2.1}
    low = {3e-4: 2.1, 1e-3: 1.98, 3e-3: 2.1}

    def verdicts(r64: dict[float, float], doubled: dict[float, float], default: float) -> list[str]:
        found = Found(
            ways(PLAIN, "r64-alpha32", "r64-alpha128", part="ranks"),
            [
                *noise,
                *curves({PLAIN: {2e-4: default} | at, "r64-alpha32": r64, "r64-alpha128": doubled}),
            ],
        )
        _, rows = variants_table.defaults_table({"gsm8k": found}, 2e-4)
        return [row[-1] for row in rows[:3]]

    assert verdicts(near, near, 2.001) == ["yes", "yes", "yes"]
    assert verdicts(low, low, 2.001) == ["no", "yes", "yes"]
    assert verdicts(at, low, 2.001) == ["yes", "no", "yes"]
    assert verdicts(at, at, 2.3) == ["yes", "yes", "no"]
    # tasks that do not agree are named
    others = points({"a": [3.0, 3.001, 3.0], "b": [3.0, 3.0, 3.001]})
    tasks = {
        task: Found(ways(PLAIN, "dora"), [*others, *curves({PLAIN: at, "dora": curve})])
        for task, curve in (("one", low), ("two", at))
    }
    (*_, last) = variants_table.defaults_table(tasks, 2e-4)[1]
    assert last[-1] == "one: no, two: yes"


def test_larger_batches_cost_what_the_one_loses_more_than_the_other() -> None:
    noise = points({PLAIN: [2.0, 2.02, 2.0], "a": [2.0, 2.0, 2.01], "b": [2.1, 2.1, 2.1]})
    grid = (3e-4, 1e-3, 3e-3)
    lowest = {"r16-batch8": 2.0, "r16-batch64": 2.2, "full-batch8": 2.5, "full-batch64": 2.6}
    found = Found(
        ways(PLAIN, "a", "b"),
        [
            *noise,
            *curves(
                {n: dict(zip(grid, (3.0, low, 3.0), strict=True)) for n, low in lowest.items()}
            ),
        ],
    )
    assert found.noise is not None
    deviation, freedom = found.noise
    # of four trainings, each a share of its own; a parabola's lowest point moves little with its neighbours
    shares = [1 / 2.0, 1 / 2.0, 1 / 2.5, 1 / 2.5]
    width = stats.t.ppf(0.975, freedom) * deviation * math.hypot(*shares)
    text = variants_table.batch_effect(found)
    assert text.startswith("LoRA +10.0% [")
    assert "; whole weights +4.0% [" in text
    (share,) = re.findall(r"; the one less the other \+6.0% \[([+-][\d.]+)%", text)
    assert float(share) / 100 == pytest.approx(0.06 - width, rel=0.03)


def test_the_page_is_what_the_record_says() -> None:
    records = variants_table.PAGE.find_records(ROOT)
    page = (ROOT / "docs/choosing.md").read_text()
    assert variants_table.PAGE.put(page, variants_table.docs_section(records)) == page
    assert (ROOT / "docs" / variants_table.PICTURE).is_file()
    for record in records:
        columns, rows = variants_table.claims_table(variants_table.found_of(record))
        assert (record["columns"], record["rows"]) == (columns, rows)
