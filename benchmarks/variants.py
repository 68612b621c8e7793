"""A base held in 4 and 8 bits against the same in bfloat16: a step, generation, bytes, and the peak of
loading; PEFT with bitsandbytes beside it, where that is installed. DoRA and AdaLoRA against LoRA: a whole
step, the optimizer's part too, and its memory.

    make bench-variants                                      # SmolLM2-135M's shape, three rounds
    python benchmarks/variants.py --shape 1b --rounds 1      # the matrices of a model of 1.2B
    python benchmarks/variants.py --layers 2 --steps 1 --rounds 1 --no-keep
    python benchmarks/variants.py --only lora dora adalora --no-keep

Random weights and one adapter of rank 16 on every linear, random and not zero; one sequence a step; bfloat16,
one thread; every engine in a fresh process, in turns. Nothing is said of a packed base unless a step's
loss and gradient are those of the same values held whole (`opened-*`), within EXACT of its length: what is
left of that is the order of sums. Every variant begins as its base, so that its first loss has to be
LoRA's. Times are CPU time, the least of those timed: what else runs on the machine takes turns, and does
not count. One JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import experts
import measure
import records
import turns

SHAPES = {
    "135m": experts.SHAPE,
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
RANK = 16
# of each: the base's `quantize`, and whether its matrices are made whole again
ENGINES = {
    "bf16": ("Lorry, bfloat16", None, False),
    "nf4": ("Lorry, NF4", "nf4", False),
    "int8": ("Lorry, int8", "int8", False),
    "opened-nf4": ("Lorry, NF4's values in bfloat16", "nf4", True),
    "opened-int8": ("Lorry, int8's values in bfloat16", "int8", True),
}
# settings of an adapter over bfloat16
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("Lorry, LoRA, whole step", {}),
    "dora": ("Lorry, DoRA, whole step", {"use_dora": True}),
    "adalora": ("Lorry, AdaLoRA, whole step", {"adalora": {"target_r": RANK // 2}}),
}
BNB = "peft-nf4"
SAYS = {
    **{name: says for name, (says, _, _) in ENGINES.items()},
    **{name: says for name, (says, _) in VARIANTS.items()},
    BNB: "PEFT, bitsandbytes NF4",
}
SAME = {"nf4": "opened-nf4", "int8": "opened-int8"}
EXACT = 1e-2  # of the gradient, bfloat16 against bfloat16 of the same values
LENGTHS = (1024, 128)
VARIANT_LENGTHS = (1024, 512, 128)
PROMPT = 32


@dataclass(frozen=True)
class Target:
    """``figure`` of ``engine`` over that of ``other``: at most, or at least, ``bound``."""

    engine: str
    figure: str
    other: str
    bound: float
    at_most: bool = True


def targets(shape: str) -> list[Target]:
    """What is aimed at."""
    token = 1.0 if shape == "135m" else 1 / 1.5
    return [
        Target("nf4", "step 1024", "bf16", 1.10),
        Target("nf4", "step 128", "bf16", 1.35),
        Target("int8", "step 1024", "bf16", 1.10),
        Target(BNB, "step 512", "nf4", 4.0, at_most=False),
        Target("nf4", "token", "bf16", token),
        Target("nf4", "answers", "bf16", 1 / 0.9),
        Target("nf4", "matrix bytes", "bf16", 0.26),
        Target("nf4", "weight bytes", "bf16", 0.42),
        Target("dora", "step 1024", "lora", 1.10),
        Target("dora", "step bytes", "lora", 1.05),
        Target("adalora", "step 1024", "lora", 1.05),
    ]


def prepare(folder: Path, case: Mapping[str, Any]) -> None:
    """base/ (bfloat16) and init/ (a PEFT adapter), random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {**SHAPES[case["shape"]]}
    if case["layers"]:
        shape["num_hidden_layers"] = case["layers"]
    model = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
    model.save_pretrained(folder / "base")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, param in wrapped.named_parameters():
            if ".lora_B." in name:
                param.normal_(std=0.01)
    wrapped.save_pretrained(folder / "init")


