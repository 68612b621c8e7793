"""A rollout engine that stands in for slime's SGLang actors: it holds the tensors and adapters it is sent,
and the order of what it was asked.

    engine = StandInEngine()
    engine.update_weights_from_disk.remote(model_path=..., weight_version="1")
    engine.weights["model.embed_tokens.weight"], engine.adapters["lora_v000001"], engine.calls
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


class Remote:
    """A method of an actor: called by `.remote`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


class StandInEngine:
    """``weights``: the base by Hugging Face's names; ``adapters``: {name: tensors of its file};
    ``weight_version``: of the last sync; ``calls``: names, in order."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.adapters: dict[str, dict[str, Tensor]] = {}
        self.weight_version = "0"
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Remote:
        # only asked for what the object has not: its methods are `_name`
        function = getattr(type(self), f"_{name}", None)
        if function is None:
            raise AttributeError(name)

        def call(*given: Any, **more: Any) -> Any:
            self.calls.append(name)
            return function(self, *given, **more)

        return Remote(call)

    def _pause_generation(self) -> None: ...

    def _flush_cache(self) -> None: ...

    def _continue_generation(self) -> None: ...

    def _get_weight_version(self) -> str:
        return self.weight_version

    def _update_weights_from_tensor(
        self, tensors: Sequence[tuple[str, Tensor]], weight_version: str
    ) -> None:
        self._receive(dict(tensors), weight_version)

    def _update_weights_from_distributed(
        self, tensors: Sequence[tuple[str, Tensor]], group_name: str, weight_version: str
    ) -> None:
        self._receive(dict(tensors), weight_version)

    def _update_weights_from_disk(self, model_path: str, weight_version: str) -> None:
        for file in sorted(Path(model_path).glob("*.safetensors")):
            self._receive(load_file(file), weight_version)

    def _load_lora_adapter(self, lora_name: str, lora_path: str) -> None:
        self.adapters[lora_name] = load_file(Path(lora_path) / "adapter_model.safetensors")

    def _unload_lora_adapter(self, lora_name: str) -> None:
        del self.adapters[lora_name]

    def _receive(self, tensors: dict[str, Tensor], weight_version: str) -> None:
        self.weights |= {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.weight_version = weight_version
