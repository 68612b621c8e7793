"""What cannot be synced is one clear error before anything is built; copies of weights that no more is kept
of than differs; rollouts that name the adapter. No slime and no Megatron here.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorry.errors import ConfigError, ContractError
from lorry.integrations.rollout import VersionPublisher
from lorry.integrations.slime.arguments import COMPARE_ROLLOUT
from lorry.integrations.slime.backups import AdapterBackuper, needs_frozen
from lorry.integrations.slime.generate import adapter_name, generate
from lorry.integrations.slime.limits import GENERATE, check_sync


def arguments(folder: Path, **changes: Any) -> SimpleNamespace:
    """slime's namespace of a run that can be synced either way, with some values changed."""
    slime = {
        "hf_checkpoint": str(folder),
        "tensor_model_parallel_size": 2,
        "num_query_groups": 2,
        "update_weight_mode": "full",
        "keep_old_actor": False,
        "save": str(folder / "run"),
        "sglang_enable_lora": True,
        "sglang_max_lora_rank": 8,
        "custom_generate_function_path": GENERATE,
        "use_lora": True,
        "lora_r": 8,
    }
    return SimpleNamespace(**{**slime, **changes})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_what_is_right_passes(model: Path, mode: str) -> None:
    check_sync(arguments(model, lora_sync=mode))


