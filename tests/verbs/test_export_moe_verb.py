"""`lorry export CONFIG.yaml to=hf-moe`: a mergekit-moe file as it is, its gates against a few lines
over transformers' own hidden states.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.verbworld import World, lorry, model_directory

PROMPTS: list[dict[str, Any]] = [
    {
        "positive_prompts": ["Where does Ilse live?", "Who lives in Kyoto?"],
        "negative_prompts": ["system"],
    },
    {"positive_prompts": ["12 + 7"]},
    {"positive_prompts": ["assistant user"]},
]


def config(path: Path, world: World, **changes: Any) -> Path:
    """A file of mergekit-moe: the run, the run by its longer name, and the base itself."""
    sources = [str(world.run), f"{world.base}+{world.run}", str(world.base)]
    experts = [
        {"source_model": source, **prompts}
        for source, prompts in zip(sources, PROMPTS, strict=True)
    ]
    described = {
        "base_model": str(world.base),
        "gate_mode": "hidden",
        "dtype": "float32",
        "experts_per_token": 2,
        "experts": experts,
        "attention": "average",
        **changes,
    }
    path.write_text(yaml.safe_dump(described))
    return path


def gates(base: Path, mode: str) -> Tensor:
    """[L, E, d], as mergekit-moe's router.py has it, a prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(base)

    def states(texts: list[str]) -> Tensor:
        found = []
        for text in texts:
            ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids
            with torch.no_grad():
                hidden = torch.stack(model(ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
            if mode == "cheap_embed":
                found.append(hidden[:1].sum(1).expand(len(hidden), -1))
            else:
                found.append(hidden.mean(1) if mode == "hidden_avg" else hidden[:, -1])
        return torch.stack(found).mean(0)

    rows = []
    for prompts in PROMPTS:
        row = states(prompts["positive_prompts"])
        if "negative_prompts" in prompts:
            row = row - states(prompts["negative_prompts"])
        rows.append(row / row.norm(dim=-1, keepdim=True))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
def test_gates_are_mergekits(
    mode: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path / "moe.yaml", world, gate_mode=mode)
    assert lorry("export", file, "to=hf-moe", f"output_dir={tmp_path / 'moe'}") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'moe'}\n"
    assert "MixtralForCausalLM of 3 experts (people, people-1, base), 2 per token" in err
    assert "reloaded by transformers: largest logit difference to the plain mixture" in err
    assert f"gate_mode={mode}), not trained" in err
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    for layer, expected in enumerate(gates(world.base, mode)):
        found = stored[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    base = load_file(world.base / "model.safetensors")
    name = "model.layers.1.{}.weight"
    experts = [stored[name.format(f"block_sparse_moe.experts.{e}.w1")] for e in range(3)]
    assert torch.equal(experts[2], base[name.format("mlp.gate_proj")])
    assert torch.equal(experts[0], experts[1])
    assert not torch.equal(experts[0], experts[2])


def test_random_gates(world: World, tmp_path: Path) -> None:
    for seed in (0, 0, 1):
        file = config(tmp_path / "moe.yaml", world, gate_mode="random", seed=seed)
        number = len(list(tmp_path.iterdir()))
        assert lorry("export", file, "to=hf-moe", f"output_dir={tmp_path / str(number)}") == 0
    name = "model.layers.0.block_sparse_moe.gate.weight"
    one, two, other = (load_file(tmp_path / str(n) / "model.safetensors")[name] for n in (1, 2, 3))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_what_is_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(world.run)
    for changes, code, message in (
        ({"attention": "refuse"}, 2, "and this class of model routes MLPs only"),
        ({"experts_per_token": 4}, 2, "top_k is 4"),
        ({"experts": [{"source_model": str(world.base)}] * 2}, 2, "positive_prompts"),
        (
            {"experts": [{"source_model": source, "positive_prompts": ["a"]}] * 2},
            2,
            "have the same prompts",
        ),
        (
            {"experts": [{"source_model": f"other+{source}", "positive_prompts": ["a"]}] * 2},
            2,
            "the experts of a mixture share one",
        ),
        ({"experts": []}, 2, "takes base_model and experts"),
        ({"shared_experts": [{"source_model": source}]}, 2, "shared_experts"),
        ({"gate_mode": "sideways"}, 2, "gate_mode"),
        ({"weight": 0.5}, 2, "weight is not for to=hf-moe"),
        (
            {
                "base_model": source,
                "experts_per_token": 1,
                "experts": [{"source_model": source, "positive_prompts": ["a"]}],
            },
            2,
            "is a run",
        ),
    ):
        file = config(tmp_path / "moe.yaml", world, **changes)
        assert lorry("export", file, "to=hf-moe", f"output_dir={tmp_path / 'moe'}") == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "moe").exists()
    assert lorry("export", world.run, "to=hf-moe") == 2
    assert "takes base_model and experts" in capsys.readouterr().err
    assert lorry("export", "to=hf") == 2
    assert "takes a run" in capsys.readouterr().err


def whole_expert(folder: Path, base: Path, seed: int, *names: str) -> Path:
    """A model of the base's shape whose MLPs are others, and what ``names`` is part of."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    draw = torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(part in name for part in (".mlp.", *names)):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=draw))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_whole_models_are_experts(world: World, tmp_path: Path) -> None:
    """Two models with MLPs of their own, an adapter and the base: the class's logits are those of
    transformers' own MLPs of each, gated by hand; what else they change is averaged."""
    folders = [
        whole_expert(tmp_path / "one", world.base, 1),
        whole_expert(tmp_path / "two", world.base, 2, "q_proj", "norm.weight"),
    ]
    experts = [
        {"source_model": str(source), "positive_prompts": [text]}
        for source, text in zip((*folders, world.base), ("Where", "Who lives", "7"), strict=True)
    ]
    file = config(tmp_path / "moe.yaml", world, experts=experts)
    assert lorry("export", file, "to=hf-moe", f"output_dir={tmp_path / 'moe'}") == 0
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        for path in (*folders, world.base)
    ]
    plain = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float64).eval()
    states = [model.state_dict() for model in models]
    with torch.no_grad():
        for name, tensor in plain.named_parameters():
            if ".mlp." not in name:
                tensor.copy_(sum(state[name] for state in states) / 3)
    stored = load_file(tmp_path / "moe" / "model.safetensors")

    def mlp(layer: int, x: Tensor) -> Tensor:
        router = stored[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double()
        value, chosen = (x @ router.t()).softmax(-1).topk(2, -1)
        gates = torch.zeros(*x.shape[:-1], 3, dtype=torch.float64)
        gates.scatter_(-1, chosen, value / value.sum(-1, keepdim=True))
        outs = [model.model.layers[layer].mlp(x) for model in models]
        return sum(gates[..., e, None] * out for e, out in enumerate(outs))

    for number, layer in enumerate(plain.model.layers):
        layer.mlp.forward = partial(mlp, number)
    ids = torch.tensor([[5, 9, 3, 7, 11, 2, 8, 1]])
    with torch.no_grad():
        expected, found = plain(input_ids=ids).logits, mixed(input_ids=ids).logits
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < 1e-5


def test_what_no_whole_expert_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = whole_expert(tmp_path / "other", world.base, 1, "k_proj")
    wide = model_directory(tmp_path / "wide", intermediate_size=80)
    damaged = whole_expert(tmp_path / "damaged", world.base, 1)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    template = whole_expert(tmp_path / "template", world.base, 1)
    words = AutoTokenizer.from_pretrained(template)
    words.chat_template = "{{ messages }}"
    words.save_pretrained(template)
    for source, code, message in (
        (other, 2, "expert 'other' changes model.layers.0.self_attn.k_proj.weight"),
        (wide, 4, "mlp_width is 80"),
        (damaged, 4, "holds NaN or infinity"),
        (template, 4, "its chat template is another"),
        (tmp_path / "nowhere", 4, "nowhere"),
    ):
        experts = [{"source_model": str(s)} for s in (source, world.base)]
        changes = {"attention": "refuse", "gate_mode": "random"}
        file = config(tmp_path / "moe.yaml", world, experts=experts, **changes)
        assert lorry("export", file, "to=hf-moe", f"output_dir={tmp_path / 'moe'}") == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "moe").exists()
