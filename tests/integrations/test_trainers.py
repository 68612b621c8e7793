"""Adapters in training loops of torch's: two processes give what one gives, and PEFT; ranks that come
apart stop.

A pair of processes is started once and makes every case and every fault of
`tests/support/torch_loops.py`; one process and PEFT, which knows nothing of Lorry, make the same
trainings here. Everything is float32.
"""

from __future__ import annotations

import gc
import json
import weakref
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.peft.files import load_adapter
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError, ContractError
from lorry.integrations import trainers
from lorry.integrations.agreement import fingerprint
from tests.support.ranks import run_ranks
from tests.support.seam import tiny_llama
from tests.support.torch_loops import (
    CASES,
    RATE,
    STEPS,
    TARGETS,
    base,
    gradients,
    loss_of,
    rows,
    spec,
    steps,
    trained,
)

ROOT = Path(__file__).resolve().parents[2]
# of the pair: far above what it takes, far below the suite's limit
pytestmark = pytest.mark.timeout(600)


class Pair(NamedTuple):
    """What two processes came to: tensors and faults by rank, and the folder of their adapters."""

    tensors: list[dict[str, Tensor]]
    faults: list[dict[str, list[str]]]
    folder: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("trainers")
    run_ranks("tests.support.torch_loops", folder)
    return Pair(
        [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)],
        [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)],
        folder,
    )


def relative(got: Tensor, true: Tensor) -> float:
    got, true = got.detach().double(), true.detach().double()
    return float((got - true).norm() / true.norm().clamp(min=1e-30))


def worst(got: Mapping[str, Tensor], true: Mapping[str, Tensor], kind: str) -> float:
    """The largest relative difference of the tensors of a kind."""
    names = [name for name in true if name.startswith(f"{kind}/")]
    assert names
    return max(relative(got[name], true[name]) for name in names)


def peft_twin(family: str, **fields: object) -> nn.Module:
    """PEFT's model with the values that our adapter starts with, by the files of neither."""
    model = base(family)
    attach(model, spec(family))
    values = {n: t.clone() for n, t in get_bank(model)["default"].tensors().items()}
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[family], **fields)
    twin = get_peft_model(base(family), config)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_" in name:
                ours = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                parameter.copy_(values[ours])
    return twin


def peft_trained(family: str) -> dict[str, Tensor]:
    """What PEFT comes to on one process, in the words of `trained`."""
    twin = peft_twin(family)
    mine = {
        n.removeprefix("base_model.model.").removesuffix(".default.weight"): p
        for n, p in twin.named_parameters()
        if p.requires_grad
    }
    optimizer = torch.optim.AdamW(list(mine.values()), lr=RATE, weight_decay=0.0)
    result = dict[str, Tensor]()
    for step in range(STEPS):
        loss_of(twin, rows(step)).backward()
        if not step:
            result |= {f"gradient/{n}": p.grad.clone() for n, p in mine.items()}
        optimizer.step()
        optimizer.zero_grad()
    return result | {f"value/{n}": p.detach() for n, p in mine.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """One process, by family: Lorry's, which calls the same functions, and PEFT's."""
    found = {}
    for family in TARGETS:
        model = trainers.apply_lora_to_fsdp_model(base(family), spec(family))
        found[family] = trained(model, model, 0, 1)
        found[f"{family} peft"] = peft_trained(family)
    return found


# --- equality


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradients_and_the_adapter_of_one(
    pair: Pair, alone: dict[str, dict[str, Tensor]], name: str
) -> None:
    prefix, family = f"{name}/", CASES[name][0]
    first, second = (
        {k.removeprefix(prefix): v for k, v in rank.items() if k.startswith(prefix)}
        for rank in pair.tensors
    )
    for true in (alone[family], alone[f"{family} peft"]):
        assert worst(first, true, "gradient") < 1e-6
        # AdamW divides by the root of what is nearly 0 for some, which multiplies the rounding
        assert worst(first, true, "value") < 1e-5
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("name", CASES)
def test_a_saved_adapter_is_one_for_peft(pair: Pair, name: str) -> None:
    family, tensors = CASES[name][0], pair.tensors[0]
    theirs = PeftModel.from_pretrained(base(family), str(pair.folder / name))
    ours = base(family)
    load_adapter(ours, pair.folder / name)
    with torch.no_grad():
        for model in (theirs, ours):
            logits = model(rows(99)).logits
            assert relative(tensors[f"{name}/logits"], logits) < 1e-6


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("fsdp1")])
def test_a_merge_keeps_the_logits_and_comes_out_again(pair: Pair, name: str) -> None:
    tensors = pair.tensors[0]
    logits, merged = tensors[f"{name}/logits"], tensors[f"{name}/merged"]
    assert relative(merged, logits) < 1e-5
    assert not torch.equal(merged, logits)
    assert torch.equal(tensors[f"{name}/unmerged"], logits)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_sent_once_a_step_and_not_where_ddp_sends_them(pair: Pair, name: str) -> None:
    """However many passes a step has; each call sends every gradient once, and each step has two."""
    values = sum(v.numel() for k, v in pair.tensors[0].items() if k.startswith(f"{name}/value/"))
    calls = 2 * STEPS
    if name.startswith("ddp"):
        calls = 0
    elif name == "parameters, no wrapper":
        calls = STEPS  # the second call finds them equal
    for tensors in pair.tensors:
        assert tensors[f"{name}/sums"].tolist() == [values] * calls


