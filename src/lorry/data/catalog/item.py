"""What a row of a named set becomes: canonical fields, then an ``NamedSetItem``: a filled prompt, its answer, what counts as right.

Try: ``fill_template("{passage}\\n\\nQuestion: {question}", {"passage": "", "question": "Is ice cold?"})`` is "Question: Is ice cold?".
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorry.data.reading.content import UnusableRowError

_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class NamedSetItem:
    """One row of a named set, ready to be asked.

    ``prompt``: what the user says. ``answer``: what is learnt. ``cue``: closes the prompt where
    there is no chat template. ``references``: every right answer, for metrics; ``answer`` among
    them, but for numbers, where the reference is the bare number. ``options``: where it is a
    choice, the texts that are ranked; ``right``: which of them are right. ``concepts``: words the
    answer has to use. ``shortened``: the context was longer than the set's limit and lost its end.
    """

    prompt: str
    answer: str
    cue: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    concepts: tuple[str, ...] = ()
    shortened: bool = False


@dataclass(frozen=True)
class ItemFields:
    """A row in canonical form, whatever columns it came in: ``slots`` are the texts that templates
    name.
    """

    slots: Mapping[str, str]
    answer: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    concepts: tuple[str, ...] = ()


def generative_fields(
    slots: Mapping[str, str], answers: Sequence[str], concepts: Sequence[str] = ()
) -> ItemFields:
    """Fields of a generative row: the first answer is learnt, every one is a reference. Raises
    UnusableRowError without one.
    """
    # annotators repeat each other; the first is what is learnt
    right = tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
    if not right:
        raise UnusableRowError(
            "empty answer", "the answer is empty, so there is nothing to train on"
        )
    return ItemFields(slots, right[0], right, concepts=tuple(concepts))


def choice_fields(
    slots: Mapping[str, str], options: Sequence[str], right: Sequence[int]
) -> ItemFields:
    """Fields of a choice: the first right option's text is learnt. Options with the text of a right
    one are right, too.

    Raises UnusableRowError for fewer than two options, an empty one, or a number outside them.
    """
    texts = tuple(option.strip() for option in options)
    if len(texts) < 2 or not all(texts):
        raise UnusableRowError(
            "options",
            f"a choice needs two or more options, none empty; found {number_options(texts)}",
        )
    for number in right:
        if not 0 <= number < len(texts):
            raise unknown_label_error(number, texts)
    if not right:
        raise UnusableRowError(
            "label", f"no option is marked as correct among {number_options(texts)}"
        )
    # two options of the same text cannot be ranked against each other
    answers = tuple(dict.fromkeys(texts[number] for number in right))
    marked = tuple(number for number, text in enumerate(texts) if text in answers)
    return ItemFields(slots, answers[0], answers, texts, marked)


def unknown_label_error(label: object, options: Sequence[str]) -> UnusableRowError:
    """A label that names none of the options."""
    return UnusableRowError(
        "label", f"the label {label!r} is outside the options: {number_options(options)}"
    )


def number_options(options: Sequence[str]) -> str:
    """Options with their numbers, for a message."""
    return "(" + ", ".join(f"{number}: {text!r}" for number, text in enumerate(options)) + ")"


def fill_template(template: str, slots: Mapping[str, str]) -> str:
    """The template filled in. A paragraph that names an empty or absent slot is left out, so
    optional columns need no twin.
    """
    lines = []
    for paragraph in template.split("\n\n"):
        names = template_slots(paragraph)
        if all(slots.get(name, "").strip() for name in names):
            # one pass over the template: a brace in a value is a brace
            lines.append(paragraph.format_map({name: slots[name].strip() for name in names}))
    return "\n\n".join(lines)


def template_slots(template: str) -> list[str]:
    """The slots that a template names."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def option_slots(options: Sequence[str]) -> dict[str, str]:
    """Options as slots, always in their order: ``{options}`` one a line, ``{lettered}`` with A. B.
    C., ``{listed}`` in a line.
    """
    if not options:
        return {}
    lettered = "\n".join(
        # beyond Z there are no letters; the options are in {options} all the same
        f"{letter}. {text}"
        for letter, text in zip(string.ascii_uppercase, options, strict=False)
    )
    listed = " or ".join(filter(None, (", ".join(options[:-1]), options[-1])))
    return {
        "options": "\n".join(f"- {text}" for text in options),
        "lettered": lettered,
        "listed": listed,
    }


def shorten_text(text: str, limit: int) -> str:
    """At most ``limit`` characters from the start, cut between words where there is white space to
    cut at.
    """
    text = text.strip()
    # in characters, so the cut is the same for every tokenizer
    if len(text) <= limit:
        return text
    spaces = [match.start() for match in _SPACE.finditer(text, 0, limit + 1)]
    return text[: spaces[-1] if spaces else limit].rstrip()
