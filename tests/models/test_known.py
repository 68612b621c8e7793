"""What transformers said of files before: the same answers without it, and nothing else ever."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import BatchEncoding, GPT2Tokenizer, LlamaConfig, PreTrainedTokenizerFast

from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.reading.content import ChatMessage, Conversation
from lorry.errors import ModelError
from lorry.models.loading import describe
from lorry.models.loading import known as known_files
from lorry.models.loading import tokenizer as loading
from lorry.models.loading.describe import describe_model
from lorry.models.loading.known.config import KnownConfig, keep_config, recall_config
from lorry.models.loading.known.tokenizer import (
    KnownTokenizer,
    keep_tokenizer,
    read_tokenizer_files,
)
from lorry.models.loading.tokenizer import load_tokenizer, whole_tokenizer
from tests.support import tinyrun

TEXTS = [
    "Ada has a red lorry",
    " leading, trailing ",
    "<|im_start|>user\nWho?<|im_end|>\n<|endoftext|>",
    "Über 12,345\t\n\n漢字🙂",
    "",
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@contextmanager
def another_process() -> Iterator[None]:
    """As in one that has not imported transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_files, "transformers_is_imported", lambda: False)
        yield


def recalled(directory: Path) -> KnownTokenizer | None:
    with another_process():
        found = load_tokenizer(directory, add_note=print)
    return found if isinstance(found, KnownTokenizer) else None


# --- tokenizers


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tinyrun.tokenizer().save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


@pytest.fixture
def pair(directory: Path) -> tuple[Any, KnownTokenizer]:
    """transformers' tokenizer, and the one that answers in its place."""
    whole = load_tokenizer(directory, add_note=print)
    assert isinstance(whole, PreTrainedTokenizerFast)
    known = recalled(directory)
    assert known is not None
    return whole, known


def opened(known: KnownTokenizer) -> bool:
    return vars(known)["_whole"] is not None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_special_tokens": False, "verbose": False},
        {"return_offsets_mapping": True, "return_attention_mask": False},
        {"truncation": False, "padding": False, "return_token_type_ids": True},
    ],
)
def test_a_tokenizer_seen_before_makes_the_same_tokens(
    pair: tuple[Any, KnownTokenizer], options: dict[str, Any]
) -> None:
    whole, known = pair
    assert known(TEXTS, **options) == dict(whole(TEXTS, **options))
    for text in TEXTS:
        assert known(text, **options) == dict(whole(text, **options))
        assert known(text, **options).input_ids == whole(text, **options).input_ids
    with pytest.raises(AttributeError):
        assert known(TEXTS, **options).pixel_values
    assert not opened(known)


