"""Trainings of fixed rows, as one process has them and as one of several: `tests/contracts/test_layouts.py`
compares them. `tests/support/layout_ranks.py` is what several processes run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lorry.adapters.attach import attach
from lorry.adapters.base_weights import make_weights_trainable
from lorry.adapters.mix import Mix
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.quantization.linear import quantization_facts, quantized_linears
from lorry.adapters.router import ROUTER_NAME, RoutingRule, attach_router
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.backends.distributed.communicator import Communicator, open_communicator
from lorry.backends.distributed.ddp import DataParallelBackend
from lorry.backends.distributed.fsdp import FullyShardedBackend, sharder_of
from lorry.backends.distributed.tensor_ranks import tensor_ranks
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.backends.protocol import GradientRule, Task
from lorry.config.schema.backend import TrainBackendConfig
from lorry.data.batch import BASE, TokenizedExample
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import CausalLM
from lorry.models.layer_weights import Sharder
from lorry.models.loading.load import load_model
from lorry.models.loading.store import save_model
from lorry.models.scoring.score import FinalHidden, TokenScore, log_prob
from lorry.notes import ignore_note
from lorry.tasks.unlearn.gradients import GradientRectified
from tests.support import tiny, tinyrun
from tests.support.seam import VOCAB, Fixed, Npo, examples, tiny_llama

STEPS = 3
RATE = 1e-2
# of trained weights, which at RATE are thrown so far that every rounding counts
REAL_RATE = 1e-4
# of thirty layers. In the fifth step is a row of words that the model never saw: its own layers make
# 1e-4 of a rounding of float32, in transformers' code as well as in ours
REAL_STEPS = 3
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
Rows = Sequence[Sequence[TokenizedExample]]
# adapters, or which base weights train
Specs = Mapping[str, LoraSpec] | str | list[str]


def uneven(step: int) -> Rows:
    """Micro-batches of five rows, one and two."""
    rows = examples(8, seed=step + 1)
    return [rows[:5], rows[5:6], rows[6:]]


def mixed(step: int) -> Rows:
    """Rows of two adapters and of none; in one step the second has all its rows in one micro-batch."""
    owners = [0, 1, BASE, 0, 0, 1, 0] if step % 2 else [0, 0, 0, BASE, 0, 1, 1]
    rows = examples(7, seed=step + 1, adapter=lambda i: owners[i])
    return [rows[:4], rows[4:]]


def unsupervised(step: int) -> Rows:
    """Half of the rows teach nothing."""
    rows = [
        TokenizedExample(row.tokens, [0.0] * len(row.tokens), key=row.key) if i % 2 else row
        for i, row in enumerate(examples(6, seed=step + 1))
    ]
    return [rows[:1], rows[1:2], rows[2:]]


def few(step: int) -> Rows:
    """One row in a step: a rank has nothing to do."""
    return [examples(1, seed=step + 1)]


def parted(step: int) -> Rows:
    """Rows to forget and rows to retain, in micro-batches of their own."""
    rows = examples(7, seed=step + 1, role=lambda i: "forget" if i < 4 else "retain")
    return [rows[:1], rows[1:4], rows[4:]]


def forget_and_retain(step: int) -> Rows:
    """Rows of NPO, in two micro-batches."""
    rows = examples(6, seed=step + 1, role=lambda i: "forget" if i % 2 else "retain")
    return [rows[:4], rows[4:]]


def backend_for(
    communicator: Communicator,
    specs: Specs,
    dtype: torch.dtype = torch.float32,
    gradient: GradientRule | None = None,
    kind: type[DataParallelBackend] = DataParallelBackend,
    routed: bool = False,
    moment_ranks: TensorRanks | None = None,
) -> LocalBackend:
    """``routed``: a router over the adapters trains, which are random and stay as they are."""
    model = tiny_llama().to(dtype)
    names = attach_all(model, specs, routed)
    make = LocalBackend if communicator.size == 1 else kind
    return make(
        model,
        names,
        OptimSettings(total_steps=STEPS),
        gradient=gradient,
        communicator=communicator,
        moment_ranks=moment_ranks,
    )


def attach_all(model: CausalLM, specs: Specs, routed: bool) -> list[str]:
    """Attach these adapters, or let base weights train; the names of what trains."""
    if not isinstance(specs, Mapping):
        make_weights_trainable(model, specs)
        return ["base"]
    adapters = [attach(model, spec, name) for name, spec in specs.items()]
    if not routed:
        return list(specs)
    draw = torch.Generator().manual_seed(7)
    for adapter in adapters:
        adapter.values.copy_(torch.randn(adapter.values.shape, generator=draw) * 0.2)
        adapter.freeze()
    attach_router(model, list(specs), RoutingRule(top_k=1, straight_through=True))
    return [ROUTER_NAME]


SMOLLM2 = "smollm2"
MODELS = ("llama", "gpt2", "gpt_neox")  # by family; the first is `tiny_llama`
FOREIGN = "gemma2"  # runs through transformers


def write_models(folder: Path, stories: Path | None = None) -> None:
    """Directories of two layers each, for trainings whose base is read; and a real model, if given."""
    if stories is not None:
        (folder / "stories260K").symlink_to(stories)
    save_model(tiny_llama(), folder / "llama")
    ends = {"bos_token_id": 0, "eos_token_id": 0}  # its own are beyond a small vocabulary
    tinyrun.model_directory(folder / "gpt2", "gpt2", n_layer=2, **ends)
    tinyrun.model_directory(folder / "gpt_neox", "gpt_neox", num_hidden_layers=2)
    foreign = {**tiny.FOREIGN[FOREIGN], "vocab_size": VOCAB}
    tiny.directory(tiny.random_model(foreign), folder / FOREIGN)


def read_backend_for(
    communicator: Communicator,
    shard: Sharder | None,
    folder: Path,
    specs: Specs,
    dtype: torch.dtype = torch.float32,
    gradient: GradientRule | None = None,
    family: str = "llama",
    routed: bool = False,
    moment_ranks: TensorRanks | None = None,
    quantize: str | None = None,
) -> LocalBackend:
    """`backend_for` with a model that is read: ``shard`` cuts it over the ranks."""
    opened = load_model(
        folder / family,
        dtype=dtype,
        device="cpu",
        quantize=quantize,
        ranks=tensor_ranks(communicator),
        shard=shard,
        add_note=ignore_note,
    )
    names = attach_all(opened.model, specs, routed)
    make = LocalBackend if communicator.size == 1 else FullyShardedBackend
    return make(
        opened.model,
        names,
        OptimSettings(total_steps=STEPS),
        gradient=gradient,
        communicator=communicator,
        moment_ranks=moment_ranks,
    )


def trained(
    backend: LocalBackend, task: Task, rate: float = RATE, steps: int = STEPS
) -> dict[str, Tensor]:
    """Losses and norms [steps, adapters], and each adapter's values at the end."""
    losses, norms = list[list[float]](), list[list[float]]()
    for step in range(steps):
        stats = backend.forward_backward(task.step_batches(step, {"self": backend}), task, step)
        seen = backend.step(dict.fromkeys(backend.trained, rate)).norms
        losses.append([stats.loss[name] for name in backend.trained])
        norms.append([seen.get(name, 0.0) for name in backend.trained])
    values = {}
    for name in backend.trained:
        owner = backend.owners[name]
        # of ranks that share the model: the whole of it, in the buffer's order
        whole = owner.whole_tensors(owner.values).values()
        values[f"values/{name}"] = torch.cat([tensor.detach().flatten() for tensor in whole])
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "norms": torch.tensor(norms, dtype=torch.float64),
        **values,
    }


