"""Every set with a file in the shared data reads all of its rows, and what it makes of them agrees
with the file itself.

The files are parsed here by json and csv alone, and right answers are worked out from their raw
columns.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorry.data.catalog import NamedSetItem, shipped_catalog
from lorry.data.reading.content import UnusableRowError

FILES: list[tuple[str, str]] = [
    ("common_gen", "common_gen/commongen.dev.jsonl"),
    ("common_gen", "common_gen/t0_common_gen_templates.jsonl"),
    ("bool_q", "boolq/boolq_dev.jsonl"),
    ("bool_q", "commonsense/boolq_train.json"),
    ("bool_q", "commonsense/boolq_test.json"),
    ("boolq_long", "longcontext/boolq_long.jsonl"),
    ("bool_q", "longcontext/boolq_long.jsonl"),
    ("xquad", "longcontext/xquad_multidoc.jsonl"),
    ("longbench_hotpotqa", "longcontext/xquad_multidoc.jsonl"),
    ("longbench_qmsum", "longcontext/qmsum.jsonl"),
    ("scitldr", "scitldr/train.jsonl"),
    ("scitldr", "scitldr/dev.jsonl"),
    ("scitldr", "scitldr/test.jsonl"),
    ("gsm8k", "gsm8k/test.jsonl"),
    ("gsm8k", "gsm8k/train_2000.jsonl"),
    ("svamp", "svamp/SVAMP.json"),
    ("truthfulqa", "truthfulqa/TruthfulQA.csv"),
    ("truthfulqa_mc", "truthfulqa/TruthfulQA.csv"),
    ("truthfulqa_mc1", "truthfulqa/TruthfulQA.csv"),
    ("arc_easy", "commonsense/ARC-Easy_train.json"),
    ("arc_easy", "commonsense/ARC-Easy_test.json"),
    ("arc_challenge", "commonsense/ARC-Challenge_train.json"),
    ("arc_challenge", "commonsense/ARC-Challenge_test.json"),
    ("openbookqa", "commonsense/openbookqa_train.json"),
    ("openbookqa", "commonsense/openbookqa_test.json"),
    ("winogrande", "commonsense/winogrande_test.json"),
    ("dolly", "instruct/dolly_151.jsonl"),
    ("tofu", "tofu/full.json"),
    ("tofu", "tofu/forget10_perturbed.json"),
    ("tofu", "tofu/retain_perturbed.json"),
    ("tofu", "tofu/real_authors_perturbed.json"),
    ("tofu", "tofu/world_facts_perturbed.json"),
    ("mmlu", "mmlu/dev"),
    ("mmlu", "mmlu/test"),
]
SLOTS = "passage|question|context|text|concepts|instruction|input|options|lettered|listed|sentence|subject"
TOLD = (
    "answer",
    "answers",
    "target",
    "scene",
    "reason",
    "completion",
    "Answer",
    "Equation",
    "Best Answer",
    "Correct Answers",
)


def raw(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, or of every file of a folder, by json and csv alone."""
    if path.is_dir():
        for file in sorted(path.iterdir()):
            yield from raw(file)
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)
    elif path.read_text(encoding="utf-8").lstrip().startswith("["):
        yield from json.loads(path.read_text(encoding="utf-8"))
    else:
        yield from map(json.loads, filter(str.strip, path.open(encoding="utf-8")))


def rows_promised(shared_data: Path, name: str) -> int:
    """The number of rows that the table in the folder's SOURCE.md gives."""
    path = shared_data / name
    folder, pattern = (
        (path.parent, re.escape(path.name))
        if path.is_file()
        else (path.parent, rf"{path.name}/\S+")
    )
    table = (folder / "SOURCE.md").read_text(encoding="utf-8")
    return sum(
        int(rows) for rows in re.findall(rf"^\| {pattern} \| \d+ \| (\d+) \|", table, re.MULTILINE)
    )


def bare(text: str) -> str:
    return " ".join(text.split())


def listed(column: Any) -> list[Any]:
    return column if isinstance(column, list) else [column]


