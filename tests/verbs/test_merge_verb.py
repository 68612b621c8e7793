"""`lorry merge` and `lorry unmerge`: the merged model is the adapter's for transformers too; the
base comes back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorry as library
from lorry.models.loading import store
from lorry.verbs.checks import probe
from tests.support.tiny import MAMBA2, random_model
from tests.support.verbworld import (
    PEOPLE,
    World,
    lorry,
    model_directory,
    tokenizer,
    train,
    write_rows,
)

WEIGHTS = "model.safetensors"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def logits_of(path: Path, text: str = "Where does Mara live?") -> torch.Tensor:
    """transformers' logits of a directory, in fp32."""
    model, words = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    with torch.no_grad():
        return model(**words(text, return_tensors="pt")).logits


@pytest.fixture(scope="module")
def merged(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merge") / "merged"
    assert lorry("merge", world.run, f"output_dir={output}") == 0
    return output


def test_the_merged_model_is_the_adapter_s_model(world: World, merged: Path) -> None:
    model, words = library.load(world.run, dtype="float32")
    with torch.no_grad():
        ours = model(words("Where does Mara live?", return_tensors="pt").input_ids).logits
    assert (logits_of(merged) - ours).abs().max() < 1e-4
    assert (logits_of(merged) - logits_of(world.base)).abs().max() > 1  # the adapter does something


def test_it_evaluates_as_the_adapter_does(world: World, merged: Path, tmp_path: Path) -> None:
    found = []
    for model in (world.run, merged):
        copy = shutil.copytree(model, tmp_path / model.name)
        arguments = (
            f"data={world.rows}",
            "dtype=float32",
            "max_new_tokens=16",
            f"output_dir={tmp_path / 'out.json'}",
        )
        assert lorry("eval", copy, *arguments) == 0
        found.append(json.loads((tmp_path / "out.json").read_text()))
    beside, folded = found[0]["sides"]["people"]["metrics"], found[1]["sides"]["base"]["metrics"]
    assert folded.pop("loss") == pytest.approx(beside.pop("loss"), abs=1e-5)
    assert folded.pop("perplexity") == pytest.approx(beside.pop("perplexity"), abs=1e-4)
    assert folded == beside
    assert not (tmp_path / "merged" / "evaluation.json").exists()  # a model is not a run


def test_unmerge_gives_the_base_back_bit_for_bit(
    world: World, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "base"
    assert lorry("unmerge", merged, f"output_dir={output}") == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert digest(output / WEIGHTS) == digest(world.base / WEIGHTS) != digest(merged / WEIGHTS)
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in world.base.iterdir())
    assert torch.equal(logits_of(output), logits_of(world.base))


def test_the_base_s_number_format_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_directory(tmp_path / "base", dtype=torch.bfloat16)
    rows = write_rows(tmp_path / "rows.jsonl", PEOPLE)
    run = train(tmp_path / "run", base, rows, steps=4)
    assert lorry("merge", run) == 0
    assert lorry("merge", run, "dtype=float32", f"output_dir={tmp_path / 'wide'}") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"{run}-merged", str(tmp_path / "wide")]
    narrow, wide = (
        load_file(path / WEIGHTS) for path in (tmp_path / "run-merged", tmp_path / "wide")
    )
    assert {t.dtype for t in narrow.values()} == {torch.bfloat16}
    assert {t.dtype for t in wide.values()} == {torch.float32}
    # rounded once, from fp32
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)
    assert lorry("unmerge", tmp_path / "run-merged") == 0
    assert digest(tmp_path / "run-merged-unmerged" / WEIGHTS) == digest(base / WEIGHTS)


