"""Defaults of another tool, kept where a description that is written for it leaves settings out: read
with ours it would train something else, and nobody would see it.

LLaMA-Factory's are those of its `FinetuningArguments` and `DataArguments` and of transformers'
`TrainingArguments`, axolotl's those of its `HyperparametersConfig` and `AxolotlInputConfig`, where they
differ from ours. axolotl has none for an adapter's rank and alpha: it hands a null on to PEFT, which
fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorry.config.parsing.aliases import ALIAS_RENAMES
from lorry.config.parsing.names import SchemaNames
from lorry.config.parsing.place import GivenSetting
from lorry.notes import NoteCallback

RANK, ALPHA = "lora.r", "lora.lora_alpha"


@dataclass(frozen=True)
class PeerDefaults:
    """``marks``: names that no other tool has, one of which makes a description this tool's;
    ``settings``: by our dotted names; ``alpha_of_rank``: lora_alpha as a multiple of the rank."""

    tool: str
    marks: frozenset[str]
    settings: Mapping[str, Any]
    alpha_of_rank: int | None = None


PEERS = (
    PeerDefaults(
        "LLaMA-Factory",
        frozenset({"finetuning_type", "lora_target", "stage"}),
        {RANK: 8, "train.learning_rate": 5e-5, "train.warmup_ratio": 0, "data.max_length": 2048},
        alpha_of_rank=2,
    ),
    PeerDefaults(
        "axolotl",
        frozenset({"datasets"}),
        {
            "train.num_train_epochs": 1,
            "train.per_device_train_batch_size": 1,
            "train.lr_scheduler_type": "cosine",
            "data.max_length": 512,
        },
    ),
)


def with_peer_defaults(
    names: SchemaNames, sources: Sequence[Sequence[GivenSetting]], add_note: NoteCallback
) -> list[Sequence[GivenSetting]]:
    """The sources, after one of the defaults that the tool has which a name among them marks: of settings
    that none of them gives."""
    every = [setting for source in sources for setting in source]
    for peer in PEERS:
        # of a file: one word that a person types or passes is no description written for the tool
        mark = next((one for one in every if one.key in peer.marks and _is_of_file(one)), None)
        # of a schema with a setting of that name it is ours
        if mark is None or names.candidates(mark.key):
            continue
        defaults = _defaults_left_out(names, peer, every)
        if not defaults:
            continue
        words = " ".join(f"{name.rpartition('.')[2]}={_show(v)}" for name, v in defaults.items())
        add_note(
            f"{mark.where}: {mark.key} is {peer.tool}'s, so what is left out is as there by default: {words}"
        )
        where = f"{peer.tool}'s default"
        sources = [[GivenSetting(name, v, where) for name, v in defaults.items()], *sources]
    return list(sources)


def _defaults_left_out(
    names: SchemaNames, peer: PeerDefaults, every: Sequence[GivenSetting]
) -> dict[str, Any]:
    # by dotted name; of several the last one counts
    given = {name: setting.value for setting in every for name in _dotted(names, setting)}
    defaults = dict(peer.settings)
    rank = _whole_number(given.get(RANK, defaults.get(RANK)))
    if peer.alpha_of_rank is not None and rank is not None:
        defaults[ALPHA] = peer.alpha_of_rank * rank
    left_out = set(given)
    # one setting of two that say the same
    if left_out & {"train.warmup_steps", "train.warmup_epochs"}:
        left_out.add("train.warmup_ratio")
    if given.get("lora", "") in (None, "null"):
        left_out |= {RANK, ALPHA}
    # which has ranks of its own, and no peer's file does it
    if given.get("lora.variant") == "adalora":
        left_out |= {RANK, ALPHA}
    return {n: v for n, v in defaults.items() if n not in left_out and n in names.fields}


def _dotted(names: SchemaNames, setting: GivenSetting) -> list[str]:
    """Our names for what a setting sets, its own where it has none; none for a peer's
    name without a value."""
    key = setting.key
    if key in names.fields or key in names.groups:
        return [key]
    if candidates := names.candidates(key):
        return candidates
    # a key without a value in another tool's file leaves its default
    return [] if setting.value is None else [ALIAS_RENAMES.get(key, key)]


def _is_of_file(setting: GivenSetting) -> bool:
    # from Python a setting stands nowhere but under its own name
    return not setting.typed and setting.where != setting.key


def _whole_number(value: Any) -> int | None:
    """A rank as it was typed or read; None for another kind of value, which is refused elsewhere or
    chosen by the run."""
    text = str(value).strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _show(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"