@pytest.mark.parametrize(
    ("name", "file"), FILES, ids=[f"{name}-{Path(file).stem}" for name, file in FILES]
)
def test_every_row_of_every_file(shared_data: Path, name: str, file: str) -> None:
    found, count = shipped_catalog().find_set(name), 0
    for number, row in enumerate(raw(shared_data / file)):
        item = found.item(row)
        other = found.item(row, found.template_of(0, number))
        assert (item.answer, item.options, item.right) == (other.answer, other.options, other.right)
        for made in (item, other):
            assert made.prompt.strip()
            assert not re.search(r"\{(" + SLOTS + r")\}", made.prompt), "a placeholder is left"
            assert not re.search("###eos_token###|endoftext", made.prompt + made.answer)
            if (
                not item.options
                and item.answer in made.prompt
                and not file.endswith("t0_common_gen_templates.jsonl")
            ):
                asked = bare(
                    " ".join(
                        str(part)
                        for key, column in row.items()
                        if key not in TOLD
                        for part in listed(column)
                    )
                )
                assert bare(item.answer) in asked, (
                    "a template shows an answer that the question does not hold"
                )
        assert item.right == tuple(
            place for place in range(len(item.options)) if item.options[place] in item.references
        )
        assert item.answer in item.references or "number_match" in found.metrics
        count += 1
    assert count == rows_promised(shared_data, file) > 0


def each(
    shared_data: Path, name: str, *files: str
) -> Iterator[tuple[dict[str, Any], NamedSetItem]]:
    for file in files:
        for row in raw(shared_data / file):
            yield row, shipped_catalog().find_set(name).item(row)


def test_llm_adapters_rows_can_be_written_back(shared_data: Path) -> None:
    """Question, options and answer taken out of the instruction make the instruction again, word
    for word.
    """
    for name, file in FILES:
        if not file.startswith("commonsense/") or name == "bool_q":
            continue
        for row, item in each(shared_data, name, file):
            word = "Option" if name == "winogrande" else "Answer"
            asked = (
                item.prompt.split("\n\nWhat belongs")[0]
                if name == "winogrande"
                else item.prompt.split("\n- ")[0]
            )
            goal = (
                "to fill in the blank to complete the given sentence"
                if name == "winogrande"
                else "to the question"
            )
            listed = " ".join(f"{word}{at}: {text}" for at, text in enumerate(item.options, 1))
            names = "/".join(f"{word.lower()}{at}" for at in range(1, len(item.options) + 1))
            again = f"Please choose the correct answer {goal}: {asked.removeprefix('Question: ')} {listed} Answer format: {names}"
            assert bare(again) == bare(row["instruction"])
            assert f"{word.lower()}{item.right[0] + 1}" == row["answer"]


def test_yes_and_no(shared_data: Path) -> None:
    for row, item in each(shared_data, "bool_q", "boolq/boolq_dev.jsonl"):
        assert item.answer == ("yes" if row["answer"] is True else "no")
        assert item.shortened == (len(row["passage"].strip()) > 2000)
    for row, item in each(
        shared_data, "bool_q", "commonsense/boolq_train.json", "commonsense/boolq_test.json"
    ):
        assert item.answer == {"true": "yes", "false": "no"}[row["answer"]]
        assert (
            item.prompt.removeprefix("Question: ").removesuffix("\nAnswer yes or no.")
            in row["instruction"]
        )
    for row, item in each(shared_data, "boolq_long", "longcontext/boolq_long.jsonl"):
        assert [item.answer] == row["answers"]
        assert row["context"].strip() in item.prompt


def test_numbers(shared_data: Path) -> None:
    for row, item in each(shared_data, "gsm8k", "gsm8k/test.jsonl", "gsm8k/train_2000.jsonl"):
        steps, last = row["answer"].split("\n#### ")
        assert item.references == (last.replace(",", ""),)
        assert item.answer == f"{re.sub('<<.*?>>', '', steps)}\n#### {item.references[0]}".strip()
    for row, item in each(shared_data, "svamp", "svamp/SVAMP.json"):
        assert float(item.answer) == row["Answer"]
        assert item.answer == str(int(row["Answer"]))
        assert row["Body"].strip() in item.prompt
        assert row["Question"].strip().lower() in item.prompt.lower()


