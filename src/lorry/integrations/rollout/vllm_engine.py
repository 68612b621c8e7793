"""vLLM in this process: adapters by `LoRARequest`.

llm = LLM(model, enable_lora=True, max_lora_rank=16, max_cpu_loras=2)
engine = VllmEngine(llm)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorry.errors import ConfigError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout.engine import EngineError, file_digests
from lorry.integrations.rollout.versions import AdapterVersion


class VllmEngine:
    """A `vllm.LLM` that was made with ``enable_lora=True``. Raises ConfigError where vLLM cannot be
    imported."""

    def __init__(self, llm: Any, label: str = "vLLM in this process") -> None:
        self.llm, self.label = llm, label
        self._requests: dict[str, Any] = {}

    def load_lora_adapter(self, version: AdapterVersion) -> None:
        if version.name in self._requests:
            raise EngineError(f"{self.label}: {version.name} is loaded already")
        request = _vllm().lora.request.LoRARequest(version.name, version.number, str(version.path))
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
        return file_digests(self.label, version.name, self.list_lora_adapters().get(version.name))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        adapter: str | None,
    ) -> list[Completion]:
        if adapter is not None and adapter not in self._requests:
            raise EngineError(f"{self.label}: {adapter} is not loaded")
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            _vllm().SamplingParams(
                max_tokens=params.max_new_tokens,
                temperature=params.temperature,
                top_p=1.0 if params.top_p is None else params.top_p,
                top_k=params.top_k or 0,
                repetition_penalty=params.repetition_penalty,
                seed=params.seed,
                stop_token_ids=sorted(params.stop_token_ids),
                logprobs=0,  # of the chosen token alone
                detokenize=False,
            ),
            lora_request=None if adapter is None else self._requests[adapter],
            use_tqdm=False,
        )
        return [_completion(output.outputs[0]) for output in outputs]


def _completion(answer: Any) -> Completion:
    tokens = [int(token) for token in answer.token_ids]
    values = [
        float(each[token].logprob) for token, each in zip(tokens, answer.logprobs, strict=True)
    ]
    return Completion(tokens, "length" if answer.finish_reason == "length" else "stop", values)


def _vllm() -> Any:
    try:
        import vllm
        import vllm.lora.request
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported ({error}); install it beside Lorry") from error
    return vllm
