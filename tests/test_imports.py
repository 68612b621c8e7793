"""Imports go one way through the rooms, and nothing heavy is imported before it is needed.

Every source file is parsed once (`read_source`): parsing all of them takes seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "lorry"

# A room may import rooms on its own line and on lines above it.
ORDER = [
    {"errors", "formatting", "imports", "notes", "processor", "ranks", "visible"},
    {"disk"},
    {"streams", "console"},
    {"config", "families", "kernels"},
    {"runs", "plan"},
    {"adapters"},
    {"data"},
    {"models"},
    {"generation"},
    {"backends"},
    {"tasks", "evaluate"},
    {"train"},
    {"report"},
    {"hub", "integrations"},
    {"demo", "api"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
NO_TORCH = (
    "errors",
    "formatting",
    "imports",
    "notes",
    "processor",
    "ranks",
    "visible",
    "disk",
    "streams",
    "console",
    "config",
    "families",
    "runs",
    "plan",
    "report",
    "cli",
)
MOST = 13  # modules in one folder; `verbs` has one for each command
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


def wrong_way(path: Path, imported: Set[str]) -> list[str]:
    room = room_of(path)
    targets = {
        name.split(".")[1]
        for name in imported
        if name.startswith("lorry.") and name.split(".")[1] in LEVEL
    }
    return [f"{room} imports {other}" for other in targets if LEVEL[other] > LEVEL[room]]


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if room_of(p) in LEVEL]


@dataclass(frozen=True)
class SourceFile:
    """What a file imports, anywhere and at once, what it names, and the classes it asks about with
    isinstance.
    """

    imported: frozenset[str]
    at_once: frozenset[str]
    names: frozenset[str]
    classes_asked: frozenset[str]


@cache
def read_source(path: Path) -> SourceFile:
    tree = ast.parse(path.read_text())
    calls = [
        node.args[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
    ]
    return SourceFile(
        frozenset(imports(tree)),
        frozenset(imported_at_once(tree.body)),
        frozenset(names_in(tree)),
        frozenset(name for call in calls for name in names_in(call)),
    )


def names_in(tree: ast.AST) -> Iterator[str]:
    return (node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def test_imports_go_one_way() -> None:
    wrong = {path: wrong_way(path, read_source(path).imported) for path in FILES}
    assert {str(path.relative_to(SOURCE)): found for path, found in wrong.items() if found} == {}


def test_every_room_is_in_the_order() -> None:
    rooms = {
        room_of(p) for p in SOURCE.rglob("*.py") if p.name != "__init__.py" or p.parent != SOURCE
    }
    assert rooms <= set(LEVEL)


def test_no_room_takes_the_name_of_a_function_that_people_call() -> None:
    """`lorry.generate` would be the package as soon as something in it is imported."""
    import lorry

    assert {room_of(p) for p in SOURCE.rglob("*.py")} & set(lorry.__all__) == set()


def test_the_check_can_fail() -> None:
    tree = ast.parse("from lorry.train.engine import TrainingEngine")
    assert wrong_way(SOURCE / "adapters" / "x.py", set(imports(tree))) == ["adapters imports train"]


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_at_once(body: list[ast.stmt]) -> Iterator[str]:
    """What importing a module imports, directly: not what its functions do later, nor what only a
    type checker reads.
    """
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imports(node)
            if isinstance(node, ast.ImportFrom) and node.module:
                yield node.module
        elif isinstance(node, ast.Try) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test)
        ):
            yield from imported_at_once(node.body)


@cache
def imported_at_once_by_module() -> dict[str, frozenset[str]]:
    return {name_of(path): read_source(path).at_once for path in SOURCE.rglob("*.py")}


def imported_by_running(tree: ast.AST) -> Iterator[str]:
    """What a module imports, at once or within a function: not what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imports(node)
        else:
            yield from imported_by_running(node)