def test_common_gen(shared_data: Path) -> None:
    for row, item in each(shared_data, "common_gen", "common_gen/commongen.dev.jsonl"):
        assert item.concepts == tuple(row["concept_set"].split("#"))
        assert set(item.references) == {scene.strip() for scene in row["scene"]}
        assert item.answer == row["scene"][0].strip()
    inverted = 0
    for row, item in each(shared_data, "common_gen", "common_gen/t0_common_gen_templates.jsonl"):
        told = row["completion"].removesuffix("<|endoftext|>").strip()
        if row["template"] in (
            "common_gen_sentence_to_concepts",
            "common_gen_topics_from_the_sentence",
        ):
            inverted += 1
            assert ", ".join(item.concepts) == told
            assert item.answer in row["prompt"]
        else:
            assert item.answer == told
            assert ", ".join(item.concepts) in row["prompt"]
            assert len(item.concepts) >= (
                1 if row["template"] == "common_gen_topic_to_sentence" else 3
            )
    assert inverted == 400


def test_a_test_set_without_references_is_refused(shared_data: Path) -> None:
    row = next(raw(shared_data / "common_gen/commongen.test_noref.jsonl"))
    with pytest.raises(
        UnusableRowError,
        match=r"read from the columns 'concept_set'\. Known: .*authors \(concept_set \+ scene\)",
    ):
        shipped_catalog().find_set("common_gen").item(row)


def test_truthfulqa(shared_data: Path) -> None:
    both = 0
    for name in ("truthfulqa", "truthfulqa_mc", "truthfulqa_mc1"):
        for row, item in each(shared_data, name, "truthfulqa/TruthfulQA.csv"):
            true = {part.strip() for part in row["Correct Answers"].split(";")} - {""}
            false = {part.strip() for part in row["Incorrect Answers"].split(";")} - {""}
            best = row["Best Answer"].strip()
            assert item.prompt == f"Question: {row['Question'].strip()}"
            if name == "truthfulqa":
                assert item.answer == best
                assert set(item.references) == true | {best}
                continue
            right = true if name == "truthfulqa_mc" else {best}
            assert {item.options[place] for place in item.right} == right
            assert set(item.options) == right | false
            assert len(set(item.options)) == len(item.options)
            both += name == "truthfulqa_mc" and bool(true & false)
    assert both == 2, "two rows list an answer as right and as wrong"


def test_summaries_and_meetings(shared_data: Path) -> None:
    for row, item in each(
        shared_data, "scitldr", *(f"scitldr/{part}.jsonl" for part in ("train", "dev", "test"))
    ):
        assert set(item.references) == {text.strip() for text in row["target"]}
        assert item.answer == row["target"][0].strip()
        assert bare(" ".join(row["source"])) in bare(item.prompt)
    for row, item in each(shared_data, "qmsum", "longcontext/qmsum.jsonl"):
        assert item.references == tuple(text.strip() for text in row["answers"])
        assert row["input"].strip() in item.prompt
        assert row["context"].strip() in item.prompt
    for row, item in each(shared_data, "xquad", "longcontext/xquad_multidoc.jsonl"):
        assert item.references == tuple(row["answers"])
        assert item.answer in item.prompt


def test_exams(shared_data: Path) -> None:
    for row, item in each(shared_data, "mmlu", "mmlu/dev", "mmlu/test"):
        assert item.options == tuple(row[f"choice{at}"].strip() for at in range(4))
        assert int(row["answer"]) in item.right


def test_dolly_frames_come_off(shared_data: Path) -> None:
    with_input = 0
    for row, item in each(shared_data, "dolly", "instruct/dolly_151.jsonl"):
        assert item.answer == row["answer"].replace("###eos_token###", "").strip()
        assert "###" not in item.prompt
        frame = (
            row["prompt"]
            .replace("### Input:\n", "")
            .replace("### Instruction:\n", "")
            .replace("### Response:", "")
        )
        assert bare(frame).endswith(bare(item.prompt))
        with_input += "### Input:" in row["prompt"]
    assert with_input == 47


def test_longbench_lengths_are_its_authors(shared_data: Path) -> None:
    lengths = json.loads((shared_data / "longcontext" / "dataset2maxlen.json").read_text())
    assert len(lengths) == 21
    assert {
        name: shipped_catalog().find_set(f"longbench_{name}").max_new_tokens for name in lengths
    } == lengths
    assert {shipped_catalog().find_set(f"longbench_{name}").config for name in lengths} == set(
        lengths
    )
    prompts = json.loads((shared_data / "longcontext" / "dataset2prompt.json").read_text())
    for name, prompt in prompts.items():  # ours are our own words
        assert prompt not in shipped_catalog().find_set(f"longbench_{name}").templates
