"""Columns decide the format; fields are checked one by one; what cannot be learnt from is a bad row
with a reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.content import ChatMessage, Conversation, TextDocument
from lorry.data.reading.formats import (
    FORMATS,
    detect_format,
    format_named,
    normalise_row,
    read_examples,
)
from lorry.data.reading.sources import open_source
from lorry.errors import DataError


def user(text: str) -> ChatMessage:
    return ChatMessage("user", text)


def said(text: str, reasoning: str = "") -> ChatMessage:
    return ChatMessage("assistant", text, reasoning)


SYSTEM = ChatMessage("system", "Be kind")
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
GOOD: list[tuple[str, dict[str, Any], Any]] = [
    ("text", {"text": "t", "id": 3}, TextDocument("t")),
    (
        "prompt_completion",
        {"prompt": "p ", "completion": "c"},
        Conversation((user("p "), said("c")), ("p ", "c")),
    ),
    (
        "prompt_completion",
        {"prompt": "p", "answer": 7},
        Conversation((user("p"), said("7")), ("p", "7")),
    ),
    (
        "prompt_completion",
        {"prompt": "p", "completion": "c", "system": "Be kind"},
        Conversation((SYSTEM, user("p"), said("c")), ("Be kind\n\np", "c")),
    ),
    (
        "prompt_completion",
        {"prompt": [{"role": "system", "content": "Be kind"}, CHAT[0]], "completion": [CHAT[1]]},
        Conversation((SYSTEM, user("q"), said("a"))),
    ),
    (
        "prompt_completion",
        {"prompt": [CHAT[0]], "completion": "c"},
        Conversation((user("q"), said("c"))),
    ),
    ("messages", {"messages": CHAT, "text": "rendered"}, Conversation((user("q"), said("a")))),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": t} for t in "q?"]},
                CHAT[1],
            ]
        },
        Conversation((user("q?"), said("a"))),
    ),
    (
        "messages",
        {"messages": [CHAT[0], {"role": "assistant", "content": "a", "reasoning_content": "hm"}]},
        Conversation((user("q"), said("a", "hm"))),
    ),
    (
        "conversations",
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "system": "Be kind",
        },
        Conversation((SYSTEM, user("q"), said("a"))),
    ),
    (
        "alpaca",
        {"instruction": "Do", "input": "this", "output": "done", "answer": "x"},
        Conversation(
            (user("Do\n\nthis"), said("done")),
            ("### Instruction:\nDo\n\n### Input:\nthis\n\n### Response:\n", "done"),
        ),
    ),
    (
        "alpaca",
        {"instruction": "Do", "input": " ", "output": "done", "system": "Be kind"},
        Conversation(
            (SYSTEM, user("Do"), said("done")),
            ("Be kind\n\n### Instruction:\nDo\n\n### Response:\n", "done"),
        ),
    ),
    (
        "alpaca",
        {"instruction": "Do", "context": "this", "response": "done", "category": "x"},
        Conversation(
            (user("Do\n\nthis"), said("done")),
            ("### Instruction:\nDo\n\n### Input:\nthis\n\n### Response:\n", "done"),
        ),
    ),
    (
        "alpaca",
        {"instruction": "Do", "output": "done", "history": [["q", "a"]]},
        Conversation((user("q"), said("a"), user("Do"), said("done"))),
    ),
    (
        "question_answer",
        {"question": "q", "answer": "a", "perturbed_answer": ["x"]},
        Conversation((user("q"), said("a")), ("Question: q\nAnswer:", " a")),
    ),
    (
        "question_answer",
        {"question": "q", "answers": ["first", "second"], "context": "c"},
        Conversation((user("c\n\nq"), said("first")), ("c\n\nQuestion: q\nAnswer:", " first")),
    ),
    (
        "question_answer",
        {"question": "q", "answers": {"text": ["a"], "answer_start": [0]}},
        Conversation((user("q"), said("a")), ("Question: q\nAnswer:", " a")),
    ),
    (
        "question_answer",
        {"query": "q", "response": "a"},
        Conversation((user("q"), said("a")), ("Question: q\nAnswer:", " a")),
    ),
]


@pytest.mark.parametrize(("name", "row", "content"), GOOD)
def test_good_rows(name: str, row: dict[str, Any], content: Any) -> None:
    form = detect_format(row)
    assert form.name == name
    assert normalise_row(row, form) == content


SAID_TWICE = [CHAT[0], {"role": "assistant", "content": "a", "from": "gpt", "value": "b"}]
TEXT_PART = {"type": "text", "text": "hi"}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"text": "  "}, "empty answer", "'text' is empty"),
    ({"text": None}, "columns", "column 'text' is missing or null"),
    ({"text": 1.5}, "format", "the number 1.5"),
    ({"text": "\ud800"}, "encoding", "half a surrogate pair at character 1"),
    ({"prompt": "p", "completion": "\n"}, "empty answer", "'completion' is empty"),
    (
        {"prompt": "p", "completion": None},
        "columns",
        "column 'completion|response|answer|output' is missing or null",
    ),
    ({"prompt": [CHAT[0]], "completion": []}, "no answer", "'completion' is an empty list"),
    ({"prompt": [CHAT[0]], "completion": [CHAT[0]]}, "no answer", "no assistant turn"),
    ({"question": "q", "answer": True}, "format", "the boolean True (write it as the text"),
    ({"question": "q", "answers": []}, "empty answer", "'answers' is empty"),
    ({"messages": []}, "no answer", "empty list"),
    ({"messages": "hello"}, "format", "expected a list of messages"),
    (
        {"messages": "[{'role': 'user'}]"},
        "json",
        "'messages' as JSON text: column 3: not valid JSON",
    ),
    ({"messages": '[{"role": "user", "role": "gpt"}]'}, "json", "the key 'role' is given twice"),
    ({"messages": "[" * 5000}, "json", "nested too deeply"),
    (
        {"messages": SAID_TWICE},
        "format",
        "messages[1]: 'from', 'value' and 'role', 'content' differ",
    ),
    ({"messages": 3}, "format", "expected a list of messages"),
    ({"messages": ["hello"]}, "format", "messages[0] is a str"),
    ({"messages": CHAT[:1]}, "no answer", "no assistant turn"),
    (
        {"messages": [CHAT[0], {"role": "assistant", "content": ""}]},
        "empty answer",
        "'messages[1].content' is empty",
    ),
    (
        {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
        "format",
        "'messages[1].content' holds nothing",
    ),
    (
        {"messages": [CHAT[0], {"role": "asistant", "content": "a"}]},
        "roles",
        "messages[1]: unknown role 'asistant'; known are system",
    ),
    ({"messages": [{"content": "a"}]}, "roles", "unknown role None"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "roles", "unknown role ['user']"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "roles", "tool calls are not supported"),
    (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]},
        "roles",
        "tool calls are not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "format",
        "messages[0].content[0] is a part of type 'image'",
    ),
    *(
        (
            {
                "messages": [
                    CHAT[0],
                    {"role": "assistant", "content": [TEXT_PART, TEXT_PART | part]},
                ]
            },
            kind,
            f"content[1]{reason}",
        )
        for part, kind, reason in [
            (
                {"weight": 0},
                "keys",
                ".weight: a content part has the keys type and text only; weights belong beside a turn",
            ),
            ({"train": False}, "keys", ".train: "),
            ({"Mask": 1}, "keys", ".Mask: "),
            ({"image_url": "u"}, "keys", ".image_url: "),
            (
                {"type": "image_url", "image_url": {"url": "u"}},
                "format",
                " is a part of type 'image_url'",
            ),
            ({"type": None}, "format", " is a part of type 'None'"),
            ({"text": None}, "format", ".text' holds nothing"),
        ]
    ),
    ({"instruction": [TEXT_PART | {"weight": 0}], "output": "a"}, "keys", "instruction[0].weight"),
    ({"conversations": [{"from": "bing", "value": "a"}]}, "roles", "unknown from 'bing'"),
    ({"instruction": "i", "output": ""}, "empty answer", "'output' is empty"),
    (
        {"instruction": "i", "output": "o", "history": [["q"]]},
        "format",
        "'history[0]' is a list, expected [question, answer]",
    ),
    ({"instruction": "i", "output": "o", "history": "q"}, "format", "'history' is a str"),
    (
        {"instruction": "i", "output": "o", "history": [["q", ""]]},
        "empty answer",
        "'history[0][1]' is empty",
    ),
]


NULL_TWINS = [
    {"from": "human", "value": "q", "role": None, "content": None, "weight": None},
    {"from": None, "value": None, "role": "assistant", "content": "a", "tool_calls": None},
]


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize(
    "write",
    [
        lambda turns: turns,
        json.dumps,
        lambda turns: f" \n{json.dumps(turns, indent=1)}",
        lambda turns: [*map(json.dumps, turns)],
    ],
)
def test_turns_of_merged_tables_and_as_json_text(column: str, write: Any) -> None:
    """union_keys.jsonl: 'unknown from None'; turns as JSON text, as CSV has to write them:
    'expected a list of messages'.
    """
    row = {column: write(NULL_TWINS)}
    assert normalise_row(row, detect_format(row)) == Conversation((user("q"), said("a")))


@pytest.mark.parametrize("write", [lambda turns: turns, json.dumps])
def test_prompts_of_turns_as_json_text(write: Any) -> None:
    form = FORMATS["prompt_completion"]
    row = {"prompt": write([CHAT[0]]), "completion": write([CHAT[1]])}
    assert normalise_row(row, form) == Conversation((user("q"), said("a")))
    text = '[{"name": "x"}]'  # JSON that is no chat is what the model is to read and say
    assert normalise_row({"prompt": text, "completion": text}, form) == Conversation(
        (user(text), said(text)), (text, text)
    )
    alpaca = {"instruction": "i", "output": "o", "history": write([["q", "a"]])}
    made = normalise_row(alpaca, FORMATS["alpaca"])
    assert isinstance(made, Conversation)
    assert made.messages[:2] == (user("q"), said("a"))


@pytest.mark.parametrize(
    "columns",
    [["text", *(f"c{n}" for n in range(10_000))], ["text", "x" * 300_000, *map(str, range(30))]],
)
def test_thousands_of_columns_are_counted(tmp_path: Path, columns: list[str]) -> None:
    """10,000 unused columns printed 271 KB."""
    notes: set[str] = set()
    (tmp_path / "d.jsonl").write_text(json.dumps(dict.fromkeys(columns, "t")) + "\n")
    assert len(list(read_examples(open_source(tmp_path / "d.jsonl"), add_note=notes.add))) == 1
    (note,) = notes
    assert note.endswith(f" and {len(columns) - 13} more")
    assert len(note) < 400 + len(str(tmp_path))
    with pytest.raises(DataError, match=rf" and {len(columns) - 13} more\. Known: ") as caught:
        detect_format(columns[1:])
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(("row", "kind", "reason"), BAD)
def test_bad_rows(row: dict[str, Any], kind: str, reason: str) -> None:
    bad = normalise_row(row, detect_format(row))
    assert isinstance(bad, BadRow)
    assert bad.kind == kind
    assert reason in bad.reason


def test_unknown_columns_list_what_is_there_and_what_is_known() -> None:
    with pytest.raises(DataError) as caught:
        detect_format(["Question", "Answer", "Body"], "svamp.json:1")
    message = str(caught.value)
    assert message.startswith(
        "svamp.json:1: no known format has the columns 'Question', 'Answer', 'Body'"
    )
    assert "'Question' is not 'question'" in message
    assert all(name in message for name in FORMATS)


@pytest.mark.parametrize("extra", ["choices", "choice0", "options", "Option_1"])
def test_multiple_choice_is_not_taken_for_question_and_answer(extra: str) -> None:
    with pytest.raises(DataError, match="multiple choice"):
        detect_format(["question", "answer", extra])


def test_a_chosen_format_and_a_chosen_column() -> None:
    assert format_named() is None
    text = format_named("text")
    assert text is not None
    assert normalise_row({"text": "t", "messages": []}, text) == TextDocument("t")
    body = format_named("auto", text_field="body")
    assert body is not None
    assert normalise_row({"body": "b", "text": "t"}, body) == TextDocument("b")
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        format_named("alpacca")


def test_a_file_keeps_the_format_of_its_first_row(tmp_path: Path) -> None:
    """A later row that lacks a column is a bad row, not another format; another file may have
    another format.
    """
    lines = [
        {"prompt": "p", "completion": "c"},
        {"text": "t"},
        {"prompt": "p2", "completion": "c2", "text": "x"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.jsonl").write_text('{"text": "t", "source": "s"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'prompt' is missing"):
        list(read_examples(open_source(tmp_path)))
    notes: set[str] = set()
    source = open_source(tmp_path, on_bad_row="skip")
    found = list(read_examples(source, add_note=notes.add))
    assert [(item.number, Path(item.where).name) for item in found] == [
        (0, "a.jsonl:1"),
        (2, "a.jsonl:3"),
        (3, "b.jsonl:1"),
    ]
    assert found[2].content == TextDocument("t")
    assert dict(source.bad.counts) == {"columns": 1}
    assert notes == {f"{tmp_path}/b.jsonl: read as text; columns not used: source"}


def test_reading_from_the_middle_gives_the_same_rows(tmp_path: Path) -> None:
    """Row 0 has two formats' columns and settles the file's format, also for a reader that starts
    later.
    """
    lines = [{"messages": CHAT, "text": "t"}, {"text": "only"}, {"messages": CHAT}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = [item.number for item in read_examples(open_source(tmp_path, on_bad_row="skip"))]
    late = [
        item.number for item in read_examples(open_source(tmp_path, on_bad_row="skip"), start=1)
    ]
    assert (read, late) == ([0, 2], [2])


KEYS = ["role", "content", "from", "value", "type", "text"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "gpt", "\udc80"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(form=st.sampled_from(list(FORMATS.values())), data=st.data())
def test_any_values_give_content_or_a_bad_row(form: Any, data: st.DataObject) -> None:
    columns = [group[0] for group in form.needs] + list(form.may)
    row = {column: data.draw(VALUES) for column in columns}
    made = normalise_row(row, form)
    if isinstance(made, Conversation):
        assert any(
            message.role == "assistant" and message.content.strip() for message in made.messages
        )
        "".join(message.content for message in made.messages).encode()
    elif isinstance(made, TextDocument):
        assert made.text.strip()
    else:
        assert made.reason


def test_parts_of_a_content_are_joined() -> None:
    """What a server is told about its cache, and nulls of merged tables, say nothing that a model
    reads.
    """
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "b", "image_url": None},
    ]
    row = {"messages": [CHAT[0], {"role": "assistant", "content": parts}]}
    assert normalise_row(row, detect_format(row)) == Conversation((user("q"), said("ab")))


ROWS_OF_A_FORMAT = (
    {"messages": CHAT},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "completion": "a"},
    {"instruction": "q", "output": "a"},
    {"question": "q", "answer": "a"},
    {"text": "t"},
)


@pytest.mark.parametrize("row", ROWS_OF_A_FORMAT, ids=lambda row: "+".join(row))
@pytest.mark.parametrize("column", ["weight", "train", "loss"])
def test_a_row_that_teaches_nothing_is_left_out_with_a_count(
    tmp_path: Path, row: dict[str, Any], column: str
) -> None:
    path = tmp_path / "a.jsonl"
    values = [None, 1, 0, False, 1.0, 0.0, True, "0", "True", ""]
    path.write_text("".join(json.dumps({**row, column: value}) + "\n" for value in values))
    source, notes = open_source(str(path)), set[str]()
    found = list(read_examples(source, add_note=notes.add))
    assert [one.where for one in found] == [f"{path}:{line}" for line in (1, 2, 5, 7, 9, 10)]
    assert source.bad.counts == {"marked as not for training": 4}
    assert not notes


@pytest.mark.parametrize("row", ROWS_OF_A_FORMAT, ids=lambda row: "+".join(row))
@pytest.mark.parametrize(
    "columns",
    [{"weight": 0.5}, {"train": "yes"}, {"loss": "low"}, {"weight": [0]}, {"weight": 1, "loss": 0}],
)
def test_a_row_that_teaches_a_little_is_refused_by_name(
    row: dict[str, Any], columns: dict[str, Any]
) -> None:
    bad = normalise_row({**row, **columns}, detect_format(row))
    assert isinstance(bad, BadRow)
    assert bad.kind == "keys"
    assert all(f"'{name}'" in bad.reason for name in columns)


@pytest.mark.parametrize(
    "columns", [{"loss": 2.25}, {"loss": 0.4}, {"weight": 70}, {"weight": -1.5}, {"train": 12}]
)
@pytest.mark.parametrize("row", ROWS_OF_A_FORMAT, ids=lambda row: "+".join(row))
def test_measurements_of_a_row_are_columns_like_any_other(
    row: dict[str, Any], columns: dict[str, Any]
) -> None:
    assert normalise_row({**row, **columns}, detect_format(row)) == normalise_row(
        row, detect_format(row)
    )


def test_a_row_s_weight_is_read_from_a_table_of_columns_and_may_be_its_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table(
            {"question": ["q", "r"], "answer": ["a", "b"], "weight": [0, 1], "loss": ["x", "y"]}
        ),
        path,
    )
    with pytest.raises(DataError, match="column 'loss' is 'x'"):
        list(read_examples(open_source(str(path))))
    pq.write_table(pa.table({"question": ["q", "r"], "answer": ["a", "b"], "weight": [0, 1]}), path)
    assert [found.values["question"] for found in read_examples(open_source(str(path)))] == ["r"]
    assert normalise_row(
        {"loss": "told"}, format_named(text_field="loss") or FORMATS["text"]
    ) == TextDocument("told")
