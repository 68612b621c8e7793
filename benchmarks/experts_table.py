"""What benchmarks/experts_study.py found, as a record, and as the tables and the plot of
docs/experts.md, which are made of the record and of nothing else.

A domain's loss is the mean over its supervised tokens, its interval the 95% of a bootstrap over
rows. What a method costs over the oracle is compared on the same rows: resamples are drawn alike
for all methods, since rows differ much more from each other than methods do.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts_rows import DOMAINS, HALVES, SPLIT_DOMAIN, TURN_DOMAINS, TURNS, UNSEEN
from measure import machine
from results import grid
from study_page import StudyPage

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 2000
PAGE = StudyPage(
    "docs/experts.md", "experts_study.py", ("experts-cpu", "experts-small-cpu"), "study-experts"
)
ORACLE = "oracle"
# the targets: of each domain for routers of sequences, of the mean for the token router
NEAR_ORACLE, NEAR_ORACLE_MEAN = 0.01, 0.03
BY_SEQUENCE, BY_TOKEN = ("prototype", "sequence"), "token-delta-2"
MERGES = ("core_linear", "ties_svd", "core_tsv")
Interval = list[float]  # value, low, high


# --- the record


@cache
def draws(name: str, rows: int) -> NDArray[Any]:
    """[RESAMPLES, rows] numbers of rows, the same for every method."""
    import numpy as np

    generator = np.random.default_rng([*name.encode()])
    return generator.integers(rows, size=(RESAMPLES, rows))


def resampled_loss(name: str, pairs: Sequence[Sequence[float]]) -> NDArray[Any]:
    """[1 + RESAMPLES]: the loss of all rows, then of each resample. ``pairs``: of each row (summed
    loss, tokens)."""
    import numpy as np

    nll, tokens = np.array(pairs, dtype=float).T
    chosen = draws(name, len(nll))
    each = nll[chosen].sum(1) / tokens[chosen].sum(1)
    return np.concatenate([[nll.sum() / tokens.sum()], each])


def interval(values: NDArray[Any]) -> Interval:
    """[the first, 2.5% and 97.5% of the others]."""
    import numpy as np

    low, high = np.percentile(values[1:], [2.5, 97.5])
    return [round(float(v), 5) for v in (values[0], low, high)]


def answer(rows: Sequence[Sequence[Any]], number: int) -> list[Any]:
    """(summed loss, tokens) of one answer of each row."""
    return [row[number] for row in rows]


def make_record(
    results: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything as JSON. ``results``: what each method was asked (`experts_study.ask`), with base
    and every expert among them."""
    oracle_rows = {d: results[d]["losses"][d] for d in DOMAINS}
    oracle = {d: resampled_loss(d, answer(rows, 0)) for d, rows in oracle_rows.items()}
    oracle_mean = sum(oracle.values())
    values: dict[str, dict[str, Any]] = {
        ORACLE: {
            "words": "oracle: each row its expert",
            "loss": {d: interval(losses) for d, losses in oracle.items()},
            "metric": {
                d: mean_interval(d, results[d]["metrics"][d])
                for d in DOMAINS
                if "metrics" in results[d]
            },
            TURNS: {
                d: interval(resampled_loss(TURNS, answer(results[d]["losses"][TURNS], number)))
                for number, d in enumerate(TURN_DOMAINS)
            },
        }
    }
    for name, asked in results.items():
        losses = {
            d: resampled_loss(d, answer(asked["losses"][d], 0))
            for d in DOMAINS
            if d in asked["losses"]
        }
        value = values[name] = {
            "words": asked["words"],
            "loss": {d: interval(loss) for d, loss in losses.items()},
            "over_oracle": {d: interval(loss / oracle[d] - 1) for d, loss in losses.items()},
            "unseen": {
                d: interval(resampled_loss(d, answer(asked["losses"][d], 0)))
                for d in UNSEEN
                if d in asked["losses"]
            },
            "metric": {d: mean_interval(d, rows) for d, rows in asked.get("metrics", {}).items()},
            "gates": asked["gates"],
            "tokens_per_second": round(asked["tokens_per_second"], 1),
            "memory_bytes": asked["memory_bytes"],
        }
        if TURNS in asked["losses"]:
            value[TURNS] = {
                d: interval(resampled_loss(TURNS, answer(asked["losses"][TURNS], number)))
                for number, d in enumerate(TURN_DOMAINS)
            }
        if "generated_per_second" in asked:
            value["generated_per_second"] = round(asked["generated_per_second"], 2)
        if set(losses) == set(DOMAINS):
            value["mean_over_oracle"] = interval(sum(losses.values()) / oracle_mean - 1)
    columns, rows = loss_table(values)
    small = " (small)" if settings["small"] else ""
    return {
        "title": f"Routers over four LoRA experts{small}, {settings['model']}",
        "text": (
            "`make study-experts`, or `benchmarks/experts_study.py` with the settings in the JSON: "
            "loss of held-out rows [95% of a bootstrap over them]; docs/experts.md has the rest."
        ),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "settings": settings,
        "columns": columns,
        "rows": rows,
        "values": values,
    }


