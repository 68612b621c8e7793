"""The gates let right engines through and refuse wrong ones: each fault here is made on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import engines
import gates
import pytest
import torch
import turns
from case import IGNORED, Case, Row, read_rows, write_rows
from engines import Entry
from measure import Watch
from safetensors.torch import load_file

from lorry import kernels


@pytest.fixture(scope="module")
def tiny(tiny_files: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The case and its reference for the first row."""
    return tiny_files, gates.reference(tiny_files, read_rows(tiny_files), [[0]])


def verdict(
    tiny: tuple[Path, list[dict[str, Any]]], engine: str, folder: Path | None = None
) -> dict[str, Any]:
    """Run an engine, perhaps on a folder that was tampered with, and judge it by the reference of
    the true one.
    """
    true, truths = tiny
    run = turns.work(engine, folder or true)
    if folder is not None:
        shutil.copy(folder / f"{engine}.safetensors", true)
    found: dict[str, Any] = gates.judge_all(true, {engine: run}, truths, set())[engine]
    return found


@pytest.fixture
def copy(tiny_files: Path, tmp_path: Path) -> Path:
    """A case to tamper with."""
    return Path(shutil.copytree(tiny_files, tmp_path / "case"))


@pytest.mark.parametrize("engine", ["peft", "peft-bf16"])
def test_an_honest_engine_passes(tiny: tuple[Path, list[dict[str, Any]]], engine: str) -> None:
    found = verdict(tiny, engine)
    assert found["refused"] is None
    assert found["cosine"] > 0.99


@pytest.mark.skipif(
    not kernels.kernel_status().active,
    reason=f"Lorry's kernels do not run here: {kernels.kernel_status().reason}",
)
def test_lorry_passes(
    tiny: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_MALLOC", "0")  # not for the process of all the other tests
    assert verdict(tiny, "lorry")["refused"] is None


def test_shifted_labels_are_refused(tiny: tuple[Path, list[dict[str, Any]]], copy: Path) -> None:
    write_rows(copy, [(ids, [IGNORED, *labels[2:], labels[0]]) for ids, labels in read_rows(copy)])
    assert "cosine" in verdict(tiny, "peft", copy)["refused"]


def test_a_scaled_alpha_is_refused(tiny: tuple[Path, list[dict[str, Any]]], copy: Path) -> None:
    path = copy / "init" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16}))
    assert verdict(tiny, "peft", copy)["refused"]


def faulty(change: Callable[[dict[str, Any]], dict[str, Any]]) -> engines.Run:
    """PEFT's loop, but with the trained parameters changed."""

    def run(folder: Path, case: Case, rows: Sequence[Row], watch: Watch) -> None:
        model = gates.opened(folder, torch.bfloat16)
        params = {engines.clean(n): p for n, p in model.named_parameters() if p.requires_grad}
        engines.loop(model, change(params), case, rows, watch, lora=True)

    return run


def without_b(params: dict[str, Any]) -> dict[str, Any]:
    """B is frozen."""
    kept = {n: p for n, p in params.items() if n.endswith("lora_A")}
    for name in set(params) - set(kept):
        params[name].requires_grad_(False)
    return kept


def silent_b(params: dict[str, Any]) -> dict[str, Any]:
    """One B trains but never sees a gradient."""
    name = next(n for n in params if n.endswith("lora_B"))
    params[name].register_hook(torch.zeros_like)
    return params


@pytest.mark.parametrize(
    ("change", "why"), [(without_b, "on one side only"), (silent_b, "gradient of zero")]
)
def test_an_engine_that_does_not_train_b_is_refused(
    tiny: tuple[Path, list[dict[str, Any]]],
    change: Callable[..., Any],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(turns.ENGINES, "wrong", Entry(partial(faulty, change), "wrong on purpose"))
    assert why in verdict(tiny, "wrong")["refused"]


def test_a_doubled_gradient_is_refused(tiny: tuple[Path, list[dict[str, Any]]]) -> None:
    truth = load_file(tiny[0] / "reference-0.safetensors")
    _, reasons = gates.compare({n: 2 * g for n, g in truth.items()}, truth)
    assert reasons == ["the gradient is 2.000 times as long as the reference's"]
    assert gates.compare(truth, truth)[1] == []


def test_rounding_is_allowed_for_but_not_more() -> None:
    assert gates.allowed(0.9999) == gates.COSINE
    assert gates.allowed(0.9990) == pytest.approx(0.998)
    assert gates.allowed(0.9980) == pytest.approx(0.996)


def test_a_sequence_that_is_no_row_is_refused(tmp_path: Path) -> None:
    watch = Watch(tmp_path, "wrong", {(1, 2, 3): 0})
    watch.saw([[1, 2, 3]])
    with pytest.raises(SystemExit, match="no row of the data"):
        watch.saw([[1, 2]])


def test_the_fallback_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernels, "kernel_status", lambda: kernels.KernelStatus(False, "no compiler")
    )
    with pytest.raises(SystemExit, match="no compiler"):
        engines.fast_path()
