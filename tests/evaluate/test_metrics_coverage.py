"""Concept coverage: inflections by hand, and CommonGen's own sentences, which were written to cover
their concepts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.evaluate.metrics.coverage import concept_coverage


@pytest.mark.parametrize(
    ("text", "concept", "found"),
    [
        ("She was sitting there.", "sit", True),
        ("They SAT down.", "sit", True),
        ("Two geese and three mice", "goose", True),
        ("a better one", "good", True),
        ("He went.", "go", True),
        ("Wetsuits and frisbees", "wetsuit", True),  # not in the dictionary
        ("wearing sunglasses", "sunglass", True),
        ("Build it.", "building", False),
        ("The building burns.", "build", True),  # may be the verb's form
        ("He was tired.", "bed", False),
        ("The dog's bowl", "dogs", True),
        ("some catalogue", "cat", False),
        ("in the ice creams we trust", "ice cream", True),
        ("cream on ice", "ice cream", False),
        ("Ein Café in Köln", "Köln", True),
        ("Cafe\u0301", "café", True),
        ("a cafe", "café", False),
        ("猫在家", "猫", True),
        ("", "cat", False),
    ],
)
def test_one_concept(text: str, concept: str, found: bool) -> None:
    assert concept_coverage(text, [concept]) == float(found)


def test_share_of_concepts() -> None:
    assert concept_coverage(
        "The players stood around.", ["player", "stand", "field"]
    ) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one concept"):
        concept_coverage("The players stood around.", [])


@given(
    st.text(max_size=40),
    st.lists(st.sampled_from(["dog", "run", "ice cream", "é", "猫"]), min_size=1),
)
def test_any_text_gives_a_share(text: str, concepts: list[str]) -> None:
    share = concept_coverage(text, concepts)
    assert 0 <= share <= 1
    assert share == pytest.approx(concept_coverage(text, concepts[::-1]))
    assert concept_coverage(f"{text} {' '.join(concepts)}", concepts) == 1.0


def test_sentences_of_common_gen_cover_their_concepts_and_no_others(shared_data: Path) -> None:
    rows = [
        json.loads(line)
        for line in (shared_data / "common_gen/commongen.dev.jsonl").read_text().splitlines()
    ]
    concepts = [row["concept_set"].split("#") for row in rows]
    own = [
        concept_coverage(text, mine)
        for row, mine in zip(rows, concepts, strict=True)
        for text in row["scene"]
    ]
    assert len(own) == 4018
    # what the module's docstring says
    assert sum(own) / len(own) == pytest.approx(0.9990, abs=1e-4)
    other = []
    for number, row in enumerate(rows):
        if foreign := set(concepts[(number + 137) % len(rows)]) - set(concepts[number]):
            other += [concept_coverage(text, sorted(foreign)) for text in row["scene"]]
    assert sum(other) / len(other) < 0.006