ASKED: dict[str, Callable[[Any], Any]] = {
    "tokens": lambda made: made.tokens(0),
    "word_ids": lambda made: made.word_ids(),
    "sequence_ids": lambda made: made.sequence_ids(),
    "token_to_sequence": lambda made: made.token_to_sequence(1),
    "token_to_word": lambda made: made.token_to_word(1),
    "word_to_tokens": lambda made: made.word_to_tokens(1),
    "token_to_chars": lambda made: made.token_to_chars(1),
    "char_to_token": lambda made: made.char_to_token(4),
    "word_to_chars": lambda made: made.word_to_chars(1),
    "char_to_word": lambda made: made.char_to_word(4),
    "n_sequences": lambda made: made.n_sequences,
    "is_fast": lambda made: made.is_fast,
    "encodings": lambda made: [each.tokens for each in made.encodings],
    "data": lambda made: dict(made.data),
    "keys": lambda made: list(made.keys()),
    "values": lambda made: list(made.values()),
    "items": lambda made: list(made.items()),
    "get": lambda made: (made.get("input_ids"), made.get("gone")),
    "by number": lambda made: made[0].tokens,
    "by slice": lambda made: [each.tokens for each in made[0:1]],
    "of columns": lambda made: {**made}["input_ids"],
    "copy": lambda made: dict(made.copy()),
    "pop": lambda made: (made.pop("input_ids"), "input_ids" in made),
    "popitem": lambda made: (made.popitem() is not None, len(made)),
    "setdefault": lambda made: (made.setdefault("labels", [1]), made.labels),
    "update": lambda made: (made.update(labels=[1]), made["labels"]),
    "clear": lambda made: (made.clear(), dict(made)),
    "fromkeys": lambda made: dict(made.fromkeys(["a"], 1)),
    "to": lambda made: dict(made.to("cpu")),
    "convert_to_tensors": lambda made: {
        name: value.tolist()
        for name, value in made.convert_to_tensors("pt", prepend_batch_axis=True).items()
    },
    "converted in place": lambda made: (
        made.convert_to_tensors("np", prepend_batch_axis=True) is not None,
        type(made["input_ids"]).__name__,
    ),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("asked", ASKED)
def test_what_a_call_gives_answers_all_that_transformers_does(
    pair: tuple[Any, KnownTokenizer], asked: str, several: bool
) -> None:
    """Methods of transformers' were AttributeErrors, and a number was no key."""
    whole, known = pair
    text: Any = [TEXTS[0]] if several else TEXTS[0]
    options = {"return_token_type_ids": False}
    ask = (
        # one row is a batch of one there already
        (lambda made: made.convert_to_tensors("pt")["input_ids"].tolist())
        if several and asked == "convert_to_tensors"
        else ASKED[asked]
    )
    theirs = ask(whole(text, **options))
    assert ask(known(text, **options)) == theirs
    assert ask(pickle.loads(pickle.dumps(known(text, **options)))) == theirs  # noqa: S301
    assert not opened(known)


def test_nothing_that_transformers_answers_is_left_out(pair: tuple[Any, KnownTokenizer]) -> None:
    names = {name for name in dir(BatchEncoding) if not name.startswith("_")}
    assert names <= ASKED.keys()


def test_a_row_that_moves_has_moved(pair: tuple[Any, KnownTokenizer]) -> None:
    _, known = pair
    made = known(TEXTS[0]).convert_to_tensors("pt")
    assert made.to("meta")["input_ids"].device.type == "meta"
    kept = known(TEXTS[0])
    kept.convert_to_tensors("pt")
    kept.to("meta")
    assert kept["input_ids"].device.type == kept.attention_mask.device.type == "meta"


def test_and_says_the_same_of_itself(pair: tuple[Any, KnownTokenizer]) -> None:
    whole, known = pair
    rows = whole(TEXTS)["input_ids"]
    for skip in (False, True):
        assert known.batch_decode(rows, skip_special_tokens=skip) == whole.batch_decode(
            rows, skip_special_tokens=skip
        )
        assert known.decode(rows[2], skip_special_tokens=skip) == whole.decode(
            rows[2], skip_special_tokens=skip
        )
    assert known.decode(5) == whole.decode(5)
    # rows of ids, or one row of them, or one id: always a list of texts
    for ids in ([5, 6], torch.tensor([5, 6]), np.array([[5], [6]]), 5, []):
        assert known.batch_decode(ids) == whole.batch_decode(ids)
    assert known.decode(rows) == whole.decode(rows)
    for name in ("bos_token", "eos_token", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(known, name) == getattr(whole, name)
    for name in ("special_tokens_map", "all_special_tokens", "model_max_length"):
        assert getattr(known, name) == getattr(whole, name)
    assert len(known) == len(whole)
    assert known.get_vocab() == whole.get_vocab()
    assert {k: str(v) for k, v in known.added_tokens_decoder.items()} == {
        k: str(v) for k, v in whole.added_tokens_decoder.items()
    }
    tokens = ["<|im_end|>", "a", "no such token"]
    assert known.convert_tokens_to_ids(tokens) == whole.convert_tokens_to_ids(tokens)
    assert known
    assert not opened(known)


def test_it_encodes_rows_alike_under_one_identity(pair: tuple[Any, KnownTokenizer]) -> None:
    theirs, ours = (ExampleEncoder(one, max_length=64) for one in pair)
    assert ours.identity() == theirs.identity() != ""
    chat = Conversation((ChatMessage("user", "Who?"), ChatMessage("assistant", "Ada has it")))
    assert ours.encode(chat) == theirs.encode(chat)
    assert not opened(pair[1])


def test_whatever_else_is_asked_opens_the_whole_one_which_answers_from_then_on(
    pair: tuple[Any, KnownTokenizer],
) -> None:
    whole, known = pair
    before = len(known)
    assert known.add_tokens(["<new>"]) == 1
    assert opened(known)
    assert whole_tokenizer(known) is known.whole
    assert isinstance(known.whole, type(whole))
    assert len(known) == len(known.backend_tokenizer.get_vocab()) == before + 1
    ids = known("<new>", add_special_tokens=False)["input_ids"]
    assert ids == [before]
    assert known.decode(ids) == "<new>"
    assert known.convert_tokens_to_ids("<new>") == before
    known.chat_template = "{{ messages }}"
    assert known.chat_template == known.whole.chat_template == "{{ messages }}"
    assert whole_tokenizer(whole) is whole


@pytest.mark.parametrize(
    "ask",
    [
        lambda known: known("a", return_tensors="pt"),
        lambda known: known("a", "b"),
        lambda known: known([["a"]], is_split_into_words=True),
        lambda known: known("a", max_length=3, truncation=True),
        lambda known: known.decode([3], clean_up_tokenization_spaces=True),
        lambda known: known.apply_chat_template([{"role": "user", "content": "a"}]),
        lambda known: known.name_or_path,
        lambda known: known(text_target="a"),
        lambda known: known.decode({"input_ids": [3, 4]}),
        lambda known: known.decode([torch.tensor([3, 4]), torch.tensor([5])]),
        lambda known: known.convert_tokens_to_ids({"a"}),
    ],
)
def test_a_call_that_takes_more_than_tokenizers_is_transformers(
    pair: tuple[Any, KnownTokenizer], ask: Callable[[Any], Any]
) -> None:
    whole, known = pair
    assert str(ask(known)) == str(ask(whole))
    assert opened(known)


def test_it_is_saved_as_it_was_though_its_directory_has_moved(
    pair: tuple[Any, KnownTokenizer], directory: Path, tmp_path: Path
) -> None:
    whole, known = pair
    whole.save_pretrained(tmp_path / "theirs")
    directory.rename(tmp_path / "previous")
    known.save_pretrained(tmp_path / "ours")
    theirs, ours = (
        {path.name: path.read_bytes() for path in (tmp_path / side).iterdir()}
        for side in ("theirs", "ours")
    )
    assert ours == theirs
    assert known.name_or_path == str(directory)


def test_a_copy_is_another_one(pair: tuple[Any, KnownTokenizer]) -> None:
    copied = deepcopy(pair[1])
    copied.add_tokens(["<new>"])
    assert len(copied) == len(pair[1]) + 1
    assert not opened(pair[1])


def test_a_copy_splits_special_tokens_as_well(directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"split_special_tokens": True}))
    whole = load_tokenizer(directory, add_note=print)
    assert whole is not None
    known, text = recalled(directory), TEXTS[2]
    expected = whole(text)["input_ids"]
    assert expected != whole(text, split_special_tokens=False)["input_ids"]
    for one in (known, deepcopy(known)):
        assert one is not None
        assert one(text)["input_ids"] == expected


