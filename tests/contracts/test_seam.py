"""The seam holds for more than fine-tuning: a second task over the same engine, several jobs at
once, every family's gradient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.spec import LoraSpec
from lorry.backends.local import LocalBackend
from lorry.data.batch import Batch, TokenizedExample, collate
from lorry.data.prepare import prepare_data
from lorry.evaluate.loss import mean_nll
from lorry.models.causal_lm import PackedInput
from lorry.models.loading.open import open_model
from lorry.models.scoring.score import TokenScore, log_prob
from lorry.tasks.build import PreparedJob
from lorry.train.setup.adapters import attach_adapter
from lorry.train.setup.loop import build_engine
from lorry.train.setup.notebook import Notebook
from tests.support import tinyrun
from tests.support.seam import Fixed, Npo, examples, tiny_llama
from tests.support.tinyrun import engine_for, quick  # noqa: F401 - a fixture


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- a second task


class WatchedNpo(Npo):
    """Keeps the references it was given."""

    def __init__(self, steps: Sequence[Sequence[Sequence[TokenizedExample]]]) -> None:
        super().__init__(steps)
        self.references: list[Tensor] = []

    def step_batches(self, step: int, models: Any) -> list[Batch]:
        made = super().step_batches(step, models)
        self.references.append(torch.cat([b.extra["reference"].values for b in made]))
        return made


def base_scores(rows: Sequence[TokenizedExample]) -> Tensor:
    """Scores of a fresh model without any adapter, row by row from full logits."""
    model, out = tiny_llama(), []
    for row in rows:
        packed = PackedInput.of([list(row.tokens)])
        logp = model(packed.tokens[None]).logits[0].detach().log_softmax(-1)
        scores = [
            float(logp[t - 1, row.tokens[t]]) if w else 0.0 for t, w in enumerate(row.weights)
        ]
        out.append(torch.tensor(scores))
    return torch.cat(out)


def test_npo_unlearns_through_the_same_engine(tmp_path: Path) -> None:
    """Ten steps on the same rows: what is to be forgotten becomes less likely, what is to be kept
    does not; one model serves as policy and as its own reference."""
    rows = examples(6, role=lambda i: "forget" if i % 2 else "retain")
    task = WatchedNpo([[rows[:3], rows[3:]]] * 10)
    run = engine_for(task, tmp_path, learning_rate=1e-2, warmup_steps=1)
    run.checks.begin(run.backend, {"default": list(run.backend.bank["default"].slots)})  # type: ignore[attr-defined]

    def nll(role: str) -> float:
        total, tokens = mean_nll(run.backend, [collate([r for r in rows if r.role == role])])
        return total / tokens

    before = {role: nll(role) for role in ("forget", "retain")}
    run.run()
    run.checks.end(run.backend, task)
    after = {role: nll(role) for role in ("forget", "retain")}
    assert after["forget"] > before["forget"] + 0.2
    assert after["retain"] < before["retain"]

    truth = base_scores(rows)
    assert all(torch.equal(r, task.references[0]) for r in task.references)
    torch.testing.assert_close(task.references[0], truth, atol=1e-5, rtol=0)
    logged = lines(tmp_path)
    # policy = reference (Zhang et al. 2024)
    assert logged[0]["loss_forget"] == pytest.approx(2 / task.beta * math.log(2), rel=1e-6)
    assert logged[-1]["loss_forget"] < logged[0]["loss_forget"]
    assert logged[3]["loss"] == pytest.approx(logged[3]["loss_forget"] + logged[3]["loss_retain"])
    assert [c["status"] for c in run.checks.report()][1:4] == ["held"] * 3


# --- several jobs


def test_two_jobs_at_once_are_two_runs(tmp_path: Path) -> None:
    """Shared micro-batches, two ranks: losses, norms and trained weights as in two runs of their
    own.
    """
    specs = [LoraSpec(r=2, lora_dropout=0.2), LoraSpec(r=5, lora_alpha=3)]
    shared = [
        [examples(4, s, lambda i: i % 2), examples(3, s + 50, lambda i: (i + 1) % 2)]
        for s in range(8)
    ]
    together = engine_for(
        Fixed(shared, ("a", "b")), tmp_path / "both", specs=specs, learning_rate=1e-2
    )
    together.run()
    for k, name in enumerate(("a", "b")):
        own = [
            [[replace(r, adapter=0) for r in micro if r.adapter == k] for micro in step]
            for step in shared
        ]
        alone = engine_for(
            Fixed(own, (name,)), tmp_path / name, specs=specs[k : k + 1], learning_rate=1e-2
        )
        alone.run()
        for both, single in zip(lines(tmp_path / "both"), lines(tmp_path / name), strict=True):
            assert both["adapters"][name]["loss"] == pytest.approx(single["loss"], rel=1e-6)
            assert both["adapters"][name]["grad_norm"] == pytest.approx(
                single["grad_norm"], rel=1e-4
            )
        a, b = (e.backend.bank[name].values for e in (together, alone))  # type: ignore[attr-defined]
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        assert (
            a
            - engine_for(Fixed(own, (name,)), tmp_path, specs=specs[k : k + 1])
            .backend.bank[name]
            .values
        ).abs().max() > 1e-2  # type: ignore[attr-defined]


# --- every family


class PlainLora:
    """B A x beside a linear layer of transformers, as autograd sees it; nothing of Lorry's."""

    def __init__(self, layer: torch.nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        assert isinstance(layer, torch.nn.Linear | Conv1D)
        self.a, self.b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
        layer.register_forward_hook(
            lambda _, inputs, out: out + scale * (inputs[0] @ self.a.T) @ self.b.T
        )


@pytest.mark.parametrize("family", tinyrun.FAMILIES)
def test_one_step_of_sft_has_autograds_gradient(family: str, tmp_path: Path) -> None:
    """Packed rows of the real data path, both halves of every adapter, against transformers row by
    row.
    """
    folder = tinyrun.model_directory(
        tmp_path / "model",
        family,
        **({"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}),
    )
    data = tinyrun.write_rows(tmp_path / "data.jsonl", tinyrun.rows(7))
    run = tinyrun.described(
        folder,
        data,
        tmp_path / "run",
        init_lora_weights=False,
        r=3,
        lora_alpha=5,
        packing=True,
        gradient_accumulation_steps=3,
    )
    opened = open_model(run.model, print)
    name = attach_adapter(run, opened, print)
    prepared = prepare_data(run.data, run.train, opened.tokenizer, quarantine=tmp_path / "aside")
    job = PreparedJob(run, prepared, {}, prepared.stream)
    engine = build_engine(run, opened, {name: job}, Notebook())
    assert isinstance(engine.backend, LocalBackend)
    batches = engine.task.step_batches(0, {})
    assert sum(len(b) for b in batches) == 7
    engine.backend.forward_backward(batches, engine.task, 0)
    adapter = get_bank(opened.model)[name]
    got = adapter.split_like(adapter.grads)

    oracle = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    values = adapter.tensors()
    loras = {
        p: PlainLora(oracle.get_submodule(p), values[f"{p}.lora_A"], values[f"{p}.lora_B"], s.scale)
        for p, s in adapter.slots.items()
    }
    assert len(loras) == 2 * (4 if family in ("gpt2", "gpt_neox") else 7)
    total, weight = torch.zeros(()), 0.0
    for batch in batches:
        for start, stop in batch.segments:
            tokens, weights = batch.tokens[start:stop], batch.weights[start:stop]
            logp = oracle(tokens[None]).logits[0, :-1].log_softmax(-1)
            total = total - (logp.gather(1, tokens[1:, None])[:, 0] * weights[1:]).sum()
            weight += float(weights.sum())
    (total / weight).backward()
    biggest = max(float(g.abs().max()) for g in got.values())
    assert biggest > 1e-4
    for path, lora in loras.items():
        for side, truth in (("A", lora.a.grad), ("B", lora.b.grad)):
            assert truth is not None
            error = float((got[f"{path}.lora_{side}"] - truth).abs().max())
            assert error <= 1e-4 * float(truth.abs().max()), (
                f"{path}.lora_{side}: {error:.2e} of {float(truth.abs().max()):.2e}"
            )


def test_scores_name_the_base_by_no_mix(tmp_path: Path) -> None:
    """`score` under mix none is the base for every adapter number a batch may carry, and the
    adapters still differ from it.
    """
    both = engine_for(
        Fixed([[examples(1)]], ("a", "b")),
        tmp_path,
        specs=[LoraSpec(r=2, init_lora_weights=False)] * 2,
    )
    batch = collate(examples(6, adapter=lambda i: i % 3 - 1))
    want = {"s": TokenScore(log_prob)}
    base, own = (both.backend.score([batch], want, mix)[0]["s"] for mix in (Mix.none(), None))
    torch.testing.assert_close(base, base_scores(examples(6)), atol=1e-5, rtol=0)
    for s, (start, stop) in enumerate(batch.segments):
        assert torch.allclose(base[start:stop], own[start:stop], atol=1e-6) == (s % 3 == 0)
