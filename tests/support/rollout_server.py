"""A stand-in for a rollout server on 127.0.0.1: vLLM's and SGLang's calls for adapters, answered by
transformers and PEFT, which know nothing of Lorry.

    with RolloutServer(model_dir) as server: VllmServer(server.url)

``fault`` makes it one that looks healthy: "never" says that it loaded and did not, "unlisted" forgets
it, "elsewhere" read another directory, "stale" answers with the version before, "base" with the base,
"twice" applies the adapter over weights that it is merged into, "nan", "cut" answers one prompt less, "remembers" keeps what it knew of prompts.
It does what it refuses, too: a name twice, an adapter that is not there.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

Answer = tuple[int, Any]


class RolloutServer:
    """Both products at once; ``held``: {adapter: directory}, ``asked``: (path, body) of what was, in order."""

    def __init__(self, model: Path, *, fault: str = "") -> None:
        self.model, self.fault = model, fault
        self.held: dict[str, str] = {}
        self.order: list[str] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> RolloutServer:
        Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        self.asked.append((path, body))
        if path == "/v1/models":
            return 200, {"data": self.cards()}
        if path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
            return self.load(body["lora_name"], body["lora_path"], path)
        if path in ("/v1/unload_lora_adapter", "/unload_lora_adapter"):
            return self.unload(body["lora_name"], path)
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/generate":
            return self.generate(body)
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            self.model = Path(body["kwargs"]["weights_path"])
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": self.fault != "remembers"}
        return 404, {"detail": "Not Found"}

    def cards(self) -> list[dict[str, Any]]:
        hidden = self.order[-1:] if self.fault == "unlisted" else []
        return [{"id": "base", "root": str(self.model), "parent": None}] + [
            {
                "id": name,
                "root": "/elsewhere" if self.fault == "elsewhere" else path,
                "parent": "base",
            }
            for name, path in self.held.items()
            if name not in hidden
        ]

    def load(self, name: str, path: str, call: str) -> Answer:
        if name in self.held:
            return self.said(call, False, f"The lora adapter '{name}' has already been loaded.")
        if not Path(path, "adapter_config.json").is_file():
            return self.said(call, False, f"No adapter found for {path}")
        self.order.append(name)
        if self.fault != "never":
            self.held[name] = path
        return self.said(call, True, f"Success: LoRA adapter '{name}' added successfully.")

    def unload(self, name: str, call: str) -> Answer:
        if self.held.pop(name, None) is None:
            return self.said(call, False, f"The lora adapter '{name}' cannot be found.")
        return self.said(call, True, f"Success: LoRA adapter '{name}' removed successfully.")

    def said(self, call: str, good: bool, text: str) -> Answer:
        """As vLLM says it (a text, a status), or SGLang (an object, and 200 or 400)."""
        if call.startswith("/v1"):
            return (200, text) if good else (400, {"error": {"message": text}})
        return 200 if good else 400, {"success": good, "error_message": text}

    def complete(self, body: dict[str, Any]) -> Answer:
        name = body["model"]
        if name != "base" and name not in self.held:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        choices = [
            {
                "index": index,
                "token_ids": tokens,
                "logprobs": {"token_logprobs": values},
                "finish_reason": "length",
            }
            for index, (tokens, values) in enumerate(
                self.sample(body["prompt"], None if name == "base" else name, body["max_tokens"])
            )
        ]
        return 200, {"model": name, "choices": choices[::-1]}

    def generate(self, body: dict[str, Any]) -> Answer:
        name = body["lora_path"][0]
        steps = body["sampling_params"][0]["max_new_tokens"]
        return 200, [
            {
                "meta_info": {
                    "output_token_logprobs": [
                        [value, token, None] for value, token in zip(values, tokens, strict=True)
                    ],
                    "finish_reason": {"type": "length"},
                }
            }
            for tokens, values in self.sample(body["input_ids"], name, steps)
        ]

    def sample(
        self, prompts: list[list[int]], name: str | None, steps: int
    ) -> list[tuple[list[int], list[float]]]:
        """Greedy tokens and their log-probabilities, without a cache."""
        with self.lock, torch.no_grad():
            model = self.policy(name)
            answers = [greedy(model, prompt, steps) for prompt in prompts]
        if self.fault == "nan":
            answers[0][1][0] = float("nan")
        return answers[:-1] if self.fault == "cut" else answers

    def policy(self, name: str | None) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        if name is None or self.fault == "base":
            return model
        if self.fault == "stale":
            name = self.order[max(self.order.index(name) - 1, 0)]
        path = self.held[name]
        if self.fault == "twice":
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        return PeftModel.from_pretrained(model, path).eval()


def greedy(model: Any, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
    """(tokens, their log-probabilities) of a transformers model."""
    tokens, values = list[int](), list[float]()
    for _ in range(steps):
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].double()
        scores = torch.log_softmax(logits, -1)
        tokens.append(int(scores.argmax()))
        values.append(float(scores.max()))
    return tokens, values


def _handler(server: RolloutServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            self.reply(json.loads(self.rfile.read(size) or b"{}"))

        def reply(self, body: dict[str, Any]) -> None:
            status, value = server.answer(self.path, body)
            content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