def test_of_files_that_changed_meanwhile_nothing_is_kept(
    directory: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = PreTrainedTokenizerFast.from_pretrained

    def change(cls: Any, *given: Any, **options: Any) -> Any:
        whole = read(*given, **options)
        (directory / "chat_template.jinja").write_text("{{ 'another' }}")
        return whole

    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", classmethod(change))
        load_tokenizer(directory, add_note=print)
    assert not (home / "tokenizers").exists()
    load_tokenizer(directory, add_note=print)
    known = recalled(directory)
    assert known is not None
    assert known.chat_template == "{{ 'another' }}"


def test_an_answer_that_python_fails_to_read_is_none(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(text: str) -> Any:  # as when two threads read at once, under CPython 3.11
        raise SystemError("AST constructor recursion depth mismatch (before=18, after=15)")

    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **tinyrun.LLAMA}))
    load_tokenizer(directory, add_note=print)
    described = describe_model(directory, add_note=print)
    with monkeypatch.context() as patch:
        patch.setattr(ast, "literal_eval", fail)
        assert recalled(directory) is None
        with another_process():
            assert describe_model(directory, add_note=print).config == described.config
    assert recalled(directory) is not None


def test_other_files_are_another_tokenizer(directory: Path, home: Path) -> None:
    assert recalled(directory) is None  # never seen
    assert recalled(directory) is not None
    for name in ("tokenizer_config.json", "config.json"):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"another": 1}))
        assert recalled(directory) is None
        assert recalled(directory) is not None
    for kept in (home / "tokenizers").iterdir():
        kept.write_text("{'eos_token': 1}")
    assert recalled(directory) is None
    assert recalled(directory) is not None  # kept anew


