"""Tasks that train something else than one adapter on rows, on ranks that share the models, from beginning
to end in float64: a router over frozen experts, as `lorry moe` trains it, and a student of a teacher that
is shared, too. `test_layout_runs.py` has their whole commands in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.router import ROUTER_NAME, RoutingRule, attach_router
from lorry.adapters.spec import LoraSpec
from lorry.backends.distributed.ddp import DataParallelBackend, SharedScorer
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.backends.protocol import ScoringBackend
from lorry.data.batch import Batch, collate
from lorry.data.stream.joint import JointStream
from lorry.models.causal_lm import CausalLM
from lorry.models.loading.load import load_model
from lorry.models.loading.store import save_model
from lorry.notes import ignore_note
from lorry.tasks.distill.task import DistillObjective, DistillTask, LiveTeacher, TeacherReader
from lorry.tasks.distill.teacher import TeacherScorer
from tests.support.layouts import ALPHA, ONE, RATE, STEPS, steps_of, uneven
from tests.support.seam import Fixed, tiny_llama
from tests.support.threads import ThreadCommunicator, ThreadRanks, on_mesh
from tests.support.tiny import one_thread  # noqa: F401 - a fixture

EXPERTS = ("x", "y", "z")
Communicator, Ranks = ThreadCommunicator | None, ThreadRanks | None


class Training(NamedTuple):
    """Losses and norms of all steps, and what trains at the end."""

    losses: Tensor
    norms: Tensor
    values: Tensor


@pytest.fixture(autouse=True)
def no_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tests of their own."""
    monkeypatch.setenv("LORRY_PROOFS", "0")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 0), ("teacher", 7)):
        save_model(tiny_llama(seed), folder / name)
    return folder


def opened(folder: Path, ranks: Ranks) -> CausalLM:
    return load_model(
        folder, dtype=torch.float64, device="cpu", ranks=ranks, add_note=ignore_note
    ).model


def backend_of(model: CausalLM, name: str, communicator: Communicator) -> LocalBackend:
    if communicator is None:
        return LocalBackend(model, [name], OptimSettings())
    return DataParallelBackend(model, [name], OptimSettings(), communicator=communicator)


def equal(work: Callable[[Communicator, Ranks], Training], mesh: tuple[int, int]) -> None:
    """The bounds of float64: masters are fp32."""

    def relative(got: Tensor, true: Tensor) -> float:
        return float((got.double() - true.double()).norm() / true.double().norm())

    one = work(None, None)
    assert float(one.norms.min()) > 0
    for rank in on_mesh(*mesh, work):
        assert relative(rank.losses[0], one.losses[0]) < 1e-9
        assert relative(rank.norms[0], one.norms[0]) < 1e-6
        assert relative(rank.values, one.values) < 1e-6


@pytest.mark.parametrize(("level", "mesh"), [("delta", (1, 2)), ("expert", (2, 2))])
def test_a_router_over_experts(models: Path, level: str, mesh: tuple[int, int]) -> None:
    def work(communicator: Communicator, ranks: Ranks) -> Training:
        model = opened(models / "student", ranks)
        targets = ["gate_proj", "up_proj", "down_proj"]
        spec = LoraSpec(r=2, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False)
        for seed, name in enumerate(EXPERTS):
            attach(model, spec, name, seed=seed).freeze()
        rule = RoutingRule(top_k=2, level=level)  # type: ignore[arg-type]
        router = attach_router(model, EXPERTS, rule)
        # away from the zeros it begins with, where every token has the same experts
        draw = torch.Generator().manual_seed(2)
        router.values.copy_(torch.randn(router.values.shape, generator=draw) * 0.3)
        backend = backend_of(model, ROUTER_NAME, communicator)
        task = Fixed(steps_of(uneven), [ROUTER_NAME])
        made = steps(backend, lambda step: task.step_batches(step, {}), task)
        return Training(*made, router.values.clone())

    equal(work, mesh)


class Rows:
    """A stream of `uneven` rows."""

    def total_steps(self, epochs: float, max_steps: int | None = None) -> int:
        return STEPS

    def epoch_of(self, step: int) -> int:
        return 0

    def batches(self, step: int) -> list[Batch]:
        return [collate(rows) for rows in uneven(step)]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


@pytest.mark.parametrize(("k", "mesh"), [(None, (2, 2)), (9, (1, 2))], ids=["whole", "top k"])
def test_a_student_of_a_teacher(models: Path, k: int | None, mesh: tuple[int, int]) -> None:
    """Over the whole vocabulary, and over the teacher's likeliest tokens, which it keeps in fp32."""

    def work(communicator: Communicator, ranks: Ranks) -> Training:
        student = opened(models / "student", ranks)
        attach(student, ONE["default"])
        backend = backend_of(student, "default", communicator)
        frozen = TeacherScorer(opened(models / "teacher", ranks), Mix.none())
        shared = frozen if communicator is None else SharedScorer(frozen, communicator)
        known: dict[str, ScoringBackend] = {"self": backend, "teacher": shared}
        aim = DistillObjective("kl", 1.7, ce=0.3, weight=0.7)
        teacher = LiveTeacher(aim, frozen.head(aim.temperature), TeacherReader(mix=frozen.mix), k)
        stream = JointStream({"default": Rows()}, {"default": 0}, 1 << 20)
        task = DistillTask(stream, [], STEPS, ["default"], aim=aim, teacher=teacher, models=known)
        made = steps(backend, lambda step: task.step_batches(step, known), task)
        whole = get_bank(student)["default"]
        values = whole.whole_tensors(whole.values).values()
        return Training(*made, torch.cat([each.detach().flatten() for each in values]))

    equal(work, mesh)


def steps(
    backend: LocalBackend, batches: Callable[[int], list[Batch]], task: object
) -> tuple[Tensor, Tensor]:
    """Losses and norms of `STEPS` steps."""
    losses, norms = list[float](), list[float]()
    (name,) = backend.trained
    for step in range(STEPS):
        losses.append(backend.forward_backward(batches(step), task, step).loss[name])  # type: ignore[arg-type]
        norms.append(backend.step({name: RATE}).norms[name])
    return torch.tensor(losses).double(), torch.tensor(norms).double()
