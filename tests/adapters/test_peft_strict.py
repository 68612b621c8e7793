"""Adapter files that do not fit are refused by name, before the model is touched."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorry.adapters.attach import attach, get_bank, lora_parameters
from lorry.adapters.mix import Mix
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.peft.files import adapter_files, find_adapter, load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.disk.durable import DiskError
from lorry.errors import ConfigError, ModelError

WEIGHTS, CONFIG, FACTS = "adapter_model.safetensors", "adapter_config.json", "lorry_adapter.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
K0 = Q0.replace("q_proj", "k_proj")
DOWN0 = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, **changes: Any) -> None:
    (folder / CONFIG).write_text(
        json.dumps({**json.loads((folder / CONFIG).read_text()), **changes})
    )


def refused(tiny: Any, folder: Path, *parts: str, family: str = "llama") -> None:
    """Loading raises a ModelError that says all of ``parts``, and leaves the model as it was."""
    model = tiny(family)
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    with pytest.raises(ModelError) as caught:
        load_adapter(model, folder)
    for part in parts:
        assert part in str(caught.value)
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters()), "not even frozen"


def swap(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        a, b = Q0.format(side), DOWN0.format(side)
        tensors[a], tensors[b] = tensors[b], tensors[a]


TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], tuple[str, ...]]] = {
    "one side missing": (
        lambda t: t.pop(Q0.format("B")),
        (Q0.format("A"), "no lora_B", "incomplete"),
    ),
    "a module missing": (
        lambda t: [t.pop(Q0.format(s)) for s in "AB"],
        ("model.layers.0.self_attn.q_proj", "no tensors for it"),
    ),
    "two modules swapped": (swap, (DOWN0.format("A"), "[4, 32]", "[4, 48]")),
    "another rank": (
        lambda t: t.update({Q0.format("A"): torch.zeros(8, 32)}),
        (Q0.format("A"), "[8, 32]", "[4, 32]"),
    ),
    "transposed": (
        lambda t: t.update({Q0.format("B"): torch.zeros(4, 32)}),
        (Q0.format("B"), "[4, 32]", "[32, 4]"),
    ),
    "three axes": (lambda t: t.update({Q0.format("B"): torch.zeros(32, 4, 1)}), ("[32, 4, 1]",)),
    "a stranger": (
        lambda t: t.update(scale=torch.ones(1)),
        ("scale", "a file with unknown tensors is not read"),
    ),
    "a DoRA magnitude": (
        lambda t: t.update(
            {Q0.format("A").replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}
        ),
        ("lora_magnitude_vector", "a file with unknown tensors is not read"),
    ),
    "an unknown layer": (
        lambda t: t.update({Q0.format("A").replace("layers.0", "layers.9"): torch.zeros(4, 32)}),
        ("layers.9", "does not have", "did you mean"),
    ),
    "an unnamed module": (
        lambda t: t.update(
            {K0.format("A"): torch.zeros(4, 32), K0.format("B"): torch.zeros(16, 4)}
        ),
        ("does not name model.layers.0.self_attn.k_proj",),
    ),
    "an embedding part on a linear": (
        lambda t: t.update(
            {Q0.format("A").replace("lora_A.weight", "lora_embedding_A"): t.pop(Q0.format("A"))}
        ),
        ("lora_embedding_A", "is a linear"),
    ),
    "NaN": (lambda t: t[Q0.format("A")].fill_(float("nan")), (Q0.format("A"), "finite")),
    "infinity": (lambda t: t[Q0.format("B")][3].fill_(float("inf")), (Q0.format("B"), "finite")),
    "whole numbers": (
        lambda t: t.update({Q0.format("A"): torch.ones(4, 32, dtype=torch.int64)}),
        ("int64",),
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensor_faults(fault: str, saved: Path, tiny: Any) -> None:
    change, message = TENSOR_FAULTS[fault]
    edit(saved, change)
    refused(tiny, saved, WEIGHTS, *message)


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": "yes"}, "use_dora is 'yes'; it must be true or false"),
    "bias": ({"bias": "some"}, "none, all or lora_only"),
    "layers_pattern": ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern"),
    "lora_bias": ({"lora_bias": 1}, "lora_bias is 1; it must be true or false"),
    "lora_bias and dora": ({"lora_bias": True, "use_dora": True}, "does not go with use_dora"),
    "modules_to_save, a text": ({"modules_to_save": "lm_head"}, "modules_to_save"),
    "modules_to_save, absent": ({"modules_to_save": ["lm_heed"]}, "'lm_heed', which matches no"),
    "modules_to_save, a pattern": ({"modules_to_save": ["("]}, "modules_to_save"),
    "alora": ({"alora_invocation_tokens": [1, -2]}, "alora_invocation_tokens"),
    "a token twice": ({"trainable_token_indices": [5, 5]}, "names token 5 twice"),
    "a token that is none": ({"trainable_token_indices": [-1]}, "has -1"),
    "a token outside": ({"trainable_token_indices": [64]}, "64 rows, 0 to 63"),
    "tokens of a linear layer": (
        {"trainable_token_indices": {"q_proj": [1]}},
        "takes an embedding or a head",
    ),
    "tokens, a text": ({"trainable_token_indices": "5"}, "list of token ids"),
    "replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "expert tensors": ({"target_parameters": ["experts.w1"]}, "target_parameters"),
    "from the future": ({"use_quantum": True}, "use_quantum"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
    "olora": ({"init_lora_weights": "olora"}, "changed the base"),
    "loftq": ({"init_lora_weights": "loftq"}, "changed the base"),
    "init, a list": ({"init_lora_weights": ["eva"]}, "init_lora_weights=['eva']"),
    "strange init": ({"init_lora_weights": "zzz"}, "init_lora_weights='zzz'"),
    "another method": ({"peft_type": "IA3"}, "IA3"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
    "rank 0": ({"r": 0}, "at least 1"),
    "rank true": ({"r": True}, "r is True"),
    "half a rank": ({"r": 4.5}, "r is 4.5"),
    "alpha in words": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "alpha without end": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "dropout 1": ({"lora_dropout": 1.0}, "lora_dropout"),
    "rslora in words": ({"use_rslora": "no"}, "use_rslora is 'no'"),
    "no targets": ({"target_modules": None}, "target_modules is empty"),
    "target numbers": ({"target_modules": [1]}, "target_modules is [1]"),
    "bad regex": ({"target_modules": "(q_proj"}, "not a valid regular expression"),
    "bad pattern": ({"rank_pattern": {"*": 3}}, "not a valid regular expression"),
    "pattern of words": ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern['q_proj'] is '8'"),
    "pattern list": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is ['q_proj']"),
    "more targets than tensors": (
        {"target_modules": ["q_proj", "down_proj", "o_proj"]},
        "self_attn.o_proj",
    ),
    "fewer targets than tensors": ({"target_modules": ["q_proj"]}, "mlp.down_proj"),
    "fewer layers than tensors": ({"layers_to_transform": [0, 1]}, "layers.2"),
    "another model's targets": ({"target_modules": ["c_attn"]}, "does not name"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_config_faults(fault: str, saved: Path, tiny: Any) -> None:
    changes, message = CONFIG_FAULTS[fault]
    configure(saved, **changes)
    refused(tiny, saved, CONFIG, message)


def test_neutral_and_informative_keys_are_no_fault(saved: Path, tiny: Any) -> None:
    settings = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights="orthogonal").to_dict()
    neutral = {
        k: v
        for k, v in settings.items()
        if k not in ("r", "lora_alpha", "target_modules", "peft_type", "task_type")
    }
    configure(
        saved,
        **{
            **neutral,
            "from_the_future": False,
            "another": [],
            "layers_pattern": "layers",
            "eva_config": {"rho": 2},
        },
    )
    assert load_adapter(tiny("llama"), saved).spec.r == 4


def test_a_pattern_that_changes_a_rank_is_a_shape_error(saved: Path, tiny: Any) -> None:
    configure(saved, rank_pattern={r"layers\.1\..*": 8})
    refused(tiny, saved, "layers.1", "rank 8", "[4, 48]", "[8, 48]")


def test_catastrophic_patterns_are_stopped(
    saved: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorry.adapters.peft.config.TIME_LIMIT", 0.5)
    for changes in (
        {"rank_pattern": {"(.|.)*!": 3}},
        {"target_modules": "(.*)*!"},
        {"exclude_modules": "(a|.|.|.)+!"},
    ):
        before = json.loads((saved / CONFIG).read_text())
        configure(saved, **changes)
        # that it returns at all is the bound: pytest's own limit ends a hang
        refused(tiny, saved, CONFIG, "take too long")
        (saved / CONFIG).write_text(json.dumps(before))


def test_a_busy_machine_is_no_reason_to_refuse_a_pattern(
    saved: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The limit is of processor time: a process that waits for a core has not taken too long."""
    waiting = tmp_path / "python"
    waiting.write_text(f'#!/bin/sh\nsleep 1\nexec {sys.executable} "$@"\n')
    waiting.chmod(0o755)
    monkeypatch.setattr("lorry.adapters.peft.config.sys", SimpleNamespace(executable=str(waiting)))
    monkeypatch.setattr("lorry.adapters.peft.config.TIME_LIMIT", 0.5)
    configure(saved, target_modules=r".*(q_proj|down_proj)")
    assert load_adapter(tiny("llama"), saved).spec.r == 4


