"""What rows say about their turns: which answers are learnt, tools and system messages, prompts
that are rendered already.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from lorry.data.encoding.encode import TOO_LONG, EncodedSequence, ExampleEncoder
from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.content import ChatMessage, Conversation, ExampleContent, TextDocument
from lorry.data.reading.formats import detect_format, normalise_row
from lorry.errors import DataError

Tokenizers = Callable[..., Any]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "timetable", "parameters": {"type": "object", "properties": {}}},
    }
]
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SWITCHES = [("weight", 0, 1), ("train", False, True), ("loss", False, True), ("weight", 0.0, 1.0)]
ASK = {"role": "user", "content": "When?"}


def read(**columns: Any) -> ExampleContent | BadRow:
    return normalise_row(columns, detect_format(columns))


def sound(**columns: Any) -> ExampleContent:
    content = read(**columns)
    assert not isinstance(content, BadRow), content
    return content


def only(made: list[EncodedSequence] | BadRow) -> EncodedSequence:
    assert not isinstance(made, BadRow), made
    assert len(made) == 1
    return made[0]


def marked(encoder: ExampleEncoder, made: EncodedSequence) -> str:
    return "".join(f"«{text}»" if learnt else text for text, learnt in encoder.marked_text(made))


def turn(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


@pytest.mark.parametrize(("key", "off", "on"), SWITCHES)
@pytest.mark.parametrize("whole", [False, True])
def test_a_turn_that_is_not_to_be_learnt_has_weight_0(
    tokenizer_of: Tokenizers, key: str, off: Any, on: Any, whole: bool
) -> None:
    tokenizer = tokenizer_of("chatml")
    messages = [
        ASK,
        turn("WRONG", **{key: off}),
        {"role": "user", "content": "Sure?"},
        turn("At nine.", **{key: on}),
    ]
    encoder = ExampleEncoder(tokenizer, max_length=200, completion_only_loss=not whole)
    made = only(encoder.encode(sound(messages=messages)))
    text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix(
        "\n" if not whole else ""
    )
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert made.tokens == expected["input_ids"]  # the tokens are what they are without the mark
    wrong, right = text.index("WRONG<|im_end|>"), text.index("At nine.")
    for (start, end), weight in zip(expected["offset_mapping"][1:], made.weights[1:], strict=True):
        inside = start < wrong + len("WRONG<|im_end|>") and end > wrong
        assert weight == float(not inside and (whole or start >= right))


def test_an_answer_behind_the_last_learnt_one_teaches_nothing(tokenizer_of: Tokenizers) -> None:
    encoder = ExampleEncoder(tokenizer_of("chatml"), max_length=200)
    made = only(
        encoder.encode(sound(messages=[ASK, turn("At nine."), ASK, turn("WRONG", weight=0)]))
    )
    assert (
        marked(encoder, made)
        == "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n«At nine.<|im_end|>»"
    )


def test_a_rewritten_turn_that_is_not_to_be_learnt_gets_no_sequence(
    tokenizer_of: Tokenizers,
) -> None:
    encoder = ExampleEncoder(tokenizer_of("qwen3"), max_length=200)
    messages = [ASK, turn("WRONG", weight=0), ASK, turn("At nine.")]
    learnt = [
        text
        for text, taken in encoder.marked_text(only(encoder.encode(sound(messages=messages))))
        if taken
    ]
    assert "WRONG" not in "".join(learnt)
    assert "At nine." in "".join(learnt)


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma"])
@pytest.mark.parametrize(("key", "off"), [(key, off) for key, off, _ in SWITCHES[:3]])
def test_a_prompt_turn_that_is_not_to_be_learnt_has_weight_0_where_all_is_learnt(
    tokenizer_of: Tokenizers, role: str, family: str, key: str, off: Any
) -> None:
    encoder = ExampleEncoder(tokenizer_of(family), max_length=200, completion_only_loss=False)
    mine = {"role": role, "content": "AAAA"}
    messages = (
        [mine, ASK, turn("Yes.")]
        if role == "system"
        else [ASK, turn("At nine."), mine, turn("Yes.")]
    )
    made = only(
        encoder.encode(
            sound(
                messages=[
                    {**message, key: off} if message is mine else message for message in messages
                ]
            )
        )
    )
    # the mark changes no token
    assert made.tokens == only(encoder.encode(sound(messages=messages))).tokens
    left_out = [
        token for token, weight in zip(made.tokens[1:], made.weights[1:], strict=True) if not weight
    ]
    # it takes no system message: put before the question
    folded = family == "gemma" and role == "system"
    assert encoder.tokenizer.decode(left_out).strip() == "AAAA" + (
        "" if folded else encoder.template.end_of_turn
    )


PARTLY = [
    {"begin_offset": 0, "end_offset": 4, "train": False},
    {"begin_offset": 5, "end_offset": 6, "train": True},
]


@pytest.mark.parametrize("keys", [{"weight": 0}, {"train_detail": PARTLY}])
def test_a_rewritten_answer_that_is_not_to_be_learnt_has_weight_0_where_all_is_learnt(
    tokenizer_of: Tokenizers, keys: dict[str, Any]
) -> None:
    encoder = ExampleEncoder(tokenizer_of("qwen3"), max_length=200, completion_only_loss=False)
    made = only(
        encoder.encode(sound(messages=[ASK, turn("WRONG 7", **keys), ASK, turn("At nine.")]))
    )
    learnt = "".join(text for text, taken in encoder.marked_text(made) if taken)
    assert "WRONG" in encoder.tokenizer.decode(made.tokens)
    assert "WRO" not in learnt
    assert "At nine." in learnt


def test_train_detail_counts_characters_with_both_ends_included(tokenizer_of: Tokenizers) -> None:
    tokenizer = tokenizer_of("chatml")
    answer = "aaa bbb ccc"
    detail = [
        {"begin_offset": 8, "end_offset": 10, "train": True},
        {"begin_offset": 0, "end_offset": 2, "train": True},
    ]
    messages = [
        ASK,
        turn(answer, train_detail=[*detail, {"begin_offset": 3, "end_offset": 7, "train": False}]),
    ]
    made = only(ExampleEncoder(tokenizer, max_length=200).encode(sound(messages=messages)))
    text = tokenizer.apply_chat_template([ASK, turn(answer)], tokenize=False).removesuffix("\n")
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert made.tokens == expected["input_ids"]
    at = text.index(answer)
    wanted = [
        float(s >= at and not (s < at + 8 and e > at + 3)) for s, e in expected["offset_mapping"]
    ]
    assert made.weights == wanted
    assert 0.0 in wanted[-5:]
    assert wanted[-1] == 1.0
    assert {e - at for (s, e), w in zip(expected["offset_mapping"], wanted, strict=True) if w} >= {
        3,
        11,
    }


@pytest.mark.parametrize(("keys", "word"), [
    ({"weight": 0.5}, "weight"), ({"weight": -1}, "weight"), ({"weight": "0"}, "weight"), ({"train": "no"}, "train"),
    ({"Weight": 0}, "write weight"), ({"TRAIN": False}, "write train"), ({"Loss": 0}, "write loss"),
    ({"mask": True}, "mask"), ({"loss_mask": 1}, "loss_mask"), ({"weight": 0, "train": True}, "contradict"),
    ({"train_detail": [{"begin_offset": 0, "end_offset": 99, "train": True}]}, "train_detail"),
    ({"train_detail": [{"begin_offset": 0, "end_offset": 1}]}, "train_detail"),
    ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}] * 2}, "overlap"),
    ({"reasoning_content": "a", "thinking": "b"}, "differ"), ({"function_call": {"name": "f"}}, "tool calls"),
])  # fmt: skip
def test_keys_that_cannot_be_honoured_refuse_the_row(keys: dict[str, Any], word: str) -> None:
    bad = read(messages=[ASK, turn("At nine.", **keys)])
    assert isinstance(bad, BadRow)
    assert word in bad.reason
    assert "messages[1]" in bad.reason


def test_a_question_that_is_to_be_learnt_and_a_row_of_which_nothing_is(
    tokenizer_of: Tokenizers,
) -> None:
    bad = read(messages=[{**ASK, "train": True}, turn("At nine.")])
    assert isinstance(bad, BadRow)
    assert "only answers have a loss" in bad.reason
    bad = read(
        conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]
    )
    assert isinstance(bad, BadRow)
    assert bad.kind == "no answer"
    assert not isinstance(
        read(messages=[{**ASK, "weight": 0, "mask": None}, turn("b", weight=None)]), BadRow
    )


def test_other_keys_of_a_turn_are_counted_by_name(tokenizer_of: Tokenizers) -> None:
    encoder = ExampleEncoder(tokenizer_of("chatml"), max_length=200)
    encoder.encode(
        sound(messages=[{**ASK, "name": "Oda", "mood": "good", "none": None}, turn("b")])
    )
    assert [note for note in encoder.notes if "'mood'" in note]
    assert [note for note in encoder.notes if "'name'" in note]
    assert not [note for note in encoder.notes if "'none'" in note]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_rendered_as_transformers_renders_them(
    tokenizer_of: Tokenizers, tools: Any
) -> None:
    tokenizer = tokenizer_of("chatml").__class__(
        tokenizer_object=tokenizer_of("chatml").backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template=WITH_TOOLS,
    )
    encoder, messages = ExampleEncoder(tokenizer, max_length=500), [ASK, turn("At nine.")]
    content = sound(messages=messages, tools=tools)
    made = only(encoder.encode(content))
    right = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert tokenizer.decode(made.tokens) == right.removesuffix("\n")
    assert "timetable" in right
    assert isinstance(content, Conversation)
    asked = tokenizer.apply_chat_template(
        [ASK], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(encoder.prompt(content)) == asked


def test_tools_that_nobody_would_see_refuse_the_row(tokenizer_of: Tokenizers) -> None:
    for family in ("chatml", None):
        bad = ExampleEncoder(tokenizer_of(family), max_length=500).encode(
            sound(messages=[ASK, turn("b")], tools=TOOLS)
        )
        assert isinstance(bad, BadRow)
        assert "tools" in bad.reason
    for broken in ("[{", 7, [1], {"name": "f"}):
        assert isinstance(read(messages=[ASK, turn("b")], tools=broken), BadRow)
    for none in (None, "", "[]", []):
        assert sound(messages=[ASK, turn("b")], tools=none) == sound(messages=[ASK, turn("b")])


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_system_column_is_part_of_the_prompt(tokenizer_of: Tokenizers, column: str) -> None:
    encoder = ExampleEncoder(tokenizer_of("chatml"), max_length=200)
    made = only(encoder.encode(sound(**{column: [ASK, turn("b")], "system": "Be brief."})))
    assert marked(encoder, made).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhen?"
    )
    bad = read(
        **{
            column: [{"role": "system", "content": "Be long."}, ASK, turn("b")],
            "system": "Be brief.",
        }
    )
    assert isinstance(bad, BadRow)
    assert "'system'" in bad.reason


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "phi3", "llama2"])
@pytest.mark.parametrize("ended", [False, True])
def test_a_rendered_prompt_is_wrapped_once(
    tokenizer_of: Tokenizers, family: str, ended: bool
) -> None:
    tokenizer = tokenizer_of(family)
    encoder = ExampleEncoder(tokenizer, max_length=200)
    plain = encoder.encode(
        Conversation((ChatMessage("user", "When?"), ChatMessage("assistant", "At nine.")))
    )
    prompt = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    answer = (" " if family == "llama2" else "") + "At nine." + (" " if family == "llama2" else "")
    content = sound(prompt=prompt, completion=answer + encoder.template.end_of_turn * ended)
    assert only(encoder.encode(content)) == only(plain)
    assert isinstance(content, Conversation)
    assert encoder.prompt(content) == encoder.prompt(
        Conversation((ChatMessage("user", "When?"), ChatMessage("assistant", ".")))
    )
    assert [note for note in encoder.notes if "already" in note]


def test_a_rendered_prompt_whose_header_stands_in_the_answer_or_nowhere(
    tokenizer_of: Tokenizers,
) -> None:
    encoder = ExampleEncoder(tokenizer_of("chatml"), max_length=200)
    right = "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n«At nine.<|im_end|>»"
    prompt = "<|im_start|>user\nWhen?<|im_end|>\n"
    for completion in ("<|im_start|>assistant\nAt nine.<|im_end|>\n", "At nine."):
        assert (
            marked(encoder, only(encoder.encode(sound(prompt=prompt, completion=completion))))
            == right
        )
    bare = sound(prompt=prompt + "<|im_start|>assistant", completion="At nine.")
    assert marked(encoder, only(encoder.encode(bare))) == right
    bad = encoder.encode(sound(prompt=prompt, completion="b", system="Be brief."))
    assert isinstance(bad, BadRow)
    assert "rendered" in bad.reason


HEADERS = {
    "chatml": ("<|im_start|>user", "<|im_start|>assistant\n"),
    "default_system": ("<|im_start|>user", "<|im_start|>assistant\n"),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": ("<start_of_turn>user", "<start_of_turn>model\n"),
    "phi3": ("<|user|>", "<|assistant|>\n"),
}


@pytest.mark.parametrize("family", list(HEADERS))
def test_a_question_about_control_tokens_is_a_plain_question(
    tokenizer_of: Tokenizers, family: str
) -> None:
    encoder = ExampleEncoder(tokenizer_of(family), max_length=300)
    asked = f"What does {HEADERS[family][0]} mean?"
    right = encoder.template.render(
        [ChatMessage("user", asked), ChatMessage("assistant", "b")]
    ).text
    right = right[: right.rindex("b") + 1] + encoder.template.end_of_turn
    made = only(encoder.encode(sound(prompt=asked, completion="b")))
    assert encoder.tokenizer.decode(made.tokens) == right
    made = only(encoder.encode(sound(prompt=asked, completion="b", system="Be brief.")))
    assert "Be brief." in encoder.tokenizer.decode(made.tokens)


@pytest.mark.parametrize("family", list(HEADERS))
@pytest.mark.parametrize("columns", ["prompt", "messages", "alpaca"])
def test_a_header_that_an_answer_brings_stands_there_once(
    tokenizer_of: Tokenizers, family: str, columns: str
) -> None:
    encoder = ExampleEncoder(tokenizer_of(family), max_length=200)

    def row(answer: str) -> ExampleContent:
        if columns == "messages":
            return sound(messages=[ASK, turn(answer), ASK, turn(answer)])
        if columns == "alpaca":
            return sound(instruction="When?", output=answer)
        return sound(prompt="When?", completion=answer)

    brought = HEADERS[family][1] + "At nine." + encoder.template.end_of_turn
    assert only(encoder.encode(row(brought))) == only(encoder.encode(row("At nine.")))


@pytest.mark.parametrize("columns", [
    {"instruction": "R", "input": "in Oslo", "output": "b"}, {"instruction": "Q", "input": "in Oslo", "output": "b"},
    {"question": "R", "context": "in Oslo", "answer": "b"}, {"prompt": "<|im_start|>user\nWhen?", "completion": "b"},
    {"messages": [{"role": "user", "content": "R"}, turn("b"), ASK, turn("c")]},
    {"messages": [ASK, turn("b"), {"role": "user", "content": "Q"}, turn("c")]},
    {"messages": [{"role": "system", "content": "<|im_start|>system\nBe brief.<|im_end|>\n"}, ASK, turn("b")]},
    {"messages": [{"role": "user", "content": "R", "weight": 0}, turn("b")]},
    {"messages": [{"role": "user", "content": "R"}, turn("bb", train_detail=PARTLY[1:])]},
    {"prompt": "When?", "completion": "b<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes."},
    {"prompt": "R", "completion": "b<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes."},
    {"prompt": "Some words. R", "completion": "b"},
])  # fmt: skip
def test_a_rendered_text_that_has_no_place_refuses_the_row(
    tokenizer_of: Tokenizers, columns: dict[str, Any]
) -> None:
    question = "<|im_start|>user\nWhen?<|im_end|>\n"
    written = {"R": question + "<|im_start|>assistant\n", "Q": question}

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(held) for held in value]
        if isinstance(value, dict):
            return {key: filled(held) for key, held in value.items()}
        return (
            "Some words. " + written["R"] if value == "Some words. R" else written.get(value, value)
        )

    columns = filled(columns)
    if "bb" in str(columns):
        columns["messages"][1]["content"] = "bb and more"
    bad = ExampleEncoder(tokenizer_of("chatml"), max_length=300, completion_only_loss=False).encode(
        sound(**columns)
    )
    assert isinstance(bad, BadRow)
    assert "rendered" in bad.reason


def test_a_rendered_prompt_with_its_own_system_message_is_wrapped_once(
    tokenizer_of: Tokenizers,
) -> None:
    encoder = ExampleEncoder(tokenizer_of("default_system"), max_length=200)
    messages = [{"role": "system", "content": "Be brief."}, ASK]
    prompt = encoder.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    made = only(encoder.encode(sound(prompt="  " + prompt, completion="b")))
    assert marked(encoder, made) == f"  {prompt}«b<|im_end|>»"


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma"])
def test_a_rendered_text_gets_no_second_end_and_no_second_bos(
    tokenizer_of: Tokenizers, family: str
) -> None:
    tokenizer = tokenizer_of(family)
    text = tokenizer.apply_chat_template([ASK, turn("At nine.")], tokenize=False)
    encoder = ExampleEncoder(tokenizer, max_length=200)
    made = only(encoder.encode(TextDocument(text)))
    assert made.tokens == tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
    assert made.weights == [0.0] + [1.0] * (len(made.tokens) - 1)
    assert [note for note in encoder.notes if "already" in note]


def test_a_token_beyond_the_embedding_table_is_named(tokenizer_of: Tokenizers) -> None:
    tokenizer = tokenizer_of("chatml").__class__(
        tokenizer_object=tokenizer_of("chatml").backend_tokenizer.from_str(
            tokenizer_of("chatml").backend_tokenizer.to_str()
        ),
        eos_token="<|im_end|>",
        chat_template=WITH_TOOLS,
    )
    rows = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    encoder = ExampleEncoder(tokenizer, max_length=200, embeddings=rows)
    good, bad = encoder.encode_many(
        [sound(question="Who?", answer="Oda."), sound(question="When?", answer="<tool> At nine.")]
    )
    assert not isinstance(good, BadRow)
    assert isinstance(bad, BadRow)
    assert bad.kind == "vocabulary"
    assert "'<tool>'" in bad.reason
    assert str(rows) in bad.reason
    with pytest.raises(DataError, match="<tool>"):
        encoder.prompt(Conversation((ChatMessage("user", "<tool>"), ChatMessage("assistant", "."))))


def test_what_takes_the_room_of_an_answer_is_said(tokenizer_of: Tokenizers) -> None:
    tokenizer = tokenizer_of("default_system")
    content = sound(prompt="word " * 50, completion="Yes")
    bad = ExampleEncoder(tokenizer, max_length=12).encode(content)
    assert isinstance(bad, BadRow)
    assert bad.kind == TOO_LONG
    least = int(bad.reason.split("; ")[-1].split()[0])
    assert "chat template" in bad.reason
    assert least > 12
    assert not isinstance(ExampleEncoder(tokenizer, max_length=least).encode(content), BadRow)
    assert isinstance(ExampleEncoder(tokenizer, max_length=least - 1).encode(content), BadRow)


def test_tools_of_a_merged_table_lose_the_keys_that_only_other_tools_have() -> None:
    arrow = pa.table(
        {
            "tools": [
                [
                    {"name": "at", "place": {"kind": "text"}},
                    {"name": "on", "day": {"enum": ["mon", None]}},
                ]
            ]
        }
    )
    merged = arrow.to_pylist()[0]["tools"]
    assert merged[0]["day"] is None  # what pyarrow made of it
    content = sound(messages=[ASK, turn("b")], tools=merged)
    assert isinstance(content, Conversation)
    assert json.loads(content.tools) == [
        {"name": "at", "place": {"kind": "text"}},
        {"name": "on", "day": {"enum": ["mon", None]}},
    ]
    as_text = sound(messages=[ASK, turn("b")], tools='[{"name": "at", "default": null}]')
    assert isinstance(as_text, Conversation)
    assert json.loads(as_text.tools) == [{"name": "at", "default": None}]


@pytest.mark.parametrize(
    "columns", [{"instruction": "When?", "output": "b"}, {"question": "When?", "answer": "b"}]
)
def test_tools_beside_any_format_of_a_chat_go_to_the_template(
    tokenizer_of: Tokenizers, columns: dict[str, str]
) -> None:
    content = sound(**columns, tools=TOOLS)
    assert isinstance(content, Conversation)
    assert json.loads(content.tools) == TOOLS
    bad = ExampleEncoder(tokenizer_of("chatml"), max_length=200).encode(content)
    assert isinstance(bad, BadRow)
    assert "tools" in bad.reason
