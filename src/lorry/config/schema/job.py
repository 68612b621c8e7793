"""One of several adapters that train in one pass. No torch here."""

from __future__ import annotations

from typing import Any

from lorry.config.base import CheckedName, SettingsGroup, config_field


class JobConfig(SettingsGroup):
    """One of several adapters trained in one pass: its name, and the settings in which it is not
    the run's (`jobs.runs_by_adapter`).
    """

    name: CheckedName
    # plain values and not LoraConfig: only what differs is kept, and a default is no difference
    lora: dict[str, Any] = config_field({}, "the settings that differ from the run's")
    data: dict[str, Any] = config_field({}, "the settings that differ from the run's")
    train: dict[str, Any] = config_field({}, "the settings that differ from the run's")

    def own_settings(self) -> dict[str, Any]:
        """{dotted name: value} of all that is not the run's."""
        groups = self.model_dump(mode="json", exclude={"name"})
        return {f"{group}.{key}": v for group, own in groups.items() for key, v in own.items()}
