"""`lorry export CONFIG.yaml to=hf-moe`: a mergekit-moe file as it is, its gates against a few lines
over transformers' own hidden states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.verbworld import World, lorry

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
        ({"experts": [{"source_model": source}, {"source_model": source}]}, 2, "positive_prompts"),
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
