"""The number an answer ends in, compared as a number: how word problems (GSM8K, SVAMP) are scored.

Try: ``number_match("So she makes $1,800.00 a week.", "9 * 200 = 1800\n#### 1800")`` is 1.0.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from lorry.evaluate.metrics.words import ReferenceTexts, as_list

# Digits with or without thousands separators (1,234,567 and 12,34,567), a decimal part, an exponent
# (a short one: 1e999999999 would be a number too big to compare); then quotients of them, 3/4, and
# dates.
_DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\w))?|\.\d+"
# A minus is a sign unless something is taken from something: "10-5" ends in 5, "= -5", "-$5" and
# "$-5" in minus five.
_NUMBER = re.compile(
    rf"((?<![\w)%.\u2212-])[-\u2212])?[$€£¥]?((?<=[$€£¥])[-\u2212])?((?:{_DIGITS})(?:/\d+)*)"
)


def number_match(prediction: str, references: ReferenceTexts) -> float:
    """1.0 if `final_number` of the prediction equals that of a reference, else 0.0 (also where either has none).

    Equal means equal: 18, 18.0, $18.00, 18% and 36/2 agree, 33.3 and 100/3 do not.
    """
    predicted = final_number(prediction)
    return float(
        predicted is not None and predicted in {final_number(r) for r in as_list(references)}
    )


def final_number(text: str) -> Fraction | None:
    """The number after the first "####", GSM8K's mark of an answer (Cobbe et al. 2021); without
    one, the last number; or None.

    After the mark it is the next number, as in GSM8K's own scoring: a base model that goes on with
    another question after "#### 18" said 18. Separators, currency and percent signs are dropped
    (50% is 50); the value is exact.
    """
    _, mark, rest = text.partition("####")
    if mark and (first := _NUMBER.search(rest)):
        return _number_value(first)
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007  only the last one is wanted
        pass
    return _number_value(match) if match else None


def _number_value(match: re.Match[str]) -> Fraction:
    sign, inner, digits = match.groups()
    parts = [Fraction(Decimal(part.replace(",", ""))) for part in digits.split("/")]
    # 1/2/2020 is a date and 1/0 nothing: the last
    value = parts[0] / parts[1] if len(parts) == 2 and parts[1] else parts[-1]
    return -value if sign or inner else value
