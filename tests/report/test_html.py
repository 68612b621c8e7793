"""The page: complete without a network, complete with little, and immune to what a run may have
written.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.report.html import render_page
from lorry.report.markup import SafeHtml, escape_html, html_tag, join_html
from lorry.runs.read import read_readable_runs, read_run
from lorry.visible import make_visible
from tests.support.runs import HOSTILE, dump, full, metrics

VOID = {"meta"}
SECTIONS = [
    "figures",
    "curves",
    "evaluation",
    "samples",
    "training-rows",
    "contracts",
    "settings",
    "receipt",
]


class Page(HTMLParser):
    """What a parser sees: elements with attributes, ids, and text by the element it stands in.
    Unbalanced tags fail.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, element: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((element, dict(attributes)))
        if element not in VOID:
            self.open.append(element)

    def handle_endtag(self, element: str) -> None:
        assert self.open.pop() == element

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def ids(self) -> list[str]:
        return [a["id"] or "" for _, a in self.elements if "id" in a]

    def all_text(self) -> str:
        return "\n".join(
            t
            for element, parts in self.text.items()
            if element not in ("style", "script")
            for t in parts
        )


def rendered(*paths: Path) -> Page:
    return Page(render_page(read_readable_runs(list(paths))[0]))


def test_a_full_run_has_every_section(tmp_path: Path) -> None:
    shown = rendered(full(tmp_path / "people"))
    assert [i for i in shown.ids() if not i.startswith("chart-")] == SECTIONS
    assert len(set(shown.ids())) == len(shown.ids())
    text = shown.all_text()
    for said in (
        "people",
        "2 of 3 contracts held, none failed",
        "640",
        "tokens/s",
        "3.00 GiB",
        "50.0 s",
        "✓ match",
        "+0.8125",
    ):
        assert said in text, said
    titles = shown.text["title"]
    expected = [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Peak memory",
        "kl",
        "perplexity (evaluation)",
    ]
    assert [t for t in expected if t not in titles] == []


def test_supervised_tokens_are_marked_and_no_others(tmp_path: Path) -> None:
    shown = rendered(full(tmp_path / "r", text="T"))
    assert shown.text["mark"] == ["answer T", "half"]
    marks = [a for element, a in shown.elements if element == "mark"]
    assert [(a.get("class"), a["title"]) for a in marks] == [
        (None, "weight 1"),
        ("partly", "weight 0.5"),
    ]
    assert "2 of 3 tokens supervised" in shown.all_text()


def test_a_failed_contract_is_said_at_the_top(tmp_path: Path) -> None:
    text = render_page([read_run(full(tmp_path / "r", failed=True))])
    assert "1 of 3 contracts failed" in text.split('id="figures"')[0]


@pytest.mark.parametrize("steps", [0, 1, 2, 11])
def test_metrics_alone_are_enough(tmp_path: Path, steps: int) -> None:
    metrics(tmp_path / "r", steps)
    shown = rendered(tmp_path / "r")
    sections = [i for i in shown.ids() if not i.startswith("chart-")]
    assert sections == (["figures", "curves"] if steps else ["figures"])
    assert ("No step has been recorded yet" in shown.all_text()) == (steps == 0)
    assert "contracts not reported" in shown.all_text()


def test_a_live_run_with_half_a_line(tmp_path: Path) -> None:
    metrics(tmp_path / "r", 12)
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 0.')
    assert "12" in rendered(tmp_path / "r").text["div"]


def test_twenty_thousand_steps_stay_a_small_page(tmp_path: Path) -> None:
    metrics(tmp_path / "r", 20_000)
    assert len(render_page([read_run(tmp_path / "r")])) < 400_000


