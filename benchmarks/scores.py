"""The vocabulary's share of a step: scores and their gradient by tiles, by chunks of whole rows,
and the bare matrix products.

.venv/bin/python benchmarks/scores.py               time and memory at SmolLM2's head (V = 49152, d = 576), 1024 rows, bfloat16
.venv/bin/python benchmarks/scores.py --sweep       also every size of groups and tiles, of which `models/scoring/tiles.py` holds the best
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.kernels import kernel_status
from lorry.models.scoring import score, tiles
from lorry.models.scoring.score import entropy, log_prob
from lorry.models.scoring.vocab import VocabRows, min_k
from lorry.train.resources.peak import tune_allocator

VOCAB, WIDTH, ROWS = 49152, 576, 1024


def peak() -> int:
    """The highest the resident set has been, MiB (Linux; getrusage would count the parent this
    process was started from).
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def rise(name: str) -> int:
    """How far one run of ``name`` raises the peak, in a process of its own: the allocator keeps
    what it once had.
    """
    command = [sys.executable, __file__, "--memory", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(runs: dict[str, Callable[[], object]], times: int = 7) -> None:
    """In turn, so that a busy machine is busy for all: median and spread of CPU time."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(times):
        for name, run in runs.items():
            began = time.thread_time()
            run()
            seconds[name].append(1e3 * (time.thread_time() - began))
    for name, taken in seconds.items():
        print(
            f"{name:42s} {statistics.median(taken):8.1f} ms ({min(taken):.1f} to {max(taken):.1f})"
        )


def plain(hidden: Tensor, head: Tensor, rows: VocabRows) -> None:
    """What a loop without chunks does: all logits, in fp32."""
    torch.autograd.grad(
        F.cross_entropy((hidden @ head.t()).float(), rows.targets, reduction="sum"), hidden
    )


def products(hidden: Tensor, head: Tensor, rows: int, width: int) -> None:
    """The two products of a score and its gradient and nothing else."""
    for group in hidden.detach().split(rows):
        space, part = group.new_empty(len(group), width), torch.empty_like(group)
        for weight in head.split(width):
            torch.mm(torch.mm(group, weight.t(), out=space), weight, out=part)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument(
        "--memory",
        metavar="NAME",
        help="print how far one run of NAME raises the peak resident set, MiB",
    )
    options = parser.parse_args()
    if not kernel_status().active:
        raise SystemExit(f"the kernels do not run here: {kernel_status().line()}")
    tune_allocator()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # in place: a copy in fp32 would set the peak
    head = torch.empty(VOCAB, WIDTH, dtype=torch.bfloat16).normal_(std=0.05)
    hidden = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16).normal_().requires_grad_()
    rows = VocabRows(torch.randint(0, VOCAB, (ROWS,)), {})

    frozen = tiles.OutputHead(head)

    def graded(*fns: tiles.VocabStatistic) -> None:
        torch.autograd.grad(tiles.compute_statistics(hidden, frozen, fns, rows).sum(), hidden)

    runs: dict[str, Callable[[], object]] = {
        "log_prob, by tiles": lambda: graded(log_prob),
        "log_prob, no gradient": lambda: tiles.compute_statistics(
            hidden.detach(), frozen, [log_prob], rows
        ),
        "log_prob + entropy, by tiles": lambda: graded(log_prob, entropy),
        "log_prob + entropy + min_k, by tiles": lambda: graded(log_prob, entropy, min_k),
        "log_prob, autograd on chunks of 256 rows": lambda: score.FullLogitsFunction.apply(
            hidden, frozen, [lambda x, r: log_prob(x, r)], rows
        ),
        "cross_entropy on all logits": lambda: plain(hidden, head, rows),
        "two products, 256 rows x vocabulary": lambda: products(hidden, head, 256, VOCAB),
        "two products, 512 rows x vocabulary": lambda: products(hidden, head, 512, VOCAB),
        "two products, 1024 rows x 2048 columns": lambda: products(hidden, head, 1024, 2048),
    }
    if options.memory:
        products(hidden[:64], head[:64], 64, 64)  # the libraries' own start
        before = peak()
        runs[options.memory]()
        print(peak() - before)
        return
    measure(runs)
    for name in runs:
        print(f"{name:42s} +{rise(name)} MiB")
    for group in (256, 512, 1024) if options.sweep else ():
        for bits in (19, 20, 21, 22):
            tiles.GROUP_ROWS, tiles.TILE_ELEMENTS = group, 1 << bits
            measure(
                {f"log_prob, groups of {group}, tiles of 2^{bits}": lambda: graded(log_prob)}, 5
            )


if __name__ == "__main__":
    main()
