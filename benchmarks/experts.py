"""A mixture of LoRA experts against one adapter, and against PEFT's: a step's forward and backward,
generation, and memory.

    make bench-experts                       # SmolLM2-135M's shape, all 30 layers, three rounds
    python benchmarks/experts.py --layers 2 --tokens 64 --steps 1 --rounds 1 --no-keep

K experts of one rank at the MLPs' linears, random and not zero, over random weights of SmolLM2-
135M's shape (of fewer layers: and as much smaller a vocabulary, so that the head's share of a step
stays); one sequence; float32, one thread; every engine in a fresh process, in turns. Nothing is said
of any whose gradient is not finite or zero, nor of two that compute the same (`SAME`) unless their
gradients agree within EXACT of their length and their answers token by token: Lorry's router at
either level and `plain`, autograd's on transformers' model; Arrow and one adapter, Lorry's and PEFT's.
Times are CPU time, the least of those timed: what else runs on the machine takes turns, and does
not count. What an opened mixture holds beyond its base is counted tensor by tensor. One JSON goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import records
import turns

if TYPE_CHECKING:
    from torch import Tensor

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    "rope_theta": 100000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
MLP = ["gate_proj", "up_proj", "down_proj"]
# Of the experts' random lora_B: with PEFT's own size thirty layers are chaotic, and two float32 ways to
# compute the same gradient, or PEFT's Arrow twice, are 10% apart.
B_SCALE = 0.05
PROMPT = 64  # tokens that are answered
EXACT = 1e-4  # of the gradient, float32 against float32
STEP_TARGET, ANSWER_TARGET = 1.3, 1.3  # times one adapter's, at level delta
HELD_TARGET = (
    1.05  # times the experts' own bytes, of what an opened mixture holds beside the router
)
# who computes the same: the gradients that both have, and the answers
SAME = {
    "lorry-one": "peft-one",
    "lorry-delta": "plain",
    "lorry-delta-all": "plain",
    "lorry-expert": "plain-expert",
    "lorry-arrow": "peft-arrow",
}


@dataclass(frozen=True)
class Made:
    """``loss``: of a step, a scalar with a graph, gradients cleared before; ``gradients``, after its
    backward, by name: `router/LAYER` or `EXPERT/MODULE.lora_A`; ``answer``: greedy, (prompt, how many
    tokens) -> those tokens."""

    loss: Callable[[], Any]
    gradients: Callable[[], dict[str, Tensor]]
    answer: Callable[[Sequence[int], int], list[int]]


def shape_of(layers: int) -> dict[str, Any]:
    """SmolLM2-135M's, of fewer layers."""
    vocabulary = SHAPE["vocab_size"] * layers // SHAPE["num_hidden_layers"]
    return {**SHAPE, "num_hidden_layers": layers, "vocab_size": vocabulary}


