"""A study: which methods make an adapter forget TOFU's forget05, and what that costs.

    make study-tofu                                    # forget05, SmolLM2-135M; hours on two cores
    python benchmarks/unlearn_study.py --small         # 60 rows of each: does the set-up work?
    python benchmarks/unlearn_study.py --small 60 --only NPO-1e-3 --attack NPO-1e-3

A start learns retain90 and forget05, an oracle retain90 alone. Then every method unlearns forget05
in an adapter over the frozen start; some at several rates, some in the weights themselves. All are
asked the TOFU suite with the oracle's values as reference, and some are attacked (`--attack`): ten
steps of fine-tuning on a tenth of the rows, int8 and NF4. The work is cut into pieces, each a
process of its own that is stopped after `--minutes` and goes on where it was the next time; what is
finished is not done again. The rows come from LORRY_DATA or ../shared/data.

Nothing is concluded where the start does not know the rows: its forget quality must be at most
1e-3 and its probability of their answers at least 0.8, or the study stops and says so. Results:
benchmarks/results/tofu-cpu.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import machine

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m-instruct"
START_QUALITY, START_PROBABILITY = 1e-3, 0.8
# of adapters of models of billions of weights 1e-4 is published; 135M want more
RATES = ("1e-4", "3e-4", "1e-3")
SEVERAL_RATES = ("NPO", "SimNPO", "GradDiff", "IHL", "RMU")
ONE_RATE = (
    "GradAscent", "KL", "IdkDPO", "UNDIAL", "CEU", "WGA", "SatImp", "PDU", "ME", "IdkAP", "JensUn",
)  # fmt: skip
WEIGHTS = ("NPO", "GradDiff")  # also in the weights themselves
METRICS = (
    "forget_quality", "model_utility", "extraction_strength", "forget_Q_A_Prob", "retain_Q_A_Prob",
    "forget_truth_ratio", "forget_Q_A_ROUGE",
)  # fmt: skip
FILES = (
    "forget05", "forget05_perturbed", "retain90", "retain_perturbed", "real_authors_perturbed",
    "world_facts_perturbed", "forget10",
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A model of the study: the verb that trains it, its settings, and what it is called."""

    name: str
    words: str
    verb: str
    settings: tuple[str, ...]


class Unfinished(Exception):
    """A piece was stopped when its time was over."""


def rows_of(path: Path) -> list[Any]:
    """Rows of a JSON array or of lines of JSON."""
    text = path.read_text()
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def cut_data(work: Path, small: int | None) -> Path:
    """The splits as the suite names them, in one folder; ``small``: the first so many rows of each,
    of those to forget the last."""
    source = Path(os.environ.get("LORRY_DATA", ROOT.parent / "shared" / "data")) / "tofu"
    if not source.is_dir():
        sys.exit(f"{source} is not there; set LORRY_DATA to a folder with tofu/forget05.json ...")
    folder = work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        rows = rows_of(source / f"{name}.json")
        if small is not None:
            # forget05 is the end of forget10, and its perturbed rows stand in the same order
            of_end = {"forget05": slice(-small, None), "forget05_perturbed": slice(-small, None),
                      "forget10": slice(-2 * small, None)}  # fmt: skip
            rows = rows[of_end.get(name, slice(0, small))]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


def pieces(data: Path, args: argparse.Namespace) -> list[Piece]:
    """The start, the oracle, and every way to unlearn."""
    learn = ("r=64", "lora_alpha=128", "learning_rate=1e-3", f"num_train_epochs={args.learn_epochs}",
             "per_device_train_batch_size=8")  # fmt: skip
    forget, retain = str(data / "forget05.json"), str(data / "retain90.json")
    found = [
        Piece("oracle", "never saw the rows (retrain)", "sft", (f"data={retain}", *learn)),
        Piece("start", "before unlearning", "sft", (f"data=[{retain},{forget}]", *learn)),
    ]
    common = (f"forget={forget}", f"retain={retain}", f"num_train_epochs={args.epochs}",
              "per_device_train_batch_size=8", f"eval_strategy={args.eval_strategy}")  # fmt: skip
    adapter = (f"model={args.work / 'start'}", "r=64", "lora_alpha=128", *common)
    for method in SEVERAL_RATES:
        found += [
            Piece(f"{method}-{rate}", f"{method}, {rate}", "unlearn",
                  (f"method={method}", f"learning_rate={rate}", *adapter))
            for rate in args.rates
        ]  # fmt: skip
    found += [
        Piece(f"{method}-{args.rate}", f"{method}, {args.rate}", "unlearn",
              (f"method={method}", f"learning_rate={args.rate}", *adapter))
        for method in ONE_RATE
    ]  # fmt: skip
    return found + [
        Piece(f"{method}-weights", f"{method}, all weights", "unlearn",
              (f"method={method}", "learning_rate=1e-5", f"model={args.work / 'start-merged'}",
               "lora=null", *common))
        for method in WEIGHTS
    ]  # fmt: skip


