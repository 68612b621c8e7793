"""LoRA fine-tuning speed and memory, side by side: Lorry, PEFT at its default, PEFT with bf16 adapters.

    make bench                      # or: .venv/bin/python benchmarks/sft.py --steps 6 --rounds 2 --length 1024

Each engine runs in a fresh process on the same packed token file, the same adapter initialisation, the same AdamW and clipping;
engines take turns A B C A B C. No speed is printed unless each engine's first loss is within 1% of, and its whole first gradient
has a cosine above 0.999 with, those of PEFT in float32 throughout, and no adapter tensor's gradient is zero. Shown: the median
step after warm-up, and the peak resident set minus the resident set after imports. JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

ENGINES = ("lorry", "peft", "peft-bf16-adapters")
REFERENCE = "peft-float32"
MODEL = "smollm2-135m-instruct"
RANK, ALPHA, RATE = 16, 32, 1e-4
WARMUP = 2


def rss() -> int:
    """Peak resident set so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def current_rss() -> int:
    """Resident set now, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def work(engine: str, folder: Path, steps: int) -> dict[str, Any]:
    """One engine in this process: seconds per step, losses, peak memory; its first gradient goes to a file."""
    import torch
    from safetensors.torch import load_file, save_file

    make = lorry_step if engine == "lorry" else peft_step
    tokens = load_file(folder / "data.safetensors")["tokens"]
    imports = current_rss()
    step = make(engine, folder)
    seconds, losses = [], []
    for i in range(steps + WARMUP):
        began = time.perf_counter()
        loss, gradients = step(tokens[i % len(tokens)])
        seconds.append(time.perf_counter() - began)
        losses.append(loss)
        if i == 0:
            save_file({n: g.float().contiguous() for n, g in gradients.items()}, folder / f"{engine}.safetensors")
    return {
        "seconds": seconds[WARMUP:], "losses": losses, "memory": rss() - imports,
        "tokens": tokens.shape[1], "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip


def lorry_step(engine: str, folder: Path) -> Any:
    """Lorry's own path: the local backend and the SFT loss."""
    import torch

    from lorry.backends.local import Local
    from lorry.backends.optim import OptimSettings
    from lorry.bank.peft_io import load_adapter
    from lorry.data.batch import Example, collate
    from lorry.models.load import load_model
    from lorry.tasks.sft import Sft
    from lorry.train.memory import tune_allocator

    tune_allocator()
    model = load_model(folder / "base", dtype="bfloat16", notes=[]).model
    adapter = load_adapter(model, folder / "init", "default")
    local, task = Local(model, ["default"], OptimSettings()), Sft(Mock(), [], 0, ["default"])

    def step(tokens: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        task.stream.batches = lambda step: [collate([Example(tokens.tolist(), [0.0] + [1.0] * (len(tokens) - 1))])]
        stats = local.forward_backward(task.step_batches(0, {}), task, 0)
        gradients = {n: g.clone() for n, g in adapter.split_like(adapter.grads).items()}
        local.step({"default": RATE})
        return stats.loss["default"], gradients

    return step


def peft_step(engine: str, folder: Path) -> Any:
    """PEFT with a plain loop; the default keeps fp32 adapters, `bf16-adapters` switches that off."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if engine == REFERENCE else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model = PeftModel.from_pretrained(base, folder / "init", is_trainable=True, autocast_adapter_dtype="bf16" not in engine)
    model.config.use_cache = False
    model.train()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=RATE, weight_decay=0.0, fused=True)

    def step(tokens: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        out = model(input_ids=tokens[None], labels=tokens[None])
        out.loss.backward()
        gradients = {clean(n): p.grad.clone() for n, p in params.items()}
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return out.loss.item(), gradients

    return step


def clean(name: str) -> str:
    """PEFT's parameter name in Lorry's words."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


def prepare(folder: Path, length: int, rows: int) -> None:
    """Write the packed tokens, the base directory and one adapter initialisation, B not zero so that every gradient is not."""
    import torch
    from safetensors.torch import save_file

    from lorry.bank.attach import attach
    from lorry.bank.peft_io import save_adapter
    from lorry.bank.spec import LoraSpec
    from lorry.data.people import general_text
    from lorry.models.load import load_model
    from lorry.models.store import save_model

    loaded = load_model(MODEL, dtype="bfloat16", notes=[])
    save_model(loaded.model, folder / "base", tokenizer=loaded.tokenizer)
    ids = loaded.tokenizer("\n\n".join(general_text())).input_ids
    ids = (ids * (1 + rows * length // len(ids)))[: rows * length]
    save_file({"tokens": torch.tensor(ids).view(rows, length)}, folder / "data.safetensors")
    attach(loaded.model, LoraSpec(r=RANK, lora_alpha=ALPHA, init_lora_weights=False))
    save_adapter(loaded.model, folder / "init")


def cosine(folder: Path, engine: str) -> float:
    """Cosine between an engine's whole first gradient and the float32 reference's; 0 if any tensor's gradient vanishes."""
    import torch
    from safetensors.torch import load_file

    truth, theirs = load_file(folder / f"{REFERENCE}.safetensors"), load_file(folder / f"{engine}.safetensors")
    if set(truth) != set(theirs):
        raise SystemExit(f"{engine} and the reference disagree about the tensors: {sorted(set(truth) ^ set(theirs))[:3]}")
    if not all(t.any() for t in (*truth.values(), *theirs.values())):
        return 0.0
    a, b = (torch.cat([t[n].flatten().double() for n in sorted(truth)]) for t in (truth, theirs))
    return float(torch.nn.functional.cosine_similarity(a, b, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker[0], Path(args.worker[1]), args.steps)))
        return
    with tempfile.TemporaryDirectory() as name:
        report(Path(name), args)


def report(folder: Path, args: argparse.Namespace) -> None:
    """Run every engine in turn, check the gates, print ratios, keep the JSON."""
    prepare(folder, args.length, args.steps + WARMUP)
    runs: dict[str, list[dict[str, Any]]] = {e: [] for e in (*ENGINES, REFERENCE)}
    turns = [(REFERENCE, 1), *((engine, args.steps) for _ in range(args.rounds) for engine in ENGINES)]
    for engine, steps in turns:
        command = [sys.executable, __file__, "--worker", engine, str(folder), "--steps", str(steps)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs[engine].append(json.loads(out.splitlines()[-1]))
    truth, table = runs[REFERENCE][0]["losses"][0], {}
    for engine in ENGINES:
        gate, gap = cosine(folder, engine), abs(runs[engine][0]["losses"][0] - truth) / truth
        if gate < 0.999 or gap > 0.01:
            raise SystemExit(
                f"{engine}: gradient cosine {gate:.5f}, first loss off by {gap:.2%}: another computation, no speed shown"
            )
        seconds = statistics.median(s for r in runs[engine] for s in r["seconds"])
        table[engine] = {
            "tokens_per_second": args.length / seconds,
            "memory_bytes": statistics.median(r["memory"] for r in runs[engine]),
            "gradient_cosine": gate,
            "loss_gap": gap,
        }
    for engine, row in table.items():
        speed = table["lorry"]["tokens_per_second"] / row["tokens_per_second"]
        memory = table["lorry"]["memory_bytes"] / row["memory_bytes"]
        print(
            f"{engine:20s} {row['tokens_per_second']:7.0f} tok/s  {row['memory_bytes'] / 2**30:5.2f} GiB   "
            f"lorry is {speed:.2f}x as fast in {memory:.2f}x the memory   cosine {row['gradient_cosine']:.5f}"
        )
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    record = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "length": args.length,
    }
    (results / f"sft-cpu-{args.length}.json").write_text(json.dumps({**record, "table": table, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
