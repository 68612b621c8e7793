"""README.md of a run: the hub's model card, made from the files of the run and from nothing else.

Try: ``print(render_run_card(Path("runs/people")))``. No place on this machine is shown: an absolute path
loses its directories. The last line signs the text, so that a card which a person edited is known
as such and kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorry.config.parsing.files import write_yaml
from lorry.disk.documents import parse_yaml
from lorry.runs.layout import CARD
from lorry.runs.read import MetricChange, RunRecord, read_run
from lorry.train.card.facts import metric_changes, training_figures
from lorry.train.card.front_matter import (  # fmt: skip
    EMBEDDED_LICENCES,
    LicenceNames,
    NamedSets,
    base_id,
    card_metadata,
    catalogue_entries,
    data_sources,
    experts_of,
    named_set_names,
    private_directories,
    public_base_name,
    public_path,
    row_sets_of,
    start_of,
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
# of the unlearn group, told in the table of the data
ROW_SET_SETTINGS = frozenset({"forget", "retain", "alternates", "idk"})
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
    run, written = read_run(run_dir), run_dir / CARD
    known = catalogue_entries(run)
    return render_card(
        run,
        at=at,
        plot=plot,
        licences={**{name: named_set.licence for name, named_set in known.items()}, **licences},
        sets=known,
        datasets=_datasets_of_card(written) if written.is_file() else None,
    )


def _datasets_of_card(path: Path) -> list[str] | None:
    """The hub ids in a card as Lorry wrote it, which was made where the run was made, when a
    relative path could still be told from a hub id; None of any other.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if is_edited_card(text):
        return None
    # a signature proves nothing about who made it: the strict reader, and types looked at
    front, _ = parse_yaml(text.split("---\n")[1], str(path))
    listed = front.get("datasets", []) if isinstance(front, dict) else None
    return [str(entry) for entry in listed] if isinstance(listed, list) else None


