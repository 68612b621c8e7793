"""Who the teacher is and what is kept of it: one base or two, another tokenizer, 4 bits, and a
cache on disk that cannot lie.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.adapters.attach import attach
from lorry.adapters.peft.files import save_adapter
from lorry.adapters.quantization.linear import quantized_linears
from lorry.adapters.quantization.packed import QUANTIZATIONS
from lorry.adapters.spec import LoraSpec
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.config import DistillRunConfig, build_settings
from lorry.data.prepare import prepare_data
from lorry.data.stream.joint import JointStream
from lorry.disk import durable
from lorry.errors import ConfigError, ModelError
from lorry.generation.sampling import SamplingParams
from lorry.models.decoder.model import Decoder
from lorry.models.loading.open import open_model
from lorry.models.scoring.score import TokenScore, log_prob
from lorry.tasks.build import BuiltTask, PreparedJob, TaskInputs
from lorry.tasks.distill import builder, teacher
from lorry.tasks.distill.align import PairedEncoder
from lorry.tasks.distill.builder import build_distill, make_encoder_factory
from lorry.tasks.distill.task import TAUGHT_MASK, TEACHER_IDS, TEACHER_LOG_PROBS
from tests.support import tinyrun
from tests.support.faults import UnreadableDisk
from tests.support.foreign import everything, strange
from tests.support.tinyrun import described, model_directory, quick, rows, tokenizer, write_rows  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a larger teacher, one of another tokenizer (300 entries), an adapter of the
    student's base, rows.
    """
    at = tmp_path_factory.mktemp("world")
    model_directory(at / "student")
    model_directory(at / "teacher", spread=0.4, hidden_size=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinyrun, "VOCAB", 300)
        model_directory(at / "foreign", spread=0.4)
    write_rows(at / "rows.jsonl", rows(9))
    write_rows(at / "held.jsonl", rows(3, start=40))
    base = open_model(described(at / "student", at / "rows.jsonl", at / "x").model, print)
    attach(base.model, LoraSpec(r=2, init_lora_weights=False), "tutor", seed=2)
    save_adapter(base.model, at / "adapter", "tutor")
    return at


def material(world: Path, given: Mapping[str, Any], **settings: Any) -> TaskInputs:
    """What `session` would hand to the task's builder, up to the point where it does."""
    described_as = {
        "model": {"name": str(world / "student")},
        "data": {"path": str(world / "rows.jsonl"), "eval": str(world / "held.jsonl")},
        "output_dir": str(world / "run"),
        **tinyrun.DEFAULTS,
        "distill": {"teacher_dtype": "float32", **given},
        **settings,
    }
    run, notes = build_settings(DistillRunConfig, described_as, print), list[str]()
    opened = open_model(run.model, notes.append)
    attach(opened.model, LoraSpec(r=2), "default")
    make = make_encoder_factory(run, opened, notes.append)
    data = prepare_data(
        run.data, run.train, opened.tokenizer, quarantine=world / "aside.jsonl", make=make
    )
    backend, stream = (
        LocalBackend(opened.model, ["default"], OptimSettings()),
        JointStream({"default": data.stream}, {"default": 3}, 1024),
    )
    return TaskInputs(
        run,
        opened,
        {"default": PreparedJob(run, data, {}, data.stream)},
        stream,
        data.evaluation,
        6,
        backend,
    )


def parts(built: BuiltTask) -> tuple[Any, Mapping[str, Any]]:
    return built.task, built.models


def no_teacher(*_: Any) -> Any:
    raise AssertionError("the teacher was opened")


def loss_of(given: TaskInputs, task: Any, models: Mapping[str, Any]) -> float:
    """Of the first step."""
    stats = given.backend.forward_backward(
        task.step_batches(0, {"self": given.backend, **models}), task, 0
    )
    given.backend.discard()
    return stats.terms["distill"]["default"]


# --- whose model it is


