"""The site of `make docs`: pages staged with links that lead somewhere, in the menu, nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import lorry

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site_build", ROOT / "docs" / "site" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def staged(site: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "docs"
    site.stage(folder)
    return folder


def test_links_of_staged_pages_lead_to_staged_files(staged: Path) -> None:
    lost = [
        f"{page.name}: {link}"
        for page in sorted(staged.glob("*.md"))
        for link in re.findall(r"\]\(([^)\s:#]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
        if link != "https" and not (staged / link).exists()
    ]
    assert lost == []


def test_every_page_is_in_the_menu_once(staged: Path) -> None:
    def pages(entries: list[object]) -> list[str]:
        return [
            page
            for entry in entries
            for page in ([entry] if isinstance(entry, str) else pages(next(iter(entry.values()))))  # type: ignore[attr-defined]
        ]

    menu = tomllib.loads((ROOT / "docs" / "site" / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(pages(menu)) == sorted(page.name for page in staged.glob("*.md"))


def test_the_reference_has_every_public_name(site: ModuleType) -> None:
    named = re.findall(r"heading: lorry\.(\w+)", site.reference())
    assert sorted(named) == sorted(lorry.__all__)


@pytest.mark.parametrize(
    ("page", "fetches"),
    [
        ('<script src="https://cdn.example/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/f.css">', True),
        ('<link rel="preconnect" href="https://fonts.example">', True),
        ('<img src="http://host.example/pixel.png">', True),
        ('<img srcset="https://host.example/2x.png 2x" src="a.png">', True),
        ('<video poster="https://host.example/p.png"></video>', True),
        ('<style>@import "https://host.example/x.css";</style>', True),
        ('<p style="background:url(https://host.example/x.png)">text</p>', True),
        ('<a href="https://host.example">a link waits for a click</a>', False),
        ('<link rel="canonical" href="https://host.example/page">', False),
        ('<img src="results/plan.png"><script src="assets/x.js"></script>', False),
    ],
)  # fmt: skip
def test_what_a_page_fetches_from_elsewhere_is_found(site: ModuleType, tmp_path: Path, page: str, fetches: bool) -> None:
    (tmp_path / "page.html").write_text(page)
    assert bool(site.fetched_from_elsewhere(tmp_path)) is fetches


def test_a_style_sheet_that_fetches_is_found(site: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x.css").write_text("@import url('https://fonts.example/f.css'); a { background: url(./x.svg) }")
    assert site.fetched_from_elsewhere(tmp_path) == ["x.css: https://fonts.example/f.css"]
