"""The pages of docs/ and the API reference as a site in build/site: `make docs`.

    python docs/site/build.py

Pages are staged in build/docs with links that fit a flat site: the README is its first page, and what
stands in the root of the repository (CONTRIBUTING.md ...) is a page like any other. The reference has
the public names of `lorry.__all__`, each read from where `lorry` looks it up, so that a module that
moves needs nothing here. Zensical builds with --strict: a link or an anchor that leads nowhere, and a
name that is not there, end the build. Then every page is searched for what a browser would fetch from
elsewhere, since the site has to work without a network. Exit code 1 with the findings.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import lorry

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build"  # where Zensical runs: it takes no folders outside its configuration's
SITE, STAGED = BUILD / "site", BUILD / "docs"
TOP = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE")
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
# attributes from which a browser fetches by itself; a link (a href) waits for a click
FETCHED = ("src", "srcset", "poster", "data", "background")
NO_FETCH = {"canonical", "next", "prev"}  # rel of <link>s that a browser does not follow by itself
ELSEWHERE = re.compile(r"(?:^|[\s,])((?:https?:)?//[^\s,]+)")
IN_STYLES = re.compile(r"""(?:url\(|@import )\s*(?:url\()?["']?((?:https?:)?//[^"')]+)""")


def stage(folder: Path) -> None:
    """Write the pages to ``folder``: links of the repository's tree become links of a flat site."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("site"))
    for page in sorted((ROOT / "docs").glob("*.md")):
        (folder / page.name).write_text(flat(page.read_text()))
    (folder / "index.md").write_text(flat((ROOT / "README.md").read_text()))
    for name in TOP:
        text = (ROOT / name).read_text()
        page = text if name.endswith(".md") else f"# {name.capitalize()}\n\n```text\n{text}```\n"
        (folder / f"{name.removesuffix('.md')}.md").write_text(flat(page))
    (folder / "api.md").write_text(reference())


def flat(text: str) -> str:
    """A page with `docs/x.md` and `../X.md` as `x.md` and `X.md`, and files without a suffix as pages."""

    def moved(link: re.Match[str]) -> str:
        target = link[2].removeprefix("../").removeprefix("docs/")
        return f"{link[1]}{f'{target}.md' if target in TOP and '.' not in target else target}{link[3]}"

    return LINK.sub(moved, text)


def reference() -> str:
    """The page of the public names, under the names by which people import them."""
    lines = [
        "# Reference",
        "",
        "Every name of `lorry.__all__`. Whatever is not here may change at any time ([versions](versions.md)).",
    ]
    for name in lorry.__all__:
        home = lorry._HOMES[name]
        title = f"lorry.{name}"
        options = [f"      {option}: {title}" for option in ("heading", "toc_label")]
        lines += ["", f"::: {home}.{name}", "    options:", *options]
    return "\n".join(lines) + "\n"


class Fetches(HTMLParser):
    """Collects what a browser would fetch from another host while it shows a page, scripts' own requests
    aside: the theme's make some for features that no page here uses (diagrams, a repository's stars)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        followed = tag == "link" and not set(given.get("rel", "").split()) & NO_FETCH
        addresses = [given[name] for name in (*FETCHED, *(["href"] if followed else [])) if name in given]
        found = [address for value in addresses for address in ELSEWHERE.findall(value)]
        found += IN_STYLES.findall(given.get("style", ""))
        self.found += [f"<{tag}> {address}" for address in found]
        self.in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.in_style = self.in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        if self.in_style:
            self.found += [f"<style> {address}" for address in IN_STYLES.findall(data)]


def fetched_from_elsewhere(site: Path) -> list[str]:
    """`page: <element> address` of all that pages and style sheets fetch from another host."""
    found = []
    for page in sorted(site.rglob("*.html")):
        parser = Fetches()
        parser.feed(page.read_text())
        found += [f"{page.relative_to(site)}: {one}" for one in parser.found]
    for sheet in sorted(site.rglob("*.css")):
        found += [f"{sheet.relative_to(site)}: {address}" for address in IN_STYLES.findall(sheet.read_text())]
    return found


def main() -> int:
    """Stage, build, search. The exit code."""
    stage(STAGED)
    shutil.copy(Path(__file__).parent / "zensical.toml", BUILD)
    command = [str(Path(sys.executable).parent / "zensical"), "build", "--clean", "--strict"]
    built = subprocess.run(command, cwd=BUILD, check=False)
    if built.returncode:
        return 1
    if found := fetched_from_elsewhere(SITE):
        print("the pages would fetch from elsewhere:", *found, sep="\n  ", file=sys.stderr)
        return 1
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE}, nothing of them from elsewhere")
    return 0


if __name__ == "__main__":
    sys.exit(main())
