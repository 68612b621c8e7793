"""TOFU's suite in rows a second: Lorry against padded transformers, on the same weights, rows and
prompts.

    make bench-suite                                     # 8 rows of each of the four sets
    python benchmarks/suite.py --rows 2 --new-tokens 16 --rounds 1

Both score every answer that the suite's usual metrics look at and answer every question greedily. The
peer is asked each answer once, where open-unlearning runs the forget rows again for every metric; its
best batch size counts. Seconds are those of the processor, on one thread: a busy machine stretches
them less than the clock's. Nothing is said of speed unless the mean loss of every answer agrees within
AGREE nats and every answer is the same text.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from case import MODEL, data_folder
from measure import machine
from records import keep

if TYPE_CHECKING:
    from lorry.evaluate.unlearning.evaluation import SuiteEvaluation
    from lorry.models.loading.open import OpenedModel

ROOT = Path(__file__).resolve().parents[1]
AGREE = 2e-3  # nats, in float32
TARGET = 2.0  # times the rows a second of padded transformers
SPLIT = "forget05"


@dataclass
class Answered:
    """Mean loss of every answer and every greedy answer, by where they stand; seconds for either."""

    losses: dict[tuple[str, str, int, int], float]
    texts: dict[tuple[str, int], str]
    scoring: float
    generating: float

    @property
    def seconds(self) -> float:
        """Of the whole suite."""
        return self.scoring + self.generating


def load_suite(folder: Path, rows: int, new_tokens: int) -> SuiteEvaluation:
    """TOFU's usual metrics but those of attacks, on the first rows of each set."""
    from lorry.config.suite import SuiteConfig
    from lorry.evaluate.unlearning.evaluation import SuiteEvaluation

    config = SuiteConfig(
        name="tofu",
        forget_split=SPLIT,
        metrics=["forget_truth_ratio", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "model_utility",
                 "extraction_strength", "exact_memorization"],
    )  # fmt: skip
    suite = SuiteEvaluation.load(config, {"tofu": str(folder)}, max_new_tokens=new_tokens)
    return replace(suite, sets={r: replace(s, rows=s.rows[:rows]) for r, s in suite.sets.items()})


def by_lorry(opened: OpenedModel, suite: SuiteEvaluation, batch: int) -> Answered:
    """As `lorry eval` asks, answers first; ``batch`` of them are generated at a time."""
    from lorry.adapters.mix import Mix

    asked, losses, texts = suite.ask(opened, Mix.none(), batch_rows=batch), {}, {}
    began = time.process_time()
    roles = suite.suite.roles(suite.names)
    asked.expect(roles, list(suite.sets))
    for role, fields in roles.items():
        for field in fields:
            for row, answers in enumerate(asked.answers(role, field)):
                losses |= {(role, field, row, n): one.loss for n, one in enumerate(answers)}
    scored = time.process_time()
    for role in suite.sets:
        texts |= {(role, row): one.text for row, one in enumerate(asked.generated(role))}
    return Answered(losses, texts, scored - began, time.process_time() - scored)


class Padded:
    """transformers alone: rows padded to the longest of their batch, on the right to be scored, on
    the left to be gone on with; whole logits.
    """

    def __init__(self, folder: Path, batch: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.batch, self.words = batch, AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.end = self.words.eos_token_id
        self.pad = self.words.pad_token_id if self.words.pad_token_id is not None else self.end

    def prompt(self, question: str) -> list[int]:
        """Token ids of the bare question in the chat template."""
        turns = [{"role": "user", "content": question}]
        text = self.words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.words(text, add_special_tokens=False)["input_ids"])

    def answer(self, text: str) -> list[int]:
        """Of an answer with its end of turn."""
        return [*self.words(text, add_special_tokens=False)["input_ids"], self.end]

    def ask(self, suite: SuiteEvaluation) -> Answered:
        """Every answer once, set by set and field by field."""
        losses: dict[tuple[str, str, int, int], float] = {}
        texts: dict[tuple[str, int], str] = {}
        began = time.process_time()
        for role, fields in suite.suite.roles(suite.names).items():
            for field in fields:
                pairs = {
                    (role, field, at, n): (self.prompt(row.question), self.answer(text))
                    for at, row in enumerate(suite.sets[role].rows)
                    for n, text in enumerate(row.answers[field])
                }
                losses |= self._in_batches(pairs, self._losses)
        scored = time.process_time()
        for role, rows in suite.sets.items():
            prompts = {(role, at): self.prompt(row.question) for at, row in enumerate(rows.rows)}
            length = suite.max_new_tokens or rows.new_tokens
            texts |= self._in_batches(prompts, lambda part, n=length: self._texts(part, n))
        return Answered(losses, texts, scored - began, time.process_time() - scored)

    def _in_batches(
        self, items: Mapping[Any, Any], answer: Callable[[list[Any]], list[Any]]
    ) -> dict[Any, Any]:
        keys, values = list(items), list(items.values())
        found = [
            one
            for at in range(0, len(values), self.batch)
            for one in answer(values[at : at + self.batch])
        ]
        return dict(zip(keys, found, strict=True))

    def _losses(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        import torch
        from torch.nn import functional as F

        whole = [prompt + answer for prompt, answer in pairs]
        width = max(map(len, whole))
        ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in whole])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole])
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            # [rows, width - 1] in nats
            each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return [
            float(each[n, len(prompt) - 1 : len(prompt) + len(answer) - 1].double().mean())
            for n, (prompt, answer) in enumerate(pairs)
        ]

    def _texts(self, prompts: list[list[int]], new_tokens: int) -> list[str]:
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        with torch.no_grad():
            made = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                pad_token_id=self.pad, eos_token_id=self.end,
            )  # fmt: skip
        said = self.words.batch_decode(made[:, width:], skip_special_tokens=True)
        return [text.strip() for text in said]


