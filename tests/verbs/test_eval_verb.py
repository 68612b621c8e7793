"""`lorry eval`: its numbers against transformers' own, base and adapter side by side, the files it
writes, its errors.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.verbworld import (
    CHATML,
    CONTEXT,
    PEOPLE,
    World,
    lorry,
    model_directory,
    train,
    write_rows,
)

PRECISE = ("dtype=float32", "max_new_tokens=16")


def evaluated(tmp_path: Path, *argv: object) -> dict[str, Any]:
    """The JSON of an evaluation that went well."""
    output = tmp_path / "out.json"
    assert lorry("eval", *argv, *PRECISE, f"output_dir={output}") == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    """A copy of the world's run that a test may write into."""
    return Path(shutil.copytree(world.run, tmp_path / "people"))


def by_transformers(base: Path, row: dict[str, str]) -> tuple[float, int, int, str]:
    """(summed nll, supervised tokens, tokens guessed right, greedy answer) of a row, by
    transformers alone.
    """
    model, words = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        AutoTokenizer.from_pretrained(base),
    )
    asked = f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
    prompt, answer = words(asked).input_ids, words(f"{row['answer']}<|im_end|>").input_ids
    with torch.no_grad():
        logp = (
            model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        )
    targets = torch.tensor(answer)
    said = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[
        0, len(prompt) :
    ]
    nll = -float(logp.gather(1, targets[:, None]).double().sum())
    text = words.decode(said, skip_special_tokens=True).strip()
    return nll, len(answer), int((logp.argmax(-1) == targets).sum()), text


