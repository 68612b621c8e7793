"""Layouts take turns, each in fresh processes that divide the cores; then the gates; then what came
out of it, as one JSON record (layouts.py prints it).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gates
import measure
import wire
from case import Case, read_rows
from layout_engines import LAYOUTS, RankWatch, environments
from turns import in_fresh_process

SHARE = 1.04  # of 1/N of the base that a process may hold where it is sharded: tensors filled up


def work(engine: str, folder: Path) -> dict[str, Any]:
    """One process of a layout, from its imports on."""
    import torch

    case, rows, layout = Case.load(folder), read_rows(folder), LAYOUTS[engine]
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run = layout.make()
    known = {tuple(ids): number for number, (ids, _) in enumerate(rows)}
    watch = RankWatch(folder, engine, known, rank=rank, warmup=case.warmup)
    imports = measure.rss()
    run(folder, case, rows, watch)
    peak = measure.peak_rss()
    if len(watch.wall) != case.all_steps:
        raise SystemExit(f"{engine} made {len(watch.wall)} steps and not {case.all_steps}")
    timed = slice(case.warmup, None)
    return {
        "engine": engine,
        "rank": rank,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "losses": watch.losses,
        "first_rows": watch.first_rows,
        "wall": watch.wall[timed],
        "cpu": watch.cpu[timed],
        "tokens": watch.tokens[timed],
        "supervised": watch.supervised,
        "base_bytes": watch.base_bytes,
        "sent_per_step": (wire.sent_bytes() - watch.sent_before) / case.steps,
        "imports_bytes": imports,
        "loading_bytes": watch.loading_peak - imports,
        "loaded_bytes": watch.loaded_bytes - imports,
        "memory_bytes": peak - imports,
    }


@dataclass(frozen=True)
class Turn:
    """One layout's processes of one round: what each of them told, by rank."""

    engine: str
    ranks: Sequence[Mapping[str, Any]]

    @property
    def whole(self) -> bool:
        """Whether every process tells of the whole step, and not of its own rows."""
        return LAYOUTS[self.engine].whole

    def first(self) -> dict[str, Any]:
        """The first step as one process would tell of it, for the gates."""
        if self.whole:
            return {"losses": self.ranks[0]["losses"], "first_rows": self.ranks[0]["first_rows"]}
        weights = [rank["supervised"] for rank in self.ranks]
        losses = [
            sum(rank["losses"][step] * w[step] for rank, w in zip(self.ranks, weights, strict=True))
            / sum(w[step] for w in weights)
            for step in range(len(weights[0]))
        ]
        return {
            "losses": losses,
            "first_rows": sorted(n for r in self.ranks for n in r["first_rows"]),
        }

    def speeds(self) -> list[float]:
        """Tokens per second of every timed step, of all processes; the slowest one's clock counts."""
        counted = self.ranks[:1] if self.whole else self.ranks
        return [
            sum(rank["tokens"][step] for rank in counted)
            / max(rank["wall"][step] for rank in self.ranks)
            for step in range(len(self.ranks[0]["wall"]))
        ]


def take_turn(engine: str, folder: Path, cores: int) -> Turn | str:
    """The processes of a layout, which divide the cores; where one fails, what it said last."""
    layout = LAYOUTS[engine]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, engine, str(folder)],
            env={**os.environ, **QUIET, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments(layout.processes, cores)
    ]
    try:
        said = [process.communicate(timeout=LIMIT) for process in started]
    except subprocess.TimeoutExpired:
        return f"not done after {LIMIT} seconds"
    finally:
        for process in started:
            process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(started, said, strict=True)):
        if process.returncode:
            last = [line for line in errors.splitlines() if line.strip()][-1:]
            return f"rank {rank}: exit {process.returncode}: {''.join(last)}"
    return Turn(engine, [json.loads(out.splitlines()[-1]) for out, _ in said])


LIMIT = 600.0  # seconds for one turn of one layout; a hang ends here
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


def contest(folder: Path, case: Case, engines: Sequence[str], rounds: int) -> dict[str, Any]:
    """Everything but the printing; ``refused``: the layouts of which no speed is shown, and why."""
    cores = len(os.sched_getaffinity(0))
    turns, refused = list[Turn](), dict[str, str]()
    loads = [os.getloadavg()[0]]
    for number in range(rounds):
        for engine in (e for e in engines if e not in refused):
            taken = take_turn(engine, folder, cores)
            if isinstance(taken, str):
                refused[engine] = taken
                continue
            turns.append(taken)
            loads.append(os.getloadavg()[0])
            print(f"  round {number + 1} of {rounds}, {engine} done", file=sys.stderr, flush=True)
    firsts = {turn.engine: turn.first() for turn in reversed(turns)}
    (folder / "sets.json").write_text(json.dumps(gates.first_sets(list(firsts.values()))))
    truth = in_fresh_process(gates.REFERENCE, folder, case, __file__)
    if "failed" in truth:
        raise SystemExit(f"the float32 reference failed, nothing can be checked: {truth['failed']}")
    verdicts = gates.judge_all(folder, firsts, truth["truths"], set())
    refused |= {engine: v["refused"] for engine, v in verdicts.items() if v["refused"]}
    base = measure.Shape.of(folder / "base")
    for turn in turns:
        if why := unsharded(turn, whole_base_bytes(folder)):
            refused.setdefault(turn.engine, why)
    shown = [turn for turn in turns if turn.engine not in refused]
    table = tabulate(shown, folder, case)
    return {
        "title": f"One run on several processes: {case.rows_per_step * case.length:,} tokens a step",
        "text": (
            f"{case.model}, rank {case.rank}, bf16, {cores} cores which the processes divide; median of "
            f"{rounds} rounds of {case.steps} steps. Memory: the highest resident set of the fullest "
            "process, less its imports. Sent: by one process in a step, as the kernel counts it."
        ),
        "columns": [
            "layout", "processes", "tokens/s", "against one process of its own",
            "base held by each", "memory in steps, MiB", "while loading, MiB", "sent, MiB", "planned, MiB",
        ],
        "rows": [row_of(engine, row) for engine, row in table.items()],
        "table": table,
        "case": vars(case),
        "rounds": rounds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": measure.machine(),
        "highest_load": max(loads),
        "weights": base.weights,
        "gates": verdicts,
        "refused": refused,
        "runs": [{"engine": turn.engine, "ranks": list(turn.ranks)} for turn in turns],
    }  # fmt: skip


