"""vLLM's and SGLang's servers: adapters are loaded from directories by their documented calls, and
answers come with token ids and log-probabilities.

    engine = VllmServer("http://127.0.0.1:8000")        # VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve ...
    engine = SglangServer("http://127.0.0.1:30000")     # sglang serve --enable-lora --max-lora-rank 16 ...

Directories, not tensors: SGLang's `/load_lora_adapter_from_tensors` unpickles what it is sent.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorry.errors import ConfigError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout.answers import (
    check_all_answered,
    read_completion,
    row_seeds,
    sglang_sampling,
    vllm_sampling,
)
from lorry.integrations.rollout.engine import EngineError, file_digests, refuse_twice
from lorry.integrations.rollout.versions import AdapterVersion, ModelVersion

MOST_BYTES = 1 << 28  # of an answer; more was not asked for
MOST_AT_ONCE = 64  # requests; the engine batches what is there together


class _Server:
    """A server that lists its adapters at /v1/models, each with the directory that it was read from
    (``root``), as vLLM and SGLang both do. ``timeout``: seconds without a byte after which it has
    failed.
    """

    product = "server"

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no server's address; give http://HOST:PORT")
        self.url = url.rstrip("/")
        self.label = f"{self.product} at {self.url}"
        self.timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def list_lora_adapters(self) -> Mapping[str, Path | None]:
        return {
            card["id"]: Path(card["root"]) if card.get("root") else None
            for card in self._cards()
            if card.get("parent") is not None
        }

    def base_model(self) -> str:
        """The name under which the base is served. Raises EngineError."""
        for card in self._cards():
            if card.get("parent") is None:
                return str(card["id"])
        raise EngineError(f"{self.label}: /v1/models lists no base model")

    def held_digests(self, version: AdapterVersion) -> Mapping[str, str]:
        return file_digests(self.label, version.name, self.list_lora_adapters().get(version.name))

    def _cards(self) -> list[dict[str, Any]]:
        answer = self._object(self._ask("/v1/models"), "/v1/models")
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not all(
            isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
        ):
            raise EngineError(f"{self.label}: /v1/models did not list models")
        return cards

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._object(self._ask(path, body), path)

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """What it answers. Raises EngineError, with what it said, for any other status than 2xx."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                content: bytes = answer.read(MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            raise EngineError(
                f"{self.label}: {path} was refused with {error.code}: {said}"
                f"{self._advice(path, error.code)}"
            ) from None
        # what is no HTTP is no OSError either
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"{self.label}: no answer to {path} ({error}); is it running, and is this its address?"
            ) from None
        if len(content) > MOST_BYTES:
            raise EngineError(f"{self.label}: answered {path} with more than {MOST_BYTES} bytes")
        return content

    def _object(self, content: bytes, path: str) -> Any:
        try:
            value = json.loads(content)
        except ValueError:
            value = None
        if not isinstance(value, dict | list):
            raise EngineError(f"{self.label}: answered {path} with {content[:200]!r}")
        return value

    def _advice(self, path: str, status: int) -> str:
        return ""


