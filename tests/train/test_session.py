"""A run from its description to its directory: what is in it, when it may be written over, what
stops it before it starts.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorry.config import RunConfig, parse_settings
from lorry.errors import ConfigError, DataError
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

Describe = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyrun.model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture
def describe(model: Path, tmp_path: Path) -> Describe:
    """A description of 4 steps over 12 rows in ``tmp_path/run``; keywords change it."""
    data = tinyrun.write_rows(tmp_path / "data.jsonl", tinyrun.rows(12))

    def make(**settings: Any) -> RunConfig:
        given = {"max_steps": 4, "out": tmp_path / "run", "base": model, **settings}
        return tinyrun.described(
            given.pop("base"), given.pop("from_", data), given.pop("out"), **given
        )

    return make


def losses(folder: Path) -> list[float]:
    return [
        json.loads(line)["loss"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


# --- what a run leaves


def test_the_run_directory(describe: Describe, tmp_path: Path) -> None:
    heard = tinyrun.Heard()
    result = train_run(describe(test_size=2), ["a note of the config"], [heard])
    folder = tmp_path / "run"
    assert files(folder).keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorry_adapter.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "run.yaml",
        "metrics.jsonl",
        "receipt.json",
        "contracts.json",
        "losses.json",
        "samples.json",
        *(
            f"checkpoints/step-00000004/{name}"
            for name in ("state.safetensors", "meta.json", "manifest.json")
        ),
    }
    assert [(c["id"], c["status"]) for c in result.contracts] == [(n, "held") for n in range(1, 9)]
    assert json.loads((folder / "contracts.json").read_text()) == result.contracts
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["adapters"] == {
        "default": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    }
    assert (receipt["data"]["rows"], receipt["seed"]) == (10, 3)
    assert (
        0
        < receipt["loading_peak_bytes"]
        <= max(
            json.loads(line)["peak_memory_bytes"]
            for line in (folder / "metrics.jsonl").read_text().splitlines()
            if "peak_memory_bytes" in line
        )
    )
    assert receipt["trained_bytes"] > 0
    assert receipt["base"]["path"] == str(describe().model.name)
    card = (folder / "README.md").read_text()
    assert f"| last loss | {losses(folder)[-1]} |" in card
    assert "- held: checkpoints are complete" in card
    assert heard.notes[0] == "a note of the config"
    assert "10 rows, 10 sequences" in heard.notes[1]


def test_the_description_written_is_the_run_again(describe: Describe, tmp_path: Path) -> None:
    run = describe(lora_dropout=0.1)
    train_run(run, [])
    assert parse_settings(RunConfig, [str(tmp_path / "run" / "run.yaml")], print) == run
    first = files(tmp_path / "run")["adapter_model.safetensors"]
    train_run(
        parse_settings(
            RunConfig,
            [str(tmp_path / "run" / "run.yaml"), f"output_dir={tmp_path / 'again'}"],
            print,
        ),
        [],
    )
    assert files(tmp_path / "again")["adapter_model.safetensors"] == first


def test_peft_opens_the_run_directory(describe: Describe, model: Path, tmp_path: Path) -> None:
    result = train_run(describe(learning_rate=3e-2), [])
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 200, 31, 7, 8, 300]])
    with torch.no_grad():
        plain, mine = base(ids).logits, result.model(ids).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "run")(ids).logits
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert (mine - plain).abs().max() > 1e-2


def test_the_batch_shape_does_not_change_the_losses(describe: Describe, tmp_path: Path) -> None:
    """With shuffling and dropout; rows keep their masks whoever they share a micro-batch with."""
    curves = []
    for rows, accumulation in ((6, 1), (3, 2), (1, 6)):
        out = tmp_path / str(rows)
        shape = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        train_run(describe(out=out, lora_dropout=0.2, max_steps=6, **shape), [])
        curves.append(losses(out))
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert curves[0] == pytest.approx(curves[2], rel=1e-6)


def test_held_out_rows_that_fill_the_context_are_not_asked(
    describe: Describe, tmp_path: Path
) -> None:
    """They are evaluated all the same; only an answer of the model's own has no room behind them."""
    long = {"question": "x" * 108, "answer": "Y"}  # 126 tokens, Y and the end: exactly the context
    held = tinyrun.write_rows(tmp_path / "held.jsonl", [long, *tinyrun.rows(1, start=30)])
    train_run(describe(eval=str(held), max_length=128), [])
    asked = [
        row
        for row in json.loads((tmp_path / "run" / "samples.json").read_text())
        if row["group"] == "held-out rows"
    ]
    assert [row["reference"] for row in asked] == [tinyrun.rows(1, start=30)[0]["answer"]]


