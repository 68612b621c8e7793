"""The whole of LoRA fine-tuning in 150 plain lines, without Lorry: a text to learn from, and the oracle of Lorry's engine.

    python examples/flat.py MODEL_DIR DATA.jsonl OUT_DIR

MODEL_DIR is a Hugging Face directory; each line of DATA.jsonl is {"prompt", "completion"} or {"question", "answer"};
OUT_DIR becomes an adapter that PEFT (and `lorry chat`) can load. B rows, L tokens of the longest, V vocabulary.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D  # GPT-2's linear, whose weight is stored [in, out]


class Lora(nn.Module):
    """y = W x + b + s B (A x): the frozen layer plus a product of rank r (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear | Conv1D, r: int, scale: float, draw: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        outs, ins = base.weight.shape[::-1] if isinstance(base, Conv1D) else base.weight.shape
        # A is random and B zero: the product starts at zero (the model starts unchanged), yet B has a gradient at once.
        # With both at zero neither would ever move. Uniform in +-1/sqrt(in) keeps the size of A x near that of x.
        self.A = nn.Parameter((torch.rand(r, ins, generator=draw) * 2 - 1) / ins**0.5)
        self.B = nn.Parameter(torch.zeros(outs, r))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Two thin products instead of forming the [out, in] matrix B A: that is the whole saving.
        return self.base(x) + F.linear(F.linear(x, self.A), self.B) * self.scale


def encode(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[bool]]:
    """Tokens, and for each whether it is learnt: the answer and the end of the turn, never the prompt."""
    ask, answer = (row["prompt"], row["completion"]) if "prompt" in row else (row["question"], row["answer"])
    if chat := tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        # The prompt ends exactly where generation will start: behind the assistant's header.
        prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()  # the line break behind the turn is never said
        assert text.startswith(prompt), "this chat template rewrites earlier turns; flat.py is too plain for it"
    else:
        prompt = ask if "prompt" in row else f"Question: {ask}\nAnswer:"
        text = prompt + (answer if "prompt" in row else f" {answer.lstrip()}")
    # One tokenisation of the whole text, as the model will see it; offsets tell which characters a token came from.
    # A template has written its own special tokens; plain text gets the tokenizer's (a beginning of text, mostly).
    made = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
    ids, learnt = list(made["input_ids"]), [end > len(prompt) for _, end in made["offset_mapping"]]
    if text.rstrip().endswith(answer.rstrip()) and ids[-1] != tokenizer.eos_token_id:  # nothing ends the turn yet
        ids, learnt = [*ids, tokenizer.eos_token_id], [*learnt, True]
    learnt[-1] = True  # without the end of the turn the model would learn to speak but not to stop
    return ids, learnt


def collate(rows: list[tuple[list[int], list[bool]]], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask (1 = real token) and learnt, each [B, L], padded on the right, where a causal model never looks."""
    columns = [[torch.tensor(column) for column in row] for row in rows]
    ids, learnt = (pad_sequence(list(side), batch_first=True).to(device) for side in zip(*columns, strict=True))
    mask = pad_sequence([torch.ones_like(ids) for ids, _ in columns], batch_first=True).to(device)
    return ids, mask, learnt


def loss_sum(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, learnt: torch.Tensor) -> torch.Tensor:
    """Sum of -log p over the learnt tokens. The logits at a token speak of the next one, hence the shift by one."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]  # [B, L-1, V]
    return F.cross_entropy(logits[learnt[:, 1:]].float(), ids[:, 1:][learnt[:, 1:]], reduction="sum")


def rate(step: int, steps: int, warmup: int) -> float:
    """Linear: up from 0 over ``warmup`` updates (Adam's averages are still rough there), then down towards 0."""
    return step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def attach(model: PreTrainedModel, r: int, alpha: float, seed: int) -> dict[str, Lora]:
    """Freeze the model and put a Lora around every linear layer but the output head: {path: layer}."""
    model.requires_grad_(False)
    draw, head = torch.Generator().manual_seed(seed), model.get_output_embeddings()
    linears = {p: m for p, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    layers = {path: Lora(base, r, alpha / r, draw).to(base.weight.device) for path, base in linears.items()}
    for path, layer in layers.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return layers


def save(layers: dict[str, Lora], out: Path, model_dir: str | Path, r: int, alpha: float) -> None:
    """Two files, in PEFT's names."""
    out.mkdir(parents=True, exist_ok=True)
    sides = {f"base_model.model.{p}.lora_{s}.weight": getattr(m, s) for p, m in layers.items() for s in "AB"}
    save_file({k: v.detach().cpu().contiguous() for k, v in sides.items()}, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model_dir), "r": r, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "target_modules": sorted({p.rpartition(".")[2] for p in layers}),
        "fan_in_fan_out": any(isinstance(m.base, Conv1D) for m in layers.values()), "inference_mode": True,
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))


def train(
    model_dir: str | Path, rows: list[dict[str, str]], *, r: int = 16, alpha: float = 32.0, lr: float = 2e-4, steps: int = 100,
    batch: int = 4, accumulation: int = 1, warmup: int = 3, seed: int = 0, max_grad_norm: float = 1.0,
    init: dict[str, torch.Tensor] | None = None, out: str | Path | None = None,
) -> list[float]:  # fmt: skip
    """The loss of every step over ``rows``, taken in their order again and again. ``init``: {"PATH.lora_A": tensor} instead of
    the draw; ``out``: where to save the adapter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()  # eval: no dropout
    layers = attach(model, r, alpha, seed)
    for name, value in (init or {}).items():
        layers[name.removesuffix(".lora_A")].A.data.copy_(value)
    params = [p for layer in layers.values() for p in (layer.A, layer.B)]  # a percent of the model: Adam's state is small too
    adamw = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    examples, losses = [encode(tokenizer, row) for row in rows], []
    for step in range(steps):
        first = step * accumulation * batch  # the next accumulation * batch rows, cut into micro-batches that fit in memory
        picked = [examples[(first + i) % len(examples)] for i in range(accumulation * batch)]
        micro = [collate(picked[i : i + batch], device) for i in range(0, len(picked), batch)]
        # Divide every sum by the tokens of the whole step: a mean per micro-batch would let short answers weigh more,
        # and the result would change with the way rows are cut into micro-batches.
        tokens = sum(int(learnt[:, 1:].sum()) for _, _, learnt in micro)
        losses.append(0.0)
        for part in micro:
            loss = loss_sum(model, *part) / tokens
            loss.backward()  # gradients add up in .grad until the step
            losses[-1] += loss.item()
        if max_grad_norm:  # one odd batch must not throw the adapter far away
            nn.utils.clip_grad_norm_(params, max_grad_norm)
        adamw.param_groups[0]["lr"] = lr * rate(step, steps, warmup)
        adamw.step()
        adamw.zero_grad()
    if out is not None:
        save(layers, Path(out), model_dir, r, alpha)
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    lines = Path(sys.argv[2]).read_text(encoding="utf-8").split("\n")
    history = train(sys.argv[1], [json.loads(line) for line in lines if line.strip()], out=sys.argv[3])
    print(f"loss {history[0]:.4f} -> {history[-1]:.4f}; the adapter is in {sys.argv[3]}")
