"""The first values of each initialisation: PEFT's where PEFT works, else the formula in float64; and
what is drawn is a function of (seed, module).
"""

from __future__ import annotations

import dataclasses
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.initialization.factors import module_seed
from lorry.adapters.initialization.recording import counting_tokens
from lorry.adapters.quantization.linear import open_linears, quantize_linears
from lorry.adapters.quantization.packed import QUANTIZATIONS, pack
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError

TARGETS = {
    "llama": ("q_proj", "v_proj", "gate_proj", "down_proj"),
    "gpt2": ("c_attn", "c_fc", "mlp.c_proj"),
}
R, ALPHA = 4, 6  # a scale of 1.5: none that a formula could leave out unseen


def in_peft(model: nn.Module, family: str, init: str, **settings: Any) -> peft.PeftModel:
    """PEFT's adapter on the same targets."""
    config = peft.LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS[family]),
        init_lora_weights=init,
        task_type="CAUSAL_LM",
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def peft_factors(model: peft.PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """{path: (A, B)}."""
    return {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight.detach(),
            module.lora_B["default"].weight.detach(),
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def ours(model: nn.Module, family: str, init: str, **given: Any) -> Adapter:
    """Our adapter on the same targets."""
    spec = LoraSpec(r=R, lora_alpha=ALPHA, target_modules=TARGETS[family], init_lora_weights=init)
    return attach(model, spec, **given)


def matrix(model: nn.Module, path: str) -> Tensor:
    """[O,I] float64 of a linear, whichever way it lies."""
    module = model.get_submodule(path)
    weight = module.weight.detach().double()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_as_peft(family: str, init: str, tiny: Callable[..., nn.Module]) -> None:
    """float32: A, B and what is taken off are PEFT's; on Conv1D its olora fails, and Q R in float64 is asked."""
    adapter = ours(tiny(family), family, init)
    if (family, init) == ("gpt2", "olora"):
        expected = {}
        for path in adapter.slots:
            q, r = np.linalg.qr(matrix(tiny(family), path).numpy())
            expected[path] = (torch.tensor(r[:R]).float(), torch.tensor(q[:, :R]).float())
    else:
        expected = peft_factors(in_peft(tiny(family), family, init))
    assert expected.keys() == adapter.slots.keys()
    for path, slot in adapter.slots.items():
        a, b = expected[path]
        # a direction and its opposite are the same one
        signs = (slot.A.detach() * a).sum(1).sign()
        torch.testing.assert_close(slot.A.detach(), signs[:, None] * a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(slot.B.detach(), signs * b, rtol=1e-4, atol=1e-5)
        assert slot.initial is not None
        assert torch.equal(slot.initial[0], slot.A)
        assert torch.equal(slot.initial[1], slot.B)


def test_the_randomised_pissa(
    tiny: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32: with iterations enough it holds what the exact one does, to 1% of its norm; its draws are the
    seed's and the module's, and leave torch's own generator where it was."""
    exact, state = ours(tiny("llama"), "llama", "pissa"), torch.get_rng_state()
    near = ours(tiny("llama"), "llama", "pissa_niter_64", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for path, slot in near.slots.items():
        own = exact.slots[path]
        size, most = (float((one.B @ one.A).detach().norm()) for one in (slot, own))
        assert most * 0.99 < size < most * (1 + 1e-6), path
    alone = attach(
        tiny("llama"),
        LoraSpec(r=R, lora_alpha=ALPHA, init_lora_weights="pissa_niter_64"),
        seed=3,
        modules=["model.layers.2.mlp.down_proj"],
    )
    for path, slot in alone.slots.items():
        assert torch.equal(slot.A, near.slots[path].A)
    # PEFT draws from torch's generator as it happens to stand: from the same seed, the same
    path, model = "model.layers.2.mlp.down_proj", tiny("llama")

    def seeded(*given: Any, **named: Any) -> Any:
        torch.manual_seed(module_seed(3, path))
        return torch.svd_lowrank(*given, **named)

    monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", seeded)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=[path], init_lora_weights="pissa_niter_64"
    )
    a, b = peft_factors(peft.get_peft_model(model, config))[path]
    torch.testing.assert_close(near.slots[path].A.detach(), a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(near.slots[path].B.detach(), b, rtol=1e-5, atol=1e-6)
    other = ours(tiny("llama"), "llama", "pissa_niter_1", seed=4)
    again = ours(tiny("llama"), "llama", "pissa_niter_1", seed=5)
    assert not torch.equal(other.values, again.values)


def test_milora_by_float64(tiny: Callable[..., nn.Module]) -> None:
    """float32 against float64: s B A is the part of the smallest singular values."""
    adapter = ours(tiny("llama"), "llama", "milora")
    for path, slot in adapter.slots.items():
        u, s, vh = np.linalg.svd(matrix(tiny("llama"), path).numpy(), full_matrices=False)
        part = (u[:, -R:] * s[-R:]) @ vh[-R:]
        torch.testing.assert_close(
            (slot.scale * slot.B @ slot.A).detach().double(), torch.tensor(part), rtol=0, atol=2e-5
        )
        balance = slot.A.norm(dim=1) - slot.B.norm(dim=0)
        assert float(balance.detach().abs().max()) < 1e-5


def test_orthogonal(tiny: Callable[..., nn.Module]) -> None:
    """float32: PEFT's sizes, a zero product that is nothing to take off, an even rank."""
    adapter = ours(tiny("llama"), "llama", "orthogonal", seed=1)
    theirs = peft_factors(in_peft(tiny("llama"), "llama", "orthogonal"))
    assert adapter.initial is None
    for path, slot in adapter.slots.items():
        assert float((slot.B @ slot.A).detach().abs().max()) < 1e-6
        for mine, its in zip((slot.A, slot.B), theirs[path], strict=True):
            assert 0.5 < float((mine.norm() / its.norm()).detach()) < 2
            assert torch.linalg.matrix_rank(mine) == R // 2
    with pytest.raises(ConfigError, match="even rank, half of it for A and half for B; r is 5"):
        LoraSpec(r=5, init_lora_weights="orthogonal")
    with pytest.raises(ConfigError, match="r is 3"):
        LoraSpec(r=4, rank_pattern={"q_proj": 3}, init_lora_weights="orthogonal")


def test_corda_as_peft(
    tiny: Callable[..., nn.Module], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32: s B A of every module, row by row through the model."""
    # PEFT's module asks a package that it does not depend on for the standard library's decorator
    stand_in = types.SimpleNamespace(dataclass=dataclasses.dataclass)
    monkeypatch.setitem(sys.modules, "attr", stand_in)
    from peft.tuners.lora.corda import preprocess_corda

    model = tiny("llama")
    config = peft.LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS["llama"]),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
        task_type="CAUSAL_LM",
    )
    preprocess_corda(model, config, run_model=lambda: [model(row[None]) for row in ids])
    expected = peft_factors(peft.get_peft_model(model, config))
    mine = tiny("llama")
    adapter = ours(mine, "llama", "corda", run_model=lambda: [mine(row[None]) for row in ids])
    for path, slot in adapter.slots.items():
        a, b = expected[path]
        product = (b @ a).double()
        difference = ((slot.B @ slot.A).detach().double() - product).norm() / product.norm()
        assert float(difference) < 2e-3, path


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_ga_as_peft(family: str, tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """float32: A and B but for signs. 4 r is a side of every matrix but few, where PEFT's draws are exact;
    on Conv1D PEFT scales by inputs where the paper has outputs."""
    # PEFT switches the model to training, where GPT-2 drops
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model, mine = (tiny(family, **(still if family == "gpt2" else {})) for _ in range(2))
    config = peft.LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS[family]),
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
        task_type="CAUSAL_LM",
    )

    def run(which: nn.Module) -> None:
        for row in ids:
            which(input_ids=row[None], labels=row[None]).loss.backward()

    torch.manual_seed(0)
    preprocess_loraga(model, config, train_step=lambda: run(model))
    expected = peft_factors(peft.get_peft_model(model, config))
    adapter = ours(mine, family, "lora_ga", run_model=lambda: run(mine))
    assert all(p.grad is None and not p.requires_grad for p in mine.parameters())
    for path, slot in adapter.slots.items():
        a, b = expected[path]
        module = mine.get_submodule(path)
        if family == "gpt2":
            b = b * (module.out_features / module.in_features) ** 0.25
        for got, want in ((slot.A.detach(), a), (slot.B.detach().t(), b.t())):
            cosine = torch.cosine_similarity(got, want, dim=1).abs()
            # the last directions of a randomised SVD are its least exact
            assert float(cosine[: R // 2].min()) > 0.999, (path, cosine)
            torch.testing.assert_close(got.norm(dim=1), want.norm(dim=1), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("format_name", [None, "nf4", "int8"])
def test_lora_ga_by_float64(
    format_name: str | None, tiny: Callable[..., nn.Module], ids: Tensor
) -> None:
    """The gradient's own directions, by autograd and numpy in float64: what B A is made of. Of a packed base
    (opened to float32) that at the values it computes with."""
    mine, truth = tiny("llama"), tiny("llama")
    if format_name is not None:
        for model in (mine, truth):
            quantize_linears(model, QUANTIZATIONS[format_name], torch.float32)
        open_linears(truth)
    path = "model.layers.1.mlp.down_proj"
    truth = truth.double()
    truth.get_submodule(path).weight.requires_grad_(True)
    truth(input_ids=ids, labels=ids).loss.backward()
    u, s, vh = np.linalg.svd(truth.get_submodule(path).weight.grad.numpy())
    adapter = attach(
        mine,
        LoraSpec(r=R, lora_alpha=ALPHA, init_lora_weights="lora_ga"),
        modules=[path],
        run_model=lambda: mine(input_ids=ids, labels=ids).loss.backward(),
    )
    slot = adapter.slots[path]
    a, b = slot.A.detach().double().numpy(), slot.B.detach().double().numpy()
    assert np.abs(np.abs(np.sum(a * vh[:R], 1)) - 1).max() < 1e-4
    # stable: sqrt(sqrt(outputs)) / sqrt(16)
    length = s[R : 2 * R] * 32**0.25 / 4
    assert np.abs(np.linalg.norm(b, axis=0) / length - 1).max() < 1e-3
    assert np.abs(np.abs(np.sum(b / length * u[:, R : 2 * R], 0)) - 1).max() < 1e-3


@pytest.mark.parametrize("format_name", ["nf4", "int8"])
def test_loftq_by_float64(format_name: str, tiny: Callable[..., nn.Module]) -> None:
    """float32 against float64: the best rank-r part of what packing rounded off, and the packed base as
    it was."""
    model, whole = tiny("llama"), tiny("llama")
    quantize_linears(model, QUANTIZATIONS[format_name], torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = ours(model, "llama", "loftq", original=lambda path: whole.get_submodule(path).weight)
    assert adapter.initial is None
    for path, slot in adapter.slots.items():
        weight = matrix(whole, path)
        error = weight - pack(weight.float(), QUANTIZATIONS[format_name]).open(torch.float32)
        u, s, vh = np.linalg.svd(error.numpy(), full_matrices=False)
        part = torch.tensor((u[:, :R] * s[:R]) @ vh[:R])
        mine = (slot.scale * slot.B @ slot.A).detach().double()
        assert float((mine - part).norm() / part.norm()) < 1e-3
        assert float((error - mine).norm()) < float(error.norm())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def inputs_of(model: nn.Module, ids: Tensor, paths: list[str]) -> dict[str, np.ndarray]:
    """What linears read, by plain hooks: {path: [tokens, I] float64}."""
    seen, handles = dict[str, Any](), []
    for path in paths:
        handles.append(
            model.get_submodule(path).register_forward_hook(
                lambda module, given, out, path=path: seen.__setitem__(
                    path, given[0].detach().reshape(-1, given[0].shape[-1]).double().numpy()
                )
            )
        )
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_eva_by_float64(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """Directions, ranks and scales by numpy from the inputs of the tokens that count; float32 values."""
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    counted[:, 2:] = True
    paths = list(ours(tiny("llama"), "llama", "pissa").slots)
    inputs = inputs_of(tiny("llama"), ids, paths)
    mask = counted.reshape(-1).numpy()
    shares, directions = {}, {}
    for path in paths:
        rows = inputs[path][mask]
        _, s, vh = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        shares[path], directions[path] = s**2 / (s**2).sum(), vh
    everything = sorted(
        (
            (share, -number, path)
            for number, path in enumerate(paths)
            for share in shares[path][: 2 * R]
        ),
        reverse=True,
    )
    expected = dict.fromkeys(paths, 0)
    for _, _, path in everything[: R * len(paths)]:
        expected[path] += 1

    mine = tiny("llama")

    def run() -> None:
        with counting_tokens(counted.reshape(-1)):
            mine(ids)

    adapter = ours(mine, "llama", "eva", run_model=run)
    ranks = {path: slot.A.shape[0] for path, slot in adapter.slots.items()}
    assert ranks == {path: rank for path, rank in expected.items() if rank}
    assert len(set(ranks.values())) > 1, "no rank moved: the case proves little"
    assert sum(ranks.values()) == R * len(paths)
    for path, slot in adapter.slots.items():
        assert slot.scale == pytest.approx(ALPHA / R)
        assert not bool(slot.B.any())
        rows = slot.A.detach().double().numpy()
        cosine = np.abs(np.sum(rows * directions[path][: len(rows)], 1))
        assert cosine.min() > 1 - 1e-4, path


def test_eva_on_layers_by_pattern(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """Other ranks at the same modules: the pattern without layers was refused."""
    model = tiny("llama")
    spec = LoraSpec(
        r=4,
        rho=4.0,
        target_modules=TARGETS["llama"],
        init_lora_weights="eva",
        layers_to_transform=(1,),
        layers_pattern="layers",
    )

    def run() -> None:
        model(input_ids=ids)

    adapter = attach(model, spec, run_model=run)
    assert {slot.A.shape[0] for slot in adapter.slots.values()} != {4}
    assert all(".1." in path for path in adapter.slots)


def test_eva_near_peft(tiny: Callable[..., nn.Module]) -> None:
    """PEFT's incremental SVD over the same rows: the same ranks but for a few ties, and the same space."""
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}]
    theirs = in_peft(tiny("llama"), "llama", "eva", eva_config=EvaConfig(rho=1.0))
    peft.initialize_lora_eva_weights(theirs, rows, show_progress_bar=False)
    expected, mine = peft_factors(theirs), tiny("llama")
    spec = LoraSpec(
        r=R, lora_alpha=ALPHA, target_modules=TARGETS["llama"], init_lora_weights="eva", rho=1.0
    )
    adapter = attach(mine, spec, run_model=lambda: mine(ids))
    for path, slot in adapter.slots.items():
        a = expected[path][0]
        assert a.shape == slot.A.shape
        # the part of PEFT's directions that lies in the space of ours
        inside = (a @ slot.A.detach().t()).norm() / a.norm()
        assert float(inside) > 0.95, (path, inside)


def test_an_adapter_may_lose_modules(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """A module with rank 0 leaves; the others keep their place in the bank and what is active."""
    mine = tiny("llama")
    attach(mine, LoraSpec(r=2, target_modules=("q_proj",)), "first")
    spec = LoraSpec(
        r=1, lora_alpha=2, target_modules=TARGETS["llama"], init_lora_weights="eva", rho=16.0,
        use_rslora=True,
    )  # fmt: skip
    adapter = attach(mine, spec, "second", run_model=lambda: mine(ids))
    attach(mine, LoraSpec(r=2, target_modules=("q_proj",)), "third")
    bank = get_bank(mine)
    assert bank.names() == ["first", "second", "third"]
    assert [term.adapter for term in bank.active.terms] == ["first", "second", "third"]
    assert len(adapter.slots) < 12
    assert adapter is bank["second"]
    for path, slot in adapter.slots.items():
        assert slot.scale == pytest.approx(2.0), path  # alpha 2 over sqrt 1, at every rank
