"""Small real tokenizers with the chat templates of the families people use, trained here on
generated text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.chat_templates import TEMPLATES

SPECIALS = {  # bos, eos (which is the padding token too), other control tokens
    "llama3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "llama2": ("<s>", "</s>", ()),
    "phi3": ("<s>", "<|endoftext|>", ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>")),
}
CHATML_SPECIALS = (None, "<|im_end|>", ("<|im_start|>",))


def words(seed: int, count: int) -> str:
    """Generated prose: words of a small invented language, with digits, line breaks and letters
    beyond ASCII.
    """
    draw = random.Random(seed)
    syllables = [
        "ka",
        "lo",
        "mi",
        "ten",
        "ra",
        "su",
        "é",
        "ü",
        "ßo",
        "日本",
        "12",
        "7",
        "ing",
        "th",
        "!",
    ]
    made = ("".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(count))
    return "".join(word + draw.choice([" ", " ", " ", ", ", ".\n", "\n\n"]) for word in made)


@lru_cache
def trained(byte_level: bool, specials: tuple[str, ...]) -> str:
    """A BPE tokenizer as JSON: GPT-2's byte level, or SentencePiece's manner with a space put
    before every text.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = []
    fallback = () if byte_level else tuple(f"<0x{byte:02X}>" for byte in range(256))
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*specials, *fallback],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    corpus = [words(seed, 200) for seed in range(20)] + [
        "system user assistant model think Instruction Response Question Answer"
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


@lru_cache
def made(family: str | None, byte_level: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's control tokens and template; None is a base model's tokenizer
    without a template.
    """
    bos, eos, others = (
        SPECIALS.get(family or "", CHATML_SPECIALS) if family else (None, "<|endoftext|>", ())
    )
    specials = tuple(token for token in (bos, eos, *others) if token)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained(byte_level, specials)),
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        additional_special_tokens=list(others),
        chat_template=TEMPLATES[family] if family else None,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., Any]:
    """``tokenizer_of("gemma")``, ``tokenizer_of("llama2", byte_level=False)``,
    ``tokenizer_of(None)``.
    """
    return made


@pytest.fixture(scope="session")
def prose() -> Callable[[int, int], str]:
    """``prose(seed, words)``: generated text."""
    return words


@pytest.fixture(scope="module", autouse=True)
def fingerprints_at_random() -> Iterator[None]:
    """``datasets`` names a table that tests write by pickling it with dill. With numpy 1.26.4,
    pandas 2.3.3 and pyarrow 25 that raises PicklingError (MonthDayNano). Nothing here reads that
    name, and Lorry itself makes no such tables: any name will do. The module is imported here, not
    looked up, so that it holds whichever test runs first.
    """
    from datasets import arrow_dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            arrow_dataset,
            "generate_fingerprint",
            lambda dataset: arrow_dataset.generate_random_fingerprint(),
        )
        yield
