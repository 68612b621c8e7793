"""Distillation as a task: its two means against plain torch, runs whose divergence falls, and what
is not 0 when off by one.

The teacher and the student are tiny models; the reference is autograd in float64 over whole logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.spec import LoraSpec
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.backends.protocol import ScoringBackend
from lorry.data.batch import Batch, TokenizedExample, collate
from lorry.data.stream.joint import JointStream
from lorry.evaluate.loss import evaluate_task
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.model import Decoder
from lorry.models.scoring.score import FinalHidden, evaluate_wants
from lorry.tasks.distill.align import TeacherView, sequence_digest
from lorry.tasks.distill.task import (
    TAUGHT_MASK,
    DistillObjective,
    DistillTask,
    DistillTeacher,
    LiveTeacher,
    TeacherReader,
)
from lorry.tasks.distill.teacher import TeacherScorer
from tests.support.seam import examples, tiny_llama
from tests.support.tinyrun import engine_for, lines, quick  # noqa: F401

TAU = 1.7


class Rows:
    """A stream that gives the same micro-batches at every step."""

    def __init__(self, batches: Sequence[Sequence[TokenizedExample]]) -> None:
        self.given = [collate(rows) for rows in batches]

    def total_steps(self, epochs: float, max_steps: int | None = None) -> int:
        return 100

    def epoch_of(self, step: int) -> int:
        return 0

    def batches(self, step: int) -> list[Batch]:
        return list(self.given)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


def task_of(
    teacher: DistillTeacher,
    aim: DistillObjective,
    batches: Sequence[Sequence[TokenizedExample]],
    models: Mapping[str, ScoringBackend],
    steps: int = 12,
) -> DistillTask:
    stream = JointStream({"default": Rows(batches)}, {"default": 0}, 1 << 20)
    held = [collate(examples(3, seed=50))]
    return DistillTask(stream, held, steps, ["default"], aim=aim, teacher=teacher, models=models)


def live(aim: DistillObjective, frozen: TeacherScorer, **reader: Any) -> LiveTeacher:
    k = reader.pop("k", None)
    return LiveTeacher(
        aim, frozen.head(aim.temperature), TeacherReader(**{"mix": frozen.mix, **reader}), k
    )


def student(seed: int = 0, *, drawn: bool = True) -> LocalBackend:
    model = tiny_llama(seed).double()
    attach(model, LoraSpec(r=3, init_lora_weights=not drawn), "default", seed=4)
    return LocalBackend(model, ["default"], OptimSettings())


def logits_of(model: Decoder, example: TokenizedExample, mix: Mix) -> Tensor:
    hidden = model.hidden(PackedInput.of([list(example.tokens)]), AdapterContext(mix)).last
    return model.logits(hidden, AdapterContext(mix))


@pytest.mark.parametrize("k", [None, 9], ids=["whole", "top k"])
def test_the_loss_is_the_mean_of_both_over_the_answers(k: int | None) -> None:
    """0.3 CE + 0.7 tau^2 KL(q || p), over two micro-batches, against sequences run one by one; and the adapter's gradient."""
    backend, frozen = student(), TeacherScorer(tiny_llama(7).double(), Mix.none())
    batches, aim = (
        [examples(3, seed=1), examples(2, seed=2)],
        DistillObjective("kl", TAU, ce=0.3, weight=0.7),
    )
    models = {"self": backend, "teacher": frozen}
    task = task_of(live(aim, frozen, k=k), aim, batches, models)
    stats = backend.forward_backward(task.step_batches(0, models), task, 0)
    got = get_bank(backend.model)["default"].grads.double().clone()

    nll = kl = torch.zeros((), dtype=torch.float64)
    count = 0.0
    for example in [e for rows in batches for e in rows]:
        z, teacher = (
            logits_of(backend.model, example, Mix.one("default")),
            logits_of(frozen.model, example, Mix.none()),
        )
        for t, weight in enumerate(example.weights):
            if weight:
                nll = nll - weight * z[t - 1].log_softmax(0)[example.tokens[t]]
                p, q = (z[t - 1] / TAU).softmax(0), (teacher[t - 1].detach() / TAU).softmax(0)
                if k:
                    near = q.topk(k).indices
                    p, q = (torch.cat([x[near], 1 - x[near].sum()[None]]) for x in (p, q))
                kl = kl + weight * (q * (q / p).log()).sum()
                count += weight
    expected = 0.3 * nll / count, 0.7 * TAU**2 * kl / count
    assert stats.terms["nll"]["default"] == pytest.approx(float(expected[0].detach()), rel=1e-9)
    # top k is kept in fp32
    assert stats.terms["distill"]["default"] == pytest.approx(
        float(expected[1].detach()), rel=1e-5 if k else 1e-9
    )
    adapter = get_bank(backend.model)["default"]
    adapter.grads.zero_()
    sum(expected).backward()
    assert (got - adapter.grads.double()).norm() < (
        1e-5 if k else 1e-6
    ) * got.norm()  # the gradients are fp32


