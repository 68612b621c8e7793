"""A study: which router over four LoRA experts comes near the expert that knows, and at what cost.

    make study-experts                           # SmolLM2-135M; about 90 minutes on two quiet cores
    python benchmarks/experts_study.py --small   # fewer rows and steps, one thread
    python benchmarks/experts_study.py --small --only uniform prototype
    python benchmarks/experts_study.py --docs    # docs/experts.md and its plot from the JSON

Experts for truthfulqa, gsm8k, common_gen and questions about long texts are trained in one run
(MLP alone, so that both levels and every export can have them), beside them two of one domain whose
rows were drawn at random. Over them stand every router, merges, and one adapter on all rows. Each
is asked for its loss on held-out rows, and then for answers. The oracle is, for each row, the
expert of its domain.

Every model is made by the command line, and asked by a process of its own, whose memory is its own.
What is finished is not done again: the same command goes on. Rows: experts_rows.py; the table:
experts_table.py. Results: benchmarks/results/experts-cpu.json, with --small experts-small-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import experts_table
from experts_rows import (
    DOMAINS,
    FULL,
    HALVES,
    MODEL,
    ROOT,
    SMALL,
    SPLIT_DOMAIN,
    TURNS,
    UNSEEN,
    Size,
    read_lines,
    write_rows,
)
from measure import peak_rss, rss
from unlearn_study import Unfinished, call

if TYPE_CHECKING:
    from torch import Tensor

    from lorry.adapters.mix import Mix
    from lorry.models.loading.open import OpenedModel

BY_TOKEN_LONG = f"{experts_table.BY_TOKEN}-more"
RANKS = {"truthfulqa": 8, "gsm8k": 16, "common_gen": 8, "longqa": 16, **dict.fromkeys(HALVES, 8)}
TARGETS = ["gate_proj", "up_proj", "down_proj"]
METRIC = {
    "truthfulqa": "rouge_l",
    "gsm8k": "number_match",
    "common_gen": "rouge_l",
    "longqa": "token_f1",
}
NEW_TOKENS = {"truthfulqa": 40, "gsm8k": 160, "common_gen": 32, "longqa": 16}
ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class Method:
    """A row of the table: its name, the directory that is opened, and what is active there.

    ``side``: base, an adapter's name, or None: what the directory is as `lorry.load` opens it.
    ``router``: of the mixture that the directory is; ``merge``: the method of `lorry merge` that
    makes it; ``experts``: whose; ``extra``: asked for unseen domains and two in a row, too.
    """

    name: str
    words: str
    directory: str
    side: str | None = None
    router: Mapping[str, Any] = field(default_factory=dict)
    merge: str = ""
    experts: Sequence[str] = DOMAINS
    seed: int = 0
    extra: bool = True


def list_methods(size: Size) -> list[Method]:
    """Every row, in the order they are made: first what others stand on, last what adds least."""
    uniform = {"kind": "uniform"}
    train = {
        "max_steps": size.router_steps,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": size.router_rows,
        "save_steps": 20,
    }

    def token(level: str, top_k: int, **others: Any) -> dict[str, Any]:
        straight = {"straight_through": True} if top_k == 1 else {}
        settings = {"level": level, "top_k": top_k, "train": train | others}
        return {"kind": "token", **settings, **straight}

    def mixture(name: str, words: str, router: Mapping[str, Any], **others: Any) -> Method:
        return Method(name, words, name, router=router, **others)

    found = [Method("base", "base", "uniform", "base", uniform)]
    found += [Method(d, f"expert {d}", "uniform", d, uniform) for d in DOMAINS]
    found += [
        mixture("uniform", "uniform, 1/4 each", uniform),
        mixture("prototype", "prototype", {"kind": "prototype"}),
        mixture("sequence", "classifier", {"kind": "sequence"}),
        mixture("token-delta-2", "token router, delta, top-2", token("delta", 2)),
        mixture("token-delta-1", "token router, delta, top-1", token("delta", 1)),
        Method("joint", "one adapter on all rows, rank 48", "joint", "default"),
        mixture("token-expert-2", "token router, expert, top-2", token("expert", 2)),
    ]
    if more := size.more_steps:
        words = f"token router, delta, top-2, {more} steps"
        found.append(mixture(BY_TOKEN_LONG, words, token("delta", 2, max_steps=more)))
    found += [
        mixture(f"{kind}-{k}", f"{kind}, top-{k}", {"kind": kind, "top_k": k}, extra=k == 2)
        for k in (2, 1)
        for kind in ("arrow", "spectr")
    ]
    found += [
        Method(name, f"{name}, of {SPLIT_DOMAIN}", "halves-uniform", name, uniform,
               experts=HALVES, extra=False)
        for name in HALVES
    ]  # fmt: skip
    found += [
        mixture(f"halves-{name}", f"{words} over the halves", router, experts=HALVES, extra=False)
        for name, words, router in (
            ("uniform", "uniform, 1/2 each", uniform),
            ("token", "token router", token("delta", 2)),
        )
    ]
    # PEFT's linear wants equal ranks; core_linear is the same sum of deltas at any
    found += [
        Method(method, f"merge {method}, best scale", method, "default", merge=method, extra=False)
        for method in ("core_linear", "ties_svd", "core_tsv")
    ]
    found.append(mixture("token-expert-1", "token router, expert, top-1", token("expert", 1)))
    return found + [
        mixture(f"token-delta-2-seed{seed}", f"token router, delta, top-2, seed {seed}",
                token("delta", 2), seed=seed, extra=False)
        for seed in range(1, size.seeds)
    ]  # fmt: skip


# --- making: every model by the command line


class Workshop:
    """Where the study's models lie, and what makes those that are not there."""

    def __init__(self, args: argparse.Namespace, size: Size, deadline: float) -> None:
        self.work, self.size, self.deadline = args.work, size, deadline
        self.threads = args.threads

    def file(self, name: str) -> str:
        """A data file."""
        return str(self.work / "data" / f"{name}.jsonl")

    def lorry(self, name: str, *words: str) -> None:
        """A command of Lorry's, its output in NAME.log. Raises Unfinished when the time is over."""
        print(f"--- {name}", flush=True)
        call(words, self.work / f"{name}.log", self.deadline)

    def describe(self, name: str, **settings: Any) -> str:
        """A description on disk, JSON in a .yaml file, which YAML can read."""
        path = self.work / f"{name}.yaml"
        path.write_text(json.dumps(settings, indent=1) + "\n")
        return str(path)

    def common(self, directory: str) -> dict[str, Any]:
        """Of every run."""
        # a prompt's frame and its question beside the long text: nothing is cut here
        data = {"max_length": self.size.context + 256}
        return {
            "model": MODEL,
            "backend": {"threads": self.threads},
            "lora": {"target_modules": TARGETS},
            "data": data,
            "output_dir": str(self.work / directory),
        }

    def train_settings(self) -> dict[str, Any]:
        """Of the experts and of the one adapter on all rows."""
        return {
            "learning_rate": 1e-3,
            "num_train_epochs": self.size.epochs,
            "per_device_train_batch_size": self.size.batch,
            "save_steps": 20,
            "resume_from_checkpoint": "auto",
            "seed": 0,
        }

    def make_experts(self) -> None:
        """Those of the domains and of the halves, jobs of one run."""
        if (self.work / "experts/receipt.json").exists():
            return
        jobs = [
            {"name": n, "data": self.file(f"{n}.train"), "r": r, "lora_alpha": 2 * r}
            for n, r in RANKS.items()
        ]
        # few rows, and long: smaller steps, or there would be hardly any
        next(job for job in jobs if job["name"] == "longqa")["per_device_train_batch_size"] = (
            self.size.batch // 2
        )
        run = self.describe(
            "experts", **self.common("experts"), train=self.train_settings(), jobs=jobs
        )
        self.lorry("experts", "sft", run)

    def make_joint(self) -> None:
        """One adapter on the rows of all domains, with all experts' values together."""
        if (self.work / "joint/receipt.json").exists():
            return
        common = self.common("joint")
        common["data"] |= {"path": [self.file(f"{d}.train") for d in DOMAINS]}
        rank = sum(RANKS[d] for d in DOMAINS)
        common["lora"] |= {"r": rank, "lora_alpha": 2 * rank}
        run = self.describe("joint", **common, train=self.train_settings())
        self.lorry("joint", "sft", run)

    def make(self, method: Method) -> None:
        """The directory of a method."""
        path = self.work / method.directory
        if method.directory == "joint":
            self.make_joint()
        elif method.merge and not (path / "adapter_config.json").exists():
            folders = [str(self.work / "experts" / d) for d in DOMAINS]
            self.lorry(method.name, "merge", *folders, f"method={method.merge}", "scale=auto",
                       f"data={self.file('choose')}", f"output_dir={path}")  # fmt: skip
        elif method.router and not (path / "router/router.json").exists():
            experts = [
                {
                    "name": name,
                    "adapter": str(self.work / "experts" / name),
                    "data": self.file(f"{name}.train"),
                }
                for name in method.experts
            ]
            run = self.describe(
                method.directory, **self.common(method.directory), experts=experts,
                router=method.router, train={"seed": method.seed},
            )  # fmt: skip
            self.lorry(method.directory, "moe", run)

    def ask(self, method: Method, answers: bool) -> None:
        """Find what the method does on rows that it has not seen, in a process of its own."""
        name = f"{method.name}.{'answers' if answers else 'loss'}"
        path = self.work / "asked" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            print(f"    asked: {name}", flush=True)
            with (self.work / "ask.log").open("a") as log:
                words = ["--work", str(self.work), "--threads", str(self.threads)]
                words += ["--small"] * (self.size is SMALL) + ["--ask", name]
                process = subprocess.Popen(
                    [sys.executable, __file__, *words], stdout=log, stderr=log
                )
                try:
                    code = process.wait(max(self.deadline - time.monotonic(), 1))
                except subprocess.TimeoutExpired:
                    process.kill()  # it keeps nothing that is half done
                    process.wait()
                    raise Unfinished from None
            if code:
                sys.exit(f"asking {name}: exit code {code}; see {self.work / 'ask.log'}")


