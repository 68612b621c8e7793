"""Checkpoints give back every bit, refuse damage by the file's name, and are pruned as asked."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorry.disk import durable, integrity, manifest
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.train import checkpoint
from lorry.train.checkpoint import (
    find_latest_checkpoint,
    load_checkpoint,
    remove_checkpoints_after,
    save_checkpoint,
)
from tests.support.faults import FaultyDisk
from tests.support.states import DTYPES, STATES, bits, meta, same


@pytest.fixture(scope="module", autouse=True)
def _unsynced_disk() -> Iterator[None]:
    """Tests in this process make no fsync; what fsync is for is tested by cutting the power."""
    before, durable.disk = durable.disk, FaultyDisk()
    yield
    durable.disk = before


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    t = bits(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)))
    view = draw(st.sampled_from(["whole", "transposed", "strided", "expanded"]))
    if view == "transposed":
        return t.permute(tuple(reversed(range(t.dim()))))
    if view == "strided" and t.dim():
        return t[::2]
    return t.expand(3, *t.shape) if view == "expanded" else t


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, tensors(), max_size=6), st.integers(0, 10**9))
def test_any_state_comes_back_bit_for_bit(tensors: dict[str, Tensor], step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder), step, tensors, meta(0))
        assert path.name == f"step-{step:08d}"
        found, read = load_checkpoint(path)
        assert same(found, tensors)
        assert read["step"] == step


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_meta_comes_back_unchanged(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, read = load_checkpoint(save_checkpoint(Path(folder), 3, {}, meta(0, extra=value)))
        assert read["extra"] == value
        assert json.dumps(read["extra"]) == json.dumps(value)  # the order of keys and -0.0 as well


def test_shared_storage_and_parameters(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    found, _ = load_checkpoint(
        save_checkpoint(tmp_path, 1, {"a": weight, "b": weight, "tail": weight[1:]}, meta(1))
    )
    assert same(found, {"a": weight.detach(), "b": weight.detach(), "tail": weight.detach()[1:]})
    found["a"].zero_()  # and are separate, writable tensors
    assert found["b"].sum() == 15


def test_every_tensor_is_aligned_in_the_file(tmp_path: Path) -> None:
    tensors = {f"{i}": torch.ones(3, dtype=dtype) for i, dtype in enumerate(reversed(DTYPES))}
    raw = (save_checkpoint(tmp_path, 1, tensors, meta(1)) / "state.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), (1, 2), {1: 2}, Path("x"), [{"deep": {1, 2}}]]
)
def test_meta_that_json_would_change_is_refused_before_anything_is_written(
    value: object, tmp_path: Path
) -> None:
    with pytest.raises(ContractError, match=r"meta\.task"):
        save_checkpoint(tmp_path, 1, {}, meta(1, task=value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
    ],
)
def test_tensors_that_cannot_be_stored_are_named(bad: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="tensor 'moment'"):
        save_checkpoint(tmp_path, 1, {"moment": bad}, meta(1))
    assert not list(tmp_path.iterdir())


def test_every_flipped_byte_is_found_and_the_file_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, STATES[1], meta(1))
    path = save_checkpoint(tmp_path, 2, STATES[2], meta(2))
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for i in range(len(whole)):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
            with pytest.raises(ModelError, match=re.escape(str(file))):
                load_checkpoint(path)
        file.write_bytes(whole)
    assert same(load_checkpoint(path)[0], STATES[2])


@pytest.mark.parametrize("name", ["state.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "grown", "missing", "link", "pipe", "flipped"])
def test_a_damaged_newest_gives_way_to_the_older(
    name: str, harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = save_checkpoint(tmp_path, 1, STATES[1], meta(1))
    file = save_checkpoint(tmp_path, 2, STATES[2], meta(2)) / name
    whole = file.read_bytes()
    file.unlink()
    if harm == "link":
        (tmp_path / "elsewhere").write_bytes(whole)
        file.symlink_to(tmp_path / "elsewhere")
    elif harm == "pipe":
        os.mkfifo(file)
    elif harm != "missing":
        file.write_bytes(
            {
                "cut": whole[:-1],
                "grown": whole + b" ",
                "flipped": bytes([whole[0] ^ 4]) + whole[1:],
            }[harm]
        )
    with pytest.raises(ModelError, match=re.escape(str(file))):
        load_checkpoint(file.parent)
    assert find_latest_checkpoint(tmp_path) == older
    assert "skipped" in caplog.text
    assert str(file) in caplog.text


def test_what_a_run_at_work_prunes_while_it_is_looked_at_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`lorry doctor` said of a live run that none of its checkpoints was whole."""
    save_checkpoint(tmp_path, 1, STATES[1], meta(1), keep=1)
    read_meta = checkpoint._read_meta

    def save_first(path: Path) -> object:
        monkeypatch.setattr(checkpoint, "_read_meta", read_meta)
        save_checkpoint(tmp_path, 2, STATES[2], meta(2), keep=1)
        return read_meta(path)

    monkeypatch.setattr(checkpoint, "_read_meta", save_first)
    assert find_latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    assert caplog.text == ""


