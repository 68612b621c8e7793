"""A tokenizer as GGUF's `tokenizer.ggml.*` keys, or a refusal.

    vocabulary = read_vocabulary(tokenizer, rows, add_note)   # rows: of the embedding table
    vocabulary.add_to(writer)                                 # a gguf.GGUFWriter

llama.cpp does not run a tokenizer.json: it has a program of its own for each kind of tokenizer and
picks it by name. llama.cpp's converter finds the name from the SHA-256 of the ids of one long text,
which knows published vocabularies alone. Here the name follows from how the tokenizer is built: the
same regular expressions and the same rule for whole words, whatever the vocabulary. What none of
llama.cpp's programs does is refused, never approximated: a wrong name gives other tokens and no
message. Sources: llama.cpp `src/llama-vocab.cpp` (`llm_tokenizer_bpe`, `llm_tokenizer_spm`),
`conversion/base.py` (`get_vocab_base`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from lorry.errors import ModelError
from lorry.notes import NoteCallback

SPACE_MARK = "▁"  # SentencePiece's stand-in for a space
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# {(how text is cut before merges, whether a whole word in the vocabulary needs no merges): the name
# that llama.cpp gives a program which does just that}
GPT2_REGEX, DIGITS_THEN_GPT2_REGEX = "ByteLevel", "Digits, ByteLevel"
PRE_TOKENIZERS = {
    (GPT2_REGEX, False): "gpt-2",
    (DIGITS_THEN_GPT2_REGEX, False): "smollm",
    (_WORDS % r"\p{N}", False): "qwen2",
    (_WORDS % r"\p{N}{1,3}", True): "llama-bpe",
    (_WORDS % r"\p{N}{1,3}", False): "smaug-bpe",
    (_CASED_WORDS, True): "tekken",
}


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """tokens, types: of every row of the embedding table; merges: of a byte-level BPE; scores: of
    SentencePiece's; ids: {bos, eos, unknown, padding: id} of those there are.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | Sequence[Mapping[str, str]] | None = None

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        # said even where it is llama.cpp's default, which hangs on the name of the tokenizer
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, rows: int, add_note: NoteCallback) -> GgufVocabulary:
    """The vocabulary of ``tokenizer`` for a model whose embedding table has ``rows`` rows; those
    without a token are named [PAD...].

    Raises ModelError for a tokenizer that llama.cpp has no program for. ``add_note`` is told what
    differs between the two in rare text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"{type(tokenizer).__name__} is not a tokenizer of the tokenizers library")
    built = json.loads(backend.to_str())
    model = built["model"]
    if model["type"] != "BPE":
        raise _refusal(f"it is a {model['type']} model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refusal(f"its {key} is {model[key]!r}")
    vocab: dict[str, int] = model["vocab"]
    added = {entry["id"]: entry for entry in built["added_tokens"]}
    highest = max([*vocab.values(), *added], default=-1)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer has token {highest} but the model {rows} rows of "
            "embeddings; a GGUF file needs equally many"
        )
    _note_trimming(added.values(), add_note)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens, types = _list_tokens(vocab, added, rows)
    bos, eos = _added_ends(tokenizer)
    ids = {
        name: getattr(tokenizer, f"{attribute}_token_id")
        for name, attribute in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unknown", "unk"),
            ("padding", "pad"),
        )
    }
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "ids": {name: number for name, number in ids.items() if number is not None},
        "add_bos": bos,
        "add_eos": eos,
        "chat_template": _read_template(tokenizer),
    }
    if model.get("byte_fallback"):
        prefix = _read_space_prefix(built, add_note)
        scores = _merge_scores(vocab, merges, types, added)
        return GgufVocabulary(
            model="llama", pre="default", scores=scores, add_space_prefix=prefix, **common
        )
    pre = _read_pre_tokenizer(built, add_note)
    if spaced := next((m for m in merges if any(" " in part for part in m)), None):
        raise _refusal(f"its merge {spaced!r} holds a space")
    lines = [" ".join(m) for m in merges]
    return GgufVocabulary(model="gpt2", pre=pre, merges=lines, add_space_prefix=False, **common)


def _refusal(what: str) -> ModelError:
    return ModelError(
        f"this tokenizer cannot be written into a GGUF file: {what}, which "
        "llama.cpp does not support, so the model would see other tokens (to=hf "
        "keeps the tokenizer as it is)"
    )


def _list_tokens(
    vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], rows: int
) -> tuple[list[str], list[TokenType]]:
    """(the text, the type) of every row."""
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [TokenType.UNUSED] * rows
    for text, row in vocab.items():
        tokens[row], types[row] = text, TokenType.NORMAL
    for row, entry in added.items():
        text = entry["content"]
        # as llama.cpp's converter has it: such a token is markup, though its file does not say so
        special = entry["special"] or (text.startswith("<|") and text.endswith("|>"))
        tokens[row], types[row] = text, TokenType.CONTROL if special else TokenType.USER_DEFINED
    return tokens, types


def _note_trimming(added: Any, add_note: NoteCallback) -> None:
    """Tell of added tokens that take the spaces around them along, which llama.cpp's do not."""
    trimming = [
        entry["content"]
        for entry in added
        if entry["lstrip"] or entry["rstrip"] or entry["single_word"]
    ]
    if trimming:
        add_note(
            "llama.cpp keeps the spaces beside "
            f"{', '.join(map(repr, trimming[:3]))}{' and others' if len(trimming) > 3 else ''}, "
            "which this tokenizer removes"
        )


