"""What a terminal would obey, or nobody would see, is shown."""

from __future__ import annotations

import json

import pytest

from lorry.visible import escape_document, is_visible, make_visible


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u200b", "\u2060", "\ufeff"])
def test_strange_line_breaks_and_signs_without_width_are_shown(sign: str) -> None:
    assert make_visible(f"a{sign}b") == "a\ufffdb"
    assert not is_visible(f"a{sign}b")
    document = json.dumps({"k": f"a{sign}b"}, ensure_ascii=False)
    assert escape_document(document).isascii()
    assert json.loads(escape_document(document)) == json.loads(document)


def test_joiners_that_scripts_need_stay() -> None:
    assert (
        make_visible("\u0645\u06cc\u200c\u0634\u0648\u062f \U0001f469\u200d\U0001f4bb")
        == "\u0645\u06cc\u200c\u0634\u0648\u062f \U0001f469\u200d\U0001f4bb"
    )
