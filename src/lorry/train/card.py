"""README.md of a run: the hub's model card, made from the files of the run and from nothing else.

Try: ``print(of_run(Path("runs/people")))``. No place on this machine is shown: an absolute path loses its directories. The last
line signs the text, so that a card which a person edited is known as such and kept.
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

from lorry.config.files import write_yaml
from lorry.disk import receipt
from lorry.disk.documents import parse_yaml
from lorry.train.figures import Facts, Value, figures, read, results
from lorry.train.frontmatter import (
    EMBEDDED_LICENCES,
    Names,
    base_id,
    base_name,
    catalogued,
    front_matter,
    hidden,
    sets,
    shown,
    sources,
    teachers,
    without,
)  # fmt: skip
from lorry.train.markdown import NOTHING, clean, code, fence, plain, table

TRAINING = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "seed",
)  # fmt: skip
READING = ("max_length", "packing", "completion_only_loss", "test_size", "n", "weights", "template")
SIGNED = re.compile(r"\n<!-- Written by Lorry, ([0-9a-f]{16})\. A card that was edited is left as it is\. -->\n")


def of_run(
    run_dir: Path,
    *,
    at: str | None = None,
    plot: str | None = None,
    licences: Names = MappingProxyType({}),
) -> str:
    """The card of a run directory. ``at``: what `lorry.load` is shown with, a hub id or by default the run's name; ``plot``: an
    image beside the card; ``licences``: of hub data sets and bases, beside those that the catalogue knows. Raises ConfigError or
    DataError naming a file of the run that cannot be read."""
    facts, written = read(run_dir), run_dir / "README.md"
    text = written.read_text(encoding="utf-8", errors="replace") if written.is_file() else ""
    if not edited(text):  # made where the run was made, when a relative path could still be told from a hub id
        front, _ = parse_yaml(text.split("---\n")[1], str(written))
        facts = replace(facts, datasets=front.get("datasets", []))
    known = catalogued(facts)
    licences = {**{name: found.licence for name, found in known.items()}, **licences}
    return card(facts, at=at, plot=plot, licences=licences, hubs={name: found.hub for name, found in known.items() if found.hub})


def card(facts: Facts, *, at: str | None = None, plot: str | None = None, licences: Names, hubs: Names) -> str:
    """The same from what the files say. ``hubs``: the hub ids of named sets."""
    licences = {**EMBEDDED_LICENCES, **licences}
    hide = hidden(facts)
    parts = [
        f"# {plain(facts.name)}\n\n{_lead(facts)}",
        _section("Base", _base(facts)),
        _section("Data", _data(facts, hide)),
        _section("Adapter" if facts.config.get("lora") else "What trains", _spec(facts, hide)),
        _section("Training", _training(facts)),
        _section("Results", _results(facts, plot)),
        _section("Use", _use(facts, at)),
        _section("Contracts", _contracts(facts, hide)),
        _section("Licences", _licence_table(facts, licences)),
    ]
    text = f"---\n{write_yaml(front_matter(facts, licences, hubs))}---\n\n" + "\n\n".join(p for p in parts if p) + "\n"
    return f"{text}\n<!-- Written by Lorry, {_digest(text)}. A card that was edited is left as it is. -->\n"


def edited(text: str) -> bool:
    """Whether a card is not as Lorry wrote it."""
    signed = SIGNED.search(text)
    return signed is None or signed.end() != len(text) or signed[1] != _digest(text[: signed.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


# --- what a person reads


def _lead(facts: Facts) -> str:
    count, base = len(facts.names), code(base_name(facts))
    if not facts.config.get("lora"):
        what = f"{base}, its own weights ({code(facts.config.get('trainable') or 'all')}) trained with Lorry"
    elif count == 1:
        what = f"A LoRA adapter for {base}, trained with Lorry"
    else:
        what = f"{count} LoRA adapters, trained in one pass with Lorry, each in a folder of its name, for {base}"
    whence = ", ".join(code(shown(s)) for s in [*sources(facts), *sets(facts)])
    taught = ", ".join(code(shown(t)) for t in teachers(facts))
    return f"{what}{f' on {whence}' if whence else ''}{f', distilled from {taught}' if taught else ''}."


def _base(facts: Facts) -> str:
    base, model = facts.receipt.get("base") or {}, facts.config.get("model") or {}
    known = {
        "name": base_name(facts), "read from": base.get("kind"), "revision": base.get("revision"), "family": base.get("family"),
        "number format": base.get("dtype") or model.get("dtype"), "digest": base.get("sha256"),
    }  # fmt: skip
    return table(["", ""], [[key, code(value)] for key, value in known.items() if value])


def _data(facts: Facts, hide: list[str]) -> str:
    data = facts.receipt.get("data") or {}
    rows = []
    for name in facts.names:
        one = data if name is None else receipt.part(data, name)
        source = without(one.get("source") or ", ".join([*sources(facts), *sets(facts)]), hide)
        if one.get("streamed"):
            counts = ["streamed", NOTHING, NOTHING, NOTHING]
        else:
            counts = [plain(one.get(key, "")) for key in ("rows", "sequences", "tokens", "supervised")]
        rows.append([*([code(name)] if name is not None else []), code(source), *counts, code(one.get("sha256", ""))])
    head = [*(["adapter"] if facts.jobs else []), "source", "rows", "sequences", "tokens", "learnt", "SHA-256 of the tokens"]
    left = [data if name is None else receipt.part(data, name) for name in facts.names]
    lost = {plain(reason): n for one in left for reason, n in (one.get("left_out") or {}).items()}
    said = "\n".join(f"- left out: {plain(n)} rows ({reason})" for reason, n in lost.items())
    return table(head, rows) + (f"\n\n{said}" if said else "")


def _spec(facts: Facts, hide: list[str]) -> str:
    if not facts.config.get("lora"):
        return table(["setting", "value"], [["trainable", code(facts.config.get("trainable") or "all")]])
    if not facts.jobs:
        return _settings("lora", facts.group("lora"))
    ranks = [[f"{plain(name)}: rank", plain(facts.group("lora", name).get("r"))] for name in facts.names]
    groups = {job["name"]: {g: job[g] for g in ("lora", "data", "train") if job.get(g)} for job in facts.jobs}
    own = [[f"{plain(name)}: its own settings", code(without(json.dumps(given), hide))] for name, given in groups.items()]
    return table(["", ""], [*ranks, *own])


def _training(facts: Facts) -> str:
    train, data = facts.group("train"), facts.group("data")
    chosen = {k: train.get(k) for k in TRAINING} | {k: data.get(k) for k in READING}
    distil = facts.config.get("distill") or {}
    chosen |= {f"distill.{k}": shown(v) for k, v in distil.items() if v is not None}
    return _settings("", chosen)


def _settings(group: str, values: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in values.items() if v not in (None, {}, [], False)}
    texts = {k: json.dumps(v, ensure_ascii=False) if isinstance(v, (list, dict)) else v for k, v in kept.items()}
    return table(["setting", "value"], [[code(f"{group}.{k}" if group else k), code(v)] for k, v in texts.items()])


def _results(facts: Facts, plot: str | None) -> str:
    parts = [table(["", ""], [[plain(k), plain(v)] for k, v in figures(facts).items()])]
    parts += [f"![Loss and the other curves of the run]({plot})"] if plot else []
    for name, values in results(facts).items():
        before, interval = any(v.before is not None for v in values.values()), any(v.interval for v in values.values())
        head = ["metric", *(["base"] if before else []), "trained", *(["95% interval"] if interval else [])]
        parts.append(f"### {plain(shown(name))}\n\n{table(head, [_row(m, v, before, interval) for m, v in values.items()])}")
    return "\n\n".join(p for p in parts if p)


def _row(metric: str, value: Value, before: bool, interval: bool) -> list[str]:
    between = f"{_figure(value.interval[0])} to {_figure(value.interval[1])}" if value.interval else NOTHING
    sides = [*([_figure(value.before)] if before else []), _figure(value.after)]
    return [plain(metric.replace("_", " ")), *sides, *([between] if interval else [])]


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4g}"


def _use(facts: Facts, at: str | None) -> str:
    place, base = _quoted(at or facts.name), _quoted(base_name(facts))
    whole = at is not None and bool(facts.jobs)  # of a repository `load` fetches the top only, where several adapters are not
    fetch, whence = ("from huggingface_hub import snapshot_download", f"snapshot_download({place})") if whole else ("", place)
    load = [f"model, tokenizer = lorry.load({whence})", 'print(lorry.generate(model, tokenizer, "..."))']
    ours = fence("python", ["import lorry", *([fetch, ""] if fetch else [""]), *load])
    if not facts.config.get("lora"):
        theirs = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f"model, tokenizer = AutoModelForCausalLM.from_pretrained({place}), AutoTokenizer.from_pretrained({place})",
        ]  # fmt: skip
        return f"{ours}\n\nor with transformers alone:\n\n{fence('python', theirs)}"
    folder = f", subfolder={_quoted(facts.names[0])}" if facts.jobs else ""
    theirs = [
        "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
        f"base = AutoModelForCausalLM.from_pretrained({base})",
        f"model = PeftModel.from_pretrained(base, {place}{folder})",
    ]  # fmt: skip
    said = "" if base_id(facts) else "; the base was not read from the hub, so give the place where you have it"
    return f"{ours}\n\nor with PEFT{said}:\n\n{fence('python', theirs)}"


def _quoted(text: object) -> str:
    """A Python string literal of one line."""
    return json.dumps(clean(text), ensure_ascii=False)


def _contracts(facts: Facts, hide: list[str]) -> str:
    """What was promised of this run, and whether it held."""
    told = [(str(c.get("status")).replace("_", " "), c.get("name"), without(c.get("detail", ""), hide)) for c in facts.contracts]
    return "\n".join(f"- {plain(status)}: {plain(name)} ({plain(detail)})" for status, name, detail in told)


def _licence_table(facts: Facts, licences: Names) -> str:
    names = list(dict.fromkeys([*sources(facts), *sets(facts), *teachers(facts), base_name(facts)]))
    known = [[code(shown(name)), plain(licences[name])] for name in names if name in licences]
    return table(["made from", "under"], known)