def test_the_mean_is_over_the_group_and_a_rank_without_a_gradient_counts_as_zeros(
    pair: Pair,
) -> None:
    twin = peft_twin("llama")
    loss_of(twin, rows(0)).backward()
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            ours = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            for tensors in pair.tensors:
                assert relative(tensors[f"half/gradient/{ours}"] * 2, parameter.grad) < 1e-6
            assert relative(pair.tensors[0][f"half/own/{ours}"], parameter.grad) < 1e-6
            assert not pair.tensors[1][f"half/own/{ours}"].any()


# --- faults

APART = "their gradients were not averaged: call lorry.integrations.trainers.synchronise(model)"
FAULTS = {
    "no synchronise": ("ContractError", APART),
    "no synchronise, plain attach": ("ContractError", "after optimizer step 1"),
    "plain attach and FSDP2": ("ConfigError", "apply_lora_to_fsdp_model(model, None)"),
    "plain attach and FSDP1": ("ConfigError", "apply_lora_to_fsdp_model(model, None)"),
    "no wrapper": ("ContractError", APART),
    "warm-up": ("ContractError", "after optimizer step 3"),
    "another seed": ("ContractError", "before the first step"),
    "another base": (
        "ContractError",
        "rank 1 has another base than rank 0: 1 of 23 tensors differ, the first is "
        "model.layers.1.mlp.up_proj.weight",
    ),
    "another norm": ("ContractError", "the first is model.norm.weight"),
    "another dtype": ("ContractError", "the first is model.embed_tokens.weight"),
    "another buffer": (
        "ContractError",
        "rank 1 has another base than rank 0: 24 tensors in place of 23",
    ),
    "another alpha": ("ContractError", "rank 1 has other adapters than rank 0"),
    "another rank": ("ContractError", "rank 1 has other adapters than rank 0"),
    "frozen parameters": ("ContractError", "get_lora_parameters(model)"),
    "no parameters": ("ContractError", "get_lora_parameters(model)"),
    "cut up by fully_shard": ("ContractError", "before FSDP call apply_lora_to_fsdp_model"),
    "cut up by FSDP1": ("ContractError", "before FSDP call apply_lora_to_fsdp_model"),
    "attached after fully_shard": ("ConfigError", "fully_shard has this model already"),
    "applied after fully_shard": ("ConfigError", "attach the adapter before it"),
    "attached after FSDP1": ("ConfigError", "FullyShardedDataParallel has this model already"),
    "attached after DDP": ("ConfigError", "DistributedDataParallel has this model already"),
    "saved apart": ("ContractError", "nothing was written"),
    "merged apart": ("ContractError", "before merging"),
    "FSDP1 merged": ("ConfigError", "flat parameter"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_on_every_rank(pair: Pair, name: str) -> None:
    kind, words = FAULTS[name]
    for faults in pair.faults:
        assert faults[name][0] == kind, faults[name]
        assert words in faults[name][1]


def test_a_base_that_rank_0_gives_the_others_is_not_compared(pair: Pair) -> None:
    for faults in pair.faults:
        for how in ("given by rank 0", "not there yet", "read by rank 0"):
            assert faults[f"another base, {how}"] == ["", ""]


def test_what_one_rank_cannot_do_no_rank_takes_for_done(pair: Pair) -> None:
    for name, rank, kind in (("not saved", 0, "DiskError"), ("not finite", 1, "ModelError")):
        assert pair.faults[rank][name][0] == kind
        other = pair.faults[1 - rank][name]
        assert other[0] == "LorryError"
        assert other[1].startswith(f"rank {rank} could not")
    assert not (pair.folder / "apart").exists()
    for faults in pair.faults:
        assert faults["nothing"] == ["", ""]


# --- one process


def test_the_flags_make_the_adapter_that_pefts_settings_make() -> None:
    parser = trainers.add_lora_arguments(ArgumentParser())
    words = "--use-lora --lora-r 4 --lora-alpha 2 --lora-target-modules q_proj v_proj"
    model = trainers.apply_lora_to_fsdp_model(base(), parser.parse_args(words.split()))
    adapter = get_bank(model)["default"]
    assert {path.rpartition(".")[2] for path in adapter.slots} == {"q_proj", "v_proj"}
    assert {(slot.A.shape[0], slot.scale) for slot in adapter.slots.values()} == {(4, 0.5)}
    twin = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    own = sum(p.numel() for p in trainers.get_lora_parameters(model))
    assert own == twin.get_nb_trainable_parameters()[0]


def test_without_use_lora_the_model_stays_as_it_is() -> None:
    model = base()
    before = list(model.named_parameters())
    args = trainers.add_lora_arguments(ArgumentParser()).parse_args([])
    for apply in (trainers.apply_lora_to_fsdp_model, trainers.apply_lora_to_model):
        with pytest.raises(ConfigError, match="--use-lora"):
            apply(model, args)
    assert all(
        p is q and p.requires_grad for p, (_, q) in zip(model.parameters(), before, strict=True)
    )
    with pytest.raises(ConfigError, match="no adapters"):
        trainers.get_lora_parameters(model)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="lora_only_trainable"):
        trainers.apply_lora_to_model(base(), Namespace(use_lora=True, lora_only_trainable=False))
    with pytest.raises(ConfigError, match="Lorry's own decoder"):
        trainers.apply_lora_to_model(tiny_llama(), spec())
    with pytest.raises(ConfigError, match=r"lorry\.attach"):
        trainers.apply_lora_to_model(base(), None)
    model = base()
    attach(model, spec(), "a.b")
    with pytest.raises(ConfigError, match="dot"):
        trainers.apply_lora_to_model(model, None)


def test_parameters_of_the_model_are_named_as_pefts() -> None:
    model = trainers.apply_lora_to_model(base(), spec())
    twin = get_peft_model(base(), LoraConfig(r=3, target_modules=TARGETS["llama"]))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    theirs = [n for n, p in twin.named_parameters() if p.requires_grad]
    assert trainable == [
        n.removeprefix("base_model.model.").removesuffix(".weight") for n in theirs
    ]
    # and go through a state dict
    other = trainers.apply_lora_to_model(base(), spec(init_lora_weights=True))
    assert relative(other(rows(0)).logits, model(rows(0)).logits) > 1e-3
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(rows(0)).logits, model(rows(0)).logits)


