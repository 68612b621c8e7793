"""Who got which tokens of a mixture: the experts of each domain in a confusion matrix, and in every
layer as a heat map. From the last line of metrics.jsonl that has `router`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorry.report.markup import SafeHtml, html_tag
from lorry.report.sections import html_table
from lorry.runs.read import RunRecord

MOST_SITES = 400  # layers, or their halves, of a heat map: beyond any model whose page is read
MOST_EXPERTS = 64  # columns that a table is still read with
CAPTION = (
    "Share of a token's slots that each expert has, by the domain whose rows the tokens are of. With all experts "
    "chosen (top_k of them) every share is the same, and the gates say more."
)


@dataclass(frozen=True)
class RouterShares:
    """What a line says: {domain: {expert: a number for each layer}}, of one kind (load, gate)."""

    kind: str
    step: int
    values: Mapping[str, Mapping[str, Sequence[float]]]

    @property
    def experts(self) -> list[str]:
        """In the order of the router's columns."""
        return list(dict.fromkeys(name for own in self.values.values() for name in own))

    def mean(self, domain: str, expert: str) -> float:
        """Over layers."""
        layers = self.values[domain].get(expert, ())
        return sum(layers) / len(layers) if layers else math.nan


def read_router_shares(run: RunRecord, kind: str) -> RouterShares | None:
    """The last ones in the log; None for a run without, or whose lines hold anything else."""
    for record in reversed(run.log.records):
        router = record.get("router")
        if not isinstance(router, dict):
            continue
        domains = router.get(kind)
        if not isinstance(domains, dict) or not domains:
            return None
        values = {
            str(domain): {str(expert): layers for expert, layers in own.items()}
            for domain, own in domains.items()
            if isinstance(own, dict) and all(_are_shares(layers) for layers in own.values())
        }
        shares = RouterShares(kind, record["step"], values)
        return shares if len(values) == len(domains) and shares.experts else None
    return None


def _are_shares(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MOST_SITES
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    )


def router_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    """Of each run with a router: a confusion matrix, and a heat map for each domain."""
    parts: list[SafeHtml] = []
    for run in runs:
        for kind, title in (("load", "share of slots"), ("gate", "mean gate")):
            shares = read_router_shares(run, kind)
            if shares is None or len(shares.experts) > MOST_EXPERTS:
                continue
            name = f"{run.name}: " if len(runs) > 1 else ""
            parts.append(html_tag("h3", f"{name}{title}, step {shares.step}"))
            parts.append(_confusion_table(shares))
            parts += [_heat_map(shares, domain) for domain in shares.values]
    if not parts:
        return None
    return html_tag(
        "section",
        html_tag("h2", "Router"),
        html_tag("p", CAPTION, class_="lead"),
        *parts,
        id="router",
    )


def _confusion_table(shares: RouterShares) -> SafeHtml:
    rows = [
        html_tag(
            "tr",
            html_tag("td", domain),
            *(_cell(shares.mean(domain, expert)) for expert in shares.experts),
        )
        for domain in shares.values
    ]
    return html_table(_head("rows of", shares.experts), rows)


def _heat_map(shares: RouterShares, domain: str) -> SafeHtml:
    """A row for each layer (with both halves routed: attention, then MLP), folded away."""
    own = shares.values[domain]
    sites = max(len(layers) for layers in own.values())
    rows = [
        html_tag(
            "tr",
            html_tag("td", site),
            *(
                _cell(own[expert][site] if site < len(own.get(expert, ())) else math.nan)
                for expert in shares.experts
            ),
        )
        for site in range(sites)
    ]
    return html_tag(
        "details",
        html_tag("summary", f"{domain}, by layer"),
        html_table(_head("layer", shares.experts), rows),
    )


def _head(first: str, experts: Sequence[str]) -> SafeHtml:
    return html_tag(
        "tr", html_tag("th", first), *(html_tag("th", name, class_="number") for name in experts)
    )


def _cell(share: float) -> SafeHtml:
    """A share as its number on a ground as strong as it is."""
    if not math.isfinite(share):
        return html_tag("td", "–", class_="number")
    strength = min(max(share, 0.0), 1.0)
    return html_tag(
        "td",
        f"{share:.2f}",
        class_="number",
        style=f"background: rgba(58, 125, 204, {strength:.2f})",
    )
