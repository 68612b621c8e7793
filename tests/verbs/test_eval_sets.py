"""`lorry eval tasks=[...]`: options and answers against transformers' own numbers, worked examples,
files, errors.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.verbworld import World, lorry, write_rows

ROWS = [
    {"question": "is Oslo a town", "passage": "Oslo is a town.", "answer": True},
    {"question": "does Mara live in Lima", "passage": "Mara lives in Oslo.", "answer": False},
    {"question": "is Kyoto far", "passage": "It is.", "answer": True},
]
SAID = [
    {"concepts": ["Mara", "Oslo"], "target": "Mara lives in Oslo."},
    {"concepts": ["Juno"], "target": "Juno lives in Ghent."},
]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rows, said = write_rows(tmp_path / "bq.jsonl", ROWS), write_rows(tmp_path / "cg.jsonl", SAID)
    return [f"local.bool_q={rows}", f"local.common_gen={said}"]


def evaluated(tmp_path: Path, *argv: object) -> dict[str, Any]:
    output = tmp_path / "out.json"
    assert lorry("eval", *argv, "dtype=float32", f"output_dir={output}") == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def likelihood(
    base: Path, prompt: str, option: str, shots: list[tuple[str, str]] | None = None
) -> tuple[float, int]:
    """(sum, tokens) of an option in ChatML, by transformers alone."""
    model, words = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        AutoTokenizer.from_pretrained(base),
    )
    before = "".join(
        f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
        for q, a in shots or []
    )
    asked = words(
        f"{before}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ).input_ids
    said = words(option).input_ids
    with torch.no_grad():
        logp = (
            model(torch.tensor([asked + said]))
            .logits[0, len(asked) - 1 : -1]
            .double()
            .log_softmax(-1)
        )
    return float(logp.gather(1, torch.tensor(said)[:, None]).sum()), len(said)


def test_options_are_ranked_as_transformers_would(
    world: World, files: list[str], tmp_path: Path
) -> None:
    found = evaluated(tmp_path, world.base, "tasks=[bool_q]", *files)["sets"]["bool_q"]["sides"][
        "base"
    ]
    right_by_mean = right_by_sum = 0
    for row, asked in zip(found["rows"], ROWS, strict=True):
        assert asked["passage"] in row["prompt"]
        truth = [likelihood(world.base, row["prompt"], option) for option in row["options"]]
        assert row["loglikelihoods"] == pytest.approx([total for total, _ in truth], abs=2e-4)
        assert row["tokens"] == [tokens for _, tokens in truth]
        means, sums = [t / n for t, n in truth], [t for t, _ in truth]
        right_by_mean += means.index(max(means)) in row["right"]
        right_by_sum += sums.index(max(sums)) in row["right"]
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(right_by_mean / 3)
    assert found["metrics"]["accuracy_sum"]["value"] == pytest.approx(right_by_sum / 3)
    assert {"ece", "brier", "confidence", "perplexity"} <= set(found["metrics"])


def test_options_of_one_token_share_a_pass_and_change_nothing(
    world: World, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorry.evaluate.benchmarks import rank

    rows = write_rows(
        tmp_path / "mm.jsonl", [{"question": "Which?", "choices": list("xyzw"), "answer": 2}]
    )
    argv = (world.base, "tasks=[mmlu]", f"local.mmlu={rows}")
    shared = evaluated(tmp_path, *argv)["sets"]["mmlu"]["sides"]["base"]["rows"][0]
    monkeypatch.setattr(rank, "_merge_options", list)
    apart = evaluated(tmp_path, *argv)["sets"]["mmlu"]["sides"]["base"]["rows"][0]
    assert shared["loglikelihoods"] == pytest.approx(apart["loglikelihoods"], abs=1e-4)
    truth = [likelihood(world.base, shared["prompt"], option)[0] for option in shared["options"]]
    assert shared["loglikelihoods"] == pytest.approx(truth, abs=2e-4)


def test_worked_examples_are_earlier_turns_and_never_the_row_itself(
    world: World, files: list[str], tmp_path: Path
) -> None:
    found = evaluated(tmp_path, world.base, "tasks=[bool_q]", "n_shot=1", *files)
    rows = found["sets"]["bool_q"]["sides"]["base"]["rows"]
    words = {True: rows[0]["expected"], False: rows[1]["expected"]}
    plain = evaluated(tmp_path, world.base, "tasks=[bool_q]", *files)["sets"]["bool_q"]["sides"][
        "base"
    ]["rows"]
    for at, row in enumerate(rows):
        others = [(plain[n]["prompt"], words[ROWS[n]["answer"]]) for n in range(3) if n != at]
        mine = row["loglikelihoods"]
        near = [
            [likelihood(world.base, row["prompt"], option, [shot])[0] for option in row["options"]]
            for shot in others
        ]
        assert any(mine == pytest.approx(one, abs=2e-4) for one in near)


def test_too_many_worked_examples_are_refused(
    world: World, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorry("eval", world.base, "tasks=[bool_q]", "n_shot=3", *files) == 3
    assert (
        "n_shot=3 needs as many other rows; the split for examples has 2" in capsys.readouterr().err
    )


def test_a_run_is_asked_beside_its_base_and_remembers_it(
    world: World, files: list[str], tmp_path: Path
) -> None:
    import shutil

    run = Path(shutil.copytree(world.run, tmp_path / "people"))
    folder = tmp_path / "results"
    wanted = ("tasks=[common_gen,bool_q]", *files, f"output_dir={folder}")
    assert lorry("eval", run, *wanted, "dtype=float32") == 0
    assert sorted(file.name for file in folder.iterdir()) == [
        "results.csv",
        "results.json",
        "results.png",
    ]
    found = json.loads((folder / "results.json").read_text())
    sides = found["sets"]["common_gen"]["sides"]
    assert len(sides) == 2
    base, tuned = sides.values()
    assert tuned["metrics"]["perplexity"]["value"] != base["metrics"]["perplexity"]["value"]
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "results.csv").read_text().startswith("set,metric,side,value")
    entries = {
        entry["name"]: entry["metrics"]
        for entry in json.loads((run / "evaluation.json").read_text())
    }
    assert entries["common_gen"]["coverage"]["after"] == pytest.approx(
        tuned["metrics"]["coverage"]["value"]
    )
    assert lorry("report", run) == 0
    assert (
        lorry("eval", run, "tasks=[bool_q]", *files, "limit=2", "n_shot=1", "task_split=train") == 0
    )
    names = [entry["name"] for entry in json.loads((run / "evaluation.json").read_text())]
    assert names[-2:] == ["bool_q", "bool_q [train], 1 few-shot examples, the first 2 rows"], (
        "asked otherwise, kept beside"
    )


def test_generated_answers_are_those_of_transformers(
    world: World, files: list[str], tmp_path: Path
) -> None:
    found = evaluated(tmp_path, world.base, "tasks=[common_gen]", "max_new_tokens=12", *files)[
        "sets"
    ]["common_gen"]["sides"]["base"]
    model, words = (
        AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32),
        AutoTokenizer.from_pretrained(world.base),
    )
    for row in found["rows"]:
        ids = words(
            f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n",
            return_tensors="pt",
        ).input_ids
        said = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert row["answer"] == words.decode(said, skip_special_tokens=True).strip()


def test_csv_has_a_line_for_every_number(world: World, files: list[str], tmp_path: Path) -> None:
    assert (
        lorry(
            "eval",
            world.base,
            "tasks=[bool_q]",
            *files,
            "limit=2",
            f"output_dir={tmp_path / 'o.csv'}",
        )
        == 0
    )
    lines = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert {line["metric"] for line in lines} == {
        "accuracy",
        "accuracy_sum",
        "ece",
        "brier",
        "confidence",
        "perplexity",
    }
    # too few for an interval
    assert all(line["questions"] == "2" and line["low"] == line["high"] == "" for line in lines)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["tasks=[bool_qq]"], 2, "did you mean 'bool_q'?"),
        (
            ["tasks=[bool_q]", "local.bool_q=/no.jsonl"],
            3,
            "bool_q (local.bool_q): /no.jsonl: no such file",
        ),
        (["tasks=[bool_q]", "data=x.jsonl"], 2, "one of these"),
        ([], 2, "say what to evaluate on"),
        (
            ["tasks=[bool_q]", "local.bool_q={bq}", "template=99"],
            2,
            "template=99: bool_q has templates 0 to",
        ),
    ],
)
def test_what_is_wrong_is_said(
    world: World,
    files: list[str],
    argv: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bq = files[0].partition("=")[2]
    assert lorry("eval", world.base, *(word.format(bq=bq) for word in argv)) == code
    assert said in capsys.readouterr().err


def test_right_answers_beyond_the_context_cost_the_perplexity_only(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"instruction": f"Say {n}", "context": "", "response": "word " * (400 if n == 1 else 3)}
        for n in range(3)
    ]
    argv = (
        world.base,
        "tasks=[dolly]",
        "max_new_tokens=4",
        f"local.dolly={write_rows(tmp_path / 'd.jsonl', rows)}",
    )
    found = evaluated(tmp_path, *argv)["sets"]["dolly"]["sides"]["base"]
    assert found["answers_too_long"] == 1
    assert len(found["rows"]) == len(found["rows"][1]["references"]) + 2 == 3
    assert (
        "perplexity leaves out 1 right answers that are longer than the context"
        in capsys.readouterr().err
    )
    short = write_rows(tmp_path / "s.jsonl", [rows[0], rows[2]])
    alone = evaluated(tmp_path, *argv[:3], f"local.dolly={short}")["sets"]["dolly"]["sides"]["base"]
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(
        alone["metrics"]["perplexity"]["value"]
    )
    only = evaluated(
        tmp_path, *argv[:3], f"local.dolly={write_rows(tmp_path / 'l.jsonl', rows[1:2])}"
    )["sets"]["dolly"]["sides"]
    assert only["base"]["metrics"]["perplexity"]["value"] is None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["data={rows}", "n_shot=2"], "n_shot is for tasks=[...]"),
        (["data={rows}", "temperature=0.7"], "temperature is for tasks=[...]"),
        (["data={rows}", "output_dir=table.csv"], "CSV tables are for tasks=[...]"),
        (
            ["tasks=[bool_q]", "data.split=test"],
            "data.split is for data=FILE; a named set defines its own format; task_split",
        ),
        (["tasks=[bool_q]", "top_p=0.9"], "top_p is for sampling"),
        (["tasks=[bool_q]", "output_dir={folder}"], "is a directory"),
        (["tasks=[bool_q]", "output={rows}"], "is a file; give a folder"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    world: World,
    files: list[str],
    argv: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "a.json"
    folder.mkdir()
    assert (
        lorry("eval", world.base, *(word.format(rows=world.rows, folder=folder) for word in argv))
        == 2
    )
    assert said in capsys.readouterr().err


def test_a_run_that_is_asked_what_it_learnt_is_told_so(
    world: World, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, run = files[0].partition("=")[2], tmp_path / "run"
    other = write_rows(tmp_path / "other.jsonl", ROWS)
    words = ("max_steps=2", "r=2", "dtype=float32", "save_strategy=no", f"output_dir={run}")
    assert (
        lorry(
            "sft", f"model={world.base}", "data.mix=[bool_q]", f"data.local.bool_q={rows}", *words
        )
        == 0
    )
    assert lorry("eval", run, "tasks=[bool_q]", f"local.bool_q={other}") == 0
    assert "was trained on" not in capsys.readouterr().err
    assert lorry("eval", run, "tasks=[bool_q]", files[0]) == 0
    assert f"bool_q: {run} was trained on rows of {rows}" in capsys.readouterr().err


TOWNS = """\
name: towns
about: towns, asked in words of one's own
layouts:
  - name: rows
    needs: [town, far]
    reader: class_label
    slots: {town: town}
    options: ["no", "yes"]
    label: far
