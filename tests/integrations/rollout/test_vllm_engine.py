"""vLLM in this process: the calls that are made of `vllm.LLM`, against a double that answers by
transformers and PEFT (float32); and, where vLLM is installed (`make test-rollout`), vLLM itself with
SmolLM2 in bfloat16."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorry.errors import ConfigError, ContractError
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout import EngineError, ModelVersion, VllmEngine
from tests.support.rollout_policy import PROMPTS, Policy, small_policy
from tests.support.rollout_server import greedy
from tests.support.tiny import one_thread

__all__ = ["one_thread"]
needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed: make test-rollout"
)


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Llm:
    """`vllm.LLM` as far as it is called. ``sampling``: the parameters of the last call; ``layers``:
    what a worker's layers hold of an adapter, None where they cannot be asked."""

    model: Path
    held: dict[int, LoRARequest] = field(default_factory=dict)
    sampling: list[Any] = field(default_factory=list)
    forgets: bool = True
    layers: Callable[[LoRARequest], Any] | None = None

    @property
    def llm_engine(self) -> Llm:
        return self

    def add_lora(self, request: LoRARequest) -> bool:
        if not Path(request.lora_path, "adapter_config.json").is_file():
            raise ValueError(f"No adapter found for {request.lora_path}")
        self.held[request.lora_int_id] = request
        return True

    def remove_lora(self, number: int) -> bool:
        return self.held.pop(number, None) is not None

    def list_loras(self) -> set[int]:
        return set(self.held)

    def collective_rpc(self, method: Any, args: Any = (), kwargs: Any = None) -> list[Any]:
        if callable(method):
            if self.layers is None:
                raise TypeError("Object of type function is not serializable")
            return [method(self.layers(self.held[args[0]]), *args)]
        assert method == "reload_weights"
        self.model = Path(kwargs["weights_path"])
        return [None]

    def reset_prefix_cache(self) -> bool:
        return self.forgets

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling: list[Any],
        lora_request: LoRARequest | None,
        use_tqdm: bool,
    ) -> list[Any]:
        self.sampling = sampling
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        if lora_request is not None:
            model = PeftModel.from_pretrained(model, lora_request.lora_path)
        return [
            SimpleNamespace(outputs=[answered(model.eval(), prompt["prompt_token_ids"], params)])
            for prompt, params in zip(prompts, sampling, strict=True)
        ]


def answered(model: Any, prompt: list[int], params: Any) -> Any:
    with torch.no_grad():
        tokens, values = greedy(model, prompt, params.max_tokens)
    logprobs = [{t: SimpleNamespace(logprob=v)} for t, v in zip(tokens, values, strict=True)]
    return SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="length")


