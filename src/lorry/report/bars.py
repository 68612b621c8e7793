"""Results as bars with their intervals, as a PNG; drawn by matplotlib without a display.

draw_bars({"bool_q": "bool_q\\naccuracy"}, {"base": {"bool_q": (0.5, (0.4, 0.6))}, "people": {"bool_q": (0.7, (0.6, 0.8))}})
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lorry.report.plots import PNG_DPI, SERIES_COLORS, encode_png, escape_label

BarValue = tuple[float, tuple[float, float]]  # a value and its interval


def draw_bars(
    groups: Mapping[str, str], sides: Mapping[str, Mapping[str, BarValue]], title: str = ""
) -> bytes:
    """A group of bars per key of ``groups`` (key -> its label), a bar in it per side, its interval,
    if it has one (finite ends), as a whisker; each group on an axis of its own, since units differ."""
    # most of a second, only for those who draw
    from matplotlib.figure import Figure

    columns = min(len(groups), 4)
    rows = -(-len(groups) // columns)
    figure = Figure(
        figsize=(max(3.2 * columns, 5), 3.1 * rows + 0.6), dpi=PNG_DPI, layout="constrained"
    )
    for index, (key, label) in enumerate(groups.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for at, (_side, values) in enumerate(sides.items()):
            if key not in values:
                continue
            value, (low, high) = values[key]
            axes.bar(at, value, width=0.8, color=SERIES_COLORS[at % len(SERIES_COLORS)])
            if math.isfinite(low) and math.isfinite(high):
                whisker = [[max(value - low, 0)], [max(high - value, 0)]]
                axes.errorbar(at, value, yerr=whisker, color="#333", capsize=4, linewidth=1)
        axes.set_title(escape_label(label), loc="left", fontsize=10, fontweight="bold")
        axes.set_xticks(
            range(len(sides)),
            [escape_label(side) for side in sides],
            fontsize=8,
            rotation=30 if len(sides) > 3 else 0,
        )
        axes.tick_params(axis="y", labelsize=8)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(escape_label(title), fontsize=13)
    return encode_png(figure)
