"""The plots of docs/results.md: bars of speed and memory per configuration, lines over lengths, and
the loss curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import by_processor

OURS, THEIRS, ANCHOR = "#c2410c", "#64748b", "#cbd5e1"
LINES = (
    "#c2410c",
    "#334155",
    "#0e7490",
    "#7c3aed",
    "#a16207",
    "#be185d",
    "#15803d",
    "#94a3b8",
    "#1d4ed8",
)
Record = Mapping[str, Any]


def draw(records: Mapping[str, Record], folder: Path) -> dict[str, Path]:
    """A PNG per record that has something to draw, and one named sweep-... where there are several
    lengths of an instruction set on a processor.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = {}
    for name, record in records.items():
        if record.get("kind") in ("sft", "chat") and record["table"]:
            made[name] = bars(record)
        elif record.get("kind") == "curve":
            made[name] = curves(record)
    rank_16 = [
        r
        for r in records.values()
        if r.get("kind") == "sft" and (r["case"]["rank"], r["case"]["threads"]) == (16, 1)
    ]
    for name, mine in by_processor(rank_16).items():
        if len({r["case"]["length"] for r in mine}) > 1:
            made[f"sweep-{name}"] = over_lengths(sorted(mine, key=lambda r: r["case"]["length"]))
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in made.items():
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return {name: folder / f"{name}.png" for name in made}


def bars(record: Record) -> Any:
    """Speed on the left, memory on the right, an engine a row."""
    from matplotlib import pyplot

    engines = list(record["table"])[::-1]
    colours = [
        OURS if e.startswith("lorry") else ANCHOR if e in record["anchors"] else THEIRS
        for e in engines
    ]
    figure, axes = pyplot.subplots(
        1, 2, figsize=(10, 0.9 + 0.36 * len(engines)), sharey=True, layout="constrained"
    )
    for axis, key, unit, form in (
        (axes[0], "tokens_per_second", 1.0, "{:.0f}"),
        (axes[1], "memory_bytes", 2.0**30, "{:.2f}"),
    ):
        values = [record["table"][e][key] / unit for e in engines]
        axis.bar_label(
            axis.barh(engines, values, color=colours),
            [form.format(v) for v in values],
            padding=3,
            fontsize=8,
        )
        axis.margins(x=0.14)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("tokens per second (longer is better)", fontsize=9)
    axes[1].set_title("GiB above imports (shorter is better)", fontsize=9)
    return figure


def over_lengths(records: list[Record]) -> Any:
    """Speed and memory over the length, a line per engine."""
    from matplotlib import pyplot

    engines = list(dict.fromkeys(e for r in records for e in r["table"] if e not in r["anchors"]))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, unit, label in (
        (axes[0], "tokens_per_second", 1.0, "tokens per second"),
        (axes[1], "memory_bytes", 2.0**30, "GiB above imports"),
    ):
        for engine, colour in zip(engines, LINES * 2, strict=False):
            points = [
                (r["case"]["length"], r["table"][engine][key] / unit)
                for r in records
                if engine in r["table"]
            ]
            axis.plot(
                *zip(*points, strict=True),
                "o-",
                color=colour,
                label=engine,
                linewidth=2.5 if engine == "lorry" else 1.2,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(
            sorted({r["case"]["length"] for r in records}),
            [str(n) for n in sorted({r["case"]["length"] for r in records})],
        )
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens per row")
        axis.set_title(label, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def curves(record: Record) -> Any:
    """Running means of the losses: PEFT's seeds as a band, Lorry as a line."""
    from matplotlib import pyplot

    window = record["window"]
    means = {
        name: [sum(losses[at - window : at]) / window for at in range(window, len(losses) + 1)]
        for name, losses in record["losses"].items()
    }
    theirs = [values for name, values in means.items() if name.startswith("peft")]
    steps = range(window, window + len(theirs[0]))
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axis.fill_between(
        steps,
        [min(at) for at in zip(*theirs, strict=True)],
        [max(at) for at in zip(*theirs, strict=True)],
        color=ANCHOR,
        label="PEFT, three seeds",
    )
    axis.plot(steps, theirs[0], color=THEIRS, linewidth=1, label="PEFT, Lorry's seed")
    axis.plot(
        steps,
        next(v for n, v in means.items() if n.startswith("lorry")),
        color=OURS,
        linewidth=1.5,
        linestyle="--",
        label="Lorry",
    )
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss, mean of the last {window} steps")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