@pytest.fixture
def llm(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Llm:
    vllm: Any = ModuleType("vllm")
    vllm.SamplingParams = SimpleNamespace
    vllm.lora = ModuleType("vllm.lora")
    vllm.lora.request = ModuleType("vllm.lora.request")
    vllm.lora.request.LoRARequest = LoRARequest
    for module in (vllm, vllm.lora, vllm.lora.request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Llm(policy.base)


def test_each_version_is_a_request_of_its_own(policy: Policy, tmp_path: Path, llm: Llm) -> None:
    engine = VllmEngine(llm)
    sync = policy.sync(tmp_path / "out", engine)
    for number in (1, 2, 3):
        report = sync.push(policy.step(), stepped=True)
        assert report.gaps[engine.label].largest < 1e-4
        assert {r.lora_int_id: r.lora_name for r in llm.held.values()} == {
            number: f"lora_v{number:06d}"
        }
    assert engine.list_lora_adapters() == {"lora_v000003": report.version.path}


def test_equal_prompts_are_drawn_with_seeds_of_their_own(policy: Policy, llm: Llm) -> None:
    engine = VllmEngine(llm)
    engine.generate([PROMPTS[0]] * 3, SamplingParams(temperature=0.7, seed=4), adapter=None)
    assert len({params.seed for params in llm.sampling}) == 3
    first = llm.sampling[0]
    assert (first.temperature, first.top_p, first.top_k, first.logprobs) == (0.7, 1.0, 0, 0)
    seeds = [params.seed for params in llm.sampling]
    engine.generate([PROMPTS[0]] * 3, SamplingParams(temperature=0.7, seed=4), adapter=None)
    assert [params.seed for params in llm.sampling] == seeds


def test_what_is_not_held_is_an_error(
    policy: Policy, tmp_path: Path, llm: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VllmEngine(llm)
    sync = policy.sync(tmp_path / "out", engine)
    version = sync.push(policy.step(), stepped=True).version
    with pytest.raises(EngineError, match="lora_v000001 is loaded already"):
        engine.load_lora_adapter(sync.current)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="lora_v000009 is not loaded"):
        engine.generate(PROMPTS, SamplingParams(), adapter="lora_v000009")
    with pytest.raises(EngineError, match="lora_v000009 is not loaded"):
        engine.unload_lora_adapter("lora_v000009")
    # its cache dropped it without a word
    llm.held.clear()
    assert engine.list_lora_adapters() == {}
    engine.unload_lora_adapter(version.name)
    monkeypatch.setattr(llm, "add_lora", lambda request: False)
    with pytest.raises(EngineError, match="lora_v000002 was not added"):
        sync.push(policy.step(), stepped=True)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="vLLM cannot be imported"):
        engine.generate(PROMPTS, SamplingParams(), adapter=None)


def test_an_adapter_over_a_merged_model_is_refused(
    policy: Policy, tmp_path: Path, llm: Llm
) -> None:
    engine = VllmEngine(llm)
    engine.load_model(ModelVersion(1, tmp_path / "model_v000001", {}, 0))
    with pytest.raises(ContractError, match="lora_v000001 over it would count twice"):
        policy.sync(tmp_path / "out", engine).push(policy.step(), stepped=True)
    llm.forgets = False
    with pytest.raises(EngineError, match="did not forget the old model's prompts"):
        engine.load_model(ModelVersion(2, tmp_path / "model_v000002", {}, 0))


def test_a_refusal_says_what_vllm_said(
    policy: Policy, tmp_path: Path, llm: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: LoRARequest) -> bool:
        raise ValueError("LoRA rank 64 is greater than max_lora_rank 16.")

    monkeypatch.setattr(llm, "add_lora", refuse)
    sync = policy.sync(tmp_path / "out", VllmEngine(llm))
    with pytest.raises(EngineError, match=r"lora_v000001 was refused: LoRA rank 64 is greater"):
        sync.push(policy.step(), stepped=True)


def loaded_layers(request: LoRARequest) -> Any:
    """A worker with an adapter in its layers, as vLLM lays it out: bfloat16, B times the scale, in the
    second of two slots, zeros up to rank 8; q, k, v and gate, up side by side."""
    tensors = load_file(Path(request.lora_path, "adapter_model.safetensors"))
    modules, packed = dict[str, Any](), dict[str, list[str]]()
    groups = {
        "self_attn.qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "self_attn.o_proj": ["o_proj"],
        "mlp.gate_up_proj": ["gate_proj", "up_proj"],
        "mlp.down_proj": ["down_proj"],
    }
    for layer in range(2):
        for group, parts in groups.items():
            folder = f"model.layers.{layer}.{group.partition('.')[0]}"
            paths = [f"{folder}.{part}" for part in parts]
            if len(parts) > 1:
                packed[f"model.layers.{layer}.{group}"] = paths
            a = [tensors[f"base_model.model.{path}.lora_A.weight"] for path in paths]
            b = [tensors[f"base_model.model.{path}.lora_B.weight"] for path in paths]
            modules[f"model.layers.{layer}.{group}"] = SimpleNamespace(
                lora_a_stacked=[slots(x.bfloat16(), (8, x.shape[1])) for x in a],
                # lora_alpha / r of the policy
                lora_b_stacked=[slots(x.bfloat16() * 2.0, (x.shape[0], 8)) for x in b],
            )
    manager = SimpleNamespace(
        modules=modules, packed_modules=packed, lora_index_to_id=[None, request.lora_int_id]
    )
    runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    return SimpleNamespace(model_runner=runner)


def slots(matrix: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    held = torch.zeros(2, 1, *shape, dtype=matrix.dtype)
    held[1, 0, : matrix.shape[0], : matrix.shape[1]] = matrix
    return held


def swapped(request: LoRARequest) -> Any:
    """v of one layer in the place of the other's."""
    worker = loaded_layers(request)
    modules = worker.model_runner.lora_manager._adapter_manager.modules
    first, second = (modules[f"model.layers.{n}.self_attn.qkv_proj"] for n in (0, 1))
    first.lora_b_stacked[2], second.lora_b_stacked[2] = (
        second.lora_b_stacked[2],
        first.lora_b_stacked[2],
    )
    return worker


def halved(request: LoRARequest) -> Any:
    """One matrix without its scale."""
    worker = loaded_layers(request)
    modules = worker.model_runner.lora_manager._adapter_manager.modules
    modules["model.layers.1.mlp.down_proj"].lora_b_stacked[0] /= 2
    return worker


def emptied(request: LoRARequest) -> Any:
    """A layer to which nothing came."""
    worker = loaded_layers(request)
    modules = worker.model_runner.lora_manager._adapter_manager.modules
    modules["model.layers.0.self_attn.o_proj"].lora_a_stacked[0].zero_()
    return worker


def test_what_its_layers_compute_with_is_compared_bit_for_bit(
    policy: Policy, tmp_path: Path, llm: Llm
) -> None:
    engine = VllmEngine(llm)
    sync = policy.sync(tmp_path / "out", engine)
    sync.push(policy.step(), stepped=True)
    # an engine in another process takes no functions
    assert engine.reads_memory is False
    llm.layers = loaded_layers
    sync.push(policy.step(), stepped=True)
    assert engine.reads_memory is True
    # before the first step every B is zero, as in a layer without an adapter
    fresh = small_policy(tmp_path / "fresh")
    fresh.sync(tmp_path / "other", VllmEngine(llm)).push(fresh.files(), stepped=False)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (swapped, r"layers\.0\.self_attn\.v_proj\.lora_B\.weight is not what was sent"),
        (halved, r"layers\.1\.mlp\.down_proj\.lora_B\.weight is not what was sent"),
        (emptied, r"never received \S+layers\.0\.self_attn\.o_proj\.lora_A\.weight"),
    ],
)
def test_layers_that_hold_something_else_are_named(
    policy: Policy,
    tmp_path: Path,
    llm: Llm,
    layers: Callable[[LoRARequest], Any],
    message: str,
) -> None:
    """With the right file on the disk, and the right names in the list."""
    llm.layers = layers
    sync = policy.sync(tmp_path / "out", VllmEngine(llm))
    with pytest.raises(ContractError, match=message):
        sync.push(policy.step(), stepped=True)


@needs_vllm
# minutes of processor time, an hour of the clock where others have the cores
@pytest.mark.timeout(3600)
def test_vllm_takes_versions_and_a_merged_model_and_shows_them(tmp_path: Path) -> None:
    """One start of the engine for all of it: minutes. In a process of its own, since vLLM leaves
    threads and settings behind."""
    import subprocess

    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "benchmarks/rollout.py", "--in-process", "--steps", "2", "--no-keep"],
        cwd=root,
        env={
            **os.environ,
            "PYTHONPATH": str(root / "src"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # threads that wait for each other take minutes a step where others have the cores
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "stopped" not in done.stdout
    # vLLM's own log says "libiomp is not found"
    missed = {line for line in done.stdout.splitlines() if line.endswith(": not found")}
    assert missed <= {"greedy answers of the version before: not found"}
    assert ContractError.__name__ in done.stdout
