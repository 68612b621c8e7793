"""Contracts 5 to 8 broken on purpose: what is on the disk, what is not finite, what is no input;
and the codes a shell sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorry import cli
from lorry.backends.local import LocalBackend
from lorry.errors import DataError, ModelError, NonFiniteError
from lorry.train import artifacts, checkpoint
from tests.support import tinyrun
from tests.support.breaking import MODULES, Broken, Start, after, changed_example, silent_attention
from tests.support.tinyrun import engine_for, quick  # noqa: F401 - a fixture

# --- 5 and 6: what is on the disk


def edit_config(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]})
    )


def edit_weights(change: Callable[[bytearray], bytes]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(change(bytearray(path.read_bytes())))

    return edit


def flip_last_value(content: bytearray) -> bytes:
    content[-4] ^= 1  # the lowest bit of an fp32
    return bytes(content)


TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a value": (
        edit_weights(flip_last_value),
        "the adapter read back is not the one that was trained",
    ),
    "the scale": (edit_config, "the adapter read back gives other logits"),
    "cut short": (edit_weights(lambda content: bytes(content[:-8])), "adapter_model.safetensors"),
    "gone": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("how", TAMPERINGS)
def test_5_an_adapter_that_is_not_what_was_trained(
    broken: Broken, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    tamper, message = TAMPERINGS[how]
    after(monkeypatch, artifacts, "write_adapters", lambda digests, folder, *rest: tamper(folder))
    broken(5, message)


@pytest.mark.parametrize("file", ["state.safetensors", "meta.json", "manifest.json"])
def test_6_a_newest_checkpoint_that_is_damaged(
    broken: Broken, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """An older one that is whole does not make up for it."""

    def damage(path: Path, run_dir: Path, step: int, *rest: Any) -> None:
        if step == 5:
            content = bytearray((path / file).read_bytes())
            content[len(content) // 2] ^= 1
            (path / file).write_bytes(content)

    after(monkeypatch, checkpoint, "save_checkpoint", damage)
    broken(6, f"step-00000005/{file} is damaged")


def test_6_without_checkpoints_there_is_nothing_to_claim(start: Start) -> None:
    assert start(save_strategy="no").contracts[5]["status"] == "not_checked"


# --- 7: finite


def test_7_an_infinite_gradient(
    broken: Broken, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def overflow(stats: Any, self: LocalBackend, batches: Any, task: Any, step: int) -> None:
        if step == 3:
            self.bank["default"].split_like(self.bank["default"].grads)[f"{MODULES[0]}.lora_B"][
                1, 0
            ] = float("inf")

    after(monkeypatch, LocalBackend, "forward_backward", overflow)
    message = (
        rf"step 4: the gradient of {MODULES[0]}.lora_B \(adapter 'default'\) is not finite in 1 tensors, "
        r"with sequences of keys \[\d+, \d+, \d+\]; nothing was updated"
    )
    broken(7, message, error=NonFiniteError, code=6)
    newest = checkpoint.find_latest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step-00000002"


def test_7_a_base_that_overflows(
    broken: Broken, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """From the first step on: it is the loss that is named, not the packing, whose check cannot
    tell. (NaN itself is refused when the base is loaded.)"""
    folder = silent_attention(models("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 3e38  # finite, and the logits are not
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    broken(
        7,
        "step 1: the loss term 'nll' is not finite for 3 of 3 sequences",
        error=NonFiniteError,
        code=6,
        base=folder,
    )


# --- 8: bad input; and the codes a shell sees


def test_8_a_bad_row(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() + '{"question": "Who?", "ans\n')
    with pytest.raises(DataError, match=rf"^{data}:13: ") as e:
        start()
    assert e.value.exit_code == 3
    assert not (tmp_path / "run").exists()


def test_8_rows_left_out_are_accounted_for(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        data.read_text() + '{"question": "Who?", "ans\n{"question": "Who?", "answer": ""}\n'
    )
    eight = start(on_bad_row="quarantine").contracts[7]
    assert eight["status"] == "held"
    assert "12 rows, 12 sequences" in eight["detail"]
    assert eight["detail"].count("left out: 1 row") == 2
    aside = [
        json.loads(line)["where"]
        for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert aside == [f"{data}:13", f"{data}:14"]


def test_an_adapter_of_another_base(
    start: Start, models: Callable[[str], Path], tmp_path: Path
) -> None:
    start()
    other = tinyrun.model_directory(tmp_path / "other", spread=0.21)
    with pytest.raises(ModelError, match="trained on other base weights") as e:
        start(other, adapter=str(tmp_path / "run"))
    assert e.value.exit_code == 4


@pytest.mark.parametrize("code", [2, 3, 5, 6])
def test_the_exit_codes_of_the_command(
    code: int,
    models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = tinyrun.write_rows(tmp_path / "data.jsonl", tinyrun.rows(6))
    if code == 3:
        data.write_text("{broken\n")
    if code == 5:
        changed_example(monkeypatch, lambda e: replace(e, weights=[0.0] * len(e.weights)))
    if code == 6:
        after(
            monkeypatch,
            LocalBackend,
            "forward_backward",
            lambda stats, self, *rest: self.bank["default"].grads.fill_(float("nan")),
        )
    argv = [
        "sft",
        f"model={models('llama')}",
        f"data={data}",
        f"output_dir={tmp_path / 'run'}",
        "max_steps=2",
        "threads=1",
        "device=cpu",
    ]
    argv += ["target_modules=q_prj"] if code == 2 else []
    assert cli.main(argv) == code
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("error: ") == 1
    assert "Traceback" not in said.err
