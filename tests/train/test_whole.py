"""Training the base weights: against a plain loop of transformers and torch, what costs nothing,
what is written, resuming.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import lorry
from lorry.adapters.attach import attach
from lorry.adapters.base_weights import (
    BaseWeights,
    get_base_weights,
    make_weights_trainable,
    select_parameters,
)
from lorry.adapters.peft.base_digest import base_digest
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.config import RunConfig, build_settings
from lorry.data.batch import TokenizedExample
from lorry.errors import ConfigError
from lorry.models.hf.model import HfModel
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import TrainResult, train_run
from tests.support import tiny
from tests.support.seam import Fixed, examples
from tests.support.tinyrun import DEFAULTS, Heard, lines, model_directory, quick, rows, write_rows  # noqa: F401 - a fixture

OPTIM = OptimSettings(betas=(0.9, 0.99), eps=1e-5, weight_decay=0.1, max_grad_norm=1.0)
RATE, STEPS = 1e-2, 5
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {"mlp": (".mlp.",), "attention": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "llama tied": {"mlp": (".mlp.",), "attention": (".self_attn.",)},
    "gpt2": {"mlp": (".mlp.",), "attention": (".attn.",)},
    "gpt_neox parallel": {"mlp": (".mlp.",), "attention": (".attention.",)},
}


def steps() -> list[list[list[TokenizedExample]]]:
    """Two uneven micro-batches a step, without the padding token 0, to whose embedding transformers
    gives no gradient at all.
    """
    return [[small(examples(3, 2 * s)), small(examples(2, 2 * s + 1))] for s in range(STEPS)]


def small(made: list[TokenizedExample]) -> list[TokenizedExample]:
    return [
        TokenizedExample([1 + t % (tiny.VOCAB - 1) for t in e.tokens], e.weights, key=e.key)
        for e in made
    ]


def plain(
    theirs: nn.Module, trained: Sequence[str], dtype: torch.dtype = torch.float32, lr: float = RATE
) -> list[float]:
    """The losses of a loop anybody would write: transformers' model, torch's AdamW, a row at a
    time; no decay on vectors.
    """
    theirs.to(dtype).eval().requires_grad_(False)
    params = [p for n, p in theirs.named_parameters() if n in trained]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.dim() > 1]},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=lr,
        betas=OPTIM.betas,
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
    )
    losses = []
    for p in params:
        p.requires_grad_(True)
    for step in steps():
        made = [e for batch in step for e in batch]
        total = sum(sum(e.weights) for e in made)
        loss = torch.zeros(())
        for e in made:
            logp = theirs(input_ids=torch.tensor([e.tokens])).logits[0].float().log_softmax(-1)
            for t, w in enumerate(e.weights):
                if w:
                    loss = loss - w * logp[t - 1, e.tokens[t]] / total
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, OPTIM.max_grad_norm)
        adamw.step()
        losses.append(loss.item())
    return losses


def ours(
    model: Any, trainable: str | Sequence[str], lr: float = RATE
) -> tuple[list[float], BaseWeights]:
    weights = make_weights_trainable(model, trainable)
    local, task = LocalBackend(model, ["base"], OPTIM), Fixed(steps(), ["base"])
    losses = []
    for step in range(STEPS):
        losses.append(local.forward_backward(task.step_batches(step, {}), task, step).loss["base"])
        local.step({"base": lr})
    return losses, weights


def named(theirs: nn.Module, variant: str, trainable: str) -> list[str]:
    return [
        n
        for n, _ in theirs.named_parameters()
        if trainable == "all" or any(part in n for part in PARTS[variant][trainable])
    ]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("trainable", ["all", "mlp", "attention"])
@pytest.mark.parametrize("variant", list(PARTS))
def test_it_is_the_plain_loop(variant: str, trainable: str, native: bool, tmp_path: Path) -> None:
    """Five steps of AdamW with decay and clipping: losses within 1e-5, weights within a thousandth
    of what they moved.
    """
    theirs = tiny.fresh(variant)
    start = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    model = tiny.opened(tiny.directory(theirs, tmp_path / "base"), native=native)
    trained = named(theirs, variant, trainable)
    losses, weights = ours(model, trainable)
    expected = plain(theirs, trained)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert sorted(weights.params) == sorted(trained)
    assert weights.num_parameters() == sum(
        p.numel() for n, p in theirs.named_parameters() if n in trained
    )
    mine = dict(model.named_parameters())
    for name, p in theirs.named_parameters():
        moved = float((p - start[name]).norm())
        assert (moved > 0) == (name in trained)
        assert float((mine[name] - p).norm()) <= 1e-3 * moved, name


def test_small_updates_survive_in_bfloat16(tmp_path: Path) -> None:
    """At a rate of 1e-4 most of bfloat16's own AdamW steps round away; fp32 masters take the way
    that fp32 training takes.
    """
    theirs, rate = tiny.fresh("llama"), 1e-4
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.bfloat16())
    start = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    names = list(start)
    base = tiny.directory(theirs, tmp_path / "base")
    _, weights = ours(tiny.opened(base, dtype="bfloat16"), "all", rate)
    narrow = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    plain(narrow, names, torch.bfloat16, rate)
    plain(theirs, names, lr=rate)

    def way(of: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([(of[n].detach().float() - start[n]).flatten() for n in names])

    wide = way(dict(theirs.named_parameters()))
    mine, lost = way(weights.split_like(weights.values)), way(dict(narrow.named_parameters()))
    assert torch.cosine_similarity(mine, wide, 0) > 0.97
    assert float(mine.norm() / wide.norm()) == pytest.approx(1, abs=0.03)
    assert torch.cosine_similarity(lost, wide, 0) < 0.9
    assert float((lost != 0).float().mean()) < 0.6 * float((wide != 0).float().mean())
    for (_, param), master in weights.parameter_views(weights.values):
        assert torch.equal(param, master.bfloat16())


def test_what_does_not_train_costs_no_product(tmp_path: Path) -> None:
    """Matrix products of backward, counted. A llama layer has 7 linears: 7 products for inputs, 7
    for weights. The MLPs alone need 3 for weights; and of the lowest layer one for an input, since
    below its MLP nothing trains.
    """

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.products = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.products += func.overloadpacket in (
                torch.ops.aten.mm,
                torch.ops.aten.addmm,
                torch.ops.aten.addmm_,
            )
            return func(*args, **(kwargs or {}))

    found = {}
    for trainable in ("all", "mlp", ["model.layers.1.mlp.down_proj"]):
        model = tiny.decoder(tiny.fresh("llama"), tmp_path / f"{trainable}"[:5].strip("['"))
        make_weights_trainable(model, trainable)
        last = model.hidden(
            lorry.models.causal_lm.PackedInput.of([[1, 2, 3, 4]]),
            lorry.adapters.mix.AdapterContext(),
        ).last
        assert last is not None
        with Count() as count:
            last.sum().backward()
        found[str(trainable)] = count.products
    assert found == {"all": 2 * 14, "mlp": (7 + 3) + (1 + 3), "['model.layers.1.mlp.down_proj']": 2}


def test_below_the_lowest_trained_layer_there_is_no_graph(tmp_path: Path) -> None:
    model = tiny.decoder(tiny.fresh("llama"), tmp_path)
    make_weights_trainable(model, r"model\.layers\.1\..*")
    output_layers = model.hidden(
        lorry.models.causal_lm.PackedInput.of([[1, 2, 3]]),
        lorry.adapters.mix.AdapterContext(),
        output_layers=[0, 1],
    ).layer_outputs
    assert not output_layers[0].requires_grad
    assert output_layers[1].requires_grad


@pytest.mark.parametrize("native", [True, False])
def test_recomputed_layers_give_the_same_bits(native: bool, tmp_path: Path) -> None:
    base, found = tiny.directory(tiny.fresh("gpt2"), tmp_path), []
    for recompute in (False, True):
        model = tiny.opened(base, native=native, dtype="bfloat16")
        model.gradient_checkpointing = recompute
        found.append(ours(model, "all")[1].values)
    assert torch.equal(*found)


# --- which weights


def test_names_and_patterns(tmp_path: Path) -> None:
    model = tiny.decoder(tiny.fresh("gpt2"), tmp_path)
    assert select_parameters(model, ["c_fc"]) == [
        f"transformer.h.{i}.mlp.c_fc.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")
    ]
    assert select_parameters(model, "c_fc") == select_parameters(model, ["c_fc"])
    assert select_parameters(model, r".*h\.1\.attn.*") == [
        f"transformer.h.1.attn.{m}.{leaf}"
        for m in ("c_attn", "c_proj")
        for leaf in ("weight", "bias")
    ]
    # tied: the one tensor under its first name
    assert select_parameters(model, ["lm_head"]) == ["transformer.wte.weight"]
    with pytest.raises(
        ConfigError, match=r"trainable names 'c_fd', which matches no layer .did you mean 'c_fc'"
    ):
        select_parameters(model, ["c_fd"])


@pytest.mark.parametrize("kind", ["opt", "bloom", "phi", "gemma2", "qwen3_moe"])
def test_halves_of_models_that_no_family_describes(kind: str, tmp_path: Path) -> None:
    """By their paths: each linear of a layer is in one half, none in both."""
    model = tiny.opened(
        tiny.directory(tiny.random_model(tiny.FOREIGN[kind]), tmp_path / kind), native=False
    )
    assert isinstance(model, HfModel)
    owners = {id(p): path for path, m in model.named_modules() for p in m.parameters(recurse=False)}
    own = dict(model.named_parameters())
    halves = [
        {owners[id(own[n])].rpartition(".")[2] for n in select_parameters(model, part)}
        for part in ("mlp", "attention")
    ]
    assert not halves[0] & halves[1]
    assert (
        halves[1]
        == {
            "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
            "bloom": {"query_key_value", "dense"},
            "phi": {"q_proj", "k_proj", "v_proj", "dense"},
            "gemma2": {"q_proj", "k_proj", "v_proj", "o_proj"},
            "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
        }[kind]
    )
    assert halves[0] == {
        "opt": {"fc1", "fc2"}, "bloom": {"dense_h_to_4h", "dense_4h_to_h"}, "phi": {"fc1", "fc2"},
        "gemma2": {"gate_proj", "up_proj", "down_proj"}, "qwen3_moe": {"gate", "experts"},
    }[kind]  # fmt: skip


def test_not_beside_adapters_nor_twice_nor_in_half_precision(tmp_path: Path) -> None:
    model = tiny.decoder(tiny.fresh("llama"), tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"weight is float16, a dtype in which base weights cannot train; load the model with dtype=bfloat16",
    ):
        make_weights_trainable(tiny.opened(tmp_path, dtype="float16"))
    make_weights_trainable(model)
    with pytest.raises(ConfigError, match="has base weights that train already"):
        make_weights_trainable(model)
    other = tiny.opened(tmp_path)
    attach(other)
    with pytest.raises(ConfigError, match="has the adapter 'default' already"):
        make_weights_trainable(other)
    assert get_base_weights(other) is None


# --- whole runs


def described(model: Path, data: Path, out: Path, **settings: Any) -> RunConfig:
    plain_defaults = {k: v for k, v in DEFAULTS.items() if k != "r"}
    given = {
        "model": {"name": str(model)},
        "data": {"path": str(data)},
        "output_dir": str(out),
        "lora": None,
    }
    return build_settings(
        RunConfig,
        {
            **given,
            **plain_defaults,
            "max_steps": 6,
            "save_steps": 2,
            "learning_rate": 1e-3,
            **settings,
        },
        print,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", rows(14))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_run_is_a_model_that_transformers_loads(
    family: str, dtype: str, data: Path, tmp_path: Path
) -> None:
    base = model_directory(tmp_path / "base", family)
    result = train_run(described(base, data, tmp_path / "run", dtype=dtype, test_size=2), [])
    assert [c["status"] for c in result.contracts] == ["held"] * 8
    assert "nothing is frozen" in result.contracts[1]["detail"]
    was, now = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "run" / "model.safetensors"),
    )
    assert {n: (t.shape, getattr(torch, dtype)) for n, t in was.items()} == {
        n: (t.shape, t.dtype) for n, t in now.items()
    }
    assert all(not torch.equal(was[n].to(now[n].dtype), now[n]) or dtype == "bfloat16" for n in was)
    ids = torch.arange(3, 40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=getattr(torch, dtype))
    again, tokenizer = lorry.load(tmp_path / "run", dtype=dtype)
    with torch.no_grad():
        mine = result.model(ids).logits.float()
        assert torch.allclose(again(ids).logits.float(), mine, atol=1e-5)
        assert (theirs(ids).logits.float() - mine).abs().max() < (
            1e-5 if dtype == "float32" else 0.1
        )
    assert tokenizer is not None
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    total = sum(t.numel() for t in was.values())
    assert (receipt["trainable_parameters"], receipt["total_parameters"]) == (total, total)
    assert receipt["saved_bytes"] == (tmp_path / "run" / "model.safetensors").stat().st_size
    assert receipt["base"]["sha256"] == base_digest(lorry.load(base, dtype=dtype)[0])


class Stopper(Heard):
    """Breaks off after a step, as a kill would, though in this process."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, record: StepRecord) -> None:
        if record["step"] == self.at:
            raise RuntimeError("stopped here")


