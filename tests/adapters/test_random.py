"""Everything random is a function of names: A's initialisation of (seed, module), dropout of (seed,
step, sequence, site).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from lorry.adapters.attach import attach, get_bank, lora_parameters
from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix, MixTerm
from lorry.adapters.spec import LoraSpec

Q1 = "model.layers.1.self_attn.q_proj"


def test_a_depends_only_on_seed_and_module(tiny: Any) -> None:
    alone = attach(tiny("llama", seed=8), LoraSpec(r=4, target_modules=(Q1,)), seed=3).slots[Q1]
    crowded = tiny("qwen3")
    attach(crowded, LoraSpec(r=2, target_modules="all-linear"), "first", seed=9)
    torch.manual_seed(99)
    among = attach(
        crowded, LoraSpec(r=4, target_modules=("down_proj", "q_proj", "lm_head")), "second", seed=3
    ).slots[Q1]
    assert torch.equal(alone.A, among.A)
    assert not torch.equal(alone.A, get_bank(crowded)["second"].slots[Q1.replace("1", "2")].A), (
        "another module, other values"
    )
    assert not torch.equal(
        alone.A, attach(crowded, LoraSpec(r=4, target_modules=(Q1,)), "third", seed=4).slots[Q1].A
    )


def test_the_default_is_kaiming_uniform_as_in_peft_and_linear(tiny: Any) -> None:
    """U(-1/sqrt(in), 1/sqrt(in)) and zero B: bounds, moments and a chi-square test of 20 bins over
    some 60 000 values.
    """
    adapter = attach(
        tiny("llama", hidden_size=128),
        LoraSpec(r=64, target_modules=("q_proj", "v_proj", "up_proj")),
    )
    parts = []
    for slot in adapter.slots.values():
        bound = 1 / math.sqrt(slot.A.shape[1])
        reference = torch.empty_like(slot.A)
        torch.nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
        assert bound * 0.99 < slot.A.abs().max() <= bound
        assert abs(reference.abs().max() / slot.A.abs().max() - 1) < 0.01
        assert torch.count_nonzero(slot.B) == 0
        parts.append((slot.A.detach() / bound).flatten())
    unit = torch.cat(parts)
    assert stats.chisquare(torch.histc(unit, 20, -1, 1).numpy()).pvalue > 1e-4
    assert abs(float(unit.mean())) < 5 / math.sqrt(3 * unit.numel())


@pytest.mark.parametrize(("kind", "std"), [("gaussian", 1 / 8), (False, 1 / math.sqrt(3 * 32))])
def test_other_initialisations(kind: Any, std: float, tiny: Any) -> None:
    adapter = attach(
        tiny("llama"), LoraSpec(r=8, target_modules=("q_proj",), init_lora_weights=kind)
    )
    a = torch.cat([s.A.detach().flatten() for s in adapter.slots.values()])
    b = torch.cat([s.B.detach().flatten() for s in adapter.slots.values()])
    assert float(a.std()) == pytest.approx(std, rel=0.1)
    assert (float(b.abs().max()) > 0) is (kind is False)


def test_an_embedding_starts_with_zero_a(tiny: Any, ids: Tensor, logits: Any) -> None:
    model = tiny("llama")
    before = logits(model, ids)
    slot = attach(model, LoraSpec(r=4, target_modules=("embed",))).slots["model.embed_tokens"]
    assert torch.count_nonzero(slot.A) == 0
    assert slot.B.std().item() == pytest.approx(1, rel=0.3)
    assert torch.equal(logits(model, ids), before), "a new adapter does nothing"


def mask(noise: DropoutNoise, site: str = "s", p: float = 0.5, width: int = 4) -> Tensor:
    return noise.at(site, p).mask(width, torch.device("cpu"))


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(1, 6)),
        min_size=1,
        max_size=6,
        unique_by=lambda t: t[0],
    ),
    st.randoms(),
)
@settings(max_examples=50, deadline=None)
def test_a_sequence_has_its_mask_in_any_company(
    sequences: list[tuple[int, int]], random: Any
) -> None:
    """Each (key, length) drawn alone, packed together, and packed in another order."""

    def packed(order: list[tuple[int, int]]) -> dict[int, Tensor]:
        starts = [0]
        for _, length in order:
            starts.append(starts[-1] + length)
        whole = mask(DropoutNoise(1, 2, tuple(k for k, _ in order), tuple(starts)))
        return {k: whole[starts[i] : starts[i + 1]] for i, (k, _) in enumerate(order)}

    shuffled = list(sequences)
    random.shuffle(shuffled)
    first, second = packed(sequences), packed(shuffled)
    for key, length in sequences:
        assert torch.equal(first[key], second[key])
        assert torch.equal(first[key], mask(DropoutNoise(1, 2, (key,), (0, length))))


def test_masks_differ_by_seed_step_key_and_site() -> None:
    def one(seed: int = 1, step: int = 1, key: int = 1, site: str = "s") -> bytes:
        return mask(DropoutNoise(seed, step, (key,), (0, 32)), site).numpy().tobytes()

    assert one() == one()
    assert (
        len({one(), one(seed=2), one(step=2), one(key=2), one(site="t"), one(seed=11, step=0)}) == 6
    )


def test_rows_of_a_mask_are_the_same_rows() -> None:
    noise = DropoutNoise(1, 2, (3, 4), (0, 5, 12))
    rows = torch.tensor([1, 4, 5, 11])
    narrowed = AdapterContext(Mix.none(), noise).narrow(rows).noise
    assert narrowed is not None
    assert torch.equal(mask(narrowed, width=6), mask(noise, width=6)[rows])


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 40),
    st.floats(0.01, 0.99),
    st.integers(0, 2**40),
    st.data(),
)
def test_kernel_and_torch_draw_the_same(
    lengths: list[int], width: int, p: float, seed: int, data: st.DataObject
) -> None:
    """The compiled hash against the one in 64-bit integers, on any rows, in both number formats."""
    starts = (0, *torch.tensor(lengths).cumsum(0).tolist())
    dropout = DropoutNoise(seed, 3, tuple(range(len(lengths))), starts).at("s", p)
    first = data.draw(st.integers(0, starts[-1] - 1))
    last = data.draw(st.integers(first + 1, starts[-1]))
    plain = dropout._hash_mask(width, torch.arange(first, last))
    assert torch.equal(dropout.mask(width, torch.device("cpu"), slice(first, last)), plain)
    x = torch.randn(last - first, width)
    scaled = x.bfloat16().float() * torch.tensor(1 / (1 - p), dtype=torch.float32)
    assert torch.equal(
        dropout.apply(x.bfloat16(), slice(first, last)), torch.where(plain, scaled, 0).bfloat16()
    )
    assert torch.equal(dropout.apply(x, slice(first, last)), x * (plain * (1 / (1 - p))))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation(p: float, tiny: Any) -> None:
    """The share kept is 1-p within 5 sigma, and B(A(dropout(x))) averages to B(A(x))."""
    kept = torch.cat(
        [mask(DropoutNoise(0, step, (7,), (0, 64)), p=p, width=32).flatten() for step in range(10)]
    ).double()
    assert abs(float(kept.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())

    model = tiny("llama")
    attach(model, LoraSpec(r=2, target_modules=(Q1,), lora_dropout=p, init_lora_weights=False))
    layer = get_bank(model).modules[Q1]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    base = layer(x, AdapterContext())
    exact = layer(x, AdapterContext(Mix.one("default"))) - base
    runs = torch.stack(
        [
            layer(x, AdapterContext(Mix.one("default"), DropoutNoise(0, s, (1,), (0, 4)))) - base
            for s in range(400)
        ]
    ).detach()
    sigma = runs.std(0) / math.sqrt(len(runs))
    assert ((runs.mean(0) - exact).abs() < 5 * sigma + 1e-6).all()
    assert runs.std(0).min() > 0


def test_projections_that_share_an_input_share_the_mask(tiny: Any) -> None:
    model = tiny("llama")
    for p in lora_parameters_of(model):
        p.data.copy_(torch.eye(*p.shape))
    q, k = (get_bank(model).modules[f"model.layers.0.self_attn.{n}"] for n in ("q_proj", "k_proj"))
    call = AdapterContext(Mix.one("default"), DropoutNoise(0, 0, (1,), (0, 5)))
    x = torch.ones(5, 32)
    dropped = [
        (m(x, call, site) - m(x, AdapterContext()))[:, :16] == 0
        for m, site in ((q, "0.in"), (k, "0.in"), (q, None), (k, None))
    ]
    assert torch.equal(dropped[0], dropped[1]), "the same site"
    assert not torch.equal(dropped[2], dropped[3]), "without a site each module has its own"


def lora_parameters_of(model: Any) -> list[torch.nn.Parameter]:
    attach(model, LoraSpec(r=16, target_modules=("q_proj", "k_proj"), lora_dropout=0.5))
    return lora_parameters(model)


def test_no_noise_means_no_dropout(tiny: Any, ids: Tensor, logits: Any, shake: Any) -> None:
    model = tiny("llama")
    attach(model, LoraSpec(r=4, target_modules="all-linear", lora_dropout=0.9))
    shake(lora_parameters(model))
    assert torch.equal(logits(model.train(), ids), logits(model.eval(), ids))
    noisy = []
    for _ in range(2):
        token = AMBIENT_CONTEXT.set(
            AdapterContext(Mix.one("default"), DropoutNoise(0, 1, (1, 2), (0, 9, 18)))
        )
        noisy.append(logits(model, ids))
        AMBIENT_CONTEXT.reset(token)
    assert torch.equal(*noisy)
    assert not torch.allclose(noisy[0], logits(model, ids))


def test_two_rates_at_one_site() -> None:
    noise = DropoutNoise(0, 0, (1,), (0, 200))
    few, many = mask(noise, p=0.1), mask(noise, p=0.9)
    assert few.double().mean() > 0.8
    assert many.double().mean() < 0.2
    assert torch.equal(mask(noise, p=0.1), few)


def test_mixes_in_words() -> None:
    assert Mix.none().terms == ()
    assert Mix.constants({"a": 0.0, "b": -1}).terms == (MixTerm("b", None, -1.0),)
    assert Mix.per_sequence([None, None], [0, 2, 5]) == Mix.none()
    assert Mix.per_sequence(["a", "a"], [0, 2, 5]) == Mix.one("a")
    assert Mix.per_sequence(["a", None, "b", "b"], [0, 2, 5, 6, 9]).terms == (
        MixTerm("a", slice(0, 2)),
        MixTerm("b", slice(5, 9)),
    )


@given(st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_narrowing_a_mix_selects_its_rows(owners: list[str | None], data: st.DataObject) -> None:
    """A mix written out as one gate per token and adapter, before and after choosing some tokens."""
    starts = [0]
    for _ in owners:
        starts.append(starts[-1] + data.draw(st.integers(1, 4)))
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, starts[-1] - 1), min_size=1))))
    gates = torch.rand(starts[-1], 2)

    def table(mix: Mix, length: int) -> Tensor:
        out = torch.zeros(length, 2)
        for term in mix.terms:
            out[term.rows or slice(None), "ab".index(term.adapter)] += term.gate
        return out

    half = MixTerm("a", slice(0, starts[1]), gates[: starts[1], 0])
    for mix in (
        Mix.per_sequence(owners, starts),
        Mix.routed(["a", "b"], gates),
        Mix((half,)),
        Mix.constants({"a": 2}),
    ):
        assert torch.equal(table(mix.narrow(rows), len(rows)), table(mix, starts[-1])[rows])