def test_unmerge_refuses_a_base_that_has_changed(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(merged, tmp_path / "merged")
    said = json.loads((copy / "lorry_merge.json").read_text())
    said["base_weights"][WEIGHTS] = "0" * 64
    (copy / "lorry_merge.json").write_text(json.dumps(said))
    assert lorry("unmerge", copy, f"output_dir={tmp_path / 'base'}") == 4
    assert f"{WEIGHTS} has changed since; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


def test_unmerge_finds_a_base_that_moved(world: World, merged: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(merged, tmp_path / "merged")
    said = json.loads((copy / "lorry_merge.json").read_text())
    (copy / "lorry_merge.json").write_text(json.dumps({**said, "base": str(tmp_path / "gone")}))
    # through the run that was merged
    assert lorry("unmerge", copy, f"output_dir={tmp_path / 'base'}") == 0
    assert digest(tmp_path / "base" / WEIGHTS) == digest(world.base / WEIGHTS)
    (copy / "lorry_merge.json").write_text(
        json.dumps({**said, "base": "gone", "opened_as": str(tmp_path / "gone too")})
    )
    assert lorry("unmerge", copy) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "lorry_merge.json:1: not JSON"),
        ("[]", "lorry_merge.json: expected a JSON object, found list"),
        ('{"base": 3, "opened_as": "x", "base_weights": {}}', "not a record of `lorry merge`"),
        (None, "lorry_merge.json does not exist; only a model written by `lorry merge` records"),
    ],
)
def test_unmerge_needs_a_sound_record(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "lorry_merge.json").write_text(text)
    assert lorry("unmerge", tmp_path) == 4
    assert message in capsys.readouterr().err