@pytest.mark.parametrize(
    ("given", "settings", "shared"),
    [
        ({"teacher": "student"}, {}, True),
        ({"teacher_adapter": "adapter"}, {}, True),
        ({"teacher": "student", "teacher_adapter": "adapter"}, {}, True),
        ({"teacher": "adapter"}, {}, True),
        ({"teacher": "student", "teacher_dtype": "float32"}, {}, True),
        ({"teacher": "student", "teacher_dtype": "bfloat16"}, {}, False),
        ({"teacher_adapter": "adapter"}, {"lora": None}, False),
        ({"teacher": "teacher"}, {}, False),
    ],
    ids=str,
)
def test_one_base_or_two(
    world: Path, given: dict[str, str], settings: dict[str, Any], shared: bool
) -> None:
    """The student's base is the teacher's wherever it can be; with all weights in training it
    cannot.
    """
    placed = {
        key: str(world / value) if key != "teacher_dtype" else value for key, value in given.items()
    }
    defaults = {
        key: value
        for key, value in tinyrun.DEFAULTS.items()
        if key != "r" or settings.get("lora", 1)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinyrun, "DEFAULTS", defaults)
        made = material(world, placed, **settings)
    task, models = parts(build_distill(made))
    assert (models["teacher"].model is made.opened.model) == shared
    assert (
        loss_of(made, task, models) < 1e-4
        if given.get("teacher") == "student" and "adapter" not in str(given)
        else True
    )
    assert list(made.backend.trained) == ["default"]


def test_an_adapter_scores_as_it_would_alone(world: Path) -> None:
    made = material(world, {"teacher_adapter": str(world / "adapter")})
    _, models = parts(build_distill(made))
    alone = open_model(made.run.model.model_copy(update={"adapter": str(world / "adapter")}), print)
    batch, want = made.held[0], {"logprob": TokenScore(log_prob)}
    expected = teacher.TeacherScorer(alone.model, teacher.Mix.one(alone.adapters[0])).score(
        [batch], want
    )[0]["logprob"]
    assert torch.equal(models["teacher"].score([batch], want)[0]["logprob"], expected)
    assert not torch.equal(made.backend.score([batch], want)[0]["logprob"], expected)
    assert len(models["teacher"].generate([[5, 6, 7]], SamplingParams(max_new_tokens=3))) == 1


def test_two_adapters_are_one_too_many(world: Path) -> None:
    with pytest.raises(ConfigError, match="the teacher has 2 adapters"):
        material(
            world, {"teacher": str(world / "adapter"), "teacher_adapter": str(world / "adapter")}
        )


# --- another tokenizer


def test_another_tokenizer_needs_uld(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"another tokenizer: id \d+ .*distill\.loss=uld"):
        material(world, {"teacher": str(world / "foreign")})


def test_a_teacher_of_another_tokenizer_reads_the_same_rows(world: Path) -> None:
    """Its divergence is the published formula over the pairs of tokens, from two whole forward
    passes.
    """
    made = material(world, {"teacher": str(world / "foreign"), "loss": "uld", "temperature": 1.2})
    task, models = parts(build_distill(made))
    encoder = made.jobs["default"].data.encoder
    assert isinstance(encoder, PairedEncoder)
    batch, want = task.eval_batches()[0], task.wants(made.held[0])
    got = made.backend.score([batch], want)[0]["distill"]
    total, pairs = 0.0, 0
    ours, theirs = made.opened.model, models["teacher"].model
    assert isinstance(theirs, Decoder)
    for start, stop in batch.segments:
        tokens, weights = batch.tokens[start:stop], batch.weights[start:stop]
        view = encoder.views[builder.sequence_digest(tokens.tolist(), weights.tolist())]
        p = (ours(tokens[None]).logits[0].detach().double() / 1.2).softmax(1)
        q = (theirs(torch.tensor([list(view.tokens)])).logits[0].double() / 1.2).softmax(1)
        for target, source in zip(view.targets, view.sources, strict=True):
            a, b = (
                p[target - 1].sort(descending=True).values,
                q[source].sort(descending=True).values,
            )
            value = (a[: len(b)] - b).abs().sum() + a[len(b) :].sum()
            assert float(value) == pytest.approx(float(got[start + target]), rel=1e-4)
            total, pairs = total + float(value), pairs + 1
    assert int(batch.extra[TAUGHT_MASK].values.sum()) == pairs > 10
    assert loss_of(made, task, models) > 0


