"""Other answers to the questions of a row set: refusals drawn for each row, or those of a file.

    alternates_of(data, tokens, encoder, refusals=read_refusals(None), seed=0, variants=5)
    alternates_of(data, tokens, encoder, finder=AlternatesFinder(read_alternates("alt5.json")))

The question is the row's own, turn by turn; only the last answer is another. What cannot be asked
that way, a text without a question, is refused.

A row finds its alternates in a file by its last question and, where the file has answers, by its
own answer. Conversations that end with the same question and that no answer tells apart would learn
each other's alternates: they are refused, also where one is to be forgotten and the other retained.
So one finder serves all row sets of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from lorry.config.data import DataConfig
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet, encode_rows
from lorry.data.reading.content import ChatMessage, Conversation
from lorry.data.reading.formats import DataExample, format_named, read_examples
from lorry.data.reading.sources import open_source
from lorry.data.stream.pack import sequence_key
from lorry.data.stream.roles import Alternates
from lorry.errors import DataError
from lorry.formatting import format_count

QUESTION_COLUMNS = ("question", "prompt", "instruction")
ALTERNATE_COLUMNS = ("alternate", "alternates", "alternative")
# {question: {the answer that they are other than: alternates}}; None: of rows without an answer
AlternatesByQuestion = Mapping[str, Mapping[str | None, Sequence[str]]]


def read_refusals(path: str | None) -> list[str]:
    """Refusals, one a line; None: ours. Raises DataError for an empty line or file."""
    if path is None:
        text, name = files(__package__).joinpath("refusals.txt").read_text("utf-8"), "refusals.txt"
    else:
        name = path
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"unlearn.idk={path}: cannot be read ({error})") from None
    # a line break at the end closes a line and opens none
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if empty := [number for number, line in enumerate(lines, 1) if not line]:
        raise DataError(f"{name}:{empty[0]}: an empty line; every line has to be a refusal")
    if not lines:
        raise DataError(f"{name}: holds no refusal; write one a line")
    return lines


def read_alternates(path: str) -> dict[str, dict[str | None, list[str]]]:
    """{question: {its answer, None where the row has none: other answers}} of a file of rows with a
    question, an alternate (or a list of them) and maybe an answer. White space around and within an
    answer does not count. Raises DataError, with file and line.
    """
    by_question = dict[str, dict[str | None, list[str]]]()
    for row in open_source(path):
        question = next((row.values[c] for c in QUESTION_COLUMNS if c in row.values), None)
        alternate = next((row.values[c] for c in ALTERNATE_COLUMNS if c in row.values), None)
        if not isinstance(question, str) or alternate is None:
            raise DataError(
                f"{row.where}: an alternate needs the columns question and alternate; it has "
                f"{', '.join(map(str, row.values))}"
            )
        answers = alternate if isinstance(alternate, list) else [alternate]
        for answer in answers:
            if not isinstance(answer, str) or not answer.strip():
                raise DataError(
                    f"{row.where}: an empty alternate; alternates are trained on as answers"
                )
        # a question may stand in several rows: AltPO's files have a row for each alternate
        own = row.values.get("answer")
        key = _same_words(own) if isinstance(own, str) else None
        by_question.setdefault(question.strip(), {}).setdefault(key, []).extend(answers)
    return by_question


def alternates_of(
    data: DataConfig,
    tokens: TokenSet,
    encoder: ExampleEncoder,
    *,
    finder: AlternatesFinder | None = None,
    refusals: Sequence[str] = (),
    seed: int = 0,
    variants: int = 1,
) -> Alternates:
    """Alternates of every sequence of ``tokens``, which were read as ``data`` says. ``finder``: of
    a file; without it each row has ``variants`` of ``refusals``, drawn by (seed, row, variant).

    Raises DataError for a row that is no question with an answer, or has no alternate, and for two
    conversations that would share theirs.
    """
    places = {where: row for row, where in enumerate(tokens.where)}
    # what is wrong with its rows was said when the tokens were read
    source = open_source(
        data.path or [],
        name=data.name,
        split=data.split,
        on_bad_row="skip",
        limit=data.n,
        local=data.local,
    )
    form = format_named(data.format, data.text_field)
    of: list[list[int]] = [[] for _ in tokens.where]
    if finder is not None:
        finder.begin_set()

    def others() -> Iterator[DataExample]:
        for example in read_examples(source, form):
            if (row := places.get(example.where)) is None:  # a bad row, left out of the tokens too
                continue
            if finder is not None:
                drawn = finder.of(example)
            else:
                # of the row and not of a stream: the same whatever else is read, and after a resume
                draws = [sequence_key(row, v) ^ sequence_key(seed, -1) for v in range(variants)]
                drawn = [refusals[draw % len(refusals)] for draw in draws]
            for answer in drawn:
                yield replace(example, content=replace_last_answer(example, answer))

    encoded = TokenSet.of(encode_rows(others(), source, encoder), source, encoder)
    for number, where in enumerate(encoded.where):
        of[places[where]].append(number)
    if missing := [tokens.where[row] for row, numbers in enumerate(of) if not numbers]:
        raise DataError(
            f"{missing[0]}: no alternate of this row can be used ({format_count(len(missing), 'row')} in all); an alternate "
            "longer than max_length is dropped"
        )
    return Alternates(encoded, of)


class AlternatesFinder:
    """Looks up the alternates of rows, set by set and one after the other, and remembers what was
    said before the questions, since no two conversations may share theirs.
    """

    def __init__(self, answers: AlternatesByQuestion) -> None:
        self.answers = answers
        # (question, answer) of alternates -> (turns before the question, place, set) of the first row
        self.seen = dict[tuple[str, str | None], tuple[list[tuple[str, str]], str, int]]()
        self.sets = 0

    def begin_set(self) -> None:
        """The rows that come now are those of another set: to forget, or to retain."""
        self.sets += 1

    def of(self, example: DataExample) -> list[str]:
        """The alternates of a row. Raises DataError for none, and for those of another's."""
        question, own = last_question(example), _same_words(last_answer(example))
        by_answer = self.answers.get(question)
        if by_answer is None:
            raise DataError(
                f"{example.where}: unlearn.alternates has no answer to {question!r:.80}"
            )
        if own in by_answer:
            key: str | None = own
        elif None in by_answer:
            key = None
        elif len(by_answer) == 1:  # the file may have the answer in other words
            (key,) = by_answer
        else:
            raise DataError(
                f"{example.where}: unlearn.alternates has {question!r:.80} with {len(by_answer)} "
                "answers, none of which is this row's"
            )
        before = _turns_before_question(example)
        first, where, of = self.seen.setdefault((question, key), (before, example.where, self.sets))
        if of != self.sets:
            raise DataError(
                f"{example.where}: {question!r:.80} is also asked in {where}, in "
                "the other set of this run, and unlearn.alternates does not tell "
                "the two apart: add to its rows the column answer, with the answer "
                "that each alternate replaces, or remove one of the rows"
            )
        if first != before:
            raise DataError(
                f"{example.where}: {question!r:.80} follows other turns than in "
                f"{where}, and unlearn.alternates does not tell the two apart: add "
                "to its rows the column answer, with the answer that each "
                "alternate replaces; if the answers are the same too, remove one "
                "of the rows"
            )
        return list(by_answer[key])


