"""Named sets of one's own: YAML files that `data.catalog` names. What a set's file says comes out of
its rows; what it gets wrong is one error with file:line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.config import DataConfig, TrainConfig
from lorry.data.catalog import NamedSet, open_catalog, shipped_catalog
from lorry.data.catalog.row_readers import ROW_READERS
from lorry.data.catalog.set_file import SHIPPED_SETS, SetFields
from lorry.data.prepare import prepare_data
from lorry.data.reading.content import UnusableRowError
from lorry.errors import ConfigError

RIVERS = """\
name: rivers
about: which sea a river reaches
layouts:
  - name: files
    needs: [river, sea|seas]
    reader: generate
    slots:
      river: river
      hint: hint?
    answers: sea|seas
templates:
  - |-
    Which sea does the {river} reach?

    Hint: {hint}
  - "Name the sea at the mouth of the {river}."
metrics: [exact_match, token_f1]
max_new_tokens: 16
"""
QUIZ = """\
name: quiz
about: letters
layouts:
  - name: rows
    needs: [q, a0, a1, right]
    reader: multiple_choice_columns
    slots: {question: q}
    choice_columns: [a0, a1]
    label: right
    first_label: 1
templates: ["{question}\\n{options}", "{question} {listed}?"]
metrics: [accuracy]
max_new_tokens: 4
"""


def own(folder: Path, text: str, name: str = "rivers") -> NamedSet:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return open_catalog(str(path)).find_set(name)


def refusal(folder: Path, text: str) -> str:
    """The error of a file, without its folder."""
    path = folder / "rivers.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        open_catalog(str(path))
    return str(caught.value).replace(f"{folder}/", "").replace(f"{SHIPPED_SETS}/", "")


def test_a_file_is_a_set(tmp_path: Path) -> None:
    rivers = own(tmp_path, RIVERS)
    item = rivers.item({"river": "Elbe", "seas": ["North Sea", "the North Sea"], "hint": "cold"})
    assert item.prompt == "Which sea does the Elbe reach?\n\nHint: cold"
    assert (item.answer, item.cue) == ("North Sea", "Answer:")
    assert item.references == ("North Sea", "the North Sea")
    bare = rivers.item({"river": "Elbe", "sea": "North Sea"})
    assert bare.prompt == "Which sea does the Elbe reach?"
    assert rivers.item({"river": "Elbe", "sea": "x"}, 1).prompt.startswith("Name the sea")
    with pytest.raises(UnusableRowError, match=r"Known: files \(river \+ sea\|seas\)"):
        rivers.item({"sea": "x"})


# reader, its settings, a row, and (answer, options, right) of it
READERS: list[tuple[str, dict[str, Any], dict[str, Any], tuple[Any, ...]]] = [
    ("generate", {}, {"q": "?", "output": "yes</s>"}, ("yes", (), ())),
    ("number", {"answers": "n"}, {"q": "?", "n": "1,450.00"}, ("1450", (), ())),
    ("multiple_choice", {}, {"q": "?", "choices": ["x", "y"], "answerKey": "B"}, ("y", ("x", "y"), (1,))),
    ("multiple_choice", {"choices": "os", "label": "gold_id"},
     {"q": "?", "os": {"text": ["x", "y"], "label": ["1", "2"]}, "gold_id": "1", "label": "2"}, ("x", ("x", "y"), (0,))),
    ("multiple_choice_columns", {"choice_columns": ["a", "b"], "label": "l", "first_label": 1},
     {"q": "?", "a": "x", "b": "y", "l": 2}, ("y", ("x", "y"), (1,))),
    ("multiple_choice_targets", {"choices": "t"},
     {"q": "?", "t": {"choices": ["x", "y", "z"], "labels": [0, 1, 1]}}, ("y", ("x", "y", "z"), (1, 2))),
    ("class_label", {"options": ["no", "yes"], "label": "l"}, {"q": "?", "l": 1}, ("yes", ("no", "yes"), (1,))),
    ("class_label", {"options": ["no", "yes"], "label": "l"}, {"q": "?", "l": "no"}, ("no", ("no", "yes"), (0,))),
    ("llm_adapters", {}, {"q": "Please answer the following question with true or false, question: Is it? Answer format: true/false",
     "answer": "the correct answer is false"}, ("false", ("true", "false"), (1,))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reader", "given_settings", "row", "expected"),
    READERS,
    ids=[f"{at}-{case[0]}" for at, case in enumerate(READERS)],
)
def test_readers_of_any_columns(
    tmp_path: Path,
    reader: str,
    given_settings: dict[str, Any],
    row: dict[str, Any],
    expected: tuple[Any, ...],
) -> None:
    ranked = ROW_READERS[reader].ranked
    layout = {"name": "rows", "needs": list(row), "reader": reader, "slots": {"q": "q"}}
    declared = {
        "name": "rivers",
        "about": "x",
        "layouts": [{**layout, **given_settings}],
        "templates": ["{q} {listed}" if ranked else "{q}"],
        "metrics": ["accuracy" if ranked else "exact_match"],
        "max_new_tokens": 4,
    }
    item = own(tmp_path, yaml.safe_dump(declared)).item(row)
    assert (item.answer, item.options, item.right) == expected
    assert item.references[0] == expected[0]


def test_a_folder_of_sets_and_what_they_share(tmp_path: Path) -> None:
    (tmp_path / "_base.yaml").write_text(RIVERS.replace("name: rivers\n", "", 1))
    (tmp_path / "rivers.yaml").write_text("include: _base\nname: rivers\ncue: 'Sea:'\n")
    (tmp_path / "lakes.yml").write_text("include: rivers\nname: lakes\nlicence: CC0-1.0\n")
    (tmp_path / "notes.txt").write_text("no set")
    catalog = open_catalog(str(tmp_path))
    lakes = catalog.find_set("lakes")
    assert (lakes.cue, lakes.licence, lakes.max_new_tokens) == ("Sea:", "CC0-1.0", 16)
    assert lakes.templates == catalog.find_set("rivers").templates
    assert catalog.find_set("Rivers").licence == "not stated"
    assert catalog.expand_suites(["lakes", "math"]) == ["lakes", "gsm8k", "svamp"]
    assert list(catalog.sets)[-2:] == ["lakes", "rivers"]
    with pytest.raises(ConfigError, match=r"Sets: .*lakes, rivers"):
        catalog.find_set("seas")


def test_a_set_may_build_on_a_shipped_one(tmp_path: Path) -> None:
    law = own(tmp_path, "include: mmlu\nname: law\nabout: law\nconfig: professional_law\n", "law")
    mmlu = shipped_catalog().find_set("mmlu")
    assert (law.hub, law.config) == ("cais/mmlu", "professional_law")
    assert (law.templates, law.splits) == (mmlu.templates, mmlu.splits)
    # the hub's id still means the shipped set
    assert open_catalog(str(tmp_path / "law.yaml")).find_set("cais/mmlu") == mmlu
    with pytest.raises(ConfigError, match="unknown set 'law'"):
        shipped_catalog().find_set("law")


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    assert own(tmp_path, RIVERS).max_new_tokens == 16
    assert own(tmp_path, RIVERS.replace("16", "17")).max_new_tokens == 17


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("bool_q", "'bool_q' is already the name of the set 'bool_q' of "),
        ("boolq", "'boolq' is already the name of the set 'bool_q' of "),
        ("arc", "'arc' is already the name of the set 'arc_challenge' of "),
        ("math", "'math' is already the name of a suite"),
    ],
)
def test_a_name_that_exists_is_refused(tmp_path: Path, name: str, taken: str) -> None:
    message = refusal(tmp_path, RIVERS.replace("name: rivers", f"name: {name}"))
    assert message.startswith("rivers.yaml: the set ")
    assert taken in message
    alias = refusal(tmp_path, RIVERS + f"aliases: [streams, {name}]\n")
    assert alias.startswith("rivers.yaml: the set 'rivers': ")
    assert taken in alias


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(RIVERS)
    with pytest.raises(ConfigError, match=r"b\.yaml: .*'rivers' is already .* of .*a\.yaml"):
        open_catalog(str(tmp_path))


# (what is replaced, by what, the error from its first letter on)
DAMAGED: list[tuple[str, str, str]] = [
    ("name: rivers\n", "", "rivers.yaml: name: is missing"),
    ("name: rivers\n", "name: My Rivers\n", "rivers.yaml:1: name: 'My Rivers' may hold "),
    ("max_new_tokens: 16", "max_new_tokens: '16'", "rivers.yaml:18: max_new_tokens: got '16'; "),
    ("max_new_tokens: 16", "max_new_tokens: 0", "rivers.yaml:18: max_new_tokens: got 0; "),
    ("max_new_tokens", "max_new_token", "rivers.yaml:18: max_new_token: no such key (did you mean 'max_new_tokens'?)"),
    ("    reader: generate", "    reader: generat", "rivers.yaml:4: layouts.0: no reader 'generat' (did you mean 'generate'?)"),
    ("    reader: generate", "    reader: os.system", "rivers.yaml:4: layouts.0: no reader 'os.system'"),
    ("    answers: sea|seas", "    answer: sea", "rivers.yaml:10: layouts.0.answer: no such key (did you mean 'answers'?)"),
    ("    answers: sea|seas", "    label: sea", "rivers.yaml:4: layouts.0: the reader generate does not take 'label'"),
    ("    answers: sea|seas", "    answers: sea|", "rivers.yaml:10: layouts.0.answers: 'sea|' names an empty column"),
    ("reader: generate", "reader: number", ""),
    ("needs: [river, sea|seas]\n    reader: generate", "needs: [river]\n    reader: number",
     "rivers.yaml:4: layouts.0: answers reads 'sea|seas', which has to be named in needs too"),
    ("      river: river\n      hint: hint?\n", "      options: river\n", "rivers.yaml:4: layouts.0: the slot 'options' is built from"),
    ("the {river} reach", "the {rivr} reach", "rivers.yaml:11: templates: {rivr} in 'Which sea does the {rivr} reach?"),
    ("the {river} reach", "the {river.__class__} reach", "rivers.yaml:11: templates: {river.__class__} in "),
    ("the {river} reach", "the {river!r} reach", "rivers.yaml:11: templates: {river!r} in "),
    ("the {river} reach", "the {river:>9} reach", "rivers.yaml:11: templates: {river:>9} in "),
    ("the {river} reach", "the {} reach", "rivers.yaml:11: templates: {} in "),
    ("the {river} reach", "the {river reach", "rivers.yaml:11: templates: "),
    ("mouth of the {river}.", "mouth.", "rivers.yaml:11: templates: 'Name the sea at the mouth.' has no slot"),
    ("the {river} reach?", "the {listed} reach?", "rivers.yaml:11: templates: {listed} in "),
    ("[exact_match, token_f1]", "[accuracy]", "rivers.yaml:17: metrics: accuracy needs options"),
    ("[exact_match, token_f1]", "[exact_match, exact_match]", "rivers.yaml:17: metrics: 'exact_match' is given twice"),
    ("[exact_match, token_f1]", "[]", "rivers.yaml:17: metrics: got []; "),
    ("about: which", "hub: google\nabout: which", "rivers.yaml:2: hub: 'google' is not a hub id"),
    ("about: which", "hub: a/b\nabout: which", "rivers.yaml: splits: missing; "),
    ("about: which", "splits: {train: train}\nabout: which", "rivers.yaml:2: splits: is only for a set on the hub, and"),
    ("about: which", "hub: a/b\nsplits: {trian: x}\nabout: which", "rivers.yaml:3: splits: no split 'trian' (did you mean 'train'?)"),
    ("about: which", "limit: {slot: rivr, characters: 9}\nabout: which", "rivers.yaml:2: limit: no layout fills the slot 'rivr'"),
    ("about: which", "limit: {slot: river, chars: 9}\nabout: which", "rivers.yaml:2: limit.chars: no such key (did you mean 'characters'?)"),
    ("about: which", "name: lakes\nabout: which", "rivers.yaml:2: 'name' is given twice"),
    ("about: which", "include: nowhere\nabout: which", "rivers.yaml:2: include: no set 'nowhere' here or among Lorry's"),
    ("about: which", "include: ../secret\nabout: which", "rivers.yaml:2: include: got '../secret'; "),
    ("about: which", "include: rivers\nabout: which", "rivers.yaml:2: include: no set 'rivers' here"),
    ("about: which sea a river reaches", "about: [", "rivers.yaml:4: not YAML: "),
    ("about: which sea a river reaches", "about: !!python/object/apply:os.system [id]", "rivers.yaml:2: the tag "),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "error"), DAMAGED, ids=[f"{at}" for at in range(len(DAMAGED))]
)
def test_a_damaged_file_is_one_error(tmp_path: Path, old: str, new: str, error: str) -> None:
    assert old in RIVERS
    text = RIVERS.replace(old, new, 1)
    if not error:  # a column of its own is read by any reader that can
        assert own(tmp_path, text).item({"river": "x", "sea": "3.0"}).answer == "3"
        return
    message = refusal(tmp_path, text)
    assert message.startswith(error), message
    assert "\n" not in message or "no such key" in error, message


def test_files_that_include_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b\nname: a\n")
    (tmp_path / "b.yaml").write_text("include: a\nname: b\n")
    with pytest.raises(ConfigError, match=r"b\.yaml:1: include: 'a' includes this file again"):
        open_catalog(str(tmp_path / "a.yaml"))


def test_an_error_in_an_included_file_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "_base.yaml").write_text(RIVERS.replace("reader: generate", "reader: gnerate"))
    assert refusal(tmp_path, "include: _base\nname: rivers\n").startswith(
        "_base.yaml:4: layouts.0: no reader 'gnerate'"
    )


@pytest.mark.parametrize("held", [None, "absent", "list", "binary", "fifo"])
def test_what_is_no_set(tmp_path: Path, held: str | None) -> None:
    import os

    path = tmp_path / "rivers.yaml"
    if held == "list":
        path.write_text("- a\n")
    elif held == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif held == "fifo":
        os.mkfifo(path)
    expected = {
        None: "the folder holds no named set",
        "absent": "data.catalog=.*rivers.yaml: there is no such file",
        "list": "a named set is a map of keys",
        "binary": "not UTF-8",
        "fifo": "not a regular file",
    }[held]
    with pytest.raises(ConfigError, match=expected):
        open_catalog(str(path if held else tmp_path))


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_key_never_passes_unseen(data: st.DataObject) -> None:
    """A value in the place of any key makes the very set that it says, or a validation error."""
    declared = yaml.safe_load(RIVERS)
    key = data.draw(st.sampled_from([*SetFields.model_fields]))
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    keys = st.text(max_size=4)
    value = data.draw(
        st.recursive(
            scalars,
            lambda x: st.lists(x, max_size=2) | st.dictionaries(keys, x, max_size=2),
            max_leaves=4,
        )
    )
    try:
        fields = SetFields.model_validate({**declared, key: value})
    except ValueError:
        return
    kept = getattr(fields, key)
    assert kept == value


def test_every_shipped_file_is_called_as_its_set() -> None:
    sets = shipped_catalog().sets
    files = [path for path in SHIPPED_SETS.iterdir() if not path.name.startswith("_")]
    assert {path.stem for path in files} == set(sets)
    assert all(one.file == SHIPPED_SETS / f"{name}.yaml" for name, one in sets.items())


def test_a_mixture_of_own_and_shipped_sets(
    tmp_path: Path, tokenizer_of: Callable[..., Any]
) -> None:
    """Rows of a set of one's own are learnt beside others; the tokens say the set's own words."""
    own(tmp_path, RIVERS)
    rows = tmp_path / "rivers.jsonl"
    rows.write_text('{"river": "Elbe", "sea": "North Sea"}\n' * 3)
    quiz = tmp_path / "bq.jsonl"
    quiz.write_text('{"question": "is ice cold", "passage": "p", "answer": true}\n')
    data = DataConfig(
        mix=["bool_q", "Rivers"],
        catalog=str(tmp_path / "rivers.yaml"),
        local={"rivers": str(rows), "bool_q": str(quiz)},
        weights={"rivers": 3.0},
        template=1,
    )
    tokenizer = tokenizer_of("chatml")
    prepared = prepare_data(
        data, TrainConfig(eval_strategy="no"), tokenizer, quarantine=tmp_path / "bad"
    )
    texts = {
        batch.role[0]: tokenizer.decode(batch.tokens.tolist())
        for batch in prepared.stream.batches(0)
    }
    assert set(texts) <= {"bool_q", "rivers"}
    joined = " ".join(texts.values())
    assert "Name the sea at the mouth of the Elbe." in joined
    assert "North Sea" in joined
    with pytest.raises(ConfigError, match="unknown set 'rivers'"):
        prepare_data(
            data.model_copy(update={"catalog": None}),
            TrainConfig(eval_strategy="no"),
            tokenizer,
            quarantine=tmp_path / "bad",
        )


def test_a_choice_of_own_columns(tmp_path: Path) -> None:
    quiz = own(tmp_path, QUIZ, "quiz")
    row = {"q": "Which?", "a0": "x", "a1": "y", "right": "2"}
    assert quiz.item(row).prompt == "Which?\n- x\n- y"
    assert quiz.item(row, 1).prompt == "Which? x or y?"
    with pytest.raises(UnusableRowError, match="'0' is outside"):
        quiz.item({**row, "right": "0"})


def test_a_template_that_nothing_fills_is_a_bad_row() -> None:
    """Before, the row was asked with an empty prompt: both of its slots stand in one paragraph."""
    triviaqa = shipped_catalog().find_set("triviaqa")
    with pytest.raises(UnusableRowError, match="no paragraph of the template") as caught:
        triviaqa.item({"context": "Passage", "input": "", "answers": ["Mara"]})
    assert caught.value.bad.kind == "empty prompt"
