"""A mixture of LoRA experts against one adapter, and against PEFT's: forward and backward of one
step, speed and memory.

    make bench-experts                                # layers of SmolLM2-135M, all 30, three rounds
    python benchmarks/experts.py --layers 4 --rounds 2 --no-keep

K experts of one rank at the MLPs' linears, random and far from zero, over random weights of SmolLM2-
135M's shape; one sequence; float32, one thread; every engine in a fresh process, in turns. Nothing is
said of any unless Lorry's router has the gradient of `plain`, the same mixture by hooks on
transformers' model, within EXACT of its length, and every other engine's is finite and not zero.
PEFT's Arrow trains nothing: its gradient is that of the embeddings. Time is CPU time of a step, the
least of those timed: what else runs on the machine takes turns, and does not count. One JSON goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import turns

if TYPE_CHECKING:
    from torch import Tensor

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    "rope_theta": 100000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
MLP = ["gate_proj", "up_proj", "down_proj"]
EXACT = 1e-4  # of the router's gradient, float32 against float32
TARGET = 1.3  # times one adapter's step, at level delta
Made = tuple[Callable[[], Any], Callable[[], list[Any]]]  # a step's loss, and what has gradients


def prepare(folder: Path, case: Mapping[str, Any]) -> None:
    """base/ (float32), a PEFT folder for each expert, the router's values, the tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": case["layers"]}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "base")
    for k in range(case["experts"]):
        base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        config = LoraConfig(
            r=case["rank"], lora_alpha=2 * case["rank"], target_modules=MLP, init_lora_weights=False
        )
        get_peft_model(base, config).save_pretrained(folder / f"expert{k}")
    width = SHAPE["hidden_size"]
    router = {
        f"{layer}": torch.randn(case["experts"], width) / 10 for layer in range(case["layers"])
    }
    save_file(router, folder / "router.safetensors")
    tokens = torch.randint(0, SHAPE["vocab_size"], (case["tokens"],))
    save_file({"tokens": tokens}, folder / "tokens.safetensors")


def read_tokens(folder: Path) -> Tensor:
    """[T] int64."""
    from safetensors.torch import load_file

    return load_file(folder / "tokens.safetensors")["tokens"]


# --- engines


def lorry(routed: bool, train_experts: bool, level: str = "delta") -> Callable[..., Made]:
    """Lorry: the first expert alone, or all of them under a router."""

    def make(folder: Path, case: Mapping[str, Any]) -> Made:
        import torch
        from safetensors.torch import load_file

        from lorry.adapters.mix import AdapterContext, Mix
        from lorry.adapters.peft.files import load_adapter
        from lorry.adapters.router import RoutingRule, attach_router
        from lorry.models.causal_lm import PackedInput
        from lorry.models.loading.load import load_model
        from lorry.notes import ignore_note

        model = load_model(str(folder / "base"), dtype="float32", add_note=ignore_note).model
        names = [f"expert{k}" for k in range(case["experts"] if routed else 1)]
        adapters = [
            load_adapter(model, folder / name, name, trainable=train_experts) for name in names
        ]
        mix, trained = Mix.one(names[0]), [a for a in adapters if train_experts]
        if routed:
            rule = RoutingRule("mlp", case["top_k"], level=level)  # type: ignore[arg-type]
            router = attach_router(model, names, rule)
            values = load_file(folder / "router.safetensors")
            with torch.no_grad():
                for (layer, _), weight in router.weights.items():
                    weight.copy_(values[str(layer)])
            mix, trained = router.mix(), [router, *trained]
        packed, call = PackedInput.of([read_tokens(folder).tolist()]), AdapterContext(mix)

        def loss() -> Any:
            for one in trained:
                one.grads.zero_()
            logits = model.logits(model.hidden(packed, call).last, call)
            return torch.nn.functional.cross_entropy(logits[:-1], packed.tokens[1:])

        return loss, lambda: [trained[0].grads]

    return make


