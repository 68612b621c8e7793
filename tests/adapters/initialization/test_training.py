"""Adapters that take their first product off: training, mixing, merging, files of both libraries and
what is refused. Dtype float32 where nothing else is said.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import attach, detach, get_bank, lora_parameters
from lorry.adapters.merge import merge, merged_tensors, unmerge
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix
from lorry.adapters.peft.files import load_adapter, plain_adapter_files, save_adapter
from lorry.adapters.quantization.linear import quantize_linears
from lorry.adapters.quantization.packed import QUANTIZATIONS
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError, ModelError

TARGETS = ("q_proj", "k_proj", "v_proj", "down_proj")
TAKES_OFF = ("pissa", "pissa_niter_4", "olora", "milora", "corda", "lora_ga")
EVERY = (*TAKES_OFF, "eva", "orthogonal")


def spec_of(init: str, **changes: Any) -> LoraSpec:
    return LoraSpec(
        **{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": init, **changes}
    )


def begun(model: nn.Module, init: str, ids: Tensor, name: str = "default", **changes: Any) -> Any:
    """An adapter that is attached with an initialisation from these rows."""

    def run() -> None:
        out = model(input_ids=ids, labels=ids)
        if torch.is_grad_enabled():
            out.loss.backward()

    return attach(model, spec_of(init, **changes), name, run_model=run)


def stepped(model: nn.Module, ids: Tensor, steps: int = 2) -> None:
    """A few steps of plain SGD."""
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for p in lora_parameters(model):
                p.sub_(0.05 * p.grad)
                p.grad.zero_()


class Twin(nn.Module):
    """y = W x - s B0 A0 x + s B A x by plain autograd, W as it was."""

    def __init__(self, base: nn.Linear, slot: Any) -> None:
        super().__init__()
        self.base, self.scale = base, slot.scale
        self.A, self.B = (nn.Parameter(p.detach().clone()) for p in (slot.A, slot.B))
        self.A0, self.B0 = (t.clone() for t in slot.initial)

    def forward(self, x: Tensor) -> Tensor:
        off = F.linear(F.linear(x, self.A0), self.B0)
        return self.base(x) + self.scale * (F.linear(F.linear(x, self.A), self.B) - off)


@pytest.mark.parametrize("init", TAKES_OFF)
def test_the_model_begins_as_its_base_and_trains_as_plain_autograd(
    init: str, tiny: Callable[..., nn.Module], ids: Tensor, logits: Any, shake: Any
) -> None:
    mine, twin = tiny("llama"), tiny("llama")
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    adapter = begun(mine, init, ids)
    torch.testing.assert_close(logits(mine, ids), logits(twin, ids), rtol=0, atol=2e-5)
    shake(lora_parameters(mine))
    adapter.touch()
    for p in twin.parameters():
        p.requires_grad_(False)
    for path, slot in adapter.slots.items():
        parent, _, leaf = path.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, Twin(twin.get_submodule(path), slot))
    loss, truth = (m(input_ids=ids, labels=ids).loss for m in (mine, twin))
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=0)
    loss.backward()
    truth.backward()
    for path, slot in adapter.slots.items():
        module = twin.get_submodule(path)
        for got, want in ((slot.A.grad, module.A.grad), (slot.B.grad, module.B.grad)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    detach(mine)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", EVERY)
def test_saved_it_is_plain_lora_for_both_libraries(
    init: str,
    rslora: bool,
    tiny: Callable[..., nn.Module],
    ids: Tensor,
    logits: Any,
    tmp_path: Path,
) -> None:
    mine = tiny("llama")
    begun(
        mine, init, ids, use_rslora=rslora, rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 5}
    )
    stepped(mine, ids)
    save_adapter(mine, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (8 if init in TAKES_OFF else 4)
    here, base = logits(mine, ids), logits(tiny("llama"), ids)
    assert float((here - base).abs().max()) > 1e-3, "nothing was trained"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing and unexpected keys
        theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs, ids), here, rtol=0, atol=1e-5)
    again = tiny("llama")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again, ids), here)
    # a file off by its residual is another model: what the rest of this test is worth
    if init not in TAKES_OFF:
        return
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    off = {
        name: t.clone().index_fill_(1, torch.arange(t.shape[1] // 2, t.shape[1]), 0)
        if "lora_B" in name
        else t
        for name, t in load_file(weights).items()
    }
    save_file(off, weights, {"format": "pt"})
    wrong = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    assert float((logits(wrong, ids) - here).abs().max()) > 1e-2


def test_a_bfloat16_base(
    tiny: Callable[..., nn.Module], ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    """bfloat16: begins within its rounding, and is read back to the bit."""
    mine = tiny("llama").bfloat16()
    begun(mine, "pissa", ids)
    base = logits(tiny("llama").bfloat16(), ids).float()
    assert float((logits(mine, ids).float() - base).norm() / base.norm()) < 2e-2
    stepped(mine, ids)
    save_adapter(mine, tmp_path / "adapter")
    again = tiny("llama").bfloat16()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again, ids), logits(mine, ids))


def test_a_packed_base_keeps_its_codes(
    tiny: Callable[..., nn.Module], ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    """nf4, opened to float32: pissa of the opened matrix; what is saved is over the packed base as it is."""
    mine, base = tiny("llama"), tiny("llama")
    for model in (mine, base):
        quantize_linears(model, QUANTIZATIONS["nf4"], torch.float32)
    codes = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    begun(mine, "pissa", ids)
    torch.testing.assert_close(logits(mine, ids), logits(base, ids), rtol=0, atol=2e-5)
    stepped(mine, ids)
    assert all(torch.equal(tensor, codes[name]) for name, tensor in mine.state_dict().items())
    save_adapter(mine, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(base, ids), logits(mine, ids))


def test_mixes_merges_and_copies_know_what_is_taken_off(
    tiny: Callable[..., nn.Module], ids: Tensor, logits: Any
) -> None:
    mine, base = tiny("llama"), tiny("llama")
    begun(mine, "pissa", ids, "one")
    stepped(mine, ids)
    bank, alone = get_bank(mine), logits(mine, ids)
    begun(mine, "olora", ids, "two")
    torch.testing.assert_close(logits(mine, ids), alone, rtol=0, atol=2e-5)
    twin = deepcopy(mine)
    stepped(mine, ids)
    bank.activate(Mix.none())
    assert torch.equal(logits(mine, ids), logits(base, ids))
    # gates: g (s B A - s B0 A0), by weights that were folded in float64
    gates = {"one": 0.5, "two": -0.25}
    folded = tiny("llama").double()
    for name, gate in gates.items():
        for path, slot in bank[name].slots.items():
            a, b = (p.detach().double() for p in (slot.A, slot.B))
            a0, b0 = (t.double() for t in slot.initial)
            with torch.no_grad():
                folded.get_submodule(path).weight += gate * slot.scale * (b @ a - b0 @ a0)
    truth = logits(folded, ids)
    bank.activate(Mix.constants(gates))
    torch.testing.assert_close(logits(mine, ids).double(), truth, rtol=0, atol=1e-4)
    per_token = Mix.routed(["one", "two"], torch.tensor([[0.5, -0.25]]).expand(ids.numel(), 2))
    token = AMBIENT_CONTEXT.set(AdapterContext(per_token))
    torch.testing.assert_close(logits(mine, ids).double(), truth, rtol=0, atol=1e-4)
    AMBIENT_CONTEXT.reset(token)
    streamed = dict(merged_tensors(mine))
    merge(mine)
    torch.testing.assert_close(logits(mine, ids).double(), truth, rtol=0, atol=1e-4)
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(streamed[key], mine.state_dict()[key])
    unmerge(mine)
    bank.activate(Mix.none())
    assert torch.equal(logits(mine, ids), logits(base, ids))
    # the copy has buffers of its own
    torch.testing.assert_close(logits(twin, ids), alone, rtol=0, atol=2e-5)
    assert get_bank(twin)["one"].initial is not bank["one"].initial


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_raw_form(
    init: str, tiny: Callable[..., nn.Module], ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    """Trained in PEFT, read here; trained here, read in PEFT and here. 1e-4: PEFT's residual is rounded
    to the base's dtype."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(TARGETS),
        init_lora_weights=init,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(tiny("llama"), config)
    for _ in range(2):
        theirs(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for p in theirs.parameters():
                if p.grad is not None:
                    p.sub_(0.05 * p.grad)
                    p.grad = None
    theirs.save_pretrained(tmp_path / "theirs")
    mine = tiny("llama")
    with pytest.raises(ModelError, match=r"changed the base weights too.*convert_init=true"):
        load_adapter(mine, tmp_path / "theirs")
    load_adapter(mine, tmp_path / "theirs", convert_init=True)
    torch.testing.assert_close(logits(mine, ids), logits(theirs, ids), rtol=0, atol=1e-4)
    # read so it is whole: what is saved of it needs no conversion
    save_adapter(mine, tmp_path / "plain")
    plain = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "plain")
    torch.testing.assert_close(logits(plain, ids), logits(theirs, ids), rtol=0, atol=1e-4)
    # and the other way
    ours = tiny("llama")
    begun(ours, init, ids, keep_residual=True)
    stepped(ours, ids)
    save_adapter(ours, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (written["init_lora_weights"], written["r"]) == (init, 4)
    raw = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")
    torch.testing.assert_close(logits(raw, ids), logits(ours, ids), rtol=0, atol=1e-4)
    again = tiny("llama")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again, ids), logits(ours, ids))
    # exports have all of it
    files = plain_adapter_files(ours)
    assert json.loads(files["adapter_config.json"])["r"] == 8
    half = tiny("llama").bfloat16()
    with pytest.raises(ModelError, match=r"keep_residual over a base in float32.*dtype=float32"):
        load_adapter(half, tmp_path / "ours")
    assert not get_bank(half, create=True).names()


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_what_the_base_alone_does_not_give_again_stays_refused(
    init: str, saved: Path, tiny: Callable[..., nn.Module], tmp_path: Path
) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": init}))
    with pytest.raises(ModelError, match="cannot be found again from the base alone"):
        load_adapter(tiny("llama"), folder, convert_init=True)
    with pytest.raises(ConfigError, match="keep_residual=true"):
        LoraSpec(init_lora_weights=init, keep_residual=True)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"init_lora_weights": "eva"}, "is made from rows; give run_model="),
    "backward": ({"init_lora_weights": "lora_ga"}, "and the loss's backward"),
    "original": ({"init_lora_weights": "loftq"}, "rounded off; give original="),
    "rank": (
        {"init_lora_weights": "pissa", "r": 33},
        r"q_proj is \[32, 32\] and has 32; give r=32 or less",
    ),
    "rank of qr": (
        {"init_lora_weights": "olora", "r": 17},
        r"k_proj is \[16, 32\] and has 16; give r=16 or less",
    ),
    "embedding": (
        {"init_lora_weights": "milora", "target_modules": ("q_proj", "embed_tokens")},
        r"is for linear layers, and model\.embed_tokens is none",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_starts_attach_nothing(case: str, tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    changes, message = BAD[case]
    model = tiny("llama")
    names = [type(m).__name__ for m in model.modules()]
    with pytest.raises(ConfigError, match=message):
        attach(model, spec_of("pissa", **changes))
    assert not get_bank(model, create=True).names()
    assert [type(m).__name__ for m in model.modules()] == names


def test_bad_rows(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match=r"no token reached model\.layers\.0\.self_attn\.q_proj"):
        attach(model, spec_of("eva"), run_model=lambda: None)
    with pytest.raises(ConfigError, match=r"saw 3 tokens at .*; give more rows"):
        attach(model, spec_of("eva"), run_model=lambda: model(ids[:1, :3]))
    with pytest.raises(ConfigError, match=r"got no gradient.*run_model has to call backward\(\)"):
        attach(model, spec_of("lora_ga"), run_model=lambda: model(ids))
    with pytest.raises(ConfigError, match=r"needs twice as many.*\[16, 32\] and has 16; give r=8"):
        attach(model, spec_of("lora_ga", r=9), run_model=lambda: model(ids))
    with pytest.raises(ConfigError, match=r"for a packed base, and .* is whole"):
        attach(model, spec_of("loftq"), original=lambda path: torch.zeros(1, 1))
    packed = tiny("llama")
    quantize_linears(packed, QUANTIZATIONS["int8"], torch.float32)
    with pytest.raises(ConfigError, match=r"got no gradient.*run_model has to call backward\(\)"):
        attach(packed, spec_of("lora_ga"), run_model=lambda: packed(ids))
    with pytest.raises(ConfigError, match=r"the weight before packing is"):
        attach(packed, spec_of("loftq"), original=lambda path: torch.zeros(2, 2))
    broken = tiny("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises((ModelError, torch.linalg.LinAlgError)):
        attach(broken, spec_of("olora"))
    assert not get_bank(broken).names()
    with pytest.raises(ConfigError, match=r"init_lora_weights is 'pisa'.*did you mean 'pissa'"):
        LoraSpec(init_lora_weights="pisa")
    with pytest.raises(ConfigError, match=r"rho is 0\.5"):
        LoraSpec(init_lora_weights="eva", rho=0.5)


def test_what_is_more_than_low_rank(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """Another start than plain LoRA's has to know A and B alone; whole modules beside them are fine."""
    model = tiny("gpt2")
    spec = LoraSpec(r=2, target_modules=("c_attn",), init_lora_weights="pissa", bias="lora_only")
    with pytest.raises(ConfigError, match=r"bias too; leave one of the two out"):
        attach(model, spec)
    with pytest.raises(ConfigError, match=r"does not go with use_dora"):
        LoraSpec(init_lora_weights="loftq", use_dora=True)
    whole = LoraSpec(
        r=2, target_modules=("q_proj",), init_lora_weights="eva", modules_to_save=("lm_head",)
    )
    other = tiny("llama")
    with pytest.raises(ConfigError, match=r"makes an adapter of other ranks.*lm_head"):
        attach(other, whole, run_model=lambda: other(ids))


def test_a_whole_module_beside_it(
    tiny: Callable[..., nn.Module], ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    """pissa with modules_to_save: saved and read by both libraries."""
    mine = tiny("llama")
    begun(mine, "pissa", ids, modules_to_save=("lm_head",))
    stepped(mine, ids)
    save_adapter(mine, tmp_path / "adapter")
    here = logits(mine, ids)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs, ids), here, rtol=0, atol=1e-5)
    again = tiny("llama")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again, ids), here)
