"""Text from elsewhere, made safe to print or write anywhere: what a terminal would obey is shown
instead.

The rule: **no text that is not Lorry's own reaches a terminal, a log or a page but through here.**
Keys of a config, columns of a data file, names of tensors, overrides and answers of a model may
hold ESC sequences (which set a window's title, write the clipboard, hide lines), the C1 controls
that stand for them, or characters that reverse the text around them. Messages pass where they leave
(cli.py, `tell` of verbs/open_model.py, train/monitoring/events.py), everything that rich prints in
console.py.
"""

from __future__ import annotations

import re

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421
}
_UNSEEN_CHARACTERS = (
    _CONTROL_PICTURES
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # further control characters
    | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)  # half a character, which no encoding can write
    # these reverse the text around them, or say where
    | dict.fromkeys(
        [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD
    )
    # line breaks that are none of ours, and signs without width that no script needs (the joiners
    # some do)
    | dict.fromkeys([0x2028, 0x2029, 0x200B, 0x2060, 0xFEFF], 0xFFFD)
)
_BESIDE_ASCII = re.compile(
    "[\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]"
)


def make_visible(text: str) -> str:
    """Text that is safe to print or write anywhere: control characters, terminal escapes among
    them, become pictures.
    """
    return text.translate(_UNSEEN_CHARACTERS)


def is_visible(text: str) -> bool:
    """Whether a text holds no such character, and no line break or tab either."""
    return make_visible(text) == text and not set(text) & set("\n\t")


def visible_message(text: str) -> str:
    """A message that may quote text from elsewhere: a line break in it begins no line that could be
    taken for another message.
    """
    return make_visible(text).replace("\n", "\n  ")


def escape_document(document: str) -> str:
    r"""JSON or YAML for standard output: what their writers leave as it is, as ``\u202e``, which reads back the same."""
    return _BESIDE_ASCII.sub(lambda match: f"\\u{ord(match[0]):04x}", document)