def prepare(folder: Path, case: Mapping[str, Any]) -> None:
    """base/ (float32), a PEFT folder for each expert, the router's values, the tokens, and mixture/,
    all of it as `lorry moe` writes it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorry.adapters.peft.files import save_adapter
    from lorry.adapters.routing.files import router_files

    torch.manual_seed(0)
    shape = shape_of(case["layers"])
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "base")
    for k in range(case["experts"]):
        base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        config = LoraConfig(
            r=case["rank"], lora_alpha=2 * case["rank"], target_modules=MLP, init_lora_weights=False
        )
        wrapped = get_peft_model(base, config)
        with torch.no_grad():
            for name, param in wrapped.named_parameters():
                # a first singular vector that PEFT's 15 power steps find as exactly as ours does
                if ".lora_A." in name:
                    param[0] *= 4
                elif ".lora_B." in name:
                    param[:, 0] *= 4
                    param *= B_SCALE
        wrapped.save_pretrained(folder / f"expert{k}")
    width = SHAPE["hidden_size"]
    router = {
        f"router/{layer}": torch.randn(case["experts"], width) / 10
        for layer in range(case["layers"])
    }
    save_file(router, folder / "router.safetensors")
    tokens = torch.randint(0, shape["vocab_size"], (case["tokens"],))
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    model, names, _ = _with_experts(folder, case, case["experts"], trainable=False)
    _token_router(model, names, folder, case)
    mixture = folder / "mixture"
    for name in names:
        save_adapter(model, mixture / name, name, base_name=str(folder / "base"))
    (mixture / "router").mkdir()
    for name, content in router_files(model, {name: mixture / name for name in names}).items():
        (mixture / "router" / name).write_bytes(content)


def read_tokens(folder: Path) -> Tensor:
    """[T] int64."""
    from safetensors.torch import load_file

    return load_file(folder / "tokens.safetensors")["tokens"]


# --- engines


def _with_experts(
    folder: Path, case: Mapping[str, Any], count: int, *, trainable: bool
) -> tuple[Any, list[str], list[Any]]:
    """Lorry's model, and the first ``count`` experts by name and as they are."""
    from lorry.adapters.peft.files import load_adapter
    from lorry.models.loading.load import load_model
    from lorry.notes import ignore_note

    model = load_model(str(folder / "base"), dtype="float32", add_note=ignore_note).model
    names = [f"expert{k}" for k in range(count)]
    adapters = [load_adapter(model, folder / name, name, trainable=trainable) for name in names]
    return model, names, adapters


def _token_router(
    model: Any, names: Sequence[str], folder: Path, case: Mapping[str, Any], level: Any = "delta"
) -> Any:
    import torch
    from safetensors.torch import load_file

    from lorry.adapters.router import RoutingRule, attach_router

    router = attach_router(model, names, RoutingRule("mlp", case["top_k"], level=level))
    values = load_file(folder / "router.safetensors")
    with torch.no_grad():
        for (layer, _), weight in router.weights.items():
            weight.copy_(values[f"router/{layer}"])
    return router


def lorry(router: str | None, train_experts: bool) -> Callable[..., Made]:
    """Lorry: the first expert alone (None), or all of them under a router: a `TokenRouter` of level
    delta or expert, or arrow."""

    def make(folder: Path, case: Mapping[str, Any]) -> Made:
        import torch

        from lorry.adapters.attach import get_bank
        from lorry.adapters.mix import AdapterContext, Mix
        from lorry.adapters.routing.linear_router import attach_spectral_router
        from lorry.adapters.routing.stacking import stack_masters
        from lorry.models.causal_lm import PackedInput

        count = case["experts"] if router else 1
        model, names, adapters = _with_experts(folder, case, count, trainable=train_experts)
        owners = dict(zip(names, adapters, strict=True)) if train_experts else {}
        mix = Mix.one(names[0])
        if router == "arrow":
            mix = attach_spectral_router(
                model, "arrow", names, top_k=case["top_k"], temperature=1.0
            ).mix()
        elif router is not None:
            owners["router"] = _token_router(model, names, folder, case, router)
            mix = owners["router"].mix()
        stack_masters(model, mix)  # where they are frozen, as a mixture's run and its directory do
        packed, call = PackedInput.of([read_tokens(folder).tolist()]), AdapterContext(mix)

        def loss() -> Any:
            for owner in owners.values():
                owner.grads.zero_()
            logits = model.logits(model.hidden(packed, call).last, call)
            return torch.nn.functional.cross_entropy(logits[:-1], packed.tokens[1:])

        def gradients() -> dict[str, Tensor]:
            found = {
                f"{name}/{tensor}": grad
                for name, owner in owners.items()
                for tensor, grad in owner.split_like(owner.grads).items()
            }
            # `layers.N.mlp.weight` of a router: its layer's number is enough here
            return {
                f"router/{name.split('.')[1]}" if name.startswith("router/") else name: grad
                for name, grad in found.items()
            }

        get_bank(model).activate(mix)
        return Made(loss, gradients, lambda prompt, new: answer_of(model, prompt, new))

    return make