def chosen(found: Sequence[Piece], only: Sequence[str] | None) -> list[Piece]:
    """All, or oracle, start and the named ones in the order they are named. Exits on a name that
    is none."""
    if only is None:
        return list(found)
    by_name = {piece.name: piece for piece in found}
    if odd := [name for name in only if name not in by_name]:
        sys.exit(f"no piece is called {odd[0]}; there are {', '.join(by_name)}")
    return [by_name[name] for name in ("oracle", "start", *only)]


def call(words: Sequence[str], log: Path, deadline: float) -> None:
    """A command of Lorry's in a process of its own, asked to stop when the time is over. Raises
    Unfinished then; exits with what the log says where the command fails."""
    with log.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "lorry.cli", *words], stdout=out, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.send_signal(
                signal.SIGTERM
            )  # a run saves and ends, an evaluation keeps its metrics
            process.wait()
            raise Unfinished from None
    if code:
        sys.exit(f"lorry {' '.join(words)}: exit code {code}\n{log.read_text()[-2000:]}")


def make(piece: Piece, args: argparse.Namespace, deadline: float) -> None:
    """Train a piece, or go on with it."""
    run = args.work / piece.name
    if (run / "receipt.json").exists():
        return
    if piece.name.endswith("-weights") and not (args.work / "start-merged/config.json").exists():
        merged = f"output_dir={args.work / 'start-merged'}"
        call(["merge", str(args.work / "start"), merged], args.work / "merge.log", deadline)
    print(f"--- {piece.name}", flush=True)
    general = [f"backend.threads={args.threads}", f"output_dir={run}", "save_steps=20",
               "resume_from_checkpoint=auto", "seed=0"]  # fmt: skip
    base = [f"model={MODEL}"] if piece.verb == "sft" else []
    words = [piece.verb, *base, *piece.settings, *general]
    call(words, args.work / f"{piece.name}.log", deadline)


