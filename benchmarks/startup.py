"""Where the time of `lorry sft` goes from the command to the end of its first step: the embedded model,
1,000 rows.

    python benchmarks/startup.py --rows 1000

Two runs, each in a fresh process: the first converts the model, builds the kernels and proves the
decoder, in a LORRY_HOME of its own; the second finds all that. Seconds of processor time of the
process itself (what a compiler takes is not in it), in what order they come, each stage without
those inside it; and tokens per second of tokenising. JSON goes to benchmarks/results/ (records.py).
"""

from __future__ import annotations

import argparse
import builtins
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from case import MODEL
from measure import Others, machine
from tokenise import answers

# where a stage's work is done: module, name in it, what it is called here
STAGES = (
    ("lorry.train.session", "claim_output_dir", "settings and output directory"),
    ("lorry.train.session", "open_base", "base: read"),
    ("lorry.models.loading.load", "describe_model", "base: described"),
    ("lorry.models.loading.load", "find_native_mismatch", "base: proved, or its proof found"),
    ("lorry.models.loading.load", "load_tokenizer", "tokenizer"),
    ("lorry.train.session", "attach_jobs", "adapter"),
    ("lorry.train.session", "prepare_jobs", "rows: read and tokenised"),
    ("lorry.train.session", "build_engine", "engine and first checks"),
)
STEP = "the first step"


class Stopwatch:
    """Processor seconds by stage; time inside a stage that another begins is the other's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"interpreter": time.process_time()}
        self._open, self._since = ["everything else"], time.process_time()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time of this block."""
        self._note()
        self._open.append(name)
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def _note(self) -> None:
        now, name = time.process_time(), self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def watch(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, whose calls are a stage."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return watched

    def watch_imports(self) -> None:
        """Imports are stages, by package: torch, transformers, Lorry's own, all others."""
        for module, name in ((builtins, "__import__"), (importlib, "import_module")):
            original = getattr(module, name)

            def load(
                wanted: str, *args: Any, original: Callable[..., Any] = original, **kwargs: Any
            ) -> Any:
                whole = _whole_name(wanted, args, kwargs)
                if whole in sys.modules:
                    return original(wanted, *args, **kwargs)
                package = whole.partition(".")[0]
                group = package if package in ("torch", "transformers", "lorry") else "others"
                with self.stage(f"import: {group}"):
                    return original(wanted, *args, **kwargs)

            setattr(module, name, load)


def _whole_name(wanted: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The name of a module that `__import__` or `import_module` is asked for, without leading dots."""
    if wanted.startswith("."):  # import_module(".name", package)
        return importlib.util.resolve_name(wanted, kwargs.get("package") or args[0])
    level = kwargs.get("level", args[3] if len(args) > 3 else 0)
    if not level:
        return wanted
    scope = args[0]
    package = scope.get("__package__") or scope["__spec__"].parent
    return importlib.util.resolve_name("." * level + wanted, package)


def work(arguments: list[str], said: Path) -> None:
    """`lorry sft` in this process, up to the end of its first step."""
    clock = Stopwatch()
    clock.watch_imports()
    from lorry import cli
    from lorry.imports import kept_imports

    with kept_imports():  # as the command imports them
        from lorry.train import engine

        modules = {place: importlib.import_module(place) for place, _, _ in STAGES}
    for place, name, stage in STAGES:
        module = modules[place]
        setattr(module, name, clock.watch(getattr(module, name), stage))
    step = engine.TrainingEngine._one_step

    def first(self: Any, *rest: Any) -> None:
        with clock.stage(STEP):
            step(self, *rest)
        said.write_text(json.dumps({"seconds": clock.seconds, "total": time.process_time()}))
        os._exit(0)  # what comes after is no part of a start

    engine.TrainingEngine._one_step = first  # type: ignore[method-assign]
    sys.argv = ["lorry", "sft", *arguments]
    sys.exit(cli.main())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args, more = parser.parse_known_args()
    if args.worker:
        work([*args.worker[1:], *more], Path(args.worker[0]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers(folder / "rows.jsonl", args.rows)
        env = {**os.environ, "LORRY_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        runs = []
        for number in (1, 2):
            settings = {
                "model": MODEL,
                "data": folder / "rows.jsonl",
                "output_dir": folder / f"run{number}",
                "max_steps": 2,
            }
            others = Others()
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, __file__, "--worker", str(folder / "said.json")]
                + [f"{key}={value}" for key, value in settings.items()],
                env=env,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            found = json.loads((folder / "said.json").read_text())
            runs.append(
                {
                    "total": round(found["total"], 2),
                    "wall": round(time.perf_counter() - began, 2),
                    "others_cores": round(others.cores(), 2),
                    "seconds": {k: round(v, 2) for k, v in found["seconds"].items() if v >= 0.005},
                }
            )
    record = {"machine": machine(), "asked_rows": args.rows, **table(runs, args.rows), "runs": runs}
    print(json.dumps(record, indent=1))
    if not args.no_keep:
        from records import keep  # it imports of Lorry, which is a stage of the worker's

        print(f"kept in {keep(record, 'startup')}", file=sys.stderr)


def table(runs: Sequence[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """What `benchmarks/results.py` shows: each stage's seconds in the first run and in the second."""
    first, second = (run["seconds"] for run in runs)
    cells = [
        [stage, *(f"{run.get(stage, 0):.2f}" for run in (first, second))]
        for stage in dict.fromkeys([*first, *second])
    ]
    whole = [f"{run['total']:.2f}" for run in runs]
    busy = max(run["others_cores"] for run in runs)
    said = "the first converts the model, builds the kernels and proves the decoder; the second finds all that"
    return {
        "title": "From `lorry sft` to the end of its first step",
        "text": f"Seconds of processor time, {rows} rows, {MODEL}: {said}. Other programs had {busy:.1f} cores meanwhile.",
        "columns": ["stage", "first run", "second run"],
        "rows": [*cells, ["all", *whole]],
    }


if __name__ == "__main__":
    main()
