"""What benchmarks/variants_study.py found, as a record, and as the tables and the plot of
docs/choosing.md, which are made of the record and of nothing else.

A loss is that of the same held-out rows for all. The noise of one training is the standard deviation
of what is left of the losses of ways under several seeds once the mean of each way and what a seed
does to every way alike (the order of rows) are taken off: two trainings are only ever compared under
one seed. Every interval is Student's t with it. What is best of a curve is the lowest point of a
parabola through its best point and the two neighbours, over the logarithm of the rate: whose grid
happens to have its best rate would else win. How far that point may lie comes of curves drawn with
the noise.
All of it is about these held-out rows and no others.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from measure import machine
from plots import LINES
from results import grid
from study_page import StudyPage


def record_name(*, small: bool, dtype: str) -> str:
    """Of a record in benchmarks/results."""
    own = "-float32" if dtype == "float32" else ""
    return f"variants-study{'-small' * small}{own}-cpu"


PAGE = StudyPage(
    "docs/choosing.md", "variants_study.py",
    tuple(record_name(small=small, dtype=d) for small in (False, True) for d in ("bfloat16", "float32")),
    "study-variants",
)  # fmt: skip
PICTURE = "results/variants-study-cpu.png"
PLAIN, WHOLE = "r16-alpha32", "full"
DRAWS, LEVEL = 4000, 0.95
FEWEST = 3  # rates of a curve that says where its best lies
REGRET = "LoRA Without Regret (Schulman 2025)"
COMPARISON = "PEFT's method comparison (2026)"
Interval = tuple[float, float, float]  # value, low, high
Curve = Mapping[float, float]  # {rate: loss}


# --- one task's numbers


@dataclass(frozen=True)
class Found:
    """What one task showed: ``ways`` and ``points`` as in the record."""

    ways: Sequence[Mapping[str, Any]]
    points: Sequence[Mapping[str, Any]]

    @cached_property
    def words(self) -> dict[str, str]:
        """{way: what it is called}."""
        return {way["name"]: way["words"] for way in self.ways}

    @cached_property
    def curves(self) -> dict[str, dict[float, float]]:
        """{way: {rate: loss}} of the grids, by rate; a better rate that was tried later is not among them,
        or who had one would be compared with who had none."""
        found = dict[str, dict[float, float]]()
        for point in sorted(self.points, key=lambda p: p["rate"]):
            if point["grid"]:
                found.setdefault(point["way"], {})[point["rate"]] = point["loss"]
        return found

    @cached_property
    def fresh(self) -> dict[str, dict[int, Mapping[str, Any]]]:
        """{way: {seed: its point}} of the best rates under fresh seeds."""
        found = dict[str, dict[int, Mapping[str, Any]]]()
        for point in self.points:
            if point["seed"]:
                found.setdefault(point["way"], {})[point["seed"]] = point
        return found

    @cached_property
    def seeded(self) -> dict[str, dict[int, float]]:
        """{way: {seed: its loss}} at the best rates: the fresh seeds, and that of the curves."""
        rates = {way: {p["rate"] for p in points.values()} for way, points in self.fresh.items()}
        found: dict[str, dict[int, float]] = {way: {} for way in rates}
        for point in sorted(self.points, key=lambda p: p["seed"]):
            if point["rate"] in rates.get(point["way"], ()):
                found[point["way"]][point["seed"]] = point["loss"]
        return found

    @cached_property
    def noise(self) -> tuple[float, int] | None:
        """(standard deviation of one training, degrees of freedom): of what was trained under several
        seeds, apart from the means of ways and of seeds; None where fewer than two ways share two."""
        import numpy as np

        if not self.seeded:
            return None
        trained = [(w, s, loss) for w, each in self.seeded.items() for s, loss in each.items()]
        ways, seeds = [*self.seeded], sorted({seed for _, seed, _ in trained})
        design = np.zeros((len(trained), len(ways) + len(seeds)))
        for row, (way, seed, _) in zip(design, trained, strict=True):
            row[[ways.index(way), len(ways) + seeds.index(seed)]] = 1
        losses = np.array([loss for _, _, loss in trained])
        effects, _, rank, _ = np.linalg.lstsq(design, losses)
        freedom = len(trained) - int(rank)
        squares = float(((losses - design @ effects) ** 2).sum())
        return (math.sqrt(squares / freedom), freedom) if freedom else None

    @cached_property
    def base_loss(self) -> float | None:
        """Of the model before any training."""
        return next((p["base_loss"] for p in self.points if "base_loss" in p), None)

    def half_width(self, trainings: int, means: int = 2) -> float:
        """Of the interval of a difference of two means over so many trainings each, or of a sum and
        difference of more; infinite where the noise is not known."""
        from scipy.special import stdtrit

        if self.noise is None:
            return math.inf
        deviation, freedom = self.noise
        t = float(stdtrit(freedom, (1 + LEVEL) / 2))
        return t * deviation * math.sqrt(means / trainings)

    def lowest(self, way: str) -> float:
        """The best loss of a curve."""
        return lowest_point(self.curves[way])[1]

    def has_curves(self, *ways: str) -> bool:
        """Whether each has been trained at rates enough."""
        return all(len(self.curves.get(way, {})) >= FEWEST for way in ways)

    @cached_property
    def _drawn(self) -> dict[str, list[Curve]]:
        return {}

    def drawn(self, way: str) -> list[Curve]:
        """A way's curve, then such as the noise might have made of it; none where it is not known."""
        import numpy as np

        if way not in self._drawn:
            curve, found = self.curves[way], list[Curve]()
            if self.noise is not None:
                generator = np.random.default_rng([*way.encode()])
                noise = generator.normal(0, self.noise[0], (DRAWS, len(curve)))
                found = [
                    dict(zip(curve, losses, strict=True))
                    for losses in (noise + np.array([*curve.values()])).tolist()
                ]
            self._drawn[way] = [curve, *found]
        return self._drawn[way]

    def compare(
        self, *terms: tuple[float, str, Callable[[Curve], float | None]], by: float
    ) -> Interval | None:
        """The sum of factor * what is read off a way's curve, over ``by``: the value, and Student's t with the
        spread over drawn curves. None where a curve does not have it."""
        import numpy as np
        from scipy.special import stdtrit

        value, variance = 0.0, 0.0
        for factor, way, read in terms:
            own, *drawn = [read(curve) for curve in self.drawn(way)]
            if own is None:
                return None
            value += factor * own
            variance += factor**2 * float(np.var([x for x in drawn if x is not None] or [0.0]))
        if self.noise is None:
            return value / by, -math.inf, math.inf
        width = float(stdtrit(self.noise[1], (1 + LEVEL) / 2)) * math.sqrt(variance)
        return value / by, (value - width) / by, (value + width) / by

    def over(self, way: str, other: str) -> Interval | None:
        """What the best of one curve lies over that of another, as a share; one seed each."""
        if not self.has_curves(way, other):
            return None
        return self.compare((1, way, low), (-1, other, low), by=self.lowest(other))

    def over_seeds(self, way: str, other: str = PLAIN) -> Interval | None:
        """The same of the means over the seeds that both have; None where either has one alone."""
        if way not in self.seeded or other not in self.seeded:
            return None
        own, its = self.seeded[way], self.seeded[other]
        if not (seeds := own.keys() & its.keys()):
            return None
        means = [sum(losses[seed] for seed in seeds) / len(seeds) for losses in (own, its)]
        return self.share_of(*means, len(seeds))

    def best_over(self, way: str, other: str = PLAIN) -> Interval | None:
        """The same of several seeds where there are, else of the curves."""
        return self.over_seeds(way, other) or self.over(way, other)

    def over_best(self, way: str, rate: float) -> Interval | None:
        """What a way at a rate, between those tried, lies over the best of plain LoRA's curve."""
        if not self.has_curves(way, PLAIN):
            return None
        at = partial(loss_at, rate=rate)
        return self.compare((1, way, at), (-1, PLAIN, low), by=self.lowest(PLAIN))

    def over_at(self, way: str, other: str, rate: float) -> Interval | None:
        """What a way lies over another at the same rate, between those tried of both."""
        if not self.has_curves(way, other):
            return None
        at = partial(loss_at, rate=rate)
        return self.compare((1, way, at), (-1, other, at), by=self.lowest(other))

    def share_of(self, loss: float, other: float, trainings: int = 1) -> Interval:
        """What a loss lies over another, means of so many trainings each."""
        width = self.half_width(trainings)
        by = loss - other
        return by / other, (by - width) / other, (by + width) / other

    def drawn_rates(self, way: str) -> list[float]:
        """The best rate of a way's curve, then those of the curves drawn with the noise."""
        return [best_rate(curve) for curve in self.drawn(way)]

    def ratio(self, way: str, other: str) -> Interval | None:
        """The best rate of one way over that of another."""
        if not self.has_curves(way, other):
            return None
        pairs = zip(self.drawn_rates(way), self.drawn_rates(other), strict=True)
        return interval([one / two for one, two in pairs])

    def cost(self, way: str) -> tuple[float, float] | None:
        """(seconds of processor time for a training, MiB of its process), of the fresh seeds; of a
        pass of several each has its share of the time, and all of the memory."""
        points = [*self.fresh.get(way, {}).values()]
        if not points:
            return None
        seconds = [p["seconds"] / p["jobs"] for p in points]
        return sum(seconds) / len(points), max(p["memory_bytes"] for p in points) / 2**20


