"""Checkpoints survive a kill, a power cut and a failing disk at every call, refuse damage, and give back every bit."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FaultyDisk, Outcome, PowerCut, Say, breaking, failing, kill, kill_points, short
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorry.errors import ConfigError, ContractError, ModelError
from lorry.train import durable, manifest
from lorry.train.checkpoint import code_digest, environment, find_latest, forget_after, load, refuse_other, save

DTYPES = [getattr(torch, n) for n in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()]  # noqa: SIM905


@pytest.fixture(scope="module", autouse=True)
def _unsynced_disk() -> Iterator[None]:
    """Tests in this process make no fsync; what fsync is for is tested by cutting the power."""
    durable.disk = FaultyDisk()
    yield
    durable.disk = durable.Disk()


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern, NaNs and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def state(version: int) -> dict[str, Tensor]:
    return {
        "adapter/default/model.layers.0.self_attn.q_proj.lora_A": bits((4, 6), torch.float32, version),
        "adam_m/default": bits((3, 4, 2), torch.bfloat16, version).transpose(0, 2),
        "rng/cpu": bits((16,), torch.uint8, version),
        "steps": torch.tensor(version),
        "unused": torch.empty(0, 4),
    }


def meta(version: int, **more: Any) -> dict[str, Any]:
    return {"task": {"version": version, "loss": 0.1 + version}, "config": {}, "digests": {}, "environment": {}, **more}


STATES = {version: state(version) for version in range(10)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits."""
    raw = lambda t: t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)  # noqa: E731
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape) and torch.equal(raw(a[n]), raw(b[n])) for n in a
    )


def history(run: Path, say: Say) -> None:
    """Versions 1 to 4 are steps 1 to 4; version 5 is step 4 saved again with other content, replacing the first."""
    for version in (1, 2, 3, 4, 5):
        save(run, min(version, 4), STATES[version], meta(version), keep=2, protect={1})
        say(version)


def check(outcome: Outcome) -> None:
    """What is promised after the history ended anywhere: the last version that was saved, or the one then being saved."""
    run, reached = outcome.folder, outcome.said[-1] if outcome.said else 0
    path = find_latest(run)
    if path is None:
        assert reached == 0, f"call {outcome.at}: version {reached} was saved and is gone"
    else:
        tensors, found = load(path)
        version = found["task"]["version"]
        assert version in (reached, reached + 1), f"call {outcome.at}: version {reached} was saved, {version} found"
        assert same(tensors, STATES[version])
        assert found == {**meta(version), "step": min(version, 4)}
    save(run, 9, STATES[9], meta(9), keep=2, protect={1})
    names = sorted(os.listdir(run / "checkpoints"))
    assert all(re.fullmatch(r"step-0000000\d", name) for name in names), f"call {outcome.at}: left over in {names}"
    assert len(names) <= 3
    latest = find_latest(run)
    assert latest is not None
    assert same(load(latest)[0], STATES[9])


def check_all(root: Path, make_disk: Callable[[int], FaultyDisk], work: Callable[[Path, Say], None]) -> int:
    """Check after a disaster at every call; returns how many there were."""
    for outcome in kill_points(root, make_disk, work):
        assert not outcome.error, outcome.error
        check(outcome)
    return outcome.at - 1


DISKS: dict[str, Callable[[int], FaultyDisk]] = {
    "kill -9": lambda n: FaultyDisk(n, kill),
    "power cut, contents lost": lambda n: PowerCut(n, data=True),
    "power cut, names lost": lambda n: PowerCut(n, names=True),
    "power cut, both lost": lambda n: PowerCut(n, data=True, names=True),
}


