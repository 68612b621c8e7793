"""vLLM in this process: adapters by `LoRARequest`.

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"      # before vLLM is imported; then it can be asked
    llm = LLM(model, enable_lora=True, max_lora_rank=16, max_cpu_loras=2)
    engine = VllmEngine(llm)

What it holds is read from the matrices that its layers compute with, where its workers can be asked:
cast to the engine's dtype, B times the scale, zeros up to ``max_lora_rank``. The same is done here with
the file that was sent, and compared bit for bit. Tried with vLLM 0.32; the places it is read from are
none that vLLM promises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from lorry.adapters.peft.config import parse_peft_config, read_adapter_json
from lorry.adapters.peft.tensors import PEFT_PREFIX
from lorry.disk.integrity import read_content
from lorry.errors import ConfigError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout.answers import read_completion, row_seeds, vllm_sampling
from lorry.integrations.rollout.engine import EngineError, file_digests, refuse_twice
from lorry.integrations.rollout.versions import AdapterVersion, ModelVersion
from lorry.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

# of a layer's buffer for one side: its dtype's name, shape and SHA-256
HeldMatrix = tuple[str, tuple[int, int], str]


class VllmEngine:
    """A `vllm.LLM` that was made with ``enable_lora=True``. ``reads_memory``: whether the last
    `held_digests` were of its layers, and not of the file that it read; None before one. Raises
    ConfigError where vLLM cannot be imported."""

    def __init__(self, llm: Any, label: str = "vLLM in this process") -> None:
        self.llm, self.label = llm, label
        self.reads_memory: bool | None = None
        self.model: ModelVersion | None = None  # in the place of its base
        self._requests: dict[str, Any] = {}
        # vLLM's, of its own: versions of another directory begin at 1 again
        self._numbers = count(1)

    def load_lora_adapter(self, version: AdapterVersion) -> None:
        refuse_twice(self.label, self.model, version.name)
        if version.name in self._requests:
            raise EngineError(f"{self.label}: {version.name} is loaded already")
        number = next(self._numbers)
        request = _vllm().lora.request.LoRARequest(version.name, number, str(version.path))
        try:
            added = self.llm.llm_engine.add_lora(request)
        # whatever it says of the files; the ways it fails are not listed anywhere
        except Exception as error:
            raise EngineError(f"{self.label}: {version.name} was refused: {error}") from error
        if not added:
            raise EngineError(f"{self.label}: {version.name} was not added")
        self._requests[version.name] = request

    def unload_lora_adapter(self, name: str) -> None:
        request = self._requests.pop(name, None)
        if request is None:
            raise EngineError(f"{self.label}: {name} is not loaded")
        # its cache may have dropped it already, which is what is wanted
        self.llm.llm_engine.remove_lora(request.lora_int_id)

    def list_lora_adapters(self) -> Mapping[str, Path | None]:
        held = set(self.llm.llm_engine.list_loras())
        return {
            name: Path(request.lora_path)
            for name, request in self._requests.items()
            if request.lora_int_id in held
        }

    def held_digests(self, version: AdapterVersion) -> Mapping[str, str]:
        path = self.list_lora_adapters().get(version.name)
        read = file_digests(self.label, version.name, path)
        number = self._requests[version.name].lora_int_id
        try:
            workers = self.llm.collective_rpc(read_layers, args=(number,))
        # functions do not go to an engine in another process (TypeError), and another version may
        # keep its matrices elsewhere
        except (TypeError, AttributeError, ValueError):
            workers = []
        # of several workers each has a part of every matrix
        self.reads_memory = len(workers) == 1
        if not self.reads_memory:
            return read
        held: Mapping[str, HeldMatrix] = workers[0]
        expected = expected_matrices(version, held)
        # a layer without an adapter has zeros, as one whose matrix is zero
        zero = {name: read[name] for name, facts in version.tensors.items() if facts.zero}
        # where the layer has what was sent, the digest of what was sent
        return zero | {
            name: read.get(name, "") if held[name] == expected.get(name) else held[name][2]
            for name in held
        }

    def load_model(self, version: ModelVersion) -> None:
        """Take a whole model in the place of the base; what it remembers of prompts is forgotten,
        being the old model's."""
        self.model = version
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(version.path)})
        if not self.llm.reset_prefix_cache():
            raise EngineError(f"{self.label}: did not forget the old model's prompts")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        adapter: str | None,
    ) -> list[Completion]:
        if adapter is not None and adapter not in self._requests:
            raise EngineError(f"{self.label}: {adapter} is not loaded")
        sampling = [
            _vllm().SamplingParams(**vllm_sampling(params, seed), detokenize=False)
            for seed in row_seeds(params.seed, len(prompts))
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            sampling,
            lora_request=None if adapter is None else self._requests[adapter],
            use_tqdm=False,
        )
        return [_completion(output.outputs[0]) for output in outputs]


def read_layers(worker: Any, number: int) -> dict[str, HeldMatrix]:
    """{PEFT's name: what a worker's layer has} of an adapter, by vLLM's number of it; layers without
    one left out. Runs in the worker. Raises AttributeError and ValueError where this vLLM keeps them
    elsewhere."""
    manager = worker.model_runner.lora_manager._adapter_manager
    slot = manager.lora_index_to_id.index(number)
    held = {}
    for path, layer in manager.modules.items():
        parts = manager.packed_modules.get(path, [path])
        for side, stacked in (("A", layer.lora_a_stacked), ("B", layer.lora_b_stacked)):
            for part, buffer in zip(parts, stacked, strict=True):
                if bool((matrix := buffer[slot, 0]).any()):
                    held[f"{PEFT_PREFIX}{part}.lora_{side}.weight"] = _describe(matrix)
    return held


def expected_matrices(
    version: AdapterVersion, held: Mapping[str, HeldMatrix]
) -> dict[str, HeldMatrix]:
    """{PEFT's name: what a layer should have} for a version's file, in the dtypes and shapes that
    were ``held``."""
    config = version.path / ADAPTER_CONFIG
    spec = parse_peft_config(read_adapter_json(config), str(config))
    expected = {}
    for name, value in load(read_content(version.path / ADAPTER_WEIGHTS)).items():
        if name not in held:
            continue
        dtype, shape, _ = held[name]
        path, _, side = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        cast = value.to(getattr(torch, dtype))
        if side.startswith("B"):
            # as vLLM folds it in: after the cast
            cast = cast * spec.scale(path)
        padded = cast.new_zeros(shape)
        padded[: cast.shape[0], : cast.shape[1]] = cast
        expected[name] = _describe(padded)
    return expected


def _describe(matrix: Tensor) -> HeldMatrix:
    flat = matrix.detach().cpu().contiguous()
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
    return str(flat.dtype).removeprefix("torch."), (flat.shape[0], flat.shape[1]), digest


def _completion(answer: Any) -> Completion:
    values = [
        each[token].logprob for token, each in zip(answer.token_ids, answer.logprobs, strict=True)
    ]
    return read_completion(answer.token_ids, values, answer.finish_reason)


def _vllm() -> Any:
    try:
        import vllm
        import vllm.lora.request
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported ({error}); install it beside Lorry") from error
    return vllm