def answer_of(model: Any, prompt: Sequence[int], new: int) -> list[int]:
    """Lorry's greedy answer under the active mix."""
    from lorry.generation.engine import generate_completions
    from lorry.generation.sampling import SamplingParams

    (made,) = generate_completions(model, [list(prompt)], SamplingParams(max_new_tokens=new))
    return list(made.tokens)


def plain(level: str) -> Callable[..., Made]:
    """transformers' model, each expert's term and the router by hooks and autograd."""

    def make(folder: Path, case: Mapping[str, Any]) -> Made:
        from safetensors.torch import load_file
        from torch.nn import functional as F

        model = _theirs(folder)
        experts = [
            load_file(folder / f"expert{k}" / "adapter_model.safetensors")
            for k in range(case["experts"])
        ]
        weights = load_file(folder / "router.safetensors")
        gates: dict[int, Tensor] = {}

        def route(i: int, normed: Tensor) -> None:
            p = F.linear(normed, weights[f"router/{i}"].requires_grad_()).softmax(-1)
            kept, chosen = p.topk(case["top_k"], -1)
            kept = kept / kept.sum(-1, keepdim=True)
            gates[i] = p.new_zeros(p.shape).scatter(-1, chosen, kept)

        def term(k: int, path: str, x: Tensor) -> Tensor:
            a, b = (
                experts[k][f"base_model.model.{path}.lora_{side}.weight"] for side in ("A", "B")
            )
            return 2.0 * (x @ a.t() @ b.t())  # alpha = 2 r

        def add(i: int, path: str, x: Tensor, y: Tensor) -> Tensor:
            for k in range(len(experts)):
                y = y + gates[i][..., k, None] * term(k, path, x)
            return y

        def whole(i: int, mlp: Any, x: Tensor) -> Tensor:
            total = 0
            for k in range(len(experts)):
                at = f"model.layers.{i}.mlp"
                gate, up = (
                    F.linear(x, getattr(mlp, name).weight) + term(k, f"{at}.{name}", x)
                    for name in ("gate_proj", "up_proj")
                )
                h = F.silu(gate) * up
                y = F.linear(h, mlp.down_proj.weight) + term(k, f"{at}.down_proj", h)
                total = total + gates[i][..., k, None] * y
            return total

        for i, layer in enumerate(model.model.layers):
            layer.post_attention_layernorm.register_forward_hook(lambda m, x, y, i=i: route(i, y))
            if level == "expert":
                layer.mlp.forward = lambda x, i=i, mlp=layer.mlp: whole(i, mlp, x)
                continue
            for name in MLP:
                path = f"model.layers.{i}.mlp.{name}"
                getattr(layer.mlp, name).register_forward_hook(
                    lambda m, x, y, i=i, path=path: add(i, path, x[0], y)
                )
        return _with_gradients(model, folder, weights)

    return make


def _theirs(folder: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    for p in model.parameters():
        p.requires_grad_(False)
    return model


def _with_gradients(model: Any, folder: Path, trained: Mapping[str, Tensor]) -> Made:
    """Their model's step and answer, of parameters by the names that ours have."""
    import torch

    ids = read_tokens(folder)[None]

    def loss() -> Any:
        for p in trained.values():
            p.grad = None
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def answer(prompt: Sequence[int], new: int) -> list[int]:
        model.eval()
        given = torch.tensor([list(prompt)])
        with torch.no_grad():
            made = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=new,
                min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return made[0, len(prompt) :].tolist()

    found = lambda: {n: p.grad for n, p in trained.items() if p.grad is not None}  # noqa: E731
    return Made(loss, found, answer)


def peft_one(folder: Path, case: Mapping[str, Any]) -> Made:
    """PEFT, one adapter that trains."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        _theirs(folder), str(folder / "expert0"), "expert0", is_trainable=True
    )
    return _trained(model, folder)


def peft_arrow(folder: Path, case: Mapping[str, Any]) -> Made:
    """PEFT's Arrow over the experts, which train here: a router that has nothing to train does not
    show whether a backward is right."""
    from peft import ArrowConfig, create_arrow_model

    folders = [str(folder / f"expert{k}") for k in range(case["experts"])]
    model = create_arrow_model(_theirs(folder), folders, ArrowConfig(top_k=case["top_k"]))
    for name, p in model.named_parameters():
        p.requires_grad_(".lora_" in name and "arrow" not in name.rsplit(".lora_", 1)[1])
    return _trained(model, folder)


def peft_xlora(folder: Path, case: Mapping[str, Any]) -> Made:
    """PEFT's X-LoRA: a classifier over another pass of the base, for every layer its own gates."""
    from peft import XLoraConfig, get_peft_model

    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=SHAPE["hidden_size"], layerwise_scalings=True,
        # it loads them as "0", "1", ... and looks for them by the names here
        adapters={f"{k}": str(folder / f"expert{k}") for k in range(case["experts"])},
    )  # fmt: skip
    base = _theirs(folder)
    base.config.use_cache = False
    return _trained(get_peft_model(base, config), folder)


