"""What `tests/contracts/test_layouts.py` runs on one process and on several: trainings of fixed rows,
and faults made on purpose on one rank.

    RANK=0 WORLD_SIZE=2 ... python -m tests.support.layouts OUT

writes OUT/2-rank-0.safetensors (what each training came to) and OUT/2-rank-0.json (how each fault ended,
and each command line of OUT/commands.json, with its exit code). OUT holds the models of `write_models`.
Of four processes the trainings alone, cut over four and over two twice, and the command lines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lorry import cli
from lorry.adapters.attach import attach
from lorry.adapters.base_weights import make_weights_trainable
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.router import ROUTER_NAME, RoutingRule, attach_router
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.backends.distributed.communicator import Communicator, open_communicator
from lorry.backends.distributed.ddp import DataParallelBackend
from lorry.backends.distributed.exchange import is_shared
from lorry.backends.distributed.fsdp import FullyShardedBackend, sharder_of
from lorry.backends.distributed.tensor_ranks import data_ranks, tensor_ranks
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.backends.protocol import GradientRule, Task, term_totals
from lorry.config.schema import TrainBackendConfig
from lorry.data.batch import BASE, Batch, TokenizedExample
from lorry.disk import durable
from lorry.errors import LorryError
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import CausalLM, PackedInput
from lorry.models.layer_weights import Sharder
from lorry.models.loading.load import load_model
from lorry.models.loading.store import save_model
from lorry.models.scoring.score import FinalHidden, TokenScore, evaluate_wants, log_prob
from lorry.notes import ignore_note
from lorry.tasks.unlearn.gradients import GradientRectified, SharpnessAware
from lorry.train import session
from lorry.train.checks import ContractChecks
from lorry.train.finish import contract_targets
from lorry.train.session import open_base
from tests.support import tiny, tinyrun
from tests.support.seam import VOCAB, Fixed, Npo, examples, tiny_llama
from tests.support.tinyrun import engine_for

STEPS = 5
RATE = 1e-2
# of trained weights, which at RATE are thrown so far that every rounding counts
REAL_RATE = 1e-4
BASE_RATE = 1e-3
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
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
        OptimSettings(),
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
) -> LocalBackend:
    """`backend_for` with a model that is read: ``shard`` cuts it over the ranks."""
    opened = load_model(
        folder / family,
        dtype=dtype,
        device="cpu",
        ranks=tensor_ranks(communicator),
        shard=shard,
        add_note=ignore_note,
    )
    names = attach_all(opened.model, specs, routed)
    make = LocalBackend if communicator.size == 1 else FullyShardedBackend
    return make(
        opened.model,
        names,
        OptimSettings(),
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


def steps_of(rows: Callable[[int], Rows]) -> list[Rows]:
    return [rows(step) for step in range(STEPS)]


WIDE = {"default": LoraSpec(r=3, lora_alpha=ALPHA, target_modules="all-linear")}


def of(family: str) -> dict[str, Any]:
    """How far a model is trained."""
    return {"rate": REAL_RATE, "steps": REAL_STEPS} if family == SMOLLM2 else {}


def family_trainings(
    folder: Path, start: Callable[..., LocalBackend], own_decoder: bool = False
) -> dict[str, Tensor]:
    """`trainings` of the other models that are there; ``own_decoder``: of those that run in it."""
    plain = Fixed(steps_of(uneven))
    return {
        f"{family} {dtype}/{key}": value
        for family in (*MODELS[1:], FOREIGN, "stories260K", SMOLLM2)
        if (folder / family).exists() and (family != FOREIGN or not own_decoder)
        for dtype in (torch.float32, torch.float64)
        for key, value in trained(start(WIDE, dtype, family=family), plain, **of(family)).items()
    }


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


def base_trainings(folder: Path, start: Callable[..., LocalBackend]) -> dict[str, Tensor]:
    """Of base weights: all of each family, and a part; ``share``: the bytes that train here."""
    plain, results = Fixed(steps_of(uneven), ["base"]), dict[str, dict[str, Tensor]]()
    chosen = [(family, dtype, "all") for family in MODELS for dtype in FLOATS]
    for family, dtype, specs in (*chosen, ("llama", torch.float32, ["lm_head", "mlp.up_proj"])):
        backend = start(specs, dtype, family=family)
        name = f"{family} {dtype} {'all' if specs == 'all' else 'part'}"
        results[name] = trained(backend, plain, BASE_RATE)
        buffers = (backend.owners["base"].values, *backend.optimizers["base"].moments())
        results[f"share {name}"] = {
            "model": torch.tensor(sum(map(local_bytes, backend.model.parameters()))),
            "training": torch.tensor(
                sum(b.nbytes for b in (*buffers, backend.owners["base"].grads))
            ),
        }
    rules = {"sam": SharpnessAware({"base": 0.05}), "gru": GradientRectified()}
    for name, rule in rules.items():
        task = Fixed(steps_of(parted), ["base"])
        results[name] = trained(start("all", gradient=rule), task, BASE_RATE)
    few_rows = Fixed(steps_of(few), ["base"])
    results["few"] = trained(start("all"), few_rows, BASE_RATE)
    return {f"base {name}/{key}": v for name, each in results.items() for key, v in each.items()}


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
        return _flat(results)
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
    return _flat(results)


def local_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter that lie in this process."""
    here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return here.untyped_storage().nbytes()


