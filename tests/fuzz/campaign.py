"""Fuzzing of everything that reads strangers' files: `make fuzz`, or one target for ten minutes:

    python -m tests.fuzz.campaign --seconds 600 --targets rows/json template --seed 7

Every input follows from (seed, target, number), so a finding can be made again; it is kept in
tests/fuzz/cases/TARGET, where `test_fuzz.py` reads it from then on. The table at the end counts
executions, refusals and findings; exit code 1 with findings.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

from tests.fuzz.mutation import mutate
from tests.fuzz.targets import Target, targets

CASES = Path(__file__).resolve().parent / "cases"
SECONDS = 20.0  # of processor time for one input: hundreds of times what the slowest takes
MEMORY = 12 << 30  # bytes of address space; an input that makes a reader ask for more is a finding


@dataclass
class Tally:
    """What became of a target's inputs; ``findings`` by where they arose."""

    executions: int = 0
    refused: int = 0
    slowest: float = 0.0
    findings: dict[str, Path] = field(default_factory=dict)


class TooSlow(BaseException):
    """An input took longer than `SECONDS`; no Exception, so that no reader can take it for damage
    of its file.
    """


def _ring(number: int, frame: FrameType | None) -> None:
    raise TooSlow


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the block after so many seconds of this process's processor time, which are
    no fewer where others have the cores.
    """
    before = signal.signal(signal.SIGPROF, _ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def execute(target: Target, data: bytes) -> bool:
    """Give an input to a target in a fresh folder; whether it was refused. Raises what the target
    raises beyond that.
    """
    with tempfile.TemporaryDirectory() as folder, bounded(SECONDS):
        try:
            target.read(data, Path(folder))
        except target.refusals:
            return True
    return False


def made(target: Target, seed: int, number: int) -> bytes:
    """Input ``number`` of a target: the seeds themselves first, then their mutations."""
    seeds = target.seeds()
    if number < len(seeds):
        return seeds[number]
    draw = random.Random(f"{seed}/{target.name}/{number}")
    return mutate(draw.choice(seeds), seeds, draw)


def attempt(target: Target, seed: int, number: int, tally: Tally, keep: Path | None) -> None:
    """Execute one input and count it; the input of a new finding is kept, and its traceback
    printed.
    """
    data, began = made(target, seed, number), time.perf_counter()
    tally.executions += 1
    try:
        tally.refused += execute(target, data)
    except (Exception, TooSlow) as error:  # noqa: BLE001 - whatever a reader lets through is what is looked for
        place = _place(error)
        if place in tally.findings:
            return
        name = hashlib.sha256(data).hexdigest()[:12]
        tally.findings[place] = path = (keep or Path()) / target.name.replace("/", "-") / name
        if keep is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        print(f"--- {target.name} input {number} of seed {seed}: {place}", flush=True)
        traceback.print_exception(error, limit=-6, file=sys.stdout)
    tally.slowest = max(tally.slowest, time.perf_counter() - began)


def _place(error: BaseException) -> str:
    """The kind of an error and where in Lorry it arose."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/lorry/" in f.filename
    ] or traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=240, help="wall clock for all targets together"
    )
    parser.add_argument(
        "--targets", nargs="*", default=[], help="names, or beginnings of names; none: all"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other inputs")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    known = targets()
    chosen = [
        t for name, t in known.items() if not asked.targets or name.startswith(tuple(asked.targets))
    ]
    if not chosen:
        parser.error(f"no such target; there are {', '.join(known)}")
    tallies = {target.name: Tally() for target in chosen}
    end = time.monotonic() + asked.seconds
    # each gets its share of what is left, so that slow ones do not crowd out the others
    for target in chosen:
        until = time.monotonic() + (end - time.monotonic()) / (len(chosen) - chosen.index(target))
        while time.monotonic() < until:
            attempt(
                target, asked.seed, tallies[target.name].executions, tallies[target.name], CASES
            )
    print(f"{'target':32}{'executions':>12}{'refused':>10}{'findings':>10}{'slowest, s':>12}")
    for name, tally in tallies.items():
        print(
            f"{name:32}{tally.executions:>12,}{tally.refused:>10,}{len(tally.findings):>10}{tally.slowest:>12.2f}"
        )
    executions, findings = (
        sum(x)
        for x in zip(*((t.executions, len(t.findings)) for t in tallies.values()), strict=True)
    )
    print(
        f"{executions:,} executions, {findings} findings (seed {asked.seed}); cases lie in {CASES}"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