# --- asking: in a process of its own


class GateCounter:
    """Who got what: the gates a mixture's router makes, counted. ``sums`` [K]: of gates; ``chosen``
    [K]: how often an expert's was the largest, over tokens (or sequences) and places that have a
    router.
    """

    def __init__(self, opened: OpenedModel) -> None:
        from lorry.adapters.attach import get_bank

        routers = get_bank(opened.model, create=True).routers
        self.router: Any = next(iter(routers.values()), None)
        if self.router is not None:
            # whatever the kind, these are what its gates come from
            called = "linear_gates" if hasattr(self.router, "linear_gates") else "gates"
            self.make_gates = getattr(self.router, called)
            setattr(self.router, called, self._count)
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.sums: Any = 0
        self.chosen: Any = 0

    def _count(self, *inputs: Any) -> Tensor:
        import torch

        gates: Tensor = self.make_gates(*inputs)
        each = gates.detach().reshape(-1, len(self.router.adapters)).double()
        self.sums = self.sums + each.sum(0)
        self.chosen = self.chosen + torch.bincount(each.argmax(-1), minlength=each.shape[1])
        return gates

    def shares(self) -> dict[str, dict[str, float]]:
        """{gate, chosen: {expert: its share}}; empty where there is no router."""
        if self.router is None:
            return {}
        return {
            what: dict(zip(self.router.adapters, (counted / counted.sum()).tolist(), strict=True))
            for what, counted in (("gate", self.sums), ("chosen", self.chosen.double()))
        }


