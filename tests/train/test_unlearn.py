"""`lorry unlearn` as a run: the start stays as it was under the new adapter, rows of several sets
share the steps, a killed run goes on bit for bit, and bad input is one error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.config import ModelConfig, UnlearnRunConfig, build_settings
from lorry.config.unlearning.unlearn import NEED_ALTERNATES, UNLEARN_METHODS
from lorry.disk.integrity import file_digest
from lorry.errors import ConfigError, ContractError, DataError, LorryError
from lorry.models.loading.open import open_model
from lorry.tasks.unlearn.alternates import read_refusals
from lorry.tasks.unlearn.methods.registry import METHOD_CLASSES
from lorry.tasks.unlearn.settings import SETTINGS
from lorry.train.session import TrainResult, train_run
from lorry.train.setup import adapters
from tests.support import tinyrun
from tests.support.tinyrun import quick  # noqa: F401

STEPS = 6
FORGET, RETAIN = 7, 11


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, a run that learnt all rows, rows to forget and rows to retain."""
    folder = tmp_path_factory.mktemp("world")
    tinyrun.model_directory(folder / "model", num_hidden_layers=2)
    everything = tinyrun.rows(FORGET + RETAIN)
    tinyrun.write_rows(folder / "all.jsonl", everything)
    tinyrun.write_rows(folder / "forget.jsonl", everything[:FORGET])
    tinyrun.write_rows(folder / "retain.jsonl", everything[FORGET:])
    start = tinyrun.described(
        folder / "model", folder / "all.jsonl", folder / "start", max_steps=20, r=4,
        lora_dropout=0.2, learning_rate=3e-2,
    )  # fmt: skip
    train_run(start, [])
    return folder


def described(world: Path, out: Path, **settings: Any) -> UnlearnRunConfig:
    given = {
        "model": {"name": str(world / "start")},
        "forget": str(world / "forget.jsonl"),
        "retain": str(world / "retain.jsonl"),
        "output_dir": str(out),
        "max_steps": STEPS,
        **tinyrun.DEFAULTS,
        **settings,
    }
    return build_settings(UnlearnRunConfig, given, print)


def base_run(world: Path, model: Path, out: Path) -> UnlearnRunConfig:
    """The model's own weights unlearn."""
    given = {
        "model": {"name": str(model)},
        "forget": str(world / "forget.jsonl"),
        "retain": str(world / "retain.jsonl"),
        "output_dir": str(out),
        "max_steps": STEPS,
        "lora": None,
        **{name: value for name, value in tinyrun.DEFAULTS.items() if name != "r"},
    }
    return build_settings(UnlearnRunConfig, given, print)


def unlearn(world: Path, out: Path, **settings: Any) -> TrainResult:
    return train_run(described(world, out, **settings), [])


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [record for record in records(out) if "loss" in record]


def logits(opened: Any, mix: Mix) -> Tensor:
    get_bank(opened.model, create=True).activate(mix)
    with torch.no_grad():
        return opened.model(torch.arange(3, 30)[None]).logits


def test_the_start_stays_and_the_adapter_comes_off(world: Path, tmp_path: Path) -> None:
    before = file_digest(world / "start/adapter_model.safetensors")
    result = unlearn(world, tmp_path / "run", lora_dropout=0.1)
    assert file_digest(world / "start/adapter_model.safetensors") == before
    assert {c["status"] for c in result.contracts} == {"held"}
    start = open_model(ModelConfig(name=str(world / "start"), dtype="float32"), print)
    again = open_model(ModelConfig(name=str(tmp_path / "run"), dtype="float32"), print)
    of_start = logits(start, Mix.one(start.adapters[0]))
    assert torch.equal(logits(again, Mix.none()), of_start)
    changed = logits(again, Mix.one(again.adapters[0]))
    assert (changed - of_start).abs().max() > 1e-3
    half = logits(again, Mix.constants({again.adapters[0]: 0.5}))
    assert not torch.equal(half, changed)
    assert not torch.equal(half, of_start)


