"""The local backend: normalising, K jobs at once, a second task over the seam, failures, state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.spec import LoraSpec
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.data.batch import TokenizedExample, collate
from lorry.errors import ModelError, NonFiniteError
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.model import Decoder
from tests.support.seam import Fixed, Npo, examples, tiny_llama


def start(
    names: tuple[str, ...] = ("default",), specs: tuple[LoraSpec, ...] | None = None, seed: int = 0
) -> tuple[Decoder, LocalBackend]:
    model = tiny_llama()
    for i, name in enumerate(names):
        attach(
            model, specs[i] if specs else LoraSpec(r=3, init_lora_weights=False), name, seed=seed
        )
    return model, LocalBackend(model, names, OptimSettings(max_grad_norm=0.0))


def grads(local: LocalBackend, task: Fixed, step: int = 0, name: str = "default") -> torch.Tensor:
    batches = task.step_batches(step, {"self": local})
    local.forward_backward(batches, task, step)
    out = local.bank[name].grads.clone()
    local.discard()
    return out


def mean_loss_by_hand(model: Decoder, rows: list[TokenizedExample], adapter: str) -> torch.Tensor:
    """Sum of weighted token losses over total weight, from full logits of one row at a time."""
    total, weight = torch.zeros(()), 0.0
    call = AdapterContext(Mix.one(adapter))
    for row in rows:
        packed = PackedInput.of([row.tokens])
        logp = model.logits(model.hidden(packed, call).last, call).log_softmax(-1)
        for t, w in enumerate(row.weights):
            if w:
                total = total - w * logp[t - 1, row.tokens[t]]
                weight += w
    return total / weight


def test_gradient_does_not_depend_on_packing_or_accumulation() -> None:
    rows = examples(9)
    model, local = start()
    shapes = [[rows], [rows[:2], rows[2:3], rows[3:]], [[r] for r in rows]]
    got = [grads(local, Fixed([shape])) for shape in shapes]
    loss = mean_loss_by_hand(model, rows, "default")
    loss.backward()
    truth = local.bank["default"].grads.clone()
    assert truth.abs().max() > 1e-3
    for g in got:
        assert (g - truth).abs().max() < 1e-5 * truth.abs().max() + 1e-7


def test_uneven_micro_batches_averaged_by_means_would_differ() -> None:
    """The contract can fail: the mean of micro-batch means is another gradient."""
    rows = examples(9)
    _, local = start()
    right = grads(local, Fixed([[rows[:1], rows[1:]]]))
    means = (grads(local, Fixed([[rows[:1]]])) + grads(local, Fixed([[rows[1:]]]))) / 2
    assert (right - means).abs().max() > 1e-2 * right.abs().max()


def test_jobs_in_one_batch_equal_jobs_alone() -> None:
    """Three adapters of different rank and scale in shared micro-batches: losses, norms and steps
    as in three separate runs.
    """
    specs = (LoraSpec(r=2), LoraSpec(r=5, lora_alpha=3), LoraSpec(r=3, use_rslora=True))
    names = ("a", "b", "c")
    rates = {"a": 1e-2, "b": 3e-3, "c": 2e-2}
    shared = [
        [examples(4, seed, lambda i: i % 3), examples(5, seed + 50, lambda i: (i + 1) % 3)]
        for seed in range(4)
    ]
    _, together = start(names, specs)
    task = Fixed(shared, names)
    joint = []
    for step in range(4):
        joint.append(
            (
                together.forward_backward(task.step_batches(step, {}), task, step),
                together.step(rates),
            )
        )
    for k, name in enumerate(names):
        _, alone = start((name,), (specs[k],))
        own = [
            [[replace(r, adapter=0) for r in micro if r.adapter == k] for micro in step]
            for step in shared
        ]
        single = Fixed([[m for m in step if m] for step in own], (name,))
        for step in range(4):
            stats = alone.forward_backward(single.step_batches(step, {}), single, step)
            norms = alone.step(rates)
            assert stats.loss[name] == pytest.approx(joint[step][0].loss[name], rel=1e-5)
            assert norms.norms[name] == pytest.approx(joint[step][1].norms[name], rel=1e-4)
        assert torch.allclose(alone.bank[name].values, together.bank[name].values, atol=1e-5)


def test_an_absent_job_does_not_step() -> None:
    _, local = start(("a", "b"))
    task = Fixed([[examples(4)]], ("a", "b"))
    before = {n: t.clone() for n, t in local.state().items()}
    local.forward_backward(task.step_batches(0, {}), task, 0)
    local.step({"a": 0.1, "b": 0.1})
    after = local.state()
    assert after["adam_count/a"] == 1
    assert after["adam_count/b"] == 0
    moved = {n for n in after if n.startswith("adapter/") and not torch.equal(after[n], before[n])}
    assert moved == {n for n in after if n.startswith("adapter/a/")}


def test_npo_over_the_seam_equals_autograd_by_hand() -> None:
    """The second task: reference by mix none, two terms with normalisers of their own, against a
    plain computation.
    """
    model, local = start()
    rows = examples(7, role=lambda i: "forget" if i % 2 else "retain")
    got = grads(local, Npo([[rows[:3], rows[3:]]]))

    forget, retain = (
        [r for r in rows if r.role == "forget"],
        [r for r in rows if r.role == "retain"],
    )
    total = torch.zeros(())
    for row in forget:
        batch = collate([row])
        packed = PackedInput(batch.tokens, batch.positions, batch.segments)
        sums = []
        for call in (AdapterContext(Mix.one("default")), AdapterContext()):
            logp = model.logits(model.hidden(packed, call).last, call).log_softmax(-1)
            sums.append(sum(w * logp[t - 1, row.tokens[t]] for t, w in enumerate(row.weights) if w))
        total = total - 2 / 0.1 * torch.nn.functional.logsigmoid(
            -0.1 * (sums[0] - sums[1].detach())
        ) / len(forget)
    (total + mean_loss_by_hand(model, retain, "default")).backward()
    truth = local.bank["default"].grads
    assert truth.abs().max() > 1e-3
    assert (got - truth).abs().max() < 1e-5 * truth.abs().max() + 1e-7


def test_adamw_and_clipping_equal_torch() -> None:
    """Ten steps against torch.optim.AdamW and clip_grad_norm_ on separate tensors."""
    settings = OptimSettings(weight_decay=0.1, max_grad_norm=0.05)
    model = tiny_llama()
    attach(model, LoraSpec(r=3, init_lora_weights=False))
    local = LocalBackend(model, ["default"], settings)
    twin = tiny_llama()
    attach(twin, LoraSpec(r=3, init_lora_weights=False))
    params = get_bank(twin).parameters()
    other = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    task = Fixed([[examples(3, seed)] for seed in range(10)])
    for step in range(10):
        local.forward_backward(task.step_batches(step, {}), task, step)
        norm = local.step({"default": 1e-2}).norms["default"]
        loss = mean_loss_by_hand(twin, list(task.steps[step][0]), "default")
        other.zero_grad()
        loss.backward()
        expected = torch.nn.utils.clip_grad_norm_(params, 0.05)
        other.step()
        assert norm == pytest.approx(float(expected), rel=1e-4)
        assert norm > 0.05
    mine = torch.cat([p.flatten() for p in local.bank.parameters()])
    theirs = torch.cat([p.flatten() for p in params])
    assert torch.allclose(mine, theirs, atol=2e-5)
    assert (
        mine - torch.cat([p.flatten() for p in start()[1].bank.parameters()])
    ).abs().max() > 1e-2


def test_l2_regularization_is_a_term_of_the_loss() -> None:
    """Its gradient is clipped and goes through AdamW's moments, as autograd's of factor * sum(p^2);
    once a step, however many micro-batches there are."""
    model, local = start()
    settings = OptimSettings(max_grad_norm=0.5, l2_regularization=0.3, weight_decay=0.1)
    local = LocalBackend(model, ("default",), settings)
    adapter = local.bank["default"]
    plain = torch.nn.Parameter(adapter.values.clone())
    twin = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.1)
    for step in range(3):
        task = Fixed([[examples(3, step), examples(2, step + 9)]])
        local.forward_backward(task.step_batches(0, {"self": local}), task, step)
        data_gradient = adapter.grads.clone()
        loss = (data_gradient * plain).sum() + 0.3 * plain.square().sum()
        twin.zero_grad()
        loss.backward()
        expected_norm = float(torch.nn.utils.clip_grad_norm_([plain], 0.5))
        twin.step()
        norms = local.step({"default": 1e-2})
        assert norms.norms["default"] == pytest.approx(expected_norm, rel=1e-5)
        assert (adapter.values - plain).abs().max() < 1e-6


def test_nothing_steps_on_a_non_finite_loss_or_gradient() -> None:
    model, local = start()
    task = Fixed([[examples(4)]])
    before = {n: t.clone() for n, t in local.state().items()}
    batches = task.step_batches(0, {})
    norm = model.get_submodule("model.norm")
    norm.weight.data.fill_(float("nan"))
    with pytest.raises(
        NonFiniteError, match=r"step 1: the loss term 'nll' is not finite for 4 of 4"
    ):
        local.forward_backward(batches, task, 0)
    norm.weight.data.fill_(1.0)
    local.forward_backward(batches, task, 0)
    path = "model.layers.1.mlp.up_proj.lora_B"
    local.bank["default"].split_like(local.bank["default"].grads)[path][0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.lora_B"):
        local.step({"default": 0.1})
    assert all(torch.equal(v, before[n]) for n, v in local.state().items())
    assert not local.bank["default"].grads.any()


def test_state_goes_round_and_is_strict() -> None:
    _, local = start()
    task = Fixed([[examples(4, s)] for s in range(3)])
    for step in range(2):
        local.forward_backward(task.step_batches(step, {}), task, step)
        local.step({"default": 1e-2})
    saved = {n: t.clone() for n, t in local.state().items()}
    _, fresh = start(seed=7)
    fresh.load_state(saved)
    for backend in (local, fresh):
        backend.forward_backward(task.step_batches(2, {}), task, 2)
        backend.step({"default": 1e-2})
    assert all(torch.equal(v, fresh.state()[n]) for n, v in local.state().items())
    missing = {n: v for n, v in saved.items() if not n.endswith("q_proj.lora_B")}
    with pytest.raises(ModelError, match="q_proj"):
        fresh.load_state(missing)
    name = "adapter/default/model.layers.0.self_attn.q_proj.lora_A"
    with pytest.raises(ModelError, match="is"):
        fresh.load_state({**saved, name: torch.zeros(1, 2)})
    before = {n: t.clone() for n, t in fresh.state().items()}
    for value in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match=rf"{name} holds NaN or infinity in the checkpoint"):
            fresh.load_state({**saved, name: torch.full_like(saved[name], value)})
    assert all(torch.equal(t, before[n]) for n, t in fresh.state().items())


def test_dropout_follows_step_and_key_not_packing() -> None:
    model = tiny_llama()
    attach(model, LoraSpec(r=3, lora_dropout=0.3, init_lora_weights=False))
    local = LocalBackend(model, ["default"], OptimSettings())
    rows = examples(5)
    packed, apart = (
        grads(local, Fixed([[rows]])),
        grads(local, Fixed([[[r] for r in reversed(rows)]])),
    )
    assert (packed - apart).abs().max() < 1e-5 * packed.abs().max() + 1e-7
    other = grads(local, Fixed([[rows], [rows]]), step=1)
    assert (packed - other).abs().max() > 1e-3 * packed.abs().max()


def test_inspection_sees_adapters_that_are_not_trained() -> None:
    """What trains may move; an adapter beside it may not, by one bit."""
    model = tiny_llama()
    for name in ("trained", "beside"):
        attach(model, LoraSpec(r=2), name)
    local = LocalBackend(model, ["trained"], OptimSettings())
    before = local.inspect().base_digest
    with torch.no_grad():
        get_bank(model)["trained"].values.add_(1.0)
        assert local.inspect().base_digest == before
        get_bank(model)["beside"].values[:1].view(torch.int32).bitwise_xor_(1)
    assert local.inspect().base_digest != before


def test_inspection_sees_a_frozen_matrix() -> None:
    _, local = start()
    seen = local.inspect()
    assert seen.trainable == seen.optimized == seen.saved
    local.bank["default"].slots["model.layers.0.mlp.up_proj"].B.requires_grad_(False)
    assert local.inspect().trainable == seen.trainable - {
        "default/model.layers.0.mlp.up_proj.lora_B"
    }
