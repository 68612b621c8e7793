"""Rates of this machine: which machine they are of, what is believed, and what a damaged file is
worth.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorry import processor
from lorry.disk.durable import DiskError
from lorry.plan import machine, rates
from lorry.plan.rates import KnownRates, RateMeasurement, RunRate

A: dict[str, Any] = {"host": "a", "threads": 1}
EARLY, LATE = "2026-01-01T10:00:00+00:00", "2026-01-02T10:00:00+00:00"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path))
    return tmp_path


def matrix(rate: float, at: str = EARLY, waited: float | None = 0.0) -> RateMeasurement:
    return RateMeasurement(rate=rate, at=at, repeats=40, load=1.5, waited=waited)


def run(rate: float, at: str = LATE, waited: float | None = 0.0, **changes: Any) -> RunRate:
    given = {"model": "m", "parameters": 10**8, "tokens": 512, "path": "fused", **changes}
    return RunRate(rate=rate, at=at, repeats=20, load=1.5, waited=waited, **given)


def test_what_is_kept_is_found_by_its_machine_alone() -> None:
    b = {**A, "host": "b"}
    rates.keep_matrix_rate(A, matrix(1e12))
    rates.keep_matrix_rate(b, matrix(2e12))
    rates.keep_run_rate(A, run(3e11))
    assert rates.read_known_rates(A) == KnownRates(matrix(1e12), [run(3e11)])
    assert rates.read_known_rates(b) == KnownRates(matrix(2e12), [])
    assert rates.read_known_rates({**A, "threads": 2}) == KnownRates()


def test_a_busy_rate_gives_way_to_a_better_one_and_to_a_quiet_one() -> None:
    assert rates.keep_matrix_rate(A, matrix(4e11, waited=0.7)).rate == 4e11
    assert rates.keep_matrix_rate(A, matrix(1e11, LATE, waited=0.7)).rate == 4e11
    assert rates.keep_matrix_rate(A, matrix(5e11, LATE, waited=0.7)).rate == 5e11
    # quiet: that is what the machine does
    assert rates.keep_matrix_rate(A, matrix(4.5e11, LATE)).rate == 4.5e11
    assert rates.keep_matrix_rate(A, matrix(1e11, LATE, waited=0.7), instead=True).rate == 1e11
    assert rates.read_known_rates(A).matrix == matrix(1e11, LATE, waited=0.7)


@pytest.mark.parametrize(
    ("known", "trusted"),
    [
        (KnownRates(), False),
        (KnownRates(matrix(1e12)), True),
        (KnownRates(matrix(1e12, waited=None)), True),
        (KnownRates(matrix(1e12, waited=0.5)), False),
        (KnownRates(matrix(1e12), [run(3.5e11)]), True),  # the usual share
        (KnownRates(matrix(1e12), [run(1.2e12)]), False),  # faster than the machine
        (
            KnownRates(matrix(8e10), [run(3.5e11, waited=0.6)]),
            False,
        ),  # ... even on a busy one: 58 for 700
        (KnownRates(matrix(1e12), [run(5e10)]), False),  # far slower, in quiet
        (
            KnownRates(matrix(1e12), [run(5e10, waited=0.6)]),
            True,
        ),  # far slower because others had the cores
        (KnownRates(matrix(1e12, LATE), [run(1.2e12, EARLY)]), True),  # measured again since
    ],
)
def test_a_rate_is_believed_until_a_run_contradicts_it(known: KnownRates, trusted: bool) -> None:
    assert known.trusted({"fused": 0.35, "plain": 0.12}) is trusted


def test_runs_count_for_models_of_like_size() -> None:
    known = KnownRates(
        None,
        [
            run(3e11),
            run(4e11, waited=0.5),
            run(2e11),
            run(9e11, parameters=10**9),
            run(8e11, path="plain"),
        ],
    )
    found = known.of_runs(2 * 10**8, 8192, "fused", quiet=True)
    assert (found.rate if found else None) == 3e11
    found = known.of_runs(2 * 10**8, 8192, "fused", quiet=False)
    assert (found.rate if found else None) == 4e11
    assert known.of_runs(10**7, 512, "fused", quiet=True) is None
    assert known.of_runs(10**8, 64, "fused", quiet=True) is None


def test_only_the_newest_are_kept() -> None:
    for i in range(rates.MOST_RUNS + 3):
        rates.keep_run_rate(A, run(1e11 + i))
    assert [r.rate - 1e11 for r in rates.read_known_rates(A).runs] == list(
        range(3, rates.MOST_RUNS + 3)
    )
    for i in range(rates.MOST_MACHINES):
        rates.keep_matrix_rate({"host": i}, matrix(1e12))
    assert rates.read_known_rates(A) == KnownRates()
    assert rates.read_known_rates({"host": 0}).matrix is not None


def test_a_measurement_says_when_and_how() -> None:
    assert matrix(1e12).words("products") == "40 products on 2026-01-01 10:00 UTC, load 1.5"
    assert "the machine was busy: 70% of the time went to other programs" in matrix(
        1e12, waited=0.7
    ).words("products")


# --- files


def test_rates_of_the_first_format_are_not_believed(home: Path) -> None:
    """They were one number under a name that every Xeon shares, measured at any load."""
    (home / "rates.json").write_text('{"AMD EPYC x2 float32": 36619506275.0, "host": 1e12}')
    assert rates.read_known_rates(A) == KnownRates()
    rates.keep_matrix_rate(A, matrix(1e12))
    assert rates.read_known_rates(A).matrix == matrix(1e12)


GOOD = json.loads(
    json.dumps({"rate": 1e12, "at": EARLY, "repeats": 4, "load": None, "waited": None})
)


@pytest.mark.parametrize(
    "change",
    [
        {"rate": "fast"}, {"rate": True}, {"rate": -1}, {"rate": 0}, {"rate": 1e40}, {"rate": None}, {"repeats": 0},
        {"repeats": 1.5}, {"at": "yesterday"}, {"at": "2026-01-01T10:00:00"}, {"at": 7},
        {"load": "high"}, {"load": -1}, {"waited": True},
    ],
)  # fmt: skip
def test_what_is_no_measurement_is_left_out(change: dict[str, Any], home: Path) -> None:
    bad = {**GOOD, **change}
    runs = [
        {**bad, "model": "m", "parameters": 1, "tokens": 1, "path": "fused"},
        {**GOOD, "model": "m"},
        7,
    ]
    (home / "rates.json").write_text(
        json.dumps({"format": 2, "machines": [{"machine": A, "matrix": bad, "runs": runs}]})
    )
    assert rates.read_known_rates(A) == KnownRates(None, [])


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"format": 2}', '{"format": 2, "machines": {}}', '{"format": 2, "machines": [1]}',
        '{"format": 3, "machines": []}', '{"format": 2, "machines": [{"machine": 1e999}]}',
    ],
)  # fmt: skip
def test_a_damaged_file_counts_as_empty(text: str, home: Path) -> None:
    (home / "rates.json").write_text(text)
    assert rates.read_known_rates(A) == KnownRates()
    rates.keep_run_rate(A, run(1e11))
    assert rates.read_known_rates(A).runs == [run(1e11)]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_file_that_cannot_be_read_is_not_empty(
    code: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates.keep_run_rate(A, run(1e11))
    whole, real = (home / "rates.json").read_bytes(), os.open

    def failing(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(str(path)) == home / "rates.json":
            raise OSError(code, os.strerror(code))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    for call in (
        lambda: rates.read_known_rates(A),
        lambda: rates.keep_run_rate(A, run(2e11)),
        lambda: rates.keep_matrix_rate(A, matrix(1e12)),
    ):
        with pytest.raises(DiskError) as failed:
            call()
        assert (failed.value.exit_code, failed.value.errno) == (74, code)
    monkeypatch.undo()
    assert (home / "rates.json").read_bytes() == whole


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", EARLY, "fused"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["machine", "matrix", "runs", "rate", "at", "repeats", "host"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(value=json_values)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=50,
)
def test_no_file_stops_a_plan(value: Any, home: Path) -> None:
    (home / "rates.json").write_text(
        json.dumps(
            {"format": 2, "machines": [value, {"machine": A, "matrix": value, "runs": value}]}
        )
    )
    found = rates.read_known_rates(A)
    assert found.matrix is None or found.matrix.rate > 0


# --- this machine


CPU = """processor : 0
vendor_id : GenuineIntel
cpu family : 6
model : {model}
model name : Intel Xeon Processor
stepping : 1
flags : {flags}
"""


def identity(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    model: int = 143,
    flags: str = "avx2 amx_tile amx_bf16",
) -> Any:
    (tmp_path / "cpuinfo").write_text(CPU.format(model=model, flags=flags))
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    return machine.machine_identity("cpu", "bfloat16", None)


def test_machines_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one = identity(tmp_path, monkeypatch)
    assert one == identity(tmp_path, monkeypatch) == json.loads(json.dumps(one))
    seen = [
        one,
        identity(tmp_path, monkeypatch, model=85),
        identity(tmp_path, monkeypatch, flags="avx2"),
    ]
    seen += [
        machine.machine_identity("cpu", "float32", None),
        machine.machine_identity("cpu", "bfloat16", 1),
    ]
    for patch, value in (
        ("node", "elsewhere"),
        ("available_threads", 128),
        ("torch_version", "9.9"),
        ("attention_kernel", "another"),
    ):
        with monkeypatch.context() as m:
            m.setattr(
                machine.platform if patch == "node" else machine, patch, lambda value=value: value
            )
            seen.append(identity(tmp_path, monkeypatch))
    with monkeypatch.context() as m:
        # the other of the two, whatever this machine has
        other, narrow = not machine.has_matmul(), machine.machine_identity("cpu", "bfloat16", 1)
        m.setattr(machine, "has_matmul", lambda: other)
        seen.append(machine.machine_identity("cpu", "float32", None))
        assert machine.machine_identity("cpu", "bfloat16", 1) == narrow
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen.append(identity(tmp_path, monkeypatch))
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
