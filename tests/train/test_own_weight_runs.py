"""Whole runs in which weights train in the base's place: norms, head, biases and rows, and new tokens. What is
left opens in PEFT over transformers, which is the judge; stopped and resumed bit for bit; beside others in
one pass; merged. float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorry
from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.variants.own_weights import OwnRows
from lorry.cli import main
from lorry.config.schema.model import ModelConfig
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.models.loading.open import open_model
from lorry.models.new_tokens import read_new_tokens
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support.mortal import World, finished, same
from tests.support.tinyrun import (
    Heard,
    described,
    model_directory,
    quick,  # noqa: F401 - a fixture
    rows,
    write_rows,
)

TOKENS = ["<think>", "</think>"]
CASES: dict[str, dict[str, Any]] = {
    "whole": {"modules_to_save": ["norm", "lm_head"]},
    "rows": {"trainable_token_indices": [5, 6, 7, 11], "bias": "all"},
    "new tokens": {"new_tokens": TOKENS},
}


class Stop(Exception):
    """The run ends here, as a kill would have it."""


class StopAt(Heard):
    """Ends a run at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.at = step

    def step(self, record: StepRecord) -> None:
        if record["step"] == self.at:
            raise Stop


@pytest.fixture(scope="module")
def thoughts(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world with the new tokens in its rows."""
    path = tmp_path_factory.mktemp("thoughts") / "data.jsonl"
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    for row in rows:
        row["answer"] = f"<think>{row['answer']}</think>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(world.model, path, path)


@pytest.fixture(scope="module", params=list(CASES))
def whole(
    request: pytest.FixtureRequest, thoughts: World, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp("own")
    return request.param, folder, train_run(thoughts.run(folder, **CASES[request.param]), [])


def test_peft_opens_what_was_trained(
    whole: tuple[str, Path, Any], thoughts: World, tmp_path: Path
) -> None:
    name, folder, result = whole
    run = folder / "run"
    held = {c["id"]: c["status"] for c in result.contracts}
    assert held == dict.fromkeys(range(1, 9), "held")
    tokenizer = AutoTokenizer.from_pretrained(run)
    text = tokenizer("<think> the red lorry </think>", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(thoughts.model, dtype=torch.float32)
    rows = base.get_input_embeddings().weight.shape[0]
    if name == "new tokens":
        assert tokenizer.convert_tokens_to_ids(TOKENS) == [rows, rows + 1]
        assert set(text[0].tolist()) >= {rows, rows + 1}
        base.resize_token_embeddings(len(tokenizer))
    theirs = peft.PeftModel.from_pretrained(base, run).eval()
    with torch.no_grad():
        wanted = theirs(text).logits
    model, own = lorry.load(run)
    assert own("<think> the red lorry </think>")["input_ids"] == text[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(text).logits, wanted, rtol=1e-4, atol=1e-4)
        get_bank(model).activate(Mix.none())
        assert (model(text).logits - wanted).abs().max() > 1e-3, "the adapter must matter"
    receipt = json.loads((run / "receipt.json").read_text())
    tensors = load_file(run / "adapter_model.safetensors")
    assert receipt["trainable_parameters"] == sum(t.numel() for t in tensors.values())
    assert ("resize_token_embeddings" in (run / "README.md").read_text()) == (name == "new tokens")
    # the verb opens what it wrote with PEFT, and compares logits
    assert main(["export", str(run), "to=peft", f"output_dir={tmp_path / 'peft'}"]) == 0
    # merged, it is a model and a tokenizer that agree
    assert main(["merge", str(run), f"output_dir={tmp_path / 'merged'}", "dtype=float32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.tie_word_embeddings == (name != "whole")
    with torch.no_grad():
        torch.testing.assert_close(merged(text).logits, wanted, rtol=1e-4, atol=1e-4)
    beside = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert beside("<think> the red lorry </think>")["input_ids"] == text[0].tolist()


@pytest.mark.parametrize("step", [5, 9])
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    whole: tuple[str, Path, Any], thoughts: World, step: int, tmp_path: Path
) -> None:
    name, folder, _ = whole
    with pytest.raises(Stop):
        train_run(thoughts.run(tmp_path, **CASES[name]), [], [StopAt(step)])
    train_run(thoughts.run(tmp_path, **CASES[name]), [])
    same(finished(tmp_path), finished(folder), f"{name} stopped at {step}")


def test_jobs_have_their_own_and_are_as_they_would_be_alone(
    thoughts: World, tmp_path: Path
) -> None:
    """Norms of one, rows of another, a plain one, in one pass; new tokens are the whole run's."""
    jobs = [
        {"name": "whole", "modules_to_save": ["norm"]},
        {"name": "rows", "trainable_token_indices": [5, 6]},
        {"name": "plain"},
    ]
    shared = {"new_tokens": TOKENS, "load_best_model_at_end": False, "max_steps": 3}
    result = train_run(thoughts.run(tmp_path / "all", jobs=jobs, **shared), [])
    for job in jobs:
        own = {key: value for key, value in job.items() if key != "name"}
        alone = train_run(thoughts.run(tmp_path / job["name"], **own, **shared), [])
        wanted = get_bank(alone.model)["default"]
        got = get_bank(result.model)[job["name"]]
        assert list(got.tensors()) == list(wanted.tensors())
        torch.testing.assert_close(got.values, wanted.values, rtol=1e-4, atol=1e-6)


def test_on_megatrons_layers_they_are_refused(thoughts: World, tmp_path: Path) -> None:
    """Before anything is read; `tests/verbs/test_own_weights_on_ranks.py` trains with the others."""
    for own in (*CASES.values(), {"jobs": [{"name": "a"}, {"name": "b", "bias": "all"}]}):
        with pytest.raises(ConfigError, match="use backend=single, ddp or fsdp"):
            thoughts.run(tmp_path, **own, backend="megatron")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"new_tokens": ["<think>", "<think>"]}, "names '<think>' twice"),
        ({"new_tokens": ["<|im_end|>"]}, "'<|im_end|>', which the tokenizer has"),
        ({"new_tokens": [" "]}, "not empty"),
        ({"new_tokens": "<think>"}, "no such file; write tokens as a list"),
        ({"new_tokens": []}, "is empty"),
        ({"trainable_token_indices": [100000]}, "rows, 0 to"),
        ({"modules_to_save": ["nrom"]}, "matches no module (did you mean"),
        ({"new_tokens": TOKENS, "modules_to_save": ["embed"]}, "both train"),
    ],
)
def test_bad_settings_are_told_in_a_line(
    settings: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        train_run(world.run(tmp_path, **settings), [])
    assert message in str(caught.value)


def test_tokens_come_from_files_too(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text('{"</think>": 321, "<think>": 320}')
    (tmp_path / "tokens.txt").write_text("<a>\n\n<b>\n")
    assert read_new_tokens(str(tmp_path / "added_tokens.json")) == TOKENS
    assert read_new_tokens(str(tmp_path / "tokens.txt")) == ["<a>", "<b>"]
    (tmp_path / "added_tokens.json").write_text('{"<think>": "x"}')
    with pytest.raises(ConfigError, match="not an added_tokens file"):
        read_new_tokens(str(tmp_path / "added_tokens.json"))


def test_damaged_facts_are_refused(whole: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, folder, _ = whole
    if name != "new tokens":
        return
    shutil.copytree(folder / "run", tmp_path / "run")
    facts = tmp_path / "run" / "lorry_adapter.json"
    written = json.loads(facts.read_text())
    for damaged, message in [
        ({"pieces": [[1, ["x"]]], "init": "mean"}, "not what Lorry writes"),
        ({"pieces": [[400, [9999]]], "init": "subtokens"}, "made of token 9999"),
        # that many rows, most of no token
        ({"pieces": [[2**30, [5]]], "init": "mean"}, "do not follow one another"),
    ]:
        facts.write_text(json.dumps({**written, "new_tokens": damaged}))
        with pytest.raises(ModelError, match=message):
            lorry.load(tmp_path / "run")


def test_rows_whose_tokens_come_late_do_not_stop_a_run(tmp_path: Path) -> None:
    """Of a model whose head is a matrix of its own: a row of its embedding has a gradient where its token
    occurs alone. Float32."""
    model = model_directory(tmp_path / "untied", tie_word_embeddings=False)
    data = write_rows(tmp_path / "data.jsonl", rows(12))
    run = described(model, data, tmp_path / "run", new_tokens=["<later>"], max_steps=4)
    held = {c["id"]: (c["status"], c["detail"]) for c in train_run(run, []).contracts}
    assert {status for status, _ in held.values()} == {"held"}
    assert "1 modules got no supervised token" in held[3][1]
    values = load_file(tmp_path / "run" / "adapter_model.safetensors")
    # the head's row has one at every target
    assert {n.rpartition(".")[0] for n in values if n.endswith("_delta")} == {
        "base_model.model.model.embed_tokens.token_adapter",
        "base_model.model.lm_head.token_adapter",
    }


def test_rows_whose_tokens_occur_have_to_get_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_directory(tmp_path / "untied", tie_word_embeddings=False)
    made = [{**row, "question": f"<now> {row['question']}"} for row in rows(12)]
    data = write_rows(tmp_path / "data.jsonl", made)
    find = OwnRows.find

    def detached(self: OwnRows, ids: Any) -> Any:
        positions, order = find(self, ids)
        return positions[:0], order[:0]

    monkeypatch.setattr(OwnRows, "find", detached)
    run = described(model, data, tmp_path / "run", new_tokens=["<now>"], max_steps=4)
    with pytest.raises(ContractError, match=r"no gradient reached model\.embed_tokens"):
        train_run(run, [])


def test_tokens_that_no_row_holds_are_said(world: World, tmp_path: Path) -> None:
    heard = Heard()
    run = world.run(tmp_path / "tied", new_tokens=TOKENS, trainable_token_indices=[0], max_steps=2)
    train_run(run, [], [heard])
    (note,) = [n for n in heard.notes if "whose rows train" in n]
    assert "no row holds 2 of the 3 tokens" in note
    assert "320 ('<think>'), 321 ('</think>')" in note


def test_a_base_with_an_adapter_beside_it_knows_its_new_tokens(
    thoughts: World, tmp_path: Path
) -> None:
    """`model=BASE adapter=RUN` is the run: its tokenizer, not the base's, which would cut the tokens."""
    train_run(thoughts.run(tmp_path / "first", new_tokens=TOKENS, max_steps=3), [])
    first = tmp_path / "first" / "run"
    ids = AutoTokenizer.from_pretrained(first)(TOKENS[0])["input_ids"]
    assert len(ids) == 1
    opened = open_model(ModelConfig(name=str(thoughts.model), adapter=str(first)), print)
    assert opened.tokenizer(TOKENS[0])["input_ids"] == ids
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "lorry_adapter.json"):
        shutil.copy(first / name, bare / name)
    with pytest.raises(ModelError, match="put the tokenizer that it was trained with beside it"):
        open_model(ModelConfig(name=str(thoughts.model), adapter=str(bare)), print)