def test_layouts(saved: Path, tiny: Any, tmp_path: Path) -> None:
    assert find_adapter(saved) == (saved, "default")
    assert find_adapter(tmp_path) == (saved, "adapter"), "the only sub-folder"
    assert find_adapter(tmp_path, "adapter") == (saved, "adapter")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CONFIG).write_text("{}")
    with pytest.raises(ModelError, match="adapters named adapter, other"):
        find_adapter(tmp_path)
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load_adapter(tiny("llama"), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="adapter name"):
        load_adapter(tiny("llama"), tmp_path, "../adapter")
    for name in ("", ".", "..", "a/b", "ä", "x" * 65):
        with pytest.raises(ConfigError, match="adapter name"):
            find_adapter(tmp_path, name)


def test_pickles_are_never_opened(saved: Path, tiny: Any) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    refused(tiny, saved, "adapter_model.bin", "pickle", "convert")
    (saved / "adapter_model.bin").unlink()
    refused(tiny, saved, WEIGHTS, "missing")


def test_a_name_twice(saved: Path, tiny: Any) -> None:
    model = tiny("llama")
    load_adapter(model, saved, "a")
    load_adapter(model, saved, "b")
    with pytest.raises(ConfigError, match="'a' is already attached"):
        load_adapter(model, saved, "a")
    assert get_bank(model).names() == ["a", "b"]
    assert get_bank(model).active == Mix((*Mix.one("a").terms, *Mix.one("b").terms))


