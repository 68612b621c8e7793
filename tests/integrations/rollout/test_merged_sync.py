"""Whole models sent in the place of the base, by the calls of vLLM's development mode: what they hold,
what must not be beside them, and that the engine answers as the trainer (float32, transformers)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from lorry.adapters.attach import get_bank
from lorry.adapters.merge import merged_tensors
from lorry.disk.durable import DiskError
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout import (
    EngineError,
    MergedSync,
    ModelPublisher,
    ModelVersion,
    VersionPublisher,
    VllmServer,
    read_version,
)
from lorry.models.loading.store import save_model
from tests.support.rollout_policy import Policy
from tests.support.rollout_server import RolloutServer
from tests.support.tiny import one_thread

__all__ = ["one_thread"]


def writer(policy: Policy, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    """Writes the policy's merged model."""

    def write(folder: Path) -> None:
        tensors = merged_tensors(policy.model, {"policy": 1.0}, dtype=dtype)
        save_model(policy.model, folder, tensors=tensors, tokenizer=None, dtype=dtype)

    return write


def test_an_engine_with_the_merged_model_answers_as_the_trainer_does(
    policy: Policy, tmp_path: Path
) -> None:
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    with RolloutServer(policy.base) as server:
        engine = VllmServer(server.url)
        sync = MergedSync(ModelPublisher(tmp_path / "out"), [engine], policy.probe())
        for _ in range(3):
            policy.step()
            report = sync.push(writer(policy), stepped=True)
            assert report.gaps[engine.label].largest < 1e-4
            assert report.gaps[engine.label].share == pytest.approx(1, abs=1e-3)
        assert isinstance(report.version, ModelVersion)
        assert server.model == report.version.path == tmp_path / "out" / "model_v000003"
    assert read_version(report.version.path) == report.version
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model_v000002",
        "model_v000003",
    ]
    base = {n: p for n, p in before.items() if "lora_" not in n}
    assert all(torch.equal(dict(policy.model.named_parameters())[n], p) for n, p in base.items())


class OwnReceiver:
    """A user's own: whole models through a server, and not one of the calls for adapters but the list."""

    label = "my engine"

    def __init__(self, server: VllmServer, *, loads: bool = True) -> None:
        self.server, self.loads = server, loads

    def load_model(self, version: ModelVersion) -> None:
        if self.loads:
            self.server.load_model(version)

    def list_lora_adapters(self) -> Mapping[str, Path | None]:
        return {}

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, adapter: str | None
    ) -> list[Completion]:
        return self.server.generate(prompts, params, adapter=adapter)


def test_a_receiver_without_calls_for_adapters_is_asked_too(policy: Policy, tmp_path: Path) -> None:
    policy.step()
    publisher = ModelPublisher(tmp_path / "out")
    with RolloutServer(policy.base) as server:
        engine = OwnReceiver(VllmServer(server.url))
        report = MergedSync(publisher, [engine], policy.probe()).push(writer(policy), stepped=True)
        assert report.gaps["my engine"].largest < 1e-4
        assert report.unasked == []
    with RolloutServer(policy.base) as server:
        silent = OwnReceiver(VllmServer(server.url), loads=False)
        # it answers as the base does
        with pytest.raises(ContractError, match=r"my engine, the base: .* at token \d of prompt"):
            MergedSync(publisher, [silent], policy.probe()).push(writer(policy), stepped=False)


def test_a_merged_model_and_an_adapter_never_meet_in_one_engine(
    policy: Policy, tmp_path: Path
) -> None:
    with RolloutServer(policy.base) as server:
        engine = VllmServer(server.url)
        policy.step()
        merged = MergedSync(ModelPublisher(tmp_path / "out"), [engine], policy.probe())
        merged.push(writer(policy), stepped=True)
        # an adapter over weights that hold it already
        adapters = policy.sync(tmp_path / "adapters", engine)
        with pytest.raises(ContractError, match="has model_v000001 in the place of its base"):
            adapters.push(policy.files(), stepped=True)
        # a client that did not send the model finds it by what the engine says
        another = policy.sync(tmp_path / "others", VllmServer(server.url))
        with pytest.raises(ContractError, match=r"at token \d of prompt \d"):
            another.push(policy.files(), stepped=True)
        with pytest.raises(
            ContractError, match="holds the adapter lora_v000001, which would count"
        ):
            merged.push(writer(policy), stepped=False)
        assert merged.current is not None
        assert merged.current.name == "model_v000001"


def test_the_same_model_again_is_found(policy: Policy, tmp_path: Path) -> None:
    """Also where a step was too small for bfloat16: the engine would not see it."""
    with RolloutServer(policy.base) as server:
        sync = MergedSync(ModelPublisher(tmp_path / "out"), [VllmServer(server.url)])
        policy.step()
        sync.push(writer(policy, torch.bfloat16), stepped=True)
        get_bank(policy.model)["policy"].tensors()["model.layers.0.mlp.up_proj.lora_B"][0, 0] += (
            1e-8
        )
        get_bank(policy.model)["policy"].touch()
        with pytest.raises(ContractError, match=r"model_v000002 \S+ is model_v000001 again"):
            sync.push(writer(policy, torch.bfloat16), stepped=True)


def test_prompts_of_the_old_model_that_are_remembered_are_an_error(
    policy: Policy, tmp_path: Path
) -> None:
    with RolloutServer(policy.base, fault="remembers") as server:
        sync = MergedSync(ModelPublisher(tmp_path / "out"), [VllmServer(server.url)])
        policy.step()
        with pytest.raises(EngineError, match="did not forget the old model's prompts"):
            sync.push(writer(policy), stepped=True)


def test_a_folder_without_weights_is_no_version(policy: Policy, tmp_path: Path) -> None:
    publisher = ModelPublisher(tmp_path / "out")
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        publisher.publish(lambda folder: None)

    def fail(folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"")
        raise DiskError(28, "No space left on device", str(folder))

    with pytest.raises(DiskError, match="No space left"):
        publisher.publish(fail)
    assert list(publisher.directory.iterdir()) == []
    # adapters and models in one directory are counted apart
    publisher.publish(writer(policy))
    assert VersionPublisher(tmp_path / "out").publish(policy.step()).number == 1
    with pytest.raises(ConfigError, match="name at least one"):
        MergedSync(publisher, [])
