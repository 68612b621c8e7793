"""Named sets whose answer is a text made from another: sentences from concepts, summaries,
translations, code.

Try: ``named("common_gen").item({"concept_set": "ski#mountain", "scene": ["He skis."]}).concepts``
is ("ski", "mountain").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lorry.data.catalog.item import ItemFields, generative_fields
from lorry.data.catalog.layouts import (
    RowColumns,
    column_slots,
    make_layout,
    required_text,
    row_answers,
    strip_end_mark,
    text_list,
)
from lorry.data.catalog.named import LAST_TENTH_SPLITS, SPLITS_WITHOUT_TEST, WHOLE_SPLITS, NamedSet
from lorry.data.reading.content import UnusableRowError, describe_type, text_of


def _concept_fields(words: Sequence[str], sentences: Sequence[str]) -> ItemFields:
    listed = [word.strip() for word in words if word.strip()]
    if not listed:
        raise UnusableRowError("empty prompt", "there are no concepts: nothing to ask")
    return generative_fields({"concepts": ", ".join(listed)}, sentences, listed)


def _common_gen(row: RowColumns) -> ItemFields:
    return _concept_fields(text_list(row["concepts"], "concepts"), row_answers(row, "target"))


def _common_gen_file(row: RowColumns) -> ItemFields:
    return _concept_fields(required_text(row, "concept_set").split("#"), row_answers(row, "scene"))


# How the prompts of the T0 templates (P3, Sanh et al. 2022) hold their concepts, by what they open
# with. The last two are
# inverted, sentence to concepts; they are turned round, since what they hold is the same row.
_T0_PATTERNS = (
    re.compile(
        r"Humans can .*with the concepts (?P<words>.*), a simple sentence can be", re.DOTALL
    ),
    re.compile(
        r"(?:Given the list|Ignoring the order) of (?:the )?concepts: (?P<words>.*); \nGenerate",
        re.DOTALL,
    ),
    re.compile(r"Put the concepts together to form a sentence: (?P<words>.*)\."),
    re.compile(
        r"Construct a sentence with the word .*Hint: Use (?P<words>.*) to restrict", re.DOTALL
    ),
    re.compile(r"Can you write a sentence about the topic (?P<words>.*)\?"),
    re.compile(r"We have the sentence: (?P<sentence>.*); \nExtract all", re.DOTALL),
    re.compile(r"What are the topics in the sentence: (?P<sentence>.*)", re.DOTALL),
    re.compile(r"[^\n]*:\n(?P<words>[^\n]*)\n?"),
)


def _common_gen_t0(row: RowColumns) -> ItemFields:
    prompt, answer = (
        text_of(row["prompt"], "prompt"),
        strip_end_mark(text_of(row["completion"], "completion")),
    )
    for pattern in _T0_PATTERNS:
        match = pattern.match(prompt)
        if match:
            parts = match.groupdict()
            words, sentence = (
                (parts["words"], answer) if "words" in parts else (answer, parts["sentence"])
            )
            return _concept_fields(words.split(", "), [sentence])
    raise UnusableRowError(
        "format", f"'prompt' is none of T0's common_gen templates: {prompt[:60]!r}"
    )


COMMON_GEN = NamedSet(
    name="common_gen",
    about="three to five concepts, to be used in one sentence about an everyday scene",
    hub="allenai/common_gen",
    splits=SPLITS_WITHOUT_TEST,  # test targets are empty
    layouts=(
        make_layout("hub", "concepts target", _common_gen),
        make_layout("authors", "concept_set scene", _common_gen_file),
        make_layout("t0_templates", "prompt completion", _common_gen_t0),
    ),
    templates=(
        "Write one sentence that uses all of these words: {concepts}",
        "Words: {concepts}\n\nDescribe an everyday scene in a single sentence in which each of them occurs.",
        "Make up a sentence. It has to contain {concepts}, in any form and any order.",
        "What might you see? Combine the following into a short, sensible sentence.\n{concepts}",
        "{concepts}\n\nConnect these ideas in one sentence.",
    ),
    metrics=("rouge_l", "coverage", "bleu", "chrf"),
    max_new_tokens=48,
    cue="Sentence:",
    licence="MIT",
    source="Lin et al. 2020, CommonGen (arXiv 1911.03705)",
)

_SUMMARY_METRICS = ("rouge_l", "rouge_1", "rouge_2")
XSUM = NamedSet(
    name="xsum",
    about="BBC articles, each summed up in one sentence",
    hub="EdinburghNLP/xsum",
    splits=WHOLE_SPLITS,
    layouts=(
        make_layout(
            "hub",
            "document|article|text summary",
            lambda row: generative_fields(
                column_slots(row, text="document|article|text"), row_answers(row, "summary")
            ),
        ),
    ),
    templates=(
        "{text}\n\nSum up the article in one sentence.",
        "What is this news story about? One sentence, please.\n\n{text}",
        "Article:\n{text}\n\nWrite the single sentence that an editor would print above it as the gist.",
        "Boil the report below down to one line.\n\n{text}",
    ),
    metrics=_SUMMARY_METRICS,
    max_new_tokens=64,
    cue="Summary:",
    limit=("text", 2800),
    licence="not stated; the articles are the BBC's",
    source="Narayan et al. 2018, XSum (arXiv 1808.08745)",
)
SAMSUM = NamedSet(
    name="samsum",
    about="messenger chats with a short summary",
    hub="knkarthick/samsum",
    splits=WHOLE_SPLITS,
    layouts=(
        make_layout(
            "hub",
            "dialogue|conversation summary",
            lambda row: generative_fields(
                column_slots(row, text="dialogue|conversation"), row_answers(row, "summary")
            ),
        ),
    ),
    templates=(
        "{text}\n\nSum up this chat.",
        "Chat log:\n{text}\n\nWhat happened in it? Be brief.",
        "Somebody missed the conversation below. Tell them what was said in a sentence or two.\n\n{text}",
        "Give the main points of the following messages.\n\n{text}",
    ),
    metrics=_SUMMARY_METRICS,
    max_new_tokens=96,
    cue="Summary:",
    limit=("text", 1200),
    licence="CC-BY-NC-ND-4.0",
    source="Gliwa et al. 2019, SAMSum (arXiv 1911.12237)",
)


def _scitldr(row: RowColumns) -> ItemFields:
    source = row["source"]
    if isinstance(source, list):
        source = " ".join(sentence.strip() for sentence in text_list(source, "source"))
    return generative_fields(
        {"text": required_text({"source": source}, "source")}, row_answers(row, "target")
    )


SCITLDR = NamedSet(
    name="scitldr",
    about="abstracts of papers with one-sentence summaries by authors and reviewers",
    hub="allenai/scitldr",
    config="Abstract",
    converted="Abstract",
    splits=WHOLE_SPLITS,
    layouts=(make_layout("hub", "source target", _scitldr),),
    templates=(
        "{text}\n\nSum up the paper in one sentence.",
        "Abstract: {text}\n\nWhat is the contribution, in a single sentence?",
        "Tell a colleague in one line what this paper does.\n\n{text}",
        "Write a one-sentence version of the abstract below.\n\n{text}",
        "You have room for one sentence in a reading list. Which one describes this work?\n\n{text}",
    ),
    metrics=_SUMMARY_METRICS,
    max_new_tokens=64,
    cue="Summary:",
    licence="Apache-2.0",
    source="Cachola et al. 2020, SciTLDR (arXiv 2004.15011)",
)


def _eng_spa(row: RowColumns) -> ItemFields:
    return generative_fields(
        column_slots(row, text="eng|english|en"), row_answers(row, "spa", "spanish", "es")
    )


def _translation_fields(row: RowColumns) -> ItemFields:
    if not isinstance(row["translation"], Mapping):
        raise UnusableRowError(
            "format",
            f"'translation' holds {describe_type(row['translation'])}, expected {{en, es}}",
        )
    return generative_fields(
        column_slots(row["translation"], text="en|eng"),
        row_answers(row["translation"], "es", "spa"),
    )


ENG_SPA = NamedSet(
    name="eng_spa",
    about="short everyday sentences, English into Spanish",
    hub="OscarNav/spa-eng",
    splits=WHOLE_SPLITS,
    layouts=(
        make_layout("hub", "eng|english|en spa|spanish|es", _eng_spa),
        make_layout("translation", "translation", _translation_fields),
    ),
    templates=(
        "Translate into Spanish: {text}",
        "English: {text}\n\nGive the Spanish.",
        "A friend who speaks only Spanish has to understand this sentence. Write it for them.\n{text}",
        "Put the following into Spanish, without comments.\n\n{text}",
    ),
    metrics=("bleu", "chrf"),
    max_new_tokens=64,
    cue="Spanish:",
    licence="CC-BY-2.0-FR (Tatoeba)",
    source="Tatoeba, as Anki sentence pairs (manythings.org/anki)",
)


def _python_code(row: RowColumns) -> ItemFields:
    given = str(row.get("input") or "").strip()
    return generative_fields(
        {
            **column_slots(row, task="instruction"),
            "input": "" if given.lower() == "not applicable" else given,
        },
        row_answers(row, "output", "response"),
    )


PYTHON_CODE = NamedSet(
    name="python_code",
    about="small programming tasks, solved in Python",
    hub="iamtarun/python_code_instructions_18k_alpaca",
    splits=LAST_TENTH_SPLITS,
    layouts=(make_layout("hub", "instruction output|response", _python_code),),
    templates=(
        "{task}\n\nInput: {input}\n\nAnswer with Python code.",
        "Write a Python program for this task.\n\n{task}\n\n{input}",
        "Task: {task}\n\nGiven: {input}\n\nCode only, in Python.",
        "How is this done in Python? {task}\n\n{input}",
    ),
    metrics=("chrf", "bleu", "exact_match"),  # BLEU of code, a stand-in for CodeBLEU, which parses
    max_new_tokens=256,
    cue="Python:",
    licence="not stated",
    source="iamtarun 2023, python_code_instructions_18k_alpaca (no paper)",
)

SETS = (COMMON_GEN, XSUM, SAMSUM, SCITLDR, ENG_SPA, PYTHON_CODE)
