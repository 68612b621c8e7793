"""A study: one small model, three tasks at once, five ways to train it, one distillation: quality
with intervals, memory, time.

    make study-instruct              # or: python benchmarks/instruct.py --n 300 --batch 8

SmolLM2-135M-Instruct learns common_gen (a sentence from concepts), bool_q (yes or no about a
passage) and scitldr (an abstract in a sentence) from n rows of each; LoRA of rank 4, 16 and 64, all
weights, the MLPs only, and a rank-4 student of the full model. Every way trains in a process of its
own on the same rows in the same order; all are asked the same held-out rows. The rows come from
LORRY_DATA or ../shared/data where that is there, else from the hub. Results:
benchmarks/results/instruct-cpu.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import machine

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m-instruct"
SETS = ("common_gen", "bool_q", "scitldr")
ASKED = {"common_gen": 100, "bool_q": 150, "scitldr": 40}
# way -> (its words, its settings); rates as is usual for each: a tenth of LoRA's where the weights
# themselves move
WAYS: dict[str, tuple[str, list[str]]] = {
    "lora-r4": ("LoRA, r=4", ["r=4", "lora_alpha=8", "learning_rate=5e-4"]),
    "lora-r16": ("LoRA, r=16", ["r=16", "learning_rate=5e-4"]),
    "lora-r64": ("LoRA, r=64", ["r=64", "lora_alpha=128", "learning_rate=5e-4"]),
    "mlp": ("MLP weights only", ["lora=null", "trainable=mlp", "learning_rate=5e-5"]),
    "full": ("all weights", ["lora=null", "learning_rate=5e-5"]),
}
DISTILLED = ("distil-r4", "LoRA, r=4, taught by the full model")
FILES = {  # name -> (file, rows that are learnt, rows that are asked)
    "common_gen": ("common_gen/commongen.dev.jsonl", slice(0, 793), slice(793, 993)),
    "bool_q": ("boolq/boolq_dev.jsonl", slice(0, 1191), slice(1191, 1491)),
    "scitldr": ("scitldr/train.jsonl", slice(0, 1000), None),
}


def local_files(work: Path) -> dict[str, str]:
    """{NAME.SPLIT: file} of the rows, cut from the shared data so that no row is both learnt and
    asked; empty without them.
    """
    data = Path(os.environ.get("LORRY_DATA", ROOT.parent / "shared" / "data"))
    if not data.is_dir():
        return {}
    made = {}
    for name, (file, learnt, asked) in FILES.items():
        lines = (data / file).read_text().splitlines(keepends=True)
        for split, rows in (("train", lines[learnt]), ("test", lines[asked] if asked else None)):
            path = work / "data" / f"{name}-{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                "".join(rows) if rows is not None else (data / "scitldr" / "test.jsonl").read_text()
            )
            made[f"{name}.{split}"] = str(path)
    return made


def train(
    way: str, settings: Sequence[str], verb: str, local: Mapping[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    """One way, in a process of its own; skipped where it is finished. Returns what its run files
    say.
    """
    run = args.work / way
    if not (run / "receipt.json").exists():
        command = [
            sys.executable,
            "-m",
            "lorry.cli",
            verb,
            f"model={MODEL}",
            f"data.mix=[{','.join(SETS)}]",
            f"data.n={args.n}",
            *(f"data.local.{key}={path}" for key, path in local.items()),
            f"max_length={args.length}",
            "num_train_epochs=1",
            f"per_device_train_batch_size={args.batch}",
            "save_strategy=no",
            f"seed={args.seed}",
            f"backend.threads={args.threads}",
            f"output_dir={run}",
            *settings,
        ]
        print(f"--- {way}: {' '.join(settings)}", flush=True)
        with (args.work / f"{way}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return figures(run)


def figures(run: Path) -> dict[str, Any]:
    """Time, memory and size of a run, from its files. The first two steps, which set things up, are
    left out of the time.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line and "seconds" in line]
    timed = steps[2:]
    receipt = json.loads((run / "receipt.json").read_text())
    return {
        "steps": len(steps),
        "tokens": sum(s["tokens"] for s in steps),
        "seconds": sum(s["seconds"] for s in steps),
        "tokens_per_second": sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in steps),
        "first_loss": steps[0]["loss"],
        "last_losses": sum(s["loss"] for s in steps[-10:]) / len(steps[-10:]),
        "trainable_parameters": receipt.get("trainable_parameters"),
        "saved_bytes": sum(p.stat().st_size for p in run.glob("*.safetensors")),
    }


