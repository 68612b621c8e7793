"""The layouts that layouts.py compares: Lorry's backends, accelerate + PEFT, and each alone with all
threads. A layout is processes that train the same steps; each tells a `RankWatch` of its part.

accelerate is used as its documentation shows: `Accelerator.prepare`, `accelerator.backward`,
`accelerator.clip_grad_norm_`; every process reads its own rows of the step.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import wire
from case import IGNORED, Case, Row
from engines import Run, clean, count, fast_path, padded, turn
from measure import Watch, forget_peak, peak_rss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorry.plan.parallel.split import ParallelSplit


@dataclass
class RankWatch(Watch):
    """What one process tells: as `Watch`, and what of the base it holds, its highest resident set
    while it loaded, and what it had sent when the timed steps began. Rank 0 alone writes gradients,
    which all have to gather.
    """

    rank: int = 0
    warmup: int = 1
    base_bytes: int = 0
    loading_peak: int = 0
    sent_before: int = 0

    def holds(self, base: nn.Module) -> None:
        """The model is loaded: what of its frozen weights lies here."""
        self.base_bytes = sum(
            map(local_bytes, (p for p in base.parameters() if not p.requires_grad))
        )

    def start(self) -> None:
        self.loading_peak = peak_rss()
        forget_peak()
        super().start()

    def gradients(self, make: Callable[[], dict[str, Tensor]]) -> None:
        if self.rank == 0:
            super().gradients(make)
        elif not self.losses:
            make()

    def step(self, loss: float, tokens: int, supervised: int) -> None:
        super().step(loss, tokens, supervised)
        if len(self.losses) == self.warmup:
            self.sent_before = wire.sent_bytes()


def local_bytes(parameter: Tensor) -> int:
    """Bytes of the part of a tensor that lies in this process: of a DTensor its local values."""
    part = getattr(parameter, "_local_tensor", parameter)
    # not of its storage: what is read from a safetensors file is a window on the mapped file
    return int(part.numel() * part.element_size())


@dataclass(frozen=True)
class Layout:
    """``whole``: every process tells of the whole step; ``shards``: processes that share one copy of
    the base; ``alone``: the same engine in one process; ``split``: what `lorry plan` is asked about.
    """

    make: Callable[[], Run]
    says: str
    processes: int
    whole: bool
    shards: int = 1
    alone: str = ""
    plan: tuple[Literal["ddp", "fsdp"], int] | None = None

    @property
    def split(self) -> ParallelSplit | None:
        from lorry.plan.parallel.split import ParallelSplit

        if self.plan is None:
            return None
        backend, tensor = self.plan
        return ParallelSplit(backend=backend, processes=self.processes, tensor=tensor)


def environments(processes: int, cores: int) -> list[dict[str, str]]:
    """Of each process, as torchrun sets it; the cores divided."""
    threads = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    if processes == 1:
        return [threads]
    shared = {
        **threads,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def lorry(name: str, tensor: int = 1) -> Run:
    """Lorry's backend of this name, on the processes that were started."""
    from lorry.adapters.peft.files import load_adapter
    from lorry.backends.distributed.communicator import open_communicator
    from lorry.backends.distributed.fsdp import sharder_of
    from lorry.backends.distributed.tensor_ranks import tensor_ranks
    from lorry.backends.optim import OptimSettings
    from lorry.backends.registry import BACKENDS
    from lorry.config.schema.backend import TrainBackendConfig
    from lorry.data.batch import TokenizedExample, collate
    from lorry.models.loading.load import load_model
    from lorry.notes import ignore_note
    from lorry.tasks.sft import SftTask
    from lorry.train.resources.peak import tune_allocator

    class Rows:
        """Steps of plain rows, whole: the backend deals them."""

        def __init__(self, rows: Sequence[Row], per_step: int) -> None:
            self.rows, self.per_step = rows, per_step

        def batches(self, step: int) -> list[Any]:
            mine = turn(self.rows, step, self.per_step)
            examples = [
                TokenizedExample(ids, [float(label != IGNORED) for label in labels])
                for ids, labels in mine
            ]
            return [collate(examples)]

    def run(folder: Path, case: Case, rows: Sequence[Row], watch: Watch) -> None:
        assert isinstance(watch, RankWatch)
        fast_path()
        tune_allocator()
        settings = TrainBackendConfig(name=name, tensor_parallel=tensor)  # type: ignore[arg-type]
        communicator = open_communicator(settings)
        model = load_model(
            str(folder / "base"),
            dtype="bfloat16",
            ranks=tensor_ranks(communicator),
            shard=sharder_of(settings, communicator, "cpu"),
            add_note=ignore_note,
        ).model
        adapter = load_adapter(model, folder / "init", "default")
        backend = BACKENDS[name](model, ["default"], OptimSettings(), communicator=communicator)
        task = SftTask(Rows(rows, case.rows_per_step), [], case.all_steps, ["default"])
        watch.holds(model)
        watch.start()
        for step in range(case.all_steps):
            batches = task.step_batches(step, {})
            watch.saw(
                [b.tokens[start:stop].tolist() for b in batches for start, stop in b.segments]
            )
            stats = backend.forward_backward(batches, task, step)
            watch.gradients(
                lambda: {n: g.clone() for n, g in adapter.whole_tensors(adapter.grads).items()}
            )
            backend.step({"default": case.learning_rate})
            watch.step(stats.loss["default"], stats.tokens, stats.supervised)

    return run


