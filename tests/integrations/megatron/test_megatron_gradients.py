"""Gradients of every A and B on two ranks, by Megatron's own schedule, DistributedDataParallel and
`finalize_model_grads`, against PEFT on transformers' model with the same weights and tokens.

One pair of processes runs every case of `tests/support/megatron_gradients.py`; what is left out on purpose must
show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

from tests.support.megatron_gradients import NORM, Case, batch
from tests.support.megatron_models import MODELS, TIED_INPUTS, make_model
from tests.support.ranks import run_ranks

# of a pair of processes: far above what it takes, far below the suite's limit
pytestmark = pytest.mark.timeout(600)

FAULTS: dict[str, dict[str, Any]] = {
    "column collective": {"tp": 2},
    "row collective": {"tp": 2},
    "sequence parallel mark": {"tp": 2, "sp": True},
    "tensor parallel mark": {"tp": 2},
    "input before its norm": {"tp": 2, "te": True},
    "thirds": {},  # each replica has both KV groups
    "up before gate": {"tp": 2},
    "divided twice": {"tp": 2},
    "embedding wants no gradient": {"tp": 2, "recompute": True},
}


@dataclass
class Pair:
    """What both ranks came to, by case, and where models and adapters lie."""

    cases: dict[str, Case]
    folder: Path

    def of(self, name: str) -> list[dict[str, Tensor]]:
        return [load_file(self.folder / f"{name}-{rank}.safetensors") for rank in (0, 1)]


def make_cases(folder: Path) -> dict[str, Case]:
    def case(model: str = "llama", kind: str = "canonical", **settings: Any) -> Case:
        mode = "fused" if kind == "fused" else "canonical"
        return Case(str(folder / model), str(folder / f"{model}-{kind}"), mode=mode, **settings)

    cases = {
        **{f"{m}-tp2": case(m, tp=2) for m in ("llama", "qwen2", "qwen3")},
        "fp32": case(tp=2, dtype="float32"),
        "fp32-sp": case(tp=2, sp=True, dtype="float32"),
        "fp32-pp2": case("llama", pp=2, dtype="float32"),
        "fp32-dp2": case(dtype="float32"),
        "sp": case(tp=2, sp=True),
        "te": case("qwen2", tp=2, te=True),
        "te-sp": case(tp=2, sp=True, te=True),
        "fused": case(kind="fused", tp=2),
        "fused-sp": case(kind="fused", tp=2, sp=True),
        "few": case(kind="few", tp=2),
        "few-pp2": case(kind="few", pp=2),
        "recompute": case(tp=2, recompute=True),
        "pp2": case("qwen3", pp=2),
        "pp2-vp2": case("llama-deep", pp=2, vp=2),
        "dp2": case(),
    }
    return cases | {fault: case(fault=fault, **where) for fault, where in FAULTS.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("megatron")
    for name in MODELS:
        make_model(name, folder)
    cases = make_cases(folder)
    (folder / "cases.json").write_text(json.dumps({n: asdict(c) for n, c in cases.items()}))
    run_ranks("tests.support.megatron_gradients", folder)
    return Pair(cases, folder)


def norm_in_its_dtype(self: Any, hidden: Tensor) -> Tensor:
    """RMSNorm without the rounding to float32 that transformers' has."""
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)


