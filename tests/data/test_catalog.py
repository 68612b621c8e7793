"""The catalogue of named sets: rows as the hub has them give the right items in every template;
names are forgiving.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.catalog import (
    NamedSetItem,
    item_conversation,
    prompt_with_cue,
    shipped_catalog,
)
from lorry.data.catalog.item import fill_template, shorten_text
from lorry.data.catalog.layouts import option_by_label
from lorry.data.catalog.text_rows import bare_number
from lorry.data.reading.content import ChatMessage, UnusableRowError
from lorry.errors import ConfigError
from tests.support.hubrows import ARC, COQA, LONG, ROWS, Expected

# the templates of bool_q for rows 0 to 11 under seed 0
PINNED = [
    4,
    0,
    2,
    0,
    2,
    2,
    2,
    3,
    3,
    2,
    2,
    4,
]
METRICS = {
    "accuracy",
    "exact_match",
    "token_f1",
    "rouge_l",
    "rouge_1",
    "rouge_2",
    "bleu",
    "chrf",
    "coverage",
    "number_match",
}


def test_every_set_has_a_row_here() -> None:
    assert set(ROWS) | {"coqa"} == set(shipped_catalog().sets)


@pytest.mark.parametrize(("name", "expected"), ROWS.items(), ids=ROWS)
def test_hub_rows_in_every_template(name: str, expected: Expected) -> None:
    found, prompts = shipped_catalog().find_set(name), set()
    for template in range(len(found.templates)):
        item = found.item(expected.row, template)
        assert (item.answer, item.options, item.right) == (
            expected.answer,
            expected.options,
            expected.right,
        )
        assert item.references == (expected.references or (expected.answer,))
        assert item.cue == found.cue
        assert not item.shortened
        for text in expected.shows:
            assert text in item.prompt, (template, item.prompt)
        assert not re.search(r"[{}]", item.prompt), "a placeholder is left"
        assert not re.search(r"\n\n\n|^\s|\s$", item.prompt), "an empty paragraph is left"
        if expected.hidden:
            assert expected.answer not in item.prompt
        prompts.add(item.prompt)
    assert len(prompts) == len(found.templates), "two templates say the same"


@pytest.mark.parametrize("found", shipped_catalog().sets.values(), ids=shipped_catalog().sets)
def test_declarations(found: Any) -> None:
    assert len(found.templates) >= 4
    assert len(set(found.templates)) == len(found.templates)
    assert found.metrics
    assert set(found.metrics) <= METRICS
    assert all((found.licence, found.source, found.about))
    assert found.max_new_tokens > 0
    if found.hub:
        assert (
            {"validation", "test"} <= set(found.splits) <= {"train", "validation", "test", "shots"}
        )
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", found.hub)
    used = [
        {name for _, name, _, _ in string.Formatter().parse(text) if name}
        for text in found.templates
    ]
    asked = [names - {"options", "listed", "lettered"} for names in used]
    optional = {"subject", "activity", "input"}
    assert len({frozenset(names - optional) for names in asked}) == 1, (
        "a template leaves out a column that the others show"
    )


def test_options_stay_in_their_order() -> None:
    for template in range(5):
        prompt = shipped_catalog().find_set("arc").item(ARC, template).prompt
        places = [prompt.index(text) for text in ARC["choices"]["text"]]
        assert places == sorted(places)


def test_coqa_asks_every_turn() -> None:
    for template in range(len(shipped_catalog().find_set("coqa").templates)):
        items = shipped_catalog().find_set("coqa").items(COQA, template)
        assert [item.answer for item in items] == ["Tom", "red", "no"]
        for turn, item in enumerate(items):
            assert COQA["story"] in item.prompt
            assert [question in item.prompt for question in COQA["questions"]] == [
                at <= turn for at in range(3)
            ]
            assert f"A: {COQA['answers']['input_text'][turn]}" not in item.prompt
        assert "{" not in items[0].prompt
    with pytest.raises(UnusableRowError, match="3 questions"):
        shipped_catalog().find_set("coqa").item(COQA)


def test_optional_columns_leave_no_gap() -> None:
    without = shipped_catalog().find_set("bool_q").item({"question": "is ice cold", "answer": True})
    assert without.prompt == "Question: is ice cold?\nAnswer yes or no."
    assert fill_template("{a} and {b}\n\n{c}", {"a": "1", "c": "3"}) == "3"
    assert fill_template("{a}\n\n{b}", {"a": "{b}", "b": "2"}) == "{b}\n\n2", (
        "a value is not read as a template"
    )
    assert (
        shipped_catalog()
        .find_set("mmlu")
        .item(ROWS["mmlu"].row)
        .prompt.startswith("The subject is abstract algebra.\n\n")
    )


def test_contexts_are_cut_at_a_word_and_it_shows() -> None:
    row = {"question": "q?", "answer": True, "passage": "word " * 1000}
    item = shipped_catalog().find_set("bool_q").item(row)
    assert item.shortened
    # 2000 characters: 400 words of four letters and a space
    assert item.prompt.count("word") == 400
    assert not shipped_catalog().find_set("bool_q").item(row | {"passage": "word " * 400}).shortened
    assert (
        shipped_catalog()
        .find_set("qmsum")
        .item(LONG | {"context": "word " * 9000})
        .prompt.count("word")
        == 9000
    )


@given(
    st.lists(st.text("ab", min_size=1, max_size=9), min_size=3, max_size=9),
    st.sampled_from(" \n"),
    st.floats(0, 1),
)
def test_shorten(words: list[str], gap: str, share: float) -> None:
    text = gap.join(words)
    limit = max(1, int(share * len(text)))
    kept = shorten_text(f" {text}\n", limit)
    # as many whole words from the start as fit; where not even the first does, its letters
    most = max(
        (at for at in range(len(words) + 1) if len(gap.join(words[:at])) <= limit), default=0
    )
    assert kept == (gap.join(words[:most]) or text[:limit])


def test_a_label_in_all_its_forms() -> None:
    options = ["red", "green", "blue"]
    assert [option_by_label(label, options) for label in ("green", "B", 1, "1", " B ")] == [1] * 5
    assert option_by_label("2", ["5", "6"], ["1", "2"]) == 1
    assert option_by_label("1", ["0", "1"]) == 1, "text and position agree"
    for label in ("D", 3, -1, "-1", "--1", None, True, "purple"):
        with pytest.raises(UnusableRowError):
            option_by_label(label, options)


@pytest.mark.parametrize("label", ["BC", "AB", "--1", "E", "4", ""])
def test_a_column_label_is_one_letter_or_number(label: str) -> None:
    row = {"context": "c", "question": "q", **{f"answer{n}": text for n, text in enumerate("wxyz")}}
    assert shipped_catalog().find_set("cosmos_qa").item({**row, "label": "B"}).right == (1,)
    with pytest.raises(UnusableRowError):
        shipped_catalog().find_set("cosmos_qa").item({**row, "label": label})


def test_numbers_are_bare() -> None:
    known = {
        "51.0": "51",
        51.0: "51",
        "1,450": "1450",
        "$3.50": "3.5",
        "-7": "-7",
        "12%": "12",
        "0.30": "0.3",
        "100": "100",
        0.5: "0.5",
    }
    assert {value: bare_number(value) for value in known} == known
    for value in ("", "x", "1.2.3", None, True, "3 apples"):
        with pytest.raises(UnusableRowError):
            bare_number(value)


@settings(max_examples=25)
@given(st.integers(), st.sampled_from(sorted(shipped_catalog().sets)))
def test_templates_are_drawn_evenly(seed: int, name: str) -> None:
    found = shipped_catalog().find_set(name)
    drawn = [found.template_of(seed, number) for number in range(1000)]
    assert drawn == [found.template_of(seed, number) for number in range(1000)]
    counts, share = Counter(drawn), 1000 / len(found.templates)
    assert set(counts) == set(range(len(found.templates)))
    # chi-squared; 30 is beyond the 1e-5 quantile of 4 degrees of freedom, the most there are
    assert sum((count - share) ** 2 / share for count in counts.values()) < 30


def test_templates_are_the_same_on_every_machine() -> None:
    """The draws of today, written down: a change would give every old run other data."""
    assert [
        shipped_catalog().find_set("bool_q").template_of(0, number) for number in range(12)
    ] == PINNED
    assert [
        shipped_catalog().find_set("arc_easy").template_of(0, number) for number in range(12)
    ] != PINNED
    assert [
        shipped_catalog().find_set("bool_q").template_of(1, number) for number in range(12)
    ] != PINNED


def test_longbench_inputs_keep_their_own_cue() -> None:
    item = shipped_catalog().find_set("trec").item(ROWS["longbench_trec"].row)
    assert prompt_with_cue(item).endswith("\nType:")
    assert prompt_with_cue(item).count("Type:") == 1


def test_names_are_forgiving() -> None:
    for spelling, name in {
        "boolq": "bool_q", "BoolQ": "bool_q", "google/boolq": "bool_q", "commongen": "common_gen", "arc": "arc_challenge",
        "ARC-Easy": "arc_easy", "qmsum": "longbench_qmsum", "samsum": "samsum", "longbench_samsum": "longbench_samsum",
        "repobench-p": "longbench_repobench_p", "2wikimqa": "longbench_2wikimqa", "openai/gsm8k": "gsm8k", "hotpotqa":
        "longbench_hotpotqa", "databricks/databricks-dolly-15k": "dolly", "truthful_qa": "truthfulqa", "xquad": "xquad",
        "spa-eng": "eng_spa", "cosmosqa": "cosmos_qa", "SQuAD": "squad",
    }.items():  # fmt: skip
        assert shipped_catalog().find_set(spelling).name == name
    with pytest.raises(
        ConfigError,
        match=r"unknown set 'winogrand' \(did you mean 'winogrande'\?\)\. Sets: alpaca, anli.*Suites.*flan",
    ):
        shipped_catalog().find_set("winogrand")
    with pytest.raises(ConfigError, match=r"'commonsence' .did you mean 'commonsense'"):
        shipped_catalog().expand_suites(["commonsence"])


def test_suites() -> None:
    assert shipped_catalog().expand_suites("math") == ["gsm8k", "svamp"]
    assert shipped_catalog().expand_suites(["boolq", "commonsense", "bool_q", "arc"]) == [
        "bool_q", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "hellaswag",
    ]  # fmt: skip
    assert len(shipped_catalog().expand_suites("flan")) == 10
    assert len(shipped_catalog().expand_suites(["longbench", "longbench_zh"])) == 21
    for members in shipped_catalog().suites.values():
        assert [shipped_catalog().find_set(name).name for name in members] == list(members)


def test_splits() -> None:
    assert shipped_catalog().find_set("anli").split("validation") == "dev_r1"
    assert shipped_catalog().find_set("winogrande").split("test") == "validation"
    for name, wanted, message in (
        (
            "truthfulqa",
            "train",
            "no training rows, only validation, test.*data.local.truthfulqa=FILE",
        ),
        ("boolq_long", "test", "not on the hub; give a file for it"),
        ("squad", "tset", "no split 'tset'.*did you mean 'test'"),
    ):
        with pytest.raises(ConfigError, match=message):
            shipped_catalog().find_set(name).split(wanted)


def test_conversation_with_shots() -> None:
    shots = [
        NamedSetItem("Is 1 odd?", "yes", "Answer:", ("yes",)),
        NamedSetItem("Is 2 odd?", "no", "Answer:", ("no",)),
    ]
    item = NamedSetItem("Is 3 odd?", "yes", "Answer:", ("yes",))
    chat = item_conversation(item, shots)
    assert chat.messages == tuple(
        ChatMessage(role, text)  # type: ignore[arg-type]
        for asked, told in (("Is 1 odd?", "yes"), ("Is 2 odd?", "no"), ("Is 3 odd?", "yes"))
        for role, text in (("user", asked), ("assistant", told))
    )
    assert chat.plain == (
        "Is 1 odd?\nAnswer: yes\n\nIs 2 odd?\nAnswer: no\n\nIs 3 odd?\nAnswer:",
        " yes",
    )
    assert item_conversation(item).plain == ("Is 3 odd?\nAnswer:", " yes")
    assert len(item_conversation(item).messages) == 2
    assert prompt_with_cue(NamedSetItem("Go on", "x", "", ("x",))) == "Go on"


@pytest.mark.parametrize(
    "label",
    [
        "9" * 5000,
        "-" + "9" * 5000,
        2**70,
        -(2**70),
        float("inf"),
        float("nan"),
        "1e400",
        "\u0663" * 5000,
        -1,
    ],
)
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("anli", {"premise": "p", "hypothesis": "h"}),
        ("paws", {"sentence1": "s", "sentence2": "t"}),
        (
            "cosmos_qa",
            {"context": "c", "question": "q", **{f"answer{n}": f"a{n}" for n in range(4)}},
        ),
        ("cosmos_qa", {"context": "c", "question": "q", "choices": ["a", "b"]}),
        ("bool_q", {"question": "q", "passage": "p"}),
    ],
)
def test_labels_that_are_no_position(name: str, row: dict[str, Any], label: Any) -> None:
    """Digits that no integer holds, numbers beyond every range: a bad row each, never a ValueError
    of int().
    """
    with pytest.raises(UnusableRowError, match="label"):
        shipped_catalog().find_set(name).item({**row, "label": label})