def test_the_same_part_under_two_names(tiny: Any, shake: Any, tmp_path: Path) -> None:
    model = tiny("gpt_neox")
    attach(model, LoraSpec(r=2, target_modules=("lm_head",)))
    save_adapter(model, tmp_path)
    edit(
        tmp_path,
        lambda t: t.update({k.replace("lm_head", "embed_out"): v.clone() for k, v in t.items()}),
    )
    refused(tiny, tmp_path, "embed_out", "lm_head", "are the same matrix of", family="gpt_neox")


def test_a_model_of_an_older_transformers_is_the_same_base(
    tiny: Any, shake: Any, tmp_path: Path
) -> None:
    """Whose head is `embed_out`, as in releases before 5.17."""
    model, older = tiny("gpt_neox"), tiny("gpt_neox")
    head = "lm_head" if hasattr(model, "lm_head") else "embed_out"
    other = {"lm_head": "embed_out", "embed_out": "lm_head"}[head]
    setattr(older, other, getattr(older, head))
    delattr(older, head)
    older.get_output_embeddings = lambda: getattr(older, other)
    assert base_digest(older) == base_digest(model)
    adapter = attach(model, LoraSpec(r=2, target_modules=(head,), init_lora_weights=False))
    save_adapter(model, tmp_path)
    loaded = load_adapter(older, tmp_path)
    assert list(loaded.slots) == [other]
    assert torch.equal(loaded.values, adapter.values)