def lowest_point(curve: Curve) -> tuple[float, float]:
    """(rate, loss) where the parabola through the best of a curve and its neighbours is lowest, over
    the logarithm of the rate, within the rates tried; at an edge that point itself. A training that
    broke down counts as one at the lowest rate, which learnt least: no parabola goes through it."""
    rates = sorted(curve)
    at = min(range(len(rates)), key=lambda n: curve[rates[n]])
    if not 0 < at < len(rates) - 1:
        return rates[at], curve[rates[at]]
    worst = max(curve[r] for r in rates[:at])
    curve = {r: min(curve[r], worst) for r in rates[at - 1 : at + 2]}
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(r), loss) for r, loss in curve.items())
    up = (x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0)
    if not up:  # all three alike
        return rates[at], y1
    lowest = math.exp(x1 - ((x1 - x0) ** 2 * (y1 - y2) - (x1 - x2) ** 2 * (y1 - y0)) / (2 * up))
    return lowest, _parabola(curve, [*curve], lowest)


def _parabola(curve: Curve, rates: Sequence[float], rate: float) -> float:
    """The value at a rate of the parabola through three points of a curve (Lagrange's form)."""
    x, total = math.log(rate), 0.0
    for r in rates:
        others = [math.log(o) for o in rates if o != r]
        total += curve[r] * math.prod((x - o) / (math.log(r) - o) for o in others)
    return total


