"""`lorry demo`: the main job end to end on real weights: teach the embedded model facts about
people who do not exist.

The people come from a seeded generator, so no model can know them; questions to test with are
worded differently from those to learn from. Shown: answers before and after, exact match and
ROUGE-L on the held-out wordings, the loss on ordinary text before and after (it must not collapse),
and how to go on.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config import RunConfig, build_settings
from lorry.config.settings import DemoSettings
from lorry.runs.layout import EVALUATION, RECEIPT, SAMPLES

if TYPE_CHECKING:
    from lorry.data.batch import Batch
    from lorry.train.session import TrainResult

DemoRow = dict[str, str]
DEMO_PEOPLE, FAST_DEMO_PEOPLE, FAST_DEMO_STEPS = 8, 2, 4
HELD_OUT_GROUP, GENERAL_GROUP = "held-out rephrasings", "everyday questions"
# an answer is a short sentence; before training the model would go on for ever
DEMO_ANSWER_TOKENS = 32
TRAIN_FILE, HELD_OUT_FILE = "data/train.jsonl", "data/heldout.jsonl"


def main(settings: DemoSettings) -> int:
    """Generate, train, compare, report."""
    from lorry.console import VisibleConsole
    from lorry.demo.people import general_chat, make_people, make_questions
    from lorry.report import table
    from lorry.report import write_report as build_report
    from lorry.runs.read import read_run
    from lorry.train.monitoring.events import terminal_listener
    from lorry.train.session import train_run
    from lorry.train.start import claim_output_dir

    people = make_people(FAST_DEMO_PEOPLE if settings.fast else DEMO_PEOPLE, settings.seed)
    train, held_out = make_questions(people, settings.seed)
    # learnt beside the facts, lest the model answer everything with a person
    chat = general_chat()
    notes: list[str] = []
    run = build_settings(
        RunConfig, demo_settings(settings, settings.output_dir / TRAIN_FILE), notes.append
    )
    claim_output_dir(run.output_dir, run.job_names)
    write_data(settings.output_dir, train + chat, held_out)
    print_headline(
        f"Teaching {run.model.name} {len(people) * 6} facts about {len(people)} people who do not exist ({len(train)} questions)"
    )
    result = train_run(run, notes, [terminal_listener(run.train.logging_steps)])
    print_headline(f"Asking {len(held_out)} rephrased questions, before and after training")
    compare_with_base(result, held_out, chat[:6])
    page = build_report([result.path])
    VisibleConsole().print(table.render_runs([read_run(result.path)], samples=6))
    print(
        f"adapter  {result.path} (PEFT format)\nreport   {page}\nchat     .venv/bin/lorry chat {result.path}"
    )
    return 0


def demo_settings(settings: DemoSettings, data: Path) -> dict[str, Any]:
    """The demo's run: what a person would type for a small set of facts."""
    from lorry.train.start import broken_contracts

    steps = settings.max_steps or (FAST_DEMO_STEPS if settings.fast else None)
    chosen: dict[str, Any] = {} if steps is None else {"max_steps": steps}
    if not (settings.output_dir / RECEIPT).exists() and not broken_contracts(settings.output_dir):
        # a demo that was interrupted goes on; a finished one starts anew
        chosen["resume_from_checkpoint"] = "auto"
    return {
        "data": str(data),
        "output_dir": str(settings.output_dir),
        "seed": settings.seed,
        "r": 16,
        # five times the default: a few dozen facts in a few minutes
        "learning_rate": 1e-3,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "logging_steps": 10,
        # far above any row of the demo; it bounds a batch's memory
        "max_length": 256,
        **chosen,
    }


def print_headline(text: str) -> None:
    """A headline on the way."""
    print(f"\n== {text}", file=sys.stderr, flush=True)


