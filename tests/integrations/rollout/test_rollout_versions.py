"""Versions on the disk: whole or absent, a name once, receipts that say what is there, old ones gone;
and what two versions have to have in common and not to."""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, load_file, save
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import get_bank
from lorry.disk import durable
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.integrations.rollout import (
    AdapterVersion,
    VersionPublisher,
    check_moved,
    check_same_tensors,
    digest_tensors,
    read_tensor_facts,
    read_version,
)
from lorry.integrations.rollout.versions import (
    VERSION_RECEIPT,
    is_version,
    list_versions,
    version_name,
)
from lorry.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.support.faults import FaultyDisk
from tests.support.rollout_policy import Policy
from tests.support.tiny import logits


def test_a_version_is_a_peft_directory_with_a_digest_of_every_tensor(
    policy: Policy, tmp_path: Path
) -> None:
    files = policy.step()
    version = VersionPublisher(tmp_path / "out").publish(files)
    assert version.path == tmp_path / "out" / "lora_v000001"
    assert version.bytes == sum(map(len, files.values()))
    # by hand, from what PEFT's reader finds there
    for name, tensor in load_file(version.path / ADAPTER_WEIGHTS).items():
        facts, header = version.tensors[name], f"F32 {list(tensor.shape)}\n".encode()
        assert facts.sha256 == hashlib.sha256(header + tensor.numpy().tobytes()).hexdigest()
        assert not facts.zero
    assert read_version(version.path) == version
    assert digest_tensors(load(files[ADAPTER_WEIGHTS])) == {
        name: facts.sha256 for name, facts in version.tensors.items()
    }
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(policy.base, dtype=torch.float32), version.path
    )
    torch.testing.assert_close(logits(theirs), logits(policy.model), rtol=0, atol=1e-4)


def test_a_digest_is_of_dtype_and_shape_too() -> None:
    ones = torch.zeros(4, dtype=torch.float32)
    same_bytes = [ones, ones.reshape(2, 2), ones.view(torch.int32)]
    assert len({digest_tensors({"t": t})["t"] for t in same_bytes}) == 3
    facts = read_tensor_facts(save({"t": torch.ones(2, dtype=torch.bfloat16)}), "here")["t"]
    assert (facts.dtype, facts.shape, facts.zero) == ("BF16", (2,), False)


def test_the_newest_stay_and_no_name_is_used_twice(policy: Policy, tmp_path: Path) -> None:
    publisher = VersionPublisher(tmp_path / "out", keep=2)
    for _ in range(4):
        publisher.publish(policy.step())
    assert publisher.numbers() == list_versions(tmp_path / "out") == [3, 4]
    assert all(is_version(version_name(number)) for number in publisher.numbers())
    assert not is_version("model_v000001")
    assert list_versions(tmp_path / "absent") == []
    # who goes on in the directory goes on behind what is there
    assert VersionPublisher(tmp_path / "out").publish(policy.step()).name == "lora_v000005"
    with pytest.raises(ConfigError, match="keep is 1; it must be at least 2"):
        VersionPublisher(tmp_path / "out", keep=1)


def full(disk: FaultyDisk, kind: str, args: tuple[Any, ...]) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_version_is_whole_or_absent_whichever_call_of_the_disk_fails(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, files = VersionPublisher(tmp_path / "out"), policy.step()
    publisher.publish(files)
    counted = FaultyDisk()
    monkeypatch.setattr(durable, "disk", counted)
    publisher.publish(policy.step())
    failed = 0
    for at in range(1, counted.calls + 1):
        monkeypatch.setattr(durable, "disk", FaultyDisk(at, full))
        try:
            publisher.publish(files)
        except durable.DiskError:
            failed += 1
        monkeypatch.setattr(durable, "disk", durable.DiskCalls())
        for number in publisher.numbers():
            version = read_version(publisher.directory / f"lora_v{number:06d}")
            held = read_tensor_facts((version.path / ADAPTER_WEIGHTS).read_bytes(), "there")
            assert held == version.tensors
    assert failed > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({ADAPTER_CONFIG: None}, "has no adapter_config.json"),
        ({ADAPTER_WEIGHTS: b"{}"}, "no whole safetensors file"),
        ({ADAPTER_WEIGHTS: save({})}, "would hold no tensor"),
    ],
)
def test_what_is_no_adapter_is_not_published(
    policy: Policy, tmp_path: Path, change: dict[str, bytes | None], message: str
) -> None:
    files = {**policy.files(), **change}
    publisher = VersionPublisher(tmp_path / "out")
    with pytest.raises(ModelError, match=message):
        publisher.publish({name: content for name, content in files.items() if content is not None})
    assert list(publisher.directory.iterdir()) == []