def test_a_target_that_no_gradient_reaches_is_told() -> None:
    model = trainers.apply_lora_to_model(base(), spec(target_modules=["q_proj", "lm_head"]))

    class PastTheHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor, labels: Tensor) -> Namespace:
            hidden = self.inner.get_submodule("model")(input_ids).last_hidden_state
            logits = hidden @ self.inner.get_submodule("lm_head").weight.t()
            return Namespace(loss=nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]))

    with pytest.warns(UserWarning, match=r"reached 1 of .*lm_head of default"):
        steps(PastTheHead(), 0, rates=(RATE,) * 3)


# --- dropout and autocast, as other trainers have them


def test_dropout_is_that_of_training_mode() -> None:
    """With A, B and the scale the identity, what an adapter adds is its input after dropout."""
    linear = nn.Sequential(nn.Linear(64, 64))
    trainers.apply_lora_to_model(
        linear, LoraSpec(r=64, lora_alpha=64, lora_dropout=0.25, target_modules=["0"])
    )
    with torch.no_grad():
        for parameter in trainers.get_lora_parameters(linear):
            parameter.copy_(torch.eye(64))
    layer, x = linear[0], torch.rand(200, 64) + 1
    assert isinstance(layer, BankLinear)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = linear(x) - plain
        kept = dropped.abs() > 0.5
        assert torch.allclose(dropped[kept], (x / 0.75)[kept], rtol=1e-4)
        assert float(dropped[~kept].abs().max()) < 1e-4
        # 12,800 of them: five standard deviations of a share are 0.02
        assert abs(float(kept.float().mean()) - 0.75) < 0.02
        again = linear(x) - plain
        assert not torch.equal(dropped, again)
        torch.manual_seed(0)
        assert torch.equal(linear(x) - plain, dropped)
        linear.eval()
        assert torch.allclose(linear(x) - plain, x, rtol=1e-4)