def test_what_cannot_be_merged(
    world: World, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, code, message in (
        ((world.base,), 2, "is a plain model and has no adapter"),
        ((merged,), 2, "is a plain model and has no adapter"),
        ((world.run, "adapter=animals"), 2, "no such adapter; it has people"),
        ((world.run, f"output_dir={world.base}"), 2, "already exists and is not empty"),
        ((tmp_path / "nope",), 4, "no model at"),
    ):
        assert lorry("merge", *argv) == code
        assert message in capsys.readouterr().err


def test_a_run_of_several_adapters_asks_which(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = tmp_path / "several"
    for name in ("first", "second"):
        shutil.copytree(
            world.run, several / name, ignore=shutil.ignore_patterns("token*", "*.jinja", "*.yaml")
        )
    assert lorry("merge", several) == 2
    assert (
        "has several adapters; choose with adapter=NAME: first, second" in capsys.readouterr().err
    )
    assert lorry("merge", several, "adapter=second") == 0
    assert (logits_of(Path(f"{several}-merged")) - logits_of(world.base)).abs().max() > 1


# --- opened again before it gets its name, and what rounding cost in logits


def texts_of(run: Path) -> list[str]:
    """The rows that the verb looks at, from samples.json."""
    samples = json.loads((run / "samples.json").read_text())
    joined = [
        "".join(t["text"] for t in s["tokens"])
        if s["tokens"]
        else f"{s['prompt']} {s['reference']}"
        for s in samples
    ]
    return joined[:4]


def test_rounding_is_told_in_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a few steps at a small rate bf16 rounds away much of what the adapter does; PEFT on
    transformers says how much.
    """
    base = model_directory(tmp_path / "base", dtype=torch.bfloat16)
    rows = write_rows(tmp_path / "rows.jsonl", PEOPLE)
    run = train(tmp_path / "run", base, rows, "learning_rate=1e-4", f"eval={rows}", steps=4)
    capsys.readouterr()
    assert lorry("merge", run) == 0
    narrow = capsys.readouterr().err
    assert lorry("merge", run, "dtype=float32", f"output_dir={tmp_path / 'wide'}") == 0
    wide = capsys.readouterr().err

    words = AutoTokenizer.from_pretrained(run)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(run)
    ).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run-merged", dtype=torch.float32)
    moved = drift = 0.0
    with torch.no_grad():
        for text in texts_of(run):
            ids = words(text, return_tensors="pt").input_ids[:, :48]
            of_base, of_adapter, of_merged = (
                model(input_ids=ids).logits for model in (plain, exact, merged)
            )
            moved = max(moved, float((of_adapter - of_base).abs().max()))
            drift = max(drift, float((of_merged - of_adapter).abs().max()))
    assert drift / moved > 0.15  # a case in which it matters
    said = re.search(
        r"rounding to bfloat16 changed logits by ([\d.e-]+), (\d+)% of the adapter's effect; .*dtype=float32",
        narrow,
    )
    assert said is not None
    assert float(said[1]) == pytest.approx(drift, rel=0.02)
    assert int(said[2]) / 100 == pytest.approx(drift / moved, abs=0.02)
    moves = re.search(r"while the adapter changes logits by (\S+),", narrow)
    assert moves is not None
    assert float(moves[1]) == pytest.approx(moved, rel=0.06)  # two digits are told
    assert "rows of the run's data" in narrow
    assert "changed logits by" not in wide
    assert "reloaded by hf: largest logit difference" in wide


def test_a_delta_that_bf16_rounds_away_is_still_told_from_a_wrong_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding may cost as much as a lost module, so what is written is held to the rounded model,
    as tightly as in fp32.
    """
    base = model_directory(tmp_path / "base", dtype=torch.bfloat16)
    run = train(
        tmp_path / "run",
        base,
        write_rows(tmp_path / "rows.jsonl", PEOPLE),
        "learning_rate=1e-4",
        steps=4,
    )
    assert lorry("merge", run) == 0
    said = re.search(
        r"largest logit difference (\S+) \(bound (\S+), stored in bfloat16\)",
        capsys.readouterr().err,
    )
    assert said is not None
    assert float(said[1]) <= float(said[2]) < 2e-3
    monkeypatch.setattr(
        store,
        "_convert_dtypes",
        lambda stream, dtype: ((n, (t * 1.01).to(dtype)) for n, t in stream),
    )
    assert lorry("merge", run, f"output_dir={tmp_path / 'wrong'}") == 5
    assert not (tmp_path / "wrong").exists()


def test_a_built_in_text_where_the_run_has_no_rows(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (None, "[", '[{"tokens": 3}, 5, {"prompt": null}]'):
        run = shutil.copytree(world.run, tmp_path / f"run-{text is None}-{len(text or '')}")
        (run / "samples.json").unlink()
        if text is not None:
            (run / "samples.json").write_text(text)
        assert lorry("merge", run) == 0
        assert "on a built-in text" in capsys.readouterr().err


def test_a_machine_without_room_for_float32_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_directory(tmp_path / "base", dtype=torch.bfloat16)
    run = train(tmp_path / "run", base, write_rows(tmp_path / "rows.jsonl", PEOPLE), steps=4)
    monkeypatch.setattr(probe, "PROBE_LENGTH_FACTOR", 1e9)  # times the model's bytes
    assert lorry("merge", run) == 0
    err = capsys.readouterr().err
    assert "note: computed in bfloat16, so its own rounding is included" in err
    assert {t.dtype for t in load_file(tmp_path / "run-merged" / WEIGHTS).values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("verb", ["merge", "export"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
            "more than rounding to float32 can explain",
        ),
        ({"num_hidden_layers": 1}, "the model written cannot be loaded again and was removed"),
        ({"model_type": "nothing"}, "the model written cannot be loaded again and was removed"),
    ],
)
def test_a_model_that_is_another_when_opened_again_is_not_kept(
    verb: str, change: dict[str, object], message: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    right = store.write_config
    monkeypatch.setattr(
        store, "write_config", lambda folder, changes: right(folder, {**changes, **change})
    )
    more = ["to=hf"] if verb == "export" else []
    assert lorry(verb, world.run, *more, f"output_dir={tmp_path / 'out' / 'wrong'}") == 5
    assert message in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_merged_mamba2_is_opened_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config holds an infinity, which transformers 5 writes in a form of its own."""
    words = tokenizer()
    words.save_pretrained(tmp_path / "base")
    random_model({**MAMBA2, "vocab_size": len(words)}).save_pretrained(tmp_path / "base")
    model = library.load(tmp_path / "base", dtype="float32")[0]
    library.attach(
        model, library.LoraSpec(r=2, target_modules=("in_proj",), init_lora_weights=False)
    )
    library.save_adapter(model, tmp_path / "adapter")
    assert lorry("merge", tmp_path / "adapter", f"output_dir={tmp_path / 'merged'}") == 0
    assert "reloaded by hf" in capsys.readouterr().err
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["time_step_limit"][
        1
    ] == float("inf")
    ids = words("Where does Mara live?", return_tensors="pt").input_ids
    with torch.no_grad():
        merged = library.load(tmp_path / "merged", dtype="float32")[0](ids).logits
        assert (merged - model(ids).logits).abs().max() < 1e-4
