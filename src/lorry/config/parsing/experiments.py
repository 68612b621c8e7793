"""Experiments: settings under a name, `experiment=unlearn/tofu/lora`, as files of this package.

A file of config/experiments/ is a CONFIG.yaml, read in the same way, with ``parameters`` beside its
settings: words that stand in braces in its values and may be given like settings
(`forget_split=forget05`). Everything that is given goes before the file. An experiment belongs to one
verb by its first folder: `finetune` to `lorry sft`, `unlearn` and `eval` to the verbs of these names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.config.parsing.files import DescriptionFile, read_description_file
from lorry.config.parsing.names import show_value
from lorry.config.parsing.place import GivenSetting
from lorry.errors import ConfigError, suggest_nearest
from lorry.notes import NoteCallback

EXPERIMENT, PARAMETERS = "experiment", "parameters"
SHIPPED_EXPERIMENTS = Path(__file__).parent.parent / "experiments"
VERB_OF_KIND = {"finetune": "lorry sft", "unlearn": "lorry unlearn", "eval": "lorry eval"}
PARAMETER_VALUE = re.compile(r"[\w.-]+")  # it becomes a part of a name


@dataclass(frozen=True)
class Experiment:
    """The file of an experiment with its parameters filled in."""

    path: Path
    described: DescriptionFile


def experiment_names(kind: str) -> list[str]:
    """Those of a kind, in order of their names."""
    files = (SHIPPED_EXPERIMENTS / kind).rglob("*.yaml")
    return sorted(
        file.relative_to(SHIPPED_EXPERIMENTS).with_suffix("").as_posix() for file in files
    )


def take_experiment(
    kind: str, sources: Sequence[Sequence[GivenSetting]], add_note: NoteCallback
) -> tuple[Experiment | None, list[list[GivenSetting]]]:
    """The experiment that is named among the settings, and the settings without its name and its
    parameters. Raises ConfigError for an unknown one, and for one of another verb.
    """
    named = [setting for source in sources for setting in source if setting.key == EXPERIMENT]
    if not named:
        return None, [list(source) for source in sources]
    path = _find_experiment(kind, named[-1])  # the command line goes before a file
    described = read_description_file(path)
    parameters = dict(described.values.get(PARAMETERS, {}))
    rest = [[setting for setting in source if setting.key != EXPERIMENT] for source in sources]
    for source in rest:
        for setting in [candidate for candidate in source if candidate.key in parameters]:
            source.remove(setting)
            _refuse_overridden(setting, described.values, rest)
            parameters[setting.key] = _parameter_value(setting)
            if not any(f"{{{setting.key}}}" in text for _, text in _texts(described.values)):
                add_note(f"{setting.key} changes nothing in this experiment")
    values = {key: value for key, value in described.values.items() if key != PARAMETERS}
    filled = DescriptionFile(_fill_in(values, parameters), described.lines)
    name = path.relative_to(SHIPPED_EXPERIMENTS).with_suffix("").as_posix()
    shown = "".join(f", {key}={word}" for key, word in parameters.items())
    add_note(f"{EXPERIMENT}={name}{shown}: the settings of {path}, overridden by those given here")
    return Experiment(path, filled), rest


def _find_experiment(kind: str, setting: GivenSetting) -> Path:
    name = setting.value if isinstance(setting.value, str) else show_value(setting.value)
    name = name.removesuffix(".yaml")
    known = [experiment for family in VERB_OF_KIND for experiment in experiment_names(family)]
    if name not in known:
        raise ConfigError(
            f"{setting.where}: no experiment {show_value(name)}{suggest_nearest(name[:80], known)}; this verb has "
            f"{', '.join(experiment_names(kind))}"
        )
    family = name.partition("/")[0]
    if family != kind:
        raise ConfigError(f"{setting.where}: {name} is an experiment of `{VERB_OF_KIND[family]}`")
    return SHIPPED_EXPERIMENTS / f"{name}.yaml"


def _refuse_overridden(
    parameter: GivenSetting, values: dict[str, Any], sources: Sequence[Sequence[GivenSetting]]
) -> None:
    """A parameter of which nothing is left, since all that it stands in is given as well."""
    leaves = {setting.key.rpartition(".")[2] for source in sources for setting in source}
    places = [name for name, text in _texts(values) if f"{{{parameter.key}}}" in text]
    # data=FILE is data.path
    names = [
        leaf if leaf != "path" else group for group, _, leaf in (p.rpartition(".") for p in places)
    ]
    if names and all(name in leaves for name in names):
        raise ConfigError(
            f"{parameter.where}: {names[0]} is given as well, so that "
            f"{parameter.key} would change nothing; keep one"
        )


def _texts(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of every text in a tree of settings."""
    texts = list[tuple[str, str]]()
    for key, value in values.items():
        if isinstance(value, dict):
            texts += _texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            texts.append((f"{prefix}{key}", value))
    return texts


def _parameter_value(setting: GivenSetting) -> str:
    value = setting.value if isinstance(setting.value, str) else show_value(setting.value)
    if not PARAMETER_VALUE.fullmatch(value):
        raise ConfigError(f"{setting.where}: {setting.key} is a name, such as forget10")
    return value


def _fill_in(value: Any, parameters: dict[str, Any]) -> Any:
    """The words in braces of every text in a tree."""
    if isinstance(value, dict):
        return {key: _fill_in(each, parameters) for key, each in value.items()}
    if isinstance(value, list):
        return [_fill_in(each, parameters) for each in value]
    if isinstance(value, str):
        for name, word in parameters.items():
            value = value.replace(f"{{{name}}}", str(word))
    return value
