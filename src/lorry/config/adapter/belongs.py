"""Settings of an adapter that only some variants or starts have, where jobs differ in theirs:

    lorry sweep data=rows.jsonl variant=lora,adalora target_r=4,8    # one plain job, two of AdaLoRA

Each goes to the jobs that it means something to, and a note says so. Where no job is of that kind it
stays where it was given, and is refused there. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorry.config.adapter.initialization import INITIALIZATIONS
from lorry.config.parsing.names import show_value
from lorry.config.parsing.place import GivenSetting
from lorry.config.schema.lora import ADALORA_FIELDS, LoraConfig
from lorry.notes import NoteCallback

# settings by group: {group: {setting: value}}
SettingsTree = dict[str, dict[str, Any]]
REPEATABLE = tuple(name for name, way in INITIALIZATIONS.items() if way.is_repeatable)
FROM_ROWS = tuple(name for name, way in INITIALIZATIONS.items() if way.reads_rows)
# {setting: (the one that decides, its values)}
BELONGS_TO: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(ADALORA_FIELDS[1:], ("variant", ("adalora",))),
    "keep_residual": ("init_lora_weights", REPEATABLE),
    "init_rows": ("init_lora_weights", FROM_ROWS),
    "rho": ("init_lora_weights", ("eva",)),
}
MOST_NAMED = 4  # jobs in a note


def hand_down(
    tree: Mapping[str, Any], jobs: Sequence[tuple[str, SettingsTree]], add_note: NoteCallback
) -> tuple[dict[str, Any], list[SettingsTree]]:
    """The run's settings without those that belong to some of the ``jobs`` (their names and their own
    settings) alone, and each job's with them, unless it brings its own."""
    if not isinstance(lora := tree.get("lora"), Mapping):
        return dict(tree), [own for _, own in jobs]
    kept = dict(lora)
    handed: list[dict[str, Any]] = [{} for _ in jobs]
    for name, (decides, values) in BELONGS_TO.items():
        owners = [
            n for n, (_, own) in enumerate(jobs) if own.get("lora", {}).get(decides) in values
        ]
        # a resolved description has the defaults of every setting, which are refused nowhere
        default = LoraConfig.model_fields[name].default
        if not owners or lora.get(decides) in values or lora.get(name, default) == default:
            continue
        value = kept.pop(name)
        for n in owners:
            handed[n] = {name: value, **handed[n]}
        rest = f" and {more} more" if (more := len(owners) - MOST_NAMED) > 0 else ""
        named = ", ".join(jobs[n][0] for n in owners[:MOST_NAMED]) + rest
        have = "have" if len(owners) > 1 else "has"
        add_note(f"{name}={show_value(value)} belongs to {_kind(name)}: only {named} {have} it")
    trees = [
        {**own, "lora": {**given, **own.get("lora", {})}} if given else own
        for given, (_, own) in zip(handed, jobs, strict=True)
    ]
    return {**tree, "lora": kept}, trees


def drop_foreign(
    combinations: Sequence[Sequence[GivenSetting]], add_note: NoteCallback
) -> list[list[GivenSetting]]:
    """The combinations of a grid, each without the settings that mean nothing to its own variant or
    start; those that are then the same come once."""
    found = dict[str, list[GivenSetting]]()
    dropped = dict[str, None]()
    for settings in combinations:
        own = {setting.key.rpartition(".")[2]: setting.value for setting in settings}
        foreign = {name for name in own if _is_foreign(name, own)}
        dropped |= dict.fromkeys(sorted(foreign))
        left = [s for s in settings if s.key.rpartition(".")[2] not in foreign]
        found.setdefault(repr([(s.key, s.value) for s in left]), left)
    for name in dropped:
        add_note(f"{name} belongs to {_kind(name)}: the other combinations are tried without it")
    return [*found.values()] if dropped else [list(settings) for settings in combinations]


def _is_foreign(name: str, own: Mapping[str, Any]) -> bool:
    decides, values = BELONGS_TO.get(name, ("", ()))
    return decides in own and own[decides] not in values


def _kind(name: str) -> str:
    decides, values = BELONGS_TO[name]
    return f"{decides}={' or '.join(map(str, values))}"