def answer_losses(opened: OpenedModel, path: str, mix: Mix) -> tuple[list[Any], int]:
    """(for each row a [summed loss in nats, tokens] for each of its answers, tokens that were run).
    An answer is a stretch of supervised tokens."""
    from lorry.config.evaluation import EvalSettings
    from lorry.generation.scorer import ModelScorer
    from lorry.models.scoring.score import TokenScore, log_prob
    from lorry.verbs.eval import encode_eval_rows, open_eval_source

    settings = EvalSettings.model_validate(
        {"model": {"name": MODEL}, "data": {"path": path, "max_length": 4096}}
    )
    rows = encode_eval_rows(settings, opened, open_eval_source(settings))
    scorer, found, tokens = ModelScorer(opened.model), list[Any](), 0
    for batch in rows.tokens.eval_batches(ROWS_AT_ONCE):
        scores = scorer.score([batch], {"logprob": TokenScore(log_prob)}, mix)[0]["logprob"]
        tokens += batch.tokens.numel()
        for start, stop in batch.segments:
            row: list[list[float]] = []
            last = -2
            for at in (position for position in batch.rows.tolist() if start <= position < stop):
                if at != last + 1:
                    row.append([0.0, 0])
                row[-1][0] -= float(scores[at])
                row[-1][1] += 1
                last = at
            found.append(row)
    return found, tokens


