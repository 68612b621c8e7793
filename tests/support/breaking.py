"""Runs made to break one contract: fixtures that start them and check how they end, and ways to
meddle with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorry.data.batch import TokenizedExample
from lorry.data.encoding.token_set import TokenSet
from lorry.errors import ContractError, LorryError
from lorry.train.checks import CONTRACT_NAMES
from lorry.train.session import TrainResult, train_run
from tests.support import tinyrun
from tests.support.tinyrun import engine_for, quick  # noqa: F401 - a fixture

Start = Callable[..., TrainResult]
Broken = Callable[..., None]
MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model directory of a family, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tinyrun.model_directory(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture
def start(models: Callable[[str], Path], tmp_path: Path) -> Start:
    """Five steps in ``tmp_path/run``."""
    data = tinyrun.write_rows(tmp_path / "data.jsonl", tinyrun.rows(12))

    def go(base: Path | str = "llama", listeners: Any = (), **settings: Any) -> TrainResult:
        model = models(base) if isinstance(base, str) else base
        given = {
            "max_steps": 5,
            "save_steps": 2,
            "target_modules": ["q_proj", "down_proj"],
            **settings,
        }
        return train_run(tinyrun.described(model, data, tmp_path / "run", **given), [], listeners)

    return go


@pytest.fixture
def broken(start: Start, tmp_path: Path) -> Broken:
    """The run must end with this contract broken, in words and in contracts.json."""

    def check(
        number: int,
        message: str,
        *,
        error: type[LorryError] = ContractError,
        code: int = 5,
        **settings: Any,
    ) -> None:
        with pytest.raises(error, match=message) as raised:
            start(**settings)
        assert type(raised.value) is error
        assert raised.value.exit_code == code
        if error is ContractError:
            assert str(raised.value).startswith(
                f"contract {number} broken ({CONTRACT_NAMES[number]}): "
            )
        written = json.loads((tmp_path / "run" / "contracts.json").read_text())
        assert [c["id"] for c in written if c["status"] == "failed"] == [number]
        assert written[number - 1]["detail"] in str(raised.value)
        assert not (tmp_path / "run" / "receipt.json").exists()

    return check


def after(patch: pytest.MonkeyPatch, owner: Any, name: str, then: Callable[..., object]) -> None:
    """Call ``then(result, *args)`` behind a function."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        then(result, *args)
        return result

    patch.setattr(owner, name, wrapped)


def silent_attention(model: Path, tmp_path: Path) -> Path:
    """The same model with an output projection of zeros: what attention computes is never used."""
    folder = tmp_path / "silent"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def changed_example(
    patch: pytest.MonkeyPatch, change: Callable[[TokenizedExample], TokenizedExample]
) -> None:
    """Every second row reaches the batches changed."""
    original = TokenSet.example

    def example(self: TokenSet, row: int, *args: Any) -> TokenizedExample:
        made = original(self, row, *args)
        return change(made) if row % 2 else made

    patch.setattr(TokenSet, "example", example)