def peft_gradients(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """{`layer.target.A`: gradient} by PEFT and transformers, one process, all rows at once."""
    base = AutoModelForCausalLM.from_pretrained(case.model, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(base, case.adapter, is_trainable=True).to(dtype)
    tokens = batch(base.config.vocab_size)
    logits = model(input_ids=tokens).logits[:, :-1]
    functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found = {}
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            parts = path.split(".")
            layer, target = parts[parts.index("layers") + 1], parts[-4]
            found[f"{layer}.{target}.{path.partition('lora_')[2][0]}"] = parameter.grad
    return found


def whole(case: Case, ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """{`layer.target.A`: gradient} of the whole model from what the ranks of a case have."""
    tensor_ranks = ranks if case.tp == 2 else ranks[:1]
    named = [dict(shard) for shard in tensor_ranks]
    if case.pp == 2:
        named = [{**ranks[0], **ranks[1]}]
    sizes = MODELS[Path(case.model).name]
    groups = sizes["num_key_value_heads"] // len(named)
    heads = sizes["num_attention_heads"] // sizes["num_key_value_heads"]
    found: dict[str, Tensor] = {}
    for name in named[0]:
        parts = [shard[name] for shard in named]
        layer, _, place, parameter = name.split(".")
        side, _, short = parameter.removeprefix("lora_").partition("_")
        if place in ("linear_proj", "linear_fc2"):
            target = "o_proj" if place == "linear_proj" else "down_proj"
            found[f"{layer}.{target}.{side}"] = torch.cat(parts, 1) if side == "A" else same(parts)
        elif short:
            joined = same(parts) if side == "A" else torch.cat(parts)
            found[f"{layer}.{short}_proj.{side}"] = joined
        elif side == "A":
            found[f"{layer}.{place}.A"] = same(parts)
        elif place == "linear_fc1":
            gate, up = zip(*(part.chunk(2) for part in parts), strict=True)
            found |= {f"{layer}.gate_proj.B": torch.cat(gate), f"{layer}.up_proj.B": torch.cat(up)}
        else:  # per group its queries, its key, its value
            by_group = [part.unflatten(0, (groups, heads + 2, -1)) for part in parts]
            rows = torch.cat(by_group)
            found |= {
                f"{layer}.q_proj.B": rows[:, :heads].flatten(0, 2),
                f"{layer}.k_proj.B": rows[:, heads].flatten(0, 1),
                f"{layer}.v_proj.B": rows[:, heads + 1].flatten(0, 1),
            }
    return found


def same(parts: list[Tensor]) -> Tensor:
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0], rtol=1e-5, atol=1e-8)
    return parts[0]


def expected(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """PEFT's; of a fused A the sum over the projections that it is the A of."""
    true = peft_gradients(case, dtype)
    if case.mode == "fused":
        for layer in range(MODELS[Path(case.model).name]["num_hidden_layers"]):
            for place, group in zip(("linear_qkv", "linear_fc1"), TIED_INPUTS, strict=True):
                members = [true.pop(f"{layer}.{target}.A") for target in group]
                true[f"{layer}.{place}.A"] = sum(members[1:], members[0])
    return true


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", norm_in_its_dtype)


def worst(case: Case, ranks: list[dict[str, Tensor]]) -> float:
    """The largest relative error of any parameter's gradient, and of the norm that ranks have."""
    true = expected(case, torch.float64)
    norm = torch.stack([gradient.square().sum() for gradient in true.values()]).sum().sqrt()
    got = whole(case, [{n: t for n, t in rank.items() if n != NORM} for rank in ranks])
    assert got.keys() == true.keys()
    errors = [float((got[n].double() - true[n]).norm() / true[n].norm()) for n in true]
    return max(*errors, *(float((rank[NORM] - norm).abs() / norm) for rank in ranks))


def names(faults: bool, dtype: str = "float64") -> list[str]:
    cases: Mapping[str, Case] = make_cases(Path())
    return [n for n, c in cases.items() if bool(c.fault) == faults and c.dtype == dtype]


@pytest.mark.parametrize("name", names(False))
def test_gradients_are_pefts_in_float64(pair: Pair, exact: None, name: str) -> None:
    error = worst(pair.cases[name], pair.of(name))
    print(f"{name}: {error:.1e}")
    assert error < 1e-7


@pytest.mark.parametrize("name", names(False, "float32"))
def test_gradients_are_pefts_in_float32(pair: Pair, exact: None, name: str) -> None:
    error = worst(pair.cases[name], pair.of(name))
    print(f"{name}: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("name", names(True))
def test_what_is_left_out_shows(pair: Pair, exact: None, name: str) -> None:
    case, ranks = pair.cases[name], pair.of(name)
    try:
        error = worst(case, ranks)
    except AssertionError:  # ranks have drifted apart
        error = float("inf")
    print(f"{name}: {error:.1e}")
    assert error > 1e-2
