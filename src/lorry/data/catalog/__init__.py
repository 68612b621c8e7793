"""The catalogue of named sets: public data sets as data, known by their names.

    named("bool_q").item(row).prompt                # a filled prompt; .answer, .references, .options, .right
    expand(["commonsense", "gsm8k"])                # suites and sets into names of sets
    conversation(item, shots)                       # what training and generation read

A set is one declaration in `choices`, `quiz`, `truth`, `numbers`, `texts`, `reading`, `instruct` or
`longbench`. The prompts are ours, so scores compare with our own; none is inverted (answer to
question). Every set takes the hub's own columns and those of files people have (LLM-Adapters, the
authors' releases, Alpaca prompts), told apart row by row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from lorry.data.catalog import choices, instruct, longbench, numbers, quiz, reading, texts, truth
from lorry.data.catalog.item import NamedSetItem
from lorry.data.catalog.named import NamedSet
from lorry.data.catalog.turns import item_conversation, prompt_with_cue
from lorry.errors import ConfigError, suggest_nearest

__all__ = [
    "SETS",
    "SUITES",
    "NamedSet",
    "NamedSetItem",
    "expand_suites",
    "find_named_set",
    "item_conversation",
    "prompt_with_cue",
]

_CATALOG_MODULES = (texts, choices, quiz, reading, truth, numbers, instruct, longbench)
SETS: dict[str, NamedSet] = {found.name: found for room in _CATALOG_MODULES for found in room.SETS}
_LONGBENCH_SETS = tuple(name for name in SETS if name.startswith("longbench_"))
_CHINESE_SETS = (
    "longbench_multifieldqa_zh",
    "longbench_dureader",
    "longbench_vcsum",
    "longbench_lsht",
    "longbench_passage_retrieval_zh",
)

SUITES: dict[str, tuple[str, ...]] = {
    # what flan-gpt2 trains on
    "flan": (
        "common_gen",
        "anli",
        "bool_q",
        "xsum",
        "python_code",
        "cosmos_qa",
        "squad",
        "samsum",
        "eng_spa",
        "paws",
    ),
    "commonsense": ("bool_q", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "hellaswag"),
    "math": ("gsm8k", "svamp"),
    "summaries": ("xsum", "samsum", "scitldr"),
    "instructions": ("alpaca", "dolly"),
    "truth": ("truthfulqa", "truthfulqa_mc", "truthfulqa_mc1"),
    "longbench": tuple(name for name in _LONGBENCH_SETS if name not in _CHINESE_SETS),
    "longbench_zh": _CHINESE_SETS,
}


def _spelling_key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# other spellings, without case and punctuation: hub ids that mean one set, LongBench's own names,
# and what people write
_HUB_COUNTS = Counter(found.hub for found in SETS.values())
_ALIASES = {
    **{_spelling_key(name.removeprefix("longbench_")): name for name in _LONGBENCH_SETS},
    **{
        _spelling_key(found.hub): found.name
        for found in SETS.values()
        if found.hub and _HUB_COUNTS[found.hub] == 1
    },
    "arc": "arc_challenge",
    "arcc": "arc_challenge",
    "arce": "arc_easy",
    "anlir1": "anli",
    "obqa": "openbookqa",
    "facebookanli": "anli",
    "truthfulqatruthfulqa": "truthfulqa",
    "truthfulqagen": "truthfulqa",
    "truthfulqamc2": "truthfulqa_mc",
    "dolly15k": "dolly",
    "databricksdolly15k": "dolly",
    "databricksdatabricksdolly15k": "dolly",
    "superglueboolq": "bool_q",
    "spaeng": "eng_spa",
    "cosmos": "cosmos_qa",
    "pythoncodeinstructions18kalpaca": "python_code",
    "python": "python_code",
    "quoraqa": "quora",
    "winograndexl": "winogrande",
    "xquaden": "xquad",
    "xquadmultidoc": "xquad",
    "boolqlong": "boolq_long",
    **{_spelling_key(name): name for name in SETS},
}


def find_named_set(name: str) -> NamedSet:
    """The set of this name, in any spelling (boolq, BoolQ, google/boolq). Raises ConfigError
    listing what exists.
    """
    found = _ALIASES.get(_spelling_key(name))
    if found is None:
        raise _unknown_set_error(name)
    return SETS[found]


def expand_suites(names: str | Iterable[str]) -> list[str]:
    """Names of sets, with suites spelt out, in order and without repetition. Raises ConfigError for
    an unknown name.
    """
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        found.update(
            dict.fromkeys(SUITES[name] if name in SUITES else (find_named_set(name).name,))
        )
    return list(found)


def _unknown_set_error(name: str) -> ConfigError:
    if name in SUITES:
        return ConfigError(
            f"{name!r} is a suite, and one set is needed here; it has {', '.join(SUITES[name])}"
        )
    near = suggest_nearest(name.lower(), [*SETS, *SUITES])
    return ConfigError(
        f"unknown set {name!r}{near}. Sets: {', '.join(SETS)}. Suites of them: {', '.join(SUITES)}"
    )
