"""Rows of the catalogue's sets in other columns than the hub's, and rows that cannot be used: each
says why.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.catalog import NamedSetItem, shipped_catalog
from lorry.data.reading.content import UnusableRowError
from tests.support.hubrows import ARC, COQA, LONG, MC, ROWS, SQUAD, TRUTH

BAD: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "bool_q",
        {"question": "q", "answer": "maybe"},
        "label",
        r"'maybe' is outside the options: \(0: 'yes', 1: 'no'\)",
    ),
    (
        "anli",
        {"premise": "p", "hypothesis": "h", "label": -1},
        "label",
        r"-1 is outside .*entailment.*neutral.*contradiction",
    ),
    ("paws", {"sentence1": "a", "sentence2": "b", "label": 2}, "label", "2 is outside"),
    ("cosmos_qa", {**ROWS["cosmos_qa"].row, "label": -1}, "label", "-1 is outside .*Wet"),
    ("arc", ARC | {"answerKey": "E"}, "label", "'E' is outside .*'B: a magnet'"),
    ("winogrande", {**ROWS["winogrande"].row, "answer": ""}, "label", "'' is outside .*Ann.*Eve"),
    ("winogrande", {**ROWS["winogrande"].row, "answer": "3"}, "label", "'3' is outside"),
    ("hellaswag", {**ROWS["hellaswag"].row, "label": ""}, "label", "'' is outside"),
    ("mmlu", {**ROWS["mmlu"].row, "answer": 4}, "label", "4 is outside"),
    (
        "mmlu",
        {**ROWS["mmlu"].row, "answer": "2"},
        "label",
        "may be an option's text or its position",
    ),
    (
        "trec",
        LONG | {"all_classes": ["Food", "Date"], "answers": ["Place"]},
        "label",
        "'Place' is outside",
    ),
    (
        "arc_easy",
        {
            "instruction": "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b\n\n"
            "Answer format: answer1/answer2",
            "answer": "answer3",
        },
        "label",
        "'answer3' is outside .*answer1: a",
    ),
    ("arc_easy", {"instruction": "Tell me a joke", "answer": "answer1"}, "format", "LLM-Adapters"),
    (
        "truthfulqa_mc",
        MC | {"mc2_targets": {"choices": ["a", "b"], "labels": [0, 0]}},
        "label",
        "no option is marked",
    ),
    ("common_gen", {"concepts": ["ski"], "target": ""}, "empty answer", "nothing to train on"),
    ("common_gen", {"concepts": [], "target": "He skis."}, "empty prompt", "no concepts"),
    ("xsum", {"document": "", "summary": "s"}, "empty prompt", "document"),
    ("squad", SQUAD | {"answers": {"text": [], "answer_start": []}}, "unanswerable", "no answer"),
    ("gsm8k", {"question": "q", "answer": "I do not know"}, "no number", "is not a number"),
    ("svamp", {"Body": "b", "Question": "q", "Answer": "many"}, "no number", "'many'"),
    ("dolly", {"instruction": "Do", "response": " "}, "empty answer", "nothing to train on"),
    ("coqa", COQA | {"questions": ["only one"]}, "format", "1 questions and 3 answers"),
    (
        "xsum",
        {"body": "x", "headline": None},
        "columns",
        r"'xsum' cannot be read from the columns 'body', 'headline' \(null\). Known: hub \(document\|article\|text \+ summary\)",
    ),
]


@pytest.mark.parametrize(
    ("name", "row", "kind", "reason"), BAD, ids=[f"{name}-{kind}" for name, _, kind, _ in BAD]
)
def test_bad_rows_say_what_is_wrong(name: str, row: dict[str, Any], kind: str, reason: str) -> None:
    with pytest.raises(UnusableRowError, match=reason) as caught:
        shipped_catalog().find_set(name).item(row)
    assert caught.value.bad.kind == kind


OTHER: list[tuple[str, dict[str, Any], str]] = [
    ("bool_q", {"question": "Is it?", "passage": "p", "label": 1}, "yes"),
    ("bool_q", {"query": "Is it?", "answer": "False"}, "no"),
    ("anli", {"premise": "p", "hypothesis": "h", "label": "neutral"}, "neutral"),
    ("openbookqa", {"question": "Q?", "choices": ["x", "y"], "answer": "y"}, "y"),
    ("arc", {"question": "Q?", "options": ["x", "y"], "label": 1}, "y"),
    (
        "mmlu",
        {
            "question": "Q?",
            "choice0": "1",
            "choice1": "2",
            "choice2": "0",
            "choice3": "3",
            "answer": "1",
        },
        "2",
    ),
    (
        "mmlu",
        {
            "question": "Q?",
            "choice0": "w",
            "choice1": "x",
            "choice2": "y",
            "choice3": "z",
            "answer": "C",
        },
        "y",
    ),
    (
        "hellaswag",
        {
            "instruction": "Please choose the correct ending to complete the given sentence: Rain: It\n\nEnding1: pours. "
            "Ending2: sings. Answer format: ending1/ending2",
            "output": "the correct answer is ending1",
        },
        "pours.",
    ),
    ("truthfulqa", {"question": "q", "answer": "a"}, "a"),
    ("truthfulqa_mc", TRUTH, "Yes"),
    ("truthfulqa_mc1", TRUTH, "Yes, bats can see"),
    ("eng_spa", {"translation": {"en": "Yes.", "es": "Sí."}}, "Sí."),
    (
        "dolly",
        {
            "prompt": "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:",
            "answer": "3###eos_token###",
        },
        "3",
    ),
    ("squad", {"passage": "p", "question": "q", "answer": "a"}, "a"),
    ("gsm8k", {"question": "q", "answer": "1,234"}, "#### 1234"),
    ("svamp", {"question_concat": "q", "Answer": "145.00"}, "145"),
    ("coqa", {"story": "s", "question": "q", "answer": "a"}, "a"),
]


@pytest.mark.parametrize(
    ("name", "row", "answer"), OTHER, ids=[f"{name}-{at}" for at, (name, _, _) in enumerate(OTHER)]
)
def test_other_layouts(name: str, row: dict[str, Any], answer: str) -> None:
    assert shipped_catalog().find_set(name).item(row).answer == answer


TEXTS = st.sampled_from(
    [
        "",
        " ",
        "a",
        "A b?",
        "1",
        "-1",
        "yes",
        "C",
        "#### 3",
        "x#y",
        "a;b",
        "{question}",
        "{",
        "entailment",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 6) | st.floats(allow_nan=True) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(
                ("text", "label", "choices", "labels", "input_text", "en", "es"), inner
            ),
        )
    ),
    max_leaves=6,
)


def check(item: NamedSetItem) -> None:
    assert item.prompt.strip()
    assert item.answer.strip()
    assert item.references
    assert all(0 <= place < len(item.options) for place in item.right)
    assert not item.options or item.answer in [item.options[place] for place in item.right]


@settings(max_examples=30)
@given(st.data())
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in shipped_catalog().sets
        if not name.startswith("longbench") or name.endswith(("qmsum", "trec"))
    ],
)
def test_any_row_is_read_or_refused(name: str, data: st.DataObject) -> None:
    """Whatever stands in the columns, there are sound items or a reason, never another error."""
    found = shipped_catalog().find_set(name)
    form = data.draw(st.sampled_from(found.layouts))
    row = {column: data.draw(VALUES, label=column) for group in form.needs for column in group}
    try:
        items = found.items(row, data.draw(st.integers(0, len(found.templates) - 1)))
    except UnusableRowError as error:
        reason = error.bad
    else:
        for item in items:
            check(item)
        return
    assert reason.kind
    assert reason.reason
