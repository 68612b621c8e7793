"""`lorry doctor`: the machine; a run's contracts as recorded, and its files as they are now."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorry.kernels import matmul
from tests.support.verbworld import World, lorry


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.run, tmp_path / "people"))


def test_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "c"))
    assert lorry("doctor") == 0
    out = capsys.readouterr().out
    for fact in (
        platform.python_version(),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        "embedded model",
        "float32 products",
        matmul.float32_library()[:15],  # the table breaks lines
        "bfloat16 products",
        matmul.bfloat16_library()[:15],
        "peft",
        "(LORRY_HOME)",
    ):
        assert fact in out


def test_a_sound_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lorry("doctor", run) == 0
    out = capsys.readouterr().out
    assert out.count("✓ held") == 7
    assert "6. checkpoints are complete" in out
    assert "1 intact (SHA-256 as in receipt.json)" in out
    assert "native (llama), float32 on cpu" in out


def flip(run: Path) -> None:
    weights = run / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def fail(run: Path) -> None:
    contracts = json.loads((run / "contracts.json").read_text())
    contracts[2]["status"] = "failed"
    (run / "contracts.json").write_text(json.dumps(contracts))


def cut_metrics(run: Path) -> None:
    """In the middle of the line before the last."""
    path = run / "metrics.jsonl"
    *before, short, _ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + short[: len(short) // 2])


def lose_a_line(run: Path) -> None:
    path = run / "metrics.jsonl"
    first, _, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"".join(rest))


def change_receipt(run: Path) -> None:
    (run / "receipt.json").write_text('{"adapters": 3}')


@pytest.mark.parametrize(
    ("harm", "code", "message"),
    [
        (fail, 5, "✗ failed"),
        (flip, 4, "is not the file that this run wrote: its SHA-256 differs"),
        (
            lambda run: (run / "adapter_model.safetensors").unlink(),
            4,
            "is missing, and receipt.json lists it",
        ),
        (cut_metrics, 3, "the line has no end, although the run finished"),
        (lose_a_line, 3, "lines of training (step 2 first), although the run finished"),
        (lambda run: (run / "metrics.jsonl").write_text(""), 3, "(step 1 first), although the run"),
        (lambda run: (run / "metrics.jsonl").unlink(), 3, "metrics.jsonl"),
        (change_receipt, 3, "'adapters' is not valid in a receipt"),
        (lambda run: (run / "contracts.json").write_text("{"), 3, "contracts.json:1: not JSON"),
        (shutil.rmtree, 3, "no such run directory"),
    ],
)
def test_what_is_wrong_with_a_run(
    harm: Callable[[Path], None],
    code: int,
    message: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(run)
    assert lorry("doctor", run) == code
    out, err = capsys.readouterr()
    assert message in " ".join((out + err).split())


def test_a_report_of_a_run_that_lost_a_line_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorry("report", run) == 0
    assert "warning" not in capsys.readouterr().err
    lose_a_line(run)
    assert lorry("report", run) == 0
    assert "lines of training (step 2 first)" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_never_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("receipt.json", "contracts.json"):
        (run / name).unlink()
    assert lorry("doctor", run) == 0
    out = capsys.readouterr().out
    assert "no contracts.json: the run did not start" in out
    assert "no receipt.json, so there is nothing to compare with" in out
    assert "unknown: no receipt.json" in out


def test_a_writer_that_was_killed_in_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("receipt.json", "contracts.json"):
        (run / name).unlink()
    cut_metrics(run)
    number = len((run / "metrics.jsonl").read_bytes().splitlines())
    assert lorry("doctor", run) == 0
    told = "".join(capsys.readouterr().out.split())
    assert f"metrics.jsonl:{number}:thelinehasnoend" in told.replace("│", "")


def test_a_model_is_no_run(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert lorry("doctor", world.base) == 3
    assert "not a run directory" in capsys.readouterr().err
