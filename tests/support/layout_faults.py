"""Faults made on purpose on one rank, rank 1 where nothing else is said, and how each ends on every
rank.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lorry.adapters.mix import AdapterContext, Mix
from lorry.backends.distributed.communicator import Communicator
from lorry.backends.distributed.ddp import DataParallelBackend
from lorry.backends.distributed.exchange import is_shared
from lorry.backends.local import LocalBackend
from lorry.backends.protocol import Task, term_totals
from lorry.data.batch import Batch
from lorry.disk import durable
from lorry.errors import LorryError
from lorry.models.causal_lm import PackedInput
from lorry.models.scoring.score import evaluate_wants
from lorry.train.finish import contract_targets
from tests.support.layouts import ONE, RATE, sharded, steps_of, uneven
from tests.support.seam import Fixed
from tests.support.tinyrun import engine_for


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
    return endings(
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
    """`faults` of passes through a frozen base that is cut over the ranks."""
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

    return endings(
        communicator,
        out,
        {
            "fsdp one more pass": lambda d: run(d, one_more_pass),
            "fsdp broken layer": lambda d: run(d, broken_layer),
            "fsdp own backward": own_backward,
            "fsdp other share": lambda d: run(d, other_share),
        },
    )


def endings(
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
