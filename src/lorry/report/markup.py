"""HTML and SVG that cannot be broken out of: every string is escaped unless `tag` itself made it."""

from __future__ import annotations

import html

from lorry.visible import visible


class Html(str):
    """Markup that is safe to put in a page as it is."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Any value as text of a page: markup characters escaped, control characters made visible; `Html` stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(visible(str(text))))


def join(*parts: object) -> Html:
    """Parts one after another, each escaped; None is left out."""
    return Html("".join(escape(part) for part in parts if part is not None))


def tag(element: str, *children: object, **attributes: object) -> Html:
    """``tag("td", text, class_="number")``: an element with escaped children and attributes.

    An attribute's underscores become hyphens and one at its end is dropped; None leaves the attribute out.
    """
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items() if value is not None
    )
    return Html(f"<{element}{pairs}>{join(*children)}</{element}>")