def refuse_other_values(ours: Answered, theirs: Answered) -> None:
    """Raise SystemExit where the two engines do not give the same numbers and texts."""
    if ours.losses.keys() != theirs.losses.keys() or ours.texts.keys() != theirs.texts.keys():
        raise SystemExit("the two were not asked the same; no time is shown")
    worst = max(abs(loss - theirs.losses[where]) for where, loss in ours.losses.items())
    if not worst <= AGREE:
        raise SystemExit(f"the two disagree by {worst:.2e} nats; no time is shown")
    other = [where for where, text in ours.texts.items() if text != theirs.texts[where]]
    if other:
        raise SystemExit(f"{len(other)} answers differ, such as {other[0]}; no time is shown")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8, help="of each of the four sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--batch", type=int, nargs="*", default=[1, 8, 32], help="the peer's; its best counts"
    )
    parser.add_argument("--new-tokens", type=int, default=200, help="longest answer")
    parser.add_argument("--out", type=Path, help="as it comes: as records.py names it")
    args = parser.parse_args()
    # its threads would be counted as this one's time
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    from lorry.config import ModelConfig
    from lorry.models.gguf.embedded import resolve_embedded_model
    from lorry.models.loading.open import open_model

    data = data_folder()
    if data is None or not (data / "tofu").is_dir():
        raise SystemExit("TOFU is not on disk; set LORRY_DATA to a folder that has tofu/")
    torch.set_num_threads(1)
    suite = load_suite(data / "tofu", args.rows, args.new_tokens)
    folder = resolve_embedded_model(MODEL, print)
    opened = open_model(ModelConfig(name=str(folder), dtype="float32"), print)
    most = max(args.batch)
    engines: dict[str, Callable[[], Answered]] = {"Lorry": lambda: by_lorry(opened, suite, most)}
    padded = Padded(folder, 1)
    for batch in args.batch:

        def run(batch: int = batch) -> Answered:
            padded.batch = batch
            return padded.ask(suite)

        engines[f"transformers, padded, {batch} rows"] = run
    taken: dict[str, list[Answered]] = {name: [] for name in engines}
    # in turns: a machine that is busy for a while is busy for all
    for _ in range(args.rounds):
        for name, engine in engines.items():
            taken[name].append(engine())
            refuse_other_values(taken["Lorry"][0], taken[name][-1])
    count = sum(len(one.rows) for one in suite.sets.values())
    middle = {n: statistics.median(one.seconds for one in runs) for n, runs in taken.items()}
    best = min(seconds for name, seconds in middle.items() if name != "Lorry")
    # of each round by itself, then the middle one: rounds may differ more than engines
    ratio = statistics.median(
        min(taken[name][turn].seconds for name in taken if name != "Lorry") / ours.seconds
        for turn, ours in enumerate(taken["Lorry"])
    )
    rows = [
        [
            name,
            f"{count / middle[name]:.2f}",
            f"{statistics.median(one.scoring for one in runs):.1f}",
            f"{statistics.median(one.generating for one in runs):.1f}",
            "" if name == "Lorry" else f"{middle[name] / middle['Lorry']:.2f}x",
        ]
        for name, runs in taken.items()
    ]
    shown = "reached" if ratio >= TARGET else "not reached"
    record = {
        "title": f"TOFU's suite: {args.rows} rows of each of four sets, float32, one thread, processor time",
        "text": (
            f"SmolLM2-135M-Instruct, answers of up to {args.new_tokens} tokens, the median of {args.rounds} rounds in turns; the mean "
            f"loss of {len(taken['Lorry'][0].losses)} answers agrees within {AGREE} nats and {len(taken['Lorry'][0].texts)} answers "
            f"are the same texts. Against the best batch size {ratio:.2f}x (target {TARGET:g}x: {shown})."
        ),
        "columns": ["engine", "rows/s", "s scoring", "s generating", "Lorry is faster"],
        "rows": rows,
        "seconds": {n: [[one.scoring, one.generating] for one in runs] for n, runs in taken.items()},
        "ratio": ratio,
        "best_seconds": best,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    keep(record, "suite", path=args.out)
    print(record["text"])
    for row in rows:
        print(" | ".join(row))


if __name__ == "__main__":
    main()
