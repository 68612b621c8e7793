"""What large models need on many GPUs, by `lorry plan`: the tables of docs/scaling.md.

    python benchmarks/scaling.py           # prints them
    python benchmarks/scaling.py --docs    # writes them into docs/scaling.md

Nothing is measured: each row is the plan of one command. Layouts that fit an H100 get a row, with
the longest row of tokens that would still fit; the others are named with what they would need.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorry.config import PlanSettings, parse_settings
from lorry.config.parsing.sizes import size_in_words
from lorry.errors import ConfigError
from lorry.notes import ignore_note
from lorry.plan.configs import find_config
from lorry.plan.parallel.communication import Collective
from lorry.plan.report import RunPlan
from lorry.verbs.planning.build import build_plan

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
BEGIN = "<!-- made by: python benchmarks/scaling.py --docs -->\n"
END = "<!-- end of what was made -->\n"
MODELS = {
    "llama-3-8b": "8B", "llama-3-70b": "70B", "llama-3-405b": "405B",
    "qwen3-235b-a22b": "A mixture of experts, 235B with 22B active",
}  # fmt: skip
GPUS = (8, 64, 256, 1024)
MACHINE = 8  # GPUs of a machine
LENGTH, LONGEST = 4096, 131072
# bytes a second: NVLink 4 of an H100 one way, and the 400 Gbit/s network adapter of each GPU
INSIDE, BETWEEN = 450e9, 50e9
SHARDS = (MACHINE, 4 * MACHINE)  # of HSDP: groups of one machine, and of four
COMMON = (
    "gpu=h100", "dtype=bfloat16", "r=16", "per_device_train_batch_size=1", "gradient_checkpointing=true",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A way to use so many GPUs, as it is typed."""

    words: str
    plan: RunPlan

    @property
    def name(self) -> str:
        """What it is on any number of GPUs."""
        return self.words.partition(" replicas")[0]

    @property
    def least(self) -> str:
        """The GPUs that its memory hangs on: of fsdp those that share the base."""
        split = self.plan.split
        return f"{split.shards * split.tensor if split.shards > 1 else 'any number of'} GPUs"

    @property
    def inside(self) -> int:
        """Bytes that a GPU sends in a step in groups that lie in one machine."""
        return sum(c.sent for c in self.plan.sent if c.span <= MACHINE)

    @property
    def seconds(self) -> float:
        """For sending, as if nothing were computed meanwhile, and without latencies."""
        return sum(c.sent / rate_of(c) for c in self.plan.sent)


def rate_of(collective: Collective) -> float:
    """Bytes a second at which a GPU sends in a ring: between machines as many rings share the work as
    the group has GPUs in each, every one with a network adapter of its own.
    """
    if collective.span <= MACHINE:
        return INSIDE
    per_machine = max(1, MACHINE * collective.ranks // collective.span)
    return min(INSIDE, per_machine * BETWEEN)


def plan_of(model: str, gpus: int, words: str, length: int = LENGTH) -> RunPlan:
    """`lorry plan` of these words. Raises ConfigError."""
    given = [model, f"processes={gpus}", f"max_length={length}", *COMMON, *words.split()]
    settings = parse_settings(PlanSettings, given, ignore_note)
    assert isinstance(settings, PlanSettings)
    return build_plan(settings, find_config(model))


def layouts(model: str, gpus: int) -> Iterator[Layout | str]:
    """What can be typed for so many GPUs; of what is refused the reason."""
    words = ["backend=ddp", "backend=fsdp"]
    words += [f"backend=fsdp replicas={gpus // shards}" for shards in SHARDS if shards < gpus]
    words += [f"backend=ddp tensor_parallel={MACHINE}"]
    words += [f"backend=fsdp tensor_parallel={MACHINE}"] * (gpus > MACHINE)
    words.append(f"{words[-1]} sequence_parallel=true")
    for each in words:
        try:
            yield Layout(each, plan_of(model, gpus, each))
        except ConfigError as error:
            yield str(error)


def longest_row(model: str, gpus: int, words: str, context: int) -> int:
    """The most tokens of one row, by doubling, that still fit."""
    length = LENGTH
    while length < min(LONGEST, context) and plan_of(model, gpus, words, 2 * length).fits:
        length *= 2
    return length


def table(model: str) -> str:
    """The part of the page about one model."""
    lines = [
        "| GPUs | layout | rows a step | a GPU needs | longest row | sent in a machine "
        "| in wider groups | sending | computing |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    short, refused = dict[str, dict[str, None]](), dict[str, None]()
    for gpus in GPUS:
        for layout in layouts(model, gpus):
            if isinstance(layout, str):
                refused[layout] = None
            elif layout.plan.fits:
                lines.append(row(model, gpus, layout))
            else:
                need = f"{size_in_words(layout.plan.memory.total)} on {layout.least}"
                short.setdefault(layout.name, {})[need] = None
    parts = ["\n".join(lines)]
    if short:
        told = [f"`{name}` ({', '.join(needs)})" for name, needs in short.items()]
        parts.append(f"Does not fit, since a GPU would need: {'; '.join(told)}.")
    parts += [f"Refused: {reason}." for reason in refused]
    return "\n\n".join(parts) + "\n"


def row(model: str, gpus: int, layout: Layout) -> str:
    """A layout that fits."""
    plan = layout.plan
    assert plan.speed is not None
    longest = longest_row(model, gpus, layout.words, plan.shape.geometry.context)
    cells = [
        str(gpus),
        f"`{layout.words}`",
        str(plan.split.data),
        size_in_words(plan.memory.total),
        f"{longest:,}",
        size_in_words(layout.inside),
        size_in_words(plan.sent_per_step - layout.inside),
        f"{layout.seconds:.2f} s",
        f"{plan.speed.seconds_per_step:.2f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def adapters() -> str:
    """Sizes of adapters of rank 16."""
    lines = [
        "| model | values | saved | checkpoint | sync to an inference engine |",
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        plan = plan_of(model, 1024, "backend=fsdp")
        sizes = plan.adapter_sizes
        cells = [model, f"{plan.adapter_parameters / 1e6:.1f}M"]
        cells += [size_in_words(size) for size in (sizes.file, sizes.checkpoint, sizes.sync)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def made() -> str:
    """All that the page has from plans."""
    parts = [f"### {says}: `{model}`\n\n{table(model)}" for model, says in MODELS.items()]
    return "\n".join([*parts, f"### The adapter\n\n{adapters()}"])


def with_tables(page: str, tables: str) -> str:
    """The page with these tables in place of its own."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", action="store_true", help="write them into docs/scaling.md")
    if not parser.parse_args(argv).docs:
        print(made())
        return
    PAGE.write_text(with_tables(PAGE.read_text(), made()))


if __name__ == "__main__":
    main()