def test_rows_too_long_for_the_teacher_are_counted(world: Path) -> None:
    made = material(world, {"teacher": str(world / "foreign"), "loss": "uld"})
    encoder = made.jobs["default"].data.encoder
    assert isinstance(encoder, PairedEncoder)
    for name in list(encoder.views)[:2]:
        del encoder.views[name]
    built = build_distill(made)
    assert any(
        note.startswith("2 of 12 sequences are too long for the teacher") for note in built.notes
    )


def test_equal_tokenizers_and_fewer_logits(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher whose embedding is shorter than the student's: its tokens' likeliest can be
    compared, all of them cannot.
    """
    monkeypatch.setattr(teacher.TeacherScorer, "vocab_size", 319)
    with pytest.raises(ConfigError, match="319 logits and the student 320"):
        build_distill(material(world, {"teacher": str(world / "teacher")}))
    build_distill(material(world, {"teacher": str(world / "teacher"), "top_k": 8}))


# --- the cache


def cached(world: Path, at: Path, **given: Any) -> TaskInputs:
    return material(
        world, {"teacher": str(world / "teacher"), "cache": str(at), "top_k": 32, **given}
    )


def test_a_cache_is_written_once_and_says_what_the_teacher_says(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At another temperature and loss, the second run without the teacher; log-probabilities as
    fp16 has them.
    """
    first = build_distill(cached(world, tmp_path))
    assert sum("is read from" in note for note in first.notes) == 1
    monkeypatch.setattr(builder, "open_teacher", no_teacher)
    second = cached(world, tmp_path, temperature=1.5, loss="reverse_kl")
    task, models = parts(build_distill(second))
    assert models == {}
    kept = loss_of(second, task, models)
    monkeypatch.undo()
    made = material(
        world,
        {"teacher": str(world / "teacher"), "top_k": 32, "temperature": 1.5, "loss": "reverse_kl"},
    )
    live, asked = parts(build_distill(made))
    assert kept == pytest.approx(loss_of(made, live, asked), abs=1e-3)
    one, other = task.eval_batches()[0].extra, live.eval_batches()[0].extra
    taught = one[TAUGHT_MASK].values > 0
    assert torch.equal(one[TAUGHT_MASK].values, other[TAUGHT_MASK].values)
    assert torch.equal(
        one[TEACHER_IDS].values[taught][:, 0], other[TEACHER_IDS].values[taught][:, 0]
    )
    assert (
        one[TEACHER_LOG_PROBS].values[taught] - other[TEACHER_LOG_PROBS].values[taught]
    ).abs().max() < 5e-3
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_of_another_tokenizer(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"teacher": str(world / "foreign"), "loss": "uld", "top_k": 32}
    made = material(world, {**given, "cache": str(tmp_path)})
    build_distill(made)
    monkeypatch.setattr(builder, "open_teacher", no_teacher)
    again = material(world, {**given, "cache": str(tmp_path)})
    kept = loss_of(again, *parts(build_distill(again)))
    monkeypatch.undo()
    made = material(world, given)
    assert kept == pytest.approx(loss_of(made, *parts(build_distill(made))), abs=1e-3)


def folder_in(path: Path) -> Path:
    (only,) = path.iterdir()
    return only


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda at: flip(at / "teacher.safetensors", -5), lambda at: flip(at / "teacher.json", 40),
        lambda at: (at / "teacher.json").unlink(), lambda at: flip(at / "manifest.json", 60),
    ],
    ids=["a bit", "a fact", "a file", "the manifest"],
)  # fmt: skip
def test_a_damaged_cache_is_refused(
    world: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    build_distill(cached(world, tmp_path))
    damage(folder_in(tmp_path))
    with pytest.raises(ModelError, match=r"move .* away, and the next run writes a new one"):
        build_distill(cached(world, tmp_path))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_cache_that_cannot_be_read_is_not_damaged(
    world: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_distill(cached(world, tmp_path))
    before = everything(tmp_path)
    for n in (1, 5, 9):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "disk", UnreadableDisk(n, code, below=folder_in(tmp_path).name))
            with pytest.raises(durable.DiskError) as error:
                build_distill(cached(world, tmp_path))
        assert (error.value.exit_code, error.value.errno) == (74, code)
        assert everything(tmp_path) == before


def test_somebodys_folder_in_a_caches_place_is_left_alone(world: Path, tmp_path: Path) -> None:
    build_distill(cached(world, tmp_path))
    place = folder_in(tmp_path)
    shutil.rmtree(place)
    place.mkdir()
    (place / "notes.txt").write_bytes(strange("notes"))
    with pytest.raises(ModelError, match=r"manifest\.json is missing; move .* away"):
        build_distill(cached(world, tmp_path))
    assert everything(tmp_path) == {strange("notes"): [f"{place.name}/notes.txt"]}


def test_a_foreign_cache_is_refused(world: Path, tmp_path: Path) -> None:
    """Moved by hand to where another teacher's would lie; by itself another teacher, k or row gets
    another folder.
    """
    build_distill(cached(world, tmp_path / "a"))
    build_distill(
        cached(world, tmp_path / "b", teacher=str(world / "student"), teacher_dtype="bfloat16")
    )
    mine, other = folder_in(tmp_path / "a"), folder_in(tmp_path / "b")
    other.rename(tmp_path / "a" / "other")
    mine.rename(tmp_path / "mine")
    (tmp_path / "a" / "other").rename(mine)
    with pytest.raises(ConfigError, match="was written with another teacher"):
        build_distill(cached(world, tmp_path / "a"))
    build_distill(cached(world, tmp_path / "c"))
    build_distill(cached(world, tmp_path / "c", top_k=16))
    build_distill(cached(world, tmp_path / "c", loss="reverse_kl"))
    assert len(list((tmp_path / "c").iterdir())) == 2
    with pytest.raises(ConfigError, match="temperature=9"):
        build_distill(cached(world, tmp_path / "c", temperature=9))


def test_a_cache_is_of_the_logits_that_count(world: Path, tmp_path: Path) -> None:
    """A student with fewer tokens than the teacher has logits: neither their ids nor their share is
    of use to another one.
    """
    read = list[int]()
    for columns in (200, 320):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                builder, "_teacher_columns", lambda config, opened, columns=columns: columns
            )
            task = build_distill(cached(world, tmp_path)).task
        read.append(int(task.eval_batches()[0].extra[TEACHER_IDS].values.max()))
    assert read[0] < 200 <= read[1]


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "jsd", "uld"])
def test_more_likeliest_tokens_than_there_are(world: Path, tmp_path: Path, loss: str) -> None:
    """All but one, which is the rest: what the whole distribution gives; live as from a cache."""
    teacher_of = {"teacher": str(world / "teacher"), "loss": loss}
    expected, live, kept = (
        loss_of(made, *parts(build_distill(made)))
        for made in (
            material(world, teacher_of), material(world, {**teacher_of, "top_k": 5000}),
            material(world, {**teacher_of, "top_k": 5000, "cache": str(tmp_path)}),
        )
    )  # fmt: skip
    assert live == pytest.approx(expected, rel=1e-4)
    assert kept == pytest.approx(expected, abs=2e-3)


