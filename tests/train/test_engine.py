"""The loop: rates, evaluations, checkpoints, early stop, best and last, what it logs, whom it
tells, and what ends it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from lorry.adapters.spec import LoraSpec
from lorry.backends.optim import OptimSettings
from lorry.errors import ConfigError
from lorry.train import engine
from lorry.train.engine import TrainingEngine
from lorry.train.monitoring.events import StepRecord
from tests.support.seam import Fixed, examples
from tests.support.states import same
from tests.support.tinyrun import Heard, engine_for, evaluated, lines, quick, saved, steps  # noqa: F401 - a fixture

# --- the learning rate


class Rates(Heard):
    """What the optimizer itself was given, step by step: (rate of A, rate of B)."""

    def __init__(self) -> None:
        super().__init__()
        self.engine: TrainingEngine
        self.used: list[list[float]] = []

    def step(self, record: StepRecord) -> None:
        super().step(record)
        self.used.append([g.lr for g in self.engine.backend.optimizers["default"].stepped_groups])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "warmup"),
    [
        ("linear", {"warmup_steps": 3}),
        ("cosine", {"warmup_ratio": 0.2}),
        ("constant", {}),
        ("constant_with_warmup", {"warmup_steps": 2}),
    ],
)
def test_the_rate_of_every_step_is_that_of_transformers(
    kind: str, warmup: dict[str, Any], tmp_path: Path
) -> None:
    heard, n, base = Rates(), 9, 3e-3
    optim = OptimSettings(loraplus_lr_ratio=4.0)
    heard.engine = engine_for(
        Fixed(steps(n, 1)),
        tmp_path,
        listeners=[heard],
        optim=optim,
        learning_rate=base,
        lr_scheduler_type=kind,
        **warmup,
    )
    heard.engine.run()
    oracle = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    schedule = get_scheduler(
        kind,
        oracle,
        num_warmup_steps=2 if "warmup_ratio" in warmup else warmup.get("warmup_steps"),
        num_training_steps=n,
    )
    expected = []
    for _ in range(n):
        expected.append(schedule.get_last_lr()[0])
        oracle.step()
        schedule.step()
    assert [r["learning_rate"] for r in heard.steps] == expected
    assert heard.used == [[rate, 4.0 * rate] for rate in expected]


# --- when it evaluates and saves


def test_evaluation_every_few_steps_and_the_default_saves(tmp_path: Path) -> None:
    heard = Heard()
    found = engine_for(
        Fixed(steps(7)),
        tmp_path,
        listeners=[heard],
        eval_strategy="steps",
        eval_steps=3,
        save_steps=2,
        save_total_limit=None,
    ).run()
    assert evaluated(tmp_path) == [r["step"] for r in heard.evaluations] == [3, 6]
    # 3 and 6 were best when they came
    assert [s for s in saved(tmp_path) if s != 3] == [
        2,
        4,
        6,
        7,
    ]
    assert found.last_evaluation.keys() == {"eval_loss", "eval_perplexity", "eval_token_accuracy"}
    assert found.last_evaluation["eval_loss"] == lines(tmp_path)[-2]["eval_loss"]
    assert (heard.started, heard.finished, found.steps) == ([(0, 7)], 1, 7)


def test_epochs(tmp_path: Path) -> None:
    task = Fixed(steps(10))
    train = {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": None}
    engine_for(task, tmp_path, steps_per_epoch=4, **train).run()
    assert evaluated(tmp_path) == [4, 8, 10]
    assert saved(tmp_path) == [4, 8, 10]
    assert [line["epoch"] for line in lines(tmp_path) if "loss" in line] == [
        n / 4 for n in range(1, 11)
    ]


def test_nothing_is_saved_when_asked_not_to(tmp_path: Path) -> None:
    engine_for(
        Fixed(steps(3)), tmp_path, save_strategy="no", eval_strategy="steps", eval_steps=1
    ).run()
    assert not (tmp_path / "checkpoints").exists()


# --- best, last, early stop


class Scripted:
    """Evaluations as written, whatever the model says; remembers the adapter at each."""

    def __init__(
        self, values: list[float], patch: pytest.MonkeyPatch, name: str = "eval_loss"
    ) -> None:
        self.values, self.name = iter(values), name
        self.states: dict[int, dict[str, Tensor]] = {}
        self.engine: TrainingEngine
        patch.setattr(engine, "evaluate_task", lambda backend, task: self._next())

    def _next(self) -> dict[str, float]:
        self.states[self.engine.progress.step] = {
            n: t.clone() for n, t in self.engine.backend.state().items()
        }
        return {"eval_loss": 0.0, self.name: next(self.values)}


def scripted(
    values: list[float], patch: pytest.MonkeyPatch, folder: Path, n: int = 12, **train: Any
) -> tuple[Scripted, engine.RunOutcome]:
    script = Scripted(values, patch, train.get("metric_for_best_model", "eval_loss"))
    script.engine = engine_for(
        Fixed(steps(n, 1)), folder, eval_strategy="steps", learning_rate=1e-2, **train
    )
    return script, script.engine.run()


def test_early_stop_ends_with_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, found = scripted(
        [3.0, 2.0, 2.5, 2.0, 1.0],
        monkeypatch,
        tmp_path,
        eval_steps=2,
        early_stopping_patience=2,
        load_best_model_at_end=True,
    )
    assert (found.steps, found.best_step, found.stopped_early) == (8, 4, True)
    assert same(script.engine.backend.state(), script.states[4])
    assert not same(script.states[4], script.states[8])
    assert found.last_evaluation["eval_loss"] == 2.0
    assert saved(tmp_path) == [4, 8]


def test_without_it_the_last_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, found = scripted([3.0, 1.0, 2.0], monkeypatch, tmp_path, eval_steps=4)
    assert (found.steps, found.best_step, found.stopped_early) == (12, 8, False)
    assert same(script.engine.backend.state(), script.states[12])
    assert found.last_evaluation["eval_loss"] == 2.0


def test_the_best_and_the_last_outlive_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(
        [1.0, 2.0, 3.0, 4.0], monkeypatch, tmp_path, eval_steps=3, save_steps=2, save_total_limit=1
    )
    assert saved(tmp_path) == [3, 12]


def test_more_may_be_better_and_what_is_not_finite_never_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, found = scripted(
        [float("nan"), float("inf"), 0.5, 0.25],
        monkeypatch,
        tmp_path,
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_score",
        greater_is_better=True,
    )
    assert (found.best_step, found.last_evaluation["eval_score"]) == (9, 0.5)
    assert same(script.engine.backend.state(), script.states[9])


def test_the_best_of_a_run_that_moved_elsewhere_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed from another directory's checkpoint, behind that run's best step."""
    old, new = tmp_path / "old", tmp_path / "new"
    script, _ = scripted(
        [1.0, 2.0, 3.0], monkeypatch, old, eval_steps=4, save_steps=2, save_total_limit=None
    )
    again = Scripted([3.0], monkeypatch)
    again.engine = engine_for(
        Fixed(steps(12, 1)),
        new,
        eval_strategy="steps",
        eval_steps=4,
        learning_rate=1e-2,
        load_best_model_at_end=True,
    )
    again.engine.resume(old / "checkpoints" / "step-00000010")
    found = again.engine.run()
    assert found.best_step == 4
    assert same(again.engine.backend.state(), script.states[4])