def tokens_of(case: Mapping[str, Any], count: int, seed: int = 0) -> list[int]:
    """Random ids."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    vocabulary: int = SHAPES[case["shape"]]["vocab_size"]
    ids: list[int] = torch.randint(0, vocabulary, (count,), generator=draw).tolist()
    return ids


def work(engine: str, folder: Path) -> dict[str, Any]:
    """One engine in this process."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import lorry  # noqa: F401

    case = json.loads((folder / "case.json").read_text())
    torch.set_num_threads(1)
    if engine in VARIANTS:
        return _variant(engine, folder, case)
    return _bitsandbytes(folder, case) if engine == BNB else _lorry(engine, folder, case)


def _lorry(engine: str, folder: Path, case: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    from lorry.adapters.attach import get_bank
    from lorry.adapters.mix import AdapterContext, Mix
    from lorry.adapters.peft.files import load_adapter
    from lorry.adapters.quantization.linear import open_linears, quantized_linears
    from lorry.generation.engine import generate_completions
    from lorry.generation.sampling import SamplingParams
    from lorry.models.causal_lm import PackedInput
    from lorry.models.loading.load import load_model
    from lorry.notes import ignore_note

    _, quantize, whole = ENGINES[engine]
    measure.forget_peak()
    before = measure.rss()
    model = load_model(
        str(folder / "base"), dtype="bfloat16", quantize=quantize, add_note=ignore_note
    ).model
    loading = measure.peak_rss() - before
    vocabulary = model.get_parameter("model.embed_tokens.weight")
    largest = max(
        [vocabulary.nbytes]
        + [2 * p.shape[0] * p.shape[1] for p in quantized_linears(model).values()]
    )
    if whole:
        open_linears(model)
    parameters = {id(p): p.nbytes for p in model.parameters()}
    matrices = sum(p.nbytes for name, p in model.named_parameters() if "_proj.weight" in name)
    adapter = load_adapter(model, folder / "init", "one", other_base=True)
    mix = Mix.one("one")
    get_bank(model).activate(mix)
    call, losses = AdapterContext(mix), dict[str, float]()

    def step(length: int) -> list[float]:
        packed = PackedInput.of([tokens_of(case, length)])

        def once() -> None:
            adapter.grads.zero_()
            logits = model.logits(model.hidden(packed, call).last, call)
            loss = torch.nn.functional.cross_entropy(logits[:-1].float(), packed.tokens[1:])
            loss.backward()
            losses[str(length)] = float(loss.detach())

        return experts.timed(once, case["warmup"], case["steps"])

    seconds = {str(length): step(length) for length in (512, *LENGTHS)}
    gradients = adapter.split_like(adapter.grads)
    save_file({n: g.contiguous() for n, g in gradients.items()}, folder / f"{engine}.safetensors")
    made = SamplingParams(max_new_tokens=case["new"])
    prompts = [tokens_of(case, PROMPT, seed) for seed in range(64)]

    def answer(rows: int) -> list[float]:
        return experts.timed(lambda: generate_completions(model, prompts[:rows], made), 1, 2)

    return {
        "seconds": seconds,
        "losses": losses,
        "gradient_norm": math.sqrt(sum(float(g.double().norm()) ** 2 for g in gradients.values())),
        "token_seconds": [s / case["new"] for s in answer(1)],
        "answers_seconds": answer(64),
        "matrix_bytes": matrices,
        "weight_bytes": sum(parameters.values()),
        "largest_bytes": largest,
        "loading_bytes": loading,
    }


def _variant(engine: str, folder: Path, case: Mapping[str, Any]) -> dict[str, Any]:
    """Whole steps, the longest first: its peak is what is told of memory. Of AdaLoRA all of them are steps at
    which ranks go."""
    from lorry.adapters.attach import attach
    from lorry.adapters.mix import AdapterContext, Mix
    from lorry.adapters.spec import LoraSpec
    from lorry.backends.optim import OptimSettings, ParameterSetOptimizer
    from lorry.data.batch import TokenizedExample, collate
    from lorry.models.loading.load import load_model
    from lorry.models.scoring.score import TokenScore, evaluate_wants, log_prob
    from lorry.notes import ignore_note
    from lorry.train.resources.peak import tune_allocator

    tune_allocator()
    before = measure.rss()
    model = load_model(str(folder / "base"), dtype="bfloat16", add_note=ignore_note).model
    adapter = attach(model, LoraSpec(r=RANK, **VARIANTS[engine][1]), "one")
    steps = len(VARIANT_LENGTHS) * (case["steps"] + case["warmup"])
    # a few more: of the last ones none takes ranks
    optimizer = ParameterSetOptimizer(adapter, OptimSettings(total_steps=2 * steps))
    call = AdapterContext(Mix.one("one"))
    losses, norms = dict[str, float](), list[float]()

    def step(length: int) -> list[float]:
        tokens = tokens_of(case, length)
        batch = collate([TokenizedExample(tokens, [0.0] + [1.0] * (length - 1))])

        def once() -> None:
            with adapter.held_still():
                # as a run does: whole logits, of which there are none, would hide what layers keep
                scores = evaluate_wants(model, batch, {"logprob": TokenScore(log_prob)}, call)
                loss = -(scores["logprob"] * batch.weights).sum() / (length - 1)
                loss.backward()
            optimizer.add_penalty_gradients()
            norms.append(adapter.norm())
            optimizer.step(1e-4, norms[-1])
            losses.setdefault(str(length), float(loss.detach()))

        return experts.timed(once, case["warmup"], case["steps"])

    measure.forget_peak()
    seconds, peak = dict[str, list[float]](), 0
    for length in VARIANT_LENGTHS:
        seconds[str(length)] = step(length)
        peak = peak or measure.peak_rss()
    return {
        "seconds": seconds,
        "losses": losses,
        "gradient_norm": norms[0],
        "step_bytes": peak - before,
    }


def _bitsandbytes(folder: Path, case: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT over transformers' model with bitsandbytes' linears; steps of 512 tokens alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = AutoModelForCausalLM.from_pretrained(
        folder / "base",
        dtype=torch.bfloat16,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model = PeftModel.from_pretrained(base, folder / "init", is_trainable=True).train()
    ids, losses = torch.tensor([tokens_of(case, 512)]), dict[str, float]()

    def once() -> None:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses["512"] = float(loss.detach())

    return {
        "seconds": {"512": experts.timed(once, case["warmup"], case["steps"])},
        "losses": losses,
    }


def refused(folder: Path, engine: str, runs: Mapping[str, Sequence[Any]]) -> str | None:
    """Why nothing may be said of an engine, or None."""
    mine = runs[engine][0]
    norm = mine.get("gradient_norm", 1.0)
    if not (math.isfinite(norm) and norm > 0):
        return f"its gradient is {norm}"
    if engine in VARIANTS:
        # later lengths are after steps
        longest = str(VARIANT_LENGTHS[0])
        away = abs(mine["losses"][longest] / runs["lora"][0]["losses"][longest] - 1)
        return f"its first loss is {away:.1e} off LoRA's" if not away < EXACT else None
    if (other := SAME.get(engine)) is None:
        return None
    apart = experts.differs(folder, engine, other)
    if apart is None or not apart < EXACT:
        return f"its gradient is {apart or math.nan:.1e} off that of `{other}`"
    away = max(abs(mine["losses"][n] / runs[other][0]["losses"][n] - 1) for n in mine["losses"])
    return f"its loss is {away:.1e} off that of `{other}`" if not away < EXACT else None


def figures(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """By engine: the least seconds of each kind, and bytes."""
    found: dict[str, dict[str, float]] = {}
    for name, mine in runs.items():
        found[name] = {
            f"step {length}": min(s for run in mine for s in run["seconds"][length])
            for length in mine[0]["seconds"]
        }
        for figure, key in (("token", "token_seconds"), ("answers", "answers_seconds")):
            if key in mine[0]:
                found[name][figure] = min(s for run in mine for s in run[key])
        for figure in ("matrix", "weight", "largest", "loading", "step"):
            if f"{figure}_bytes" in mine[0]:
                found[name][f"{figure} bytes"] = min(run[f"{figure}_bytes"] for run in mine)
    return found


def goals(found: Mapping[str, Mapping[str, float]], shape: str) -> list[dict[str, Any]]:
    """The targets of what was measured, and whether they are met."""
    told = []
    for target in targets(shape):
        mine, other = (found.get(name, {}) for name in (target.engine, target.other))
        if target.figure not in mine or target.figure not in other:
            continue
        got = mine[target.figure] / other[target.figure]
        met = got <= target.bound if target.at_most else got >= target.bound
        what = f"{target.engine} to {target.other}, {target.figure}"
        told.append(
            {"what": what, "bound": target.bound, "at_most": target.at_most, "measured": got, "met": met}
        )  # fmt: skip
    for name in SAME:
        if name in found:
            mine = found[name]
            most = mine["weight bytes"] + 2 * mine["largest bytes"]
            got = mine["loading bytes"] / most
            what = f"{name}, peak of loading to what is held and two of the largest tensors"
            told.append(
                {"what": what, "bound": 1.0, "at_most": True, "measured": got, "met": got <= 1}
            )
    return told


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
    asked = case["only"] or SAYS
    names = [name for name in (*ENGINES, *VARIANTS) if name in asked]
    if BNB in asked and importlib.util.find_spec("bitsandbytes"):
        names.append(BNB)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    loads = list[float]()
    for number in range(rounds):
        for name in names:
            print(f"  round {number + 1}: {name}", file=sys.stderr, flush=True)
            loads.append(os.getloadavg()[0])
            runs[name].append(in_fresh_process(name, folder))
    reasons = {name: why for name in names if (why := refused(folder, name, runs))}
    found = {name: row for name, row in figures(runs).items() if name not in reasons}
    machine, highest = measure.machine(), max(loads)
    clean = highest <= machine["cores"]
    layers = f" of {case['layers']} layers" if case["layers"] else ""
    text = [
        f"{case['shape']}'s shape{layers}, rank {RANK} on every "
        "linear, bfloat16, one thread: forward and backward of a step, a token of one answer, and answers to 64 "
        f"prompts of {PROMPT} tokens ({case['new']} each), least CPU time (`benchmarks/variants.py`). Loss and gradient of a "
        "packed base are those of its values held whole. Whole steps: with the optimizer's part, of AdaLoRA with "
        "ranks that go; their memory is the peak at 1,024 tokens above the imports.",
    ]
    if not clean:
        text.append(
            f"**Not clean**: the load went up to {highest:.1f} on {machine['cores']} cores while "
            "this was measured; times are not those of a quiet machine."
        )
    text += [f"Refused: {SAYS[name]}: {why}." for name, why in reasons.items()]
    return {
        "title": "A base in 4 and 8 bits",
        "text": "\n".join(text),
        "columns": ["engine", *COLUMNS],
        "rows": [row(name, found) for name in found],
        "case": dict(case),
        "rounds": rounds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/variants.py", *sys.argv[1:]]),
        "machine": machine,
        "highest_load": highest,
        "clean": clean,
        "targets": goals(found, case["shape"]),
        "refused": reasons,
        "gradients_apart": {
            name: experts.differs(folder, name, other)
            for name, other in SAME.items()
            if name in runs and other in runs
        },
        "runs": runs,
    }


COLUMNS = {
    "s/step, 1,024": ("step 1024", 1.0, ".2f"),
    "512": ("step 512", 1.0, ".2f"),
    "128": ("step 128", 1.0, ".2f"),
    "ms/token": ("token", 1000.0, ".1f"),
    "64 answers, s": ("answers", 1.0, ".1f"),
    "matrices MiB": ("matrix bytes", 2.0**-20, ".0f"),
    "weights MiB": ("weight bytes", 2.0**-20, ".0f"),
    "loading MiB": ("loading bytes", 2.0**-20, ".0f"),
    "step MiB": ("step bytes", 2.0**-20, ".0f"),
}


def row(name: str, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """An engine's line of the table."""
    cells = [
        format(found[name][figure] * factor, form) if figure in found[name] else ""
        for figure, factor, form in COLUMNS.values()
    ]
    return [SAYS[name], *cells]


def arguments() -> argparse.Namespace:
    """What can be chosen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="135m")
    for name, default in (("layers", 0), ("steps", 3), ("warmup", 1), ("new", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=sorted(SAYS), default=[])
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
    print(f"  {'':35s} " + "  ".join(f"{cell:>13s}" for cell in COLUMNS))
    for line in record["rows"]:
        print(f"  {line[0]:35s} " + "  ".join(f"{cell:>13s}" for cell in line[1:]))
    for goal in record["targets"]:
        sign = "<=" if goal["at_most"] else ">="
        print(
            f"  {goal['what']}: {goal['measured']:.3f} "
            f"({sign} {goal['bound']:.2f}: {'met' if goal['met'] else 'NOT MET'})"
        )
    if not args.no_keep:
        print(f"  kept in {records.keep(record, 'variants', f'{args.shape}-t1')}")
    return int(bool(record["refused"]))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in SAYS:
        print(json.dumps(work(sys.argv[1], Path(sys.argv[2]))))
    else:
        sys.exit(main())