def ask(side: str, local: Mapping[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """{set: {metric: [value, low, high]}} of the base or a way; kept beside the runs, so that what
    is done is not done again.
    """
    kept = args.work / f"asked-{side}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    import torch

    from lorry.adapters.mix import Mix
    from lorry.config import ModelConfig
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.data.reading.places import DataLocations
    from lorry.evaluate.benchmarks.questions import load_benchmark
    from lorry.evaluate.benchmarks.run import evaluate_benchmark
    from lorry.models.loading.open import open_model
    from lorry.notes import ignore_note

    torch.set_num_threads(args.threads)
    exams = [
        load_benchmark(name, DataLocations(local), limit=args.asked or ASKED[name]) for name in SETS
    ]
    opened = open_model(
        ModelConfig(name=MODEL if side == "base" else str(args.work / side)), ignore_note
    )
    encoder, mix = (
        ExampleEncoder(opened.tokenizer, max_length=8192),
        Mix.one(opened.adapters[0]) if opened.adapters else Mix.none(),
    )
    began = time.perf_counter()
    done = {
        exam.named_set.name: evaluate_benchmark(opened.model, encoder, exam, mix, batch_rows=32)
        for exam in exams
    }
    found = {
        name: {m: [v.value, *v.interval] for m, v in one.metrics.items()}
        for name, one in done.items()
    }
    print(f"asked {side}: {time.perf_counter() - began:.0f} s", flush=True)
    kept.write_text(json.dumps(found))
    return found


MAIN = {"common_gen": ("rouge_l", "coverage"), "bool_q": ("accuracy",), "scitldr": ("rouge_l",)}


def record(
    found: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, Mapping[str, Any]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Everything as JSON, with the table that the results page shows."""
    says = {
        "base": "base",
        **{way: words for way, (words, _) in WAYS.items()},
        DISTILLED[0]: DISTILLED[1],
    }
    columns = ["", *(f"{s} {m.replace('_', ' ')}" for s, metrics in MAIN.items() for m in metrics)]
    columns += ["trained", "saved", "peak memory", "tokens/s"]
    rows = []
    for way, sets in found.items():
        cells = [
            "{:.3f} [{:.3f}, {:.3f}]".format(*sets[s][m])
            for s, metrics in MAIN.items()
            for m in metrics
        ]
        run = runs.get(way)
        own = (
            [f"{run['trainable_parameters'] / 1e6:.2f} M", f"{run['saved_bytes'] / 1e6:.0f} MB",
             f"{run['peak_memory_bytes'] / 2**30:.2f} GiB", f"{run['tokens_per_second']:.0f}"]
            if run else ["", "", "", ""]
        )  # fmt: skip
        rows.append([says[way], *cells, *own])
    where = machine()
    asked = ", ".join(f"{args.asked or ASKED[s]} of {s}" for s in SETS)
    text = (
        f"{MODEL} learns {args.n} rows of each of {', '.join(SETS)} for one epoch, {args.batch} rows a step, rows of at most "
        f"{args.length} tokens, {where['cpu']}, {args.threads} thread a process. Asked: {asked} rows that were not learnt, "
        f"greedily, in the plain template; in brackets 95% bootstrap intervals. Learning rates: 5e-4 for adapters, 5e-5 for base "
        f"weights; one seed. Memory: the whole process, imports included. What it means: [instruct.md](instruct.md). {args.note}"
    ).rstrip()
    return {
        "text": text,
        "title": "Instruction tuning on three tasks: LoRA, all weights, MLPs, distillation",
        "study": "instruct",
        "columns": columns,
        "rows": rows,
        "results": found,
        "runs": runs,
        "machine": where,
        "model": MODEL,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "picture": "results/instruct-cpu.png",
        "command": f"python benchmarks/instruct.py --n {args.n} --threads {args.threads}",
        "settings": {
            "n": args.n,
            "batch": args.batch,
            "length": args.length,
            "threads": args.threads,
            "seed": args.seed,
            "ways": {w: s for w, (_, s) in WAYS.items()},
            "asked": {s: args.asked or ASKED[s] for s in SETS},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100, help="rows of each set that are learnt")
    parser.add_argument(
        "--asked", type=int, default=0, help="rows of each set that are asked; 0: 100, 150 and 40"
    )
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=256, help="longest row in tokens")
    parser.add_argument(
        "--note", default="", help="what else is to be said of how this was measured"
    )
    parser.add_argument(
        "--train-only",
        action="store_true",
        help="train these ways and stop, to run several side by side",
    )
    parser.add_argument("--ask-only", action="store_true", help="train and ask these ways and stop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="*", default=["base", *WAYS, DISTILLED[0]])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "instruct")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "instruct-cpu.json"
    )
    args = parser.parse_args()
    local = local_files(args.work)
    args.work.mkdir(parents=True, exist_ok=True)
    taught = [
        f"teacher={args.work / 'full'}",
        "distill.loss=kl",
        "distill.alpha=0.5",
        "r=4",
        "lora_alpha=8",
        "learning_rate=5e-4",
    ]
    settings = {
        **{way: ("sft", own) for way, (_, own) in WAYS.items()},
        DISTILLED[0]: ("distill", taught),
    }
    runs = {
        way: train(way, settings[way][1], settings[way][0], local, args)
        for way in args.ways
        if way != "base"
    }
    if args.train_only:
        return
    found = {way: ask(way, local, args) for way in args.ways}
    if args.ask_only:
        return
    made = record(found, runs, args)
    args.out.write_text(json.dumps(made, indent=1) + "\n")
    from lorry.report.bars import draw_bars

    groups = {f"{s} {m}": f"{s}\n{m}" for s, metrics in MAIN.items() for m in metrics}
    values = {
        way: {
            f"{s} {m}": (sets[s][m][0], (sets[s][m][1], sets[s][m][2]))
            for s, metrics in MAIN.items()
            for m in metrics
        }
        for way, sets in made["results"].items()
    }
    (ROOT / "docs" / made["picture"]).write_bytes(draw_bars(groups, values, made["title"]))
    for row in [made["columns"], *made["rows"]]:
        print(" | ".join(row))


if __name__ == "__main__":
    main()