def test_the_base_is_scored_as_transformers_scores_it(world: World, tmp_path: Path) -> None:
    found = evaluated(tmp_path, world.base, f"data={world.rows}")
    truth = [by_transformers(world.base, row) for row in PEOPLE]
    nll, tokens, right = (sum(row[i] for row in truth) for i in range(3))
    metrics = found["sides"]["base"]["metrics"]
    assert list(found["sides"]) == ["base"]
    assert metrics["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert metrics["token_accuracy"] == right / tokens
    for said, row, (nll, tokens, _, text) in zip(found["predictions"], PEOPLE, truth, strict=True):
        assert (said["question"], said["references"]) == (row["question"], [row["answer"]])
        assert said["supervised_tokens"] == tokens
        assert said["base"]["loss"] == pytest.approx(nll / tokens, rel=1e-5)
        assert said["base"]["answer"] == text


@pytest.mark.parametrize(
    "kind",
    [{"model_type": "mamba", "state_size": 8}, {"model_type": "rwkv", "attention_hidden_size": 32}],
)
def test_a_model_without_keys_and_values_gets_losses_and_answers(
    kind: dict[str, Any], world: World, tmp_path: Path
) -> None:
    base = model_directory(tmp_path / "base", **kind)
    found = evaluated(tmp_path, base, f"data={world.rows}")
    truth = [by_transformers(base, row) for row in PEOPLE]
    nll, tokens = (sum(row[i] for row in truth) for i in range(2))
    assert found["sides"]["base"]["metrics"]["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert [row["base"]["answer"] for row in found["predictions"]] == [text for *_, text in truth]


def test_base_and_adapter_side_by_side(
    run: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(tmp_path, run, f"data={world.rows}")
    before, after = (found["sides"][side]["metrics"] for side in ("base", "people"))
    assert (before["exact_match"], after["exact_match"], after["exact_match_strict"]) == (0, 1, 1)
    assert after["rouge_l"] == after["f1"] == 1
    assert [row["people"]["answer"] for row in found["predictions"]] == [
        row["answer"] for row in PEOPLE
    ]
    assert found["sides"]["people"]["intervals"] == {}
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert after["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert after["token_accuracy"] == pytest.approx(last["eval_token_accuracy"])
    table = capsys.readouterr().out.splitlines()
    heading = next(line for line in table if "metric" in line)
    matched = next(line for line in table if line.strip().startswith("exact match "))
    assert heading.split() == ["metric", "base", "people"]
    assert matched.split("match")[1].split() == ["0", "1"]
    assert table[-1].strip() == "too few rows for an interval (fewer than 10)"


def test_a_run_keeps_its_evaluations_and_the_report_shows_them(
    run: Path, world: World, tmp_path: Path
) -> None:
    other = {"name": "held-out rephrasings", "metrics": {"f1": {"before": 0.1, "after": 0.9}}}
    (run / "evaluation.json").write_text(json.dumps([other]))
    for _ in range(2):  # the second replaces the first
        assert lorry("eval", run, f"data={world.rows}", *PRECISE) == 0
    assert lorry("eval", run, f"data={world.rows}", "limit=1", *PRECISE) == 0
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept[0] == other
    assert [entry["name"] for entry in kept[1:]] == [
        str(world.rows),
        f"{world.rows}, the first 1 rows",
    ]
    assert kept[1]["metrics"]["exact_match"] == {"before": 0, "after": 1}
    assert lorry("report", run) == 0
    assert "exact match" in (run / "report.html").read_text()


def test_a_damaged_evaluation_file_is_told_and_kept(
    run: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "evaluation.json").write_text("[{")
    assert lorry("eval", run, f"data={world.rows}", *PRECISE) == 3
    assert "evaluation.json:1: not JSON" in capsys.readouterr().err
    assert (run / "evaluation.json").read_text() == "[{"


def test_batches_change_nothing(world: World, tmp_path: Path) -> None:
    one = evaluated(
        tmp_path, world.base, f"model.adapter={world.run}", f"data={world.rows}", "batch_size=1"
    )
    three = evaluated(
        tmp_path, world.base, f"model.adapter={world.run}", f"data={world.rows}", "batch_size=3"
    )
    for left, right in zip(one["predictions"], three["predictions"], strict=True):
        assert left["people"].pop("loss") == pytest.approx(right["people"].pop("loss"), rel=1e-5)
        assert left["people"] == right["people"]
    assert not (world.run / "evaluation.json").exists()  # the base was asked for, not the run


def test_plain_text_has_a_loss_and_no_answers(world: World, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "text.jsonl",
        [{"text": "Mara lives in Oslo. " * 12}, {"text": "Juno"}, {"text": ""}],
    )
    found = evaluated(tmp_path, world.base, f"data={rows}", "on_bad_row=skip", "max_length=20")
    assert set(found["sides"]["base"]["metrics"]) == {"loss", "perplexity", "token_accuracy"}
    assert (found["rows"], found["left_out"]) == (2, {"empty answer": 1})
    # Every token but the first is scored once although the text is cut into pieces, and so is the
    # end of text.
    words = AutoTokenizer.from_pretrained(world.base)
    count = len(words("Mara lives in Oslo. " * 12).input_ids)
    assert [row["supervised_tokens"] for row in found["predictions"]] == [
        count,
        len(words("Juno").input_ids),
    ]
    assert all(
        "question" not in row and "answer" not in row["base"] for row in found["predictions"]
    )


def test_several_right_answers_and_ends_written_out(run: Path, tmp_path: Path) -> None:
    rows = [
        {"question": PEOPLE[0]["question"], "answers": ["Nowhere.", PEOPLE[0]["answer"]]},
        {"question": PEOPLE[1]["question"], "answers": [PEOPLE[1]["answer"] + "<|im_end|>"]},
        {"question": PEOPLE[2]["question"], "answers": ["Nowhere."]},
    ]
    found = evaluated(tmp_path, run, f"data={write_rows(tmp_path / 'several.jsonl', rows)}")
    assert [row["people"]["exact_match_strict"] for row in found["predictions"]] == [1, 1, 0]


def test_prompts_that_leave_no_room_are_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"question": "Mara " * CONTEXT, "answer": "Oslo."}
    found = evaluated(tmp_path, run, f"data={write_rows(tmp_path / 'long.jsonl', [long, *PEOPLE])}")
    assert (
        "1 row not generated: prompt and 16 new tokens exceed the context of 160"
        in capsys.readouterr().err
    )
    assert "answer" not in found["predictions"][0]["people"]
    # its prompt is cut for the loss, as in training
    assert found["predictions"][0]["people"]["loss"] > 0
    assert found["sides"]["people"]["metrics"]["exact_match"] == 1  # of the four that were asked


def test_a_run_evaluates_with_its_own_template(world: World, tmp_path: Path) -> None:
    """A template given to training is the run's, not the base's; an end of turn of several tokens
    is no part of an answer.
    """
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "[END]"))
    run = train(
        tmp_path / "templated", world.base, world.rows, f"chat_template_path={template}", steps=70
    )
    found = evaluated(tmp_path, run, f"data={world.rows}")
    assert found["sides"]["templated"]["metrics"]["exact_match_strict"] == 1
    other = evaluated(
        tmp_path,
        run,
        f"data={world.rows}",
        f"chat_template_path={world.base / 'chat_template.jinja'}",
    )
    assert (
        other["sides"]["templated"]["metrics"]["loss"]
        > 2 * found["sides"]["templated"]["metrics"]["loss"]
    )


def test_another_dtype_than_in_training_is_told(
    run: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorry("eval", run, f"data={world.rows}", "dtype=bfloat16", "max_new_tokens=16") == 0
    assert "note: trained in float32, evaluated in bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["{run}", "data={rows}.nope"], 3, "no such file (did you mean 'people.jsonl'?)"),
        (["./nope", "data={rows}"], 4, "no model at './nope'"),
        (["{base}", "adapter=./nope", "data={rows}"], 4, "nope holds no adapter"),
        (["{run}"], 2, "say what to evaluate on: data=FILE, or tasks=[...]"),
        (["{run}", "data={rows}", "packing=true"], 2, "unknown setting 'packing'"),
        (
            ["{run}", "data={rows}", "output_dir={rows}"],
            2,
            "is a file; give a folder, or a .json file",
        ),
        (["{run}", "data={rows}", "limit=0"], 2, "limit"),
        (
            ["{run}", "data={rows}", "chat_template_path=./nope"],
            2,
            "chat_template_path=./nope: cannot be read",
        ),
    ],
)
def test_errors(
    argv: list[str], code: int, message: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorry("eval", *(word.format(**vars(world)) for word in argv)) == code
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_a_model_without_tokenizer_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(world.base / name, tmp_path)
    assert lorry("eval", tmp_path, f"data={world.rows}") == 4
    assert "has no tokenizer; put its tokenizer.json beside the weights" in capsys.readouterr().err


def test_a_run_of_several_adapters_has_a_column_for_each(world: World, tmp_path: Path) -> None:
    several = tmp_path / "several"
    for name in ("base", "people"):  # the first has the name of the base's own column
        shutil.copytree(world.run, several / name)
    shutil.copy(world.run / "run.yaml", several)
    found = evaluated(tmp_path, several, f"data={world.rows}", "limit=2")
    assert list(found["sides"]) == ["base", "adapter base", "people"]
    exact = {side: values["metrics"]["exact_match"] for side, values in found["sides"].items()}
    assert exact == {"base": 0, "adapter base": 1, "people": 1}
    names = [entry["name"] for entry in json.loads((several / "evaluation.json").read_text())]
    assert names == [
        f"{world.rows}, the first 2 rows ({side})" for side in ("adapter base", "people")
    ]
