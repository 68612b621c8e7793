"""Every name of a run directory stands in one place."""

from __future__ import annotations

import ast
from pathlib import Path

from lorry.config import jobs
from lorry.runs import layout

SOURCE = Path(layout.__file__).resolve().parents[1]
BELOW = ("config", "disk")  # rooms that cannot import it
NAMES = {
    value
    for name, value in vars(layout).items()
    if name.isupper()
    and isinstance(value, str)
    # words that mean other things elsewhere: a router is also a setting, and what trains; merged is
    # what merging calls its adapter
    and value
    not in (layout.CHECKPOINTS, layout.PREVIOUS, layout.ROUTER, layout.EXPERTS, layout.MERGED)
}


def test_no_other_module_spells_a_name_of_a_run_directory() -> None:
    spelt = [
        f"{path.relative_to(SOURCE)}:{node.lineno}: {node.value}"
        for path in SOURCE.rglob("*.py")
        if path.name != "layout.py" and path.relative_to(SOURCE).parts[0] not in BELOW
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]
    assert spelt == []


def test_no_job_can_be_called_like_a_folder_of_the_run() -> None:
    assert jobs.RESERVED_NAMES == layout.NOT_ADAPTERS
