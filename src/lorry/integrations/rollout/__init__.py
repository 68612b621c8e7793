"""A policy's adapter on its way to rollout engines (vLLM, SGLang): one PEFT directory per version,
loaded by the engine's own call, and proved to be there before anything is sampled from it.

    sync = AdapterSync(VersionPublisher("rollout"), [VllmServer("http://127.0.0.1:8000")], probe)
    ...
    report = sync.push(adapter_files(model), stepped=True)        # after each optimizer step
    engine.generate(prompts, params, adapter=report.version.name)

The worst that can happen in reinforcement learning looks healthy: rollouts from the base, from an
older version, or from a policy that was merged and adapted at once. So a push ends either with an
engine that is shown to hold this version, or with an error that names the tensor or the prompt.
docs/rollout.md is the manual.

Nothing here imports vLLM, SGLang, slime or Megatron: an engine is spoken to over HTTP, or is the
object that one hands over.
"""

from lorry.integrations.rollout.digests import TensorFacts, digest_tensors, read_tensor_facts
from lorry.integrations.rollout.engine import (
    DirectoryReader,
    EngineError,
    LoraReceiver,
    ModelReceiver,
    PromptAnswerer,
    RolloutEngine,
)
from lorry.integrations.rollout.proofs import (
    GreedyProbe,
    LogProbGap,
    check_held,
    check_moved,
    check_same_tensors,
    measure_gap,
)
from lorry.integrations.rollout.scores import score_answers
from lorry.integrations.rollout.servers import SglangServer, VllmServer
from lorry.integrations.rollout.sync import AdapterSync, MergedSync, SyncReport
from lorry.integrations.rollout.versions import (
    AdapterVersion,
    ModelPublisher,
    ModelVersion,
    Version,
    VersionPublisher,
    read_version,
)
from lorry.integrations.rollout.vllm_engine import VllmEngine

__all__ = [
    "AdapterSync",
    "AdapterVersion",
    "DirectoryReader",
    "EngineError",
    "GreedyProbe",
    "LogProbGap",
    "LoraReceiver",
    "MergedSync",
    "ModelPublisher",
    "ModelReceiver",
    "ModelVersion",
    "PromptAnswerer",
    "RolloutEngine",
    "SglangServer",
    "SyncReport",
    "TensorFacts",
    "Version",
    "VersionPublisher",
    "VllmEngine",
    "VllmServer",
    "check_held",
    "check_moved",
    "check_same_tensors",
    "digest_tensors",
    "measure_gap",
    "read_tensor_facts",
    "read_version",
    "score_answers",
]