def embedding_file(tiny: Any, shake: Any, folder: Path, family: str = "llama-tied") -> None:
    """A PEFT adapter on head and embedding, whose file carries both base weights as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["lm_head", "embed_tokens"]
        )
        theirs = peft.get_peft_model(tiny(family), config)
        shake(p for n, p in theirs.named_parameters() if "lora_" in n)
        theirs.save_pretrained(folder, save_embedding_layers=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_weights_in_the_file_are_compared_and_dropped(
    dtype: torch.dtype, tiny: Any, shake: Any, tmp_path: Path
) -> None:
    embedding_file(tiny, shake, tmp_path)
    base = [k for k in load_file(tmp_path / WEIGHTS) if "base_layer" in k]
    assert len(base) == 2, "PEFT saves both"
    adapter = load_adapter(tiny("llama-tied").to(dtype), tmp_path)
    assert len(adapter.tensors()) == 4

    edit(tmp_path, lambda t: t.update({k: t[k].bfloat16() for k in base}))
    # a bf16 file on an fp32 base, and bf16 on bf16
    load_adapter(tiny("llama-tied").to(dtype), tmp_path)

    edit(tmp_path, lambda t: t.update({k.replace(".base_layer", ""): t.pop(k) for k in base}))
    # as PEFT writes them where they are not targeted
    load_adapter(tiny("llama-tied").to(dtype), tmp_path)


def test_another_bases_embedding_is_refused(tiny: Any, shake: Any, tmp_path: Path) -> None:
    embedding_file(tiny, shake, tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit(tmp_path, lambda t: t[key][5].add_(0.5))
    refused(tiny, tmp_path, key, "another base", family="llama-tied")
    edit(tmp_path, lambda t: t.update({key: torch.zeros(70, 32)}))
    refused(tiny, tmp_path, key, "[70, 32]", "[64, 32]", "resized vocabulary", family="llama-tied")


def test_an_adapter_of_another_base(saved: Path, tiny: Any) -> None:
    with pytest.raises(ModelError, match="other base weights"):
        load_adapter(tiny("llama", seed=1), saved)
    load_adapter(tiny("llama", seed=1), saved, other_base=True)
    load_adapter(tiny("llama").bfloat16(), saved)
    (saved / FACTS).unlink()
    load_adapter(tiny("llama", seed=1), saved)  # PEFT's files say nothing about their base


def test_the_digest_sees_the_base_and_only_the_base(tiny: Any, shake: Any) -> None:
    from lorry.adapters.merge import merge

    model = tiny("llama-tied")
    digest = base_digest(model)
    attach(model, LoraSpec(r=2, target_modules=("q_proj", "lm_head")))
    shake(lora_parameters(model))
    assert base_digest(model) == digest
    merge(model)
    assert base_digest(model) == digest
    assert base_digest(tiny("llama-tied").bfloat16()) == digest
    other = tiny("llama-tied")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert base_digest(other) != digest


def test_saving_refuses_what_could_not_be_loaded(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    adapter = attach(model, LoraSpec(r=2, target_modules=("q_proj",)))
    with pytest.raises(ConfigError, match="no adapter named 'x'"):
        save_adapter(model, tmp_path, "x")
    adapter.values[3] = float("nan")
    with pytest.raises(ModelError, match="nothing was written"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_the_old_adapter(
    saved: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorry.disk import durable

    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = tiny("llama")
    attach(model, LoraSpec(r=2, target_modules=("q_proj",)))
    writes = iter([True, False])

    def write(fd: int, data: memoryview) -> int:
        if next(writes):
            return len(data)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.disk, "write", write)
    with pytest.raises(DiskError, match="No space left"):
        save_adapter(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_files_are_the_same_bytes_every_time(tiny: Any) -> None:
    made = []
    for _ in range(2):
        model = tiny("llama")
        attach(model, LoraSpec(r=4, target_modules=("q_proj", "v_proj")), seed=5)
        made.append(adapter_files(model, extra={"data": "people"}))
    assert made[0] == made[1]
    assert json.loads(made[0][FACTS])["data"] == "people"
    assert set(json.loads(made[0][CONFIG])) <= set(
        peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    )