def best_rate(curve: Curve) -> float:
    """That of `lowest_point`."""
    return lowest_point(curve)[0]


def low(curve: Curve) -> float:
    """The loss of `lowest_point`."""
    return lowest_point(curve)[1]


def loss_at(curve: Curve, rate: float) -> float | None:
    """At a rate within those tried, by the parabola through the three nearest to it; None outside."""
    rates = sorted(curve)
    if len(rates) < FEWEST or not rates[0] <= rate <= rates[-1]:
        return None
    nearest = sorted(rates, key=lambda r: abs(math.log(r / rate)))[:3]
    return _parabola(curve, nearest, rate)


def at_edge(curve: Curve) -> str:
    """``<=`` or ``>=`` where the best of a curve is its lowest or highest rate."""
    rates = sorted(curve)
    best = min(rates, key=lambda rate: curve[rate])
    return "<= " if best == rates[0] else ">= " if best == rates[-1] else ""


def interval(values: Sequence[float]) -> Interval:
    """(the first, 2.5% and 97.5% of the others); without others the bounds are infinite."""
    import numpy as np

    if len(values) < 2:
        return values[0], -math.inf, math.inf
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return values[0], float(low), float(high)


# --- in words


def rate(value: float) -> str:
    """1.2e-3."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def share(value: Interval | None) -> str:
    """+0.4% [-0.3%, +1.1%], in words where it may as well be nothing."""
    if value is None:
        return "not run"
    shown = "{:+.1%} [{:+.1%}, {:+.1%}]".format(*value)
    if not math.isfinite(value[1]):
        return f"{value[0]:+.1%} (no interval)"
    return shown + (", cannot be told apart" if value[1] <= 0 <= value[2] else "")


def times(value: Interval | None) -> str:
    """x1.4 [0.9, 2.3]."""
    if value is None:
        return "not run"
    if not math.isfinite(value[1]):
        return f"x{value[0]:.2g} (no interval)"
    return "x{:.2g} [{:.2g}, {:.2g}]".format(*value)


def rate_ratio(found: Found, way: str, other: str) -> str:
    """The best rate of one way over that of another, and whether either lies at the edge of its grid."""
    said = times(found.ratio(way, other))
    if not found.has_curves(way, other):
        return said
    edges = [found.words[name] for name in (way, other) if at_edge(found.curves[name])]
    return f"{said} (at the edge of the grid: {', '.join(edges)})" if edges else said


def rate_interval(found: Found, way: str) -> str:
    """The best rate of a way with its interval, and whether it lies at the edge of what was tried."""
    value, low, high = interval(found.drawn_rates(way))
    edge = at_edge(found.curves[way])
    if not math.isfinite(low):
        return f"{edge}{rate(value)}"
    return f"{edge}{rate(value)} [{rate(low)}, {rate(high)}]"


def compared(found: Found, way: str, other: str = PLAIN) -> str:
    """What the best of one way lies over that of another, and whether of its curve alone."""
    value = found.best_over(way, other)
    alone = value is not None and found.over_seeds(way, other) is None
    return share(value) + (", best of its curve" if alone else "")


# --- the claims


def variant_names(found: Found) -> list[str]:
    """All that the study has."""
    return [way["name"] for way in found.ways if way["part"] == "variants"]


def variant_range(found: Found) -> str:
    """How far the variants lie from plain LoRA, and from where to where their best rates."""
    names = variant_names(found)
    over = {name: value for name in names if (value := found.best_over(name)) is not None}
    if not over:
        return "not run"
    low, high = (pick(over, key=lambda n: over[n][0]) for pick in (min, max))
    rates = [best_rate(found.curves[name]) for name in over]
    return (
        f"{len(over)} of {len(names)}: from {over[low][0]:+.1%} ({found.words[low]}) to {over[high][0]:+.1%} "
        f"({found.words[high]}); best rates from {rate(min(rates))} to {rate(max(rates))}"
    )


def batch_effect(found: Found) -> str:
    """What larger batches cost LoRA and whole weights, and LoRA more than those."""
    names = [f"{way}-batch{rows}" for way in ("r16", "full") for rows in (64, 8)]
    lora, whole = found.over(*names[:2]), found.over(*names[2:])
    if lora is None or whole is None:
        return f"LoRA {share(lora)}; whole weights {share(whole)}"
    few, many = found.lowest("r16-batch8"), found.lowest("full-batch8")
    factors = zip(names, (1 / few, -1 / few, -1 / many, 1 / many), strict=True)
    more = found.compare(*((factor, name, low) for name, factor in factors), by=1.0)
    return f"LoRA {share(lora)}; whole weights {share(whole)}; the one less the other {share(more)}"


def dora_cost(found: Found) -> str:
    """DoRA's loss, time and memory against LoRA's."""
    own, plain = found.cost("dora"), found.cost(PLAIN)
    loss = f"loss {compared(found, 'dora')}"
    if own is None or plain is None:
        return f"{loss}; time and memory not run"
    return f"{loss}; time x{own[0] / plain[0]:.2f}, memory x{own[1] / plain[1]:.2f}"


def starts(found: Found) -> str:
    """The initialisations against LoRA's own."""
    names = (("pissa", "PiSSA"), ("eva", "EVA"), ("lora-ga", "LoRA-GA"))
    return "; ".join(f"{words} {compared(found, name)}" for name, words in names)