@pytest.mark.parametrize("disaster", DISKS)
def test_a_disaster_at_every_disk_call_leaves_a_whole_checkpoint(
    disaster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR")
    points = check_all(tmp_path, DISKS[disaster], history)
    assert points > 100
    with capsys.disabled():
        print(f"\n{disaster}: {points} points, after each the last saved checkpoint is whole and the next save works")


class Forgetful(PowerCut):
    """The same machine under a saver that leaves one kind of fsync out."""

    forgotten = ""

    def make(self, kind: str, *args: Any) -> Any:
        return None if kind == self.forgotten else super().make(kind, *args)


@pytest.mark.parametrize(("forgotten", "lost"), [("fsync", {"data": True}), ("fsync_dir", {"names": True})])
def test_the_harness_sees_a_missing_fsync(forgotten: str, lost: dict[str, bool], tmp_path: Path) -> None:
    def make_disk(n: int) -> FaultyDisk:
        disk = Forgetful(n, **lost)
        disk.forgotten = forgotten
        return disk

    with pytest.raises(AssertionError, match="was saved"):
        check_all(tmp_path, make_disk, history)


def test_the_harness_sees_a_saver_that_prunes_first(tmp_path: Path) -> None:
    def prune_first(run: Path, say: Say) -> None:
        for version in (1, 2):
            forget_after(run, -1)
            save(run, version, STATES[version], meta(version))
            say(version)

    with pytest.raises(AssertionError, match="version 1 was saved and is gone"):
        check_all(tmp_path, DISKS["kill -9"], prune_first)


def failure(run: Path, disk: FaultyDisk, say: Say) -> durable.DiskError | None:
    """The error that the history ends with on this disk."""
    before, durable.disk = durable.disk, disk
    try:
        history(run, say)
    except durable.DiskError as e:
        return e
    finally:
        durable.disk = before
    return None


FAILURES = {
    "full": (errno.ENOSPC, failing(errno.ENOSPC)),
    "error": (errno.EIO, failing(errno.EIO)),
    "gone": (errno.EIO, breaking),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_failing_call_names_its_place_and_loses_nothing(how: str, tmp_path: Path) -> None:
    code, fault = FAILURES[how]
    for n in itertools.count(1):
        run, said = tmp_path / str(n), bytearray()
        run.mkdir()
        error = failure(run, FaultyDisk(n, fault), said.append)
        if error is None:
            break
        assert error.errno == code
        assert str(error).startswith(str(run))
        assert os.strerror(code) in str(error)
        check(Outcome(run, n, killed=False, error="", said=bytes(said)))
    assert n > 100


def test_writes_that_stop_short_are_continued(tmp_path: Path) -> None:
    class Short(FaultyDisk):
        def make(self, kind: str, *args: Any) -> Any:
            return super().make(kind, args[0], args[1][:7]) if kind == "write" else super().make(kind, *args)

    before, durable.disk = durable.disk, Short()
    path = save(tmp_path, 1, STATES[1], meta(1))
    durable.disk = FaultyDisk(8, short)
    again = save(tmp_path, 2, STATES[2], meta(2))
    durable.disk = before
    assert same(load(path)[0], STATES[1])
    assert same(load(again)[0], STATES[2])


def test_the_order_of_a_commit(tmp_path: Path) -> None:
    save(tmp_path, 1, STATES[1], meta(1))
    before, durable.disk = durable.disk, FaultyDisk()
    save(tmp_path, 2, STATES[2], meta(2), keep=1)
    trace = [(kind, re.sub(r"-\d+-[0-9a-f]{8}", "", str(Path(path).relative_to(tmp_path)))) for kind, path in durable.disk.trace]
    durable.disk = before
    temp, gone = "checkpoints/step-00000002.tmp", "checkpoints/step-00000001.gone"
    files = ("state.safetensors", "meta.json", "manifest.json")
    each = [[(kind, f"{temp}/{name}") for kind in ("create", "write", "fsync", "close")] for name in files]
    assert [call for call, _ in itertools.groupby(trace)] == [
        ("mkdir", temp),
        *itertools.chain(*each),
        ("fsync_dir", temp),
        ("rename", "checkpoints/step-00000002"),
        ("fsync_dir", "checkpoints"),
        ("rename", gone),
        *[("unlink", f"{gone}/{name}") for name in sorted(files)],
        ("rmdir", gone),
    ]


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


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, tensors(), max_size=6), st.integers(0, 10**9))
def test_any_state_comes_back_bit_for_bit(tensors: dict[str, Tensor], step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), step, tensors, meta(0))
        assert path.name == f"step-{step:08d}"
        found, read = load(path)
        assert same(found, tensors)
        assert read["step"] == step


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_meta_comes_back_unchanged(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, read = load(save(Path(folder), 3, {}, meta(0, extra=value)))
        assert read["extra"] == value
        assert json.dumps(read["extra"]) == json.dumps(value)  # the order of keys and -0.0 as well


def test_shared_storage_and_parameters(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    found, _ = load(save(tmp_path, 1, {"a": weight, "b": weight, "tail": weight[1:]}, meta(1)))
    assert same(found, {"a": weight.detach(), "b": weight.detach(), "tail": weight.detach()[1:]})
    found["a"].zero_()  # and are separate, writable tensors
    assert found["b"].sum() == 15


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1, 2), {1: 2}, Path("x"), [{"deep": {1, 2}}]])
def test_meta_that_json_would_change_is_refused_before_anything_is_written(value: object, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"meta\.task"):
        save(tmp_path, 1, {}, meta(1, task=value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta"), torch.eye(2).to_sparse()])
def test_tensors_that_cannot_be_stored_are_named(bad: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="tensor 'moment'"):
        save(tmp_path, 1, {"moment": bad}, meta(1))
    assert not list(tmp_path.iterdir())


def test_every_flipped_byte_is_found_and_the_file_named(tmp_path: Path) -> None:
    save(tmp_path, 1, STATES[1], meta(1))
    path = save(tmp_path, 2, STATES[2], meta(2))
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for i in range(len(whole)):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
            with pytest.raises(ModelError, match=re.escape(str(file))):
                load(path)
        file.write_bytes(whole)
    assert same(load(path)[0], STATES[2])


@pytest.mark.parametrize("name", ["state.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "grown", "missing", "link", "pipe", "flipped"])
def test_a_damaged_newest_gives_way_to_the_older(name: str, harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = save(tmp_path, 1, STATES[1], meta(1))
    file = save(tmp_path, 2, STATES[2], meta(2)) / name
    whole = file.read_bytes()
    file.unlink()
    if harm == "link":
        (tmp_path / "elsewhere").write_bytes(whole)
        file.symlink_to(tmp_path / "elsewhere")
    elif harm == "pipe":
        os.mkfifo(file)
    elif harm != "missing":
        file.write_bytes({"cut": whole[:-1], "grown": whole + b" ", "flipped": bytes([whole[0] ^ 4]) + whole[1:]}[harm])
    with pytest.raises(ModelError, match=re.escape(str(file))):
        load(file.parent)
    assert find_latest(tmp_path) == older
    assert "skipped" in caplog.text
    assert str(file) in caplog.text


def test_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, STATES[1], meta(1))
    secret = tmp_path / "checkpoints" / "secret.json"
    secret.write_text("{}")
    entry = manifest.Entry(bytes=2, sha256=manifest.file_digest(secret))
    for name in ("../secret.json", str(secret), "a/b", ".."):
        (path / "manifest.json").write_bytes(manifest.text({name: entry}))
        with pytest.raises(ModelError, match="not a plain file name"):
            load(path)
    (path / "optimizer.pt").write_text("{}")
    (path / "manifest.json").write_bytes(manifest.text({"optimizer.pt": entry}))
    with pytest.raises(ModelError, match="nothing else"):
        load(path)


def test_a_linked_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 1, STATES[1], meta(1))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ModelError, match="symbolic link"):
        load(tmp_path / "link")


def test_pickles_are_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / "optimizer.pt", tmp_path / "nowhere.bin"):
        with pytest.raises(ModelError, match="pickle"):
            load(path)
    with pytest.raises(ModelError, match=r"manifest\.json is missing"):
        load(tmp_path / "nowhere")


def test_another_format_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"format": "lorry-checkpoint/2", **meta(1)}).encode()
    for name, found in ((text, "lorry-checkpoint/2"), (b"[]", "None"), (b"{", "not written by Lorry")):
        files: dict[str, durable.Content] = {"state.safetensors": b"\x02\0\0\0\0\0\0\0{}", "meta.json": name}
        durable.write_directory(tmp_path / "c", files, manifest=True, replace=True)
        with pytest.raises(ModelError, match=found):
            load(tmp_path / "c")


