"""HTML and SVG that cannot be broken out of: every string is escaped unless `html_tag` itself made
it.
"""

from __future__ import annotations

import html

from lorry.visible import make_visible


class SafeHtml(str):
    """Markup that is safe to put in a page as it is."""

    __slots__ = ()


def escape_html(text: object) -> SafeHtml:
    """Any value as text of a page: markup characters escaped, control characters made visible;
    `SafeHtml` stays as it is.
    """
    return text if isinstance(text, SafeHtml) else SafeHtml(html.escape(make_visible(str(text))))


def join_html(*parts: object) -> SafeHtml:
    """Parts one after another, each escaped; None is left out."""
    return SafeHtml("".join(escape_html(part) for part in parts if part is not None))


def html_tag(element: str, *children: object, **attributes: object) -> SafeHtml:
    """``tag("td", text, class_="number")``: an element with escaped children and attributes.

    An attribute's underscores become hyphens and one at its end is dropped; None leaves the
    attribute out.
    """
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape_html(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return SafeHtml(f"<{element}{pairs}>{join_html(*children)}</{element}>")