def _same_words(text: str) -> str:
    return " ".join(text.split())


def _turns_before_question(example: DataExample) -> list[tuple[str, str]]:
    """(role, content) of each."""
    turns: list[tuple[str, str]] = [
        (message.role, message.content) for message in _conversation(example).messages
    ]
    user_turns = [number for number, (role, _) in enumerate(turns) if role == "user"]
    return turns[: user_turns[-1]] if user_turns else turns[:-1]


def last_question(example: DataExample) -> str:
    """The last thing the user says: what a row's alternates are found by. Raises DataError for a
    text, which asks nothing.
    """
    content = _conversation(example)
    questions = [message.content for message in content.messages if message.role == "user"]
    return questions[-1].strip() if questions else ""


def last_answer(example: DataExample) -> str:
    """What is said last. Raises DataError where that is no answer."""
    last = _conversation(example).messages[-1]
    if last.role != "assistant":
        raise DataError(f"{example.where}: the last turn is not an answer")
    return last.content.strip()


def replace_last_answer(example: DataExample, answer: str) -> Conversation:
    """The row's conversation with another last answer. Raises DataError where it ends with none."""
    content = _conversation(example)
    last_answer(example)
    plain = None
    if content.plain is not None:  # running text: what stands between prompt and answer stays
        prompt, old = content.plain
        plain = (prompt, old[: len(old) - len(old.lstrip())] + answer)
    turns = (*content.messages[:-1], ChatMessage("assistant", answer))
    return replace(content, messages=turns, plain=plain)


def _conversation(example: DataExample) -> Conversation:
    if not isinstance(example.content, Conversation):
        raise DataError(
            f"{example.where}: plain text has no alternate answer; this method needs "
            "rows of question and answer"
        )
    return example.content
