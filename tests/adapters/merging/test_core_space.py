"""Core space against plain float64 NumPy on whole [out, in] deltas, at any shapes and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from lorry.adapters.attach import attach, detach, get_bank
from lorry.adapters.merging.core_space import (
    column_basis,
    core_bases,
    flatten_spectrum,
    merge_task_singular_vectors,
    truncate,
)
from lorry.adapters.merging.methods import combine
from lorry.adapters.merging.weighted import merge_adapters
from lorry.adapters.mix import Mix
from lorry.adapters.peft.files import save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.config.merge import MERGE_METHODS

Array = npt.NDArray[np.float64]
SHAPES = st.tuples(
    st.integers(1, 12), st.integers(1, 12), st.lists(st.integers(1, 5), min_size=1, max_size=4)
)


def factors(seed: int, out: int, inner: int, ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """(A [r, in], B [out, r]) of each rank, float64."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(r, inner, generator=draw, dtype=torch.float64),
            torch.randn(out, r, generator=draw, dtype=torch.float64),
        )
        for r in ranks
    ]


def bases_of(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return core_bases([a for a, _ in parts], [b for _, b in parts])


@settings(max_examples=40)
@given(SHAPES, st.integers(0, 1000))
def test_nothing_is_lost_in_core_space(shape: tuple[int, int, list[int]], seed: int) -> None:
    out, inner, ranks = shape
    parts = factors(seed, out, inner, ranks)
    u, v = bases_of(parts)
    assert u.shape[1] <= min(out, sum(ranks))
    assert v.shape[0] <= min(inner, sum(ranks))
    torch.testing.assert_close(u.mT @ u, torch.eye(u.shape[1], dtype=u.dtype))
    torch.testing.assert_close(v @ v.mT, torch.eye(v.shape[0], dtype=u.dtype))
    for a, b in parts:
        torch.testing.assert_close(u @ (u.mT @ b @ (a @ v.mT)) @ v, b @ a)


@settings(max_examples=40)
@given(SHAPES, st.integers(1, 6), st.integers(0, 1000))
def test_a_rank_is_the_best_of_its_kind_and_says_what_it_lost(
    shape: tuple[int, int, list[int]], rank: int, seed: int
) -> None:
    """Against the SVD of the whole delta (Eckart and Young)."""
    out, inner, ranks = shape
    parts = factors(seed, out, inner, ranks)
    u, v = bases_of(parts)
    delta = sum(b @ a for a, b in parts)
    small = truncate(u.mT @ delta @ v.mT, rank)
    found = (u @ small.left @ small.right @ v).numpy()
    values = np.linalg.svd(delta.numpy(), compute_uv=False)
    assert np.linalg.norm(delta.numpy() - found) ** 2 == pytest.approx(
        float((values[rank:] ** 2).sum()), abs=1e-9
    )
    assert small.lost == pytest.approx(float((values[rank:] ** 2).sum()), abs=1e-9)
    assert small.energy == pytest.approx(float((values**2).sum()))
    assert small.right.shape[0] == min(rank, u.shape[1], v.shape[0])


def test_directions_that_are_not_there_have_no_basis_vector() -> None:
    """Twice the same adapter spans what it spans once; of zeros there is one direction."""
    ((a, b),) = factors(0, 9, 7, [3])
    u, v = core_bases([a, a], [b, b])
    assert (u.shape, v.shape) == ((9, 3), (3, 7))
    assert column_basis(torch.zeros(5, 2)).shape == (5, 1)


@pytest.fixture
def banked(tiny: Any, shake: Any) -> Any:
    """``banked("gpt2")``: a model with the adapters a, b, c of other ranks, scales and targets."""

    def build(family: str) -> nn.Module:
        model = tiny(family, **({"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}))
        wte, first, second = (
            ("wte", "c_attn", "c_proj")
            if family == "gpt2"
            else ("embed_in", "query_key_value", "dense_h_to_4h")
            if family == "gpt_neox"
            else ("embed_tokens", "q_proj", "down_proj")
        )
        specs = {
            "a": LoraSpec(r=2, target_modules=(first, second), rank_pattern={first: 5}),
            "b": LoraSpec(r=3, target_modules=(wte, first), use_rslora=True, lora_alpha=5),
            "c": LoraSpec(r=4, target_modules=(first, wte, "lm_head"), alpha_pattern={first: 3}),
        }
        for number, (name, spec) in enumerate(specs.items()):
            attach(model, spec, name)
            shake(get_bank(model)[name].masters().values(), number)
        return model

    return build


WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("method", ["core_linear", "cat"])
def test_linear_is_the_sum_of_the_deltas(
    family: str, method: str, banked: Any, ids: Tensor, logits: Any
) -> None:
    model = banked(family)
    get_bank(model).activate(Mix.constants(WEIGHTS))
    expected = logits(model, ids)
    merge_adapters(model, WEIGHTS, method=method)
    found = logits(model, ids)  # the merged one alone, which is active now
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gpt_neox"])
def test_peft_reads_other_ranks_at_every_module(
    family: str, banked: Any, ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    """Embeddings, heads and Conv1D; what is saved is what ours computed."""
    for method, options in {"core_tsv": {}, "core_iso": {}, "core_ties": {"rank": 6}}.items():
        model = banked(family)
        get_bank(model).activate(Mix.none())
        base = logits(model, ids)
        merged = merge_adapters(model, WEIGHTS, method=method, scale=0.3, **options)
        assert len({module.rank for module in merged.modules}) > 1
        expected = logits(model, ids)
        save_adapter(model, tmp_path / method, "merged")
        detached = banked(family)
        for name in WEIGHTS:
            detach(detached, name)
        found = logits(PeftModel.from_pretrained(detached, str(tmp_path / method)).eval(), ids)
        bound = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=bound)
        assert (expected - base).abs().max() > 100 * bound


def deltas_of(model: nn.Module, path: str) -> list[tuple[float, Array]]:
    """(weight, s B A) of the adapters at a module, in float64."""
    return [
        (weight, (slot.scale * slot.B.detach().double() @ slot.A.detach().double()).numpy())
        for name, weight in WEIGHTS.items()
        if (slot := get_bank(model)[name].slots.get(path)) is not None
    ]


def twin_core(model: nn.Module, path: str) -> tuple[Array, Array, list[Array]]:
    """(U, V, cores) by NumPy's SVD of the whole stacks."""
    slots = [get_bank(model)[name].slots.get(path) for name in WEIGHTS]
    there = [slot for slot in slots if slot is not None]
    stack = np.concatenate([slot.A.detach().double().numpy() for slot in there])
    beside = np.concatenate([slot.B.detach().double().numpy() for slot in there], axis=1)
    u = np.linalg.svd(beside, full_matrices=False)[0]
    v = np.linalg.svd(stack, full_matrices=False)[2]
    return u, v, [u.T @ delta @ v.T for _, delta in deltas_of(model, path)]


def twin_ties(cores: list[Array], weights: list[float], density: float) -> Array:
    """TIES, a value at a time."""
    pruned = []
    for core in cores:
        keep = int(density * core.size)
        floor = np.sort(np.abs(core), axis=None)[core.size - keep]
        pruned.append(np.where(np.abs(core) >= floor, core, 0.0))
    result = np.zeros_like(cores[0])
    for at in np.ndindex(*result.shape):
        values = [core[at] for core in pruned]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [w * x for w, x in zip(weights, values, strict=True) if np.sign(x) == sign]
        result[at] = sum(agreeing) / max(len(agreeing), 1)
    return result


def twin_tsv(cores: list[Array]) -> Array:
    """TSV-M: 1/K of the triples of each, side by side, orthonormal."""
    share = min(cores[0].shape) // len(cores)
    triples = [np.linalg.svd(core) for core in cores]
    counts = [min(share, int(np.linalg.matrix_rank(core))) for core in cores]
    left = np.concatenate([u[:, :n] for (u, _, _), n in zip(triples, counts, strict=True)], 1)
    right = np.concatenate([vt[:n] for (_, _, vt), n in zip(triples, counts, strict=True)])
    values = np.concatenate([s[:n] for (_, s, _), n in zip(triples, counts, strict=True)])

    def orthonormal(matrix: Array) -> Array:
        p, _, qt = np.linalg.svd(matrix, full_matrices=False)
        return p @ qt

    return orthonormal(left) @ np.diag(values) @ orthonormal(right)


def merged_delta(model: nn.Module, path: str, **options: Any) -> Array:
    merged = merge_adapters(model, WEIGHTS, "merged", **options)
    slot = merged.adapter.slots[path]
    assert slot.scale == 1
    return (slot.B.detach().double() @ slot.A.detach().double()).numpy()


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("method", ["core_ties", "core_tsv", "core_iso"])
def test_what_is_done_in_core_space_is_what_numpy_does(method: str, banked: Any) -> None:
    model = banked("llama")
    u, v, cores = twin_core(model, FIRST)
    weights = list(WEIGHTS.values())
    if method == "core_ties":
        expected = twin_ties(cores, weights, 0.6)
    elif method == "core_tsv":
        expected = twin_tsv([w * core for w, core in zip(weights, cores, strict=True)])
    else:
        p, s, qt = np.linalg.svd(sum(w * core for w, core in zip(weights, cores, strict=True)))
        expected = s.mean() * p @ qt
    options = {"density": 0.6} if method == "core_ties" else {}
    found = merged_delta(model, FIRST, method=method, scale=1.5, **options)
    np.testing.assert_allclose(found, 1.5 * u @ expected @ v, atol=2e-5)


def test_iso_has_one_singular_value_and_keeps_their_sum(banked: Any) -> None:
    model = banked("llama")
    summed = sum(weight * delta for weight, delta in deltas_of(model, FIRST))
    expected = np.linalg.svd(summed, compute_uv=False)
    found = np.linalg.svd(merged_delta(model, FIRST, method="core_iso"), compute_uv=False)
    kept = int((expected > 1e-9 * expected[0]).sum())
    np.testing.assert_allclose(found[:kept], expected.sum() / kept, rtol=1e-5)
    assert found[kept:].max() < 1e-5


def test_iso_makes_no_direction_that_the_sum_has_not() -> None:
    """Two of four singular values are 0; the mean is of the others, and zeros stay zeros."""
    ((a, b),) = factors(0, 4, 4, [2])
    found = np.linalg.svd(flatten_spectrum(b @ a).numpy())
    expected = np.linalg.svd((b @ a).numpy())
    np.testing.assert_allclose(found[1], expected[1].sum() / 2 * np.array([1, 1, 0, 0]), atol=1e-12)
    for side in (lambda u: u[0][:, :2] @ u[0][:, :2].T, lambda u: u[2][:2].T @ u[2][:2]):
        np.testing.assert_allclose(side(found), side(expected), atol=1e-12)
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    torch.testing.assert_close(flatten_spectrum(zeros), zeros)


def test_iso_of_a_lesser_rank_stays_where_the_adapters_are(tiny: Any, shake: Any) -> None:
    """An untrained B beside a trained one, a rank that is there twice, one that float32 rounded:
    the delta stays in the rows and columns of the trained one, with its mean as singular value.
    """
    model = tiny("llama", num_hidden_layers=1)
    for name, rank in (("a", 2), ("fresh", 3), ("wide", 4)):
        attach(model, LoraSpec(r=rank, lora_alpha=rank, target_modules=("q_proj",)), name)
    bank = get_bank(model)
    shake(bank["a"].masters().values())
    one, wide = bank["a"].slots[FIRST], bank["wide"].slots[FIRST]
    with torch.no_grad():
        # the same delta by four outer products, as a merge of some rank stores it
        turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
        wide.A.copy_(turn[:, :2] @ one.A)
        wide.B.copy_(one.B @ turn[:, :2].T)
    delta = (one.B.detach().double() @ one.A.detach().double()).numpy()
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    for weights, size in (
        ({"a": 1.0, "fresh": 1.0}, 1),
        ({"wide": 1.0}, 1),
        ({"a": 0.5, "wide": 1.0, "fresh": -1.0}, 1.5),
    ):
        merged = merge_adapters(model, weights, "merged", method="core_iso").adapter.slots[FIRST]
        found = (merged.B.detach().double() @ merged.A.detach().double()).numpy()
        detach(model, "merged")
        expected = size * s[:2].mean() * u[:, :2] @ vt[:2]
        np.testing.assert_allclose(found, expected, atol=1e-4 * s[0])


def test_tsv_counts_no_direction_that_float32_made(tiny: Any, shake: Any) -> None:
    """One task's adapter under three sets of factors whose product is the same but for rounding, one
    of them of twice the rank: TSV has the triples of that task, and none of the rounding."""
    model = tiny("llama", num_hidden_layers=1)
    for name, rank in (("a", 4), ("scaled", 4), ("wide", 8)):
        attach(model, LoraSpec(r=rank, lora_alpha=rank, target_modules=("q_proj",)), name)
    bank = get_bank(model)
    shake(bank["a"].masters().values())
    one, scaled, wide = (bank[name].slots[FIRST] for name in ("a", "scaled", "wide"))
    with torch.no_grad():
        scaled.A.copy_(one.A * 3)
        scaled.B.copy_(one.B / 3)
        turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
        wide.A.copy_(turn[:, :4] @ one.A)
        wide.B.copy_(one.B @ turn[:, :4].T)
    expected = (one.B.detach().double() @ one.A.detach().double()).numpy()
    for others in (["a", "scaled"], ["a", "wide"], ["scaled", "wide"], ["a", "scaled", "wide"]):
        made = merge_adapters(model, dict.fromkeys(others, 1.0), "merged", method="core_tsv")
        slot = made.adapter.slots[FIRST]
        found = (slot.B.detach().double() @ slot.A.detach().double()).numpy()
        detach(model, "merged")
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_dare_drops_and_rescales_by_seed_and_module_alone(banked: Any) -> None:
    model = banked("llama")
    u, v, cores = twin_core(model, FIRST)
    weights = list(WEIGHTS.values())
    one = merged_delta(model, FIRST, method="core_dare", density=0.4, seed=3)
    again, other, whole = (banked("llama") for _ in range(3))
    assert np.array_equal(merged_delta(again, FIRST, method="core_dare", density=0.4, seed=3), one)
    assert not np.array_equal(
        merged_delta(other, FIRST, method="core_dare", density=0.4, seed=4), one
    )
    np.testing.assert_allclose(
        merged_delta(whole, FIRST, method="core_dare", density=1.0),
        u @ sum(w * core for w, core in zip(weights, cores, strict=True)) @ v,
        atol=2e-5,
    )
    # each value of the core is a sum over some of the tasks, of that value / density
    core = u.T @ one @ v.T
    scaled = [w * c / 0.4 for w, c in zip(weights, cores, strict=True)]
    choices = [
        sum(part for part, taken in zip(scaled, mask, strict=True) if taken)
        for mask in np.ndindex(2, 2, 2)
    ]
    nearest = np.min([np.abs(core - choice) for choice in choices], axis=0)
    assert nearest.max() < 1e-4


def test_the_same_task_twice_is_not_garbled_by_tsv() -> None:
    """Its vectors stand twice side by side: what they do not span must not be filled in."""
    core = torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(merge_task_singular_vectors([core, core]), core)
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    torch.testing.assert_close(merge_task_singular_vectors([zeros, zeros]), zeros)


@settings(max_examples=25)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.floats(0.05, 1.0),
    st.sampled_from(["total", "frequency"]),
    st.integers(0, 1000),
)
def test_ties_by_plain_loops(
    tasks: int, size: int, density: float, majority: Any, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    values = [draw.standard_normal((size, 3)) for _ in range(tasks)]
    weights = list(draw.standard_normal(tasks))
    found = combine(
        [torch.from_numpy(each) for each in values],
        weights,
        MERGE_METHODS["ties"],
        density=density,
        majority_sign_method=majority,
        generator=torch.Generator(),
    ).numpy()
    for at in np.ndindex(size, 3):
        kept = []
        for each in values:
            rank = int((np.abs(each) > abs(each[at])).sum())
            # int(0.3 * 10) is 3, and so is this: the same float product
            keep = each.size if density >= 1 else int(density * each.size)
            kept.append(each[at] if rank < keep else 0.0)
        votes = sum(kept) if majority == "total" else sum(np.sign(x) for x in kept)
        sign = 1.0 if votes >= 0 else -1.0
        agreeing = [w * x for w, x in zip(weights, kept, strict=True) if np.sign(x) == sign]
        assert found[at] == pytest.approx(sum(agreeing) / max(len(agreeing), 1), abs=1e-12)


def test_a_rank_of_the_whole_adapter(banked: Any) -> None:
    model = banked("llama")
    merged = merge_adapters(model, WEIGHTS, method="core_linear", rank=3)
    energy = lost = 0.0
    for module in merged.modules:
        values = np.linalg.svd(
            sum(weight * delta for weight, delta in deltas_of(model, module.module)),
            compute_uv=False,
        )
        energy, lost = energy + float((values**2).sum()), lost + float((values[3:] ** 2).sum())
        assert module.rank == merged.adapter.slots[module.module].A.shape[0] <= 3
    assert merged.energy_lost == pytest.approx(lost / energy, rel=1e-6)
    assert 0 < merged.energy_lost < 0.9