class VllmServer(_Server):
    """`vllm serve MODEL --enable-lora --max-lora-rank R`, started with
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. A model's name is that of the adapter."""

    product = "vLLM"
    model: ModelVersion | None = None  # in the place of its base, if this client sent one

    def load_lora_adapter(self, version: AdapterVersion) -> None:
        refuse_twice(self.label, self.model, version.name)
        # a text, not JSON: "Success: LoRA adapter ... added successfully"
        self._ask(
            "/v1/load_lora_adapter", {"lora_name": version.name, "lora_path": str(version.path)}
        )

    def unload_lora_adapter(self, name: str) -> None:
        self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def load_model(self, version: ModelVersion) -> None:
        """Take a whole model in the place of the base, by calls that vLLM has with
        VLLM_SERVER_DEV_MODE=1; what it remembers of prompts is forgotten, being the old model's."""
        self.model = version
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(version.path)}}
        self._ask("/collective_rpc", body)
        answer = self._post("/reset_prefix_cache", {})
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise EngineError(f"{self.label}: did not forget the old model's prompts: {answer}")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        adapter: str | None,
    ) -> list[Completion]:
        model = self.base_model() if adapter is None else adapter
        if params.temperature == 0:
            return self._complete(model, prompts, params, params.seed)
        # one request has one seed for all of its prompts: equal ones would get equal answers
        seeds = row_seeds(params.seed, len(prompts))
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            answers = pool.map(
                lambda prompt, seed: self._complete(model, [prompt], params, seed), prompts, seeds
            )
            return [answer for (answer,) in answers]

    def _complete(
        self, model: str, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[Completion]:
        answer = self._post(
            "/v1/completions",
            {
                "model": model,
                "prompt": [list(prompt) for prompt in prompts],
                "return_token_ids": True,
                **vllm_sampling(params, seed),
            },
        )
        who = answer.get("model") if isinstance(answer, dict) else None
        if who != model:
            raise EngineError(f"{self.label}: {model} was asked, {who} answered")
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            completions = [
                read_completion(
                    choice["token_ids"],
                    choice["logprobs"]["token_logprobs"],
                    choice.get("finish_reason"),
                )
                for choice in choices
            ]
            # in the place of a prompt of its own each, or an answer would be another prompt's
            if [int(choice["index"]) for choice in choices] != list(range(len(choices))):
                raise ValueError("a prompt answered twice")
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{self.label}: answers without token ids or log-probabilities ({error!r}); "
                "vLLM 0.10.2 or newer is needed"
            ) from None
        return check_all_answered(self.label, completions, prompts)

    def _advice(self, path: str, status: int) -> str:
        if status == 404 and path.endswith("_lora_adapter"):
            return "; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
        if status == 404 and path in ("/collective_rpc", "/reset_prefix_cache"):
            return "; start it with VLLM_SERVER_DEV_MODE=1 to load whole models"
        return ""


class SglangServer(_Server):
    """`sglang serve --model-path MODEL --enable-lora --max-lora-rank R --lora-target-modules ...`.
    Written from its documentation and source; not run here, where it has no CPU build."""

    product = "SGLang"

    def load_lora_adapter(self, version: AdapterVersion) -> None:
        self._update(
            "/load_lora_adapter", {"lora_name": version.name, "lora_path": str(version.path)}
        )

    def unload_lora_adapter(self, name: str) -> None:
        self._update("/unload_lora_adapter", {"lora_name": name})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        adapter: str | None,
    ) -> list[Completion]:
        answers = self._post(
            "/generate",
            {
                "input_ids": [list(prompt) for prompt in prompts],
                "lora_path": [adapter] * len(prompts),
                "sampling_params": [
                    sglang_sampling(params, seed) for seed in row_seeds(params.seed, len(prompts))
                ],
                "return_logprob": True,
            },
        )
        try:
            completions = [
                read_completion(
                    [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]],
                    [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]],
                    answer["meta_info"]["finish_reason"]["type"],
                )
                for answer in answers
            ]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise EngineError(
                f"{self.label}: answers without token ids or log-probabilities ({error!r})"
            ) from None
        return check_all_answered(self.label, completions, prompts)

    def weights_by_name(self, name: str, rows: int) -> list[list[float]]:
        """The first rows of a weight by Hugging Face's name, as it is held. Raises EngineError where the
        served model's class does not give them."""
        path = "/get_weights_by_name"
        answer = self._post(path, {"name": name, "truncate_size": rows})
        if not isinstance(answer, list):
            raise EngineError(f"{self.label}: {path} gave no rows of {name}: {answer}")
        return answer

    def _update(self, path: str, body: Mapping[str, Any]) -> None:
        answer = self._post(path, body)
        # a failure may come with status 200
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise EngineError(f"{self.label}: {path} failed: {answer}")