def plain(folder: Path, case: Mapping[str, Any]) -> Made:
    """transformers' model, each expert's term and the router by hooks and autograd."""
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional as F

    model = _theirs(folder)
    for p in model.parameters():
        p.requires_grad_(False)
    experts = [
        load_file(folder / f"expert{k}" / "adapter_model.safetensors")
        for k in range(case["experts"])
    ]
    values = load_file(folder / "router.safetensors")
    weights = [values[str(i)].requires_grad_() for i in range(case["layers"])]
    gates: dict[int, Tensor] = {}

    def route(i: int, normed: Tensor) -> None:
        p = F.linear(normed, weights[i]).softmax(-1)
        kept, chosen = p.topk(case["top_k"], -1)
        kept = kept / kept.sum(-1, keepdim=True)
        gates[i] = torch.zeros_like(p).scatter(-1, chosen, kept)

    def add(i: int, path: str, x: Tensor, y: Tensor) -> Tensor:
        for k, own in enumerate(experts):
            a, b = (own[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
            y = y + gates[i][..., k, None] * 2.0 * (x @ a.t() @ b.t())
        return y

    for i, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_hook(lambda m, x, y, i=i: route(i, y))
        for name in MLP:
            path = f"model.layers.{i}.mlp.{name}"
            getattr(layer.mlp, name).register_forward_hook(
                lambda m, x, y, i=i, path=path: add(i, path, x[0], y)
            )
    loss = _their_loss(model, folder)

    def fresh() -> Any:
        for w in weights:
            w.grad = None
        return loss()

    return fresh, lambda: [w.grad for w in weights]


def _theirs(folder: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


def _their_loss(model: Any, folder: Path) -> Callable[[], Any]:
    ids = read_tokens(folder)[None]

    def loss() -> Any:
        for p in model.parameters():
            p.grad = None
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return loss


def peft_one(folder: Path, case: Mapping[str, Any]) -> Made:
    """PEFT, one adapter that trains."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(_theirs(folder), str(folder / "expert0"), is_trainable=True)
    return _trained(model, folder)


def peft_arrow(folder: Path, case: Mapping[str, Any]) -> Made:
    """PEFT's Arrow over the experts; the embeddings train, so that a backward goes through all."""
    from peft import ArrowConfig, create_arrow_model

    folders = [str(folder / f"expert{k}") for k in range(case["experts"])]
    model = create_arrow_model(_theirs(folder), folders, ArrowConfig(top_k=case["top_k"]))
    for p in model.parameters():
        p.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    return _trained(model, folder)


def peft_xlora(folder: Path, case: Mapping[str, Any]) -> Made:
    """PEFT's X-LoRA: a classifier over another pass of the base, for every layer its own gates."""
    from peft import XLoraConfig, get_peft_model

    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=SHAPE["hidden_size"], layerwise_scalings=True,
        adapters={f"expert{k}": str(folder / f"expert{k}") for k in range(case["experts"])},
    )  # fmt: skip
    base = _theirs(folder)
    base.config.use_cache = False
    return _trained(get_peft_model(base, config), folder)


def _trained(model: Any, folder: Path) -> Made:
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    return _their_loss(model, folder), lambda: [p.grad for p in params if p.grad is not None]


ENGINES: dict[str, tuple[str, Callable[..., Made]]] = {
    "lorry-one": ("Lorry, one adapter", lorry(False, True)),
    "lorry-delta": ("Lorry, token router over frozen experts, level delta", lorry(True, False)),
    "lorry-delta-all": ("Lorry, token router, experts train too", lorry(True, True)),
    "lorry-expert": ("Lorry, frozen experts, level expert", lorry(True, False, "expert")),
    "plain": ("transformers, the same mixture by hooks", plain),
    "peft-one": ("PEFT, one adapter", peft_one),
    "peft-arrow": ("PEFT, Arrow", peft_arrow),
    "peft-xlora": ("PEFT, X-LoRA", peft_xlora),
}  # fmt: skip


# --- a process, and what comes of all of them


def work(engine: str, folder: Path) -> dict[str, Any]:
    """One engine in this process: seconds of CPU time a step, memory above the imports, gradient."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from safetensors.torch import save_file

    import lorry  # noqa: F401

    case = json.loads((folder / "case.json").read_text())
    torch.set_num_threads(1)
    imports = measure.rss()
    loss_of, grads_of = ENGINES[engine][1](folder, case)
    seconds, losses = list[float](), list[float]()
    for _ in range(case["warmup"] + case["steps"]):
        began = time.process_time()
        loss = loss_of()
        loss.backward()
        seconds.append(time.process_time() - began)
        losses.append(float(loss.detach()))
    peak = measure.peak_rss()
    gradient = torch.cat([g.flatten() for g in grads_of()])
    save_file({"gradient": gradient.contiguous()}, folder / f"{engine}.safetensors")
    return {
        "losses": losses,
        "seconds": seconds[case["warmup"] :],
        "memory_bytes": peak - imports,
        "gradient_norm": float(gradient.norm()),
    }


def refused(folder: Path, engine: str, runs: list[dict[str, Any]]) -> str | None:
    """Why nothing may be said of an engine, or None."""
    from safetensors.torch import load_file

    norms = [run["gradient_norm"] for run in runs]
    if not all(math.isfinite(n) and n > 0 for n in norms):
        return f"its gradient is {norms[0]}"
    if engine not in ("lorry-delta", "lorry-delta-all"):
        return None
    mine, right = (
        load_file(folder / f"{name}.safetensors")["gradient"].double() for name in (engine, "plain")
    )
    off = float((mine - right).norm() / right.norm())
    return None if off < EXACT else f"the router's gradient is {off:.1e} off"


def contest(folder: Path, case: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Engines in turns; then the gates; then the record."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    loads = list[float]()
    for number in range(rounds):
        for name in ENGINES:
            print(f"  round {number + 1}: {name}", file=sys.stderr, flush=True)
            loads.append(os.getloadavg()[0])
            done = subprocess.run(
                [sys.executable, __file__, name, str(folder)], stdout=subprocess.PIPE, check=True
            )
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    reasons = {name: why for name in ENGINES if (why := refused(folder, name, runs[name]))}
    least = {name: min(s for run in runs[name] for s in run["seconds"]) for name in ENGINES}
    memory = {
        name: statistics.median(run["memory_bytes"] for run in runs[name]) for name in ENGINES
    }
    told = [name for name in ENGINES if name not in reasons]
    rows = [
        [
            ENGINES[name][0],
            f"{least[name]:.2f}",
            f"{least[name] / least['lorry-one']:.2f}x",
            f"{memory[name] / 2**20:.0f}",
            f"{memory[name] / memory['lorry-one']:.2f}x",
        ]
        for name in told
    ]
    goals = [
        {
            "engine": name, "at_most": TARGET, "measured": least[name] / least["lorry-one"],
            "met": least[name] / least["lorry-one"] <= TARGET,
        }
        for name in ("lorry-delta", "lorry-delta-all") if name in told
    ]  # fmt: skip
    text = [
        f"K={case['experts']} experts of rank {case['rank']} at the MLPs, top_k={case['top_k']}, "
        f"{case['tokens']} tokens, {case['layers']} layers of SmolLM2-135M's shape with its head, float32, one "
        "thread: forward and backward of a step, least CPU time, and memory above the imports "
        "(`benchmarks/experts.py`). The router's gradient is that of plain autograd."
    ]
    machine, highest = measure.machine(), max(loads)
    clean = highest <= machine["cores"]
    if not clean:
        text.append(
            f"**Not clean**: the load went up to {highest:.1f} on {machine['cores']} cores while "
            "this was measured; times are not those of a quiet machine."
        )
    text += [f"Refused: {ENGINES[name][0]}: {why}." for name, why in reasons.items()]
    return {
        "title": "A mixture of LoRA experts",
        "text": "\n".join(text),
        "columns": ["engine", "s/step", "to one adapter", "memory MiB", "to one adapter"],
        "rows": rows,
        "case": dict(case),
        "rounds": rounds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/experts.py", *sys.argv[1:]]),
        "machine": machine,
        "highest_load": highest,
        "clean": clean,
        "targets": goals,
        "refused": reasons,
        "runs": runs,
    }


def arguments() -> argparse.Namespace:
    """What can be chosen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("experts", 4), ("rank", 16), ("top-k", 2), ("tokens", 1024), ("layers", 30),
        ("steps", 3), ("warmup", 1), ("rounds", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    case = {k: v for k, v in vars(args).items() if k not in ("rounds", "no_keep")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "case.json").write_text(json.dumps(case))
        turns.elsewhere(prepare, folder, case)
        record = contest(folder, case, args.rounds)
    print(f"{record['title']}: {record['text']}")
    for row in record["rows"]:
        print(f"  {row[0]:55s} " + "  ".join(f"{cell:>8s}" for cell in row[1:]))
    for goal in record["targets"]:
        print(
            f"  {goal['engine']}: {goal['measured']:.2f} times one adapter "
            f"(<= {goal['at_most']}: {'met' if goal['met'] else 'NOT MET'})"
        )
    if not args.no_keep:
        name = f"experts-cpu-K{args.experts}-r{args.rank}-L{args.layers}-t1"
        print(f"  kept in {turns.keep(record, name)}")
    return int(bool(record["refused"]))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ENGINES:
        print(json.dumps(work(sys.argv[1], Path(sys.argv[2]))))
    else:
        sys.exit(main())