templates: ["Is {town} far, {listed}?"]
metrics: [accuracy]
max_new_tokens: 4
"""


def test_a_set_of_ones_own_is_asked(world: World, tmp_path: Path) -> None:
    """As the file words it; the likelihoods are transformers'."""
    (tmp_path / "towns.yaml").write_text(TOWNS)
    rows = write_rows(tmp_path / "t.jsonl", [{"town": "Kyoto", "far": 1}])
    argv = [world.base, "tasks=[towns]", f"local.towns={rows}"]
    found = evaluated(tmp_path, *argv, f"catalog={tmp_path / 'towns.yaml'}")
    assert found["asked"]["catalog"] == str(tmp_path / "towns.yaml")
    [row] = found["sets"]["towns"]["sides"]["base"]["rows"]
    assert row["prompt"] == "Is Kyoto far, no or yes?"
    assert (row["options"], row["right"]) == (["no", "yes"], [1])
    truth = [likelihood(world.base, row["prompt"], option)[0] for option in row["options"]]
    assert row["loglikelihoods"] == pytest.approx(truth, abs=2e-4)


def test_what_is_wrong_with_a_set_is_said_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is named first, and does not exist: the set's error is the one that is told."""
    rows = write_rows(tmp_path / "t.jsonl", [{"town": "Kyoto", "far": "yes"}])
    file = tmp_path / "towns.yaml"
    written = TOWNS.replace("class_label", "generate").replace("label:", "answers:")
    for text, error in (
        (TOWNS.replace("class_label", "classlabel"), "towns.yaml:4: layouts.0: no reader"),
        (
            written.replace('    options: ["no", "yes"]\n', "")
            .replace(", {listed}", "")
            .replace("accuracy", "exact_mach"),
            "towns.yaml: metrics: no metric 'exact_mach' (did you mean 'exact_match'?)",
        ),
    ):
        file.write_text(text)
        argv = [f"model={tmp_path / 'none'}", "tasks=[towns]", f"local.towns={rows}"]
        assert lorry("eval", *argv, f"catalog={file}") == 2
        assert error in "".join(capsys.readouterr()).replace("\n", " ")
    assert lorry("eval", f"model={tmp_path}", f"data={rows}", f"catalog={file}") == 2
    assert "catalog is for tasks" in "".join(capsys.readouterr())


def test_a_run_whose_own_set_is_gone_can_still_be_asked(
    world: World, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training reads the set of one's own; later its file is missing, and only the warning about
    rows known by heart is, too.
    """
    text = TOWNS.replace('["Is', '["{town}", "Is')
    (tmp_path / "towns.yaml").write_text(text)
    rows = write_rows(tmp_path / "t.jsonl", [{"town": "Kyoto", "far": "yes"}] * 4)
    run = tmp_path / "run"
    assert lorry("sft", f"model={world.base}", "data.mix=[towns]", f"catalog={tmp_path / 'towns.yaml'}", f"data.local.towns={rows}",
                 f"output_dir={run}", "max_steps=1", "r=2", "dtype=float32", "eval_strategy=no") == 0  # fmt: skip
    assert f"catalog: {tmp_path / 'towns.yaml'}" in (run / "run.yaml").read_text()
    assert "towns" in (run / "README.md").read_text()
    (tmp_path / "towns.yaml").unlink()
    capsys.readouterr()
    evaluated(tmp_path, run, "tasks=[bool_q]", *files)
    assert "rows of these sets: data.catalog=" in capsys.readouterr().err.replace("\n", " ")