def cycle_of(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in turn, of {dotted name: source}; empty where none do."""
    graph = dict[str, set[str]]()
    for module, source in sources.items():
        names = set(imported_by_running(ast.parse(source)))
        # a name from a module is an import of the module, unless it is a module itself
        found = {name if name in sources else name.rpartition(".")[0] for name in names}
        graph[module] = (found & sources.keys()) - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    assert cycle_of({name_of(path): path.read_text() for path in SOURCE.rglob("*.py")}) == []


def test_a_cycle_is_seen_wherever_the_import_stands() -> None:
    sources = {"a": "from b import f", "b": "def f():\n    from a.c import g", "a.c": "import a"}
    assert set(cycle_of(sources)) == set(sources)
    sources["b"] = "if TYPE_CHECKING:\n    from a.c import g"
    assert cycle_of(sources) == []


def way_to_heavy(
    module: str, modules: Mapping[str, Set[str]], seen: set[str], heavy: Set[str] = HEAVY
) -> list[str]:
    """The chain of imports from a module to something heavy, or to what lies in it; empty where
    there is none.
    """
    seen.add(module)
    for name in sorted(modules[module]):
        if any(f"{name}.".startswith(f"{one}.") for one in heavy):
            return [module, name]
        for found in (
            part for part in (name, name.rpartition(".")[0]) if part in modules and part not in seen
        ):
            if way := way_to_heavy(found, modules, seen, heavy):
                return [module, *way]
    return []


def test_light_rooms_load_nothing_heavy_however_indirectly() -> None:
    modules = imported_at_once_by_module()
    light = [name_of(path) for path in FILES if room_of(path) in NO_TORCH]
    assert len(light) > 50
    assert [way for name in light if (way := way_to_heavy(name, modules, set()))] == []


def test_a_run_waits_only_for_what_it_needs() -> None:
    """Each of these takes a tenth of a second or more, and most runs do without it."""
    unneeded = HEAVY - {"torch", "numpy"} | {
        "gguf",
        "huggingface_hub",
        "torch.distributed.tensor",
        "accelerate",
        "sympy",
    }
    modules = imported_at_once_by_module()
    assert way_to_heavy("lorry.train.session", modules, set(), unneeded) == []
    # it sees such an import where there is one
    assert way_to_heavy("lorry.models.hf.anatomy", modules, set(), unneeded) == [
        "lorry.models.hf.anatomy",
        "transformers.modeling_outputs",
    ]


def test_the_check_sees_through_other_modules() -> None:
    modules = {"lorry.a": {"lorry.b.f"}, "lorry.b": {"torch.nn"}}
    assert way_to_heavy("lorry.a", modules, set()) == ["lorry.a", "lorry.b", "torch.nn"]


def test_no_room_is_crowded() -> None:
    folders = {path.parent for path in FILES} - {SOURCE, SOURCE / "verbs"}
    crowded = {
        str(f.relative_to(SOURCE)): n
        for f in folders
        if (n := len([p for p in f.glob("*.py") if p.stem != "__init__"])) > MOST
    }
    assert crowded == {}


TESTS = Path(__file__).resolve().parent
SUPPORT = {p.stem for p in (TESTS / "support").glob("*.py")} - {"__init__"}


def test_helpers_of_tests_lie_in_support_and_are_imported_by_their_whole_name() -> None:
    """Not next to the first test that used them, found because its folder happened to be on the
    path; `tests/fuzz` is a program of its own, and the double of slime stands for one.
    """
    programs = (TESTS / "fuzz", TESTS / "support" / "slime_double")
    modules = [p for p in TESTS.rglob("*.py") if not any(p.is_relative_to(d) for d in programs)]
    elsewhere = {
        str(p.relative_to(TESTS))
        for p in modules
        if p.parent != TESTS / "support"
        and not p.stem.startswith("test_")
        and p.stem not in ("conftest", "__init__")
    }
    assert elsewhere == set()
    by_short_name = [
        f"{p.relative_to(TESTS)}: say tests.support.{name.split('.')[0]}"
        for p in modules
        for name in imports(ast.parse(p.read_text()))
        if name.split(".")[0] in {*SUPPORT, "conftest"}
    ]
    assert by_short_name == []


SEAMS = {  # what one room alone may name, so that what is to come needs no change elsewhere
    "backends": {"LocalBackend"},
    "adapters": {"BaseWeights", "get_base_weights"},
}


@pytest.mark.parametrize(("room", "names"), SEAMS.items())
def test_what_stands_behind_a_protocol_is_named_in_its_own_room_only(
    room: str, names: set[str]
) -> None:
    found = [
        f"{path.relative_to(SOURCE)}: {name}"
        for path in FILES
        if room_of(path) != room
        for name in sorted(names & read_source(path).names)
    ]
    assert not found


def test_no_room_asks_which_kind_of_parameter_set_trains() -> None:
    kinds = {"Adapter", "BaseWeights", "ParameterSet"}
    found = [
        str(path.relative_to(SOURCE))
        for path in FILES
        if room_of(path) != "adapters" and kinds & read_source(path).classes_asked
    ]
    assert not found
