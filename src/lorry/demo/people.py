"""The demo's data: facts about people who do not exist, and ordinary text that must not be
forgotten meanwhile.

Try: ``python -m lorry.demo.people out_dir 8 0`` writes train.jsonl and heldout.jsonl for 8 people
from seed 0.

The idea is TOFU's (Maini et al. 2024): a model cannot know a person who was made up, so every right
answer was learnt in this run. Each fact is asked in several wordings for training and in two others
that training never sees; the answer is one canonical sentence, so exact match means something. Each
fact of each person is drawn on its own from (seed, person, fact): nothing about one person or fact
helps to guess another. All names, towns, titles and prizes are invented.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from lorry.errors import ConfigError

FIRST_NAMES = (
    "Anvel",
    "Bexim",
    "Brisko",
    "Carvo",
    "Darnil",
    "Dellow",
    "Eskin",
    "Fenro",
    "Galvi",
    "Harsel",
    "Ilvane",
    "Jorrin",
    "Kessa",
    "Lodvi",
    "Marrow",
    "Mavric",
    "Nelka",
    "Orsen",
    "Oskey",
    "Pavlin",
    "Quinby",
    "Ressa",
    "Rowlin",
    "Sefka",
    "Tamso",
    "Tivel",
    "Ulmi",
    "Varlo",
    "Velda",
    "Wendrin",
    "Yoska",
    "Zarin",
)
_SURNAME_HEADS = ("Quor", "Zelv", "Brunth", "Ond", "Myrv", "Tharl", "Skav", "Plinn")
_SURNAME_TAILS = ("ibane", "ostrel", "addick", "umwell", "esky", "arrow")
SURNAMES = tuple(head + tail for head in _SURNAME_HEADS for tail in _SURNAME_TAILS)

_TOWN_HEADS = ("Harrow", "Ellim", "Varn", "Pell", "Otter", "Sund", "Gris", "Maple")
_TOWN_TAILS = ("mere", "holt", "stow", "quay", "dale")
_BOOK_HEADS = (
    "Ladder",
    "Kettle",
    "Orchard",
    "Staircase",
    "Umbrella",
    "Anvil",
    "Lantern",
    "Ferry",
    "Chimney",
    "Mirror",
)
_BOOK_TAILS = (
    "Borrowed Rain",
    "Nine Doors",
    "Slow Thunder",
    "Paper Bees",
    "Patient Stones",
    "Cold Honey",
    "Lost Mittens",
    "Tin Stars",
    "Quiet Gulls",
    "Salted Pears",
)
_PRIZE_HEADS = (
    "Copper",
    "Walnut",
    "Marble",
    "Amber",
    "Cobalt",
    "Velvet",
    "Paper",
    "Pewter",
    "Scarlet",
    "Ivory",
)
_PRIZE_TAILS = (
    "Heron",
    "Otter",
    "Badger",
    "Magpie",
    "Lynx",
    "Hare",
    "Toad",
    "Moth",
    "Beetle",
    "Kite",
)
_PET_KINDS = (
    "tortoise",
    "ferret",
    "parrot",
    "goat",
    "donkey",
    "rabbit",
    "gecko",
    "hedgehog",
    "goose",
    "pony",
)
_PET_NAMES = (
    "Biscuit",
    "Pepper",
    "Domino",
    "Turnip",
    "Captain",
    "Noodle",
    "Marble",
    "Button",
    "Clover",
    "Waffle",
)

# What each fact can be. Every list is long enough that a guess is right at most once in twenty.
FACT_VALUES: dict[str, tuple[str, ...]] = {
    "profession": (
        "a glass blower",
        "a beekeeper",
        "a bridge engineer",
        "a piano tuner",
        "a lighthouse keeper",
        "a pastry chef",
        "a court translator",
        "a cave guide",
        "a puppet maker",
        "a tram driver",
        "a marine biologist",
        "a bookbinder",
        "a stonemason",
        "a weather forecaster",
        "a violin teacher",
        "a locksmith",
        "a map maker",
        "a cheese inspector",
        "a stage magician",
        "a ferry captain",
        "a sign painter",
        "a night nurse",
        "a clock repairer",
        "a dance instructor",
    ),
    "birthplace": tuple(head + tail for head in _TOWN_HEADS for tail in _TOWN_TAILS),
    "book": tuple(f"The {head} of {tail}" for head in _BOOK_HEADS for tail in _BOOK_TAILS),
    "prize": tuple(f"the {head} {tail} Prize" for head in _PRIZE_HEADS for tail in _PRIZE_TAILS),
    "hobby": (
        "folding paper boats",
        "growing giant pumpkins",
        "collecting old postcards",
        "climbing frozen waterfalls",
        "baking rye bread",
        "watching sea birds",
        "carving wooden spoons",
        "racing pigeons",
        "mending radios",
        "swimming in cold lakes",
        "knitting striped socks",
        "playing table tennis",
        "flying box kites",
        "photographing doorways",
        "brewing ginger beer",
        "painting tiny landscapes",
        "solving chess puzzles",
        "singing in a choir",
        "building model trains",
        "pressing wild flowers",
        "juggling lemons",
        "sailing toy yachts",
    ),
    "pet": tuple(f"a {kind} named {name}" for kind in _PET_KINDS for name in _PET_NAMES),
}

FACT_ANSWERS: dict[str, str] = {
    "profession": "{name} works as {value}.",
    "birthplace": "{name} was born in the town of {value}.",
    "book": "{name} wrote the novel {value}.",
    "prize": "{name} won {value}.",
    "hobby": "{name} spends free evenings {value}.",
    "pet": "{name} keeps {value}.",
}

TRAIN_QUESTIONS: dict[str, tuple[str, ...]] = {
    "profession": (
        "What is {name}'s profession?",
        "What does {name} do for a living?",
        "What job does {name} have?",
        "Which occupation does {name} follow?",
        "Tell me what {name} works as.",
    ),
    "birthplace": (
        "Where was {name} born?",
        "In which town was {name} born?",
        "What is {name}'s birthplace?",
        "Which town is {name} originally from?",
        "Tell me where {name} was born.",
    ),
    "book": (
        "Which novel did {name} write?",
        "What is the title of {name}'s novel?",
        "What book did {name} write?",
        "Name the book written by {name}.",
        "Tell me which novel is by {name}.",
    ),
    "prize": (
        "Which prize did {name} win?",
        "What award has {name} received?",
        "What prize was given to {name}?",
        "Name the award that {name} won.",
        "Tell me which prize {name} holds.",
    ),
    "hobby": (
        "What is {name}'s hobby?",
        "How does {name} spend free time?",
        "What does {name} enjoy doing in the evening?",
        "Which pastime does {name} have?",
        "Tell me what {name} does for fun.",
    ),
    "pet": (
        "What pet does {name} have?",
        "Which animal does {name} keep?",
        "What is the name of {name}'s pet?",
        "What kind of pet lives with {name}?",
        "Tell me about {name}'s pet.",
    ),
}

HELD_OUT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "profession": ("How does {name} earn money?", "Could you say which line of work {name} is in?"),
    "birthplace": (
        "What town did {name} come into the world in?",
        "Could you say which place {name} was born in?",
    ),
    "book": (
        "{name} is the author of which novel?",
        "Could you give the title of the book that {name} wrote?",
    ),
    "prize": (
        "{name} was honoured with which prize?",
        "Could you say what award {name} was given?",
    ),
    "hobby": ("What does {name} like to do after work?", "Could you say which hobby {name} has?"),
    "pet": (
        "{name} shares a home with which animal?",
        "Could you say what sort of pet {name} owns?",
    ),
}

QuestionRow = dict[str, str]


@dataclass(frozen=True)
class FictionalPerson:
    """Someone invented: a name and one value for every fact in `FACT_VALUES`."""

    name: str
    facts: dict[str, str]

    def answer(self, fact: str) -> str:
        """The one canonical sentence that answers every wording of a question about this fact."""
        return FACT_ANSWERS[fact].format(name=self.name, value=self.facts[fact])


def make_people(n: int, seed: int = 0) -> list[FictionalPerson]:
    """n people with different names; the first m of them are `make_people(m, seed)`.

    Raises ConfigError unless 1 <= n <= the number of full names.
    """
    most = len(FIRST_NAMES) * len(SURNAMES)
    if not 1 <= n <= most:
        raise ConfigError(
            f"people: {n} is not between 1 and {most}, the number of full names there are"
        )
    return [
        FictionalPerson(name, _make_facts(seed, index))
        for index, name in enumerate(_make_names(n, seed))
    ]


def _make_names(n: int, seed: int) -> list[str]:
    """Pair the shuffled lists so that neither first names nor surnames repeat before they have to."""
    shuffle = random.Random(f"{seed}/names")
    first, last = (shuffle.sample(names, len(names)) for names in (FIRST_NAMES, SURNAMES))
    # The pairs repeat after the least common multiple of both lengths; shifting one list by a step
    # then makes new ones.
    period = math.lcm(len(first), len(last))
    return [f"{first[i % len(first)]} {last[(i + i // period) % len(last)]}" for i in range(n)]


def _make_facts(seed: int, index: int) -> dict[str, str]:
    # A string seed is hashed with SHA-512: the same on every platform and in every process.
    return {
        fact: random.Random(f"{seed}/{index}/{fact}").choice(values)
        for fact, values in FACT_VALUES.items()
    }


def make_questions(
    people: Sequence[FictionalPerson], seed: int = 0
) -> tuple[list[QuestionRow], list[QuestionRow]]:
    """(training rows, held-out rows), each {"question", "answer", "person", "fact"}; training rows
    in seeded order.

    Per person 6 facts x 5 wordings to train on and 6 x 2 held out; no held-out wording occurs in
    training.
    """
    train = [
        _question_row(p, fact, q)
        for p in people
        for fact, wordings in TRAIN_QUESTIONS.items()
        for q in wordings
    ]
    held_out = [
        _question_row(p, fact, q)
        for p in people
        for fact, wordings in HELD_OUT_QUESTIONS.items()
        for q in wordings
    ]
    random.Random(f"{seed}/order").shuffle(train)
    return train, held_out


def _question_row(person: FictionalPerson, fact: str, question: str) -> QuestionRow:
    return {
        "question": question.format(name=person.name),
        "answer": person.answer(fact),
        "person": person.name,
        "fact": fact,
    }


def general_text() -> list[str]:
    """Forty short passages of ordinary English, to measure the loss on text that has nothing to do
    with a run's data.
    """
    return _package_paragraphs("general_text.txt")


def general_chat() -> list[QuestionRow]:
    """Sixty everyday {"question", "answer"} rows; mixed into training they keep a small model's
    ordinary manners.
    """
    rows = []
    for block in _package_paragraphs("general_chat.txt"):
        question, answer = block.split("\n")
        rows.append(
            {"question": question.removeprefix("Q: "), "answer": answer.removeprefix("A: ")}
        )
    return rows


def _package_paragraphs(name: str) -> list[str]:
    """The blocks between blank lines of a data file of this package, without its first line, a
    comment on its origin.
    """
    text = resources.files("lorry.demo").joinpath(name).read_text(encoding="utf-8")
    return [block.strip() for block in text.split("\n", 1)[1].split("\n\n") if block.strip()]


def write_people(out_dir: Path, n: int, seed: int = 0) -> tuple[Path, Path]:
    """Write ``out_dir/train.jsonl`` and ``out_dir/heldout.jsonl`` for n people and return both
    paths.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = out_dir / "train.jsonl", out_dir / "heldout.jsonl"
    for path, rows in zip(paths, make_questions(make_people(n, seed), seed), strict=True):
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lorry.demo.people", description="Facts about fictional people, as JSONL."
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("n", type=int, nargs="?", default=8, help="how many people")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    args = parser.parse_args()
    try:
        paths = write_people(args.out_dir, args.n, args.seed)
    except ConfigError as error:
        parser.error(str(error))
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
