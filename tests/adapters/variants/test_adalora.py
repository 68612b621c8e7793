"""AdaLoRA against PEFT's own, in fp32: logits, gradients, scores and masks step by step, and the files of
both. PEFT's `AdaLoraModel.update_and_allocate` runs beside ours on the same values and gradients."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.merge import merge, unmerge
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.adalora import RankAllocator, fold_triplets
from lorry.backends.optim import OptimSettings, ParameterSetOptimizer
from lorry.errors import ConfigError, ModelError

TARGETS = ("q_proj", "down_proj")
NUMBERS: dict[str, Any] = {"target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "beta1": 0.8}
STEPS = 9


def ours(model: nn.Module, **numbers: Any) -> Adapter:
    """An AdaLoRA adapter of rank 4 on q_proj and down_proj."""
    return attach(
        model, LoraSpec(r=4, lora_alpha=6, target_modules=TARGETS, adalora={**NUMBERS, **numbers})
    )


def theirs(model: nn.Module, **numbers: Any) -> Any:
    """PEFT's, with the same settings."""
    config = peft.AdaLoraConfig(
        init_r=4,
        lora_alpha=6,
        target_modules=list(TARGETS),
        total_step=STEPS,
        task_type="CAUSAL_LM",
        **{**NUMBERS, **numbers},
    )
    return peft.get_peft_model(model, config)