ALPHA = 6
ONE = {"default": LoraSpec(r=3, lora_alpha=ALPHA, target_modules=TARGETS)}
TWO = {
    "shallow": LoraSpec(r=2, target_modules=["q_proj"], layers_to_transform=1),
    "deep": LoraSpec(r=5, lora_alpha=3, target_modules=TARGETS, lora_dropout=0.2),
}
EXPERTS = {name: LoraSpec(r=2, target_modules=["gate_proj", "down_proj"]) for name in "ab"}
WIDE = {"default": LoraSpec(r=3, lora_alpha=ALPHA, target_modules="all-linear")}


def steps_of(rows: Callable[[int], Rows]) -> list[Rows]:
    return [rows(step) for step in range(STEPS)]


def of(family: str) -> dict[str, Any]:
    """How far a model is trained."""
    return {"rate": REAL_RATE, "steps": REAL_STEPS} if family == SMOLLM2 else {}


def family_trainings(
    folder: Path,
    start: Callable[..., LocalBackend],
    own_decoder: bool = False,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
) -> dict[str, Tensor]:
    """`trainings` of the other models that are there; ``own_decoder``: of those that run in it."""
    plain = Fixed(steps_of(uneven))
    return {
        f"{family} {dtype}/{key}": value
        for family in (*MODELS[1:], FOREIGN, "stories260K", SMOLLM2)
        if (folder / family).exists() and (family != FOREIGN or not own_decoder)
        for dtype in dtypes
        for key, value in trained(start(WIDE, dtype, family=family), plain, **of(family)).items()
    }


# the matrices of the base, packed; of gpt2, whose matrices lie the other way round, in one of them
PACKED = [
    ("llama", "nf4", torch.float32),
    ("llama", "nf4", torch.float64),
    ("llama", "int8", torch.float64),
    ("gpt2", "nf4", torch.float64),
]