@pytest.mark.parametrize(("dtype", "trainable"), [("float32", "all"), ("bfloat16", "mlp")])
def test_stopped_and_resumed_is_never_stopped(
    dtype: str, trainable: str, data: Path, tmp_path: Path
) -> None:
    base, out = model_directory(tmp_path / "base", "llama"), tmp_path / "run"
    settings = {"dtype": dtype, "trainable": trainable, "test_size": 2, "weight_decay": 0.1}
    whole = train_run(described(base, data, tmp_path / "whole", **settings), [])
    with pytest.raises(RuntimeError, match="stopped here"):
        train_run(described(base, data, out, **settings), [], [Stopper(5)])
    assert not (out / "config.json").exists()
    result = train_run(described(base, data, out, **settings, resume_from_checkpoint="auto"), [])
    for name in ("model.safetensors", "checkpoints/step-00000006/state.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    passing = ("seconds", "peak_memory_bytes")
    kept = [
        [{k: v for k, v in line.items() if k not in passing} for line in lines(run)]
        for run in (out, tmp_path / "whole")
    ]
    assert kept[0] == kept[1]
    assert result.contracts == whole.contracts


def finished(out: Path, base: Path, data: Path, **settings: Any) -> TrainResult:
    return train_run(described(base, data, out, max_steps=2, **settings), [])


def test_an_earlier_run_is_kept_and_a_strangers_model_is_left_alone(
    data: Path, tmp_path: Path
) -> None:
    base, out = model_directory(tmp_path / "base", "llama"), tmp_path / "run"
    finished(out, base, data)
    first = (out / "model.safetensors").read_bytes()
    finished(out, base, data, seed=4)
    assert (out / "previous" / "1" / "model.safetensors").read_bytes() == first
    assert (out / "previous" / "1" / "config.json").is_file()
    finished(out, base, data, lora={"r": 2}, target_modules=["q_proj"])
    assert not (out / "config.json").exists()
    assert (out / "adapter_model.safetensors").is_file()
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(
        ConfigError,
        match=r"holds .*model\.safetensors.*which Lorry did not write and would overwrite",
    ):
        finished(base, base, data)
    stranger = shutil.copytree(base, tmp_path / "stranger")
    for settings in ({}, {"lora": {"r": 2}, "target_modules": ["q_proj"]}):
        with pytest.raises(
            ConfigError,
            match=r"holds .*tokenizer\.json.*nothing was changed: use another output_dir",
        ):
            finished(stranger, base, data, **settings)
    # beside a run of ours: it is still not ours
    shutil.copy(base / "config.json", out / "config.json")
    with pytest.raises(
        ConfigError,
        match=r"holds a model that no run with lora=null wrote and that this run would replace",
    ):
        finished(out, base, data)
    assert (stranger / "model.safetensors").read_bytes() == before
    assert (base / "model.safetensors").read_bytes() == before


def test_a_model_is_not_displaced_by_the_run_that_begins_with_it(
    data: Path, tmp_path: Path
) -> None:
    """It could not be resumed, and an adapter's base would be the adapter's own directory."""
    base, out = model_directory(tmp_path / "base", "llama"), tmp_path / "run"
    finished(out, base, data)
    for settings in ({}, {"lora": {"r": 2}}):
        with pytest.raises(
            ConfigError, match="holds the model that this run starts from and would move away"
        ):
            finished(out, out, data, **settings)
    assert (out / "config.json").is_file()
    assert not (out / "previous").exists()


def test_settings_that_only_adapters_have(data: Path, tmp_path: Path) -> None:
    base = model_directory(tmp_path / "base", "llama")
    with pytest.raises(ConfigError, match="loraplus_lr_ratio is for an adapter"):
        finished(tmp_path / "a", base, data, loraplus_lr_ratio=4.0)
    with pytest.raises(ConfigError, match="memory_budget is for training adapters only"):
        finished(tmp_path / "b", base, data, memory_budget="1GiB")
    finished(tmp_path / "adapter", base, data, lora={"r": 2})
    with pytest.raises(ConfigError, match="has an adapter, and lora=null trains the base"):
        finished(tmp_path / "c", tmp_path / "adapter", data)


def test_the_norm_of_very_many_small_numbers(tmp_path: Path) -> None:
    """Squares of 4 million equal values, added in fp32 one by one, would stop growing; the norm is
    that of float64.
    """
    weights = make_weights_trainable(tiny.decoder(tiny.fresh("llama"), tmp_path))
    weights.grads = torch.full((1 << 22,), 3e-4)
    assert weights.norm() == pytest.approx(3e-4 * math.sqrt(1 << 22), rel=1e-6)
