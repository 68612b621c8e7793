"""README and docs tell the truth: files they name exist, commands they show parse, rooms they list
are the rooms there are.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from lorry import config
from lorry.cli import VERBS
from lorry.config import DistillRunConfig, MoeRunConfig, RunConfig, build_settings, parse_settings

ROOT = Path(__file__).resolve().parent.parent
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
SCHEMAS = {verb.name: getattr(config, verb.schema) for verb in VERBS}


def commands(text: str) -> list[list[str]]:
    """`lorry VERB ...` lines of the code blocks, without a leading path."""
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, flags=re.S)
    lines = [
        line.split("#")[0].strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line)[1:] for line in lines if re.match(r"(\.venv/bin/)?lorry \w", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"`((?:src|docs|tests|examples|benchmarks)/[\w./-]+)`", text)
    named += [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not link.startswith("http")]
    missing = [
        name for name in named if not any((base / name).exists() for base in (ROOT, page.parent))
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_that_are_shown_parse(page: Path) -> None:
    for verb, *words in commands(page.read_text()):
        assert verb in SCHEMAS, f"{page.name} shows the verb {verb}"
        if "--help" not in words:
            parse_settings(SCHEMAS[verb], words, print)


def test_lines_of_the_readme_fit_a_terminal() -> None:
    assert [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) > 100] == []


def test_the_reading_order_has_every_page() -> None:
    order = ROOT / "docs" / "reading-order.md"
    links = set(re.findall(r"\]\(([\w./-]+\.md)\)", order.read_text()))
    there = {page.name for page in (ROOT / "docs").glob("*.md")} - {order.name}
    assert there - links == set()


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]
    released = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert not released or released[0] == project["version"]


def test_templates_and_hooks_are_whole() -> None:
    """Forms that the forge would refuse are found here: every field but plain text has an id of its
    own and a label.
    """
    for form in ("bug.yml", "feature.yml"):
        document = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / form).read_text())
        fields = [field for field in document["body"] if field["type"] != "markdown"]
        assert document["name"]
        assert document["description"]
        assert len({field["id"] for field in fields}) == len(fields)
        assert all(field["attributes"]["label"] for field in fields)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = re.search(r"^lint: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)
    assert lint is not None
    ran = [line.strip().removeprefix("$(BIN)/").removesuffix(" .") for line in lint[1].splitlines()]
    assert [
        hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in hooks
    ] == ran


def test_readme_opens_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert 0 < text.index("make demo") < 2500
    assert 0 < text.index("make test") < 2500
    assert len(commands(text)) >= 5


def test_the_table_of_the_environment_has_every_variable_there_is() -> None:
    files = [path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py")]
    read = {
        name for path in files for name in re.findall(r"\bLORRY_[A-Z_]*[A-Z]\b", path.read_text())
    }
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "running.md").read_text(), flags=re.M)
    assert sorted(table) == sorted(read)


def test_what_is_said_of_the_plan_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """README, docs/plan.md and the JSON of benchmarks/plan.py, which has configurations that were
    never run.
    """
    named = re.search(r"benchmarks/results/plan-[\w-]+\.json", (ROOT / "docs/plan.md").read_text())
    assert named is not None
    records = json.loads((ROOT / named[0]).read_text())["records"]
    errors = sorted(abs(record["predicted"] / record["measured"] - 1) for record in records)
    worst, near = f"{errors[-1]:.1%}", 0.042
    within = f"{sum(error <= near for error in errors)} of them within {near:.1%}"
    for page in ("README.md", "docs/plan.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert f"{len(records)} configurations" in text, page
        assert f"within {worst}" in text, page
        assert within in text, page
    # scripts beside each other, which import one another by name
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location(
        "benchmarks_plan", ROOT / "benchmarks" / "plan.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    ran = {record["case"] for record in records}
    never = re.findall(r"`([^`]+)`", text.partition("have never been run: ")[2].partition(". ")[0])
    assert sorted(never) == sorted(case.name for case in module.CASES if case.name not in ran)


def test_architecture_lists_the_rooms_there_are() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {
        p.name
        for p in (ROOT / "src" / "lorry").iterdir()
        if p.is_dir() and (p / "__init__.py").exists()
    }
    assert {r for r in rooms if f"`{r}/`" not in text} == set()


def test_examples_are_valid_run_descriptions() -> None:
    special = {"distill": DistillRunConfig, "experts": MoeRunConfig, "rmoe": MoeRunConfig}
    for path in sorted((ROOT / "examples").glob("*.[yj]*")):
        schema = special.get(path.stem, RunConfig)
        run = parse_settings(schema, [str(path)], print)
        assert build_settings(schema, run.model_dump(), print) == run


def test_the_page_of_named_sets_is_the_catalogue() -> None:
    from lorry.data.catalog.__main__ import render_sets_table

    assert (ROOT / "docs" / "sets.md").read_text().endswith(render_sets_table())


def test_the_words_of_the_glossary_are_names_of_the_package() -> None:
    """Each class and function of its first column is defined where it says; a name stands for one thing."""
    source = ROOT / "src" / "lorry"
    defined: dict[str, list[str]] = {}
    for path in source.rglob("*.py"):
        module = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                defined.setdefault(node.name, []).append(module)
    rows = [line.split("|") for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()]
    firsts = [row[1] for row in rows if len(row) == 5]
    assert len(firsts) > 30
    for first in firsts:
        rooms = re.findall(r"\(`([\w.]+)`\)", first)
        for name in re.findall(r"`([A-Z]\w+)`", first):
            assert len(defined.get(name, [])) == 1, f"{name}: {defined.get(name)}"
            assert rooms, first
            assert any(f"{defined[name][0]}.".startswith(f"{room}.") for room in rooms), name