def mix_of(opened: OpenedModel, side: str | None) -> Mix:
    """What is active."""
    from lorry.adapters.mix import Mix

    if side == "base":
        return Mix.none()
    if side is None:
        assert opened.mixture is not None
        return opened.mixture
    # a folder of one adapter names it after itself
    return Mix.one(side if side in opened.adapters else opened.adapters[0])


def ask_losses(work: Path, method: Method, opened: OpenedModel) -> dict[str, Any]:
    """{losses: {file: rows}, gates: {file: shares}, tokens_per_second, ...}: CPU seconds of the
    domains' rows, since other processes may have the machine, too."""
    mix, counter = mix_of(opened, method.side), GateCounter(opened)
    domains = DOMAINS if method.experts == DOMAINS else (SPLIT_DOMAIN,)
    losses, gates, tokens, seconds = dict[str, Any](), dict[str, Any](), 0, 0.0
    for name in (*domains, *((*UNSEEN, TURNS) if method.extra else ())):
        counter.reset()
        began = time.process_time()
        losses[name], count = answer_losses(opened, str(work / f"data/{name}.held.jsonl"), mix)
        if name in domains:
            tokens, seconds = tokens + count, seconds + time.process_time() - began
        if method.side is None:
            gates[name] = counter.shares()
    return {"losses": losses, "gates": gates, "tokens_per_second": tokens / seconds}


def ask_answers(work: Path, method: Method, opened: OpenedModel, size: Size) -> dict[str, Any]:
    """{metrics: {domain: a value per row}, answers: {domain: texts}, tokens_per_second}."""
    from lorry.api import generate
    from lorry.evaluate.metrics.number import number_match
    from lorry.evaluate.metrics.registry import score_each

    mix = mix_of(opened, method.side)
    values, texts, tokens, seconds = dict[str, Any](), dict[str, Any](), 0, 0.0
    for domain in DOMAINS:
        rows = read_lines(work / f"data/{domain}.held.jsonl")[: size.answers]
        prompts, began = [row["messages"][0]["content"] for row in rows], time.process_time()
        texts[domain] = generate(
            opened.model, opened.tokenizer, prompts, adapters=mix, max_new_tokens=NEW_TOKENS[domain]
        )
        seconds += time.process_time() - began
        tokens += sum(len(ids) for ids in opened.tokenizer(texts[domain])["input_ids"])
        references = [row["answers"] for row in rows]
        values[domain] = (
            [number_match(t, r) for t, r in zip(texts[domain], references, strict=True)]
            if METRIC[domain] == "number_match"
            else score_each(texts[domain], references)[METRIC[domain]]
        )
    return {"metrics": values, "answers": texts, "tokens_per_second": tokens / seconds}