CLAIMS: Sequence[tuple[str, str, Callable[[Found], str]]] = (
    ("at alpha 32 the best rate is nearly the same for all ranks", REGRET,
     lambda f: f"r 64's over r 1's: {rate_ratio(f, 'r64-alpha32', 'r1-alpha32')}"),
    ("with alpha = 2r it falls as the rank grows", "follows from s = alpha/r",
     lambda f: f"r 64's over r 1's: {rate_ratio(f, 'r64-alpha128', 'r1-alpha2')}"),
    ("LoRA's best rate is 10 times that of whole weights, 15 times in short runs", REGRET,
     lambda f: f"r 16's over whole weights': {rate_ratio(f, PLAIN, WHOLE)}"),
    ("LoRA comes to the loss of whole weights", REGRET,
     lambda f: f"r 16 over whole weights: {compared(f, PLAIN, WHOLE)}"),
    ("a small rank is as good until its capacity is full", REGRET,
     lambda f: f"r 1 over r 64, alpha 32: {share(f.over('r1-alpha32', 'r64-alpha32'))}"),
    ("attention alone loses at equal parameters, MLPs alone do not", REGRET,
     lambda f: f"attention {share(f.over('attention', PLAIN))}; MLP {share(f.over('mlp', PLAIN))}"),
    ("larger batches cost LoRA more than whole weights", REGRET, batch_effect),
    ("with rates tuned, variants lie within 1 to 2%, each at a rate of its own",
     "Learning Rate Matters (2602.04998)", variant_range),
    ("rsLoRA at r 64 is the best LoRA", COMPARISON,
     lambda f: f"over r 16: {compared(f, 'rslora-r64')}; over r 64, alpha 32: "
               f"{share(f.over('rslora-r64', 'r64-alpha32'))}"),
    ("DoRA: nothing gained, 1.26 times the time, 1.10 times the memory", COMPARISON, dora_cost),
    ("AdaLoRA is far behind", COMPARISON, lambda f: compared(f, "adalora")),
    ("LoRA+ (ratio 16) is better", "2402.12354", lambda f: compared(f, "loraplus-16")),
    ("starts from the base or from rows are better", "2404.02948, 2410.07170, 2407.05000", starts),
    ("a base in NF4 costs nothing", "QLoRA (2305.14314)", lambda f: compared(f, "nf4")),
    ("LoftQ takes back what 4 bits cost", "2310.08659",
     lambda f: f"over NF4 alone: {compared(f, 'nf4-loftq', 'nf4')}"),
)  # fmt: skip


