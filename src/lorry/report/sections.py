"""The parts of the page below its charts: evaluation, answers before and after, training rows, contracts, settings, receipts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from lorry.evaluate.metrics.registry import exact_match
from lorry.formatting import NOTHING, number
from lorry.report.markup import Html, join, tag
from lorry.runs.layout import RUN_FILE
from lorry.runs.read import Contract, Run, Sample, Token

MOST_ROWS = 60  # samples shown of a group; a page of thousands would help nobody
MARKS = {"held": "✓ held", "failed": "✗ failed", "not_checked": "– not checked"}


def table(head: Html, rows: Iterable[Html], kind: str | None = None, style: str | None = None) -> Html:
    """A table that scrolls sideways where the page is too narrow for it."""
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows), class_=kind, style=style), class_="scroll")


def evaluation(runs: Sequence[Run]) -> Html | None:
    """Every metric of every data set: before, after and change of one run, or one column per run."""
    names = list(dict.fromkeys((e.name, m) for run in runs for e in run.evaluation for m in e.metrics))
    if not names:
        return None
    values = [{(e.name, m): pair for e in run.evaluation for m, pair in e.metrics.items()} for run in runs]
    parts: list[Html] = []
    for data_set in dict.fromkeys(name for name, _ in names):
        metrics = [metric for name, metric in names if name == data_set]
        rows = [_metric_row(metric, [one.get((data_set, metric), (None, None)) for one in values]) for metric in metrics]
        parts += [tag("h3", data_set), table(_metric_head(runs), rows, "even")]
    return tag("section", tag("h2", "Evaluation"), *parts, id="evaluation")


def _metric_head(runs: Sequence[Run]) -> Html:
    columns = ["before", "after", "change"] if len(runs) == 1 else ["before", *(run.name for run in runs)]
    return tag("tr", tag("th", "metric"), *(tag("th", column, class_="number") for column in columns))


def _metric_row(metric: str, pairs: Sequence[tuple[float | None, float | None]]) -> Html:
    before = next((first for first, _ in pairs if first is not None), None)
    shown = [number(before), *(number(after) for _, after in pairs)]
    if len(pairs) == 1:
        after = pairs[0][1]
        shown.append(NOTHING if before is None or after is None else f"{'+' if after >= before else ''}{number(after - before)}")
    cells = (tag("td", text, class_="number") for text in shown)
    return tag("tr", tag("th", metric.replace("_", " "), scope="row"), *cells)


def samples(runs: Sequence[Run]) -> Html | None:
    """Prompt, reference, and what the model said before and after, side by side; with several runs, after each of them."""
    found = [_answered(run) for run in runs]
    keys = list(dict.fromkeys(key for one in found for key in one))
    if not keys:
        return None
    columns = ["prompt", "reference", "before", *(["after"] if len(runs) == 1 else [f"after: {run.name}" for run in runs])]
    head = tag("tr", *(tag("th", column) for column in columns))
    look = {"kind": "samples many", "style": f"--columns: {len(columns)}"} if len(columns) > 4 else {"kind": "samples"}
    parts: list[Html] = []
    for group in dict.fromkeys(group for group, _, _ in keys):
        members = [key for key in keys if key[0] == group]
        rows = [_sample_row(key[1], [one.get(key) for one in found]) for key in members[:MOST_ROWS]]
        left_out = f" (the first {MOST_ROWS} of {len(members)})" if len(members) > MOST_ROWS else ""
        parts += [tag("h3", group + left_out), table(head, rows, **look)]
    return tag("section", tag("h2", "Before and after"), *parts, id="samples")


def _answered(run: Run) -> dict[tuple[str, str, int], Sample]:
    """Samples with an answer by (group, prompt, how often that prompt came before), so that a repeated one is kept."""
    out: dict[tuple[str, str, int], Sample] = {}
    repeats = Counter[tuple[str, str]]()
    for sample in run.samples:
        if sample.before is not None or sample.after is not None:
            out[sample.group, sample.prompt, repeats[sample.group, sample.prompt]] = sample
            repeats[sample.group, sample.prompt] += 1
    return out


def _sample_row(prompt: str, of_runs: Sequence[Sample | None]) -> Html:
    present = [s for s in of_runs if s is not None]
    reference = next((s.reference for s in present if s.reference is not None), None)
    before = next((s.before for s in present if s.before is not None), None)
    answers = [before, *(s.after if s else None for s in of_runs)]
    return tag("tr", _cell(prompt), _cell(reference), *(_cell(answer, reference) for answer in answers))


def _cell(text: str | None, reference: str | None = None) -> Html:
    """A text; where there is a reference, marked if it says the same (case, punctuation and articles aside)."""
    if text is None or not text.strip():
        return tag("td", NOTHING if text is None else "(empty)", class_="text absent")
    same = reference is not None and exact_match(text, reference) == 1
    return tag("td", tag("span", "✓ match", class_="chip held") if same else None, text.strip(), class_="text")


def training_rows(runs: Sequence[Run]) -> Html | None:
    """Rows as the model saw them, with the supervised tokens marked."""
    rows = [(run, s.tokens) for run in runs for s in run.samples if s.tokens]
    if not rows:
        return None
    lead = "Marked tokens carry the loss; the others are context. This is the text after the chat template, as it was trained on."
    parts = []
    for run, tokens in rows[:MOST_ROWS]:
        supervised = sum(t.weight != 0 for t in tokens)
        whose = f"{run.name}: " if len(runs) > 1 else ""
        parts.append(tag("h3", f"{whose}{supervised} of {len(tokens)} tokens supervised"))
        parts.append(tag("div", *_marked(tokens), class_="row"))
    return tag("section", tag("h2", "Training rows"), tag("p", lead, class_="lead"), *parts, id="training-rows")


def _marked(tokens: Sequence[Token]) -> Iterable[Html]:
    """Neighbouring tokens of one weight as one piece; a mark for weight 1, an outlined one with the weight for any other."""
    for weight, members in groupby(tokens, key=lambda t: t.weight):
        text = "".join(t.text for t in members)
        if weight == 0:
            yield tag("span", text)
        else:
            yield tag("mark", text, title=f"weight {number(weight)}", class_=None if weight == 1 else "partly")


def contracts(runs: Sequence[Run]) -> Html | None:
    """What each run promised and whether it held."""
    known = [run for run in runs if run.contracts]
    if not known:
        return None
    parts: list[Html] = []
    for run in known:
        if len(runs) > 1:
            parts.append(tag("h3", run.name))
        parts.append(tag("ul", *map(_contract, sorted(run.contracts, key=lambda c: c.id)), class_="contracts"))
    return tag("section", tag("h2", "Contracts"), *parts, id="contracts")


def _contract(contract: Contract) -> Html:
    detail = tag("div", contract.detail, class_="detail") if contract.detail else None
    text = tag("div", f"{contract.id}. {contract.name}", detail)
    return tag("li", tag("span", MARKS[contract.status], class_=f"chip {contract.status}"), text)


def settings(runs: Sequence[Run]) -> Html | None:
    """run.yaml of each run, folded away."""
    texts = [(run, run.config_text) for run in runs if run.config_text]
    return _folded("Settings", "settings", RUN_FILE, len(runs) > 1, texts)


def receipts(runs: Sequence[Run]) -> Html | None:
    """receipt.json of each run, folded away."""
    texts = [(run, json.dumps(run.receipt, indent=2, ensure_ascii=False)) for run in runs if run.receipt is not None]
    return _folded(
        "Receipt", "receipt", "receipt.json: digests of data, base, code, environment and adapter", len(runs) > 1, texts
    )


def _folded(title: str, name: str, what: str, named: bool, texts: Sequence[tuple[Run, str]]) -> Html | None:
    if not texts:
        return None
    parts = [
        tag("details", tag("summary", join(f"{run.name}: " if named else None, what)), tag("pre", text)) for run, text in texts
    ]
    return tag("section", tag("h2", title), *parts, id=name)