def steps(run: Path) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in os.listdir(run / "checkpoints"))


def test_pruning_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step, STATES[1], meta(1), keep=2, protect={10, 99})
    assert steps(tmp_path) == [10, 40, 50]
    save(tmp_path, 60, STATES[1], meta(1))
    assert steps(tmp_path) == [10, 40, 50, 60]
    (tmp_path / "checkpoints" / "step-00000060" / "meta.json").unlink()
    save(tmp_path, 70, STATES[1], meta(1), keep=2)
    assert steps(tmp_path) == [50, 70], "a damaged one does not count"
    with pytest.raises(ConfigError, match="save_total_limit=0"):
        save(tmp_path, 80, STATES[1], meta(1), keep=0)


def test_going_back_forgets_what_came_after(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, STATES[step], meta(step))
    forget_after(tmp_path, 2)
    assert find_latest(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    save(tmp_path, 1, STATES[5], meta(5))
    assert steps(tmp_path) == [1]
    forget_after(tmp_path, -1)
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "never") is None


CONFIG = {
    "train": {"learning_rate": 1e-3, "save_steps": 10, "betas": [0.9, 0.999], "seed": 0},
    "lora": {"r": 8, "rank_pattern": {}},
    "backend": {"name": "single", "threads": 2},
    "output_dir": "runs/a",
}
CURRENT = {
    "config": CONFIG,
    "digests": {"data": {"train": "a" * 64, "eval": "b" * 64}, "code": "c" * 64, "config": "d" * 64},
    "environment": {"torch": "2.11.0", "threads": 2, "compiled": False},
}


