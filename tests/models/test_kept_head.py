"""The head of a kept base: read packed in generation, with the logits of the whole one to the bit, for as long as
it is that."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry import cli
from lorry.adapters.mix import AdapterContext
from lorry.generation.engine import generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.kernels import kernel_status
from lorry.kernels.packed import MAX_PACKED_ROWS, reads_faster_packed
from lorry.models.decoder import decode
from lorry.models.decoder.decode import DecodeRunner
from lorry.models.loading.load import load_model
from lorry.notes import ignore_note
from tests.support import tinyrun

pytestmark = pytest.mark.skipif(
    not kernel_status().active or not reads_faster_packed(1), reason="the head is read whole here"
)
# two codes a byte are summed by even and odd places in float32
EXACT = [("q8_0", "float32"), ("q8_0", "bfloat16"), ("q4_0", "bfloat16")]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A GGUF file of a tiny run, merged; its head is the embedding."""
    folder = tmp_path_factory.mktemp("kept")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    model = tinyrun.model_directory(folder / "model", **sizes, num_key_value_heads=2)
    rows = tinyrun.write_rows(folder / "rows.jsonl", tinyrun.rows(8))
    given = {**tinyrun.DEFAULTS, "model": model, "data": rows, "max_steps": 1}
    words = [f"{k}={v}" for k, v in given.items()]
    assert cli.main(["sft", *words, f"output_dir={folder / 'run'}"]) == 0

    def write(outtype: str) -> Path:
        to = folder / f"{outtype}.gguf"
        if not to.exists():
            words = ["export", str(folder / "run"), "to=gguf", f"outtype={outtype}"]
            assert cli.main([*words, f"output_dir={to}"]) == 0
        return to if to.is_file() else next(to.glob("*.gguf"))

    return write


def opened(file: Path, dtype: str, quantize: str | None = "keep") -> Any:
    return load_model(
        str(file), dtype=dtype, device="cpu", quantize=quantize, add_note=ignore_note
    ).model


@pytest.fixture
def packed_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each product of a packed head had."""
    rows, product = list[int](), decode.packed_product
    monkeypatch.setattr(
        decode, "packed_product", lambda s, o, x, b: rows.append(len(x)) or product(s, o, x, b)
    )
    return rows


def logits(model: Any, rows: int) -> Tensor:
    hidden = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(model.dtype)
    return DecodeRunner(model).logits(hidden, AdapterContext())


@pytest.mark.parametrize(("outtype", "dtype"), EXACT)
def test_its_logits_are_the_whole_heads(
    make: Callable[[str], Path], outtype: str, dtype: str, packed_products: list[int]
) -> None:
    if dtype == "bfloat16" and kernel_status().amx:
        pytest.skip("matrix tiles multiply the whole one")
    held = opened(make(outtype), dtype)
    whole = copy.deepcopy(held)
    whole.packed_head = None
    for rows in (1, MAX_PACKED_ROWS, MAX_PACKED_ROWS + 1):
        assert torch.equal(logits(held, rows), logits(whole, rows))
    assert packed_products == [1, MAX_PACKED_ROWS]


def test_its_logits_are_the_formula(
    make: Callable[[str], Path], packed_products: list[int]
) -> None:
    """Four bits in float32, against float64."""
    held = opened(make("q4_0"), "float32")
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    got = DecodeRunner(held).logits(hidden, AdapterContext())
    assert packed_products == [3]
    weight = held.head.weight.double()
    size = hidden.double().abs() @ weight.abs().t()
    assert ((got - hidden.double() @ weight.t()).abs() <= 65 * 2.0**-24 * size).all()


def test_greedy_tokens_are_the_converted_bases(
    make: Callable[[str], Path], packed_products: list[int]
) -> None:
    file, params = make("q8_0"), SamplingParams(max_new_tokens=12)
    prompts = [[5, 9, 2], [7, 7, 21, 4]]
    said = [
        [c.tokens for c in generate_completions(opened(file, "float32", how), prompts, params)]
        for how in ("keep", None)
    ]
    assert said[0] == said[1]
    assert packed_products == [2] * 12


def test_another_head_than_the_files_is_read_whole(
    make: Callable[[str], Path], packed_products: list[int]
) -> None:
    """One that was written, replaced, cast or may train."""
    held = opened(make("q8_0"), "float32")
    before = logits(held, 1)
    assert packed_products == [1]
    with torch.no_grad():
        held.head.weight[3] += 1.0
    written = logits(held, 1)
    assert packed_products == [1]
    assert (written != before).sum() == 1
    with torch.no_grad():
        held.head.weight[3] -= 1.0
    held.head.weight = torch.nn.Parameter(held.head.weight.detach() * 2, requires_grad=False)
    torch.testing.assert_close(logits(held, 1), 2 * before)
    assert packed_products == [1]
    fresh = opened(make("q8_0"), "float32")
    fresh.head.weight.requires_grad_(True)
    logits(fresh, 1)
    assert packed_products == [1]


def test_a_file_that_is_gone_is_told(
    make: Callable[[str], Path], tmp_path: Path, packed_products: list[int], caplog: Any
) -> None:
    file = tmp_path / "moved.gguf"
    file.write_bytes(make("q8_0").read_bytes())
    held, expected = opened(file, "float32"), logits(opened(file, "float32"), 1)
    file.unlink()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(held, 1), expected)
        logits(held, 1)
    (told,) = [r for r in caplog.records if "head is read whole" in r.getMessage()]
    assert "moved.gguf" in told.getMessage()
    assert packed_products == [1]


def test_what_has_none(make: Callable[[str], Path]) -> None:
    """Where packing rounds, the head is not packed; a model that is whole has no packed one."""
    assert opened(make("q8_0"), "float32", "nf4").packed_head is None
    assert opened(make("q8_0"), "float32", None).packed_head is None