def whole_base_bytes(folder: Path) -> int:
    """Bytes of the base as its file has them."""
    from safetensors import safe_open

    total = 0
    for file in (folder / "base").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            total += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    return total


def unsharded(turn: Turn, whole: int) -> str:
    """Why a layout that says it shards the base does not; empty where it does."""
    shards = LAYOUTS[turn.engine].shards
    held = max(rank["base_bytes"] for rank in turn.ranks)
    if held <= SHARE * whole / shards:
        return ""
    return f"a process holds {held / whole:.2f} of the base and not 1/{shards}"


def tabulate(turns: Sequence[Turn], folder: Path, case: Case) -> dict[str, dict[str, Any]]:
    """Per layout: speed with quartiles, memory and bytes of the fullest process, and the plan's."""
    rows = dict[str, dict[str, Any]]()
    whole = whole_base_bytes(folder)
    for engine in dict.fromkeys(turn.engine for turn in turns):
        mine = [turn for turn in turns if turn.engine == engine]
        speeds = [speed for turn in mine for speed in turn.speeds()]
        fullest = [max(turn.ranks, key=lambda rank: rank["memory_bytes"]) for turn in mine]
        low, middle, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3
        rows[engine] = {
            "processes": LAYOUTS[engine].processes,
            "tokens_per_second": middle,
            "quartiles": [low, high],
            "memory_bytes": statistics.median(rank["memory_bytes"] for rank in fullest),
            "loading_bytes": statistics.median(
                max(rank["loading_bytes"] for rank in turn.ranks) for turn in mine
            ),
            "base_share": max(r["base_bytes"] for turn in mine for r in turn.ranks) / whole,
            "sent_per_step": statistics.median(
                max(rank["sent_per_step"] for rank in turn.ranks) for turn in mine
            ),
            "planned": planned(engine, folder, case),
        }
    for engine, row in rows.items():
        alone = LAYOUTS[engine].alone
        row["against_one"] = ratio(turns, engine, alone) if alone in rows else None
    return rows


def ratio(turns: Sequence[Turn], engine: str, alone: str) -> float:
    """A layout's speed over that of one process with all threads, by rounds, then the median."""
    speeds = {
        name: [statistics.median(turn.speeds()) for turn in turns if turn.engine == name]
        for name in (engine, alone)
    }
    return statistics.median(a / b for a, b in zip(speeds[engine], speeds[alone], strict=False))


def planned(engine: str, folder: Path, case: Case) -> dict[str, int] | None:
    """`lorry plan` of one of Lorry's layouts: memory above imports, and bytes sent in a step; None for
    the others.
    """
    split = LAYOUTS[engine].split
    if split is None:
        return None
    from lorry.config.schema.lora import LoraConfig
    from lorry.plan import machine
    from lorry.plan.adapters import plan_adapter
    from lorry.plan.memory import MemorySetup
    from lorry.plan.parallel.communication import step_collectives
    from lorry.plan.parallel.per_rank import memory_per_rank
    from lorry.plan.shapes import read_model_shape

    shape = read_model_shape(json.loads((folder / "base" / "config.json").read_text()))
    tokens = case.rows_per_step * case.length // split.data
    setup = MemorySetup(
        tokens=tokens,
        length=case.length,
        precision="bfloat16",
        attention=machine.attention_kernel(),
    )
    adapter = plan_adapter(shape, LoraConfig(r=case.rank), case.rank)
    memory = memory_per_rank(shape, adapter, setup, split, 1)
    return {
        "memory_bytes": memory.above_imports,
        "sent_per_step": sum(c.sent for c in step_collectives(shape, adapter, setup, split, 1)),
    }


def row_of(engine: str, row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    low, high = row["quartiles"]
    plan, mib = row["planned"], 2**20
    against = "" if row["against_one"] is None else f"{row['against_one']:.2f}x"
    sent = "" if plan is None else f"{plan['sent_per_step'] / mib:.1f}"
    memory = "" if plan is None else f" (planned {plan['memory_bytes'] / mib:.0f})"
    return [
        LAYOUTS[engine].says,
        str(row["processes"]),
        f"{row['tokens_per_second']:.0f} ({low:.0f} to {high:.0f})",
        against,
        f"{row['base_share']:.2f}",
        f"{row['memory_bytes'] / mib:.0f}{memory}",
        f"{row['loading_bytes'] / mib:.0f}",
        f"{row['sent_per_step'] / mib:.1f}",
        sent,
    ]


if __name__ == "__main__":
    engine, folder = sys.argv[1], Path(sys.argv[2])
    if engine == gates.REFERENCE:
        sets = json.loads((folder / "sets.json").read_text())
        print(json.dumps({"truths": gates.reference(folder, read_rows(folder), sets)}))
    else:
        print(json.dumps(work(engine, folder)))
