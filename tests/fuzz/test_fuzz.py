"""The kept findings of `make fuzz`, a few inputs of every target, and a proof that a finding is
found.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lorry.errors import DataError
from tests.fuzz import campaign
from tests.fuzz.campaign import CASES, Tally, attempt, execute, made
from tests.fuzz.targets import Target, targets

KNOWN = targets()
FEW = 12  # inputs of each target that the suite tries; `make fuzz` tries thousands
KEPT = sorted(path for path in CASES.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_finding_of_the_past_is_read_or_refused(path: Path) -> None:
    target = next(
        target for name, target in KNOWN.items() if name.replace("/", "-") == path.parent.name
    )
    execute(target, path.read_bytes())


@pytest.mark.parametrize("name", KNOWN)
def test_sound_inputs_are_read_and_damaged_ones_read_or_refused(name: str) -> None:
    target, tally = KNOWN[name], Tally()
    assert [execute(target, seed) for seed in target.seeds()] == [False] * len(target.seeds())
    for number in range(FEW):
        attempt(target, 0, number, tally, None)
    assert tally.findings == {}


def _careless(data: bytes, folder: Path) -> None:
    if data.endswith(b"refuse"):
        raise DataError("rows:1: refused")
    if b"\xff" in data:
        raise KeyError("a reader's own mistake")


def test_what_a_reader_lets_through_is_found_once_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, tally = Target("careless", lambda: [b"sound" * 10], _careless), Tally()
    assert execute(target, b"please refuse")
    for number in range(400):
        attempt(target, 0, number, tally, tmp_path)
    [(place, path)] = tally.findings.items()
    assert place.startswith("KeyError at ")
    assert b"\xff" in path.read_bytes()
    assert tally.executions == 400
    assert 'KeyError: "a reader\'s own mistake"' in capsys.readouterr().out


def test_an_input_follows_from_its_numbers() -> None:
    target = KNOWN["rows/json"]
    assert [made(target, 1, n) for n in range(20)] == [made(target, 1, n) for n in range(20)]
    assert [made(target, 1, n) for n in range(5, 20)] != [made(target, 2, n) for n in range(5, 20)]


def test_an_input_that_takes_too_long_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "SECONDS", 0.05)

    def endless(data: bytes, folder: Path) -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:  # noqa: BLE001 - a reader that takes every error for damage of its file
                continue

    tally = Tally()
    attempt(Target("endless", lambda: [b""], endless), 0, 0, tally, None)
    assert [place.split(" at ")[0] for place in tally.findings] == ["TooSlow"]
