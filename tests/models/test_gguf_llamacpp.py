"""llama.cpp itself reads what we write: log-probabilities, tokens of text, adapters.

Independent truth: another library's tokeniser, attention, rotary positions and scales (the
xllamacpp wheel; skipped where it is not installed).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorry.config.schema.model import ModelConfig
from lorry.models.loading.open import OpenedModel, open_model
from lorry.notes import ignore_note
from lorry.verbs.exports.gguf import export_gguf, export_gguf_lora
from tests.support.llama2 import llama2_tokenizer
from tests.support.llamacpp import LlamaCpp, perplexity_ratio
from tests.support.mixtures import mixture_run
from tests.support.tiny import LLAMA3, one_thread  # noqa: F401 - an autouse fixture
from tests.support.verbworld import lorry, model_directory

TEXTS = (
    "Where does Ilse live? <|im_start|>user\nHi, it's 1234 o'clock.<|im_end|>\n",
    "Tobias  lives in Kyoto!\n\n\tnaïve 漢字 🚀",
)
LIMIT = 5e-4
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, biases": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama, wide heads": {"head_dim": 16},
    "llama 3": {"rope_parameters": LLAMA3},
    "llama, linear scaling": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


def opened(folder: Path, adapter: Path | None = None) -> OpenedModel:
    config = {"name": str(folder), "adapter": adapter and str(adapter), "dtype": "float32"}
    return open_model(ModelConfig.model_validate(config), add_note=ignore_note)


def theirs(model: Any, ids: list[int]) -> dict[int, float]:
    with torch.no_grad():
        return dict(enumerate(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).tolist()))


def difference(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest, of tokens that llama.cpp names."""
    assert len(other) > 100
    return max(abs(one[token] - value) for token, value in other.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    base = model_directory(tmp_path / "base", seed=3, **FAMILIES[family])
    file = export_gguf(opened(base), {}, tmp_path / "out", "f32")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(base)
    llama = LlamaCpp(file)
    for text in TEXTS:
        ids = words(text).input_ids
        expected = theirs(model, ids)
        assert llama.count_tokens(text) == len(ids)
        # its own tokens of the text, then ours: a tokenizer of its own may be right by luck in
        # their number
        assert difference(expected, llama.log_probabilities(text)) < LIMIT
        assert difference(expected, llama.log_probabilities(ids)) < LIMIT


# --- stories260K: a real model, SentencePiece's tokens

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
)


@pytest.fixture(scope="module")
def told(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K with its tokenizer."""
    home = tmp_path_factory.mktemp("told")
    AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).save_pretrained(home)
    pieces = json.loads((stories.parent / "tok512.json").read_text())
    llama2_tokenizer(pieces).save_pretrained(home)
    return home


def test_stories_and_the_tokens_of_sentencepiece(told: Path, tmp_path: Path) -> None:
    file = export_gguf(opened(told), {}, tmp_path / "out", "f32")
    model = AutoModelForCausalLM.from_pretrained(told, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(told)
    llama = LlamaCpp(file, context=256)
    for text in (STORY, "Zoë's 12 dogs\n\nran  far away", "a", " unbelievable happiness"):
        ids = words(text).input_ids
        assert ids[0] == 1
        assert llama.count_tokens(text) == len(ids)
        expected = theirs(model, ids)
        assert difference(expected, llama.log_probabilities(text)) < LIMIT
        assert difference(expected, llama.log_probabilities(ids)) < LIMIT
    prompt = words("Once upon a time", return_tensors="pt").input_ids
    said = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert llama.greedy("Once upon a time", 40).strip() == words.decode(said).strip()


# stories260K has rows of 64 and 172 values, and llama.cpp rounds what goes into a product to 8
# bits, too: as large a model as SmolLM2 loses a tenth of this
@pytest.mark.parametrize(("outtype", "share"), [("f16", 1e-3), ("q8_0", 0.03), ("q4_0", 0.25)])
def test_perplexity_of_fewer_bits(outtype: str, share: float, told: Path, tmp_path: Path) -> None:
    """20 rows: llama.cpp on our file against transformers on the weights as they are."""
    llama = LlamaCpp(export_gguf(opened(told), {}, tmp_path / "out", outtype))
    assert abs(perplexity_ratio(llama, told) - 1) < share


@pytest.fixture(scope="module")
def told_moe(told: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of stories260K and three small changes of it."""
    folder = tmp_path_factory.mktemp("told_moe")
    run = mixture_run(folder / "mix", told, described=False, size=0.05)
    assert lorry("export", run, "to=hf-moe", f"output_dir={folder / 'moe'}") == 0
    return folder / "moe"


@pytest.mark.parametrize(("outtype", "share"), [("f32", 1e-4), ("q8_0", 0.03), ("q4_0", 0.25)])
def test_perplexity_of_a_mixture(
    outtype: str, share: float, told_moe: Path, tmp_path: Path
) -> None:
    """The same of an hf-moe, whose routers stay f32."""
    assert (
        lorry("export", told_moe, "to=gguf", f"outtype={outtype}", f"output_dir={tmp_path}/o") == 0
    )
    llama = LlamaCpp(tmp_path / "o" / f"moe-{outtype}.gguf")
    assert abs(perplexity_ratio(llama, told_moe) - 1) < share


# --- adapters


@pytest.mark.parametrize("family", ["llama, tied, biases", "qwen3"])
@pytest.mark.parametrize(
    "spec",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"down_proj": 20, "k_proj": 2}},
    ],
    ids=["plain", "rslora, ranks", "alphas"],
)
def test_an_adapter(family: str, spec: dict[str, Any], tmp_path: Path) -> None:
    """The base's file with the adapter's, as PEFT has the two."""
    base = model_directory(tmp_path / "base", seed=5, **FAMILIES[family])
    theirs_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = get_peft_model(theirs_base, LoraConfig(target_modules="all-linear", **spec))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    ).eval()
    ids = AutoTokenizer.from_pretrained(base)(TEXTS[0]).input_ids
    expected = theirs(model, ids)
    file = export_gguf(opened(base), {}, tmp_path / "model", "f32")
    with_adapter = opened(base, tmp_path / "adapter")
    lora = export_gguf_lora(with_adapter, with_adapter.adapters[0], tmp_path / "lora", "f32")
    llama = LlamaCpp(file, lora=[lora])
    assert difference(expected, llama.log_probabilities(ids)) < LIMIT
    # and merged into the weights
    merged = export_gguf(with_adapter, {with_adapter.adapters[0]: 1.0}, tmp_path / "merged", "f32")
    assert difference(expected, LlamaCpp(merged).log_probabilities(ids)) < LIMIT