def mean_interval(domain: str, rows: Sequence[float]) -> Interval:
    """Of the mean of a value per row."""
    return interval(resampled_loss(domain, [(value, 1) for value in rows]))


# --- tables: each from `values` of the record alone


def cell(value: Interval | None, form: str = ".3f") -> str:
    """value [low, high], or nothing."""
    if value is None:
        return ""
    return "{} [{}, {}]".format(*(format(number, form) for number in value))


def accuracy(value: Mapping[str, Any]) -> float | None:
    """The mean over domains of how often the largest gate is their own expert's."""
    gates = value.get("gates", {})
    if not set(DOMAINS) <= {d for d, shares in gates.items() if shares}:
        return None
    return float(sum(gates[d]["chosen"][d] for d in DOMAINS) / len(DOMAINS))


def load(value: Mapping[str, Any]) -> dict[str, float] | None:
    """{expert: its share of the gates}, domains weighed equally."""
    gates = value.get("gates", {})
    if not set(DOMAINS) <= {d for d, shares in gates.items() if shares}:
        return None
    return {e: sum(gates[d]["gate"][e] for d in DOMAINS) / len(DOMAINS) for e in DOMAINS}


def loss_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Losses by domain, what they are over the oracle's, who was chosen."""
    columns = ["", *DOMAINS, "mean over the oracle's", "own expert has the largest gate", "load"]
    rows = []
    for value in values.values():
        if not set(DOMAINS) <= set(value["loss"]):
            continue
        right, shares = accuracy(value), load(value)
        over = value.get("mean_over_oracle")
        rows.append(
            [
                value["words"],
                *(cell(value["loss"][d]) for d in DOMAINS),
                cell(over, "+.1%"),
                "" if right is None else f"{right:.0%}",
                ""
                if shares is None
                else f"{min(shares.values()):.0%} to {max(shares.values()):.0%}",
            ]
        )
    return columns, rows


def cost_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Task metrics, speed and memory."""
    metrics = ["truthfulqa ROUGE-L", "gsm8k number", "common_gen ROUGE-L", "longqa F1"]
    columns = ["", *metrics, "scored tokens/s", "generated tokens/s", "MiB"]
    rows = []
    for name, value in values.items():
        if name != ORACLE and not set(DOMAINS) <= set(value["loss"]):
            continue
        metric, generated = value["metric"], value.get("generated_per_second")
        rows.append(
            [
                value["words"],
                *(f"{metric[d][0]:.2f}" if d in metric else "" for d in DOMAINS),
                f"{value['tokens_per_second']:.0f}" if "tokens_per_second" in value else "",
                "" if generated is None else f"{generated:.1f}",
                f"{value['memory_bytes'] / 2**20:.0f}" if "memory_bytes" in value else "",
            ]
        )
    return columns, rows


def extra_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Domains that no expert has, and two domains in one sequence."""
    columns = [
        "",
        *UNSEEN,
        *(
            f"{d}, {which} answer"
            for d, which in zip(TURN_DOMAINS, ("first", "second"), strict=True)
        ),
    ]
    rows = [
        [
            value["words"],
            *(cell(value.get("unseen", {}).get(d)) for d in UNSEEN),
            *(cell(value[TURNS][d]) for d in TURN_DOMAINS),
        ]
        for value in values.values()
        if TURNS in value
    ]
    return columns, rows


def halves_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Experts of one domain whose rows were drawn at random."""
    names = (SPLIT_DOMAIN, *HALVES, "halves-uniform", "halves-token")
    return ["", f"loss of {SPLIT_DOMAIN}", "over the expert of all rows"], [
        [
            values[name]["words"],
            cell(values[name]["loss"][SPLIT_DOMAIN]),
            cell(values[name]["over_oracle"][SPLIT_DOMAIN], "+.1%"),
        ]
        for name in names
        if name in values
    ]


def targets_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What was set out for, and what was measured."""
    rows = []
    for name in BY_SEQUENCE:
        if name in values:
            over = {d: value[0] for d, value in values[name]["over_oracle"].items()}
            worst = max(over, key=lambda d: over[d])
            rows.append(
                [
                    f"{values[name]['words']}: at most {NEAR_ORACLE:.0%} over the oracle in each",
                    f"{over[worst]:+.2%} ({worst})",
                    over[worst] <= NEAR_ORACLE,
                ]
            )
    if BY_TOKEN in values:
        mean = values[BY_TOKEN]["mean_over_oracle"][0]
        rows.append(
            [
                f"{values[BY_TOKEN]['words']}: at most {NEAR_ORACLE_MEAN:.0%} over it on the mean",
                f"{mean:+.2%}",
                mean <= NEAR_ORACLE_MEAN,
            ]
        )
    others = [n for n in ("uniform", *MERGES, *DOMAINS) if "mean_over_oracle" in values.get(n, {})]
    best = min(others, key=lambda name: values[name]["mean_over_oracle"][0])
    mean = values[best]["mean_over_oracle"][0]
    missing = [name for name in MERGES if name not in values]
    note = f"; not run: {', '.join(missing)}" if missing else ""
    for name in (*BY_SEQUENCE, BY_TOKEN):
        if name in values:
            own = values[name]["mean_over_oracle"][0]
            rows.append(
                [
                    f"{values[name]['words']}: below uniform, merges, single experts on the mean",
                    f"{own:+.2%}, the best of those {mean:+.2%} ({values[best]['words']}{note})",
                    own < mean,
                ]
            )
    return ["target", "measured", "met"], [[*row[:2], "yes" if row[2] else "no"] for row in rows]