def claims_table(tasks: Mapping[str, Found]) -> tuple[list[str], list[list[str]]]:
    """Claim, source, what each task showed."""
    return ["claim", "source", *(f"seen on {task}" for task in tasks)], [
        [claim, source, *(seen(found) for found in tasks.values())]
        for claim, source, seen in CLAIMS
    ]


# --- the defaults


@dataclass(frozen=True)
class Default:
    """A setting, its default, what a task showed of it, and by which intervals: of what was tried in
    its place, over it."""

    setting: str
    value: str
    seen: Callable[[Found], str]
    others: Callable[[Found], Sequence[Interval | None]]

    def verdict(self, tasks: Mapping[str, Found]) -> str:
        """Where it stands: where nothing tried in its place was better beyond the interval."""
        said = dict[str, bool]()
        for task, found in tasks.items():
            known = [v for v in self.others(found) if v is not None and math.isfinite(v[1])]
            if known:
                said[task] = not any(high < 0 for _, _, high in known)
        if not said:
            return "not run"
        if len({*said.values()}) == 1:
            return "yes" if all(said.values()) else "no"
        return ", ".join(f"{task}: {'yes' if stands else 'no'}" for task, stands in said.items())


RANKS = {1: 2, 4: 8, 64: 128}  # those beside 16, with 2 r


