"""The engines of generate.py: Lorry, and transformers' generate in several settings; what they
answer; one of them at work.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure

MODEL = "smollm2-135m-instruct"
RANK, ALPHA, ADAPTERS = 16, 32, 4
FIXED, ANSWERS = 64, 96  # new tokens per prompt: exactly, at most
Tokens = list[list[int]]
# (prompts, new tokens, what ends an answer) -> new tokens per prompt
Generate = Callable[[Tokens, int, frozenset[int]], Tokens]


@dataclass(frozen=True)
class Engine:
    """``adapter``: none, one (as it is), merged into the weights, or several, of which each row has
    its own. ``batch``, ``by_length`` and ``static`` are settings of transformers."""

    library: str
    adapter: str = "none"
    batch: int = 64
    by_length: bool = False
    static: bool = False
    dtype: str = "bfloat16"

    @property
    def says(self) -> str:
        """For the table."""
        with_adapter = {
            "none": "",
            "one": ", adapter",
            "merged": ", adapter merged",
            "several": f", {ADAPTERS} adapters, one per row",
        }
        order = ", sorted by length" if self.by_length else ""
        setting = (
            f", batches of {self.batch}{order}{', static cache' if self.static else ''}"
            if self.library != "lorry"
            else ""
        )
        return f"{self.library}{with_adapter[self.adapter]}{setting}"


def prepare(folder: Path) -> None:
    """Write base/ (bf16), adapters, and prompts.json: everyday questions, and one, two or four
    paragraphs to sum up.
    """
    import torch

    from lorry.adapters.attach import attach, detach, get_bank
    from lorry.adapters.peft.files import save_adapter
    from lorry.adapters.spec import LoraSpec
    from lorry.demo.people import general_chat, general_text
    from lorry.models.loading.load import load_model
    from lorry.models.loading.store import save_model
    from lorry.notes import ignore_note

    loaded = load_model(MODEL, dtype="bfloat16", add_note=ignore_note)
    save_model(loaded.model, folder / "base", tokenizer=loaded.tokenizer)
    for i in range(ADAPTERS):
        attach(
            loaded.model,
            LoraSpec(r=RANK, lora_alpha=ALPHA, init_lora_weights=False),
            f"a{i}",
            seed=i,
        )
        with torch.no_grad():
            # a random adapter this small leaves the text a text
            get_bank(loaded.model)[f"a{i}"].values.mul_(0.5)
        save_adapter(loaded.model, folder / f"a{i}", f"a{i}")
        detach(loaded.model, f"a{i}")
    paragraphs, asked = general_text() * 2, [str(row["question"]) for row in general_chat()[:32]]
    for count, rows in ((1, 16), (2, 8), (4, 8)):
        for _ in range(rows):
            asked.append("Summarize this in a few sentences:\n\n" + "\n\n".join(paragraphs[:count]))
            paragraphs = paragraphs[count:]
    random.Random(0).shuffle(asked)
    tokenizer: Any = loaded.tokenizer
    talks = [[{"role": "user", "content": text}] for text in asked]
    ids = [
        tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False)
        for t in talks
    ]
    end = [tokenizer.eos_token_id]
    (folder / "prompts.json").write_text(
        json.dumps({"ids": [list(map(int, row)) for row in ids], "eos": end})
    )


def lorry(engine: Engine, folder: Path) -> Generate:
    """Ours; one setting fits all."""
    from lorry.adapters.mix import Mix
    from lorry.adapters.peft.files import load_adapter
    from lorry.generation.engine import generate_completions
    from lorry.generation.sampling import SamplingParams
    from lorry.models.loading.load import load_model
    from lorry.notes import ignore_note

    model = load_model(folder / "base", dtype=engine.dtype, add_note=ignore_note).model
    count = {"none": 0, "one": 1, "several": ADAPTERS}[engine.adapter]
    for i in range(count):
        load_adapter(model, folder / f"a{i}", f"a{i}")

    def run(prompts: Tokens, new: int, eos: frozenset[int]) -> Tokens:
        owners = (
            [f"a{i % count}" for i in range(len(prompts))]
            if count > 1
            else "a0"
            if count
            else Mix.none()
        )
        return [
            g.tokens
            for g in generate_completions(
                model,
                prompts,
                SamplingParams(max_new_tokens=new, stop_token_ids=eos),
                adapters=owners,
            )
        ]

    return run


def transformers(engine: Engine, folder: Path) -> Generate:
    """transformers' generate, with PEFT where there is an adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=getattr(torch, engine.dtype)
    ).eval()
    if engine.adapter != "none":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "a0", autocast_adapter_dtype=False).eval()
        if engine.adapter == "merged":
            model = model.merge_and_unload()

    def batch(prompts: Tokens, new: int, eos: frozenset[int]) -> Tokens:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        kind = {"cache_implementation": "static"} if engine.static else {}
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=sorted(eos) or None,
            pad_token_id=0,
            disable_compile=True,
            **kind,
        )
        return [until(row, eos) for row in made[:, longest:].tolist()]

    def run(prompts: Tokens, new: int, eos: frozenset[int]) -> Tokens:
        order = (
            sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            if engine.by_length
            else list(range(len(prompts)))
        )
        out: dict[int, list[int]] = {}
        for at in range(0, len(order), engine.batch):
            chosen = order[at : at + engine.batch]
            out |= dict(zip(chosen, batch([prompts[i] for i in chosen], new, eos), strict=True))
        return [out[i] for i in range(len(prompts))]

    return run


def until(row: list[int], eos: frozenset[int]) -> list[int]:
    """A row up to the token that ended it, which counts; what follows is padding."""
    end = next((i for i, token in enumerate(row) if token in eos), len(row) - 1)
    return row[: end + 1]


def work(engine: Engine, folder: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """One engine in this process: tokens, wall and CPU seconds per task, peak memory above the
    imports.
    """
    import torch

    importlib.import_module("transformers")  # by both, so that neither is charged for it
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    held = json.loads((folder / "prompts.json").read_text())
    prompts, eos = held["ids"], frozenset(held["eos"])
    imports = measure.rss()
    run = (lorry if engine.library == "lorry" else transformers)(engine, folder)
    run(prompts[:4], 2, frozenset())
    shapes = {
        "prefill": (prompts, 1, frozenset()),
        "fixed": (prompts, FIXED, frozenset()),
        "answers": (prompts, ANSWERS, eos),
    }
    shapes |= {"gate": (prompts[::2], FIXED, frozenset())}
    out: dict[str, Any] = {
        "engine": asdict(engine),
        "says": engine.says,
        "threads": torch.get_num_threads(),
        "tasks": {},
    }
    for task in tasks:
        wall, cpu = time.perf_counter(), time.process_time()
        made = run(*shapes[task])
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        out["tasks"][task] = {**seconds, "new_tokens": sum(map(len, made)), "made": made}
    return {**out, "memory_bytes": measure.peak_rss() - imports, "load": os.getloadavg()[0]}