@pytest.mark.parametrize("settings", [{}, {"subjects": [{"name": "a"}, {"name": "b", "r": 1}]}])
def test_a_start_that_moves_breaks_contract_2(
    settings: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no parameter of the model and no adapter of the run: no other check would see it."""
    seen: list[Any] = []
    original = adapters.attach_adapter

    def attach(run: Any, opened: Any, notes: Any) -> str:
        seen.append(opened.model)
        return original(run, opened, notes)

    monkeypatch.setattr(adapters, "attach_adapter", attach)

    class Nudge(tinyrun.Heard):
        def step(self, record: Any) -> None:
            if record["step"] == 2:
                (start,) = get_bank(seen[0]).base_adapters.values()
                # the last bit of one value
                last = start.values.detach()[-1:].view(torch.int32)
                last ^= 1

    message = "contract 2 broken .*a weight of the base model or of a frozen adapter changed during training"
    with pytest.raises(ContractError, match=message):
        train_run(described(world, tmp_path / "run", **settings), [], [Nudge()])
    contracts = json.loads((tmp_path / "run/contracts.json").read_text())
    assert contracts[1]["status"] == "failed"
    assert not list((tmp_path / "run").glob("adapter_model*"))


def test_the_card_and_the_receipt_name_every_row_set(world: Path, tmp_path: Path) -> None:
    (tmp_path / "no.txt").write_text("no idea\nwho knows\n")
    unlearn(world, tmp_path / "run", method="DPO", idk=str(tmp_path / "no.txt"), max_steps=1)
    data = json.loads((tmp_path / "run/receipt.json").read_text())["data"]
    others = data["forget alternates"]
    assert (data["rows"], data["retain"]["rows"]) == (FORGET, RETAIN)
    # a refusal for each row and epoch, of which three is the default
    assert others["sequences"] == 3 * FORGET
    assert len({data["sha256"], data["retain"]["sha256"], others["sha256"]}) == 3
    card = (tmp_path / "run/README.md").read_text()
    for role, name in {"forget": "forget.jsonl", "retain": "retain.jsonl", "idk": "no.txt"}.items():
        assert f"| {role} | `{name}` |" in card, role
    assert others["sha256"] in card
    assert str(tmp_path) not in card


def test_npo_begins_at_its_constant_and_forgets(world: Path, tmp_path: Path) -> None:
    """(2 / beta) ln 2: the policy is the start, dropout of either notwithstanding (that of the
    new one multiplies a zero)."""
    unlearn(world, tmp_path / "run", max_steps=20, lora_dropout=0.3, eval_on_start=True)
    first, *_, last = steps_of(tmp_path / "run")
    assert first["loss_forget"] == pytest.approx(20 * 0.6931471805599453, rel=1e-6)
    assert last["loss_forget"] < first["loss_forget"]
    evaluations = [record for record in records(tmp_path / "run") if "eval_balance" in record]
    assert evaluations[0]["step"] == 0
    assert evaluations[0]["eval_balance"] == pytest.approx(0, abs=1e-6)
    assert evaluations[0]["eval_retain_kept"] == pytest.approx(1, rel=1e-6)
    assert evaluations[-1]["eval_forget_probability"] < evaluations[0]["eval_forget_probability"]


@pytest.mark.parametrize("method", sorted(UNLEARN_METHODS))
def test_every_method_trains(method: str, world: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"method": method}
    if method == "AltPO":
        rows = tinyrun.rows(FORGET)
        tinyrun.write_rows(
            tmp_path / "other.jsonl",
            [
                {"question": row["question"], "alternate": f"{i} {word} cats"}
                for i, row in enumerate(rows)
                for word in ("grey", "pink")
            ],
        )
        own["alternates"] = str(tmp_path / "other.jsonl")
    if "layer" in UNLEARN_METHODS[method]:
        own["layer"] = 0
    if method == "PDU":
        own["dual_warmup_epochs"] = 0
    result = unlearn(world, tmp_path / "run", **own)
    assert {c["status"] for c in result.contracts} == {"held"}
    assert len(steps_of(tmp_path / "run")) == STEPS
    if method == "RMU":
        assert all(".0." in path for path in get_bank(result.model)["default"].slots)


def test_the_table_of_settings_is_of_the_methods_there_are() -> None:
    assert set(UNLEARN_METHODS) == set(METHOD_CLASSES)
    for name, settings in UNLEARN_METHODS.items():
        assert settings.keys() <= set(SETTINGS), name
        assert METHOD_CLASSES[name].needs_alternates == (name in NEED_ALTERNATES), name


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "NPO", "gradient": "sam"},
        {"method": "NPO", "gradient": "gru"},
        {"method": "PDU", "dual_warmup_epochs": 0, "layer": 0},
        {"method": "DPO", "anchor": "retain"},
    ],
    ids=str,
)
def test_killed_and_resumed_bit_for_bit(
    settings: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    own: dict[str, Any] = {**settings, "save_steps": 2, "lora_dropout": 0.1}
    unlearn(world, tmp_path / "whole", **own)
    out = tmp_path / "resumed"

    class Stop(Exception):
        pass

    class Killer(tinyrun.Heard):
        def step(self, record: Any) -> None:
            super().step(record)
            if record["step"] == 3:
                raise Stop

    run = described(world, out, resume_from_checkpoint="auto", **own)
    with pytest.raises(Stop):
        train_run(run, [], [Killer()])
    train_run(run, [])
    left, right = tmp_path / "whole", out
    name = "adapter_model.safetensors"
    assert (left / name).read_bytes() == (right / name).read_bytes()
    timeless = [
        [{k: v for k, v in r.items() if k not in ("seconds", "peak_memory_bytes")} for r in rs]
        for rs in (records(left), records(right))
    ]
    assert timeless[0] == timeless[1]


def test_an_epoch_is_a_pass_over_the_anchor(world: Path, tmp_path: Path) -> None:
    """11 rows to retain and 7 to forget, 2 at a time: 6 steps and 4; warm-up counts in them."""
    own = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2}
    for anchor, steps in {"retain": 6, "forget": 4}.items():
        out = tmp_path / anchor
        unlearn(world, out, method="GradDiff", anchor=anchor, warmup_epochs=0.5, **own)
        made = steps_of(out)
        assert len(made) == 2 * steps
        assert [record["epoch"] for record in made][steps - 1] == 1
        top = max(range(2 * steps), key=lambda at: made[at]["learning_rate"])
        assert top == steps // 2


def test_texts_of_a_corpus_are_joined_and_may_not_be_shared(world: Path, tmp_path: Path) -> None:
    texts = [f"{row['question']} {row['answer']}" for row in tinyrun.rows(8)]
    folder = tmp_path / "News/raw"
    folder.mkdir(parents=True)
    (folder / "forget.json").write_text(json.dumps(texts[:3]))
    (folder / "retain1.json").write_text(json.dumps(texts[3:]))
    # it holds what is to be forgotten, at places where no sequence begins
    (folder / "both.json").write_text(json.dumps(texts))
    own: dict[str, Any] = {
        "method": "GradDiff", "forget": "muse:News/raw/forget", "local": {"muse": str(tmp_path)},
        "max_length": 24, "max_steps": 2,
    }  # fmt: skip
    unlearn(world, tmp_path / "run", retain="muse:News/raw/retain1", **own)
    receipt = json.loads((tmp_path / "run/receipt.json").read_text())
    assert "joined with blank lines and cut every 24 tokens" in json.dumps(receipt) + "".join(
        path.read_text() for path in (tmp_path / "run").glob("*.json*")
    )
    with pytest.raises(DataError, match=r"element 0 in the forget set and .* \(3 texts in all\)"):
        unlearn(world, tmp_path / "bad", retain="muse:News/raw/both", **own)


def test_with_another_anchor_the_same_pairs_train_alike(world: Path, tmp_path: Path) -> None:
    """One step over all rows of both sets of one size: which of them sets the pace changes nothing."""
    rows = [json.loads(line) for line in (world / "retain.jsonl").read_text().splitlines()]
    tinyrun.write_rows(tmp_path / "retain.jsonl", rows[:FORGET])
    own = {
        "method": "NPO", "max_steps": 3, "per_device_train_batch_size": FORGET,
        "retain": str(tmp_path / "retain.jsonl"),
    }  # fmt: skip
    losses = []
    for anchor in ("forget", "retain"):
        unlearn(world, tmp_path / anchor, anchor=anchor, **own)
        losses.append([record["loss"] for record in steps_of(tmp_path / anchor)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_packing_and_accumulation_change_nothing(world: Path, tmp_path: Path) -> None:
    """The same rows a step, laid out otherwise."""
    losses = []
    for out, own in {
        "a": {"per_device_train_batch_size": 4},
        "b": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    }.items():
        unlearn(world, tmp_path / out, method="GradDiff", layer=0, learning_rate=1e-3, **own)
        losses.append([record["loss"] for record in steps_of(tmp_path / out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)


def test_the_base_itself_unlearns(world: Path, tmp_path: Path) -> None:
    """lora=null from a model without adapters: the start is remembered, row by row."""
    result = train_run(base_run(world, world / "model", tmp_path / "run"), [])
    assert {c["status"] for c in result.contracts} <= {"held", "skipped"}
    first = steps_of(tmp_path / "run")[0]
    assert first["loss_forget"] == pytest.approx(20 * 0.6931471805599453, rel=1e-4)


@pytest.mark.parametrize("method", ["DPO", "PDU"])
def test_jobs_are_the_runs_alone(method: str, world: Path, tmp_path: Path) -> None:
    """Two subjects with numbers of their own, in one pass: each adapter is the one of its own run,
    to rounding of other shapes."""
    everything = tinyrun.rows(FORGET + RETAIN)
    tinyrun.write_rows(tmp_path / "few.jsonl", everything[:3])
    own = {
        "a": {"forget": str(tmp_path / "few.jsonl"), "gamma": 0.5},
        "b": {"learning_rate": 1e-3, "alpha": 2.0, "max_steps": 4},
    }
    shared: dict[str, Any] = {"method": method, "layer": 0, "eval_on_start": True}
    if method == "PDU":
        shared |= {"dual_warmup_epochs": 0, "retain_loss_eps": 0.1}
    jobs = [{"name": name, **settings} for name, settings in own.items()]
    together = unlearn(world, tmp_path / "together", subjects=jobs, **shared)
    assert {c["status"] for c in together.contracts} == {"held"}
    for name, settings in own.items():
        alone = unlearn(world, tmp_path / name, adapter_name=name, **shared, **settings)
        for tensor, value in bank_tensors(alone, name).items():
            close = bank_tensors(together, name)[tensor]
            assert torch.allclose(close, value, rtol=1e-3, atol=2e-5), (name, tensor)
    last = [r["adapters"] for r in records(tmp_path / "together") if "eval_balance" in r][-1]
    assert {"eval_retain_kept", "eval_forget_probability"} <= last["a"].keys()
    again = open_model(ModelConfig(name=str(tmp_path / "together"), dtype="float32"), print)
    assert set(again.adapters) == {"a", "b"}
    both = logits(again, Mix.constants({"a": 1.0, "b": 1.0}))
    assert not torch.equal(both, logits(again, Mix.one("a")))


def bank_tensors(result: TrainResult, name: str) -> dict[str, Tensor]:
    adapter = get_bank(result.model)[name]
    return adapter.split_like(adapter.values)


def test_collapse_is_said(world: Path, tmp_path: Path) -> None:
    heard = tinyrun.Heard()
    run = described(world, tmp_path / "run", method="GradAscent", learning_rate=0.2, max_steps=12)
    train_run(run, [], [heard])
    assert any(note.startswith("COLLAPSE") for note in heard.notes), heard.notes


def test_a_collapse_ends_the_run_with_the_last_good_adapter(world: Path, tmp_path: Path) -> None:
    """It is the adapter of the evaluation before, not the one that balances best."""
    own: dict[str, Any] = {"method": "GradAscent", "learning_rate": 2e-2, "lr_scheduler_type": "constant",
                           "eval_strategy": "steps", "eval_steps": 1, "max_steps": 40}  # fmt: skip
    result = unlearn(world, tmp_path / "run", early_stop="collapse", **own)
    kept = [r["eval_retain_kept"] for r in records(tmp_path / "run") if "eval_balance" in r]
    stopped = len(kept)
    assert 2 <= stopped < 40, kept
    assert min(kept[:-1]) >= 0.5 > kept[-1]
    assert result.outcome.steps == stopped
    assert result.outcome.best_step == stopped - 1
    shorter = unlearn(world, tmp_path / "short", **{**own, "max_steps": stopped - 1})
    for tensor, value in bank_tensors(shorter, "default").items():
        assert torch.equal(bank_tensors(result, "default")[tensor], value), tensor


def wrong(world: Path, tmp_path: Path, match: str, **settings: Any) -> None:
    with pytest.raises(LorryError, match=match):
        unlearn(world, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.safetensors"))


def test_bad_settings(world: Path, tmp_path: Path) -> None:
    bad = {
        "delta is not used by NPO": {"delta": 1.0},
        "NPOO' is not a method.*did you mean .NPO": {"method": "NPOO"},
        "retain is missing": {"retain": None},
        "greater than 0|above 0": {"beta": 0},
        "layers, 0 to 1|layers_to_transform": {"method": "RMU", "layer": 5},
        "alternates is missing": {"method": "AltPO"},
        "forget=FILE": {"forget": None, "data": {"path": str(world / "all.jsonl")}},
        "streaming": {"streaming": True},
        "early_stop=collapse needs a retain set": {
            "method": "GradAscent",
            "retain": None,
            "early_stop": "collapse",
        },
        "sam_rho is used with gradient=sam": {"sam_rho": 0.1},
        "gradient=gru needs a retain loss": {"gradient": "gru", "alpha": 0},
        "anchor=retain needs a retain set": {"anchor": "retain", "alpha": 0},
        "both end a run": {"early_stop": "collapse", "early_stopping_patience": 2},
    }
    for match, settings in bad.items():
        wrong(world, tmp_path, match, **settings)


def test_a_row_to_forget_and_to_retain(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"forget.jsonl:1 in the forget set and .*all.jsonl:1"):
        unlearn(world, tmp_path / "run", retain=str(world / "all.jsonl"))


def test_an_empty_alternate_and_refusal(world: Path, tmp_path: Path) -> None:
    (tmp_path / "idk.txt").write_text("no idea\n\nnone\n")
    with pytest.raises(DataError, match=r"idk.txt:2: an empty line"):
        unlearn(world, tmp_path / "run", method="DPO", layer=0, idk=str(tmp_path / "idk.txt"))
    question = tinyrun.rows(1)[0]["question"]
    tinyrun.write_rows(tmp_path / "alt.jsonl", [{"question": question, "alternate": " "}])
    with pytest.raises(DataError, match=r"alt.jsonl:1: an empty alternate"):
        unlearn(world, tmp_path / "run", method="DPO", alternates=str(tmp_path / "alt.jsonl"))


def test_base_weights_over_an_adapter(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="merge it first"):
        train_run(base_run(world, world / "start", tmp_path / "run"), [])


def test_the_same_question_on_both_sides_is_said(world: Path, tmp_path: Path) -> None:
    row = tinyrun.rows(1)[0]
    retain = tinyrun.write_rows(
        tmp_path / "r.jsonl", [{**row, "answer": row["answer"] + " "}, *tinyrun.rows(4, start=20)]
    )
    heard = tinyrun.Heard()
    train_run(described(world, tmp_path / "run", retain=str(retain), max_steps=1), [], [heard])
    assert any("the question of a retain row" in note for note in heard.notes), heard.notes


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "GradDiff", "retain_loss": "EMBED"},
        {"method": "RMU", "retain_loss": "NLL"},
        {"method": "RMU", "alpha": 0},
    ],
    ids=["EMBED", "RMU-NLL", "RMU-alone"],
)
def test_a_layer_beyond_the_model(settings: Any, world: Path, tmp_path: Path) -> None:
    """The default layer is 7; the model has two."""
    with pytest.raises(LorryError, match=r"layers, 0 to 1|layers_to_transform"):
        unlearn(world, tmp_path / "run", **settings)
    assert not list((tmp_path / "run").glob("metrics.jsonl"))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "NPO", "layer": 5},
        {"method": "NPO", "peer_masks": True},
        {"method": "NPO", "retain_loss": "KL", "alpha": 0},
        {"method": "GradAscent", "peer_masks": True},
        {"method": "GradDiff", "retain_loss": "KL", "layer": 1},
    ],
)
def test_a_setting_that_changes_nothing_is_an_error(
    settings: Any, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="changes nothing here"):
        described(world, tmp_path / "run", **settings)


def test_a_first_collapse_keeps_nothing(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="had already collapsed at its first evaluation"):
        unlearn(
            world, tmp_path / "run", method="GradAscent", learning_rate=0.3, early_stop="collapse",
            eval_steps=2, max_steps=12,
        )  # fmt: skip
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_refusals_of_other_editors(world: Path, tmp_path: Path) -> None:
    """A byte order mark and carriage returns are no part of a refusal."""
    path = tmp_path / "idk.txt"
    path.write_bytes("\ufeffno idea\r\nfoo\x0cbar\r\n".encode())
    assert read_refusals(str(path)) == ["no idea", "foo\x0cbar"]


def test_an_alternate_that_cuts_the_question_is_said(world: Path, tmp_path: Path) -> None:
    """Our own refusals: one of those drawn is a token too long for a row."""
    heard = tinyrun.Heard()
    train_run(described(world, tmp_path / "run", method="DPO", max_steps=1), [], [heard])
    assert any("longer than max_length" in note for note in heard.notes), heard.notes