def test_a_streamed_run_counts_nothing_it_has_not_read(describe: Describe, tmp_path: Path) -> None:
    data = tinyrun.write_rows(
        tmp_path / "s.jsonl", [*tinyrun.rows(5), {"question": "And?", "answer": ""}]
    )
    result = train_run(describe(from_=data, streaming=True, on_bad_row="skip"), [])
    eight = result.contracts[7]
    assert eight["detail"].startswith(
        f"{data}: streamed, rows are read while training; left out so far: 1 row ("
    )
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())["data"]
    assert receipt == {"source": str(data), "streamed": True, "left_out": receipt["left_out"]}
    assert sum(receipt["left_out"].values()) == 1


# --- writing over an earlier run


class Stopped(Exception):
    """The run ends here, as a kill would have it."""


class StopAt(tinyrun.Heard):
    def step(self, record: StepRecord) -> None:
        super().step(record)
        if record["step"] == 3:
            raise Stopped


def test_a_finished_run_is_written_over(describe: Describe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_run(describe(max_steps=6, save_total_limit=None, save_steps=2), [])
    for name in ("report.html", "evaluation.json"):
        (folder / name).write_text("{}")
    train_run(describe(max_steps=3), [])
    assert len(losses(folder)) == 3
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000003"]
    assert not files(folder).keys() & {"report.html", "evaluation.json"}


def test_an_unfinished_run_is_not_written_over(describe: Describe, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_run(describe(save_steps=2), [], [StopAt()])
    before = files(tmp_path / "run")
    with pytest.raises(
        ConfigError,
        match=r"run holds an unfinished run; add resume_from_checkpoint=auto to continue it, or use another",
    ):
        train_run(describe(save_steps=2), [])
    assert files(tmp_path / "run") == before


def test_a_run_that_never_saved_may_be_started_again(describe: Describe, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_run(describe(), [], [StopAt()])
    train_run(describe(), [])
    assert len(losses(tmp_path / "run")) == 4


def test_an_unfinished_run_in_a_finished_ones_place_is_not_taken_for_it(
    describe: Describe, tmp_path: Path
) -> None:
    """The results of the first run are gone as soon as the second one begins; what the second saved
    is protected.
    """
    train_run(describe(), [])
    for settings in ({}, {"resume_from_checkpoint": "auto"}):
        with pytest.raises(Stopped):
            train_run(describe(seed=5, save_steps=2, **settings), [], [StopAt()])
        assert not files(tmp_path / "run").keys() & {
            "receipt.json",
            "adapter_model.safetensors",
            "README.md",
        }
        with pytest.raises(ConfigError, match="unfinished run"):
            train_run(describe(), [])


@pytest.mark.parametrize(
    "wrong", ["no such data", "a bad row", "no such model", "no such target", "no such template"]
)
def test_a_run_that_cannot_start_costs_the_finished_one_nothing(
    describe: Describe, tmp_path: Path, wrong: str
) -> None:
    train_run(describe(), [])
    before = files(tmp_path / "run")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "Who?", "answer": "Me."}\n{"question": "Who?", "ans')
    settings: dict[str, Any] = {
        "no such data": {"from_": tmp_path / "none.jsonl"},
        "a bad row": {"from_": bad},
        "no such model": {"base": tmp_path / "none"},
        "no such target": {"target_modules": ["q_prj"]},
        "no such template": {"chat_template_path": str(tmp_path / "none.jinja")},
    }[wrong]
    with pytest.raises((ConfigError, DataError, ValueError)):
        train_run(describe(**settings), [])
    assert files(tmp_path / "run") == before


def test_training_goes_on_with_a_runs_adapter_in_place(describe: Describe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_run(describe(max_steps=12), [])
    first = losses(folder)
    default = {"r": 16, "max_steps": 12}
    heard = tinyrun.Heard()
    train_run(describe(base=folder, **default), [], [heard])
    assert any("training continues the adapter of" in note for note in heard.notes)
    assert losses(folder)[0] < first[0]
    assert losses(folder)[0] != first[0]
    with pytest.raises(ConfigError, match="already has an adapter"):
        train_run(describe(base=folder, r=4), [])


# --- resuming by path


def test_resume_by_path_into_another_directory(describe: Describe, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    train_run(describe(out=whole, save_steps=2, save_total_limit=None), [])
    for n, path in enumerate((whole / "checkpoints" / "step-00000002", whole)):
        new = tmp_path / f"new{n}"
        train_run(describe(out=new, save_steps=2, resume_from_checkpoint=str(path)), [])
        assert files(new)["adapter_model.safetensors"] == files(whole)["adapter_model.safetensors"]
        assert {c["status"] for c in json.loads(files(new)["contracts.json"])} == {"held"}


def test_resume_from_nothing_is_refused(describe: Describe, tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for where in ("none", "empty"):
        with pytest.raises(
            ConfigError,
            match=f"resume_from_checkpoint={tmp_path / where} is neither a checkpoint nor a run with one",
        ):
            train_run(describe(resume_from_checkpoint=str(tmp_path / where)), [])
    assert not (tmp_path / "run").exists()


# --- trackers


def test_a_missing_tracker_is_said_before_anything_is_loaded(
    describe: Describe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(
        "lorry.train.setup.base.open_model", lambda *_: pytest.fail("the model was loaded")
    )
    with pytest.raises(
        ConfigError,
        match=r"train\.report_to names wandb, which is not installed; pip install wandb",
    ) as e:
        train_run(describe(report_to=["wandb"]), [])
    assert e.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_tracker_hears_every_number(
    describe: Describe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    fake = SimpleNamespace(
        init=lambda **given: heard.append(given),
        log=lambda values, step: heard.append((step, values)),
        finish=lambda: heard.append("end"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train_run(describe(report_to=["wandb"], test_size=2, eval_steps=4), [])
    first, *steps, evaluation, end = heard
    assert (first["project"], first["name"], first["config"]["lora"]["r"]) == ("lorry", "run", 2)
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    assert [values["train/loss"] for _, values in steps] == losses(tmp_path / "run")
    assert evaluation[0] == 4
    assert evaluation[1].keys() == {"eval/loss", "eval/perplexity", "eval/token_accuracy"}
    assert end == "end"


# --- settings that cannot be met


def test_what_it_cannot_train(describe: Describe, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    with pytest.raises(
        ConfigError, match=r"bare has no tokenizer files; put tokenizer\.json beside the weights"
    ):
        train_run(describe(base=bare), [])
    assert not (tmp_path / "run").exists()


def test_an_earlier_finished_run_is_set_aside_and_nothing_of_it_is_lost(
    describe: Describe, tmp_path: Path
) -> None:
    first = train_run(describe(max_steps=2), []).path
    adapter = (first / "adapter_model.safetensors").read_bytes()
    train_run(describe(max_steps=3), [])
    assert (first / "previous" / "1" / "adapter_model.safetensors").read_bytes() == adapter
    assert (first / "previous" / "1" / "receipt.json").is_file()
    assert (first / "adapter_model.safetensors").read_bytes() != adapter
    train_run(describe(max_steps=2), [])
    assert sorted(p.name for p in (first / "previous").iterdir()) == ["1", "2"]
