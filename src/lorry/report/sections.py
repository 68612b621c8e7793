"""The parts of the page below its charts: evaluation, answers before and after, training rows,
contracts, settings, receipts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from lorry.evaluate.metrics.registry import exact_match
from lorry.formatting import MISSING_VALUE, format_number
from lorry.report.markup import SafeHtml, html_tag, join_html
from lorry.runs.layout import RUN_FILE
from lorry.runs.read import ContractRecord, MetricChange, RunRecord, SampleRecord, TokenWeight

MAX_SECTION_ROWS = 60  # samples shown of a group; a page of thousands would help nobody
CONTRACT_MARKS = {"held": "✓ held", "failed": "✗ failed", "not_checked": "– not checked"}


def html_table(
    head: SafeHtml, rows: Iterable[SafeHtml], kind: str | None = None, style: str | None = None
) -> SafeHtml:
    """A table that scrolls sideways where the page is too narrow for it."""
    return html_tag(
        "div",
        html_tag(
            "table", html_tag("thead", head), html_tag("tbody", *rows), class_=kind, style=style
        ),
        class_="scroll",
    )


def evaluation_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    """Every metric of every data set: before, after and change of one run, or one column per run."""
    names = list(
        dict.fromkeys((e.name, m) for run in runs for e in run.evaluation for m in e.metrics)
    )
    if not names:
        return None
    values = [
        {(e.name, m): change for e in run.evaluation for m, change in e.metrics.items()}
        for run in runs
    ]
    parts: list[SafeHtml] = []
    # a set's metrics together, whatever order each run's file has them in
    for data_set in dict.fromkeys(name for name, _ in names):
        metrics = [metric for name, metric in names if name == data_set]
        rows = [
            _metric_row(
                metric,
                [changes.get((data_set, metric), MetricChange(None, None)) for changes in values],
            )
            for metric in metrics
        ]
        parts += [html_tag("h3", data_set), html_table(_metric_head(runs), rows, "even")]
    return html_tag("section", html_tag("h2", "Evaluation"), *parts, id="evaluation")


def _metric_head(runs: Sequence[RunRecord]) -> SafeHtml:
    columns = (
        ["before", "after", "change"] if len(runs) == 1 else ["before", *(run.name for run in runs)]
    )
    return html_tag(
        "tr",
        html_tag("th", "metric"),
        *(html_tag("th", column, class_="number") for column in columns),
    )


def _metric_row(metric: str, changes: Sequence[MetricChange]) -> SafeHtml:
    # one number where the runs began alike; runs over other starts have a before each
    befores = dict.fromkeys(change.before for change in changes if change.before is not None)
    shown = [" / ".join(map(format_number, befores)) or MISSING_VALUE]
    shown += [format_number(change.after) for change in changes]
    if len(changes) == 1:
        before, after = changes[0].before, changes[0].after
        # a plus sign of its own: a change without a sign reads like a value
        shown.append(
            MISSING_VALUE
            if before is None or after is None
            else f"{'+' if after >= before else ''}{format_number(after - before)}"
        )
    cells = (html_tag("td", text, class_="number") for text in shown)
    return html_tag("tr", html_tag("th", metric.replace("_", " "), scope="row"), *cells)


def samples_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    """Prompt, reference, and what the model said before and after, side by side; with several runs,
    after each of them.
    """
    samples = [_answered_samples(run) for run in runs]
    keys = list(dict.fromkeys(key for by_prompt in samples for key in by_prompt))
    if not keys:
        return None
    columns = [
        "prompt",
        "reference",
        "before",
        *(["after"] if len(runs) == 1 else [f"after: {run.name}" for run in runs]),
    ]
    head = html_tag("tr", *(html_tag("th", column) for column in columns))
    look = (
        {"kind": "samples many", "style": f"--columns: {len(columns)}"}
        if len(columns) > 4
        else {"kind": "samples"}
    )
    parts: list[SafeHtml] = []
    for group in dict.fromkeys(group for group, _, _ in keys):
        members = [key for key in keys if key[0] == group]
        rows = [
            _sample_row(
                key[1],
                {
                    run.name: by_prompt.get(key)
                    for run, by_prompt in zip(runs, samples, strict=True)
                },
            )
            for key in members[:MAX_SECTION_ROWS]
        ]
        left_out = (
            f" (the first {MAX_SECTION_ROWS} of {len(members)})"
            if len(members) > MAX_SECTION_ROWS
            else ""
        )
        parts += [html_tag("h3", group + left_out), html_table(head, rows, **look)]
    return html_tag("section", html_tag("h2", "Before and after"), *parts, id="samples")


def _answered_samples(run: RunRecord) -> dict[tuple[str, str, int], SampleRecord]:
    """Samples with an answer by (group, prompt, how often that prompt came before), so that a
    repeated one is kept.
    """
    out: dict[tuple[str, str, int], SampleRecord] = {}
    repeats = Counter[tuple[str, str]]()
    for sample in run.samples:
        if sample.before is not None or sample.after is not None:
            out[sample.group, sample.prompt, repeats[sample.group, sample.prompt]] = sample
            repeats[sample.group, sample.prompt] += 1
    return out


def _sample_row(prompt: str, of_runs: Mapping[str, SampleRecord | None]) -> SafeHtml:
    present = {name: s for name, s in of_runs.items() if s is not None}
    reference = next((s.reference for s in present.values() if s.reference is not None), None)
    befores = {name: s.before for name, s in present.items() if s.before is not None}
    before = next(iter(befores.values()), None)
    # runs over another start, or of another base, say something else before
    if len(set(befores.values())) > 1:
        before = "\n".join(f"{name}: {text.strip()}" for name, text in befores.items())
    answers = [before, *(s.after if s else None for s in of_runs.values())]
    return html_tag(
        "tr",
        _sample_cell(prompt),
        _sample_cell(reference),
        *(_sample_cell(answer, reference) for answer in answers),
    )


def _sample_cell(text: str | None, reference: str | None = None) -> SafeHtml:
    """A text; where there is a reference, marked if it says the same (case, punctuation and
    articles aside).
    """
    if text is None or not text.strip():
        return html_tag("td", MISSING_VALUE if text is None else "(empty)", class_="text absent")
    # the metric's own rule, so that the mark and exact_match above never disagree
    same = reference is not None and exact_match(text, reference) == 1
    return html_tag(
        "td",
        html_tag("span", "✓ match", class_="chip held") if same else None,
        text.strip(),
        class_="text",
    )


def training_rows_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    """Rows as the model saw them, with the supervised tokens marked."""
    rows = [(run, s.tokens) for run in runs for s in run.samples if s.tokens]
    if not rows:
        return None
    lead = (
        "Marked tokens carry the loss; the others are context. This is the text after "
        "the chat template, as used in training."
    )
    parts = []
    for run, tokens in rows[:MAX_SECTION_ROWS]:
        # of any weight: a token of weight 0.5 is trained on as well
        supervised = sum(t.weight != 0 for t in tokens)
        whose = f"{run.name}: " if len(runs) > 1 else ""
        parts.append(html_tag("h3", f"{whose}{supervised} of {len(tokens)} tokens supervised"))
        parts.append(html_tag("div", *_marked_tokens(tokens), class_="row"))
    return html_tag(
        "section",
        html_tag("h2", "Training rows"),
        html_tag("p", lead, class_="lead"),
        *parts,
        id="training-rows",
    )


def _marked_tokens(tokens: Sequence[TokenWeight]) -> Iterable[SafeHtml]:
    """Neighbouring tokens of one weight as one piece; a mark for weight 1, an outlined one with the
    weight for any other.
    """
    for weight, members in groupby(tokens, key=lambda t: t.weight):
        text = "".join(t.text for t in members)
        if weight == 0:
            yield html_tag("span", text)
        else:
            yield html_tag(
                "mark",
                text,
                title=f"weight {format_number(weight)}",
                class_=None if weight == 1 else "partly",
            )


def contracts_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    """What each run promised and whether it held."""
    known = [run for run in runs if run.contracts]
    if not known:
        return None
    parts: list[SafeHtml] = []
    for run in known:
        if len(runs) > 1:
            parts.append(html_tag("h3", run.name))
        parts.append(
            html_tag(
                "ul",
                # the file has them in the order in which they were proved
                *map(_contract_row, sorted(run.contracts, key=lambda c: c.id)),
                class_="contracts",
            )
        )
    return html_tag("section", html_tag("h2", "Contracts"), *parts, id="contracts")


def _contract_row(contract: ContractRecord) -> SafeHtml:
    detail = html_tag("div", contract.detail, class_="detail") if contract.detail else None
    text = html_tag("div", f"{contract.id}. {contract.name}", detail)
    return html_tag(
        "li",
        html_tag("span", CONTRACT_MARKS[contract.status], class_=f"chip {contract.status}"),
        text,
    )


def settings_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    """run.yaml of each run, folded away."""
    texts = [(run, run.config_text) for run in runs if run.config_text]
    return _folded_section("Settings", "settings", RUN_FILE, len(runs) > 1, texts)


def receipts_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    """receipt.json of each run, folded away."""
    texts = [
        (run, json.dumps(run.receipt, indent=2, ensure_ascii=False))
        for run in runs
        if run.receipt is not None
    ]
    return _folded_section(
        "Receipt",
        "receipt",
        "receipt.json: digests of data, base, code, environment and adapter",
        len(runs) > 1,
        texts,
    )


def _folded_section(
    title: str, name: str, what: str, named: bool, texts: Sequence[tuple[RunRecord, str]]
) -> SafeHtml | None:
    if not texts:
        return None
    parts = [
        html_tag(
            "details",
            html_tag("summary", join_html(f"{run.name}: " if named else None, what)),
            html_tag("pre", text),
        )
        for run, text in texts
    ]
    return html_tag("section", html_tag("h2", title), *parts, id=name)
