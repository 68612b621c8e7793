"""The comparison of unlearning engines: honest ones agree with PEFT in float64, and
one that computes something else is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gates
import pytest
import torch
import unlearn
import unlearners
from case import IGNORED, Row, read_rows, write_rows
from measure import Watch
from safetensors.torch import load_file, save_file
from unlearners import ALTERNATE, FORGET, RETAIN, UnlearnCase

from lorry import kernels
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.peft.files import save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.models.loading.load import load_model

WIDTH = 64

needs_kernels = pytest.mark.skipif(
    not kernels.kernel_status().active,
    reason=f"Lorry's kernels do not run here: {kernels.kernel_status().reason}",
)


def ragged_rows(count: int) -> list[Row]:
    """A prompt that is not learnt, an answer that is, of no common length."""
    rows = []
    for number in range(count):
        ids = torch.randint(WIDTH, (9 + 3 * number,)).tolist()
        prompt = 4 + number % 2
        rows.append((ids, [IGNORED] * prompt + ids[prompt:]))
    return rows


@pytest.fixture(scope="module")
def folder(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows of each role a step, an adapter near its start."""
    made = tmp_path_factory.mktemp("unlearn")
    shutil.copytree(tiny_files / "base", made / "base")
    model = load_model(str(made / "base"), dtype="bfloat16", add_note=print).model
    attach(model, LoraSpec(r=4, lora_alpha=8, init_lora_weights=False, layers_to_transform=(0,)))
    for name, values in get_bank(model)["default"].tensors().items():
        values.data.mul_(0.2 if name.endswith("lora_B") else 1)
    save_adapter(model, made / "init")
    unlearn.write_direction(made, WIDTH)
    torch.manual_seed(1)
    for role in (FORGET, RETAIN, ALTERNATE):
        (made / role).mkdir()
        write_rows(made / role, ragged_rows(4))
    return made


@pytest.fixture
def case() -> UnlearnCase:
    return UnlearnCase(
        rank=4, alpha=8, rows_per_step=2, warmup=1, steps=1, layer=0, dtype="float32"
    )


def measured(folder: Path, case: UnlearnCase, engine: str, copy: Path | None = None) -> Any:
    """One engine's run, and what is said of it. ``copy``: the folder that the engine itself reads."""
    rows = unlearners.read_roles(copy or folder)
    if case.method != "DPO":
        rows = {role: own for role, own in rows.items() if role != ALTERNATE}
    every = [row for own in rows.values() for row in own]
    watch = Watch(folder, engine, {tuple(ids): n for n, (ids, _) in enumerate(every)})
    unlearn.ENGINES[engine]()(copy or folder, case, rows, watch)
    run = {"losses": watch.losses, "first_rows": sorted(watch.first_rows)}
    return unlearn.judge(folder, case, engine, run, unlearn.truth(folder, case))


@needs_kernels
@pytest.mark.parametrize("method", sorted(unlearners.METHODS))
def test_honest_engines_pass(
    method: str, folder: Path, case: UnlearnCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_MALLOC", "0")  # not for the process of all the other tests
    own = replace(case, method=method)
    for engine in unlearn.engines_of(method, list(unlearn.ENGINES)):
        found = measured(folder, own, engine)
        assert found["refused"] is None, engine
        if engine in (*unlearn.OURS, "peft-copy"):
            assert found["gradient_error"] < 1e-5, engine


@needs_kernels
@pytest.mark.parametrize("engine", ["lorry-live", "peft-off"])
def test_rounding_to_bfloat16_is_allowed_for(
    engine: str, folder: Path, case: UnlearnCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_MALLOC", "0")
    found = measured(folder, replace(case, dtype="bfloat16"), engine)
    assert found["refused"] is None
    assert found["gradient_error"] > 1e-4  # it did compute in bfloat16


def shift_labels(copy: Path) -> None:
    rows = read_rows(copy / FORGET)
    write_rows(copy / FORGET, [(ids, [IGNORED, *labels[2:], labels[-1]]) for ids, labels in rows])


def swap_roles(copy: Path) -> None:
    (copy / FORGET).rename(copy / "other")
    (copy / RETAIN).rename(copy / FORGET)
    (copy / "other").rename(copy / RETAIN)


@pytest.mark.parametrize("spoil", [shift_labels, swap_roles])
def test_another_computation_is_refused(
    spoil: Callable[[Path], None], folder: Path, case: UnlearnCase, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil(copy)
    assert measured(folder, case, "peft-copy", copy)["refused"]


def test_another_strength_is_refused(
    folder: Path, case: UnlearnCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = unlearn.truth(folder, case)
    monkeypatch.setattr(unlearn, "truth", lambda folder, case: expected)
    monkeypatch.setattr(unlearners, "BETA", 0.2)
    assert "loss" in measured(folder, case, "peft-off")["refused"]


def test_the_weaker_term_must_be_right_too(folder: Path, case: UnlearnCase) -> None:
    """An error that is small beside the whole gradient is not where one term is as small."""
    expected = unlearn.truth(folder, case)
    right = load_file(folder / f"{gates.REFERENCE}.safetensors")
    save_file({n: g * (1 + 1e-4) for n, g in right.items()}, folder / "near.safetensors")
    run = {"losses": [expected["loss"]]}
    assert unlearn.judge(folder, case, "near", run, expected)["refused"] is None
    weak = {**expected, "parts": {FORGET: 1e-3, RETAIN: 1.0}, "control_error": 0.0}
    assert "wrong forget term" in unlearn.judge(folder, case, "near", run, weak)["refused"]


def one(engine: str, number: int, seconds: float, memory: int) -> dict[str, Any]:
    same = {"wall": [seconds] * 2, "cpu": [seconds] * 2, "tokens": [100, 120], "load": [5.0, 4.0]}
    return {"engine": engine, "round": number, "memory_bytes": memory, "losses": [1.0], **same}


def test_the_record_says_ratios_targets_and_load(case: UnlearnCase) -> None:
    runs = [
        made
        for number, slow in enumerate((1.0, 4.0))  # the machine slows down, the ratios stay
        for made in (
            one("lorry-live", number, slow, 44),
            one("peft-copy", number, 4 * slow, 100),
            one("lorry-sft", number, 0.5 * slow, 40),
        )
    ]
    methods = {
        "NPO": {"runs": runs, "refused": {"full": "it fell"}, "table": unlearn.table(runs, case)}
    }
    record = unlearn.record_of(methods, case, 2)
    met = {(goal["against"], goal["what"]): goal["met"] for goal in record["targets"]}
    assert met == {
        ("peft-copy", "speed"): True,
        ("peft-copy", "memory"): False,
        ("lorry-sft", "memory"): True,
    }
    peer = next(row for row in record["rows"] if row[1] == unlearn.SAYS["peft-copy"])
    assert peer[5:] == ["4.00x", "0.44x", "", ""]
    assert "**Not clean**: the load went up to 5.0" in record["text"]
    assert "it fell" in record["text"]
