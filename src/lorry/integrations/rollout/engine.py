"""What a rollout engine has to do for us: take an adapter, say what it holds, and answer.

`LoraReceiver` is whatever takes versions of an adapter, `ModelReceiver` whatever takes merged models;
`PromptAnswerer` can be sampled from, and `RolloutEngine` is both of the first and the last. vLLM's and
SGLang's servers are in servers.py, vLLM in this process in vllm_engine.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from lorry.disk.integrity import read_content
from lorry.errors import ContractError, LorryError, ModelError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout.digests import read_tensor_facts
from lorry.integrations.rollout.versions import AdapterVersion, ModelVersion
from lorry.runs.layout import ADAPTER_WEIGHTS


class EngineError(LorryError, OSError):
    """A rollout engine could not be reached, refused what it was asked, or answered with something
    else. Nothing was trained on it.
    """

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h
    docs = "rollout.md"


class LoraReceiver(Protocol):
    """Whatever takes versions of an adapter. ``label``: what messages call it."""

    label: str

    def load_lora_adapter(self, version: AdapterVersion) -> None:
        """Take a version under its name. Raises EngineError where it is refused."""

    def unload_lora_adapter(self, name: str) -> None:
        """Let one go. Raises EngineError where it is not held."""

    def list_lora_adapters(self) -> Mapping[str, Path | None]:
        """{adapter: the directory that it was read from} of all that it says it holds."""

    def held_digests(self, version: AdapterVersion) -> Mapping[str, str]:
        """{tensor: SHA-256} of what it holds under a version's name: of its memory where that can
        be asked, else of the file that it read."""


@runtime_checkable
class PromptAnswerer(Protocol):
    """Whatever answers prompts, with or without adapters. ``label``: what messages call it."""

    label: str

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        adapter: str | None,
    ) -> list[Completion]:
        """An answer to each prompt (token ids) by the named adapter, None: the base alone.
        ``logprobs`` of the answers are at temperature 1. Raises EngineError."""


class RolloutEngine(LoraReceiver, PromptAnswerer, Protocol):
    """A receiver that answers prompts with the adapters that it was sent."""


@runtime_checkable
class ModelReceiver(Protocol):
    """Whatever takes whole models in the place of its base, and no adapter over them."""

    label: str

    def load_model(self, version: ModelVersion) -> None:
        """Take a model, and forget what was remembered of the old one's prompts. Raises
        EngineError."""

    def list_lora_adapters(self) -> Mapping[str, Path | None]:
        """As `LoraReceiver`."""


class DirectoryReader:
    """A receiver that reads directories into memory, as an engine does: for dry runs and tests, and
    for engines that are fed by others from the same directories.
    """

    def __init__(self, label: str = "directory reader") -> None:
        self.label = label
        self.held: dict[str, tuple[Path, bytes]] = {}

    def load_lora_adapter(self, version: AdapterVersion) -> None:
        if version.name in self.held:
            raise EngineError(f"{self.label}: {version.name} is loaded already")
        self.held[version.name] = (version.path, read_content(version.path / ADAPTER_WEIGHTS))

    def unload_lora_adapter(self, name: str) -> None:
        if self.held.pop(name, None) is None:
            raise EngineError(f"{self.label}: {name} is not loaded")

    def list_lora_adapters(self) -> Mapping[str, Path | None]:
        return {name: path for name, (path, _) in self.held.items()}

    def held_digests(self, version: AdapterVersion) -> Mapping[str, str]:
        path, content = self.held[version.name]
        facts = read_tensor_facts(content, str(path / ADAPTER_WEIGHTS))
        return {name: each.sha256 for name, each in facts.items()}


def file_digests(label: str, name: str, path: Path | None) -> dict[str, str]:
    """{tensor: SHA-256} of the file that an engine says it read for an adapter. Raises EngineError
    where it does not say, or this process cannot see the file."""
    if path is None:
        raise EngineError(f"{label}: does not say which directory it read {name} from")
    try:
        content = read_content(path / ADAPTER_WEIGHTS)
    except ModelError:
        raise EngineError(
            f"{label}: read {name} from {path}, which is not there on this machine; trainer and "
            "engine must share the directory of versions"
        ) from None
    facts = read_tensor_facts(content, str(path / ADAPTER_WEIGHTS))
    return {tensor: each.sha256 for tensor, each in facts.items()}


def refuse_twice(label: str, model: ModelVersion | None, name: str) -> None:
    """Refuse an adapter for an engine that was given a merged ``model``. Raises ContractError."""
    if model is not None:
        raise ContractError(
            f"{label}: has {model.name} in the place of its base, into which an adapter is merged; "
            f"{name} over it would count twice; start the engine anew, or go on with merged models"
        )
