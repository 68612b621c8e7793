"""Every unlearning method's loss and adapter gradient against transformers in float64, one row at a
time (`tests/support/unlearning.py`), however the rows are packed and accumulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from lorry.backends.protocol import StepStats
from lorry.data.batch import Batch, TokenizedExample, collate
from lorry.errors import ConfigError, DataError, ModelError
from lorry.evaluate.loss import evaluate_task
from lorry.models.decoder.model import Decoder
from lorry.tasks.unlearn.methods.method import StartModel
from lorry.tasks.unlearn.methods.registry import METHOD_CLASSES, make_method
from lorry.tasks.unlearn.methods.steering import steering_direction
from lorry.tasks.unlearn.reference import CachedReference, LiveReference
from lorry.tasks.unlearn.settings import resolve_settings
from lorry.tasks.unlearn.task import UnlearnTask
from tests.support import unlearning as twin
from tests.support.unlearning import LAYER, Row, Seen, Twin, ragged_rows, twin_model

WIDTH, SEED = 32, 7
Loss = Callable[[Sequence[Seen]], Tensor]


@dataclass(frozen=True)
class Case:
    """A method with settings; its forget and retain terms in the twin, with their factors."""

    method: str
    forget: Loss
    retain: Loss | None = None
    gamma: float = 1.0
    alpha: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def loss(self, seen: Sequence[Seen]) -> Tensor:
        total = self.gamma * self.forget(seen)
        return total if self.retain is None else total + self.alpha * self.retain(seen)


U = steering_direction(WIDTH, SEED).double()
CASES = {
    "GradAscent": Case("GradAscent", twin.ascent),
    "GradDiff": Case("GradDiff", twin.ascent, twin.retain_nll),
    "GradDiff KL": Case("GradDiff", twin.ascent, twin.retain_kl, 0.7, 1.3,
        {"retain_loss": "KL", "gamma": 0.7, "alpha": 1.3}),
    "KL": Case("KL", twin.ascent, twin.retain_kl),
    "NPO": Case("NPO", twin.npo, twin.retain_nll),
    "NPO KL": Case("NPO", twin.npo, twin.retain_kl, settings={"retain_loss": "KL"}),
    "NPO EMBED": Case("NPO", lambda s: twin.npo(s, 0.5), twin.retain_embed, 1.0, 2.0,
        {"retain_loss": "EMBED", "layer": LAYER, "beta": 0.5, "alpha": 2.0}),
    "NPO alone": Case("NPO", twin.npo, settings={"alpha": 0.0}),
    "SimNPO": Case("SimNPO", twin.simnpo, twin.retain_nll, 0.125),
    "SimNPO alone": Case("SimNPO", lambda s: twin.simnpo(s, 2.5, 4.8), None, 0.125,
        settings={"beta": 2.5, "delta": 4.8, "alpha": 0.0}),
    "DPO": Case("DPO", twin.dpo, twin.retain_nll),
    "IdkDPO": Case("IdkDPO", lambda s: twin.dpo(s, 0.3), twin.retain_kl,
        settings={"beta": 0.3, "retain_loss": "KL"}),
    "AltPO": Case("AltPO", twin.dpo, twin.retain_nll, alpha=2.0, settings={"alpha": 2.0}),
    "RMU": Case("RMU", twin.rmu(U), twin.retain_embed, settings={"layer": LAYER}),
    "RMU adaptive": Case("RMU", twin.rmu(U, adaptive=True), twin.retain_nll,
        settings={"layer": LAYER, "adaptive": True, "retain_loss": "NLL"}),
    "UNDIAL": Case("UNDIAL", twin.undial),
    "UNDIAL retain": Case("UNDIAL", lambda s: twin.undial(s, 3.0), twin.retain_kl, alpha=0.5,
        settings={"alpha": 0.5, "beta": 3.0, "retain_loss": "KL"}),
    "CEU": Case("CEU", twin.ceu),
    "CEU 0": Case("CEU", lambda s: twin.ceu(s, 0), settings={"ignore_first_n_answer_tokens": 0}),
    "WGA": Case("WGA", twin.wga, twin.retain_nll),
    "SatImp": Case("SatImp", twin.satimp, twin.retain_nll, 0.1),
    "WGA alone": Case("WGA", lambda s: twin.wga(s, 0.5), settings={"beta": 0.5, "alpha": 0.0}),
    "SatImp alone": Case("SatImp", lambda s: twin.satimp(s, 0.3, 2.0),
        settings={"beta1": 0.3, "beta2": 2.0, "alpha": 0.0, "gamma": 1.0}),
    "PDU": Case("PDU", twin.pdu, lambda s: twin.retain_nll(s) - 0.3, alpha=50.0,
        settings={"retain_loss_eps": 0.3}),
    "PDU KL": Case("PDU", twin.pdu, lambda s: twin.retain_kl(s) - 0.2, alpha=3.0,
        settings={"retain_loss_eps": 0.2, "retain_loss": "KL", "alpha": 3.0}),
    "IHL": Case("IHL", twin.ihl, twin.retain_nll),
    "ME": Case("ME", twin.me, twin.retain_kl, 0.1, settings={"retain_loss": "KL"}),
    "IdkAP": Case("IdkAP", twin.idk_learnt, twin.answer_preserved),
    "IdkAP sharp": Case("IdkAP", twin.idk_learnt, lambda s: twin.answer_preserved(s, 0.7), 0.4, 2.0,
        {"beta": 0.7, "gamma": 0.4, "alpha": 2.0}),
    "IdkAP alone": Case("IdkAP", twin.idk_learnt, settings={"alpha": 0.0}),
    "JensUn": Case("JensUn", twin.jensun, twin.retain_jsd),
    "JensUn alone": Case("JensUn", twin.jensun, gamma=0.5, settings={"gamma": 0.5, "alpha": 0.0}),
    "peer KL": Case("KL", twin.ascent, twin.peer_kl, settings={"peer_masks": True}),
    "peer UNDIAL": Case("UNDIAL", twin.peer_undial, settings={"peer_masks": True}),
    "peer PDU": Case("PDU", twin.peer_pdu, lambda s: twin.retain_nll(s) - 0.3, alpha=50.0,
        settings={"retain_loss_eps": 0.3, "peer_masks": True}),
}  # fmt: skip
SHAPES = {"packed": 1, "accumulated": 4}


class Rows:
    """A stream whose every step is the same rows, as so many micro-batches. ``adapters``: rows of
    each."""

    def __init__(
        self, rows: Sequence[Sequence[Row]], micro_batches: int, roles: Sequence[str]
    ) -> None:
        examples = [
            TokenizedExample(
                r.tokens,
                r.weights,
                key=1000 * k + i,
                adapter=k,
                role=twin.IDK if r.kind == twin.RETAIN_IDK else r.kind,
                group=1000 * k + r.group,
            )
            for k, own in enumerate(rows)
            for i, r in enumerate(own)
            if r.kind in roles
        ]
        groups = sorted({e.group for e in examples})
        # what belongs together shares a micro-batch
        self.made = [
            collate(chosen)
            for m in range(micro_batches)
            if (chosen := [e for e in examples if groups.index(e.group) % micro_batches == m])
        ]

    def batches(self, step: int) -> list[Batch]:
        return self.made

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        assert state == {}


def roles_of(method: str) -> list[str]:
    found, of = [twin.FORGET, twin.RETAIN], METHOD_CLASSES[method]
    found += [twin.IDK] if of.needs_alternates else []
    return found + ([twin.RETAIN_IDK] if of.needs_retain_alternates else [])


def backend_of(model: Decoder, names: Sequence[str] = ("default",), **spec: Any) -> LocalBackend:
    options = {"r": 3, "init_lora_weights": False, "target_modules": "all-linear", **spec}
    for i, name in enumerate(names):
        attach(model, LoraSpec(**options), name, seed=i)
    return LocalBackend(model, names, OptimSettings(max_grad_norm=0.0))


def start_of(model: Decoder, seeds: Sequence[int] = (SEED,)) -> StartModel:
    head = lambda hidden: model.logits(hidden, AdapterContext(Mix.none()))  # noqa: E731
    return StartModel(WIDTH, seeds, head)


def task_of(
    local: LocalBackend,
    method: str,
    settings: Sequence[Mapping[str, Any]],
    rows: Sequence[Sequence[Row]],
    micro_batches: int = 1,
) -> UnlearnTask:
    assert isinstance(local.model, Decoder)
    seeds = [SEED + k for k in range(len(settings))]
    made = make_method(method, settings, start_of(local.model, seeds))
    kept = (twin.RETAIN, twin.RETAIN_IDK)
    roles = [r for r in roles_of(method) if made.retains or r not in kept]
    stream: Any = Rows(rows, micro_batches, roles)
    reference = LiveReference(Mix.none())
    names = list(local.trained)
    return UnlearnTask(stream, [], 9, names, method=made, reference=reference, models={})


def measure(local: LocalBackend, task: UnlearnTask) -> tuple[StepStats, list[Tensor]]:
    """One step's statistics, and each adapter's gradient."""
    batches = task.step_batches(0, {"self": local})
    stats = local.forward_backward(batches, task, 0)
    found = [local.bank[name].grads.double().clone() for name in local.trained]
    local.discard()
    return stats, found


def flat_gradient(
    local: LocalBackend, name: str, found: Mapping[str, tuple[Tensor, Tensor]]
) -> Tensor:
    """The twin's gradient in the order of the adapter's flat buffer."""
    adapter = get_bank(local.model)[name]
    flat = torch.zeros_like(adapter.grads, dtype=torch.float64)
    for tensor, view in adapter.split_like(flat).items():
        path, _, which = tensor.rpartition(".lora_")
        view.copy_(found[path]["AB".index(which[0])])
    return flat


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[LocalBackend, Twin, list[Seen], list[Row]]:
    theirs, ours = twin_model(tmp_path_factory.mktemp("twin"))
    local = backend_of(ours)
    rows, plain = ragged_rows(), Twin(theirs, ours, "default")
    return local, plain, [plain.see(row) for row in rows], rows


Models = tuple[LocalBackend, Twin, list[Seen], list[Row]]


@pytest.mark.parametrize("micro_batches", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name: str, micro_batches: int, models: Models) -> None:
    local, plain, seen, rows = models
    case = CASES[name]
    stats, (mine,) = measure(
        local, task_of(local, case.method, [case.settings], [rows], micro_batches)
    )
    loss = case.loss(seen)
    exact = flat_gradient(local, "default", plain.gradient(loss))
    assert stats.loss["default"] == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-6)
    assert stats.terms["forget"]["default"] == pytest.approx(
        float(case.gamma * case.forget(seen).detach()), rel=1e-6
    )
    assert exact.norm() > 1e-4
    assert float((mine - exact).norm() / exact.norm()) < 1e-5


def test_all_gradients_differ(models: Models) -> None:
    local, _, _, rows = models
    found = {
        n: measure(local, task_of(local, c.method, [c.settings], [rows]))[1][0]
        for n, c in CASES.items()
        # beside retain rows these say next to nothing to a model that never knew the answers
        if n not in ("SimNPO", "WGA", "SatImp")
    }
    for a, one in found.items():
        for b, other in found.items():
            alike = float((one - other).norm() / one.norm()) < 1e-6
            assert alike == (a == b), (a, b)


def test_two_jobs_with_settings_of_their_own_are_two_runs(tmp_path: Path) -> None:
    """Both adapters in one batch, with other numbers, seeds, rows and multipliers."""
    _, ours = twin_model(tmp_path)
    names = ("a", "b")
    local = backend_of(ours, names)
    rows = [ragged_rows(1, pairs=2), ragged_rows(2, pairs=3)]
    for method, own in {
        "NPO": [{"beta": 0.1, "gamma": 0.5}, {"beta": 0.5, "alpha": 2.0}],
        "DPO": [{"beta": 0.1}, {"beta": 0.7}],
        "UNDIAL": [{"beta": 10.0}, {"beta": 2.0}],
        "SatImp": [{"beta1": 1.0}, {"beta2": 0.5}],
        "RMU": [{"layer": LAYER}, {"layer": LAYER, "steering_coeff": 9.0}],
        "PDU": [{"retain_loss_eps": 0.3}, {"retain_loss_eps": 4.0, "alpha": 2.0}],
        "IdkAP": [{"beta": 0.1}, {"beta": 0.7, "alpha": 2.0}],
        "JensUn": [{}, {"gamma": 0.3}],
    }.items():
        stats, together = measure(local, task_of(local, method, own, rows))
        for k, name in enumerate(names):
            # the other job's rows are left out; its settings, and so the numbering, stay
            apart = [r if i == k else [] for i, r in enumerate(rows)]
            alone, gradients = measure(local, task_of(local, method, own, apart))
            assert alone.present == {name}
            assert stats.loss[name] == pytest.approx(alone.loss[name], rel=1e-6)
            assert torch.allclose(together[k], gradients[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "micro_batches"),
    [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 4)],
    ids=str,
)
def test_before_the_first_step_policy_is_the_start(
    dtype: torch.dtype, micro_batches: int, tmp_path: Path
) -> None:
    """B is zero: NPO's loss is (2/beta) log 2, DPO's too, and KL and EMBED retain nothing, to the
    bit or a rounding of the log-sigmoid, in bfloat16 too."""
    _, ours = twin_model(tmp_path, dtype)
    local = backend_of(ours, init_lora_weights=True, lora_dropout=0.1)
    rows = ragged_rows(3)

    def terms(method: str, **settings: Any) -> dict[str, float]:
        stats, _ = measure(local, task_of(local, method, [settings], [rows], micro_batches))
        return {term: values["default"] for term, values in stats.terms.items()}

    for beta in (0.1, 4.5):
        for method in ("NPO", "DPO"):
            found = terms(method, beta=beta, retain_loss="EMBED", layer=LAYER)
            assert found["forget"] == pytest.approx(2 / beta * math.log(2), rel=3e-7), method
            assert found["retain"] == 0.0
    assert abs(terms("KL")["retain"]) < 1e-6
    assert abs(terms("JensUn")["retain"]) < 1e-6
    assert 0 < terms("JensUn")["forget"] <= math.log(2)
    assert terms("RMU", layer=LAYER)["retain"] == 0.0


def test_rmu_runs_and_trains_nothing_above_its_layer(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, _, _, rows = models
    task = task_of(local, "RMU", [{"layer": LAYER}], [rows])
    assert task.method.highest_layer == LAYER
    monkeypatch.setattr(local.model.head, "forward", None)
    _, (gradient,) = measure(local, task)
    for name, part in local.bank["default"].split_like(gradient).items():
        above = int(name.split(".")[2]) > LAYER
        assert (float(part.norm()) == 0) == above, name
    assert make_method("RMU", [{"retain_loss": "KL"}], start_of(local.model)).highest_layer is None


def test_retain_nll_of_kl_is_reported_and_no_part_of_the_loss(models: Models) -> None:
    local, _, seen, rows = models
    for micro_batches in SHAPES.values():
        stats, _ = measure(local, task_of(local, "KL", [{}], [rows], micro_batches))
        terms = {term: values["default"] for term, values in stats.terms.items()}
        assert terms["retain_nll"] == pytest.approx(float(twin.retain_nll(seen).detach()), rel=1e-6)
        assert stats.loss["default"] == pytest.approx(terms["forget"] + terms["retain"])


def test_held_out_rows_have_the_same_terms_and_loss(models: Models) -> None:
    """`evaluate_task`, with the start asked about them once; what is reported is no part there
    either."""
    local, _, seen, rows = models
    task = task_of(local, "KL", [{}], [rows])
    held = UnlearnTask(
        task.stream, task.stream.batches(0), 9, task.adapters,
        method=task.method, reference=task.reference, models={"self": local},
    )  # fmt: skip
    found = evaluate_task(local, held)
    assert found["eval_loss"] == pytest.approx(float(CASES["KL"].loss(seen).detach()), rel=1e-5)
    assert found["eval_retain_nll"] == pytest.approx(float(twin.retain_nll(seen).detach()))


def test_pdu_adapts_lambda_from_the_step_it_saw(models: Models) -> None:
    """By hand: lambda = max(0, lambda + 2 (L_r - eps)), from the second epoch of three steps on."""
    local, _, seen, rows = models
    level = float(twin.retain_nll(seen).detach())
    for upon, eps, expected in [
        ("step", level - 1.5, [4, 4, 4, 7, 10, 13]),
        ("step", level + 1.5, [4, 4, 4, 1, 0, 0]),
        ("epoch", level - 1.5, [4, 4, 4, 4, 4, 7]),
    ]:
        own = {"retain_loss_eps": eps, "alpha": 4.0, "dual_step_size": 2.0,
               "dual_warmup_epochs": 1, "dual_update_upon": upon}  # fmt: skip
        task = task_of(local, "PDU", [own], [rows])
        task.epoch_of = {"default": lambda step: step // 3}
        got, terms = [4.0], []
        for _ in expected:
            stats, _ = measure(local, task)
            # what this step's gradient was made with: what it adapts counts from the next one on
            assert stats.terms["lambda"]["default"] == pytest.approx(got[-1], rel=1e-6, abs=1e-6)
            task.after_step(stats)
            got.append(task.state()["method"]["multipliers"][0])
            terms.append(stats.terms["retain"]["default"])
            assert stats.terms["retain_loss"]["default"] == pytest.approx(level, rel=1e-6)
        assert got[1:] == pytest.approx(expected, abs=1e-5)
        assert terms[-1] == pytest.approx(got[-2] * (level - eps), abs=1e-4)
        other = task_of(local, "PDU", [own], [rows])
        other.load_state(task.state())
        assert other.state() == task.state()
    with pytest.raises(ModelError, match="1 multipliers"):
        other.load_state({**task.state(), "method": {"multipliers": [], "seen": []}})
    with pytest.raises(ModelError, match="no state"):
        task_of(local, "NPO", [{}], [rows]).load_state(task.state())


def test_a_cached_start_says_what_a_live_one_does(models: Models) -> None:
    local, _, _, rows = models
    for method in ("NPO", "UNDIAL", "DPO", "KL"):
        live = task_of(local, method, [{}], [rows], 2)
        cached = task_of(local, method, [{}], [rows], 4)
        memory = cached.reference = CachedReference(Mix.none())
        for batch in cached.stream.batches(0):
            made = cached.method.prepare(batch)
            memory.read(made, cached.method.reference_wants(made), local)
        assert torch.allclose(
            measure(local, live)[1][0], measure(local, cached)[1][0], rtol=1e-4, atol=1e-7
        )
    empty = task_of(local, "NPO", [{}], [rows])
    empty.reference = CachedReference(Mix.none())
    with pytest.raises(DataError, match="were not scored before training"):
        measure(local, empty)


def test_a_forget_row_needs_one_alternate_in_its_group(models: Models) -> None:
    local, _, _, rows = models
    kept = [r for r in rows if r.kind != twin.IDK or r.group != 1]
    with pytest.raises(DataError, match=r"key 4 has 0 alternate answers"):
        measure(local, task_of(local, "DPO", [{}], [kept]))


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("NP0", {}, r"unlearn.method='NP0'.*NPO"),
        ("GradDiff", {"beta": 0.1}, r"unlearn.beta: GradDiff does not use it.*NPO"),
        ("GradAscent", {"alpha": 1.0}, "unlearn.alpha: GradAscent does not use it"),
        ("KL", {"retain_loss": "NLL"}, "unlearn.retain_loss: KL does not use it"),
        ("NPO", {"beta": 0.0}, "unlearn.beta=0.0; give a number above 0"),
        ("NPO", {"beta": math.nan}, "unlearn.beta=nan; give a finite"),
        ("NPO", {"gamma": -1.0}, "unlearn.gamma=-1.0; give 0 or more"),
        ("NPO", {"retain_loss": "kl"}, "choose one of NLL, KL, EMBED"),
        ("NPO", {"betta": 1.0}, "no method uses it.*beta"),
        ("PDU", {}, "PDU needs an upper bound of the retain loss"),
    ],
)  # fmt: skip
def test_settings_are_checked(method: str, given: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_method(method, [given], StartModel(WIDTH))


def test_jobs_must_ask_for_the_same_passes() -> None:
    with pytest.raises(ConfigError, match=r"unlearn\.retain_loss differs between jobs"):
        make_method("NPO", [{}, {"retain_loss": "KL"}], StartModel(WIDTH, (0, 1)))


def test_defaults_are_those_of_the_reference() -> None:
    """Papers' and open-unlearning's numbers, written out once more."""
    expected: dict[str, dict[str, Any]] = {
        "GradDiff": {"gamma": 1, "alpha": 1},
        "NPO": {"beta": 0.1, "gamma": 1, "alpha": 1},
        "SimNPO": {"beta": 4.5, "delta": 0, "gamma": 0.125, "alpha": 1},
        "DPO": {"beta": 0.1, "gamma": 1, "alpha": 1},
        "RMU": {"steering_coeff": 2, "gamma": 1, "alpha": 1, "retain_loss": "EMBED", "layer": 7},
        "UNDIAL": {"beta": 10, "gamma": 1, "alpha": 0},
        "CEU": {"ignore_first_n_answer_tokens": 1, "gamma": 1},
        "WGA": {"beta": 1, "gamma": 1, "alpha": 1},
        "SatImp": {"beta1": 5, "beta2": 1, "gamma": 0.1, "alpha": 1},
        "IHL": {"gamma": 1, "alpha": 1},
        "ME": {"gamma": 0.1, "alpha": 1},
        "IdkAP": {"beta": 0.1, "gamma": 1, "alpha": 1},
        "JensUn": {"gamma": 1, "alpha": 1},
        "PDU": {"dual_step_size": 1, "dual_warmup_epochs": 5, "gamma": 1, "alpha": 50},
    }
    for method, numbers in expected.items():
        settings = resolve_settings(method, {})
        assert {name: getattr(settings, name) for name in numbers} == numbers