def test_a_full_disk_leaves_no_cache(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(durable.disk, "rename", full)
    with pytest.raises(durable.DiskError):
        build_distill(cached(world, tmp_path))
    monkeypatch.undo()
    assert not list(tmp_path.glob("*-k32-*"))
    build_distill(cached(world, tmp_path))
    assert json.loads((folder_in(tmp_path) / "teacher.json").read_text())["sequences"] == 12


def test_every_byte_of_the_weights_counts(world: Path, tmp_path: Path) -> None:
    made = cached(world, tmp_path)
    place = teacher.TeacherLocation.of(
        made.run.distill, made.opened, shareable=True, add_note=print
    )
    weights = world / "teacher" / "model.safetensors"
    before = place.digest(made.run.distill, "float32")
    assert place.digest(made.run.distill, "bfloat16") != before
    whole = weights.read_bytes()
    flip(weights, len(whole) // 2)
    assert place.digest(made.run.distill, "float32") != before
    weights.write_bytes(whole)
    assert place.digest(made.run.distill, "float32") == before


# --- 4 and 8 bits


@pytest.mark.parametrize("kind", list(QUANTIZATIONS))
def test_a_teacher_in_few_bits(world: Path, tmp_path: Path, kind: str) -> None:
    """Its matrices really are; it distils; and its answers are near those of the whole, nearer in 8
    bits than in 4.
    """
    large = world / "large"
    if not large.exists():
        model_directory(large, spread=0.1, hidden_size=128, intermediate_size=128)
    made = material(world, {"teacher": str(large), "teacher_quantize": kind, "loss": "jsd"})
    task, models = parts(build_distill(made))
    held = quantized_linears(models["teacher"].model)
    assert {product.quantization.name for product in held.values()} == {kind}
    assert math.isfinite(loss_of(made, task, models))
    whole = build_distill(material(world, {"teacher": str(large), "loss": "jsd"})).models["teacher"]
    want = {"logprob": TokenScore(log_prob)}
    few, all_ = (m.score([made.held[0]], want)[0]["logprob"] for m in (models["teacher"], whole))
    assert 0 < (few - all_).norm() / all_.norm() < (0.02 if kind == "int8" else 0.1)


def test_an_adapter_on_few_bits_is_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match="merge the adapter first"):
        build_distill(
            material(world, {"teacher": str(world / "adapter"), "teacher_quantize": "nf4"})
        )


@pytest.mark.parametrize("student", [None, "nf4"])
def test_an_adapter_that_was_trained_on_few_bits(world: Path, student: str | None) -> None:
    """Its base is held as it was then: the student's where that is held so, else one of its own."""
    folder = world / "adapter-nf4"
    name = str(world / "student")
    packed = {"name": name, "quantize": "nf4"}
    if not folder.exists():
        run = described(world / "student", world / "rows.jsonl", world / "x")
        base = open_model(run.model.model_copy(update={"quantize": "nf4"}), print)
        attach(base.model, LoraSpec(r=2, init_lora_weights=False), "tutor", seed=2)
        save_adapter(base.model, folder, "tutor")
    model = packed if student else {"name": name}
    made = material(world, {"teacher_adapter": str(folder)}, model=model)
    _, models = parts(build_distill(made))
    assert (models["teacher"].model is made.opened.model) == (student is not None)
    held = quantized_linears(models["teacher"].model)
    assert {product.quantization.name for product in held.values()} == {"nf4"}
    assert bool(quantized_linears(made.opened.model)) == (student is not None)


def test_tokenizers_of_runs(world: Path) -> None:
    """A teacher without tokenizer files says so."""
    bare = world / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((world / "teacher" / name).read_bytes())
    with pytest.raises(ConfigError, match="has no tokenizer"):
        material(world, {"teacher": str(bare)})
    assert len(tokenizer()) == 320