def _added_ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets the tokenizer's BOS in front and its EOS behind, found by trying."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            front = [tokenizer.bos_token_id] if bos else []
            behind = [tokenizer.eos_token_id] if eos else []
            if whole == [*front, *bare, *behind]:
                return bos, eos
    raise _refusal("it adds other tokens to a text than its BOS and EOS")


def _read_template(tokenizer: Any) -> str | list[Mapping[str, str]] | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template or None


def _read_pre_tokenizer(built: Mapping[str, Any], add_note: NoteCallback) -> str:
    """llama.cpp's name of a byte-level tokenizer. Raises ModelError where it has none."""
    normalizer = built.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refusal(f"it normalises text ({normalizer['type']})")
    if normalizer is not None:
        add_note("llama.cpp does not normalise text to Unicode's NFC, as this tokenizer does")
    if (built.get("decoder") or {}).get("type") != "ByteLevel":
        raise _refusal("its tokens are not those of a byte-level BPE")
    cut = _describe_cut(built.get("pre_tokenizer") or {})
    whole_words = bool(built["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((cut, whole_words)) if cut is not None else None
    if name is None:
        rule = ", ignore_merges" if whole_words else ""
        raise _refusal(f"it splits text by {json.dumps(built.get('pre_tokenizer'))[:300]}{rule}")
    return name


def _describe_cut(pre_tokenizer: Mapping[str, Any]) -> str | None:
    """What text is cut by before merges: a key of `PRE_TOKENIZERS`, or None."""
    parts = (
        pre_tokenizer.get("pretokenizers", ())
        if pre_tokenizer.get("type") == "Sequence"
        else [pre_tokenizer]
    )
    kinds = [part.get("type") for part in parts]
    # a space in front would be a token of its own kind
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    # the cut itself may be a regular expression beside it, or the one inside ByteLevel
    own = parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"]:
        return GPT2_REGEX if own else None
    if kinds == ["Digits", "ByteLevel"]:
        return DIGITS_THEN_GPT2_REGEX if own and parts[0].get("individual_digits") else None
    if kinds == ["Split", "ByteLevel"] and not own:
        plain = parts[0].get("behavior") == "Isolated" and not parts[0].get("invert")
        pattern = parts[0].get("pattern", {}).get("Regex")
        return pattern if plain and isinstance(pattern, str) else None
    return None


def _read_space_prefix(built: Mapping[str, Any], add_note: NoteCallback) -> bool:
    """Whether a text begins with a space that it did not have. Raises ModelError for a tokenizer
    that does anything else to a text than mark its spaces.
    """
    normalizer, pre_tokenizer = built.get("normalizer"), built.get("pre_tokenizer")
    steps = (
        []
        if normalizer is None
        else normalizer["normalizers"]
        if normalizer["type"] == "Sequence"
        else [normalizer]
    )
    bare_steps = [
        {key: value for key, value in step.items() if key in ("type", "prepend", "content")}
        for step in steps
    ]
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    replace = {"type": "Replace", "content": SPACE_MARK}
    from_space = all(s.get("pattern") == {"String": " "} for s in steps if s["type"] == "Replace")
    if pre_tokenizer is None and from_space and bare_steps in ([prepend, replace], [replace]):
        return bare_steps[0] == prepend
    if (
        not steps
        and pre_tokenizer is not None
        and pre_tokenizer["type"] == "Metaspace"
        and pre_tokenizer["replacement"] == SPACE_MARK
        and not pre_tokenizer.get("split", True)
    ):
        scheme = pre_tokenizer.get("prepend_scheme", "always")
        if scheme == "first":
            add_note("llama.cpp also inserts a space after a special token inside a text")
        return bool(scheme != "never")
    raise _refusal(f"it normalises text by {json.dumps([normalizer, pre_tokenizer])[:300]}")


def _merge_scores(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    types: list[TokenType],
    added: Mapping[int, Mapping[str, Any]],
) -> list[float]:
    """The score of every row, by which llama.cpp's SentencePiece merges: minus the rank of the
    first merge that makes it. ``types`` gets UNKNOWN and BYTE.

    llama.cpp joins any two neighbours whose text is a token, the highest score first; the tokenizer
    here joins listed pairs in their order. The two are one only if every such pair is listed and the
    pairs that make one token follow each other: anything else raises ModelError. (The converter of
    llama.cpp gives every token of a tokenizer.json the same score, and so other tokens.)
    """
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    scores = [0.0] * len(types)
    for text, row in vocab.items():
        if row in added:
            continue
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[row] = TokenType.BYTE
            continue
        pairs = sum(text[:at] in vocab and text[at:] in vocab for at in range(1, len(text)))
        merge_ranks = ranks.get(text, [])
        if pairs != len(merge_ranks) or (
            merge_ranks and merge_ranks[-1] - merge_ranks[0] != pairs - 1
        ):
            raise _refusal(f"its merges to {text!r} are not those implied by its scores")
        if merge_ranks:
            scores[row] = -float(merge_ranks[0])
    for row, entry in added.items():
        # llama.cpp needs to be told which one stands for text that no token covers
        if entry["content"] == "<unk>":
            types[row] = TokenType.UNKNOWN
    return scores