ADAPTER = {"lora_sync": "adapter"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_model_parallel_size": 4}, "--tensor-model-parallel-size 4 cuts a KV group"),
        ({"megatron_to_hf_mode": "bridge"}, "--megatron-to-hf-mode bridge"),
        ({"update_weight_mode": "delta"}, "--update-weight-mode delta"),
        ({**ADAPTER, "update_weight_mode": "delta"}, "--update-weight-mode delta.*merged"),
        ({**ADAPTER, "keep_old_actor": True}, "--keep-old-actor.*merged"),
        ({**ADAPTER, "sglang_enable_lora": False}, "--sglang-enable-lora"),
        ({**ADAPTER, "lora_r": 16}, "--sglang-max-lora-rank 8 is below the adapter's rank, 16"),
        ({**ADAPTER, "save": None}, "--lora-sync-dir, or --save"),
        ({**ADAPTER, "custom_generate_function_path": None}, "answered by the base.*generate"),
    ],
)
def test_what_cannot_be_synced_is_named(model: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sync(arguments(model, **changes))


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_quantised_checkpoint_takes_adapters_and_no_merged_weights(
    model: Path, part: str | None
) -> None:
    stated = {"quantization_config": {"quant_method": "fp8"}}
    config = {"model_type": "llama", **(stated if part is None else {part: stated})}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantised \(fp8\).*--lora-sync adapter"):
        check_sync(arguments(model))
    check_sync(arguments(model, **ADAPTER))


def test_what_is_not_proved_where_memory_is_given_up_is_said(model: Path) -> None:
    given = {"offload_train": True}
    with pytest.warns(
        UserWarning, match="give --rollout-data-postprocess-path lorry.*compare_roll"
    ):
        check_sync(arguments(model, **given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_sync(arguments(model, **given, rollout_data_postprocess_path=COMPARE_ROLLOUT))
        check_sync(arguments(model, **given, lora_check_every=0))
        check_sync(arguments(model))


def test_a_generation_of_ones_own_is_told_what_to_add(model: Path) -> None:
    with pytest.warns(UserWarning, match="mine.generate has to name the adapter"):
        check_sync(arguments(model, custom_generate_function_path="mine.generate", **ADAPTER))


# copies of weights


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def weights() -> dict[str, nn.Parameter]:
    """A frozen matrix and a trained one."""
    return {
        "weight": nn.Parameter(torch.arange(12.0), requires_grad=False),
        "lora_A": nn.Parameter(torch.ones(3)),
    }


def values(model: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.items()}


def test_tags_share_frozen_weights_that_they_have_alike(
    alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = weights()
    copies = AdapterBackuper(lambda: model.items(), keep_frozen=True)
    copies.backup("actor")
    model["lora_A"].data.mul_(2)
    copies.backup("ref")
    assert copies.get("ref")["weight"] is copies.get("actor")["weight"]
    assert copies.get("ref")["lora_A"] is not copies.get("actor")["lora_A"]
    copies.restore("actor")
    assert torch.equal(model["lora_A"], torch.ones(3))
    printed = capsys.readouterr().out
    assert "backup 'actor' keeps 5.722e-05 MiB" in printed  # 15 values of 4 bytes
    assert "backup 'ref' keeps 1.144e-05 MiB" in printed  # 3 of them


def test_another_checkpoint_under_a_tag_is_kept_and_restored(alone: None) -> None:
    model = weights()
    copies = AdapterBackuper(lambda: model.items(), keep_frozen=True)
    copies.backup("actor")
    own = values(model)
    # as slime loads a teacher over the actor
    model["weight"].data.add_(1)
    copies.backup("teacher")
    other = values(model)
    for tag, true in (("actor", own), ("teacher", other), ("actor", own)):
        copies.restore(tag)
        assert all(torch.equal(model[name], true[name]) for name in true), tag
    # a reference that is moved to the actor shares its weights from then on
    copies.backup("teacher")
    assert copies.get("teacher")["weight"] is copies.get("actor")["weight"]


def test_a_copy_of_a_tag_is_its_own(alone: None) -> None:
    model = weights()
    copies = AdapterBackuper(lambda: model.items(), keep_frozen=True)
    copies.backup("actor")
    copies.backup("old_actor")
    model["lora_A"].data.mul_(3)
    copies.backup("actor")
    copies.copy(src_tag="actor", dst_tag="old_actor")
    model["lora_A"].data.mul_(5)
    copies.backup("actor")
    copies.restore("old_actor")
    assert torch.equal(model["lora_A"], torch.full((3,), 3.0))


def test_frozen_weights_are_not_kept_where_nothing_reads_them(alone: None) -> None:
    model = weights()
    copies = AdapterBackuper(lambda: model.items(), keep_frozen=False)
    copies.backup("actor")
    assert list(copies.get("actor")) == ["lora_A"]
    model["lora_A"].data.zero_()
    copies.restore("actor")
    assert torch.equal(model["lora_A"], torch.ones(3))
    assert torch.equal(model["weight"], torch.arange(12.0))
    with pytest.raises(ContractError, match="second copy of the model"):
        copies.backup("ref")


@pytest.mark.parametrize("flag", ["colocate", "use_kl_loss", "keep_old_actor"])
def test_what_reads_frozen_copies(flag: str) -> None:
    assert not needs_frozen(SimpleNamespace(kl_coef=0.0))
    assert needs_frozen(SimpleNamespace(kl_coef=0.0, **{flag: True}))
    assert needs_frozen(SimpleNamespace(kl_coef=0.1))


def test_a_teacher_reads_frozen_copies_where_megatron_runs_it() -> None:
    assert needs_frozen(SimpleNamespace(use_opd=True, opd_type="megatron"))
    # an engine of its own scores
    assert not needs_frozen(SimpleNamespace(use_opd=True, opd_type="sglang"))


# rollouts


def adapter(folder: Path) -> dict[str, bytes]:
    from safetensors.torch import save

    return {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": save({"lora_A": torch.ones(2, 2)}),
    }


def test_every_request_names_the_newest_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[dict[str, Any]] = []
    rollout: Any = ModuleType("slime.rollout.sglang_rollout")

    async def post(url: str, payload: dict[str, Any], headers: Any = None) -> str:
        posted.append(payload)
        return url

    async def own_generate(args: Any, sample: Any, sampling_params: Any) -> Any:
        return await rollout.post("http://router/generate", {"input_ids": sample}, headers=None)

    rollout.post, rollout.generate = post, own_generate
    for name in ("slime", "slime.rollout"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "slime.rollout.sglang_rollout", rollout)
    args = arguments(tmp_path, lora_sync_dir=str(tmp_path / "versions"))
    with pytest.raises(ContractError, match="rollouts would come from the base"):
        adapter_name(args)
    publisher = VersionPublisher(tmp_path / "versions")
    for number in (1, 2):
        publisher.publish(adapter(tmp_path))
        for _ in range(2):
            assert asyncio.run(generate(args, [number], {})) == "http://router/generate"
    assert [(each["input_ids"], each["lora_path"]) for each in posted] == [
        ([1], "lora_v000001"),
        ([1], "lora_v000001"),
        ([2], "lora_v000002"),
        ([2], "lora_v000002"),
    ]
