"""GGUF files of ours: every tensor rounded no further than its type does, and what is damaged is
found. llama.cpp reads them in test_gguf_llamacpp.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from lorry.errors import ContractError, ModelError
from lorry.families import RotaryConfig
from lorry.models.gguf.architecture import GgufArchitecture, describe_architecture, llama3_factors
from lorry.models.gguf.writer import (
    OUTTYPES,
    ROUNDING,
    PlannedTensor,
    check_rounding,
    encode_tensor,
    plan_tensors,
    read_model_tensors,
    write_gguf,
)
from lorry.notes import ignore_note
from tests.support.tiny import LLAMA, LLAMA3, random_model

CONFIG = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "hidden_act": "silu"}
Written = tuple[Path, GgufArchitecture, list[PlannedTensor], dict[str, Tensor]]


def write(folder: Path, outtype: str = "f32", **overrides: object) -> Written:
    config = {**CONFIG, **overrides}
    state = {name: t.detach() for name, t in random_model(config).state_dict().items()}
    if config.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    architecture = describe_architecture(config)
    plan = plan_tensors(
        architecture, {name: tuple(t.shape) for name, t in state.items()}, outtype, ignore_note
    )
    file = folder / f"{outtype}.gguf"
    write_gguf(file, architecture, plan, state.items(), architecture.add_keys)
    return file, architecture, plan, state


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_what_is_read_again(outtype: str, tmp_path: Path) -> None:
    file, architecture, plan, state = write(tmp_path, outtype)
    error, bound = check_rounding(file, architecture, plan, state.items())
    assert error <= bound
    found = dict(read_model_tensors(file, architecture, plan))
    assert found.keys() == state.keys()
    # the package's own reader has the types
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(file).tensors}
    for name, tensor in state.items():
        difference = (found[name] - tensor).abs().max()
        if outtype == "f32" or "norm" in name:
            assert difference == 0
        else:
            assert 0 < difference <= 0.13 * tensor.abs().max()
    assert kinds["blk.0.attn_norm.weight"] == GGMLQuantizationType.F32
    assert kinds["blk.1.ffn_up.weight"] == OUTTYPES[outtype][0]
    head = GGMLQuantizationType.Q8_0 if outtype == "q4_0" else OUTTYPES[outtype][0]
    assert kinds["output.weight"] == head


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    file, _, _, _ = write(tmp_path, "q4_0", tie_word_embeddings=True)
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(file).tensors}
    assert "output.weight" not in kinds
    assert kinds["token_embd.weight"] == GGMLQuantizationType.Q8_0


def test_rows_that_do_not_divide(tmp_path: Path) -> None:
    notes: list[str] = []
    config = {**CONFIG, "intermediate_size": 80}
    shapes = {n: tuple(t.shape) for n, t in random_model(config).state_dict().items()}
    plan = plan_tensors(describe_architecture(config), shapes, "q8_0", notes.append)
    kinds = {tensor.name: tensor.kind for tensor in plan}
    assert kinds["blk.0.ffn_down.weight"] == GGMLQuantizationType.F16
    assert kinds["blk.0.ffn_up.weight"] == GGMLQuantizationType.Q8_0
    assert notes == [
        "2 tensors are stored in f16, since their rows are not a multiple of 32 (blk.0.ffn_down.weight, blk.1.ffn_down.weight)"
    ]


VALUES = st.floats(-60000, 60000, width=32) | st.floats(-(2.0**-17), 2.0**-17, width=32)


@settings(max_examples=40)
@given(
    values=arrays.arrays(numpy.float32, (2, 64), elements=VALUES),
    outtype=st.sampled_from(sorted(OUTTYPES)),
)
def test_rounding_is_within_its_bound(values: numpy.ndarray, outtype: str) -> None:
    """Any values at all: the bounds are of the formats, not of weights that we have seen."""
    import gguf

    kind = OUTTYPES[outtype][0]
    stored = encode_tensor("x", torch.from_numpy(values), kind)
    found = gguf.dequantize(numpy.ascontiguousarray(stored).view(numpy.uint8), kind)
    share, below_normal = ROUNDING[kind]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    largest = numpy.abs(values).reshape(-1, block).max(axis=1)
    errors = numpy.abs(found.reshape(values.shape) - values).reshape(-1, block).max(axis=1)
    assert (errors <= largest * (share * (1 + 1e-5)) + below_normal).all()


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_values_below_the_normal_numbers_are_no_damage(outtype: str, tmp_path: Path) -> None:
    """Of a merge in fp32; BF16 rounds them by more than its share of them."""
    file, architecture, plan, state = write(tmp_path, outtype)
    tiny = torch.tensor([1e-40, -3e-39, 1e-45, 2.0**-134])
    state["model.layers.0.mlp.up_proj.weight"][0, :4] = tiny
    write_gguf(file, architecture, plan, state.items(), architecture.add_keys)
    error, bound = check_rounding(file, architecture, plan, state.items())
    assert error <= bound


@pytest.mark.parametrize("damage", ["a byte of a weight", "two heads exchanged", "another tensor"])
def test_a_wrong_file_is_found(damage: str, tmp_path: Path) -> None:
    file, architecture, plan, state = write(tmp_path, "q8_0")
    if damage == "a byte of a weight":
        place = next(t for t in GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
        content = bytearray(file.read_bytes())
        content[int(place.data_offset) + 1] ^= 0x40  # the exponent of the first block's scale
        file.write_bytes(content)
    elif damage == "two heads exchanged":
        name = "model.layers.0.self_attn.q_proj.weight"
        state[name] = state[name].roll(16, dims=0)
    else:
        plan = [t for t in plan if t.name != "output_norm.weight"]
        del state["model.norm.weight"]
    with pytest.raises(ContractError, match="was removed"):
        check_rounding(file, architecture, plan, state.items())


@pytest.mark.parametrize(
    ("value", "outtype"),
    [(7e4, "f16"), (8.4e6, "q8_0"), (5.3e5, "q4_0"), (float("nan"), "f32")],
)
def test_values_that_a_type_has_not(value: float, outtype: str) -> None:
    tensor = torch.zeros(1, 32)
    tensor[0, 3] = value
    with pytest.raises(ModelError, match="x holds"):
        encode_tensor("x", tensor, OUTTYPES[outtype][0])
    if value == value:
        encode_tensor("x", tensor, OUTTYPES["bf16"][0])


@pytest.mark.parametrize(
    ("value", "outtype"), [(65504.0, "f16"), (127 * 65504.0, "q8_0"), (-8 * 65504.0, "q4_0")]
)
def test_the_largest_values_that_a_type_has(value: float, outtype: str) -> None:
    """Of a type of blocks not an F16's own largest, but what its scale, an F16, takes."""
    import gguf

    tensor, kind = torch.zeros(1, 32), OUTTYPES[outtype][0]
    tensor[0, 3] = value
    stored = numpy.ascontiguousarray(encode_tensor("x", tensor, kind)).view(numpy.uint8)
    assert gguf.dequantize(stored, kind).reshape(-1)[3] == value


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({**CONFIG, "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({**CONFIG, "model_type": "qwen3", "attention_bias": True}, "attention_bias=true"),
        ({**CONFIG, "model_type": "qwen2", "rope_parameters": LLAMA3}, "rope_type='llama3'"),
    ],
)
def test_what_llama_cpp_computes_otherwise(config: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        describe_architecture(config)


def test_llama3_factors_are_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(hidden_size=128, num_attention_heads=1, rope_parameters=rope), "cpu"
    )
    plain = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    rotary = RotaryConfig(
        theta=500000.0,
        dim=128,
        kind="llama3",
        scaling={k: float(v) for k, v in rope.items() if k not in ("rope_type", "rope_theta")},
    )
    ours = torch.from_numpy(llama3_factors(rotary.theta, rotary.dim, rotary.scaling)).double()
    torch.testing.assert_close(ours, plain / frequencies.double(), rtol=1e-5, atol=0)
    assert (ours.min(), ours.max()) == (1.0, 8.0)


def test_keys_for_readers(tmp_path: Path) -> None:
    _, architecture, _, _ = write(tmp_path)
    writer = GGUFWriter(str(tmp_path / "keys.gguf"), architecture.name)
    architecture.add_keys(writer)
    said = {key: value.value for key, value in writer.kv_data[0].items()}
    assert said["llama.attention.key_length"] == said["llama.rope.dimension_count"] == 16
    assert said["llama.attention.head_count_kv"] == 2
    assert said["llama.rope.freq_base"] == 10000.0
