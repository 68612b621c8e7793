"""GRPO with vLLM as the rollout engine: every version sent, proved and compared; then faults, made
on purpose, that have to be found.

    make bench-rollout                                   # both, in .venv-rollout (docs/rollout.md)
    python benchmarks/rollout.py --url http://127.0.0.1:8000 --steps 20
    python benchmarks/rollout.py --url http://127.0.0.1:8000 --steps 3 --merged
    python benchmarks/rollout.py --in-process --steps 3

With --url adapters go to a vLLM server by /v1/load_lora_adapter; with --merged also whole models that
each adapter is merged into, by /collective_rpc (VLLM_SERVER_DEV_MODE=1). With --in-process to a vLLM in
this process: first by LoRARequest, then merged models. Trainer and engine:
bfloat16, by other kernels. A line says of each version: reward of the rollouts
before it, seconds and bytes of its push, how far the engine's log-probabilities are from the
trainer's, what share of the adapter's effect it shows, and how many greedy answers are the same.
Seconds are those of the machine as it was, with its load beside them. The record goes to
benchmarks/results/ (records.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from case import data_folder
from measure import machine
from records import keep, record_path

from lorry.adapters.merge import merged_tensors
from lorry.adapters.mix import Mix
from lorry.adapters.peft.files import adapter_files
from lorry.errors import LorryError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout import (
    AdapterSync,
    AdapterVersion,
    MergedSync,
    ModelPublisher,
    SyncReport,
    VersionPublisher,
    VllmEngine,
    VllmServer,
    check_held,
)
from lorry.models.loading.store import save_model
from lorry.runs.layout import ADAPTER_WEIGHTS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "rollout"))
from grpo import POLICY, GrpoTrainer, Settings, make_probe, open_policy, read_questions

MODEL = "smollm2-135m-instruct"
PROBES = 8


class Recorded:
    """An engine whose last answers can be looked at. ``engine``: what is asked."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.label = engine, engine.label
        self.last: list[Completion] = []
        self.load_lora_adapter = engine.load_lora_adapter
        self.unload_lora_adapter = engine.unload_lora_adapter
        self.list_lora_adapters = engine.list_lora_adapters
        self.held_digests = engine.held_digests
        self.load_model = engine.load_model

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, adapter: str | None
    ) -> list[Completion]:
        self.last = self.engine.generate(prompts, params, adapter=adapter)
        return self.last


def find_questions() -> Path:
    """SVAMP.json, of LORRY_DATA or ../shared/data."""
    data = data_folder()
    if data is None or not (path := data / "svamp" / "SVAMP.json").is_file():
        sys.exit("svamp/SVAMP.json is not there; set LORRY_DATA to a folder that has it")
    return path


