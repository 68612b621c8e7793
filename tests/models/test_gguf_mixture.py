"""Mixtures of experts as GGUF: llama.cpp computes what transformers does, or the file is refused.

llama.cpp ignores `norm_topk_prob`: it normalises the gates of a Mixtral and a Qwen3-MoE always, of a
Qwen2-MoE never.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorry.errors import ModelError
from lorry.models.gguf.architecture import describe_architecture
from lorry.models.gguf.writer import plan_tensors
from lorry.notes import ignore_note
from tests.support.llamacpp import LlamaCpp
from tests.support.tiny import one_thread, random_model  # noqa: F401 - an autouse fixture
from tests.support.verbworld import lorry, tokenizer

SHAPE = {
    "vocab_size": len(tokenizer()),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 3, "sliding_window": None}
QWEN2 = {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "moe_intermediate_size": 96,
    "head_dim": 32,
    "norm_topk_prob": True,
}
SAME: dict[str, dict[str, Any]] = {
    "mixtral, 1 of 3": {**MIXTRAL, "num_experts_per_tok": 1},
    "mixtral, 2 of 3": {**MIXTRAL, "num_experts_per_tok": 2},
    "mixtral, 2 of 12": {**MIXTRAL, "num_experts_per_tok": 2, "num_local_experts": 12},
    "qwen2, tied, all": {
        **QWEN2, "num_experts_per_tok": 4, "norm_topk_prob": True, "tie_word_embeddings": True,
    },
    "qwen2, 2 of 4, not normalised": {**QWEN2, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "qwen3, 2 of 4": {**QWEN3, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    "qwen3, all, not normalised": {**QWEN3, "num_experts_per_tok": 4, "norm_topk_prob": False},
}  # fmt: skip
OTHER: dict[str, dict[str, Any]] = {
    "qwen2, normalised": {**QWEN2, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "qwen3, not normalised": {**QWEN3, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "dense layers between": {**QWEN3, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
    "a window": {**MIXTRAL, "num_experts_per_tok": 2, "sliding_window": 16},
}


def directory(path: Path, config: dict[str, Any]) -> Path:
    random_model({**SHAPE, **config}, seed=7).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", SAME)
def test_llama_cpp_computes_the_same(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = directory(tmp_path / "moe", SAME[name])
    assert lorry("export", folder, "to=gguf", f"output_dir={tmp_path / 'out'}") == 0
    out, err = capsys.readouterr()
    file = Path(out.strip())
    assert file.name == "moe-f32.gguf"
    assert "only llama.cpp can run such a file" in err
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)("Where does Ilse live? In Kyoto.").input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = LlamaCpp(file).log_probabilities(ids)
    assert len(found) > 100
    assert max(abs(float(expected[i]) - value) for i, value in found.items()) < 5e-4


@pytest.mark.parametrize("name", OTHER)
def test_what_it_computes_otherwise_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = directory(tmp_path / "moe", OTHER[name])
    assert lorry("export", folder, "to=gguf", "weight=0.5") == 2
    assert "is a plain model" in capsys.readouterr().err
    assert lorry("export", folder, "to=gguf", f"output_dir={tmp_path / 'out'}") == 4
    message = {
        "qwen2, normalised": "does not normalise the gates",
        "qwen3, not normalised": "normalises the gates of a Qwen3-MoE all the same",
        "dense layers between": "dense layers between",
        "a window": "sliding_window=16",
    }[name]
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fewer_bits_leave_routers_alone(tmp_path: Path) -> None:
    folder = directory(tmp_path / "moe", SAME["qwen2, 2 of 4, not normalised"])
    assert lorry("export", folder, "to=gguf", "outtype=q4_0", f"output_dir={tmp_path}/out") == 0
    kinds = {t.name: t.tensor_type for t in GGUFReader(tmp_path / "out" / "moe-q4_0.gguf").tensors}
    assert kinds["blk.0.ffn_down_exps.weight"] == GGMLQuantizationType.Q4_0
    for router in ("ffn_gate_inp", "ffn_gate_inp_shexp"):
        assert kinds[f"blk.1.{router}.weight"] == GGMLQuantizationType.F32


def test_experts_are_stacked_by_number() -> None:
    """Ten comes before two in the order of names, which files are read in."""
    config = {**SHAPE, **SAME["mixtral, 2 of 12"], "hidden_act": "silu"}
    prefix = "model.layers.0.block_sparse_moe.experts"
    shapes = {f"{prefix}.{n}.w1.weight": (96, 64) for n in sorted(range(12), key=str)}
    (planned,) = plan_tensors(describe_architecture(config), shapes, "f32", ignore_note)
    assert planned.shape == (12, 96, 64)
    assert planned.sources == tuple(f"{prefix}.{n}.w1.weight" for n in range(12))


def test_another_activation(tmp_path: Path) -> None:
    config = json.loads(json.dumps({**SHAPE, **SAME["mixtral, 2 of 3"], "hidden_act": "gelu"}))
    with pytest.raises(ModelError, match="hidden_act='gelu'"):
        describe_architecture(config)