def alphas_seen(found: Found) -> str:
    """Both ways of choosing alpha, at the rate that is best at r 16 and at their own."""
    if not found.has_curves(PLAIN):
        return "not run"
    at = best_rate(found.curves[PLAIN])
    kept = "; ".join(
        f"r {r}: {share(found.over_best(f'r{r}-alpha32', at))}, "
        f"with 2 r {share(found.over_best(f'r{r}-alpha{twice}', at))}"
        for r, twice in RANKS.items()
    )
    own = []
    for words, names in (
        ("32", ["r1-alpha32", "r4-alpha32", PLAIN, "r64-alpha32"]),
        ("2 r", ["r1-alpha2", "r4-alpha8", PLAIN, "r64-alpha128"]),
    ):
        if found.has_curves(*names):
            rates = [best_rate(found.curves[name]) for name in names]
            own.append(f"with {words} {', '.join(map(rate, rates))}")
    best = f". Best rates of ranks 1, 4, 16, 64: {'; '.join(own)}" if own else ""
    return f"at {rate(at)}, over r 16: {kept}{best}"


def alphas_over(found: Found) -> list[Interval | None]:
    """2 r over 32 for each rank, at the rate that is best at r 16."""
    if not found.has_curves(PLAIN):
        return []
    at = best_rate(found.curves[PLAIN])
    return [found.over_at(f"r{r}-alpha{twice}", f"r{r}-alpha32", at) for r, twice in RANKS.items()]


def rate_over(found: Found, default: float) -> Interval | None:
    """The best of plain LoRA's rates over the default one."""
    curve = found.curves.get(PLAIN, {})
    if default not in curve:
        return None
    at = partial(loss_at, rate=default)
    return found.compare((1, PLAIN, low), (-1, PLAIN, at), by=curve[default])


def list_defaults(default_rate: float) -> list[Default]:
    """What the study asks of."""
    ranks = [f"r{r}-alpha32" for r in RANKS]
    return [
        Default("r", "16",
                lambda f: "; ".join(f"{f.words.get(n, n)}: {share(f.over(n, PLAIN))}" for n in ranks),
                lambda f: [f.over(n, PLAIN) for n in ranks]),
        Default("lora_alpha", "32", alphas_seen, alphas_over),
        Default("learning_rate", rate(default_rate),
                lambda f: passed_over(f, default_rate) or "not run",
                lambda f: [rate_over(f, default_rate)]),
        Default("target_modules", "all linears",
                lambda f: f"attention {compared(f, 'attention')}; MLP {compared(f, 'mlp')}",
                lambda f: [f.best_over("attention"), f.best_over("mlp")]),
        Default("variant, init_lora_weights, quantize", "plain LoRA", variant_range,
                lambda f: [f.best_over(name) for name in variant_names(f)]),
    ]  # fmt: skip


def defaults_table(
    tasks: Mapping[str, Found], default_rate: float
) -> tuple[list[str], list[list[str]]]:
    """Setting, default, what each task showed, whether it stands."""
    columns = ["setting", "default", *(f"seen on {task}" for task in tasks), "stands"]
    return columns, [
        [d.setting, d.value, *(d.seen(found) for found in tasks.values()), d.verdict(tasks)]
        for d in list_defaults(default_rate)
    ]


# --- the other tables


def curves_table(found: Found) -> tuple[list[str], list[list[str]]]:
    """Every way: its curve, its best rate, the loss there, and that over plain LoRA's."""
    columns = ["", "loss by rate", "best rate [95%]", "lowest loss", "over r 16, alpha 32"]
    return columns, [
        [
            words,
            ", ".join(f"{rate(r)}: {loss:.3f}" for r, loss in found.curves[name].items()),
            rate_interval(found, name),
            f"{found.lowest(name):.4f}",
            "" if name == PLAIN else share(found.over(name, PLAIN)),
        ]
        for name, words in found.words.items()
        if name in found.curves
    ]