def pick_questions(tokenizer: Any) -> list[Any]:
    """A quarter of the questions, the shortest, shuffled: engine and trainer share a CPU."""
    questions = sorted(read_questions(find_questions(), tokenizer), key=lambda q: len(q.prompt))
    return random.Random(0).sample(questions[: len(questions) // 4], len(questions) // 4)


def compare_greedy(
    backend: Any, probe: Any, answers: Sequence[Completion], mix: Mix
) -> dict[str, int]:
    """Greedy answers of engine and trainer: how many are the same, and how many tokens up to the
    first that differs."""
    ours = backend.generate(
        probe.prompts, SamplingParams(max_new_tokens=probe.max_new_tokens), adapters=mix
    )
    same = tokens = 0
    for mine, theirs in zip(ours, answers, strict=True):
        pairs = list(zip(mine.tokens, theirs.tokens, strict=False))
        alike = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same += alike == len(pairs)
        tokens += alike
    return {"same_answers": same, "answers": len(ours), "same_tokens": tokens}


def describe(report: Any) -> dict[str, Any]:
    """A push as JSON."""
    return {
        "version": report.version.name,
        "seconds": round(report.seconds, 3),
        "bytes": report.bytes,
        "load_average": round(os.getloadavg()[0], 1),
        **{f"gap_{k}": v for gap in report.gaps.values() for k, v in asdict(gap).items()},
    }


def outcome(found: Callable[[], object]) -> str:
    """What a fault was found with, or that it was not."""
    try:
        found()
    except LorryError as error:
        return f"{type(error).__name__}: {error}"
    return "not found"


def train(engine: Any, policy: tuple[Any, Any], steps: int, folder: Path) -> dict[str, Any]:
    """GRPO with adapters, and the faults at its end."""
    model, tokenizer = policy
    engine = Recorded(engine)
    questions = pick_questions(tokenizer)
    settings = Settings(steps=steps)
    sync = AdapterSync(VersionPublisher(folder), [engine])
    trainer = GrpoTrainer(model, tokenizer, engine, sync, settings)
    lines, previous = follow(trainer, engine, questions)
    current, probe = sync.current, sync.probe
    assert current is not None
    assert probe is not None
    adapter_bytes = (current.path / ADAPTER_WEIGHTS).stat().st_size
    made = {
        "settings": asdict(settings),
        "bounds": {"mean": probe.mean_bound, "largest": probe.bound},
        "digests_of": "memory" if getattr(engine.engine, "reads_memory", False) else "file",
        "adapter_bytes": adapter_bytes,
        "bytes_over_adapter": current.bytes / adapter_bytes,
        "versions": lines,
        "highest_load": max(line["load_average"] for line in lines),
    }
    return made | (
        {} if "stopped" in lines[-1] else {"faults": break_it(trainer, engine, previous)}
    )


def follow(trainer: Any, engine: Recorded, questions: Sequence[Any]) -> tuple[list[Any], Any]:
    """Its steps, a line for each version, and the version before the last."""
    prompts = [question.prompt for question in questions[-PROBES:]]
    probe = trainer.sync.probe = make_probe(
        trainer.backend, prompts, max_new_tokens=trainer.settings.max_new_tokens
    )
    lines: list[dict[str, Any]] = []

    def keep_line(line: dict[str, Any]) -> None:
        if "stopped" not in line:
            line |= compare_greedy(trainer.backend, probe, engine.last, Mix.one(POLICY))
        lines.append(line)
        print(json.dumps(line), flush=True)

    keep_line(describe(trainer.push(stepped=False)))
    previous = None
    for step in range(trainer.settings.steps):
        previous = trainer.sync.current
        try:
            record = trainer.step(step, questions[:-PROBES])
        except LorryError as error:
            # what was made so far is kept, and why no more
            keep_line({"step": step + 1, "stopped": str(error), "load_average": 0})
            break
        of_step = {k: v for k, v in asdict(record).items() if k != "sync"}
        keep_line(of_step | describe(record.sync))
    return lines, previous


def break_it(trainer: GrpoTrainer, engine: Recorded, previous: AdapterVersion) -> dict[str, str]:
    """Faults made on purpose, and what each was found with. ``previous``: the version before the
    current one."""
    sync, probe, prompts = trainer.sync, trainer.sync.probe, trainer.sync.probe.prompts
    params = SamplingParams(max_new_tokens=probe.max_new_tokens, logprobs=True)
    base = engine.generate(prompts, params, adapter=None)
    engine.load_lora_adapter(previous)
    stale = engine.generate(prompts, params, adapter=previous.name)
    engine.unload_lora_adapter(previous.name)
    old = (previous.path / ADAPTER_WEIGHTS).read_bytes()
    lost = sync.publisher.publish(adapter_files(trainer.model, POLICY))
    (lost.path / ADAPTER_WEIGHTS).write_bytes(old)
    engine.load_lora_adapter(lost)
    faults = {
        "rollouts of the version before": outcome(lambda: sync.check_rollouts(previous.name)),
        "the version was never sent": outcome(
            lambda: check_held(
                engine, AdapterVersion(99, lost.path.with_name("lora_v000099"), {}, 0)
            )
        ),
        "the file of the version before in this directory": outcome(
            lambda: check_held(engine, lost)
        ),
        "greedy answers of the base": outcome(
            lambda: probe.compare(base, "vLLM", "the base in its place")
        ),
        "greedy answers of the version before": outcome(
            lambda: probe.compare(stale, "vLLM", "the version before in its place")
        ),
    }
    engine.unload_lora_adapter(lost.name)
    for name, found in faults.items():
        print(f"{name}: {found}", flush=True)
    return faults


class MergedTrainer(GrpoTrainer):
    """The same, with whole models in the place of the engine's base."""

    def write(self, folder: Path) -> None:
        """The merged model, in bfloat16; the trainer's own weights stay as they are."""
        save_model(
            self.model,
            folder,
            tensors=merged_tensors(self.model, {POLICY: 1.0}, dtype=torch.bfloat16),
            tokenizer=self.tokenizer,
            dtype=torch.bfloat16,
        )

    def push(self, *, stepped: bool) -> SyncReport:
        return self.sync.push(self.write, stepped=stepped)

    def sample(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Completion]:
        return self.engine.generate(prompts, params, adapter=None)


def merge(engine: Any, policy: tuple[Any, Any], steps: int, folder: Path) -> dict[str, Any]:
    """GRPO with merged models, from the policy as it is; then an adapter over them, on purpose."""
    model, tokenizer = policy
    engine = Recorded(engine)
    questions = pick_questions(tokenizer)
    sync: Any = MergedSync(ModelPublisher(folder), [engine])
    trainer = MergedTrainer(model, tokenizer, engine, sync, Settings(steps=steps, seed=steps))
    lines, _ = follow(trainer, engine, questions)
    made: dict[str, Any] = {"versions": lines}
    if "stopped" in lines[-1]:
        return made
    over = AdapterSync(VersionPublisher(folder), [engine], sync.probe)
    files = adapter_files(model, POLICY)
    made["faults"] = {
        "the same model again": outcome(lambda: sync.push(trainer.write, stepped=True)),
        "the adapter over weights into which it is merged": outcome(
            lambda: over.push(files, stepped=False)
        ),
    }
    for name, found in made["faults"].items():
        print(f"{name}: {found}", flush=True)
    return made


def merge_after(engine: Any, policy: tuple[Any, Any], steps: int, folder: Path) -> dict[str, Any]:
    """`merge`, once the engine has let go of the adapters that it was trained with."""
    for held in list(engine.list_lora_adapters()):
        engine.unload_lora_adapter(held)
    return merge(engine, policy, steps, folder)


def open_engine(model: str) -> VllmEngine:
    """vLLM in this process, for one adapter at a time."""
    # its workers are threads of this process then, and no weights go through a pipe
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
        enable_lora=True,
        max_lora_rank=16,
        max_cpu_loras=2,
    )
    return VllmEngine(llm)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of a vLLM server")
    parser.add_argument("--merged", action="store_true", help="with --url: merged models too")
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    args = parser.parse_args()
    if not args.url and not args.in_process:
        parser.error("give --url or --in-process")
    policy = open_policy(MODEL)
    parts: dict[str, Mapping[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        if args.url:
            engine: Any = VllmServer(args.url)
            parts["server"] = train(engine, policy, args.steps, Path(name) / "server")
            if args.merged:
                parts["merged_server"] = merge_after(
                    engine, policy, args.steps, Path(name) / "http"
                )
        if args.in_process:
            engine = open_engine(policy[0].config["_name_or_path"])
            parts["in_process"] = train(engine, policy, args.steps, Path(name) / "here")
            parts["merged"] = merge_after(engine, policy, args.steps, Path(name) / "merged")
    if not args.no_keep:
        place = record_path("rollout")
        before = json.loads(place.read_text()) if place.is_file() else {}
        record = {
            **before,
            "kind": "rollout",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            **parts,
        }
        print(f"kept in {keep(record, 'rollout')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
