"""Our adapter files in PEFT and PEFT's in ours, with PEFT's own forward pass as the judge, for
every family.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorry.adapters.attach import attach, get_bank, lora_parameters
from lorry.adapters.merge import merge, merged_tensors, separates_tied_head, unmerge
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec

LINEARS = {
    "gpt2": ("c_attn", "c_fc"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
}
EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in"}

# What a file can say, in PEFT's words; {0} and {1} are two linear targets of the family, {e} its
# embedding.
CASES: dict[str, dict[str, Any]] = {
    "two linears": {"r": 4, "lora_alpha": 12, "target_modules": ["{0}", "{1}"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["{0}", "{1}"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["{0}", "{1}"],
        "rank_pattern": {"{0}": 2, r"^.*\.1\..*{1}": 6},
        "alpha_pattern": {r".*\.2\..*": 20, "{1}": 3},
        "use_rslora": True,
    },
    "some layers": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["{0}", "{1}"],
        "layers_to_transform": [0, 2],
    },
    "excluding": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["{0}", "{1}"],
        "exclude_modules": r".*\.1\..*",
    },
    "regex": {"r": 3, "lora_alpha": 6, "target_modules": r".*\.(0|1)\..*{0}"},
    "all-linear": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "head and embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["{0}", "lm_head", "{e}"]},
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]},
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["{e}"]},
}


def words(value: Any, family: str) -> Any:
    """Fill a case's placeholders for one family."""
    if isinstance(value, dict):
        return {words(k, family): words(v, family) for k, v in value.items()}
    if isinstance(value, list):
        return [words(v, family) for v in value]
    if not isinstance(value, str):
        return value
    first, second = LINEARS.get(family, ("q_proj", "down_proj"))
    return (
        value.replace("{0}", first)
        .replace("{1}", second)
        .replace("{e}", EMBEDDING.get(family, "embed_tokens"))
    )


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, family: str) -> dict[str, Any]:
    return words(CASES[request.param], family)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """PEFT warns about Conv1D's layout, tied heads and saved embeddings, all of which are meant
    here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peft_model(model: nn.Module, case: dict[str, Any], shake: Any) -> peft.PeftModel:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **case)).eval()
    shake(p for n, p in wrapped.named_parameters() if "lora_" in n)
    return wrapped


def test_ours_in_peft(
    family: str,
    case: dict[str, Any],
    tiny: Any,
    ids: Tensor,
    logits: Any,
    shake: Any,
    tmp_path: Path,
) -> None:
    model = tiny(family)
    attach(model, LoraSpec(**case))
    shake(lora_parameters(model))
    ours = logits(model, ids)
    save_adapter(model, tmp_path, base_name="somewhere/base")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path)
    assert (ours - logits(tiny(family), ids)).abs().max() > 1e-2, "the adapter must matter"
    torch.testing.assert_close(logits(theirs, ids), ours, rtol=0, atol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "somewhere/base"
    again = tiny(family)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, ids), ours), "save -> load -> same logits, exactly"


def test_peft_in_ours(
    family: str,
    case: dict[str, Any],
    tiny: Any,
    ids: Tensor,
    logits: Any,
    shake: Any,
    tmp_path: Path,
) -> None:
    theirs = peft_model(tiny(family), case, shake)
    theirs.save_pretrained(tmp_path)
    model = tiny(family)
    adapter = load_adapter(model, tmp_path)
    expected = logits(theirs, ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    trainable = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert adapter.values.numel() == trainable
    merge(model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)


def test_same_targets_same_parameter_count(
    family: str, case: dict[str, Any], tiny: Any, shake: Any
) -> None:
    theirs = peft_model(tiny(family), case, shake)
    names = {
        n.replace(".default", "").removeprefix("base_model.model.")
        for n, _ in theirs.named_parameters()
        if "lora_" in n
    }
    ours = attach(tiny(family), LoraSpec(**case))
    assert ours.values.numel() == sum(
        p.numel() for n, p in theirs.named_parameters() if "lora_" in n
    )
    assert {n.replace("lora_embedding_", "lora_").removesuffix(".weight") for n in names} == set(
        ours.tensors()
    )


@pytest.mark.parametrize(
    "targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "v_proj"]]
)
def test_merging_a_tied_head_equals_pefts_unmerged_model(
    targets: list[str], tiny: Any, ids: Tensor, logits: Any, shake: Any, tmp_path: Path
) -> None:
    theirs = peft_model(
        tiny("llama-tied"), {"r": 4, "lora_alpha": 8, "target_modules": targets}, shake
    )
    theirs.save_pretrained(tmp_path)
    unmerged = logits(theirs, ids)
    model = tiny("llama-tied")
    load_adapter(model, tmp_path)
    assert separates_tied_head(model)
    streamed = dict(merged_tensors(model))
    report = merge(model)
    assert report.untied
    torch.testing.assert_close(logits(model, ids), unmerged, rtol=0, atol=1e-5)
    opened = tiny("llama", tie_word_embeddings=False)
    opened.load_state_dict(streamed)  # strict: a separate lm_head.weight is there
    torch.testing.assert_close(logits(opened, ids), unmerged, rtol=0, atol=1e-5)
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied again, by identity"
    torch.testing.assert_close(logits(model, ids), unmerged, rtol=0, atol=1e-5)


def test_targets_are_written_short_where_that_selects_exactly(tiny: Any, tmp_path: Path) -> None:
    model = tiny("gpt2")
    cases = [
        (("c_attn",), ["c_attn"]),
        (("mlp.c_proj",), [f"transformer.h.{i}.mlp.c_proj" for i in range(3)]),
    ]
    for i, (targets, written) in enumerate(cases):
        attach(model, LoraSpec(r=2, target_modules=targets), f"a{i}")
        save_adapter(model, tmp_path / str(i), f"a{i}")
        config = json.loads((tmp_path / str(i) / "adapter_config.json").read_text())
        assert config["target_modules"] == written
        assert config["fan_in_fan_out"] is True


def test_a_run_of_several_adapters_in_sub_folders(
    tiny: Any, ids: Tensor, logits: Any, shake: Any, tmp_path: Path
) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    theirs = peft.get_peft_model(tiny("llama"), config, adapter_name="poet").eval()
    theirs.add_adapter(
        "clerk", peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["v_proj"])
    )
    shake(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(tmp_path)
    for name in ("poet", "clerk"):
        theirs.set_adapter(name)
        model = tiny("llama")
        assert load_adapter(model, tmp_path, name).name == name
        torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=0, atol=1e-5)


def test_an_old_neox_file_that_calls_the_head_embed_out(
    tiny: Any, ids: Tensor, logits: Any, shake: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny("gpt_neox")
    attach(model, LoraSpec(r=2, target_modules=("lm_head",)))
    shake(lora_parameters(model))
    save_adapter(model, tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(
        {k.replace("lm_head", "embed_out"): v for k, v in load_file(weights).items()}, weights
    )
    config.write_text(config.read_text().replace("lm_head", "embed_out"))
    again = tiny("gpt_neox")
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_peft_reads_every_pattern_as_we_do(tiny: Any) -> None:
    """`rank_pattern` keys against PEFT's own matcher, on real module names and on names made to
    confuse.
    """
    from peft.utils.other import get_pattern_key

    paths = [n for n, _ in tiny("llama").named_modules() if n] + [
        "up_proj",
        "xq_proj",
        "model.q_proj.inner",
        "a.b.q_proj",
    ]
    keys = [
        "q_proj",
        "^q_proj",
        "^model.*q_proj",
        r"layers\.1\..*",
        "model.layers.0.self_attn.q_proj",
        ".*",
        "proj",
        "b.q_proj",
    ]
    for n in range(1, len(keys) + 1):
        patterns = {key: 100 + i for i, key in enumerate(keys[-n:])}
        spec = LoraSpec(r=7, rank_pattern=patterns)
        for path in paths:
            assert spec.rank(path) == patterns.get(get_pattern_key(patterns.keys(), path), 7), (
                path,
                patterns,
            )


def test_frozen_when_asked(tiny: Any, shake: Any, tmp_path: Path) -> None:
    peft_model(tiny("llama"), {"r": 2, "target_modules": ["q_proj"]}, shake).save_pretrained(
        tmp_path
    )
    model = tiny("llama")
    adapter = load_adapter(model, tmp_path, "start", trainable=False)
    assert not any(s.A.requires_grad or s.B.requires_grad for s in adapter.slots.values())
    assert lora_parameters(model) == [], "an optimizer would apply weight decay to what it is given"
    fresh = attach(model, LoraSpec(r=2, target_modules=("q_proj",)), "new")
    assert {id(p) for p in lora_parameters(model)} == {
        id(p) for s in fresh.slots.values() for p in (s.A, s.B)
    }
    assert get_bank(model).names() == ["start", "new"]