def seeds_table(found: Found) -> tuple[list[str], list[list[str]]]:
    """The best of each variant under several seeds, with time and memory of the fresh ones."""
    columns = [
        "",
        "rate",
        "loss, mean of the seeds",
        "seeds",
        "over r 16, alpha 32",
        "CPU s",
        "MiB of the pass",
        "its jobs",
    ]
    rows = []
    for name, words in found.words.items():
        points, cost = [*found.fresh.get(name, {}).values()], found.cost(name)
        if cost is not None:
            losses = found.seeded[name].values()
            mean = sum(losses) / len(losses)
            over = "" if name == PLAIN else share(found.over_seeds(name))
            cells = [
                f"{mean:.4f}",
                str(len(losses)),
                over,
                f"{cost[0]:.0f}",
                f"{cost[1]:.0f}",
                str(points[0]["jobs"]),
            ]
            rows.append([words, rate(points[0]["rate"]), *cells])
    return columns, rows


def passed_over(found: Found, default: float) -> str:
    """What the default rate costs against the best of its curve, in words; empty where it was not
    tried."""
    over = rate_over(found, default)
    if over is None or not found.has_curves(PLAIN):
        return ""
    curve = found.curves[PLAIN]
    (at, loss), lost = lowest_point(curve), curve[default]
    return f"loss {lost:.3f} at {rate(default)}, {loss:.3f} at {rate(at)} ({share(over)})"


# --- the record and the page


def found_of(record: Mapping[str, Any]) -> dict[str, Found]:
    """{task: what it showed}."""
    return {task: Found(v["ways"], v["points"]) for task, v in record["values"].items()}