def test_final_is_what_the_head_reads() -> None:
    model, batch = tiny_llama().double(), collate(examples(3, seed=1))
    hidden = evaluate_wants(model, batch, {"hidden": FinalHidden()}, AdapterContext())["hidden"]
    for (start, stop), example in zip(batch.segments, examples(3, seed=1), strict=True):
        assert torch.allclose(
            model.head.weight @ hidden[start:stop].t(),
            logits_of(model, example, Mix.none()).t(),
            atol=1e-12,
        )


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "jsd", "uld"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_and_one_token_off_it_has(
    loss: str,
) -> None:
    """The same adapter on the same base as a second model: D and its gradient are 0. Read one token
    late, they are not.
    """
    backend, twin, aim = student(), student(), DistillObjective(loss, TAU, ce=0.0, weight=1.0)
    frozen, rows = TeacherScorer(twin.model, Mix.one("default")), [examples(4, seed=1)]
    models = {"self": backend, "teacher": frozen}

    def late(example: TokenizedExample) -> TeacherView:
        targets = [t for t, w in enumerate(example.weights) if w]
        return TeacherView(example.tokens, targets, targets)

    shifted = {sequence_digest(e.tokens, e.weights): late(e) for e in rows[0]}
    for views, at_rest in ((None, True), (shifted, False)):
        task = task_of(live(aim, frozen, views=views), aim, rows, models)
        stats = backend.forward_backward(task.step_batches(0, models), task, 0)
        norm = backend.discard().norms["default"]
        assert (abs(stats.loss["default"]) < 1e-9) == at_rest
        assert (norm < 1e-6) == at_rest
        assert at_rest or stats.loss["default"] > 0.01


def test_the_teacher_may_be_the_base_with_another_adapter() -> None:
    """A mix of the student's own model scores as a second model would."""
    backend, alone = student(), tiny_llama().double()
    for model in (backend.model, alone):
        attach(model, LoraSpec(r=2, init_lora_weights=False), "teacher", seed=9)
    aim, rows = DistillObjective("kl", TAU, ce=0.0, weight=1.0), [examples(4, seed=1)]
    losses = []
    for frozen, models in (
        (TeacherScorer(backend.model, Mix.one("teacher")), {"self": backend}),
        (
            TeacherScorer(alone, Mix.one("teacher")),
            {"self": backend, "teacher": TeacherScorer(alone, Mix.one("teacher"))},
        ),
    ):
        task = task_of(live(aim, frozen), aim, rows, models)
        losses.append(
            backend.forward_backward(task.step_batches(0, models), task, 0).loss["default"]
        )
        backend.discard()
    assert losses[0] == losses[1] > 0.01


@pytest.mark.parametrize("k", [None, 5], ids=["whole", "top k"])
def test_what_the_teacher_cannot_read_is_learnt_from_the_data_alone(k: int | None) -> None:
    """Rows longer than the teacher's context have weight 0 in D and full weight in CE; a batch of
    them alone still runs.
    """
    backend, frozen, aim = (
        student(),
        TeacherScorer(tiny_llama(7).double(), Mix.none()),
        DistillObjective("kl", 1.0),
    )
    rows = examples(6, seed=1)
    limit = sorted(len(e.tokens) for e in rows)[2]
    short = [e for e in rows if len(e.tokens) <= limit]
    models = {"self": backend, "teacher": frozen}
    both = task_of(live(aim, frozen, k=k, context=limit), aim, [rows], models)
    only = task_of(live(aim, frozen, k=k), aim, [short], models)
    none = task_of(live(aim, frozen, k=k, context=1), aim, [rows], models)
    found = []
    for task in (both, only, none):
        found.append(backend.forward_backward(task.step_batches(0, models), task, 0).terms)
        backend.discard()
    assert found[0]["distill"]["default"] == pytest.approx(found[1]["distill"]["default"], rel=1e-6)
    assert found[0]["nll"]["default"] == pytest.approx(found[2]["nll"]["default"], rel=1e-12)
    assert found[2]["distill"]["default"] == 0.0
    taught = both.step_batches(0, models)[0]
    assert taught.extra[TAUGHT_MASK].values.sum() == sum(sum(map(bool, e.weights)) for e in short)
    assert taught.terms["distill"].item() == sum(sum(e.weights) for e in short)


def test_held_out_rows_are_scored_once_and_for_all() -> None:
    backend, frozen, aim = (
        student(),
        TeacherScorer(tiny_llama(7).double(), Mix.none()),
        DistillObjective("jsd", 1.0),
    )
    models = {"self": backend, "teacher": frozen}
    task = task_of(live(aim, frozen), aim, [examples(2, seed=1)], models)
    found = evaluate_task(backend, task)
    assert found["eval_loss"] == pytest.approx(found["eval_nll"] + found["eval_distill"])
    assert found["eval_distill"] > 0
    frozen.score = None  # type: ignore[assignment,method-assign]  # nobody asks it again
    assert evaluate_task(backend, task) == found


@pytest.mark.parametrize(
    "aim",
    [
        DistillObjective("kl", 1.2, ce=0.02),
        DistillObjective("uld", 1.2, ce=0.02),
        DistillObjective("reverse_kl", 2.0, ce=0.0, weight=1.0),
    ],
    ids=lambda a: a.loss,
)
def test_training_brings_the_student_to_its_teacher(tmp_path: Path, aim: DistillObjective) -> None:
    """Through the engine, its contracts included: the divergence falls by half; a second run is the
    same to the bit.
    """
    curves = []
    for run in ("a", "b"):
        frozen = TeacherScorer(tiny_llama(0), Mix.one("teacher"))
        attach(
            frozen.model, LoraSpec(r=2, lora_alpha=40, init_lora_weights=False), "teacher", seed=9
        )
        task = task_of(live(aim, frozen), aim, [examples(6, seed=1)], {"teacher": frozen}, steps=30)
        engine = engine_for(task, tmp_path / run, learning_rate=3e-2, save_strategy="no")
        engine.models["teacher"] = frozen
        engine.run()
        curves.append([line.get("loss_distill", line["loss"]) for line in lines(tmp_path / run)])
    assert curves[0] == curves[1]
    assert curves[0][-1] < 0.5 * curves[0][0]