def test_an_unknown_metric_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"'eval_rouge'; evaluation gives eval_loss, eval_perplexity, eval_token_accuracy",
    ):
        engine_for(
            Fixed(steps(2)),
            tmp_path,
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="rouge",
        ).run()


# --- what it computes and logs


def test_accumulation_is_a_bigger_batch(tmp_path: Path) -> None:
    rows = [examples(4, seed) for seed in range(8)]
    shapes = {
        "one": [[r] for r in rows],
        "two": [[r[:1], r[1:]] for r in rows],
        "four": [[[e] for e in r] for r in rows],
    }
    curves = {}
    for name, shape in shapes.items():
        engine_for(Fixed(shape), tmp_path / name, learning_rate=3e-3).run()
        curves[name] = [line["loss"] for line in lines(tmp_path / name)]
    assert curves["one"] == pytest.approx(curves["two"], rel=1e-6)
    assert curves["one"] == pytest.approx(curves["four"], rel=1e-6)
    assert len(set(curves["one"])) == 8


def test_a_line_of_the_log(tmp_path: Path) -> None:
    task = Fixed(steps(2, 3))
    engine_for(
        task, tmp_path, learning_rate=1e-3, warmup_steps=0, lr_scheduler_type="constant"
    ).run()
    first = lines(tmp_path)[0]
    rows = examples(3, 0)
    assert list(first) == [
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "supervised_tokens",
        "seconds",
        "peak_memory_bytes",
    ]
    assert first["step"] == 1
    assert first["tokens"] == sum(len(r.tokens) for r in rows)
    assert first["supervised_tokens"] == sum(w != 0 for r in rows for w in r.weights)
    assert first["loss"] == task.seen[0].loss["default"]
    assert first["grad_norm"] > 0
    assert first["seconds"] > 0
    assert first["peak_memory_bytes"] > 2**20


def test_several_jobs_log_one_line_each(tmp_path: Path) -> None:
    """A job without rows in a step is absent from that step's line, and neither steps nor counts in
    the mean.
    """
    task = Fixed([[examples(4, 0, lambda i: i % 2)], [examples(3, 1)]], ("a", "b"))
    engine_for(task, tmp_path, specs=[LoraSpec(r=2), LoraSpec(r=4)]).run()
    both, alone = lines(tmp_path)
    assert both["adapters"].keys() == {"a", "b"}
    assert both["loss"] == pytest.approx(
        (both["adapters"]["a"]["loss"] + both["adapters"]["b"]["loss"]) / 2
    )
    assert both["grad_norm"] == pytest.approx(
        sum(a["grad_norm"] ** 2 for a in both["adapters"].values()) ** 0.5
    )
    assert alone["adapters"].keys() == {"a"}
    assert alone["loss"] == alone["adapters"]["a"]["loss"]
