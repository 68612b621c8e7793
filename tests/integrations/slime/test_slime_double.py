"""The double of slime without any LoRA does what slime does: Hugging Face weights in and out, scores that
are transformers', steps, sync, checkpoints; and fails on adapters where slime does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

from tests.support.slime_engine import StandInEngine
from tests.support.slime_runs import (
    IS_REAL,
    add_paths,
    flags,
    parse,
    process_ends,
    start_actor,
    training_process,
)

if IS_REAL:
    pytest.skip("LORRY_SLIME is set: the double is not used", allow_module_level=True)
add_paths()

FAMILIES = ("llama", "qwen2", "qwen3")
TOKENS = torch.randint(0, 27, (3, 8), generator=torch.Generator().manual_seed(1))


def read(folder: Path) -> dict[str, Tensor]:
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def expected_log_probs(folder: Path) -> Tensor:
    """[rows, length - 1] in float32, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(TOKENS).logits
    return logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None]).squeeze(2)


@pytest.fixture
def process() -> Iterator[None]:
    with training_process():
        yield


def start(model: Path, *words: Any, **options: Any) -> Any:
    return start_actor(parse(*flags(model), *words), **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("process")
def test_weights_come_in_and_go_out_as_they_were(models: Path, family: str, tmp_path: Path) -> None:
    out = str(tmp_path / "hf-{rollout_id}")
    actor = start(models / family, "--save", tmp_path / "saved", "--save-hf", out)
    got = actor.compute_log_prob(TOKENS)["log_probs"]
    torch.testing.assert_close(got, expected_log_probs(models / family), atol=1e-5, rtol=0)
    actor.save_model(3)
    assert equal(read(tmp_path / "hf-3"), read(models / family))


@pytest.mark.parametrize("transport", ["colocate", "nccl", "disk"])
@pytest.mark.usefixtures("process")
def test_every_updater_sends_the_weights_that_were_trained(
    models: Path, transport: str, tmp_path: Path
) -> None:
    ways = {
        "colocate": ["--colocate"],
        "nccl": [],
        "disk": ["--update-weight-transport", "disk", "--update-weight-disk-dir", tmp_path],
    }
    words = [w for w in flags(models / "llama") if w != "--debug-train-only"]
    # buckets of a few tensors
    words += ["--update-weight-buffer-size", 10_000]
    args = parse(*words, *ways[transport], "--save-hf", tmp_path / "hf", "--save", tmp_path / "m")
    actor = start_actor(args)
    engine = StandInEngine()
    actor.connect([engine])
    actor.update_weights()
    assert equal(engine.weights, read(models / "llama"))
    actor.train(0, {"tokens": TOKENS, "advantages": torch.ones(3, 7)})
    actor.update_weights()
    actor.save_model(0)
    assert engine.weight_version == "2"
    assert equal(engine.weights, read(tmp_path / "hf"))
    assert not equal(engine.weights, read(models / "llama"))
    pauses = [c for c in engine.calls if "generation" in c]
    assert pauses == ["pause_generation", "continue_generation"] * 2


@pytest.mark.usefixtures("process")
def test_the_reference_is_a_checkpoint_of_its_own(models: Path, tmp_path: Path) -> None:
    actor = start(models / "llama", "--use-kl-loss", "--save", tmp_path, with_ref=True)
    data = {"tokens": TOKENS, "advantages": torch.ones(3, 7)}
    actor.train(0, data)
    assert torch.equal(data["ref_log_probs"], data["log_probs"])
    actor.train(1, data)
    torch.testing.assert_close(
        data["ref_log_probs"], expected_log_probs(models / "llama"), atol=1e-5, rtol=0
    )
    # the step raised what was advantageous
    assert data["log_probs"].mean() > data["ref_log_probs"].mean()
    actor.save_model(1)
    trained = actor.compute_log_prob(TOKENS)["log_probs"]
    process_ends()
    again = start(models / "llama", "--load", tmp_path)
    assert torch.equal(again.compute_log_prob(TOKENS)["log_probs"], trained)


@pytest.mark.usefixtures("process")
def test_names_of_adapters_are_unknown_to_both_converters() -> None:
    from slime.backends.megatron_utils.hf_to_megatron.qwen import qwen_hf_tensor
    from slime.backends.megatron_utils.megatron_to_hf.qwen2 import convert_qwen2_to_hf

    name = "module.module.decoder.layers.0.self_attention.linear_qkv.lora_A_q"
    with pytest.raises(KeyError, match="Unsupported Qwen/Llama Megatron parameter"):
        qwen_hf_tensor(name, {}, None)
    with pytest.raises(ValueError, match="Unknown parameter name"):
        convert_qwen2_to_hf(parse("--vocab-size", 27), name, torch.zeros(1))


def test_a_flag_it_does_not_know_parses_to_nothing(models: Path) -> None:
    args = parse(*flags(models / "llama"), "--use-lora", "--lora-r", "8")
    assert [name for name in vars(args) if "lora" in name] == []
