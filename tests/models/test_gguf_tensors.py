"""GGUF files whose tensors do not fit: named and refused, where transformers fills in random
numbers or drops them in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from lorry.errors import ContractError, ModelError
from lorry.models.gguf import embedded
from lorry.models.gguf.embedded import convert_gguf
from lorry.models.gguf.header import check_gguf
from lorry.models.loading.load import load_model
from tests.support import tiny
from tests.support.ggufs import Tensors, write_gguf
from tests.support.tiny import one_thread  # noqa: F401 - a fixture

FACTORS = numpy.array([1.0, 1.0, 3.0, 8.0], dtype=numpy.float32)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def without(start: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [(n, v) for n, v in tensors if not n.startswith(start)]


def more(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [*tensors, (name, numpy.ones(shape, dtype=numpy.float32))]


def changed(
    name: str, edit: Callable[[numpy.ndarray], numpy.ndarray]
) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [(n, edit(v.copy()) if n == name else v) for n, v in tensors]


def with_value(value: float) -> Callable[[numpy.ndarray], numpy.ndarray]:
    def edit(values: numpy.ndarray) -> numpy.ndarray:
        values.flat[5] = value
        return values

    return edit


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("blk.0.attn_q.weight"), r"missing.*blk\.0\.attn_q\.weight"),
        (without("output_norm"), r"missing.*output_norm\.weight"),
        (without("token_embd"), r"missing.*token_embd"),
        (without("blk.1."), r"9 tensors missing.*blk\.1\."),
        (more("blk.0.attn_q.bias", 32), r"1 tensors unknown.*blk\.0\.attn_q\.bias"),
        (more("blk.0.attn_norm.bias", 32), r"unknown.*blk\.0\.attn_norm\.bias"),
        (more("blk.7.attn_q.weight", 32, 32), r"unknown.*blk\.7\.attn_q\.weight"),
        (more("nonsense.weight", 3), r"unknown.*nonsense\.weight"),
        (more("rope_factors_long.weight", 4), r"unknown.*rope_factors_long"),
        (changed("blk.0.ffn_up.weight", lambda v: v[:32]), r"misshapen.*blk\.0\.ffn_up"),
        (changed("token_embd.weight", lambda v: v[:290]), r"misshapen.*token_embd"),
        (
            changed("blk.0.ffn_up.weight", with_value(numpy.nan)),
            r"blk\.0\.ffn_up\.weight holds NaN",
        ),
        (
            changed("output_norm.weight", with_value(-numpy.inf)),
            r"output_norm\.weight holds NaN or infinity",
        ),
        (
            lambda t: [*t, ("rope_freqs.weight", FACTORS)],
            r"rope_freqs\.weight holds rotary factors \(up to 8\)",
        ),
    ],
)
def test_a_file_whose_tensors_do_not_fit(
    change: Callable[[Tensors], Tensors], named: str, tmp_path: Path, home: Path
) -> None:
    file = write_gguf(tmp_path / "odd.gguf", change)
    with pytest.raises(ModelError, match=rf"odd\.gguf.*{named}"):
        load_model(file, dtype="float32", add_note=print)
    assert [
        p.name for p in home.iterdir() if not p.name.endswith(".lock")
    ] == []  # nothing is sealed in the cache


def test_one_of_several_parts(tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "a-00001-of-00003.gguf",
        without("blk.1."),
        keys=lambda writer: writer.add_uint16("split.count", 3),
    )
    with pytest.raises(
        ModelError, match=r"one of 3 parts of a model; join them first \(llama-gguf-split --merge\)"
    ):
        convert_gguf(file, print)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "odd.gguf", more("blk.0.ffn_gate.weigh2", 48, 32))
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"blk.0.ffn_gate.weigh2", b"blk.0.ffn_gate.weight"))
    with pytest.raises(ModelError, match=r"'blk\.0\.ffn_gate\.weight' twice"):
        check_gguf(file)


def test_two_keys_of_one_name(tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("x.one", 1)
        writer.add_uint32("x.two", 2)

    file = write_gguf(tmp_path / "odd.gguf", keys=keys)
    assert check_gguf(file).values["x.two"] == 2
    file.write_bytes(file.read_bytes().replace(b"x.two", b"x.one"))
    with pytest.raises(ModelError, match=r"the key 'x\.one' twice"):
        check_gguf(file)


def test_two_tensors_of_the_same_bytes(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "odd.gguf")
    whole = file.read_bytes()
    at = whole.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8 + 4
    gate = whole.index(b"blk.0.ffn_gate.weight") + len(b"blk.0.ffn_gate.weight") + 4 + 2 * 8 + 4
    file.write_bytes(whole[:at] + whole[gate : gate + 8] + whole[at + 8 :])
    with pytest.raises(
        ModelError, match=r"blk\.0\.ffn_\w+\.weight and blk\.0\.ffn_\w+\.weight share bytes"
    ):
        check_gguf(file)


def test_a_tied_head_is_absent_and_element_types_are_mixed(tmp_path: Path) -> None:
    kinds = {
        "token_embd.weight": Kind.Q8_0,
        "blk.0.ffn_up.weight": Kind.Q4_1,
        "blk.1.attn_v.weight": Kind.F16,
    }
    loaded = load_model(
        write_gguf(tmp_path / "mixed.gguf", without("output.weight"), kinds=kinds),
        dtype="float32",
        add_note=print,
    )
    state, truth = loaded.model.state_dict(), tiny.fresh("llama", vocab_size=300).state_dict()
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    for theirs, ours in (
        ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ):
        exact = truth[ours].bfloat16().float().numpy()
        stored = gguf.dequantize(gguf.quantize(exact, kinds[theirs]), kinds[theirs])
        assert torch.equal(state[ours], torch.from_numpy(stored).bfloat16().float())
    assert torch.equal(state["model.norm.weight"], truth["model.norm.weight"].bfloat16().float())


def logits_of(truth: object, loaded: object) -> float:
    """The largest difference between two models' logits, the first one's weights rounded as the
    file's are.
    """
    truth.load_state_dict({n: t.bfloat16().float() for n, t in truth.state_dict().items()})  # type: ignore[attr-defined]
    ids = torch.tensor([[5, 99, 7, 250, 3, 8, 1, 77]])
    with torch.no_grad():
        return float((loaded(ids).logits - truth(ids).logits).abs().max())  # type: ignore[operator]


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_rotary_factors_are_taken_over(factor: float, tmp_path: Path) -> None:
    """Llama 3.1's GGUF files say their scaling in rope_freqs.weight alone, as a table; from the
    source of llama.cpp's converter: 1 for short wavelengths, the factor for long ones, a blend
    between.
    """
    theta, low, high, context = 500000.0, 1.0, 4.0, 8192
    table = []
    for place in range(4):
        wavelength = 2 * numpy.pi * theta ** (place / 4)
        smooth = (context / wavelength - low) / (high - low)
        blend = 1 / ((1 - smooth) / factor + smooth)
        table.append(
            1.0 if wavelength < context / high else factor if wavelength > context / low else blend
        )
    assert len(set(table)) == (1 if factor == 1 else 3)  # all three cases are in it
    values = numpy.array(table, dtype=numpy.float32)
    file = write_gguf(
        tmp_path / "scaled.gguf", lambda t: [*t, ("rope_freqs.weight", values)], theta=theta
    )
    rope = {"rope_type": "default", "rope_theta": theta}
    if factor > 1:
        rope |= {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
    truth = tiny.fresh("llama", vocab_size=300, rope_parameters=rope)
    assert logits_of(truth, load_model(file, dtype="float32", add_note=print).model) <= 1e-5


def test_a_scaling_in_the_metadata_is_taken_over_or_refused(tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def longrope(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    scaled = load_model(
        write_gguf(tmp_path / "linear.gguf", keys=linear), dtype="float32", add_note=print
    )
    truth = tiny.fresh(
        "llama",
        vocab_size=300,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    )
    assert logits_of(truth, scaled.model) <= 1e-5
    with pytest.raises(
        ModelError,
        match=r"llama\.rope\.scaling\.type='longrope' cannot be converted from a GGUF file",
    ):
        convert_gguf(write_gguf(tmp_path / "long.gguf", keys=longrope), print)


def test_what_was_converted_is_opened_again(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that is read back otherwise (another rotary base) gives other logits: nothing is
    kept, exit code 5.
    """
    file, right = write_gguf(tmp_path / "a.gguf", theta=500.0), embedded.write_config
    notes: list[str] = []
    convert_gguf(file, notes.append)
    assert any(
        "reloaded: every weight as converted, largest logit difference 0.0e+00" in note
        for note in notes
    )

    def wrong(folder: Path, changes: dict[str, object]) -> None:
        right(folder, {"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}})

    other = tmp_path / "b.gguf"
    other.write_bytes(file.read_bytes() + bytes(32))
    monkeypatch.setattr(embedded, "write_config", wrong)
    with pytest.raises(ContractError, match="more than rounding to bfloat16 can explain"):
        convert_gguf(other, print)
    assert [p.name[:2] for p in home.iterdir() if not p.name.startswith(".")] == ["a-"]