def pairs(adapter: Adapter, model: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(our master, PEFT's parameter) of every A, E and B."""
    own = {**adapter.masters()}
    named = {
        name.removeprefix("base_model.model.").removesuffix(".default"): p
        for name, p in model.named_parameters()
        if ".lora_" in name
    }
    assert set(own) == set(named)
    return [(own[name], named[name]) for name in own]


def copy_values(adapter: Adapter, model: Any) -> None:
    """Give ours the values of PEFT's."""
    with torch.no_grad():
        for mine, its in pairs(adapter, model):
            mine.copy_(its)
    adapter.touch()


def test_first_values_are_those_of_peft_in_kind(tiny: Any) -> None:
    adapter = ours(tiny("llama"))
    for path, slot in adapter.slots.items():
        assert slot.E is not None
        assert not slot.E.any(), path
        # N(0, 0.02): 4 x 32 numbers at least
        for half in (slot.A, slot.B):
            assert 0.015 < float(half.std()) < 0.025, path


def test_logits_and_gradients_are_pefts(tiny: Any, ids: Tensor, shake: Any) -> None:
    model, model_of_peft = tiny("llama"), theirs(tiny("llama"), orth_reg_weight=0.0)
    adapter = ours(model)
    shake([p for _, p in pairs(adapter, model_of_peft)])
    copy_values(adapter, model_of_peft)
    mine, its = model(input_ids=ids).logits, model_of_peft(input_ids=ids).logits
    torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
    for logits in (mine, its):
        logits.square().mean().backward()
    for one, other in pairs(adapter, model_of_peft):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
        assert one.grad.abs().max() > 1e-4


def test_the_penalty_is_pefts(tiny: Any, ids: Tensor, shake: Any) -> None:
    model_of_peft = theirs(tiny("llama"), orth_reg_weight=0.3)
    adapter = ours(tiny("llama"), orth_reg_weight=0.3)
    shake([p for _, p in pairs(adapter, model_of_peft)])
    copy_values(adapter, model_of_peft)
    # labels of -100 alone: what is left of PEFT's loss is its penalty
    out = model_of_peft(input_ids=ids, labels=ids)
    plain = model_of_peft.base_model.model(input_ids=ids, labels=ids)
    (out.loss - plain.loss).backward()
    RankAllocator(adapter, STEPS).add_orthogonality_gradient()
    for one, other in pairs(adapter, model_of_peft):
        assert one.grad is not None
        expected = torch.zeros_like(one) if other.grad is None else other.grad
        torch.testing.assert_close(one.grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "numbers", [{}, {"deltaT": 1, "tfinal": 0, "tinit": 0}], ids=["late", "each"]
)
def test_scores_and_masks_follow_pefts_step_by_step(
    tiny: Any, ids: Tensor, numbers: dict[str, Any]
) -> None:
    model_of_peft = theirs(tiny("llama"), **numbers)
    adapter = ours(tiny("llama"), **numbers)
    copy_values(adapter, model_of_peft)
    allocator, tuner = RankAllocator(adapter, STEPS), model_of_peft.base_model
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.02)
    kept = list[int]()
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        out = model_of_peft(input_ids=ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, its in pairs(adapter, model_of_peft):
                mine.copy_(its)
                assert mine.grad is not None
                mine.grad.copy_(its.grad)
        tuner.update_and_allocate(step)
        allocator.update(step)
        theirs_by_name = tuner.rankallocator
        for name, mean in adapter.split_like(allocator.sensitivity).items():
            key = f"model.{name}.default" if not name.startswith("model.") else f"{name}.default"
            # PEFT forgets its scores once the schedule has ended
            if key in theirs_by_name.exp_avg_ipt:
                torch.testing.assert_close(mean, theirs_by_name.exp_avg_ipt[key])
                spread = adapter.split_like(allocator.uncertainty)[name]
                torch.testing.assert_close(spread, theirs_by_name.exp_avg_unc[key])
        for mine, its in pairs(adapter, model_of_peft):
            assert torch.equal(mine, its), step
        kept.append(sum(int((s.E != 0).sum()) for s in adapter.slots.values() if s.E is not None))
    # between two allocations what is gone grows again, as in PEFT
    every = {**NUMBERS, **numbers}["deltaT"]
    left = kept if every == 1 else [n for step, n in enumerate(kept, 1) if not step % every]
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 2  # and not all at once
    assert kept[-1] == 2 * 6


def trained(tiny: Any, ids: Tensor) -> tuple[Any, Adapter]:
    """A model and its adapter after a whole schedule, by our own optimizer."""
    model = tiny("llama")
    adapter = ours(model)
    optimizer = ParameterSetOptimizer(adapter, OptimSettings(total_steps=STEPS))
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.add_penalty_gradients()
        optimizer.step(0.02, adapter.norm())
    return model, adapter


def test_the_finished_adapter_is_plain_lora(
    tiny: Any, ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    model, adapter = trained(tiny, ids)
    with torch.no_grad():  # a module with nothing left, as large models have them
        gone = next(iter(adapter.slots.values()))
        assert gone.E is not None
        gone.E.zero_()
    adapter.touch()
    save_adapter(model, tmp_path)
    expected = logits(model, ids)
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert str(config.peft_type).endswith("LORA")
    assert gone.module not in config.target_modules
    assert config.rank_pattern  # ranks differ
    assert config.alpha_pattern.keys() == config.rank_pattern.keys()
    again = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
    torch.testing.assert_close(logits(again, ids), expected, atol=1e-5, rtol=1e-5)
    other = tiny("llama")
    back = load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other, ids), expected, atol=1e-6, rtol=1e-5)
    assert sum(slot.A.shape[0] for slot in back.slots.values()) < 4 * 6
    # and the unfinished one merges as it is
    before = deepcopy(dict(model.state_dict()))
    merge(model)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    unmerge(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("masked", [False, True])
def test_pefts_files_are_read(
    tiny: Any, ids: Tensor, logits: Any, shake: Any, tmp_path: Path, masked: bool
) -> None:
    model_of_peft = theirs(tiny("llama"))
    shake([p for n, p in model_of_peft.named_parameters() if ".lora_" in n])
    if masked:
        names = [n for n, _ in model_of_peft.named_parameters() if ".lora_E." in n]
        pattern = {n.removeprefix("base_model.model."): [True, False, True, True] for n in names}
        pattern[next(iter(pattern))] = [False] * 4
        with torch.no_grad():
            for name, param in model_of_peft.named_parameters():
                if ".lora_E." in name:
                    kept = torch.tensor(pattern[name.removeprefix("base_model.model.")])
                    param.masked_fill_(~kept[:, None], 0.0)
        model_of_peft.peft_config["default"].rank_pattern = pattern
    expected = logits(model_of_peft, ids)
    model_of_peft.save_pretrained(str(tmp_path))
    model = tiny("llama")
    adapter = load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    assert adapter.spec.adalora is None
    assert sum(slot.A.shape[0] for slot in adapter.slots.values()) == (15 if masked else 24)
    again = tmp_path / "again"
    save_adapter(model, again)
    both = peft.PeftModel.from_pretrained(tiny("llama"), str(again))
    torch.testing.assert_close(logits(both, ids), expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="init_r=4 and ends with target_r=4"):
        ours(tiny("llama"), target_r=4)
    with pytest.raises(ConfigError, match="use_rslora does not go with AdaLoRA"):
        LoraSpec(r=4, use_rslora=True, adalora={"target_r": 2})  # type: ignore[arg-type]  # a map
    with pytest.raises(ConfigError, match=r"beta1 is 1\.0"):
        ours(tiny("llama"), beta1=1.0)
    adapter = ours(tiny("llama"))
    with pytest.raises(
        ConfigError, match=r"tinit=1 and the last tfinal=2 steps, and the run has 3"
    ):
        RankAllocator(adapter, 3)
    with pytest.raises(ConfigError, match="no rank left"):
        save_adapter(ours_model(tiny), "nowhere")
    with pytest.raises(ConfigError, match="embed_tokens is an embedding"):
        attach(tiny("llama"), LoraSpec(r=4, target_modules=("embed_tokens",), adalora=NUMBERS))  # type: ignore[arg-type]  # a map


def ours_model(tiny: Any) -> nn.Module:
    """A model with an adapter that has not made a step."""
    model = tiny("llama")
    ours(model)
    return model


def test_layers_by_pattern_are_saved(tiny: Any, tmp_path: Path) -> None:
    """What is left names its modules by their paths; the pattern without layers was refused, after a run."""
    model = tiny("llama")
    spec = LoraSpec(
        r=4,
        target_modules=TARGETS,
        adalora=NUMBERS,
        layers_to_transform=[1],
        layers_pattern="layers",
    )
    adapter = attach(model, spec)
    with torch.no_grad():
        for slot in adapter.slots.values():
            assert slot.E is not None
            slot.E.fill_(1.0)
    save_adapter(model, tmp_path)
    assert load_adapter(tiny("llama"), tmp_path).slots.keys() == adapter.slots.keys()
    assert all(".1." in path for path in adapter.slots)


def test_it_takes_its_place_beside_others(tiny: Any, ids: Tensor, logits: Any) -> None:
    model, adapter = trained(tiny, ids)
    expected = logits(model, ids)
    bank = get_bank(model)
    bank.put_in_place(fold_triplets(adapter))
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-6, rtol=1e-5)
    assert bank["default"].spec.adalora is None
    assert bank.names() == ["default"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (torch.zeros(()), "no ranks in common"),
        (torch.zeros(3), "no ranks in common"),
        (torch.zeros(0, 2), "no ranks in common"),
        (torch.ones(4, 16, dtype=torch.int32), "floats are expected"),
    ],
)
def test_a_damaged_matrix_is_no_module_without_ranks(
    tiny: Any, tmp_path: Path, changed: Tensor, message: str
) -> None:
    theirs(tiny("llama")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    values = load_file(file)
    key = next(name for name in values if name.endswith("q_proj.lora_A"))
    if changed.dim() == 2 and len(changed):
        changed = changed[:1, :1].expand(values[key].shape).contiguous()
    save_file({**values, key: changed}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_adapter(tiny("llama"), tmp_path)


def test_an_alpha_that_is_no_number_is_refused(tiny: Any, tmp_path: Path) -> None:
    theirs(tiny("llama")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": float("nan")}))
    with pytest.raises(ModelError, match="lora_alpha"):
        load_adapter(tiny("llama"), tmp_path)