def packed_trainings(start: Callable[..., LocalBackend]) -> dict[str, Tensor]:
    """Trainings over packed matrices; and of each, as held, what files of its adapters say of the base and
    the bytes of packed matrices in this process, which ranks need not have alike."""
    results, plain = dict[str, dict[str, Tensor]](), Fixed(steps_of(uneven))
    for family, quantize, dtype in PACKED:
        backend = start(WIDE, dtype, family=family, quantize=quantize)
        made = trained(backend, plain)
        facts = quantization_facts(backend.model)
        assert facts is not None
        digests = f"{base_digest(backend.model)} {facts['sha256']}"
        parts = [
            local_values(product.layer.get_parameter(name)).nbytes
            for product in quantized_linears(backend.model).values()
            for name in product.parts.values()
        ]
        results[f"{family} {quantize} {dtype}"] = made
        results[f"held {family} {quantize} {dtype}"] = {
            "digests": torch.tensor(list(digests.encode())),
            "bytes": torch.tensor(sum(parts)),
        }
    return flat(results)


def moment_trainings(
    start: Callable[..., LocalBackend], ranks: TensorRanks | None
) -> dict[str, Tensor]:
    """Trainings whose moments ``ranks`` share, beside the same ones without: whether every loss, norm
    and tensor of the state has the same bits, also of a backend that goes on from the other's state;
    whether contract 2 finds all that is optimized; and bytes of moments in this process."""
    results = dict[str, Tensor]()
    for name, specs, names in (("adapters", TWO, list(TWO)), ("base", "all", ["base"])):
        task = Fixed(steps_of(mixed if specs is TWO else uneven), names)
        whole, cut, other = start(specs), *(start(specs, moment_ranks=ranks) for _ in range(2))
        made = [trained(backend, task) for backend in (whole, cut)]
        states = [{**backend.state()} for backend in (whole, cut)]
        other.load_state(states[0])
        pairs = [(made[1], made[0]), (states[1], states[0]), ({**other.state()}, states[0])]
        same = [torch.equal(got[key], true[key]) for got, true in pairs for key in true]
        found = other.inspect()
        results[f"{name}/same"] = torch.tensor(same)
        results[f"{name}/optimized"] = torch.tensor(found.optimized == found.trainable)
        for kind, backend in (("whole", whole), ("cut", cut)):
            moments = [m for optim in backend.optimizers.values() for m in (optim.m, optim.v)]
            results[f"{name}/{kind} bytes"] = torch.tensor(sum(m.nbytes for m in moments))
    return results


def trainings(start: Callable[..., LocalBackend], few_only: bool = False) -> dict[str, Tensor]:
    """Every training by name, as one process or this rank has it; ``few_only``: the first three."""
    plain, both = Fixed(steps_of(uneven)), Fixed(steps_of(mixed), list(TWO))
    forgetting = Npo(steps_of(forget_and_retain))
    results = {
        "float32": trained(start(ONE), plain),
        "float64": trained(start(ONE, torch.float64), plain),
        "mixed": trained(start(TWO), both),
    }
    if few_only:
        return flat(results)
    results |= {
        "unsupervised": trained(start(ONE), Fixed(steps_of(unsupervised))),
        "few": trained(start(ONE), Fixed(steps_of(few))),
        "npo": trained(start(ONE), forgetting),
        "router": trained(start(EXPERTS, routed=True), Fixed(steps_of(uneven), [ROUTER_NAME])),
        "gradient rule": trained(start(ONE, gradient=GradientRectified()), forgetting),
    }
    backend = start(ONE)
    batches = plain.step_batches(0, {})
    wants = {"logprob": TokenScore(log_prob), "hidden": FinalHidden()}
    for mix in (None, Mix.none()):
        scores = backend.score(batches, wants, mix)
        results[f"scores {mix is None}"] = {
            f"{i}/{name}": value for i, each in enumerate(scores) for name, value in each.items()
        }
    # of answers of different length, which end one after the other
    prompts, params = (
        [[5, 9, 2], [7], [11, 3]],
        [SamplingParams(max_new_tokens=n) for n in (3, 6, 1)],
    )
    shares = [local_bytes(p) for p in backend.model.parameters()]
    results["share"] = {"bytes": torch.tensor(sum(shares))}
    answers = backend.generate(prompts, params, adapters="default")
    results["answers"] = {str(i): torch.tensor(each.tokens) for i, each in enumerate(answers)}
    return flat(results)


def local_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter that lie in this process."""
    return local_values(parameter).untyped_storage().nbytes()


def local_values(parameter: Tensor) -> Tensor:
    """What of a parameter lies in this process."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def flat(results: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{"training/key": tensor}."""
    return {f"{name}/{key}": v for name, each in results.items() for key, v in each.items()}


def sharded(out: Path, **settings: Any) -> tuple[Communicator, Callable[..., LocalBackend]]:
    """The processes under `backend=fsdp`, and `read_backend_for` on them."""
    backend = TrainBackendConfig(**{"name": "fsdp", "timeout": 300.0, **settings})
    communicator = open_communicator(backend)
    shard = sharder_of(backend, communicator, "cpu")
    return communicator, partial(read_backend_for, communicator, shard, out)