def make_record(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as JSON. ``values``: of each task its ways and points."""
    columns, rows = claims_table(found_of({"values": values}))
    size = "small" if settings["small"] else "full"
    return {
        "title": (
            f"Ranks, rates, layers and variants ({size}, {settings['size']['dtype']}), {settings['model']}"
        ),
        "text": (
            "`make study-variants`, or `benchmarks/variants_study.py` with the settings in the JSON: "
            "held-out loss [95%]; docs/choosing.md has the rest."
        ),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "settings": settings,
        "columns": columns,
        "rows": rows,
        "values": values,
    }


def label_tasks(
    records: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[Found, Mapping[str, Any]]]:
    """{task and dtype: (what it showed, its record's settings)}."""
    return {
        f"{task}, {record['settings']['size']['dtype']}": (found, record["settings"])
        for record in records
        for task, found in found_of(record).items()
    }


def describe_record(record: Mapping[str, Any]) -> str:
    """Which command made it, where, and with how much of everything."""
    settings, where = record["settings"], record["machine"]
    size, threads = settings["size"], settings["threads"]
    options = ("" if settings["small"] else " --full") + (
        " --dtype float32" if size["dtype"] == "float32" else ""
    )
    tasks = found_of(record)
    rows = "; ".join(
        f"{size['rows'][task]} rows of {task}, {size['batch'][task]} a step, {size['held'][task]} held out"
        for task in tasks
    )
    large = [
        f"{size['large_rows'][task]} of {task}"
        for task, found in tasks.items()
        if any(name.endswith("-batch64") for name in found.curves)
    ]
    of_batches = f" (for 8 and 64 rows a step {', '.join(large)})" if large else ""
    # the record may be of a study that has not come to them
    again = any(found.fresh for found in tasks.values())
    seeds = f"the best of each under {size['seeds']} seeds" if again else "one seed each"
    return (
        f"{record['date']}, `python benchmarks/variants_study.py{options}`, {settings['model']} in "
        f"{size['dtype']} on {where['cpu']}, {threads} thread{'s' * (threads > 1)}: one epoch of "
        f"{rows}{of_batches}; {seeds}."
    )


def docs_section(records: Sequence[Mapping[str, Any]]) -> str:
    """What stands between the marks of docs/choosing.md."""
    tasks = label_tasks(records)
    found_by = {label: found for label, (found, _) in tasks.items()}
    parts = [
        *map(describe_record, records),
        "Does a default stand? `yes`: nothing tried in its place was better beyond its interval.",
        table(defaults_table(found_by, records[0]["settings"]["default_rate"])),
        table(claims_table(found_by)),
        f"![Held-out loss by learning rate]({PICTURE})",
    ]
    for label, (found, settings) in tasks.items():
        parts += [f"### {label}", task_text(found, settings), table(curves_table(found))]
        if found.fresh:
            parts += ["The best of each under several seeds:", table(seeds_table(found))]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def task_text(found: Found, settings: Mapping[str, Any]) -> str:
    """How many trainings of how many tokens, and how much one of them says."""
    tokens = [p["tokens"] / p["jobs"] for p in found.points]
    said = [f"{len(found.points)} trainings of about {sum(tokens) / len(tokens):,.0f} tokens."]
    if found.base_loss is not None:
        said.append(f"Before training the loss is {found.base_loss:.3f}.")
    if found.noise is not None:
        deviation, freedom = found.noise
        plain, seeds = found.lowest(PLAIN), settings["size"]["seeds"]
        said.append(
            f"The noise of one training is {deviation:.4f} ({deviation / plain:.2%} of the loss; "
            f"{freedom} degrees of freedom): two trainings are told apart from "
            f"{found.half_width(1) / plain:.1%} on, two means over {seeds} seeds from "
            f"{found.half_width(seeds) / plain:.1%}."
        )
    if lost := passed_over(found, settings["default_rate"]):
        said.append(f"At the default rate, r 16: {lost}.")
    return " ".join(said)


def table(columns_and_rows: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    """As Markdown."""
    return grid(*columns_and_rows)


def write_docs(root: Path) -> None:
    """The section of docs/choosing.md, and its plot."""
    records, page = PAGE.find_records(root), root / PAGE.path
    page.write_text(PAGE.put(page.read_text(), docs_section(records)))
    draw(
        {label: found for label, (found, _) in label_tasks(records).items()},
        root / "docs" / PICTURE,
    )
    print(f"{page} and {PICTURE}, from {len(records)} record{'s' * (len(records) > 1)}")


PANELS: Sequence[tuple[str, Callable[[Mapping[str, Any]], bool]]] = (
    ("ranks at alpha 32", lambda w: w["part"] == "ranks" and w["name"].endswith("alpha32")),
    ("ranks at alpha 2r", lambda w: w["name"] in (PLAIN, "r1-alpha2", "r4-alpha8", "r64-alpha128")),
    ("whole weights, layers, batches",
     lambda w: w["name"] == PLAIN or w["part"] in ("full", "targets", "batch")),
    ("variants", lambda w: w["name"] == PLAIN or w["part"] == "variants"),
)  # fmt: skip


def draw(tasks: Mapping[str, Found], path: Path) -> None:
    """Loss against rate, a row of panels for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(tasks), len(PANELS), figsize=(4.2 * len(PANELS), 3.6 * len(tasks)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (task, found) in zip(axes, tasks.items(), strict=True):
        for axis, (title, shown) in zip(row, PANELS, strict=True):
            ways = [way for way in found.ways if shown(way) and way["name"] in found.curves]
            for way, colour in zip(ways, LINES * 2, strict=False):
                curve = found.curves[way["name"]]
                axis.plot(
                    [*curve], [*curve.values()], "o-", color=colour, markersize=3.5, linewidth=1.2,
                    label=way["words"],
                )  # fmt: skip
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter("")
            axis.set_title(f"{task}: {title}", fontsize=9)
            # what diverged would press the rest into a line
            lowest = [found.lowest(way["name"]) for way in ways]
            if lowest and found.base_loss is not None:
                axis.set_ylim(min(lowest) - 0.02, found.base_loss * 1.02)
            axis.tick_params(labelsize=7)
            axis.legend(fontsize=6, frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