def accelerate(name: Literal["ddp", "fsdp"]) -> Run:
    """PEFT as it comes (fp32 adapters) under accelerate; FSDP2 with the base's layers as units."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401  loaded lazily otherwise

    def run(folder: Path, case: Case, rows: Sequence[Row], watch: Watch) -> None:
        assert isinstance(watch, RankWatch)
        plugin = None
        if name == "fsdp":
            os.environ["ACCELERATE_USE_FSDP"] = "true"
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                reshard_after_forward=True,
                cpu_ram_efficient_loading=False,
            )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        if plugin is not None:
            # on a CPU accelerate 1.15 takes no notice of the plugin and runs DDP; so it is told
            # by hand what it would have found out on GPUs, and prepares the model by its own code
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        base.config.use_cache = False
        model = PeftModel.from_pretrained(base, folder / "init", is_trainable=True)
        model.train()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=case.learning_rate,
            weight_decay=0.0,
            fused=True,
        )
        model, optimizer = accelerator.prepare(model, optimizer)
        trained = {
            clean(n.removeprefix("module.")): p
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        rank, processes = accelerator.process_index, accelerator.num_processes
        watch.holds(model)
        watch.start()
        for step in range(case.all_steps):
            mine = turn(rows, step, case.rows_per_step)[rank::processes]
            watch.saw([ids for ids, _ in mine])
            loss = model(**padded(mine)).loss
            accelerator.backward(loss)
            watch.gradients(lambda: {n: whole_gradient(p) for n, p in trained.items()})
            accelerator.clip_grad_norm_(list(trained.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss.item(), *count(mine))

    return run


def whole_gradient(parameter: Tensor) -> Tensor:
    """The gradient with the parts of all processes."""
    gradient = parameter.grad
    assert gradient is not None
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()


LAYOUTS = {
    "lorry": Layout(lambda: lorry("single"), "Lorry, one process", 1, True),
    "lorry-ddp": Layout(
        lambda: lorry("ddp"), "Lorry, ddp", 2, True, alone="lorry", plan=("ddp", 1)
    ),
    "lorry-fsdp": Layout(
        lambda: lorry("fsdp"), "Lorry, fsdp", 2, True, shards=2, alone="lorry", plan=("fsdp", 1)
    ),
    "lorry-tp": Layout(
        lambda: lorry("ddp", 3),
        "Lorry, tensor_parallel=3",
        3,
        True,
        shards=3,
        alone="lorry",
        plan=("ddp", 3),
    ),
    "accelerate": Layout(lambda: accelerate("ddp"), "accelerate + PEFT, one process", 1, False),
    "accelerate-ddp": Layout(
        lambda: accelerate("ddp"), "accelerate + PEFT, DDP", 2, False, alone="accelerate"
    ),
    "accelerate-fsdp": Layout(
        lambda: accelerate("fsdp"),
        "accelerate + PEFT, FSDP2",
        2,
        False,
        shards=2,
        alone="accelerate",
    ),
}
