"""transformers (and PEFT) alone, right-padded, with plain loops: the independent truth of suites."""

from __future__ import annotations

from pathlib import Path

import numpy
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class PaddedModel:
    """transformers alone, right-padded, float32 (an adapter by PEFT); every number in float64."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        self.words = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = (
            model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter))
        )
        self.model.eval()

    def prompt(self, question: str) -> list[int]:
        asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids: list[int] = self.words(asked).input_ids
        return ids

    def answers(self, pairs: list[tuple[str, str]]) -> list[dict[str, numpy.ndarray]]:
        """Per pair logp, hit, mean, variance of every token of the answer and its end."""
        prompts = [self.prompt(question) for question, _ in pairs]
        targets = [self.words(f"{answer}<|im_end|>").input_ids for _, answer in pairs]
        whole = [a + b for a, b in zip(prompts, targets, strict=True)]
        width = max(map(len, whole))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in whole])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole])
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=mask).logits.double()
        made = []
        for at, (before, right) in enumerate(zip(prompts, targets, strict=True)):
            rows = logits[at, len(before) - 1 : len(before) + len(right) - 1]
            logp = rows.log_softmax(-1)
            p, mean = logp.exp(), (logp.exp() * logp).sum(-1)
            made.append(
                {
                    "logp": logp[range(len(right)), right].numpy(),
                    "hit": (rows.argmax(-1) == torch.tensor(right)).numpy(),
                    "mean": mean.numpy(),
                    "variance": ((p * logp.square()).sum(-1) - mean.square()).numpy(),
                }
            )
        return made

    def say(self, question: str) -> str:
        prompt = torch.tensor([self.prompt(question)])
        with torch.no_grad():
            out = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=12,
                do_sample=False,
            )
        text: str = self.words.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        return text.strip()
