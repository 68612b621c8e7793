"""Is r=auto right? What a memory budget chooses against the memory that a run then takes, and what rows
choose against a sweep over ranks.

    python benchmarks/rank_choice.py --memory              # 12 configurations, each in a fresh process
    python benchmarks/rank_choice.py --memory --only nf4   # those whose name holds a word; nothing is kept
    python benchmarks/rank_choice.py --rows                # three tasks, ranks 1 4 16 64 and auto as jobs of a run

Memory: `lorry plan` says which rank a budget allows, and what the next one of the grid would need at its
leanest (smallest micro-batches, recompute unless it was set); `lorry sft` is run with the same budget, one step on
rows that fill `max_length`, and its peak is that of the whole process, imports included. Exit code 1 where that
is above the budget, or by plan the next rank within it.

Rows: every rank learns the same rows in the same order. What rows chose has to be within the interval of the
best rank's loss on held-out rows, a bootstrap over them; the interval of the difference from it, row by row, is
told beside. Rows: experts_rows.py. What is finished is not done again (``--work``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import measure
from experts_rows import MODEL, ROOT, SMALL, write_rows

STORIES = "models/stories260K/hf"  # of the data
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "rope_theta": 100000.0,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model (``layers`` of SmolLM2-135M's shape, random; 0: the real one; None: stories260K), rows
    of ``length`` tokens, a budget in MiB, and what else is asked. With ``jobs`` no budget chooses: the plan's sum
    stands for it."""

    layers: int | None
    length: int
    budget: int
    dtype: str = "float32"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        kinds = {None: "stories260K", 0: "SmolLM2-135M"}
        model = kinds.get(self.layers, f"{self.layers} layers of its shape")
        return ", ".join(
            [model, f"{self.length} tokens", self.dtype, *map(_in_words, self.settings.items())]
        )


def _in_words(setting: tuple[str, Any]) -> str:
    name, value = setting
    return f"{len(value)} jobs" if name == "jobs" else f"{name}={value}"


CASES = (
    Case(None, 256, 531),
    Case(2, 256, 730),
    Case(2, 512, 790, settings={"per_device_train_batch_size": 2}),
    Case(2, 256, 738, "bfloat16"),
    Case(4, 256, 780),
    Case(4, 512, 830, "bfloat16", {"gradient_checkpointing": True}),
    Case(6, 256, 850, "float32", {"quantize": "int8"}),
    Case(6, 512, 850, "bfloat16", {"quantize": "nf4"}),
    Case(6, 256, 745, "float32", {"quantize": "auto"}),
    Case(0, 256, 1400, "bfloat16"),
    Case(0, 128, 1500),
    Case(4, 256, 0, "float32", {"jobs": [{"name": "a", "r": 16}, {"name": "b", "r": 64}]}),
)


def settings_of(case: Case, folder: Path) -> dict[str, Any]:
    """What is asked of `lorry plan` and of `lorry sft`."""
    return {
        "model": str(_base(case, folder)),
        "dtype": case.dtype,
        "max_length": case.length,
        **case.settings,
    }


def _base(case: Case, folder: Path) -> Path | str:
    if case.layers is None:
        return folder / "stories"
    return MODEL if case.layers == 0 else folder / f"base-{case.layers}"


def _data() -> Path:
    return Path(os.environ.get("LORRY_DATA", ROOT.parent / "shared" / "data"))