def ask(name: str, data: Path, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """The TOFU suite of a piece: {metric: value}."""
    folder = args.work / "asked" / name
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        logs = [] if name == "oracle" else [
            f"retain_logs_path={args.work / 'asked/oracle/TOFU_EVAL.json'}"]  # fmt: skip
        metrics = [m for m in METRICS if name != "oracle" or m != "forget_quality"]
        words = ["eval", str(args.work / name), "suite=tofu", f"local.tofu={data}",
                 "forget_split=forget05", f"metrics=[{','.join(metrics)}]",
                 f"limit={args.generations}", f"output_dir={folder}",
                 f"backend.threads={args.threads}", *logs]  # fmt: skip
        call(words, args.work / f"{name}.eval.log", deadline)
        done.touch()
    return dict(json.loads((folder / "TOFU_SUMMARY.json").read_text()))


def attack(name: str, data: Path, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Extraction strength and probability of a piece after ten steps of relearning and in NF4."""
    folder = args.work / "attacked" / name
    common = [f"local.tofu={data}", "forget_split=forget05", f"output_dir={folder}",
              f"backend.threads={args.threads}"]  # fmt: skip
    for kind, settings in (("relearn", ["relearn_steps=[0,10]"]), ("quantize", [])):
        done = folder / f"{kind}.done"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            words = ["attack", str(args.work / name), kind, *settings, *common]
            call(words, args.work / f"{name}.attack.log", deadline)
            done.touch()
    parts = json.loads((folder / "attacks.json").read_text())
    relearned = parts["relearn"]["curves"]["run"][-1]
    rounded = parts["quantize"]["values"]["run"]["nf4"]
    return {
        "relearn10_extraction_strength": relearned["extraction_strength"],
        "relearn10_probability": relearned["probability"],
        "nf4_extraction_strength": rounded["extraction_strength"],
        "nf4_probability": rounded["probability"],
    }


def training_facts(run: Path) -> dict[str, float]:
    """The first loss of a run and how long it trained, from its metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {"first_loss": steps[0]["loss"], "train_seconds": sum(s["seconds"] for s in steps)}


def record(found: Mapping[str, Mapping[str, Any]], words: Mapping[str, str], args: Any) -> None:
    """Everything as JSON, with the table that a person reads."""
    columns = ["first_loss", "forget_quality", "model_utility", "retain_Q_A_Prob",
               "forget_Q_A_Prob", "extraction_strength", "forget_truth_ratio",
               "relearn10_extraction_strength", "nf4_extraction_strength"]  # fmt: skip
    rows = [
        [words[name], *(f"{values[c]:.3g}" if c in values else "" for c in columns)]
        for name, values in found.items()
    ]
    size = f", {args.small} rows of each set" if args.small else ""
    result = {
        "title": f"Unlearning TOFU's forget05{size}, {MODEL}",
        "text": (
            "`make study-tofu`, or `benchmarks/unlearn_study.py` with the settings in the JSON: every model "
            f"in an adapter of rank 64, {args.epochs} epochs; answers generated to {args.generations} "
            "questions of each set. Forget quality is the p-value of a KS test of truth ratios with the "
            "oracle's, relearn10 after ten steps on a tenth of the rows, nf4 with merged weights rounded."
        ),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        # where it lay on this machine is nobody's business
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("work", "out")},
        "columns": ["", *columns],
        "rows": rows,
        "values": found,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in [result["columns"], *rows]:
        print("  ".join(f"{cell:>22}" for cell in row))
    print(f"written to {args.out}")


def main() -> int:
    """Do pieces until all are done or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "study-tofu")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--small", type=int, nargs="?", const=60, default=None)
    parser.add_argument("--minutes", type=float, default=20.0, help="of one call of this script")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learn-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--generations", type=int, default=50, help="answers of each set")
    parser.add_argument("--rates", nargs="+", default=RATES, help="of the methods with several")
    parser.add_argument("--rate", default="3e-4", help="of the others")
    parser.add_argument("--eval-strategy", choices=("no", "epoch"), default="epoch")
    parser.add_argument("--only", nargs="*", default=None, help="pieces, by name")
    parser.add_argument("--attack", nargs="*", default=(), help="pieces that are attacked, too")
    args = parser.parse_args()
    args.out = args.out or ROOT / "benchmarks/results" / (
        "tofu-small-cpu.json" if args.small else "tofu-cpu.json"
    )
    args.work.mkdir(parents=True, exist_ok=True)
    data, deadline = cut_data(args.work, args.small), time.monotonic() + 60 * args.minutes
    found, words = dict[str, dict[str, Any]](), dict[str, str]()
    finished = True
    try:
        for piece in chosen(pieces(data, args), args.only):
            make(piece, args, deadline)
            found[piece.name] = {
                **training_facts(args.work / piece.name),
                **ask(piece.name, data, args, deadline),
            }
            words[piece.name] = piece.words
            if piece.name == "start":
                check_start(found["start"])
            if piece.name in args.attack:
                found[piece.name] |= attack(piece.name, data, args, deadline)
    except Unfinished:
        finished = False
        print("the time of this sitting is over; the same command goes on", flush=True)
    if found:
        record(found, words, args)
    return 0 if finished else 75  # EX_TEMPFAIL: try again


def check_start(values: Mapping[str, float]) -> None:
    """A start that does not know the rows would make every method a success. Exits there."""
    quality, probability = values["forget_quality"], values["forget_Q_A_Prob"]
    print(f"start: forget quality {quality:.2e}, probability {probability:.3f}", flush=True)
    if quality > START_QUALITY or probability < START_PROBABILITY:
        sys.exit(
            f"the start has forget quality {quality:.2e} (at most {START_QUALITY:g} is needed) and gives the "
            f"answers {probability:.3f} (at least {START_PROBABILITY:g}): it does not know what is to be forgotten, "
            "and nothing could be concluded. Raise --learn-epochs"
        )


if __name__ == "__main__":
    sys.exit(main())
