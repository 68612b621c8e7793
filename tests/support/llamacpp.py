"""llama.cpp itself (the xllamacpp wheel, an extra of the tests): what it makes of our GGUF files.

llama = LlamaCpp(file, lora=(lora_file,))
llama.log_probabilities([1, 403, 407])     # {token: log-probability} of the next token
llama.greedy("Once upon a time", 20)       # of text that it tokenises itself
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCORED = 4  # last tokens of a row: llama.cpp is asked about one prefix at a time


class LlamaCpp:
    """A model of llama.cpp on the CPU, keys and values in fp32."""

    def __init__(
        self, file: Path, *, lora: Sequence[Path] = (), scale: float = 1.0, context: int = 128
    ) -> None:
        x: Any = pytest.importorskip(
            "xllamacpp", reason="xllamacpp is not installed (make test-extras)"
        )
        params = x.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.warmup, params.fit_params = False, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
        # its flash attention on a CPU sums in F16: 5e-3 from plain attention in log-probabilities
        params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity = 0
        adapters = []
        for path in lora:
            adapter = x.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(path), scale
            adapters.append(adapter)
        params.lora_adapters = adapters
        self.server = x.Server(params)

    def log_probabilities(self, prompt: str | Sequence[int], most: int = 5000) -> dict[int, float]:
        """Of every token that may follow ``prompt``: ids, or text that it tokenises itself."""
        answer = self.server.handle_completions(
            {"prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": 1,
             "temperature": 0, "logprobs": most}
        )  # fmt: skip
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in top}

    def greedy(self, text: str, tokens: int) -> str:
        """The answer to ``text``."""
        answer = self.server.handle_completions(
            {"prompt": text, "max_tokens": tokens, "temperature": 0}
        )
        said: str = answer["choices"][0]["text"]
        return said

    def count_tokens(self, text: str) -> int:
        """How many tokens ``text`` is, with those that belong around it."""
        answer = self.server.handle_completions({"prompt": text, "max_tokens": 1})
        return int(answer["usage"]["prompt_tokens"])


def perplexity_ratio(llama: LlamaCpp, folder: Path) -> float:
    """llama.cpp's perplexity over transformers' on the weights in ``folder``, on 20 rows of which
    stories260K has read alike."""
    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = ("Lily", "Tom", "Ben", "Sue", "Mia")
    things = ("ball", "dog", "cake", "tree")
    texts = [f"{name} had a big {thing}. One day, {name}" for name in names for thing in things]
    rows = [words(text).input_ids for text in texts]
    assert len(rows) == 20
    exact, found = 0.0, 0.0
    for row in rows:
        with torch.no_grad():
            scores = model(torch.tensor([row])).logits[0].log_softmax(-1)
        for place in range(len(row) - SCORED, len(row)):
            exact -= float(scores[place - 1, row[place]])
            found -= llama.log_probabilities(row[:place], 512)[row[place]]
    return math.exp((found - exact) / (SCORED * len(rows)))
