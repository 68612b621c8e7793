"""Imports go one way through the rooms, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "lorry"

# A room may import rooms on its own line and on lines above it.
ORDER = [
    {"errors", "formatting", "visible"},
    {"disk"},
    {"streams", "console"},
    {"config", "families", "kernels"},
    {"runs", "plan"},
    {"adapters"},
    {"data"},
    {"models"},
    {"generate"},
    {"backends"},
    {"tasks", "evaluate"},
    {"train"},
    {"report"},
    {"hub"},
    {"demo", "api"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
NO_TORCH = ("errors", "formatting", "config", "families", "runs", "plan", "report", "cli")
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "peft", "numpy", "scipy", "pyarrow"}


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_way(path: Path, tree: ast.AST) -> list[str]:
    room = room_of(path)
    targets = {name.split(".")[1] for name in imports(tree) if name.startswith("lorry.") and name.split(".")[1] in LEVEL}
    return [f"{room} imports {other}" for other in targets if LEVEL[other] > LEVEL[room]]


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if room_of(p) in LEVEL]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    assert wrong_way(path, ast.parse(path.read_text())) == []


def test_every_room_is_in_the_order() -> None:
    rooms = {room_of(p) for p in SOURCE.rglob("*.py") if p.name != "__init__.py" or p.parent != SOURCE}
    assert rooms <= set(LEVEL)


def test_the_check_can_fail() -> None:
    assert wrong_way(SOURCE / "adapters" / "x.py", ast.parse("from lorry.train.engine import Engine")) == [
        "adapters imports train"
    ]


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in NO_TORCH], ids=lambda p: str(p.relative_to(SOURCE)))
def test_light_rooms_import_nothing_heavy_at_the_top(path: Path) -> None:
    top = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    found = {name.split(".")[0] for node in top for name in imports(node)}
    assert not found & HEAVY
