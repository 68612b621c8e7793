"""README.md of a run: the hub's model card, made from the files of the run and from nothing else.

Try: ``print(render_run_card(Path("runs/people")))``. No place on this machine is shown: an absolute path
loses its directories. The last line signs the text, so that a card which a person edited is known
as such and kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorry.config.parsing.files import write_yaml
from lorry.disk import receipt
from lorry.disk.documents import parse_yaml
from lorry.runs.layout import CARD
from lorry.train.card.facts import (
    MetricChange,
    RunFacts,
    metric_changes,
    read_run_facts,
    training_figures,
)
from lorry.train.card.front_matter import (  # fmt: skip
    EMBEDDED_LICENCES,
    LicenceNames,
    base_id,
    catalogue_entries,
    data_sources,
    front_matter,
    named_set_names,
    private_directories,
    public_base_name,
    public_path,
    strip_directories,
    teacher_names,
)
from lorry.train.card.markdown import (
    EMPTY_CELL,
    clean_line,
    code_span,
    escape_markdown,
    fenced_code,
    markdown_table,
)

TRAINING_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
DATA_SETTINGS = (
    "max_length",
    "packing",
    "completion_only_loss",
    "test_size",
    "n",
    "weights",
    "template",
)
CARD_SIGNATURE = re.compile(
    r"\n<!-- Written by Lorry, ([0-9a-f]{16})\. A card that was edited is left as it is\. -->\n"
)


def render_run_card(
    run_dir: Path,
    *,
    at: str | None = None,
    plot: str | None = None,
    licences: LicenceNames = MappingProxyType({}),
) -> str:
    """The card of a run directory. ``at``: what `lorry.load` is shown with, a hub id or by default
    the run's name; ``plot``: an image beside the card; ``licences``: of hub data sets and bases,
    beside those that the catalogue knows. Raises ConfigError or DataError naming a file of the run
    that cannot be read.
    """
    facts, written = read_run_facts(run_dir), run_dir / CARD
    text = written.read_text(encoding="utf-8", errors="replace") if written.is_file() else ""
    # made where the run was made, when a relative path could still be told from a hub id
    if not is_edited_card(text):
        front, _ = parse_yaml(text.split("---\n")[1], str(written))
        facts = replace(facts, datasets=front.get("datasets", []))
    known = catalogue_entries(facts)
    licences = {**{name: found.licence for name, found in known.items()}, **licences}
    return render_card(
        facts,
        at=at,
        plot=plot,
        licences=licences,
        hubs={name: found.hub for name, found in known.items() if found.hub},
    )


def render_card(
    facts: RunFacts,
    *,
    at: str | None = None,
    plot: str | None = None,
    licences: LicenceNames,
    hubs: LicenceNames,
) -> str:
    """The same from what the files say. ``hubs``: the hub ids of named sets."""
    licences = {**EMBEDDED_LICENCES, **licences}
    hide = private_directories(facts)
    parts = [
        f"# {escape_markdown(facts.name)}\n\n{_summary_section(facts)}",
        _section_text("Base", _base_model_section(facts)),
        _section_text("Data", _data_section(facts, hide)),
        _section_text(
            "Adapter" if facts.config.get("lora") else "What trains", _lora_section(facts, hide)
        ),
        _section_text("Training", _training_section(facts)),
        _section_text("Results", _results_section(facts, plot)),
        _section_text("Use", _usage_section(facts, at)),
        _section_text("Contracts", _contracts_section(facts, hide)),
        _section_text("Licences", _licence_table(facts, licences)),
    ]
    text = (
        f"---\n{write_yaml(front_matter(facts, licences, hubs))}---\n\n"
        + "\n\n".join(p for p in parts if p)
        + "\n"
    )
    return f"{text}\n<!-- Written by Lorry, {_card_digest(text)}. A card that was edited is left as it is. -->\n"


def is_edited_card(text: str) -> bool:
    """Whether a card is not as Lorry wrote it."""
    signed = CARD_SIGNATURE.search(text)
    return (
        signed is None
        or signed.end() != len(text)
        or signed[1] != _card_digest(text[: signed.start()])
    )


def _card_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _section_text(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


# --- what a person reads


def _summary_section(facts: RunFacts) -> str:
    count, base = len(facts.names), code_span(public_base_name(facts))
    if not facts.config.get("lora"):
        what = f"{base}, its own weights ({code_span(facts.config.get('trainable') or 'all')}) trained with Lorry"
    elif count == 1:
        what = f"A LoRA adapter for {base}, trained with Lorry"
    else:
        what = f"{count} LoRA adapters, trained in one pass with Lorry, each in a folder of its name, for {base}"
    whence = ", ".join(
        code_span(public_path(s)) for s in [*data_sources(facts), *named_set_names(facts)]
    )
    taught = ", ".join(code_span(public_path(t)) for t in teacher_names(facts))
    return f"{what}{f' on {whence}' if whence else ''}{f', distilled from {taught}' if taught else ''}."


def _base_model_section(facts: RunFacts) -> str:
    base, model = facts.receipt.get("base") or {}, facts.config.get("model") or {}
    known = {
        "name": public_base_name(facts),
        "read from": base.get("kind"),
        "revision": base.get("revision"),
        "family": base.get("family"),
        "number format": base.get("dtype") or model.get("dtype"),
        "digest": base.get("sha256"),
    }
    return markdown_table(
        ["", ""], [[key, code_span(value)] for key, value in known.items() if value]
    )


def _data_section(facts: RunFacts, hide: list[str]) -> str:
    data = facts.receipt.get("data") or {}
    rows = []
    for name in facts.names:
        one = data if name is None else receipt.part(data, name)
        source = strip_directories(
            one.get("source") or ", ".join([*data_sources(facts), *named_set_names(facts)]), hide
        )
        if one.get("streamed"):
            counts = ["streamed", EMPTY_CELL, EMPTY_CELL, EMPTY_CELL]
        else:
            counts = [
                escape_markdown(one.get(key, ""))
                for key in ("rows", "sequences", "tokens", "supervised")
            ]
        rows.append(
            [
                *([code_span(name)] if name is not None else []),
                code_span(source),
                *counts,
                code_span(one.get("sha256", "")),
            ]
        )
    head = [
        *(["adapter"] if facts.jobs else []),
        "source",
        "rows",
        "sequences",
        "tokens",
        "learnt",
        "SHA-256 of the tokens",
    ]
    left = [data if name is None else receipt.part(data, name) for name in facts.names]
    lost = {
        escape_markdown(reason): n
        for one in left
        for reason, n in (one.get("left_out") or {}).items()
    }
    said = "\n".join(
        f"- left out: {escape_markdown(n)} rows ({reason})" for reason, n in lost.items()
    )
    return markdown_table(head, rows) + (f"\n\n{said}" if said else "")


def _lora_section(facts: RunFacts, hide: list[str]) -> str:
    if not facts.config.get("lora"):
        return markdown_table(
            ["setting", "value"], [["trainable", code_span(facts.config.get("trainable") or "all")]]
        )
    if not facts.jobs:
        return _settings_text("lora", facts.group("lora"))
    ranks = [
        [f"{escape_markdown(name)}: rank", escape_markdown(facts.group("lora", name).get("r"))]
        for name in facts.names
    ]
    groups = {
        job["name"]: {g: job[g] for g in ("lora", "data", "train") if job.get(g)}
        for job in facts.jobs
    }
    own = [
        [
            f"{escape_markdown(name)}: its own settings",
            code_span(strip_directories(json.dumps(given), hide)),
        ]
        for name, given in groups.items()
    ]
    return markdown_table(["", ""], [*ranks, *own])


def _training_section(facts: RunFacts) -> str:
    train, data = facts.group("train"), facts.group("data")
    chosen = {k: train.get(k) for k in TRAINING_SETTINGS} | {k: data.get(k) for k in DATA_SETTINGS}
    distil = facts.config.get("distill") or {}
    chosen |= {f"distill.{k}": public_path(v) for k, v in distil.items() if v is not None}
    return _settings_text("", chosen)


def _settings_text(group: str, values: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in values.items() if v not in (None, {}, [], False)}
    texts = {
        k: json.dumps(v, ensure_ascii=False) if isinstance(v, (list, dict)) else v
        for k, v in kept.items()
    }
    return markdown_table(
        ["setting", "value"],
        [[code_span(f"{group}.{k}" if group else k), code_span(v)] for k, v in texts.items()],
    )


def _results_section(facts: RunFacts, plot: str | None) -> str:
    parts = [
        markdown_table(
            ["", ""],
            [[escape_markdown(k), escape_markdown(v)] for k, v in training_figures(facts).items()],
        )
    ]
    parts += [f"![Loss and the other curves of the run]({plot})"] if plot else []
    for name, values in metric_changes(facts).items():
        before, interval = (
            any(v.before is not None for v in values.values()),
            any(v.interval for v in values.values()),
        )
        head = [
            "metric",
            *(["base"] if before else []),
            "trained",
            *(["95% interval"] if interval else []),
        ]
        parts.append(
            f"### {escape_markdown(public_path(name))}\n\n{markdown_table(head, [_metric_row(m, v, before, interval) for m, v in values.items()])}"
        )
    return "\n\n".join(p for p in parts if p)


def _metric_row(metric: str, value: MetricChange, before: bool, interval: bool) -> list[str]:
    between = (
        f"{_format_figure(value.interval[0])} to {_format_figure(value.interval[1])}"
        if value.interval
        else EMPTY_CELL
    )
    sides = [*([_format_figure(value.before)] if before else []), _format_figure(value.after)]
    return [escape_markdown(metric.replace("_", " ")), *sides, *([between] if interval else [])]


def _format_figure(value: float | None) -> str:
    return EMPTY_CELL if value is None else f"{value:.4g}"


def _usage_section(facts: RunFacts, at: str | None) -> str:
    place, base = _quote_literal(at or facts.name), _quote_literal(public_base_name(facts))
    # of a repository `load` fetches the top only, where several adapters are not
    whole = at is not None and bool(facts.jobs)
    fetch, whence = (
        ("from huggingface_hub import snapshot_download", f"snapshot_download({place})")
        if whole
        else ("", place)
    )
    load = [
        f"model, tokenizer = lorry.load({whence})",
        'print(lorry.generate(model, tokenizer, "..."))',
    ]
    ours = fenced_code("python", ["import lorry", *([fetch, ""] if fetch else [""]), *load])
    if not facts.config.get("lora"):
        theirs = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model, tokenizer = AutoModelForCausalLM.from_pretrained({place}), AutoTokenizer.from_pretrained({place})",
        ]
        return f"{ours}\n\nor with transformers alone:\n\n{fenced_code('python', theirs)}"
    folder = f", subfolder={_quote_literal(facts.names[0])}" if facts.jobs else ""
    theirs = [
        "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
        f"base = AutoModelForCausalLM.from_pretrained({base})",
        f"model = PeftModel.from_pretrained(base, {place}{folder})",
    ]  # fmt: skip
    said = (
        ""
        if base_id(facts)
        else "; the base was not read from the hub, so give the place where you have it"
    )
    return f"{ours}\n\nor with PEFT{said}:\n\n{fenced_code('python', theirs)}"


def _quote_literal(text: object) -> str:
    """A Python string literal of one line."""
    return json.dumps(clean_line(text), ensure_ascii=False)


def _contracts_section(facts: RunFacts, hide: list[str]) -> str:
    """What was promised of this run, and whether it held."""
    told = [
        (
            str(c.get("status")).replace("_", " "),
            c.get("name"),
            strip_directories(c.get("detail", ""), hide),
        )
        for c in facts.contracts
    ]
    return "\n".join(
        f"- {escape_markdown(status)}: {escape_markdown(name)} ({escape_markdown(detail)})"
        for status, name, detail in told
    )


def _licence_table(facts: RunFacts, licences: LicenceNames) -> str:
    names = list(
        dict.fromkeys(
            [
                *data_sources(facts),
                *named_set_names(facts),
                *teacher_names(facts),
                public_base_name(facts),
            ]
        )
    )
    known = [
        [code_span(public_path(name)), escape_markdown(licences[name])]
        for name in names
        if name in licences
    ]
    return markdown_table(["made from", "under"], known)
