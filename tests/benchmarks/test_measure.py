"""The floor formula against hand-worked numbers, the ratios, the table, and how batches are taken
apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import curve
import isa
import measure
import pytest
import torch
import trainers
import turns
from case import Case

from lorry import processor

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
QWEN3 = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
LLAMA3 = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def shape(folder: Path, config: dict[str, int]) -> measure.Shape:
    (folder / "config.json").write_text(json.dumps(config))
    return measure.Shape.of(folder)


@pytest.mark.parametrize(
    ("config", "lora", "full"), [(SMOLLM2, 814, 1055), (QWEN3, 3267, 4398), (LLAMA3, 32149, 46907)]
)
def test_the_floor_is_what_was_worked_out_by_hand(
    tmp_path: Path, config: dict[str, int], lora: int, full: int
) -> None:
    found = shape(tmp_path, config)
    assert found.flops("lora", 2048, 16) / 1e6 == pytest.approx(lora, rel=0.0015)
    assert found.flops("full", 2048, 16) / 1e6 == pytest.approx(full, rel=0.0015)


def test_the_parts_of_smollm2(tmp_path: Path) -> None:
    found = shape(tmp_path, SMOLLM2)
    assert found.weights / 1e6 == pytest.approx(106.2 + 28.3, abs=0.1)
    assert found.adapter(16) / 1e6 == pytest.approx(4.88, abs=0.01)
    assert found.adapter(64) == 4 * found.adapter(16)
    assert found.flops("forward", 2048, 16) + 2 * found.adapter(16) == pytest.approx(
        350e6, rel=0.005
    )


def run(engine: str, turn: int, seconds: list[float], memory: int = 100) -> dict[str, Any]:
    return {
        "engine": engine,
        "round": turn,
        "wall": seconds,
        "cpu": seconds,
        "tokens": [100] * len(seconds),
        "warmup_seconds": 1.0,
        "supervised": [50] * len(seconds),
        "memory_bytes": memory,
        "matrix_rate": 1e9,
    }


def test_a_ratio_is_the_median_of_rounds_not_a_ratio_of_medians(tmp_path: Path) -> None:
    """The machine slows down from round to round; within a round the peer is always twice as slow."""
    runs = [
        r
        for n, s in enumerate((1.0, 3.0, 9.0))
        for r in (run("lorry", n, [s, s, s * 5], 50), run("peft", n, [2 * s] * 3))
    ]
    row = turns.table(runs, Case(), shape(tmp_path, SMOLLM2))["peft"]
    assert row["lorry"]["speed"] == pytest.approx(2)
    low, high = row["lorry"]["interval"]
    assert 2 * 0.2 <= low <= 2 <= high <= 2 * 1.0001
    assert row["lorry"]["memory"] == pytest.approx(0.5)


def test_an_interval_is_as_wide_as_rounds_differ() -> None:
    """Ratios of 1.9 to 2.1 in steps that are all alike: nothing outside them, nothing narrower than
    what three of five rounds say.
    """
    pairs = [
        (run("lorry", n, [1.0] * 3), run("peft", n, [ratio] * 3))
        for n, ratio in enumerate((1.9, 1.95, 2.0, 2.05, 2.1))
    ]
    assert turns.interval(pairs, "sft") == pytest.approx((1.9, 2.1))
    assert turns.interval(pairs[:1] * 5, "sft") == pytest.approx((1.9, 1.9))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")
def test_what_other_programs_have_is_seen_and_what_children_have_is_not() -> None:
    """Only differences can be told on a machine that others use."""
    busy = "import time; until = time.process_time() + 0.5\nwhile time.process_time() < until: pass"
    child = measure.Others()
    subprocess.run([sys.executable, "-c", busy], check=True)
    _, taken, own = (b - a for a, b in zip(child._began, measure.Others._now(), strict=True))
    assert own >= 0.5
    assert taken >= own - 0.1
    other = measure.Others()
    started = subprocess.Popen([sys.executable, "-c", busy])
    os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)  # not yet counted as ours
    assert other.cores() > 0.1
    started.wait()


@pytest.mark.parametrize("name", isa.ISAS)
def test_every_library_has_a_switch(name: str) -> None:
    found = isa.switches(name)
    assert set(found) == {"LORRY_ISA", *isa.VARIABLES}
    assert found["LORRY_ISA"] == name


def test_nothing_is_held_once_torch_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="torch has started already and cannot be held to avx2"):
        isa.hold_to("avx2")
    assert isa.hold_to(None) is None
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(isa.os, "environ", isa.os.environ.copy())
    monkeypatch.setattr(processor, "processor_isas", lambda: ("portable",))
    with pytest.raises(SystemExit, match="LORRY_ISA='avx2' in the environment: this processor"):
        isa.hold_to("avx2")


def test_chat_counts_all_steps_together() -> None:
    assert turns.speed(run("trl", 0, [1.0, 1.0, 8.0]), "wall", "sft") == pytest.approx(100)
    assert turns.speed(run("trl", 0, [1.0, 1.0, 8.0]), "wall", "chat") == pytest.approx(30)


def test_batches_are_taken_apart_again() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert trainers.split({"input_ids": ids, "attention_mask": mask}) == [[5, 6, 7], [8, 9]]
    packed = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
    }
    assert trainers.split(packed) == [[5, 6, 7], [8, 9]]


def test_memory_is_this_programs_own() -> None:
    before = measure.peak_rss()
    held = torch.ones(8 << 20)
    assert measure.rss() > held.numel() * 4
    assert measure.peak_rss() >= max(before, measure.rss() - (1 << 20))


def test_a_curve_outside_the_band_is_seen() -> None:
    peers = [[3.0 - 0.01 * n + 0.1 * seed for n in range(60)] for seed in range(3)]
    assert curve.judge([loss + 0.01 for loss in peers[0]], peers)["inside"]
    assert not curve.judge([loss + 0.5 for loss in peers[0]], peers)["inside"]
    assert not curve.judge([loss - 0.5 for loss in peers[0]], peers)["inside"]