def changed(field: str, value: object) -> dict[str, Any]:
    """CURRENT with one dotted field set, or removed."""
    copy = json.loads(json.dumps(CURRENT))
    *groups, leaf = field.split(".")
    inner = copy
    for group in groups:
        inner = inner[group]
    if value is None:
        del inner[leaf]
    else:
        inner[leaf] = value
    return copy


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("config.train.learning_rate", 2e-3, "train.learning_rate 0.001 -> 0.002"),
        ("config.train.betas", [0.9, 0.95], "train.betas [0.9, 0.999] -> [0.9, 0.95]"),
        ("config.train.seed", None, "train.seed 0 -> absent"),
        ("config.lora.rank_pattern", {"q_proj": 4}, "lora.rank_pattern.q_proj absent -> 4"),
        ("config.train.eval_steps", 5, "train.eval_steps absent -> 5"),
        ("digests.data.train", "e" * 64, "data.train aaaaaaaaaaaa -> eeeeeeeeeeee"),
    ],
)
def test_another_run_is_refused_by_field_with_both_values(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_other(CURRENT, changed(field, value))
    assert f"\n  {message}\n" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "note"),
    [
        ("environment.torch", "2.13.0", 'not bitwise: torch "2.11.0" -> "2.13.0"'),
        ("environment.threads", 4, "not bitwise: threads 2 -> 4"),
        ("config.backend.threads", 4, "not bitwise: backend.threads 2 -> 4"),
        ("digests.code", "e" * 64, "not bitwise: code cccccccccccc -> eeeeeeeeeeee"),
    ],
)
def test_another_place_is_noted_and_goes_on(field: str, value: object, note: str) -> None:
    assert refuse_other(CURRENT, changed(field, value)) == [note]


def test_settings_of_writing_may_differ_and_equal_runs_are_equal(tmp_path: Path) -> None:
    assert refuse_other(CURRENT, CURRENT) == []
    _, stored = load(save(tmp_path, 1, {}, CURRENT))
    assert refuse_other(stored, CURRENT) == []
    for field, value in (
        ("output_dir", "runs/b"),
        ("train.save_steps", 3),
        ("train.run_name", "x"),
        ("train.report_to", ["wandb"]),
    ):
        assert refuse_other(CURRENT, changed(f"config.{field}", value)) == []
    assert refuse_other(CURRENT, changed("digests.config", "e" * 64)) == []


def test_environment_and_code_are_described() -> None:
    found = environment(device="cpu", compiled=True)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["compiled"] is True
    assert json.loads(json.dumps(found)) == found
    assert re.fullmatch("[0-9a-f]{64}", code_digest())
    assert code_digest() == code_digest()