def test_in_a_process_that_has_transformers_it_is_asked(directory: Path) -> None:
    for _ in range(2):
        found = load_tokenizer(directory, add_note=print)
        assert isinstance(found, PreTrainedTokenizerFast)


class OwnTokenizer(PreTrainedTokenizerFast):
    """Decodes in its own way."""

    def _decode(self, *given: Any, **options: Any) -> str:
        return "!"


def test_what_is_not_tokenizers_alone_is_not_kept(directory: Path, home: Path) -> None:
    def kept(change: Callable[[Any], Any]) -> bool:
        whole = PreTrainedTokenizerFast.from_pretrained(directory)
        keep_tokenizer(directory, read_tokenizer_files(directory), change(whole) or whole)
        return (home / "tokenizers").is_dir()

    def cleaned(whole: Any) -> None:
        whole.clean_up_tokenization_spaces = True

    def cut(whole: Any) -> None:
        whole.backend_tokenizer.enable_truncation(5)

    def split(whole: Any) -> None:
        whole.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    def renamed(whole: Any) -> Any:
        OwnTokenizer.__module__ = "transformers.own"
        return OwnTokenizer.from_pretrained(directory)

    def elsewhere(whole: Any) -> Any:
        return type("Elsewhere", (PreTrainedTokenizerFast,), {}).from_pretrained(directory)

    def gpt2(whole: Any) -> Any:  # makes a tokenizer of its own of what the file holds
        return GPT2Tokenizer.from_pretrained(directory, add_prefix_space=True)

    for change in (cleaned, cut, split, renamed, elsewhere, gpt2):
        assert not kept(change), change.__name__
    assert kept(lambda whole: None)


def test_a_warning_is_heard_each_time(
    directory: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    load = loading._load_whole

    def warn(cls: Any, *given: Any, **options: Any) -> Any:
        logging.get_logger("transformers.own").warning("something is odd")
        return PreTrainedTokenizerFast.from_pretrained(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", classmethod(warn))
        load(directory)
    assert not (home / "tokenizers").exists()
    load(directory)
    assert (home / "tokenizers").exists()


def test_a_warning_that_nobody_wants_to_see_is_heard_and_not_shown(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """TRANSFORMERS_VERBOSITY=error of one run kept a tokenizer whose warning the next would have shown."""
    from transformers.utils import logging

    before, own = logging.get_verbosity(), logging.get_logger("transformers.own")
    levels = [handler.level for handler in own.parent.handlers]
    logging.set_verbosity_error()
    logging.enable_propagation()  # as of a program that collects all records in one place
    try:
        with describe.hear_transformers() as heard:
            own.warning("something is odd")
            own.info("nothing is")
            own.error("all is lost")
        assert list(heard) == ["something is odd", "all is lost"]
        own.warning("more is odd")
    finally:
        logging.disable_propagation()
        logging.set_verbosity(before)
    assert {record.message for record in caplog.records} == {"all is lost"}
    assert "odd" not in "".join(capsys.readouterr())
    assert [handler.level for handler in own.parent.handlers] == levels
    # and one that is wanted is heard and shown
    with describe.hear_transformers() as heard:
        own.warning("something is odd")
    assert list(heard) == ["something is odd"]


# --- configs


@pytest.mark.parametrize("family", [*tinyrun.FAMILIES, "mixtral", "mamba"])
def test_a_config_seen_before_is_filled_in_alike(tmp_path: Path, family: str) -> None:
    shape = {**tinyrun.FAMILIES, **tinyrun.FOREIGN}[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **shape}))
    theirs = describe_model(tmp_path, add_note=print)
    with another_process():
        ours = describe_model(tmp_path, add_note=print)
    # ascii: 1 is not True, and lists are not tuples
    assert ascii(ours.config) == ascii(theirs.config)
    assert list(ours.config) == list(theirs.config)
    assert (ours.family, ours.why) == (theirs.family, theirs.why)
    assert ours.build_hf().to_dict() == theirs.build_hf().to_dict()
    assert ours.build_hf() is ours.build_hf()


def test_transformers_is_not_asked_of_a_config_seen_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **tinyrun.LLAMA}))
    describe_model(tmp_path, add_note=print)
    monkeypatch.setattr(describe, "build_hf_config", lambda *given: pytest.fail("asked"))
    with another_process():
        assert describe_model(tmp_path, add_note=print).family is not None
    # of another config it is, and in a process that has it anyway
    with pytest.raises(pytest.fail.Exception, match="asked"):
        describe_model(tmp_path, add_note=print)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", **tinyrun.LLAMA, "rms_norm_eps": 1e-3})
    )
    with another_process(), pytest.raises(pytest.fail.Exception, match="asked"):
        describe_model(tmp_path, add_note=print)