def ask(name: str, args: argparse.Namespace, size: Size) -> None:
    """What `--ask` does: open one model, ask it, write what it did."""
    import torch

    import lorry.verbs.eval  # noqa: F401 - imports are not what is measured
    from lorry.config.schema.model import ModelConfig
    from lorry.verbs.open_model import open_with_adapters

    torch.set_num_threads(args.threads)
    method_name, _, what = name.rpartition(".")
    method = next(m for m in list_methods(size) if m.name == method_name)
    imports = rss()
    opened = open_with_adapters(
        ModelConfig.model_validate({"name": str(args.work / method.directory)})
    )
    asked = (
        ask_losses(args.work, method, opened)
        if what == "loss"
        else ask_answers(args.work, method, opened, size)
    )
    asked |= {"memory_bytes": peak_rss() - imports, "dtype": opened.source["dtype"]}
    path = args.work / "asked" / f"{name}.json"
    # a name appears with all of it, or not at all
    path.with_suffix(".new").write_text(json.dumps(asked))
    os.replace(path.with_suffix(".new"), path)


def settings_of(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    """What a reader needs to run it again; where it lay on this machine is nobody's business."""
    kept = {k: v for k, v in vars(args).items() if k in ("small", "threads", "only")}
    return {**kept, "size": asdict(size), "model": MODEL, "ranks": RANKS, "targets": TARGETS}


def make_and_ask(methods: Sequence[Method], args: argparse.Namespace, size: Size) -> bool:
    """Whether all of it was done before the time was over."""
    workshop = Workshop(args, size, time.monotonic() + 60 * args.minutes)
    try:
        workshop.make_experts()
        for method in methods:
            workshop.make(method)
            workshop.ask(method, answers=False)
        # last: losses decide, and answers take the longest
        for method in [] if args.no_answers else methods:
            if method.experts == DOMAINS and not method.seed:
                workshop.ask(method, answers=True)
    except Unfinished:
        print("the time of this sitting is over; the same command goes on", flush=True)
        return False
    return True


def gather(work: Path, methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    """{method: what it was asked}, of all that have been asked for their losses by now."""
    found = dict[str, dict[str, Any]]()
    for method in methods:
        losses, answers = (work / "asked" / f"{method.name}.{w}.json" for w in ("loss", "answers"))
        if not losses.exists():
            continue
        found[method.name] = {"words": method.words, **json.loads(losses.read_text())}
        if answers.exists():
            asked = json.loads(answers.read_text())
            found[method.name]["metrics"] = asked["metrics"]
            found[method.name]["generated_per_second"] = asked["tokens_per_second"]
    return found


def main() -> int:
    """Do pieces until all are done or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer rows and steps, one thread")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--minutes", type=float, default=20.0, help="of one call of this script")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", nargs="*", default=None, help="methods, by name")
    parser.add_argument("--no-answers", action="store_true", help="losses alone")
    parser.add_argument("--record", action="store_true", help="the JSON of what is finished")
    parser.add_argument("--docs", action="store_true", help="write docs/experts.md and its plot")
    parser.add_argument("--ask", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size, name = (SMALL, "experts-small") if args.small else (FULL, "experts")
    args.work = args.work or ROOT / "build" / f"study-{name}"
    args.threads = args.threads or (1 if args.small else 2)
    if args.docs:
        experts_table.write_docs(ROOT)
        return 0
    if args.ask:
        ask(args.ask, args, size)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    write_rows(args.work / "data", size)
    found = list_methods(size)
    if odd := set(args.only or ()) - {m.name for m in found}:
        sys.exit(f"no method is called {min(odd)}; there are {', '.join(m.name for m in found)}")
    found = [m for m in found if args.only is None or m.name in args.only]
    finished = args.record or make_and_ask(found, args, size)
    results = gather(args.work, list_methods(size))
    if "base" in results and set(DOMAINS) <= set(results):
        path = ROOT / "benchmarks/results" / f"{name}-cpu.json"
        settings = {**settings_of(args, size), "dtype": results["base"]["dtype"]}
        record = experts_table.make_record(results, settings)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {path}")
    return 0 if finished else 75  # EX_TEMPFAIL: try again


if __name__ == "__main__":
    sys.exit(main())
