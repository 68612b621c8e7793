"""Numbers at the end of an answer: by hand, by GSM8K's published rule on its test set, and by
SVAMP's equations.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.evaluate.metrics.number import final_number, number_match


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So it is 18.", 18),
        ("#### 18", 18),
        ("16 - 3 = 13\n#### $1,800.00 a week", 1800),
        ("#### 18\n\nQuestion: Tom has 5 apples. #### 7", 18),  # a base model runs on
        ("12 eggs ####", 12),
        ("#### eighteen, or 18", 18),
        ("1,234,567 people", 1234567),
        ("12,34,567 rupees", 1234567),
        ("1,2", 2),
        ("12,345678", 345678),
        ("of 3, 400", 400),
        ("50%", 50),
        ("$5.50", Fraction(11, 2)),
        ("costs $.75!", Fraction(3, 4)),
        ("7.0", 7),
        ("-5", -5),
        ("x = \u22125", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("10-5", 5),
        ("50%-20%", 20),
        ("(2)-3", 3),
        ("- 4 apples", 4),
        ("3/4 of it", Fraction(3, 4)),
        ("on 1/2/2020", 2020),
        ("1/0", 0),
        ("1.5e3 m", 1500),
        ("2e", 2),
        ("€20", 20),
        ("٣", 3),
        ("$18/hour", 18),
        ("none at all", None),
        ("", None),
    ],
)
def test_final_number_by_hand(text: str, expected: Fraction | None) -> None:
    assert final_number(text) == expected


def test_a_model_that_repeats_a_digit_is_read() -> None:
    assert final_number("9" * 6000) == 10**6000 - 1  # beyond the digits Python's int() reads


def test_number_match_by_hand() -> None:
    assert number_match("She makes $1,800.00.", "9 * 200 = 1800\n#### 1800") == 1.0
    assert number_match("18", ["17", "18.0"]) == 1.0
    assert number_match("-18", "18") == 0.0
    assert number_match("33.3", "100/3") == 0.0
    assert number_match("1000000", "1000001") == 0.0
    assert number_match("no idea", "18") == 0.0
    assert number_match("no idea", "none") == 0.0


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.0", "{:,}.00", "{}%"]))
def test_any_integer_is_read_back(value: int, form: str) -> None:
    assert final_number(f"First 3, then {form.format(value)}.") == value


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(0, 4))
def test_quotients_and_decimals(above: int, below: int, places: int) -> None:
    assert final_number(f"= {above}/{below}") == Fraction(above, below)
    assert final_number(f"= {above / 10**places:.{places}f}") == Fraction(above, 10**places)


@given(st.text("0123456789.,-/$%#eE +", max_size=30))
def test_no_text_is_too_strange(text: str) -> None:
    found = final_number(text)
    assert (found is None) == (re.search(r"\d", text) is None)
    if found is not None:
        assert number_match(text, text) == 1.0


def test_gsm8k_by_its_published_rule(shared_data: Path) -> None:
    rows = [
        json.loads(line) for line in (shared_data / "gsm8k/test.jsonl").read_text().splitlines()
    ]
    agree = 0
    for row in rows:
        solution, last = row["answer"].split("####")
        published = re.search(r"#### (-?[0-9.,]+)", row["answer"])
        assert published is not None
        assert final_number(row["answer"]) == Fraction(published[1].replace(",", ""))
        agree += number_match(re.sub("<<.*?>>", "", solution), last)
    assert agree / len(rows) > 0.9  # the last number of the reasoning is nearly always the answer


def test_svamp_answers_equal_their_equations(shared_data: Path) -> None:
    rows = json.loads((shared_data / "svamp/SVAMP.json").read_text())
    divided = 0
    for row in rows:
        assert number_match(f"That makes {row['Answer']:,} in all", str(row["Answer"])) == 1.0
        if found := re.fullmatch(r"\( (\d+)\.0 / (\d+)\.0 \)", row["Equation"].strip()):
            whole = Fraction(int(found[1]), int(found[2])) == Fraction(str(row["Answer"]))
            assert number_match(f"It is {found[1]}/{found[2]}.", str(row["Answer"])) == float(whole)
            divided += whole
    assert divided > 100