def docs_section(record: Mapping[str, Any], picture: str) -> str:
    """What stands between the marks of docs/experts.md."""
    values, settings, where = record["values"], record["settings"], record["machine"]
    size = settings["size"]
    train = ", ".join(f"{size['train'][d]} of {d}" for d in DOMAINS)
    small = " --small" if settings["small"] else ""
    threads, ranks = settings["threads"], ", ".join(str(settings["ranks"][d]) for d in DOMAINS)
    said = (
        f"{record['date']}, `python benchmarks/experts_study.py{small}`, {settings['model']} in "
        f"{settings['dtype']} on {where['cpu']}, {threads} thread{'s' * (threads > 1)}: experts of "
        f"{train} rows ({size['epochs']} epoch, ranks {ranks}), {size['held']} held-out rows each "
        f"({size['held_long']} of longqa, whose texts are cut to {size['context']} tokens), "
        f"token routers of {size['router_steps']} steps with "
        f"{size['router_rows']} row{'s' * (size['router_rows'] > 1)} of each domain."
    )
    parts = [said, "Targets:", table(targets_table(values)), "Loss of held-out rows [95%]:"]
    parts += [table(loss_table(values)), f"![Over the oracle, and who got what]({picture})"]
    parts += [
        "Answers, speed (tokens per CPU second), memory (of the scoring process, above imports):"
    ]
    parts += [
        table(cost_table(values)),
        "Domains that no expert has, and conversations of two domains:",
    ]
    parts += [table(extra_table(values))]
    if "halves-uniform" in values:
        parts += [f"Two experts of {SPLIT_DOMAIN}, each with half of its rows, drawn at random:"]
        parts += [table(halves_table(values))]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def table(columns_and_rows: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    """As Markdown."""
    return grid(*columns_and_rows)


def write_docs(root: Path) -> None:
    """The section of docs/experts.md, and its plot."""
    name, record = PAGE.find_record(root)
    page, picture = root / PAGE.path, f"results/{name}.png"
    page.write_text(PAGE.put(page.read_text(), docs_section(record, picture)))
    draw(record["values"], root / "docs" / picture)
    print(f"{page} and {picture}, from {name}.json")


def draw(values: Mapping[str, Any], path: Path) -> None:
    """Left, what each method is over the oracle on the mean; right, for each router, the experts'
    shares of the gates by domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    routers = [n for n, v in values.items() if load(v) is not None and "seed" not in n]
    bars = [n for n, v in values.items() if "mean_over_oracle" in v]
    wide = -(-len(routers) // 3)
    figure = pyplot.figure(figsize=(11, 0.9 + 0.26 * len(bars)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    axis = left.subplots()
    numbers = [100 * values[n]["mean_over_oracle"][0] for n in bars]
    errors = [
        [
            abs(100 * values[n]["mean_over_oracle"][end] - number)
            for n, number in zip(bars, numbers, strict=True)
        ]
        for end in (1, 2)
    ]  # fmt: skip
    axis.barh(
        bars,
        numbers,
        xerr=errors,
        color=["#c2410c" if n in routers else "#64748b" for n in bars],
        ecolor="#94a3b8",
    )
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_title("mean loss, % over the oracle's", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    grids = right.subplots(max(wide, 1), 3, squeeze=False).flatten()
    for axis in grids[len(routers) :]:
        axis.set_visible(False)
    for axis, name in zip(grids, routers, strict=False):
        shares = [[values[name]["gates"][d]["gate"][e] for e in DOMAINS] for d in DOMAINS]
        axis.imshow(shares, vmin=0, vmax=1, cmap="Oranges")
        axis.set_title(name, fontsize=7)
        axis.set_xticks(range(len(DOMAINS)), [d[:2] for d in DOMAINS], fontsize=6)
        axis.set_yticks(range(len(DOMAINS)), [d[:5] for d in DOMAINS], fontsize=6)
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