def render_card(
    run: RunRecord,
    *,
    at: str | None = None,
    plot: str | None = None,
    licences: LicenceNames,
    sets: NamedSets,
    datasets: list[str] | None = None,
) -> str:
    """The same from what the files say. ``sets``: what the catalogue knows of its sources;
    ``datasets``: see `card_metadata`.
    """
    licences = {**EMBEDDED_LICENCES, **licences}
    hide = private_directories(run)
    parts = [
        f"# {escape_markdown(run.name)}\n\n{_summary_section(run)}",
        _section_text("Base", _base_model_section(run)),
        _section_text("Data", _data_section(run, hide)),
        _section_text(_title_of_what_trains(run), _lora_section(run, hide)),
        _section_text("Training", _training_section(run)),
        _section_text("Results", _results_section(run, plot)),
        _section_text("Use", _usage_section(run, at)),
        _section_text("Contracts", _contracts_section(run, hide)),
        _section_text("Licences", _licence_table(run, licences)),
    ]
    # Not `to_yaml`: PyYAML leaves a run called 1e-4 unquoted, and the hub's reader, which follows
    # YAML 1.2, then finds a number where a name has to be and refuses the card.
    front = write_yaml(card_metadata(run, licences, sets, datasets).to_dict())
    text = f"---\n{front}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
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
    # tells an edited card from ours, and needs no more digits: it is no proof of origin
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _section_text(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


# --- what a person reads


def _summary_section(run: RunRecord) -> str:
    count, base = len(run.job_names), code_span(public_base_name(run))
    if experts := experts_of(run):
        router = run.settings_group("router")
        beside = ", and the experts with it" if router.get("train_experts") else ""
        what = (
            f"A {code_span(router.get('kind'))} router over {len(experts)} LoRA experts for {base}, each in a folder of its "
            f"name, trained with Lorry{beside},"
        )
    elif not run.config.get("lora"):
        what = (
            f"{base}, base weights ({code_span(run.config.get('trainable') or 'all')}) "
            "trained with Lorry"
        )
    elif count == 1:
        over = " and the frozen adapter that it was trained on top of" if start_of(run) else ""
        what = f"A LoRA adapter for {base}{over}, trained with Lorry"
    else:
        what = f"{count} LoRA adapters, trained in one pass with Lorry, each in a folder of its name, for {base}"
    if run.settings_group("unlearn"):
        return f"{what} {_unlearning_words(run)}."
    whence = _listed_sources([*data_sources(run), *named_set_names(run)])
    taught = _listed_sources(teacher_names(run))
    return f"{what}{f' on {whence}' if whence else ''}{f', distilled from {taught}' if taught else ''}."


def _unlearning_words(run: RunRecord) -> str:
    """To forget what, to keep what, and by which method."""
    sets = [rows for name in run.job_names for rows in row_sets_of(run, name)]
    forget, retain = (
        _listed_sources(
            dict.fromkeys(s for rows in sets if rows.role == role for s in rows.sources)
        )
        for role in ("forget", "retain")
    )
    method = code_span(run.settings_group("unlearn").get("method"))
    return f"to forget {forget}{f' and keep {retain}' if retain else ''} ({method})"


def _listed_sources(sources: Iterable[str]) -> str:
    return ", ".join(code_span(public_path(s)) for s in sources)


def _base_model_section(run: RunRecord) -> str:
    base, model = (run.receipt or {}).get("base") or {}, run.settings_group("model")
    known = {
        "name": public_base_name(run),
        "read from": base.get("kind"),
        "revision": base.get("revision"),
        "family": base.get("family"),
        "number format": base.get("dtype") or model.get("dtype"),
        "packed in": _packed_format(run),
        "digest": base.get("sha256"),
    }
    if start := start_of(run):
        known["start: a frozen adapter"] = public_path(start["path"])
        known["SHA-256 of its weights"] = start["sha256"]
    return markdown_table(
        ["", ""], [[key, code_span(value)] for key, value in known.items() if value]
    )


def _packed_format(run: RunRecord) -> str | None:
    """The format that the base's matrices were held in, or None where they were whole."""
    base = (run.receipt or {}).get("base") or {}
    packed: str | None = base.get("quantize") or run.settings_group("model").get("quantize")
    return packed


def _data_section(run: RunRecord, hide: list[str]) -> str:
    rows = list[list[str]]()
    whole = ", ".join([*data_sources(run), *named_set_names(run)])
    sets = [(name, row_set) for name in run.job_names for row_set in row_sets_of(run, name)]
    roles = any(row_set.role for _, row_set in sets)
    for name, row_set in sets:
        source = row_set.facts.get("source") or (
            ", ".join(row_set.sources) if row_set.role else whole
        )
        if row_set.facts.get("streamed"):
            counts = ["streamed", EMPTY_CELL, EMPTY_CELL, EMPTY_CELL]
        else:
            counts = [
                escape_markdown(row_set.facts.get(key, EMPTY_CELL if row_set.role else ""))
                for key in ("rows", "sequences", "tokens", "supervised")
            ]
        rows.append(
            [
                *([code_span(name)] if name is not None else []),
                *([escape_markdown(row_set.role)] if roles else []),
                code_span(strip_directories(source, hide)),
                *counts,
                code_span(row_set.facts.get("sha256", "")),
            ]
        )
    head = [
        *(["adapter"] if run.jobs else []),
        *(["role"] if roles else []),
        "source",
        "rows",
        "sequences",
        "tokens",
        "learnt",
        "SHA-256 of the tokens",
    ]
    # once for all jobs that read the same
    lost = dict.fromkeys(
        f"- left out{f' of {row_set.role}' if row_set.role else ''}: {escape_markdown(n)} rows ({escape_markdown(reason)})"
        for _, row_set in sets
        for reason, n in (row_set.facts.get("left_out") or {}).items()
    )
    left_out = "\n".join(lost)
    return markdown_table(head, rows) + (f"\n\n{left_out}" if left_out else "")


def _title_of_what_trains(run: RunRecord) -> str:
    if experts_of(run):
        return "Router"
    return "Adapter" if run.config.get("lora") else "What trains"


def _lora_section(run: RunRecord, hide: list[str]) -> str:
    if experts_of(run):  # `lora` is the run's by default alone: the experts have their own
        router = run.settings_group("router")
        return _settings_text("router", {k: v for k, v in router.items() if k != "train"})
    if not run.config.get("lora"):
        return markdown_table(
            ["setting", "value"], [["trainable", code_span(run.config.get("trainable") or "all")]]
        )
    if not run.jobs:
        return _settings_text("lora", run.settings_group("lora"))
    ranks = [
        [
            f"{escape_markdown(name)}: rank",
            escape_markdown(run.settings_group("lora", name).get("r")),
        ]
        for name in run.job_names
    ]
    groups = {
        job["name"]: {group: own for group, own in job.items() if group != "name" and own}
        for job in run.jobs
    }
    own = [
        [
            f"{escape_markdown(name)}: its own settings",
            code_span(strip_directories(json.dumps(settings), hide)),
        ]
        for name, settings in groups.items()
    ]
    return markdown_table(["", ""], [*ranks, *own])


def _training_section(run: RunRecord) -> str:
    train, data = run.settings_group("train"), run.settings_group("data")
    chosen = {k: train.get(k) for k in TRAINING_SETTINGS} | {k: data.get(k) for k in DATA_SETTINGS}
    distil = run.settings_group("distill")
    chosen |= {f"distill.{k}": public_path(v) for k, v in distil.items() if v is not None}
    unlearn = run.settings_group("unlearn")
    chosen |= {f"unlearn.{k}": v for k, v in unlearn.items() if k not in ROW_SET_SETTINGS}
    return _settings_text("", chosen)


def _settings_text(group: str, values: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in values.items() if v not in (None, {}, [], False)}
    texts = {
        k: json.dumps(v, ensure_ascii=False) if isinstance(v, (list, dict)) else v
        for k, v in shown.items()
    }
    return markdown_table(
        ["setting", "value"],
        [[code_span(f"{group}.{k}" if group else k), code_span(v)] for k, v in texts.items()],
    )


def _results_section(run: RunRecord, plot: str | None) -> str:
    parts = [
        markdown_table(
            ["", ""],
            [[escape_markdown(k), escape_markdown(v)] for k, v in training_figures(run).items()],
        )
    ]
    parts += [f"![Loss and the other curves of the run]({plot})"] if plot else []
    for name, values in metric_changes(run).items():
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


def _usage_section(run: RunRecord, at: str | None) -> str:
    place, base = _quote_literal(at or run.name), _quote_literal(public_base_name(run))
    # of a repository `load` fetches the top only, where several adapters are not
    whole = at is not None and bool(run.jobs)
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
    if not run.config.get("lora"):
        theirs = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model, tokenizer = AutoModelForCausalLM.from_pretrained({place}), AutoTokenizer.from_pretrained({place})",
        ]
        return f"{ours}\n\nor with transformers alone:\n\n{fenced_code('python', theirs)}"
    if start_of(run):
        return (
            f"{ours}\n\nPEFT cannot load an adapter on top of another; this merges "
            "the two into one that it can load:\n\n"
        ) + fenced_code("sh", [f"lorry export {clean_line(at or run.name)} to=peft"])
    experts = experts_of(run)
    inside = next(iter(experts), run.job_names[0] if run.jobs else None)
    folder = f", subfolder={_quote_literal(inside)}" if inside else ""
    theirs = [
        "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
        f"base = AutoModelForCausalLM.from_pretrained({base})",
        f"model = PeftModel.from_pretrained(base, {place}{folder})",
    ]  # fmt: skip
    if (run.config["lora"] or {}).get("new_tokens"):
        theirs[1] = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        rows = f"len(AutoTokenizer.from_pretrained({place}))"
        theirs.insert(4, f"base.resize_token_embeddings({rows})")
    caveat = (
        ""
        if base_id(run)
        else "; the base model was not read from the hub, so give your path to it"
    )
    what = "or one expert" if experts else "or"
    packed = (
        f"\n\nIt was trained over a base packed in {code_span(packed_format)}, as `lorry.load` opens it. Over the "
        "plain weights, as here, its answers are not quite those that were measured: "
        "`lorry merge` makes a plain model of what it was trained over."
        if (packed_format := _packed_format(run))
        else ""
    )
    return f"{ours}\n\n{what} with PEFT{caveat}:\n\n{fenced_code('python', theirs)}{packed}"


def _quote_literal(text: object) -> str:
    """A Python string literal of one line."""
    return json.dumps(clean_line(text), ensure_ascii=False)


def _contracts_section(run: RunRecord, hide: list[str]) -> str:
    """What was promised of this run, and whether it held."""
    outcomes = [
        (c.status.replace("_", " "), c.name, strip_directories(c.detail, hide))
        for c in run.contracts
    ]
    return "\n".join(
        f"- {escape_markdown(status)}: {escape_markdown(name)} ({escape_markdown(detail)})"
        for status, name, detail in outcomes
    )


def _licence_table(run: RunRecord, licences: LicenceNames) -> str:
    names = list(
        dict.fromkeys(
            [
                *data_sources(run),
                *named_set_names(run),
                *teacher_names(run),
                public_base_name(run),
            ]
        )
    )
    known = [
        [code_span(public_path(name)), escape_markdown(licences[name])]
        for name in names
        if name in licences
    ]
    return markdown_table(["made from", "under"], known)
