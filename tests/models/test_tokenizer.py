"""A tokenizer that is damaged is one line that names its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorry.errors import ModelError
from lorry.models.loading.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "'model' is missing"), ({"model": 3}, "'model' is not an object"), ({"model": None}, "'model' is not an object"),
        ({"model": {}}, "'added_tokens' is missing"), ({"model": {}, "added_tokens": 3}, "'added_tokens' is not a list"),
        ([], "expected a JSON object"), ({"model": {}, "added_tokens": []}, "cannot be read"),
        ({"model": {"type": "BPE", "vocab": [], "merges": 3}, "added_tokens": [3]}, "cannot be read"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "config",
    [None, {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "GPT2Tokenizer"}],
)
def test_a_damaged_tokenizer_is_one_line_naming_its_file(
    tmp_path: Path, content: Any, what: str, config: Any
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as refused:
        load_tokenizer(tmp_path, add_note=print)
    said = str(refused.value)
    assert str(tmp_path) in said
    assert what in said
    assert "\n" not in said
    assert ("tokenizer.json" in said) == (what != "cannot be read")
