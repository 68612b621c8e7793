"""A tokenizer that answers without transformers what tokenising takes: `tokenizers` alone reads its file,
where transformers was seen to add nothing.

    tokenizer = recall_tokenizer(directory, open_whole)     # None: never seen, or it adds something
    tokenizer("Hello", add_special_tokens=False)["input_ids"]
    tokenizer.save_pretrained(folder)                       # anything else: what `open_whole` opens

Importing transformers takes seconds, and loads a tokenizer of which a run, until it saves it, wants
tokens, texts, the template and the names of special tokens. Once transformers' tokenizer has been
loaded from a directory, and is one of those that hand all of that to `tokenizers`, and reads a sample
alike, what it said of special tokens and template is kept in the user's cache, by the content of the
directory's files and the versions of the libraries. From then on a process that has not imported
transformers gets a `KnownTokenizer`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from lorry.disk.home import lorry_home
from lorry.disk.kept import KeptAnswers
from lorry.models.loading import known as known_files

MOST_TOKENIZERS = 300  # kept, each of a few kilobytes, most of it a chat template
LARGEST_FACTS = 1 << 20  # bytes
LARGEST_FILES = 1 << 26  # bytes of what lies beside a tokenizer; of more, transformers is asked
KEYED_LIBRARIES = ("transformers", "tokenizers", "huggingface_hub")
TOKENIZER_FILE = "tokenizer.json"
# everything beside the weights that transformers may read a tokenizer from
KEYED_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken"})
# what is kept of transformers' tokenizer
FACTS = (
    *(f"{name}_token{end}" for name in ("bos", "eos", "pad", "unk") for end in ("", "_id")),
    "special_tokens_map",
    "all_special_tokens",
    "chat_template",
    "split_special_tokens",
    "model_input_names",
    "model_max_length",
)
# options of a call that are answered here, with the values that are
ANSWERED = {
    "add_special_tokens": (True, False),
    "return_offsets_mapping": (True, False),
    "return_attention_mask": (True, False),
    "return_token_type_ids": (True, False),
    "truncation": (False,),
    "padding": (False,),
    "verbose": (True, False),
}
# methods of transformers' that are done here instead, and that no class may have changed
DONE_HERE = (
    "__call__",
    "_encode_plus",
    "_convert_encoding",
    "set_truncation_and_padding",
    "decode",
    "batch_decode",
    "_decode",
    "convert_tokens_to_ids",
    "_convert_token_to_id_with_added_voc",
    "get_vocab",
    "__len__",
    "special_tokens_map",
    "all_special_tokens",
    "added_tokens_decoder",
    "__getattr__",
)
SAMPLE = "Über  12,345 it's\t\n\n<|x|> 漢字🙂 \u2581 end."


class EncodedText(dict[str, Any]):
    """What a call returns: columns by name, which are attributes as well, as transformers has them; whatever
    else is asked, its BatchEncoding of the same columns answers.

    ``encodings``: what `tokenizers` made of each text.
    """

    def __init__(
        self, columns: Mapping[str, Any] | None = None, encodings: Sequence[Encoding] = ()
    ) -> None:
        super().__init__(columns or {})
        self._encodings = encodings

    def as_batch_encoding(self) -> Any:
        """transformers' own, over these columns themselves: what it writes is written here."""
        from transformers import BatchEncoding

        made = BatchEncoding(encoding=self._encodings)
        made.data = self
        return made

    def to(self, *given: Any, **options: Any) -> Any:
        """Move what is a tensor, as `BatchEncoding.to` does: here as well."""
        moved = self.as_batch_encoding().to(*given, **options)
        self.update(moved)
        return moved

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.as_batch_encoding()[key]

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name.startswith("__") or "_encodings" not in vars(self):
            raise AttributeError(name)
        return getattr(self.as_batch_encoding(), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return EncodedText, (dict(self), self._encodings)


class KnownTokenizer:
    """transformers' tokenizer of a directory, as far as tokenising goes; the whole of it is opened when
    something else is asked or set, and answers everything from then on.

    ``files``: of the directory, by name, which may be gone by then; ``facts``: `FACTS` and the class;
    ``open_whole``: reads transformers' from a directory.
    """

    is_fast = True

    def __init__(
        self,
        directory: Path,
        files: Mapping[str, bytes],
        facts: Mapping[str, Any],
        open_whole: Callable[[Path], Any],
    ) -> None:
        # past `__setattr__`, which is for what others set
        vars(self).update(
            _directory=directory,
            _files=files,
            _facts=facts,
            _open_whole=open_whole,
            _backend=Tokenizer.from_buffer(files[TOKENIZER_FILE]),
            _whole=None,
        )

    @property
    def whole(self) -> Any:
        """transformers' own tokenizer, from the files as they were."""
        if self._whole is None:
            vars(self)["_whole"] = self._open_as_it_was()
        return self._whole

    def _open_as_it_was(self) -> Any:
        if read_tokenizer_files(self._directory) == self._files:
            return self._open_whole(self._directory)
        # an earlier run moves when another takes its directory over
        with tempfile.TemporaryDirectory(prefix="lorry-tokenizer-") as folder:
            for name, content in self._files.items():
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            whole = self._open_whole(Path(folder))
        whole.name_or_path = str(self._directory)
        return whole

    @property
    def class_name(self) -> str:
        """What transformers' class is called."""
        return str(self._facts["class_name"])

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer of `tokenizers`."""
        return self._backend if self._whole is None else self._whole.backend_tokenizer

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """{id: token that was added to the vocabulary}."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def get_vocab(self) -> dict[str, int]:
        """{token: id}, with those that were added."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __bool__(self) -> bool:
        return True

    def __call__(self, text: Any = None, *more: Any, **options: Any) -> Any:
        """Tokens of a text, or of a list of texts, as transformers gives them: {"input_ids": ...}."""
        texts = text if isinstance(text, list) else [text]
        if (
            self._whole is not None
            or more
            or not texts
            or not all(isinstance(one, str) for one in texts)
            or not all(value in ANSWERED.get(name, ()) for name, value in options.items())
        ):
            return self.whole(text, *more, **options)
        # a copy of the tokenizer, or one that went to another process, has lost it
        self._backend.encode_special_tokens = self._facts["split_special_tokens"]
        encodings = self._backend.encode_batch(
            texts, add_special_tokens=options.get("add_special_tokens", True)
        )
        columns = {
            name: [getattr(encoding, attribute) for encoding in encodings]
            for name, attribute in self._columns(options)
        }
        one_or_all = columns if isinstance(text, list) else {k: v[0] for k, v in columns.items()}
        return EncodedText(one_or_all, encodings)

    def _columns(self, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(what a call returns, where `tokenizers` has it), in transformers' order."""
        yield "input_ids", "ids"
        for name, attribute in (("token_type_ids", "type_ids"), ("attention_mask",) * 2):
            if options.get(f"return_{name}", name in self._facts["model_input_names"]):
                yield name, attribute
        if options.get("return_offsets_mapping"):
            yield "offset_mapping", "offsets"

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """The text of token ids, or the texts of a list of them."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, int):
            ids = [ids]
        several = _is_row(ids) and len(ids) > 0 and _is_row(ids[0])
        rows = ids if several else [ids]
        if (
            self._whole is not None
            or options
            or not all(_is_row(row) and all(isinstance(one, int) for one in row) for row in rows)
        ):
            return self.whole.decode(token_ids, skip_special_tokens, **options)
        texts = [self._backend.decode(list(row), skip_special_tokens) for row in rows]
        return texts if several else texts[0]

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The texts of rows of token ids; of one row, a list of its text alone."""
        texts = self.decode(sequences, skip_special_tokens, **options)
        return [texts] if isinstance(texts, str) else list(texts)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or those of a list; the unknown token's where there is none."""
        if self._whole is not None:
            return self._whole.convert_tokens_to_ids(tokens)
        if isinstance(tokens, str):
            found = self._backend.token_to_id(tokens)
            return self._facts["unk_token_id"] if found is None else found
        if not (_is_row(tokens) and all(isinstance(token, str) for token in tokens)):
            return self.whole.convert_tokens_to_ids(tokens)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def __getattr__(self, name: str) -> Any:
        # Python's own protocols, such as copying, ask an object that has nothing yet
        if name.startswith("__") or "_whole" not in vars(self):
            raise AttributeError(name)
        if self._whole is None and name in FACTS:
            return copy(self._facts[name])  # to do with as one likes
        return getattr(self.whole, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.whole, name, value)


def recall_tokenizer(directory: Path, open_whole: Callable[[Path], Any]) -> KnownTokenizer | None:
    """The tokenizer of a directory whose files were seen before; None where transformers has to be asked,
    or is imported already."""
    if known_files.transformers_is_imported() or (files := read_tokenizer_files(directory)) is None:
        return None
    text = _kept_facts().read(_digest(files))
    facts = None if text is None else _parse(text)
    return None if facts is None else KnownTokenizer(directory, files, facts, open_whole)


def keep_tokenizer(directory: Path, files: Mapping[str, bytes] | None, whole: Any) -> None:
    """Keep what a tokenizer that transformers has just loaded says, if `tokenizers` alone reads a text as
    it does. ``files``: of the directory, read before that: another process may have changed them since,
    and which of them transformers read is not known then."""
    if files is None or read_tokenizer_files(directory) != files or not _hands_all_on(whole):
        return
    digest, kept = _digest(files), _kept_facts()
    if _parse(kept.read(digest) or "") is not None:
        return
    facts = {name: getattr(whole, name) for name in FACTS}
    facts["class_name"] = type(whole).__qualname__
    text = ascii(facts)
    if _parse(text) == facts and reads_alike(
        KnownTokenizer(directory, files, facts, lambda _: whole), whole
    ):
        kept.save(digest, text)


def reads_alike(known: KnownTokenizer, whole: Any) -> bool:
    """Whether both have the same tokenizer of `tokenizers`, and make the same tokens of a sample, and the
    same text of those."""
    # the file, not what transformers made of it, is read the next time
    if known.backend_tokenizer.to_str() != whole.backend_tokenizer.to_str():
        return False
    sample = " ".join((SAMPLE, *whole.all_special_tokens))
    for options in ({"add_special_tokens": False, "return_offsets_mapping": True}, {}):
        theirs = dict(whole(sample, verbose=False, **options))
        ids = theirs["input_ids"]
        if known(sample, verbose=False, **options) != theirs or any(
            known.decode(ids, skip_special_tokens=skip)
            != whole.decode(ids, skip_special_tokens=skip)
            for skip in (False, True)
        ):
            return False
    return True


def _is_row(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _hands_all_on(whole: Any) -> bool:
    """Whether a tokenizer leaves to `tokenizers` all that is done here, and has no setting that is none of
    its."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    kind = type(whole)
    return (
        isinstance(whole, TokenizersBackend)
        and kind.__module__.startswith("transformers.")
        and all(getattr(kind, name) is getattr(TokenizersBackend, name) for name in DONE_HERE)
        and not whole.clean_up_tokenization_spaces
        and whole.backend_tokenizer.truncation is None
        and whole.backend_tokenizer.padding is None
    )


def read_tokenizer_files(directory: Path) -> dict[str, bytes] | None:
    """{name: content} of all that a tokenizer is read from; None where there is no tokenizer.json, one of
    them cannot be read, or they are too large."""
    try:
        paths = sorted(
            path
            # templates by name lie in a folder of their own
            for path in (*directory.iterdir(), *directory.glob("*templates*/*"))
            if path.suffix in KEYED_SUFFIXES and path.is_file()
        )
        if sum(path.stat().st_size for path in paths) > LARGEST_FILES:
            return None
        files = {str(path.relative_to(directory)): path.read_bytes() for path in paths}
    except OSError:
        return None
    return files if TOKENIZER_FILE in files else None


def _digest(files: Mapping[str, bytes]) -> str:
    """Names what is kept of a tokenizer by all that it is read from."""
    digest = hashlib.sha256()
    for name in KEYED_LIBRARIES:
        digest.update(f"{name} {version(name)}\n".encode())
    for name, content in files.items():
        digest.update(f"{name}\n".encode(errors="surrogateescape"))
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _parse(text: str) -> dict[str, Any] | None:
    facts = known_files.parse_values(text)
    wanted = {*FACTS, "class_name"}
    return facts if isinstance(facts, dict) and facts.keys() == wanted else None


def _kept_facts() -> KeptAnswers:
    return KeptAnswers(lorry_home() / "tokenizers", MOST_TOKENIZERS, LARGEST_FACTS)