def test_recomputed_activations_drop_the_same() -> None:
    model = trainers.apply_lora_to_model(base(), spec(lora_dropout=0.5))
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        run = loss_of(model, rows(0)) if not recompute else None
        if run is None:
            run = checkpoint(loss_of, model, rows(0), use_reentrant=False)
        run.backward()
        found.append({n: g.clone() for n, g in gradients(model).items()})
    assert all(relative(found[1][n], g) < 1e-6 for n, g in found[0].items())


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_pefts_gradients(base_dtype: torch.dtype) -> None:
    """Of a base in either dtype; both compute in bfloat16, of which the bound is."""
    model = trainers.apply_lora_to_model(base().to(base_dtype), spec())
    # PEFT keeps its matrices in float32 under autocast, as we do
    twin = peft_twin("llama").to(base_dtype)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    exact = peft_twin("llama")
    loss_of(exact, rows(0)).backward()
    for each in (model, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(each, rows(0))
        loss.backward()
    ours = gradients(model)
    for (name, parameter), true in zip(twin.named_parameters(), exact.parameters(), strict=True):
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            # no worse than PEFT is, of the same arithmetic
            assert relative(ours[key], true.grad) < 2 * relative(parameter.grad, true.grad) + 0.01


def test_a_model_that_is_not_trained_ends_with_its_last_reference() -> None:
    """Watching an adapter keeps nothing alive."""
    model = trainers.apply_lora_to_model(base(), spec())
    steps(model, 0)
    seen = weakref.ref(get_bank(model))
    del model
    gc.collect()
    assert seen() is None


def test_ranks_that_cannot_be_told_apart_by_sums_alone_are() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    prints = [fingerprint(g) for g in ([a, b], [b, a], [a.flip(0), b], [a, None], [None, a])]
    assert len(set(prints)) == len(prints) - 1  # what is None has no bits: presence travels apart
    assert prints[0] == fingerprint([a.clone(), b.clone()])


def test_an_optimizer_over_frozen_parameters_is_told_on_one_process_too() -> None:
    model = trainers.apply_lora_to_fsdp_model(base(), spec())
    with pytest.raises(ContractError, match="get_lora_parameters"):
        steps(model, 0, parameters=model.parameters())


def test_an_optimizer_of_another_model_is_not_meant() -> None:
    """It steps without a gradient, while the adapters have some."""
    model, other = trainers.apply_lora_to_model(base(), spec()), nn.Linear(2, 2)
    loss_of(model, rows(0)).backward()
    torch.optim.SGD(other.parameters(), lr=RATE).step()
    steps(model, 0)


def test_adapters_that_were_cast_with_the_model_do_not_train() -> None:
    """Where FSDP does not see them they are not cast."""
    model = trainers.apply_lora_to_model(base(), spec()).to(torch.bfloat16)
    with pytest.raises(ContractError, match=r"cast to torch\.bfloat16 with the model"):
        steps(model, 0)
    hidden = trainers.apply_lora_to_fsdp_model(base(), spec()).to(torch.bfloat16)
    steps(hidden, 0)
    assert {p.dtype for p in trainers.get_lora_parameters(hidden)} == {torch.float32}