def _trained(model: Any, folder: Path) -> Made:
    """A PEFT model: `base_model.model.MODULE.lora_A.EXPERT.weight` as `EXPERT/MODULE.lora_A`."""
    model.train()
    trained = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        parts = name.removeprefix("base_model.model.").split(".")
        if len(parts) > 3 and parts[-3] in ("lora_A", "lora_B"):
            # Arrow's are `task_0`, ...
            expert = parts[-2].replace("task_", "expert")
            name = f"{expert}/{'.'.join(parts[:-2])}"
        trained[name] = p
    return _with_gradients(model, folder, trained)


ENGINES: dict[str, tuple[str, Callable[..., Made]]] = {
    "lorry-one": ("Lorry, one adapter", lorry(None, True)),
    "lorry-delta": ("Lorry, token router over frozen experts, level delta", lorry("delta", False)),
    "lorry-delta-all": ("Lorry, token router, experts train too", lorry("delta", True)),
    "lorry-expert": ("Lorry, frozen experts, level expert", lorry("expert", False)),
    "lorry-arrow": ("Lorry, Arrow, experts train", lorry("arrow", True)),
    "plain": ("transformers, the mixture at level delta by hooks", plain("delta")),
    "plain-expert": ("transformers, the mixture at level expert", plain("expert")),
    "peft-one": ("PEFT, one adapter", peft_one),
    "peft-arrow": ("PEFT, Arrow, experts train", peft_arrow),
    "peft-xlora": ("PEFT, X-LoRA, frozen experts", peft_xlora),
}  # fmt: skip
OPENED = "opened"  # a process of its own: what a mixture's directory holds once it is open


# --- a process, and what comes of all of them