def _flat(results: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}/{key}": v for name, each in results.items() for key, v in each.items()}


# --- faults, of rank 1 where nothing else is said


class ForgetsToAddUp(DataParallelBackend):
    """Rank 1 takes part in the sum and goes on with its own gradient."""

    def run_micro_batches(self, *given: Any) -> list[dict[str, Tensor]]:
        communicator = self.communicator
        if communicator.rank == 0:
            return super().run_micro_batches(*given)
        self.communicator = _but(
            communicator, add_up=lambda what, t: communicator.add_up(what, t.clone())
        )
        try:
            return super().run_micro_batches(*given)
        finally:
            self.communicator = communicator


class TotalsPerRank(DataParallelBackend):
    """Each rank divides by what its own rows weigh."""

    def run_micro_batches(
        self, batches: Sequence[Batch], task: Task, step: int, totals: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        own = term_totals(batches[self.communicator.rank :: self.communicator.size])
        return super().run_micro_batches(batches, task, step, own)


class OneMoreMicroBatch(DataParallelBackend):
    """Rank 1 makes a pass that nobody else makes."""

    def run_micro_batches(self, *given: Any) -> list[dict[str, Tensor]]:
        if self.communicator.rank:
            self.communicator.exchange("one more pass")
        return super().run_micro_batches(*given)


def _but(communicator: Communicator, **changes: Any) -> Any:
    names = (
        "rank", "size", "mesh", "exchange", "on_main", "await_all", "add_up", "gather", "together"
    )  # fmt: skip
    return SimpleNamespace(**{n: getattr(communicator, n) for n in names} | changes)


class FullDisk(durable.DiskCalls):
    def create(self, path: Path) -> int:
        raise OSError(28, "No space left on device", str(path))


def open_late(*given: Any) -> Any:
    """`open_base` of a slow machine."""
    time.sleep(1.0)
    return open_base(*given)


class NoSync(durable.DiskCalls):
    def fsync(self, fd: int) -> None:
        raise OSError(5, "Input/output error")


def run_engine(
    communicator: Communicator,
    folder: Path,
    *,
    kind: type[DataParallelBackend] = DataParallelBackend,
    backend: LocalBackend | None = None,
    change: Callable[[Any], None] = lambda engine: None,
    identity: Mapping[str, Any] | None = None,
    steps: int = 3,
) -> Any:
    """The engine over `uneven` rows, changed before it runs."""
    here = folder if communicator.rank == 0 else folder.with_name(f"{folder.name}-of-rank-1")
    make: Any = partial(LocalBackend if communicator.size == 1 else kind, communicator=communicator)
    engine = engine_for(
        Fixed([uneven(step) for step in range(steps)]),
        here,
        make_backend=make if backend is None else lambda *given: backend,
        learning_rate=RATE,
        warmup_ratio=0,
        save_steps=1,
    )
    if identity:
        engine.identity = {**engine.identity, **identity}
    engine.checks.begin(engine.backend, contract_targets(engine.backend.model, ["default"]))  # type: ignore[attr-defined]
    change(engine)
    engine.run()
    return engine


def faults(communicator: Communicator, out: Path) -> dict[str, list[str]]:
    """{fault: [class of the error, its text, whether all ranks have it]} as this rank has it."""
    second = communicator.rank == 1

    def other_adapter(engine: Any) -> None:
        if second:
            engine.backend.owners["default"].values[5] += 1e-3

    def poison(engine: Any) -> None:
        if second:
            engine.backend.model.get_submodule("model.norm").weight.data[0] = float("nan")
            # the checks of the first batch would find it first
            engine.checks.held(4, "skipped")

    def full_disk(engine: Any) -> None:
        if not second:
            durable.disk = FullDisk()

    def no_sync(engine: Any) -> None:
        # of the log, between agreeing on a checkpoint and rank 0 writing it
        if not second:
            durable.disk = NoSync()

    def stop_signal(engine: Any) -> None:
        record = engine.record_task

        def stop(step: int) -> Mapping[str, Any]:
            if second and step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return record(step)

        engine.record_task = stop

    def bug(engine: Any) -> None:
        if second:
            engine.task.loss = None

    run = partial(run_engine, communicator)
    return _endings(
        communicator,
        out,
        {
            "a gradient not added up": lambda d: run(d, kind=ForgetsToAddUp),
            "totals of one rank": lambda d: run(d, kind=TotalsPerRank),
            "one more micro-batch": lambda d: run(d, kind=OneMoreMicroBatch),
            "another adapter": lambda d: run(d, change=other_adapter),
            "another base": lambda d: run(
                d, identity={"digests": {"base": f"{communicator.rank}" * 64}}
            ),
            "not finite": lambda d: run(d, change=poison),
            "full disk": lambda d: run(d, change=full_disk),
            "log not synced": lambda d: run(d, change=no_sync),
            "signal": lambda d: run(d, change=stop_signal, steps=4),
            "bug": lambda d: run(d, change=bug),
            "nothing": lambda d: run(d),
        },
    )


def sharded_faults(out: Path) -> dict[str, list[str]]:
    """`faults` of passes through sharded weights."""
    communicator, start = sharded(out)
    second = communicator.rank == 1
    plain = Fixed(steps_of(uneven))

    def run(folder: Path, change: Callable[[Any], None]) -> None:
        engine = run_engine(communicator, folder, backend=start(ONE), change=change)
        engine.checks.end(engine.backend, engine.task)

    def one_more_pass(engine: Any) -> None:
        if second:
            engine.backend.score([], {})
            engine.backend.model.hidden(PackedInput.of([[1, 2]]), AdapterContext(Mix.none()))

    def broken_layer(engine: Any) -> None:
        if second:
            engine.backend.model.blocks[0].apply_positions = None
            engine.checks.held(4, "skipped")
        else:
            engine.checks.held(4, "skipped")

    def own_backward(folder: Path) -> None:
        backend = start(ONE)
        batch = plain.step_batches(0, {})[0]
        with communicator.together():
            scores = evaluate_wants(
                backend.model, batch, plain.wants(batch), AdapterContext(Mix.one("default"))
            )
            scores["logprob"].sum().backward()

    def other_share(engine: Any) -> None:
        if second:
            weight = engine.backend.model.get_parameter("model.layers.1.mlp.up_proj.weight")
            with torch.no_grad():
                weight.to_local()[-1] += 1

    def late_gradient(folder: Path) -> None:
        backend = start("all")
        weights: Any = backend.model.layer_weights
        backend.forward_backward(base.step_batches(0, {}), base, 0)
        reduce = weights._reduce
        # the highest layer is left too early
        weights._reduce = lambda group: None if group is weights.layers[-1] else reduce(group)
        backend.forward_backward(base.step_batches(0, {}), base, 0)

    def infinite_gradient(folder: Path) -> None:
        backend = start("all")
        backend.forward_backward(base.step_batches(0, {}), base, 0)
        owner = backend.owners["base"]
        if second:
            owner.split_like(owner.grads)["model.norm.weight"][1] = float("inf")
        backend.step({"base": BASE_RATE})

    def infinite_value(folder: Path) -> None:
        backend = start("all")
        if second:
            backend.optimizers["base"].m[3] = float("nan")
        ContractChecks().finite(backend, 1)

    base = Fixed(steps_of(uneven), ["base"])
    return _endings(
        communicator,
        out,
        {
            "fsdp late gradient": late_gradient,
            "fsdp infinite gradient": infinite_gradient,
            "fsdp infinite value": infinite_value,
            "fsdp one more pass": lambda d: run(d, one_more_pass),
            "fsdp broken layer": lambda d: run(d, broken_layer),
            "fsdp own backward": own_backward,
            "fsdp other share": lambda d: run(d, other_share),
        },
    )


def _endings(
    communicator: Communicator, out: Path, made: Mapping[str, Callable[[Path], Any]]
) -> dict[str, list[str]]:
    """How each of these ends on this rank."""
    ended = dict[str, list[str]]()
    for name, make in made.items():
        calls = durable.disk
        try:
            with communicator.sharing_failures():
                make(out / name.replace(" ", "-"))
            ended[name] = ["", "", ""]
        except (LorryError, TypeError) as error:
            ended[name] = [type(error).__name__, str(error), str(is_shared(error))]
        finally:
            durable.disk = calls
    return ended


def sharded(out: Path, **settings: Any) -> tuple[Communicator, Callable[..., LocalBackend]]:
    """The processes under `backend=fsdp`, and `read_backend_for` on them."""
    backend = TrainBackendConfig(**{"name": "fsdp", "timeout": 300.0, **settings})
    communicator = open_communicator(backend)
    shard = sharder_of(backend, communicator, "cpu")
    return communicator, partial(read_backend_for, communicator, shard, out)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    communicator = open_communicator(TrainBackendConfig(name="ddp", timeout=300.0))
    results = dict[str, Tensor]()
    if (out / SMOLLM2).exists():  # alone: it takes as long as all the others
        shared = {"name": "ddp", "tensor_parallel": 3} if communicator.size == 3 else {}
        made = family_trainings(out, sharded(out, **shared)[1])
        layout = "tensor" if shared else "fsdp"
        results = {f"{layout}/{name}": value for name, value in made.items()}
        save_file(results, out / f"{communicator.size}-rank-{communicator.rank}.safetensors")
        return
    layouts: dict[str, dict[str, Any]] = {"fsdp": {}}
    if communicator.size == 4:
        layouts["hsdp"] = {"replicas": 2, "reshard_after_forward": False}
        layouts["fsdp x tensor"] = {"tensor_parallel": 2}
    else:
        made = trainings(partial(backend_for, communicator))
        results |= {f"ddp/{name}": value for name, value in made.items()}
        made = moment_trainings(partial(backend_for, communicator), data_ranks(communicator))
        results |= {f"ddp/moments/{name}": value for name, value in made.items()}
    for layout, settings in layouts.items():
        processes, start = sharded(out, **settings)
        made = family_trainings(out, start, own_decoder="tensor_parallel" in settings)
        shared = moment_trainings(start, data_ranks(processes)) if layout == "fsdp" else {}
        made |= {f"moments/{name}": value for name, value in shared.items()}
        made |= trainings(start, few_only=communicator.size == 4)
        if "tensor_parallel" not in settings:  # which base weights are not trained under
            made |= base_trainings(out, start)
        results |= {f"{layout}/{name}": value for name, value in made.items()}
    save_file(results, out / f"{communicator.size}-rank-{communicator.rank}.safetensors")
    ended: dict[str, Any] = {}
    if communicator.size == 2:
        ended |= faults(communicator, out) | sharded_faults(out)
    for name, words in json.loads((out / "commands.json").read_text()).items():
        if name == "continued":  # in its own directory, by a rank 1 that reads it late
            if communicator.rank == 0:
                shutil.copytree(out / "run", out / name)
            else:
                session.open_base = open_late
        kind = "fsdp" if name.startswith("fsdp") else "ddp"
        ended[name] = cli.main([*words, f"backend={kind}", "keep_total=true"])
        session.open_base = open_base
    (out / f"{communicator.size}-rank-{communicator.rank}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
