"""Comparing the bits of runs: what differs first is named, nothing missing passes as equal, another machine is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bits
import pytest
import torch
from safetensors.torch import save_file

BEFORE = {"steps": [{"step": "1", "loss": "2.5"}, {"step": "2", "loss": "2.25"}], "weights": {"a": "0" * 64, "b": "1" * 64}}


def changed(**parts: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(BEFORE)), **parts}


@pytest.mark.parametrize(
    ("now", "first", "number"),
    [
        (changed(), "", 0),
        (changed(steps=[{"step": "1", "loss": "2.5"}, {"step": "2", "loss": "2.2500000000000004"}]),
         "steps > 1 > loss: 2.25 -> 2.2500000000000004", 1),
        (changed(steps=BEFORE["steps"][:1]), "steps (how many): 2 -> 1", 4),
        (changed(weights={"a": "0" * 64}), "weights (how many): 2 -> 1", 2),
        (changed(weights={"a": "0" * 64, "b": "2" * 64}), "weights > b: 111111111111 -> 222222222222", 1),
        (changed(more={}), "parts (how many): 2 -> 3", 2),
        (changed(weights={}), "weights (how many): 2 -> 0", 3),
    ],
)  # fmt: skip
def test_the_first_difference_is_named(now: dict[str, Any], first: str, number: int) -> None:
    found = bits.differences(BEFORE, now)
    assert len(found) == number
    assert not found or found[0] == first


def test_only_a_case_that_ran_and_is_known_is_equal() -> None:
    assert bits.verdict("a", {"a": BEFORE}, changed()) == "equal"
    assert bits.verdict("a", {"a": BEFORE}, changed(weights={})).startswith("DIFFERENT")
    assert bits.verdict("b", {"a": BEFORE}, changed()).startswith("NOT KNOWN")
    assert bits.verdict("a", {"a": {"error": "x"}}, {"error": "x"}).startswith("FAILED")


def test_every_bit_of_a_tensor_counts_and_its_name_shape_and_dtype(tmp_path: Path) -> None:
    def of(tensor: torch.Tensor, metadata: str = "") -> dict[str, str]:
        save_file({"w": tensor}, tmp_path / "t.safetensors", metadata={"at": metadata})
        return bits.tensors(tmp_path / "t.safetensors")

    plain = torch.zeros(2, 3)
    assert of(plain) == of(plain, "another run's metadata")
    others = [of(-plain), of(plain.reshape(3, 2)), of(plain.to(torch.int32)), of(plain.bfloat16()), of(torch.tensor(0.0))]
    assert len({of(plain)["w"], *(other["w"] for other in others)}) == 6


def test_times_and_places_are_no_part_of_it() -> None:
    line = {"step": 1, "loss": 0.1, "grad_norm": 1e-3, "seconds": 1.0, "peak_memory_bytes": 5, "eval_seconds": 2.0,
            "adapters": {"a": {"loss": 0.1, "tokens": 3}}}  # fmt: skip
    kept = {"step": "1", "loss": "0.1", "grad_norm": "0.001", "adapters": {"a": {"loss": "0.1"}}}
    assert bits.numbers(line) == kept
    assert bits.without_places(
        {"data": "/tmp/x", "bool_q": {"source": "/tmp/y", "split": "train"}, "sides": [{"loss": 0.1, "answer": "yes"}]}
    ) == {"bool_q": {"split": "train"}, "sides": [{"loss": "0.1", "answer": "yes"}]}


def test_another_machine_and_unknown_cases_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = {**bits.machine(), "cpu": "another", "torch": "2.0.0"}
    record = tmp_path / "before.json"
    record.write_text(json.dumps({"machine": elsewhere, "cases": {}}))
    monkeypatch.setattr(bits, "use", lambda source: None)
    monkeypatch.setattr(bits.os, "environ", dict(bits.os.environ))
    monkeypatch.setattr(sys, "argv", ["bits.py", "--against", str(record)])
    assert bits.main() == 2
    said = capsys.readouterr().err
    assert "another machine" in said
    assert "cpu: another -> " in said
    assert "torch: 2.0.0 -> " in said
    with pytest.raises(SystemExit, match="no case is called llama"):
        bits.chosen("llama")
    assert len({case.name for case in bits.cases()}) == len(bits.cases())
