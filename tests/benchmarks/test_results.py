"""docs/results.md says what the records say: ratios, refusals, targets missed, and where Lorry
loses.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import plots
import pytest
import records
import results

MACHINE: dict[str, Any] = dict.fromkeys(("torch", "transformers", "peft", "lorry", "python"), "1.0")
MACHINE |= {"cpu": "a CPU", "cores": 2, "trl": None}


def row(speed: float, memory: float, against: tuple[float, float] | None) -> dict[str, Any]:
    return {
        "tokens_per_second": speed,
        "quartiles": [speed - 1, speed + 1],
        "memory_bytes": memory * 2**30,
        "warmup_seconds": [3.0, 2.0],
        "share_of_matrix_rate": 0.4,
        "lorry": against
        and {
            "speed": against[0],
            "cpu_speed": against[0],
            "memory": against[1],
            "interval": [against[0] - 0.1, against[0] + 0.1],
        },
    }


@pytest.fixture
def record() -> dict[str, Any]:
    table = {
        "lorry": row(600, 1.0, (1.0, 1.0)),
        "peft": row(200, 3.0, (3.0, 0.33)),
        "peft-bf16": row(400, 0.8, (1.5, 1.25)),
        "forward": row(2000, 0.5, (0.3, 2.0)),
    }
    return {
        "kind": "sft",
        "case": {"model": "m", "length": 1024, "rank": 16, "threads": 1, "steps": 3},
        "rounds": 2,
        "clean": True,
        "date": "2026-11-22T08:00:00+00:00",
        "command": "python benchmarks/sft.py",
        "machine": MACHINE,
        "isa": {"name": "amx", "held": False, "bfloat16": True, "libraries": {"ATen": "AVX512"}},
        "highest_load": 1.0,
        "says": {e: f"engine {e}" for e in (*table, "trl")},
        "anchors": ["forward"],
        "refused": {"trl": "another loss"},
        "gates": {
            "lorry": {"cosine": 0.9995, "control_cosine": 0.9994, "refused": None},
            "peft-bf16": {"cosine": 0.9989, "control_cosine": 0.9994, "refused": None},
        },
        "table": table,
    }


def test_the_page_tells_ratios_refusals_and_targets(record: dict[str, Any]) -> None:
    text = results.page({"one": record}, {"one": "results/one.png"})
    assert (
        "| engine peft | 200 | 199 to 201 | 40% | 3.00 | 3.00x (2.90 to 3.10) | 0.33x | 3, 2 |"
        in text
    )
    assert "Refused: engine trl: another loss." in text
    assert "at least 3.0x PEFT's default (amx on a-cpu, 1 thread) | 3.00 | yes" in text
    assert (
        "at least 2.7x the strongest peer, peft-bf16 (amx on a-cpu, 1 thread) | 1.50 | no" in text
    )
    assert "at least 0.5 of the matrix rate (amx on a-cpu, 1 thread) | 0.40 | no" in text
    assert "Not above 0.999, let through by the control: engine peft-bf16 (0.99890)." in text
    assert "results/one.png" in text


def test_where_we_lose_is_computed(record: dict[str, Any]) -> None:
    said = results.losses({"one": record})
    assert (
        "- more memory than engine peft-bf16 (Packed text: 1024 tokens, rank 16, 1 thread, amx on a-cpu): 1.25x"
        in said
    )
    assert "forward" not in said  # nobody can train faster than by not training
    won = copy.deepcopy(record)
    won["table"]["peft-bf16"]["lorry"]["memory"] = 0.9
    assert "In none of the 2 comparisons" in results.losses({"one": won})
    won["table"]["peft"]["lorry"]["speed"] = 0.95
    assert "- slower than engine peft (" in results.losses({"one": won})


def test_a_record_under_load_says_so(record: dict[str, Any]) -> None:
    assert "Not clean" not in results.story(record)
    assert "**Not clean**: the load went up to 5.0 on 2 cores" in results.story(
        {**record, "clean": False, "highest_load": 5.0}
    )
    assert "5.0 on 2 cores while this was measured, of which other programs had 1.7." in (
        results.story({**record, "clean": False, "highest_load": 5.0, "others_cores": 1.7})
    )


def test_each_processor_has_its_own_lines_and_targets(record: dict[str, Any]) -> None:
    """Records from before sets were named are of all that their processor had."""
    held = copy.deepcopy(record)
    held["isa"] |= {"name": "avx2", "held": True, "bfloat16": False}
    held["table"]["peft-float32"] = row(250, 2.0, (2.4, 0.5))
    held["says"]["peft-float32"] = "engine peft-float32"
    old = copy.deepcopy(record)
    del old["isa"]
    old["machine"] = {**MACHINE, "cpu": "a CPU (avx512_bf16, avx512f, avx2)"}
    found = records.by_processor([held, old, record])
    assert list(found) == ["cpu-a-cpu-amx", "cpu-a-cpu-avx512_bf16", "cpu-a-cpu-avx2"]
    other = {**record, "machine": {**MACHINE, "cpu": "AMD EPYC, family 26, model 2 (avx2)"}}
    assert list(records.by_processor([record, other])) == ["cpu-a-cpu-amx", "cpu-amd-26-2-amx"]
    picture = {"sweep-cpu-a-cpu-avx2": "results/s.png"}
    text = results.page({"held": held, "old": old, "new": record}, picture)
    assert "![Lengths and ranks, cpu-a-cpu-avx2](results/s.png)" in text
    assert "### avx2: a CPU" in text
    assert "### avx512_bf16: a CPU (avx512_bf16, avx512f, avx2)" in text
    # without bfloat16, PEFT as it comes is the faster of its two formats
    assert "| 1024 | 16 | 1 | 600 | peft-float32 | 2.40x (2.30 to 2.50) | 0.50x |" in text
    assert "at least 2.5x PEFT's default (avx2 on a-cpu, 1 thread) | 2.40 | no" in text
    assert (
        "memory at 1024 tokens, at most 0.45x PEFT's default (avx512_bf16 on a-cpu, 1 thread)"
        in text
    )
    assert "Held to avx2 (ATen: AVX512)." in text
    assert text.count("Held to") == 1
    assert text.count("base in float32 or bf16") == 1


def test_other_benchmarks_may_add_a_table(record: dict[str, Any]) -> None:
    text = results.page(
        {
            "one": record,
            "gen": {"title": "Generation", "columns": ["a"], "rows": [[1]]},
            "x": {"kind": "?"},
        },
        {},
    )
    assert "## Generation\n" in text
    assert "| 1 |" in text


def test_a_table_of_two_processors_names_each(record: dict[str, Any]) -> None:
    table = {"title": "Generation", "columns": ["a"], "rows": [[1]]}
    kept = {
        name: {**table, "machine": {**MACHINE, "cpu": cpu}, "isa": record["isa"]}
        for name, cpu in (("x", "a CPU (avx2)"), ("y", "AMD EPYC, family 26, model 2 (avx2)"))
    }
    text = results.page(kept, {})
    assert "## Generation, amx on a-cpu\n" in text
    assert "## Generation, amx on amd-26-2\n" in text


def test_plots_are_drawn(record: dict[str, Any], tmp_path: Path) -> None:
    longer = copy.deepcopy(record)
    longer["case"]["length"] = 2048
    curve = {
        "kind": "curve",
        "window": 2,
        "losses": {"peft-1": [3.0, 2.0, 1.0], "lorry-1": [3.0, 2.1, 1.0]},
    }
    made = plots.draw({"one": record, "two": longer, "curve": curve, "other": {}}, tmp_path)
    assert set(made) == {"one", "two", "curve", "sweep-cpu-a-cpu-amx"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made.values())