def test_a_config_kept_before_its_kind_had_a_family_is_compared_with_defaults_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a field at another than its default, which the decoder does not compute with
    shape = {**tinyrun.FAMILIES["gpt2"], "scale_attn_by_inverse_layer_idx": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape}))
    with monkeypatch.context() as patch:
        patch.setattr(describe, "find_family", lambda kind: None)
        assert "no family" in describe_model(tmp_path, add_note=print).why
    with another_process():
        found = describe_model(tmp_path, add_note=print)
    assert (found.family, "by_inverse_layer_idx=True" in found.why) == (None, True)


def test_nor_of_one_whose_rotary_settings_transformers_fills_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = {"model_type": "llama", **tinyrun.LLAMA, "rope_theta": 5e5, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = describe_model(tmp_path, add_note=print)
    monkeypatch.setattr(describe, "build_hf_config", lambda *given: pytest.fail("asked"))
    with another_process():
        assert describe_model(tmp_path, add_note=print).config == theirs.config


def test_what_is_refused_or_warned_of_is_not_kept(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **tinyrun.LLAMA, "hidden_size": "wide"}))
    with pytest.raises(ModelError, match="refuses this config"):
        describe_model(tmp_path, add_note=print)
    path.write_text(json.dumps({"model_type": "llama", **tinyrun.LLAMA}))
    build = describe.build_hf_config

    def warn(*given: Any) -> Any:
        logging.get_logger("transformers.own").warning("something is odd")
        return build(*given)

    with monkeypatch.context() as patch:
        patch.setattr(describe, "build_hf_config", warn)
        describe_model(tmp_path, add_note=print)
    assert not (home / "configs").exists()
    describe_model(tmp_path, add_note=print)
    assert (home / "configs").exists()


def test_only_what_comes_back_as_it_was_is_kept(home: Path) -> None:
    hf, raw = LlamaConfig(), {"model_type": "llama"}
    keep_config(raw, object(), KnownConfig({"a": 1}, {}))  # somebody's own class
    keep_config(raw, hf, KnownConfig({"a": float("inf")}, {}))
    keep_config(raw, hf, KnownConfig({"a": object()}, {}))
    assert not (home / "configs").exists()
    known = KnownConfig({"id2label": {0: "no", 1: "ja \ud800"}, "b": (1, 1.0, True)}, {"c": None})
    keep_config(raw, hf, known)
    with another_process():
        assert ascii(recall_config(raw)) == ascii(known)
        for kept in (home / "configs").iterdir():
            for damaged in ("", "[1]", "({}, 1)", "({},{})", "(1 +", "__import__('os')"):
                kept.write_text(damaged)
                assert recall_config(raw) is None
    assert recall_config(raw) is None  # transformers is here
