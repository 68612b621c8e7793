"""What benchmarks import from the package is there: most of it is imported within functions, which no
other test calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every ``from lorry... import name``, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lorry":
            yield from ((str(node.module), alias.name) for alias in node.names)


@cache
def names_in(module: str) -> frozenset[str]:
    """What can be imported from a module of the package, by its source; nothing where there is none."""
    folder = ROOT / "src" / module.replace(".", "/")
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    found = {path.stem for path in folder.iterdir()} if folder.is_dir() else set[str]()
    for node in ast.walk(ast.parse(file.read_text())) if file.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return frozenset(found)


def missing(source: str) -> list[str]:
    return [f"{module}.{name}" for module, name in imported(source) if name not in names_in(module)]


def test_benchmarks_import_what_is_there() -> None:
    found = {path.name: missing(path.read_text()) for path in (ROOT / "benchmarks").glob("*.py")}
    assert len(found) > 20
    assert {name: gone for name, gone in found.items() if gone} == {}


def test_what_is_gone_is_seen() -> None:
    source = "def f():\n    from lorry.plan.machine import attention_kernel, has_matrix_tiles\n"
    assert missing(source) == ["lorry.plan.machine.has_matrix_tiles"]
    assert missing("from lorry.nowhere import load") == ["lorry.nowhere.load"]