def test_nan_everywhere_and_huge_ranges(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    lines = [
        {"step": i, "loss": v, "grad_norm": v}
        for i, v in enumerate(["NaN", "Infinity", 1e308, -1e308, 1e-308, 1e299, 0], 1)
    ]
    (tmp_path / "r" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    shown = rendered(tmp_path / "r")
    assert "× not a number" in shown.text["text"]
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "metrics.jsonl").write_text('{"step": 1, "loss": "NaN"}\n')
    assert "NaN" in rendered(tmp_path / "n").all_text()


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    text = render_page(read_readable_runs([full(tmp_path / "a"), full(tmp_path / "b", rank=4)])[0])
    shown = Page(text)
    assert {element for element, _ in shown.elements}.isdisjoint(
        {"link", "img", "iframe", "object", "embed", "base", "form", "a"}
    )
    for _, attributes in shown.elements:
        assert {"src", "href", "srcset", "action", "data", "xlink:href"}.isdisjoint(attributes)
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
    policy = next(
        a["content"] or "" for e, a in shown.elements if e == "meta" and "http-equiv" in a
    )
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_stays_text(tmp_path: Path, hostile: str) -> None:
    """The same elements and attributes come out whatever the texts of a run are."""
    tame = rendered(
        full(tmp_path / "tame", text="TEXT"), full(tmp_path / "tame2", text="TEXT", rank=4)
    )
    wild = rendered(
        full(tmp_path / "wild", text=hostile), full(tmp_path / "wild2", text=hostile, rank=4)
    )
    assert [(e, list(a)) for e, a in wild.elements] == [(e, list(a)) for e, a in tame.elements]
    assert wild.text["script"] == tame.text["script"]
    assert wild.text["style"] == tame.text["style"]
    assert not any(name.startswith("on") for _, a in wild.elements for name in a)
    text = wild.all_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
    assert "hacked" in text or "hacked" not in hostile  # it is shown, as text


def test_a_hostile_directory_name(tmp_path: Path) -> None:
    shown = rendered(full(tmp_path / "<script>alert(1)<"))
    assert "<script>alert(1)<" in shown.text["h1"]


@given(st.text(), st.text())
def test_tag_gives_back_text_and_attribute(text: str, value: str) -> None:
    """What a parser reads out of an element is what went in, control and reversing characters
    apart.
    """
    parsed = Page(html_tag("p", text, title=value))
    assert "".join(parsed.text.get("p", [])) == make_visible(text)
    assert parsed.elements[0][1]["title"] == make_visible(value)


def test_markup_is_never_escaped_twice_or_not_at_all() -> None:
    assert html_tag("b", html_tag("i", "<&>")) == "<b><i>&lt;&amp;&gt;</i></b>"
    assert join_html(None, "a<b", SafeHtml("<hr>")) == "a&lt;b<hr>"
    assert (
        html_tag("rect", stroke_width=2, class_="x", title=None)
        == '<rect stroke-width="2" class="x"></rect>'
    )
    assert isinstance(escape_html("x"), SafeHtml)


def test_several_runs_compare_figures_and_only_what_differs(tmp_path: Path) -> None:
    shown = rendered(full(tmp_path / "one"), full(tmp_path / "two", rank=4, failed=True))
    assert "2 runs side by side" in shown.text["h1"]
    settings = (
        render_page(read_readable_runs([tmp_path / "one", tmp_path / "two"])[0])
        .split('id="differences"')[1]
        .split("</section>")[0]
    )
    assert ">lora.r<" in settings
    assert ">16<" in settings
    assert ">4<" in settings
    assert "lora_alpha" not in settings
    assert "output_dir" not in settings
    assert "two: 1 of 3 contracts failed" in shown.all_text()
    assert [h for h in shown.text["th"] if h.startswith("after")] == ["after: one", "after: two"]


def test_equal_settings_are_said_to_be_equal(tmp_path: Path) -> None:
    assert (
        "The settings of these runs are the same."
        in rendered(full(tmp_path / "a"), full(tmp_path / "b")).all_text()
    )


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = read_readable_runs([full(tmp_path / "x" / "run"), full(tmp_path / "y" / "run")])[0]
    assert [r.name for r in runs] == ["x/run", "y/run"]


def test_repeated_prompts_and_long_groups(tmp_path: Path) -> None:
    rows = [
        {
            "group": "g",
            "prompt": "same",
            "reference": None,
            "before": None,
            "after": f"answer {i}",
            "tokens": None,
        }
        for i in range(70)
    ]
    (tmp_path / "r").mkdir()
    dump(tmp_path / "r" / "samples.json", rows)
    shown = rendered(tmp_path / "r")
    assert [t for t in shown.text["td"] if t.startswith("answer")] == [
        f"answer {i}" for i in range(60)
    ]
    assert "g (the first 60 of 70)" in shown.text["h3"]


def test_metrics_of_data_sets_in_another_order_stay_together(tmp_path: Path) -> None:
    for name, order in (("a", ["s", "t"]), ("b", ["t", "s"])):
        (tmp_path / name).mkdir()
        dump(
            tmp_path / name / "evaluation.json",
            [{"name": n, "metrics": {f"{name}_m": {"after": 1}}} for n in order],
        )
    assert rendered(tmp_path / "a", tmp_path / "b").text["h3"] == ["s", "t"]


def test_runs_that_began_otherwise_have_a_before_each(tmp_path: Path) -> None:
    """Runs over two starts: what the first one's said is not what the second began from."""
    for name, value, text in (("a", 0.25, "Oslo"), ("b", 0.5, "Rome")):
        (tmp_path / name).mkdir()
        pair = {"before": value, "after": 0.75}
        dump(tmp_path / name / "evaluation.json", [{"name": "s", "metrics": {"m": pair}}])
        sample = {"group": "g", "prompt": "p", "reference": None, "before": text, "after": "x"}
        dump(tmp_path / name / "samples.json", [{**sample, "tokens": None}])
    cells = rendered(tmp_path / "a", tmp_path / "b").text["td"]
    assert "0.25 / 0.5" in cells
    assert "a: Oslo\nb: Rome" in cells
    alone = rendered(tmp_path / "b").text["td"]
    assert {"0.5", "Rome", "+0.25"} <= set(alone)
