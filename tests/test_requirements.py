"""The files that say what is installed agree: pyproject.toml, constraints.txt, requirements-lock.txt."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TORCH_OWN = ("torch",)  # its build hangs on the machine, so it has no hashes (Makefile)


def pinned(text: str) -> dict[str, str]:
    """Canonical name to exact version, of every ``name==version`` that opens a line."""
    pins = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


@pytest.fixture(scope="module")
def constraints() -> dict[str, str]:
    """Name to version of constraints.txt."""
    return pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lock_text() -> str:
    """The text of requirements-lock.txt."""
    return (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wanted() -> list[Requirement]:
    """What pyproject.toml asks for, with the extras that `make setup` installs, without lorry[peft] itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["dev"], *extras["peft"]]
    asked = [Requirement(line) for line in lines]
    return [requirement for requirement in asked if requirement.name != project["name"]]


def test_the_lock_has_the_versions_of_the_constraints(
    constraints: dict[str, str], lock_text: str
) -> None:
    locked = pinned(lock_text)
    differing = {name for name, version in locked.items() if constraints.get(name) != version}
    assert differing == set()


def test_what_is_asked_for_is_locked_within_its_range(
    constraints: dict[str, str], lock_text: str, wanted: list[Requirement]
) -> None:
    locked = pinned(lock_text)
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        version = constraints["torch"] if name in TORCH_OWN else locked[name]
        assert requirement.specifier.contains(version), f"{requirement} and {version}"


def test_every_locked_version_has_a_hash(lock_text: str) -> None:
    entries = re.split(r"^(?=\S+==)", lock_text, flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    hashed = re.compile(r"--hash=sha256:[0-9a-f]{64}\b")
    assert [entry.split()[0] for entry in entries if not hashed.search(entry)] == []
