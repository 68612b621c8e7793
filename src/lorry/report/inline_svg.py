"""A chart of the report as SVG inside its page: drawn by matplotlib (plots.py), made to fit a page.

matplotlib's file stands alone; inside a page it is given what the page has: colours of the style
sheet, so that one drawing serves light and dark, a title and a description for readers who cannot
see it, and the values for the script. It loses what a page cannot have twice or does not want: ids,
a style sheet of its own for every element there is, references.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorry.formatting import format_number
from lorry.report.curves import ChartPanel, describe_panel
from lorry.report.markup import SafeHtml
from lorry.report.plots import (
    PAGE_COLORS,
    SERIES_COLORS,
    add_chart_axes,
    clean_text,
    draw_panel,
    legend_height,
    thin_panel,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS_PER_INCH = 72  # of matplotlib's SVG, whatever the figure's dpi
POINTS_PER_UNIT = 1.3  # of a curve: more than the page has pixels on most screens is waste
_COLOR = re.compile("|".join(map(re.escape, PAGE_COLORS)))
_FONT_FAMILY = re.compile("font-family:[^;]*;? ?")
_LONG_NUMBER = re.compile(r"-?\d+\.\d+")
_XLINK = "{http://www.w3.org/1999/xlink}"


def render_chart(panel: ChartPanel, name: str, width: int = 420, height: int = 195) -> SafeHtml:
    """One chart, in points, which the page scales; ``name`` must differ between the charts of a page. A legend makes it
    taller.
    """
    # most of a second, only for those who draw
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panel = thin_panel(panel, int(POINTS_PER_UNIT * width))
    tall = height + legend_height(panel, width)
    figure = Figure(figsize=(width / UNITS_PER_INCH, tall / UNITS_PER_INCH), dpi=UNITS_PER_INCH)
    canvas = FigureCanvasSVG(figure)
    axes = add_chart_axes(figure, panel, (0, 0, width, tall))
    draw_panel(axes, panel, width)
    figure.set_facecolor("none")
    axes.set_facecolor("none")
    drawn = io.StringIO()
    # text stays text; ids by this salt and no date, so that one run gives one page
    style = {"svg.fonttype": "none", "svg.hashsalt": "lorry"}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # it measures with a font that lacks them; the browser that shows them has another
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        canvas.print_svg(drawn, metadata={"Date": None})
    # The file is ours, from labels that escape_label cleaned: no entity is in it to expand.
    root = _plain_tree(ElementTree.fromstring(drawn.getvalue()))
    _describe_for_readers(root, panel, name)
    root.extend(_hover_sheet(panel, axes, tall))
    return SafeHtml(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _plain_tree(root: ElementTree.Element) -> ElementTree.Element:
    """The drawing without namespaces, ids, definitions and metadata; whatever refers to a shape is
    that shape.
    """
    shapes = {
        f"#{element.get('id')}": element.get("d", "")
        for element in root.iter()
        if element.tag.endswith("}path")
    }
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}defs")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib.pop("id", None)
        element.attrib.pop("clip-path", None)  # all of it lies inside of the axes
        element.tail = None  # indentation
        element.text = element.text if element.tag == "text" else None
        if element.tag == "use":  # a marker at x, y
            at = f"translate({element.attrib.pop('x')} {element.attrib.pop('y')})"
            shape = shapes[element.attrib.pop(f"{_XLINK}href")]
            element.tag, element.attrib = "path", {"d": shape, "transform": at, **element.attrib}
        for key, value in element.attrib.items():
            if key == "style":
                own = _FONT_FAMILY.sub("", value)  # the page's
                element.set(key, _COLOR.sub(lambda match: PAGE_COLORS[match[0]], own))
            else:  # a tenth of a pixel is enough, and a third of the bytes
                element.set(key, _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.1f}", value))
    return root


def _describe_for_readers(root: ElementTree.Element, panel: ChartPanel, name: str) -> None:
    """Title and description, which a screen reader reads in place of the drawing."""
    texts: Mapping[str, str] = {"title": panel.title, "desc": describe_panel(panel)}
    for at, (tag, text) in enumerate(texts.items()):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = clean_text(text)
        root.insert(at, element)
    view = root.get("viewBox", "")
    root.attrib = {
        "class": "chart",
        "viewBox": view,
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
    }


def _hover_sheet(panel: ChartPanel, axes: Axes, height: float) -> list[ElementTree.Element]:
    """The pointer's line, and an invisible sheet over the curves that carries their values and
    places for the page's script.
    """
    box = axes.bbox
    # once where a line and its circles say the same, and no guides: the legend has their number
    distinct = {
        (curve.label, tuple(curve.steps), tuple(map(format_number, curve.values))): curve.color
        for curve in panel.series
        if curve.kind != "guide"
    }
    series = [
        {
            "label": clean_text(label or panel.title),
            "color": "g" if color < 0 else color % len(SERIES_COLORS),
            # whole numbers as they are; a share of four digits is as much as a pointer can tell
            "x": steps if panel.x_whole else [float(f"{x:.4g}") for x in steps],
            "values": values,
        }
        for (label, steps, values), color in distinct.items()
    ]
    low, high = axes.get_xlim()
    data = {"low": low, "high": high, "name": panel.x_label, "series": series}
    top = height - box.y1  # matplotlib counts from below
    cursor = {"class": "cursor", "x1": "0", "x2": "0"}
    cursor |= {"y1": f"{top:.1f}", "y2": f"{top + box.height:.1f}"}
    place = {"x": box.x0, "y": top, "width": box.width, "height": box.height}
    sheet = ElementTree.Element(
        "rect",
        {
            "class": "sheet",
            **{key: f"{value:.1f}" for key, value in place.items()},
            "data-curves": json.dumps(data, separators=(",", ":")),
        },
    )
    # An empty title keeps the browser from showing the chart's own title as a tooltip.
    sheet.append(ElementTree.Element("title"))
    return [ElementTree.Element("line", cursor), sheet]