def prepare(folder: Path, case: Case) -> None:
    """The base, where it is a random one, and ROWS of ``length`` tokens and a few more, which are cut."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorry.api import load

    torch.manual_seed(0)
    base = Path(_base(case, folder))
    if case.layers is None and not base.exists():
        shutil.copytree(_data() / STORIES, base)
        number_tokenizer(512).save_pretrained(base)
    elif case.layers and not base.exists():
        LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=case.layers)).save_pretrained(base)
        load(MODEL)[1].save_pretrained(base)
    tokenizer = load(base if case.layers is None else MODEL)[1]
    words = " ".join(str(n * 7919 % 500) for n in range(40 * case.length))
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    # room for what begins and ends a row; texts are cut again as they are read
    size = case.length - 8
    texts = [tokenizer.decode(ids[n * size : (n + 1) * size]) for n in range(8)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "rows.jsonl").write_text(rows)


def number_tokenizer(count: int) -> Any:
    """A token for each number below ``count``: stories260K comes without a tokenizer that is read."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(n): n for n in range(count)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="2")


def plan(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`lorry plan ... format=json`."""
    words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    command = [sys.executable, "-m", "lorry", "plan", *words, "format=json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def peak_of_run(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """{peak: bytes, settings of the run as it settled on them} of `lorry sft` in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        asked = {
            **settings,
            "data": str(folder / "rows.jsonl"),
            "output_dir": f"{output}/run",
            "max_steps": 1,
            "save_strategy": "no",
            "threads": 1,
        }
        command = [sys.executable, __file__, "--worker", json.dumps(asked)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, text=True, env=_one_thread()
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """One run in this process."""
    from lorry.api import sft

    path = sft(**settings).path
    config = path / "adapter_config.json"  # jobs have one each
    rank = json.loads(config.read_text())["r"] if config.exists() else None
    return {"peak": measure.peak_rss(), "rank": rank}


def budget_row(case: Case, folder: Path) -> dict[str, Any]:
    """A configuration, planned and run."""
    # here: what it imports would count in the peak of a run
    import turns

    turns.elsewhere(prepare, folder, case)
    settings = settings_of(case, folder)
    if "jobs" in settings:
        planned = plan(settings)
        peak = peak_of_run(settings, folder)["peak"]
        return {"case": case.name, "budget": planned["total"], "planned": planned["total"],
                "rank": None, "peak": peak, "next": None}  # fmt: skip
    by_memory = {"r": "auto", "rank_by": "memory", "memory_budget": f"{case.budget}MiB"}
    planned = plan({**settings, **by_memory})
    chosen = planned["choice"]
    run = peak_of_run({**settings, **by_memory}, folder)
    if run["rank"] != chosen["rank"]:
        sys.exit(f"{case.name}: the plan says r={chosen['rank']}, and the run took {run['rank']}")
    row = {"case": case.name, "budget": case.budget << 20, "planned": planned["total"],
           **chosen, "peak": run["peak"], "next": None}  # fmt: skip
    if larger := [t for t in planned["tried"] if t["rank"] > chosen["rank"]]:
        rank = min(t["rank"] for t in larger)
        row["next"] = min((t for t in larger if t["rank"] == rank), key=lambda t: t["total"])
    return row


def over(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a configuration, or None."""
    if row["peak"] > row["budget"]:
        return f"{row['case']}: {row['peak'] >> 20} MiB were taken of {row['budget'] >> 20}"
    if row["next"] is not None and row["next"]["total"] <= row["budget"]:
        return f"{row['case']}: r={row['next']['rank']} would have fitted"
    return None


def memory_record(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What benchmarks/results.py shows."""
    mib = lambda size: str(size >> 20)  # noqa: E731
    cells = list[list[str]]()
    for row in rows:
        after, rank = row["next"], row["rank"]
        cells.append(
            [
                row["case"],
                mib(row["budget"]) if rank else "",
                f"{rank}, {row['rows']} x {row['accumulation']}, recompute {row['recompute']}" if rank else "as given",
                mib(row["planned"]),
                mib(row["peak"]),
                f"{after['rank']}: {mib(after['total'])}" if after else "none",
            ]
        )  # fmt: skip
    shares = [(row["case"], row["peak"] / row["budget"]) for row in rows]
    within = [part for _, part in shares if part <= 1]
    filled = f" (they fill {min(within):.0%} to {max(within):.0%} of it)" if within else ""
    passed = [f"; {case} takes {part:.2%} of it" for case, part in shares if part > 1]
    named = {row["case"] for row in rows}
    left = "; ".join(case.name for case in CASES if case.name not in named)
    return {
        "title": "`r=auto` within a memory budget: planned and measured peaks of whole processes",
        "text": (
            f"{len(within)} of {len(rows)} configurations stay within their budget{filled}{''.join(passed)}. The "
            "next rank of the grid would by plan pass it even at its leanest (smallest micro-batches, recompute "
            "unless it was set). MiB; one step of `lorry sft` on rows that fill `max_length`, one thread "
            "(`benchmarks/rank_choice.py --memory`). No budget chooses the ranks of jobs: the plan's sum stands for it."
            + (f" Not run: {left}." if left else "")
        ),
        "columns": ["model, rows, dtype", "budget", "rank, micro-batches", "planned", "measured",
                    "next rank, planned"],
        "rows": cells,
        "records": list(rows),
    }  # fmt: skip


# --- what rows choose

TASKS, RANKS, AUTO = ("gsm8k", "common_gen", "truthfulqa"), (1, 4, 16, 64), "auto"
SIZE = replace(
    SMALL, train={**SMALL.train, "gsm8k": 48, "common_gen": 96, "truthfulqa": 96}, held=32
)
RATE, BATCH, LENGTH = 1e-3, 4, 320


def learn(task: str, work_in: Path) -> None:
    """All ranks of a task as the jobs of one run, unless they are there."""
    run = work_in / task
    if (run / "receipt.json").exists():
        return
    settings = {
        "model": MODEL,
        "data": str(work_in / f"data/{task}.train.jsonl"),
        "output_dir": str(run),
        "max_length": LENGTH,
        "dtype": "bfloat16",
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "threads": 1,
        "seed": 0,
        "save_steps": 20,
        "resume_from_checkpoint": "auto",
        # the scale of what rows choose for all, so that the ranks alone differ
        "jobs": [
            *({"name": f"r{r}", "r": r, "lora_alpha": 2 * r} for r in RANKS),
            {"name": f"r{AUTO}", "r": AUTO},
        ],
    }
    words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    subprocess.run([sys.executable, "-m", "lorry", "sft", *words], check=True, env=_one_thread())


def ask(task: str, work_in: Path) -> dict[str, Any]:
    """{job: {losses: summed loss and tokens of every held-out row, ranks, values}} of a task."""
    import torch
    from experts_study import answer_losses

    from lorry.adapters.attach import get_bank
    from lorry.adapters.mix import Mix
    from lorry.config import ModelConfig
    from lorry.models.loading.open import open_model
    from lorry.notes import ignore_note

    torch.set_num_threads(1)
    opened = open_model(ModelConfig(name=str(work_in / task), dtype="bfloat16"), ignore_note)
    held, found = str(work_in / f"data/{task}.held.jsonl"), dict[str, Any]()
    for name in (f"r{r}" for r in (*RANKS, AUTO)):
        rows, _ = answer_losses(opened, held, Mix.one(name))
        slots = get_bank(opened.model)[name].slots.values()
        ranks = [slot.A.shape[0] for slot in slots]
        found[name] = {
            "losses": [(sum(a[0] for a in row), sum(a[1] for a in row)) for row in rows],
            "ranks": [min(ranks), max(ranks)],
            "values": sum(slot.A.numel() + slot.B.numel() for slot in slots),
        }
    return found


def compare(found: Mapping[str, Any]) -> dict[str, Any]:
    """Mean losses a token with their intervals; what rows chose against the best rank."""
    from lorry.evaluate.metrics.bootstrap import corpus_interval

    def ratio(sums: Any) -> Any:
        return sums[:, 0] / sums[:, 1]

    told = dict[str, Any]()
    for name, own in found.items():
        total, tokens = (sum(column) for column in zip(*own["losses"], strict=True))
        told[name] = {**own, "loss": total / tokens,
                      "interval": corpus_interval(own["losses"], ratio)}  # fmt: skip
    best = min((f"r{r}" for r in RANKS), key=lambda name: told[name]["loss"])
    chosen = f"r{AUTO}"
    pairs = [
        (mine[0] - theirs[0], mine[1])
        for mine, theirs in zip(found[chosen]["losses"], found[best]["losses"], strict=True)
    ]
    high = told[best]["interval"][1]
    return {
        "jobs": told,
        "best": best,
        "apart": told[chosen]["loss"] - told[best]["loss"],
        "apart_interval": corpus_interval(pairs, ratio),
        # lower than the interval is no failure
        "within": told[chosen]["loss"] <= high,
    }


def rows_record(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What benchmarks/results.py shows."""
    names = [f"r{r}" for r in RANKS]

    def cell(own: Mapping[str, Any]) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(own["loss"], *own["interval"])

    cells = []
    for task, told in tasks.items():
        auto = told["jobs"][f"r{AUTO}"]
        low, high = auto["ranks"]
        cells.append(
            [
                task,
                *(cell(told["jobs"][name]) for name in names),
                cell(auto),
                f"{low} to {high}, {auto['values'] / 1e6:.2f} M",
                "{} {:+.3f} [{:+.3f}, {:+.3f}]".format(told["best"], told["apart"], *told["apart_interval"]),
            ]
        )  # fmt: skip
    within = sum(told["within"] for told in tasks.values())
    apart = ", ".join(task for task, told in tasks.items() if told["apart_interval"][0] > 0)
    rows = ", ".join(f"{SIZE.train[task]} of {task}" for task in tasks)
    return {
        "title": "`r=auto`: ranks that rows choose against a sweep",
        "text": (
            f"{MODEL} in bfloat16, {rows}, once each, {BATCH} rows a step, learning rate {RATE:g}, alpha 2 r, one seed: "
            f"loss of {SIZE.held} held-out rows [95% of a bootstrap over them] (`benchmarks/rank_choice.py --rows`). In {within} "
            f"of {len(tasks)} tasks the ranks that rows chose are within the best rank's interval."
            + (f" Row by row they are above it on {apart}." if apart else "")
            + " At alpha 2 r and one learning rate a larger rank takes larger steps, too."
        ),
        "columns": ["task", *names, "auto", "its ranks, values", "from the best [95%, row by row]"],
        "rows": cells,
        "tasks": dict(tasks),
    }


def finish(record: dict[str, Any], name: str, keep: bool) -> None:
    """Print a record, and keep it."""
    import records

    told = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": measure.machine()}
    print(record["text"])
    for cells in (record["columns"], *record["rows"]):
        print("  " + " | ".join(cells))
    if keep:
        print(f"  kept in {records.keep({**record, **told}, name)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--only", default="", metavar="WORD", help="of these; nothing is kept")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ranks")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return 0
    failed = list[str]()
    if args.memory:
        rows, done = list[dict[str, Any]](), args.work / "memory"
        done.mkdir(parents=True, exist_ok=True)
        for number, case in enumerate(CASES):
            if args.only not in case.name:
                continue
            kept = done / f"{number}.json"
            if not kept.exists():
                kept.write_text(json.dumps(budget_row(case, done)))
            rows.append(json.loads(kept.read_text()))
        failed += [why for why in map(over, rows) if why is not None]
        finish(memory_record(rows), "ranks-memory", not args.only)
    if args.rows:
        write_rows(args.work / "data", SIZE)
        told = dict[str, Any]()
        for task in (t for t in TASKS if args.only in t):
            learn(task, args.work)
            told[task] = compare(ask(task, args.work))
        failed += [
            f"{task}: above the best rank's interval" for task, t in told.items() if not t["within"]
        ]
        finish(rows_record(told), "ranks-rows", not args.only)
    for why in failed:
        print(why, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