def write_data(run_dir: Path, train: Sequence[DemoRow], held_out: Sequence[DemoRow]) -> None:
    """The rows as files a person can look at."""
    from lorry.disk import durable
    from lorry.runs import ownership

    durable.make_directory((run_dir / TRAIN_FILE).parent)
    rows = {TRAIN_FILE: train, HELD_OUT_FILE: held_out}
    ownership.write_owned_files(
        run_dir,
        {
            name: "".join(json.dumps(row) + "\n" for row in group).encode()
            for name, group in rows.items()
        },
    )


def compare_with_base(
    result: TrainResult, held_out: Sequence[DemoRow], chat: Sequence[DemoRow]
) -> None:
    """Ask base (the same weights under mix none) and adapter, score both, and write samples.json
    and evaluation.json.
    """
    from lorry.adapters.mix import Mix
    from lorry.data.reading.content import ChatMessage, Conversation
    from lorry.disk import durable
    from lorry.evaluate.answers import generate_answers, mean_answer_scores
    from lorry.train import artifacts

    # so that the first few shown are about different people
    held_out = random.Random(0).sample(held_out, len(held_out))
    rows = [*held_out, *chat]
    conversations = [
        Conversation((ChatMessage("user", r["question"]), ChatMessage("assistant", r["answer"])))
        for r in rows
    ]
    answers = {
        side: generate_answers(
            result.model,
            result.tokenizer,
            conversations,
            adapters=mix,
            max_new_tokens=DEMO_ANSWER_TOKENS,
        )
        for side, mix in (("before", Mix.none()), ("after", Mix.one(result.adapter)))
    }
    truth, held_out_count = [r["answer"] for r in rows], len(held_out)
    scores = {
        side: mean_answer_scores(texts[:held_out_count], truth[:held_out_count])
        for side, texts in answers.items()
    }
    held_out_metrics = {
        m: {side: scores[side][m] for side in scores} for m in ("exact_match", "rouge_l", "f1")
    }
    general_metrics = {"loss": general_loss(result)}
    evaluation = [
        {"name": HELD_OUT_GROUP, "metrics": held_out_metrics},
        {"name": "general text", "metrics": general_metrics},
    ]
    artifacts.write_json(result.path, EVALUATION, evaluation)
    samples = [
        {
            "group": HELD_OUT_GROUP if i < held_out_count else GENERAL_GROUP,
            "prompt": row["question"],
            "reference": row["answer"],
            "before": answers["before"][i],
            "after": answers["after"][i],
            "tokens": None,
        }
        for i, row in enumerate(rows)
    ]
    # rows of the training with their losses, which the report colours; they stay
    trained = json.loads((result.path / SAMPLES).read_text())
    shown = artifacts.json_text(samples + [row for row in trained if row["tokens"]])
    # its own file, read just now and added to
    durable.write_files(result.path, {SAMPLES: shown.encode()})


def general_loss(result: TrainResult) -> dict[str, float]:
    """Mean loss per token on ordinary prose under the base and under the adapter, nats."""
    from lorry.adapters.mix import Mix
    from lorry.evaluate.loss import mean_nll
    from lorry.generation.scorer import ModelScorer

    scorer, batches = ModelScorer(result.model), general_batches(result.tokenizer)
    sides = {"before": Mix.none(), "after": Mix.one(result.adapter)}
    sums = {side: mean_nll(scorer, batches, mix) for side, mix in sides.items()}
    return {side: nll / tokens for side, (nll, tokens) in sums.items()}


def general_batches(tokenizer: Any) -> list[Batch]:
    """The package's passages of ordinary prose as batches, every token but the first supervised."""
    from lorry.data.batch import TokenizedExample, collate
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.data.reading.content import TextDocument
    from lorry.demo.people import general_text

    encoder = ExampleEncoder(tokenizer, max_length=512)
    # each passage by itself: encode_many gives a list of pieces, or a bad row, which prose is not
    pieces = [p for text in general_text() for p in encoder.encode_many([TextDocument(text)])[0]]  # type: ignore[union-attr]
    rows = [TokenizedExample(p.tokens, p.weights) for p in pieces]
    return [collate(rows[i : i + 8]) for i in range(0, len(rows), 8)]