def test_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, STATES[1], meta(1))
    secret = tmp_path / "checkpoints" / "secret.json"
    secret.write_text("{}")
    entry = manifest.ManifestEntry(bytes=2, sha256=integrity.file_digest(secret))
    for name in ("../secret.json", str(secret), "a/b", ".."):
        (path / "manifest.json").write_bytes(manifest.encode_manifest({name: entry}))
        with pytest.raises(ModelError, match="not a plain file name"):
            load_checkpoint(path)
    (path / "optimizer.pt").write_text("{}")
    (path / "manifest.json").write_bytes(manifest.encode_manifest({"optimizer.pt": entry}))
    with pytest.raises(ModelError, match="nothing else"):
        load_checkpoint(path)


def test_a_linked_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = save_checkpoint(tmp_path / "run", 1, STATES[1], meta(1))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ModelError, match="symbolic link"):
        load_checkpoint(tmp_path / "link")


def test_pickles_are_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / "optimizer.pt", tmp_path / "nowhere.bin"):
        with pytest.raises(ModelError, match="pickle"):
            load_checkpoint(path)
    with pytest.raises(ModelError, match=r"manifest\.json is missing"):
        load_checkpoint(tmp_path / "nowhere")


def test_another_format_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"format": "lorry-checkpoint/2", **meta(1)}).encode()
    for name, found in ((text, "lorry-checkpoint/2"), (b"[]", "None"), (b"{", "not JSON")):
        files: dict[str, durable.FileContent] = {
            "state.safetensors": b"\x02\0\0\0\0\0\0\0{}",
            "meta.json": name,
        }
        durable.write_directory(tmp_path / "c", files, manifest=True, replace=True)
        with pytest.raises(ModelError, match=found):
            load_checkpoint(tmp_path / "c")


def steps(run: Path) -> list[int]:
    return sorted(
        int(p.name.removeprefix("step-"))
        for p in (run / "checkpoints").iterdir()
        if p.suffix != ".damaged"
    )


def test_pruning_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save_checkpoint(tmp_path, step, STATES[1], meta(1), keep=2, protect={10, 99})
    assert steps(tmp_path) == [10, 40, 50]
    save_checkpoint(tmp_path, 60, STATES[1], meta(1))
    assert steps(tmp_path) == [10, 40, 50, 60]
    (tmp_path / "checkpoints" / "step-00000060" / "meta.json").unlink()
    save_checkpoint(tmp_path, 70, STATES[1], meta(1), keep=2)
    assert steps(tmp_path) == [50, 70], "a damaged one does not count"
    assert (tmp_path / "checkpoints" / "step-00000060.damaged" / "state.safetensors").is_file(), (
        "and is not removed"
    )
    with pytest.raises(ConfigError, match="save_total_limit=0"):
        save_checkpoint(tmp_path, 80, STATES[1], meta(1), keep=0)


def test_going_back_forgets_what_came_after(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, STATES[step], meta(step))
    remove_checkpoints_after(tmp_path, 2)
    assert find_latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    save_checkpoint(tmp_path, 1, STATES[5], meta(5))
    assert steps(tmp_path) == [1]
    remove_checkpoints_after(tmp_path, -1)
    assert find_latest_checkpoint(tmp_path) is None
    assert find_latest_checkpoint(tmp_path / "never") is None