def work(engine: str, folder: Path) -> dict[str, Any]:
    """One engine in this process: seconds of CPU time a step and an answer, memory above the
    imports, gradients, the answer."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from safetensors.torch import save_file

    import lorry  # noqa: F401

    case = json.loads((folder / "case.json").read_text())
    torch.set_num_threads(1)
    if engine == OPENED:
        return opened(folder, case)
    imports = measure.rss()
    made = ENGINES[engine][1](folder, case)
    losses = list[float]()

    def step() -> None:
        loss = made.loss()
        loss.backward()
        losses.append(float(loss.detach()))

    seconds = timed(step, case["warmup"], case["steps"])
    peak = measure.peak_rss()
    gradients = made.gradients()
    save_file({n: g.contiguous() for n, g in gradients.items()}, folder / f"{engine}.safetensors")
    prompt, answers = read_tokens(folder)[:PROMPT].tolist(), list[list[int]]()
    answer_seconds = timed(lambda: answers.append(made.answer(prompt, case["new"])), 1, 2)
    return {
        "losses": losses,
        "seconds": seconds,
        "memory_bytes": peak - imports,
        "gradient_norm": math.sqrt(sum(float(g.double().norm()) ** 2 for g in gradients.values())),
        "answer_seconds": answer_seconds,
        "answer": answers[-1],
    }


def timed(run: Callable[[], object], warmup: int, times: int) -> list[float]:
    """Seconds of CPU time of each call but the first ``warmup``."""
    seconds = list[float]()
    for _ in range(warmup + times):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return seconds[warmup:]


def opened(folder: Path, case: Mapping[str, Any]) -> dict[str, Any]:
    """What the mixture's directory holds once it is open and has answered, beyond what its base
    does; bytes of tensors, and of the experts' and the router's own values."""
    import lorry
    from lorry.adapters.attach import get_bank

    prompt = read_tokens(folder)[:PROMPT].tolist()
    held, own = dict[str, int](), 0
    for place in ("base", "mixture"):
        model, _ = lorry.load(folder / place, dtype=case["dtype"])
        answer_of(model, prompt, 2)
        held[place] = held_bytes()
        if place == "mixture":
            own = 4 * sum(a.num_parameters() for a in get_bank(model).adapters.values())
        del model
    # a float32 matrix [K, width] a layer
    router = 4 * SHAPE["hidden_size"] * case["experts"] * case["layers"]  # type: ignore[operator]
    return {
        "held_bytes": held["mixture"] - held["base"],
        "adapter_bytes": own,
        "router_bytes": router,
        "base_bytes": held["base"],
    }


def held_bytes() -> int:
    """Of every tensor that lives, its memory counted once."""
    import torch

    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    memory = [t.untyped_storage() for t in alive]
    return sum({one.data_ptr(): one.nbytes() for one in memory}.values())


def differs(folder: Path, engine: str, other: str) -> float | None:
    """How far two gradients are apart, of what both have, over the second's length; None where they
    have nothing in common."""
    import torch
    from safetensors.torch import load_file

    mine, right = (load_file(folder / f"{name}.safetensors") for name in (engine, other))
    common = sorted(set(mine) & set(right))
    if not common:
        return None
    a, b = (torch.cat([x[name].flatten().double() for name in common]) for x in (mine, right))
    return float((a - b).norm() / b.norm())


def refused(
    folder: Path, engine: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str | None:
    """Why nothing may be said of an engine, or None."""
    norms = [run["gradient_norm"] for run in runs[engine]]
    if not all(math.isfinite(n) and n > 0 for n in norms):
        return f"its gradient is {norms[0]}"
    if (other := SAME.get(engine)) is None:
        return None
    apart = differs(folder, engine, other)
    if apart is None or not apart < EXACT:
        return f"its gradient is {apart or math.nan:.1e} off that of `{other}`"
    if runs[engine][0]["answer"] != runs[other][0]["answer"]:
        return f"its answer is not that of `{other}`"
    return None


def in_fresh_process(engine: str, folder: Path) -> dict[str, Any]:
    """`work` in a process of its own."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, __file__, engine, str(folder)],
        stdout=subprocess.PIPE, check=True, env={**os.environ, **quiet, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def contest(folder: Path, case: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Engines in turns; then the gates; then the record."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    loads = list[float]()
    for number in range(rounds):
        for name in ENGINES:
            print(f"  round {number + 1}: {name}", file=sys.stderr, flush=True)
            loads.append(os.getloadavg()[0])
            runs[name].append(in_fresh_process(name, folder))
    memory = in_fresh_process(OPENED, folder)
    reasons = {name: why for name in ENGINES if (why := refused(folder, name, runs))}
    apart = {name: differs(folder, name, other) for name, other in SAME.items()}
    found = figures(runs)
    machine, highest = measure.machine(), max(loads)
    clean = highest <= machine["cores"]
    text = [
        f"K={case['experts']} experts of rank {case['rank']} at the MLPs, top_k={case['top_k']}, "
        f"{case['tokens']} tokens, {case['layers']} layers of SmolLM2-135M's shape with their share "
        "of its head, float32, one thread: forward and backward of a step and a token of an answer "
        f"({case['new']} after {PROMPT}), least CPU time, and a step's memory above the imports "
        "(`benchmarks/experts.py`). Gradients and answers are those of plain autograd on "
        "transformers' model, and of PEFT where it computes the same.",
        f"The mixture's directory, open ({case['dtype']}), holds "
        f"{memory['held_bytes'] / 2**20:.1f} MiB beyond its base, for experts of "
        f"{memory['adapter_bytes'] / 2**20:.1f} MiB and a router of "
        f"{memory['router_bytes'] / 2**20:.2f} MiB.",
    ]
    if not clean:
        text.append(
            f"**Not clean**: the load went up to {highest:.1f} on {machine['cores']} cores while "
            "this was measured; times are not those of a quiet machine."
        )
    text += [f"Refused: {ENGINES[name][0]}: {why}." for name, why in reasons.items()]
    told = [name for name in ENGINES if name not in reasons]
    return {
        "title": "A mixture of LoRA experts",
        "text": "\n".join(text),
        "columns": [
            "engine", "s/step", "to one adapter", "memory MiB", "to one adapter", "ms/token", "to one adapter",
        ],
        "rows": [row(name, found) for name in told],
        "case": dict(case),
        "rounds": rounds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/experts.py", *sys.argv[1:]]),
        "machine": machine,
        "highest_load": highest,
        "clean": clean,
        "targets": goals(found, memory, told),
        "refused": reasons,
        "gradients_apart": apart,
        "opened": memory,
        "runs": runs,
    }  # fmt: skip


def figures(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """By engine: the least seconds of a step and of a token, and the median of the memory."""
    return {
        name: {
            "step": min(s for run in mine for s in run["seconds"]),
            "memory": statistics.median(run["memory_bytes"] for run in mine),
            "token": min(s / len(run["answer"]) for run in mine for s in run["answer_seconds"]),
        }
        for name, mine in runs.items()
    }


def row(name: str, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """An engine's line of the table."""
    mine, one = found[name], found["lorry-one"]
    return [
        ENGINES[name][0],
        f"{mine['step']:.2f}",
        f"{mine['step'] / one['step']:.2f}x",
        f"{mine['memory'] / 2**20:.0f}",
        f"{mine['memory'] / one['memory']:.2f}x",
        f"{1000 * mine['token']:.1f}",
        f"{mine['token'] / one['token']:.2f}x",
    ]


def goals(
    found: Mapping[str, Mapping[str, float]], memory: Mapping[str, float], told: Sequence[str]
) -> list[dict[str, Any]]:
    """The targets, and whether they are met."""
    held = (memory["held_bytes"] - memory["router_bytes"]) / memory["adapter_bytes"]
    measured = [("an opened mixture, to its experts' bytes", HELD_TARGET, held)]
    one = found["lorry-one"]
    for name in ("lorry-delta", "lorry-delta-all"):
        if {name, "lorry-one"} <= set(told):
            step, token = (found[name][what] / one[what] for what in ("step", "token"))
            measured.append((f"{name}: a step, to one adapter's", STEP_TARGET, step))
            measured.append((f"{name}: generation, to one adapter's", ANSWER_TARGET, token))
    return [
        {"what": what, "at_most": most, "measured": got, "met": got <= most}
        for what, most, got in measured
    ]


def arguments() -> argparse.Namespace:
    """What can be chosen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("experts", 4), ("rank", 16), ("top-k", 2), ("tokens", 1024), ("layers", 30),
        ("steps", 3), ("warmup", 1), ("new", 32), ("rounds", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", help="of the opened mixture")
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
    for line in record["rows"]:
        print(f"  {line[0]:55s} " + "  ".join(f"{cell:>8s}" for cell in line[1:]))
    for goal in record["targets"]:
        print(
            f"  {goal['what']}: {goal['measured']:.2f} "
            f"(<= {goal['at_most']}: {'met' if goal['met'] else 'NOT MET'})"
        )
    if not args.no_keep:
        shape = f"K{args.experts}-r{args.rank}-L{args.layers}-t1"
        print(f"  kept in {records.keep(record, 'experts', shape)}")
    return int(bool(record["refused"]))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in {*ENGINES, OPENED}:
        print(json.dumps(work(sys.argv[1], Path(sys.argv[2]))))
    else:
        sys.exit(main())