def test_a_damaged_receipt_is_no_version(policy: Policy, tmp_path: Path) -> None:
    version = VersionPublisher(tmp_path / "out").publish(policy.step())
    receipt = version.path / VERSION_RECEIPT
    whole = json.loads(receipt.read_text())
    for broken, message in [
        ({**whole, "version": 7}, "is of version 7, unlike its directory's name"),
        ({**whole, "tensors": [1]}, "not a receipt as a publisher writes it"),
        ({"version": 1}, "not a receipt as a publisher writes it"),
    ]:
        receipt.write_text(json.dumps(broken))
        with pytest.raises(ModelError, match=message):
            read_version(version.path)
    receipt.unlink()
    with pytest.raises(ModelError, match=r"lora_version\.json is missing"):
        read_version(version.path)


# --- one version after another


@pytest.fixture
def versions(policy: Policy, tmp_path: Path) -> tuple[AdapterVersion, AdapterVersion]:
    publisher = VersionPublisher(tmp_path / "out")
    return publisher.publish(policy.step()), publisher.publish(policy.step())


def test_a_version_that_moved_passes(versions: tuple[AdapterVersion, AdapterVersion]) -> None:
    first, second = versions
    check_moved(first, None, stepped=True)
    check_moved(second, first, stepped=True)


def test_the_last_version_again_is_found(policy: Policy, tmp_path: Path) -> None:
    publisher, files = VersionPublisher(tmp_path / "out"), policy.step()
    first, again = publisher.publish(files), publisher.publish(files)
    with pytest.raises(ContractError, match=r"is lora_v000001 again, base_model\.model\S+ and all"):
        check_moved(again, first, stepped=True)
    # groups of equal rewards have no gradient: then nothing has to move
    check_moved(again, first, stepped=False)
    with pytest.raises(ContractError, match="does not come after lora_v000001"):
        check_moved(first, first, stepped=False)


def test_an_adapter_that_was_never_trained_is_found(policy: Policy, tmp_path: Path) -> None:
    publisher = VersionPublisher(tmp_path / "out")
    fresh = publisher.publish(policy.files())
    check_moved(fresh, None, stepped=False)
    with pytest.raises(ContractError, match=r"lora_B\.weight is zero \(14 such\) after a step"):
        check_moved(fresh, None, stepped=True)
    whole = publisher.publish(policy.step())
    with torch.no_grad():
        get_bank(policy.model)["policy"].tensors()["model.layers.1.self_attn.v_proj.lora_B"].zero_()
    halved = publisher.publish(policy.files())
    with pytest.raises(
        ContractError, match=r"layers\.1\.self_attn\.v_proj\.lora_B\.weight is zero"
    ):
        check_moved(halved, whole, stepped=True)


def test_a_shard_or_a_tensor_that_is_missing_is_found(
    versions: tuple[AdapterVersion, AdapterVersion],
) -> None:
    first, second = versions
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    facts = second.tensors[name]
    half = replace(facts, shape=(facts.shape[0], facts.shape[1] // 2))
    with pytest.raises(ContractError, match=rf"{name} has shape \[4, 24\], and \[4, 48\] in"):
        check_moved(replace(second, tensors={**second.tensors, name: half}), first, stepped=True)
    without = {n: f for n, f in second.tensors.items() if n != name}
    with pytest.raises(ContractError, match=f"has no tensor {name}, unlike lora_v000001"):
        check_moved(replace(second, tensors=without), first, stepped=True)
    with pytest.raises(ContractError, match=f"has a new tensor {name}, unlike lora_v000001"):
        check_moved(second, replace(first, tensors=without), stepped=True)


def test_tensors_that_differ_are_named() -> None:
    sent = digest_tensors({"q.lora_B": torch.ones(2, 3), "k.lora_B": torch.zeros(2, 3)})
    check_same_tensors(sent, dict(sent), "engine")
    swapped = {"q.lora_B": sent["k.lora_B"], "k.lora_B": sent["q.lora_B"]}
    with pytest.raises(ContractError, match=r"engine: k\.lora_B is not what was sent"):
        check_same_tensors(sent, swapped, "engine")
    with pytest.raises(ContractError, match=r"engine: never received k\.lora_B"):
        check_same_tensors(sent, {"q.lora_B": sent["q.lora_B"]}, "engine")
    with pytest.raises(ContractError, match=r"engine: holds v\.lora_B, which was not sent"):
        check_same_tensors(sent, {**sent, "v.lora_B": ""}, "engine")
