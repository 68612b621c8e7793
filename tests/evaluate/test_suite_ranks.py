"""What a suite asks of a model that ranks share is what it asks of one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.adapters.attach import attach
from lorry.adapters.mix import Mix
from lorry.adapters.spec import LoraSpec
from lorry.data.encoding.encode import ExampleEncoder
from lorry.evaluate.unlearning.rows import ANSWER, SuiteRow, SuiteSet
from lorry.evaluate.unlearning.scores import SuiteModel
from lorry.models.loading.load import load_model
from lorry.notes import ignore_note
from tests.support import tinyrun
from tests.support.threads import ThreadRanks, on_ranks

# sides that each rank has whole, and sides that are cut, of linears and of the vocabulary
SPECS = {
    "inner": LoraSpec(r=3, target_modules="all-linear", init_lora_weights=False),
    "ends": LoraSpec(r=2, target_modules=("embed_tokens", "lm_head"), init_lora_weights=False),
}


def test_gradients_and_digest_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mia_gradnorm was made of each rank's part of a gradient, and the digest of its part of the
    adapter, so that no process but these knew what was measured again."""
    monkeypatch.setenv("LORRY_PROOFS", "0")
    folder = tinyrun.model_directory(
        tmp_path / "base", tie_word_embeddings=False, num_key_value_heads=2
    )
    row = SuiteRow("row 0", "What has Ann in room 1?", {ANSWER: ("Ann has a red lamp",)})
    sets = {"forget": SuiteSet("forget", (row,), "")}

    def work(ranks: ThreadRanks | None) -> tuple[list[float], str]:
        loaded: Any = load_model(
            folder, dtype="float32", device="cpu", ranks=ranks, add_note=ignore_note
        )
        for name, spec in SPECS.items():
            attach(loaded.model, spec, name)
        encoder = ExampleEncoder(loaded.tokenizer, max_length=128)
        mix = Mix.constants(dict.fromkeys(SPECS, 1.0))
        asked = SuiteModel(loaded.model, encoder, sets, mix)
        return asked.gradient_norms("forget", ANSWER)[0], asked.digest()

    norms, digest = work(None)
    assert min(norms) > 0
    for found, same in on_ranks(2, work):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(norms), rtol=1e-4, atol=0)
        assert same == digest
