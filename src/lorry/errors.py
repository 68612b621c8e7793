"""The errors Lorry raises for people: what was wrong, where, and what to do.

Every one is a ``LorryError``; the command line prints it without a traceback, names the page that
explains errors of its kind, where there is one (``docs``, of the repository's docs/), and exits
with its ``exit_code``. Mistakes of ours (a broken invariant) stay ``AssertionError`` and do show a
traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import reprlib
from collections.abc import Iterable, Iterator


class LorryError(Exception):
    """Base of all errors meant for the user."""

    exit_code = 1
    # the page of docs/ that explains errors of this kind, with its section; tests/test_errors.py
    # finds it there
    docs = ""
    # of a run on several processes: every one of them has this error, and rank 0 tells of it
    shared = False


class ConfigError(LorryError, ValueError):
    """The run description is wrong: an unknown key, a bad value, two settings that exclude each
    other.
    """

    exit_code = 2


class DataError(LorryError, ValueError):
    """A data file or row is unusable; the message opens with ``file:line``."""

    exit_code = 3
    docs = "data.md"


class RunFilesError(DataError):
    """A run directory is missing, is none, or holds a damaged file."""

    docs = "running.md#what-a-run-leaves"


class ModelError(LorryError, ValueError):
    """A model or adapter cannot be loaded, or is not the one that was asked for."""

    exit_code = 4


class ContractError(LorryError, RuntimeError):
    """A run broke one of its contracts (docs/architecture.md): it would have been silently wrong, so it
    stopped.
    """

    exit_code = 5
    docs = "architecture.md#the-contracts"
    # which, where it is one of the numbered ones
    contract: int | None = None


class NonFiniteError(ContractError):
    """A NaN or an infinity appeared in the loss or a gradient; nothing was updated."""

    exit_code = 6


class RunInterruptedError(LorryError):
    """SIGTERM or SIGINT arrived; a checkpoint of the last finished step is on disk."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: run it again and it goes on


class OutOfMemoryError(LorryError, MemoryError):
    """The memory of this machine or device does not hold what was asked for."""

    exit_code = 71  # EX_OSERR of sysexits.h: the system could not give what a process needs
    docs = "plan.md"


# What allocators say: torch on a CPU and on CUDA, a tensor whose size has no number, a mapped file,
# C++
_TRIED_BYTES = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_TRIED = re.compile(r"out of memory.{0,80}?[Tt]ried to allocate ([\d.]+ [KMGT]i?B)", re.DOTALL)
_TOO_LARGE = re.compile(
    r"Storage size calculation overflowed|out of memory|[Cc]annot allocate memory|bad_alloc|array is too big"
)


def allocation_failure(error: BaseException) -> str | None:
    """What could not be allocated, in words; None for an error of another kind. torch's are
    RuntimeErrors with a text.
    """
    text = str(error)
    if match := _TRIED_BYTES.search(text):
        return f"{int(match[1]) / 2**30:.2f} GiB in one piece"
    if match := _TRIED.search(text):
        return f"{match[1]} in one piece"
    if isinstance(error, MemoryError):
        return text.splitlines()[0][:200] if text else "what the next step needs"
    if isinstance(error, OSError):
        return "what the next step needs" if error.errno == errno.ENOMEM else None
    if isinstance(error, RuntimeError) and (large := _TOO_LARGE.search(text)):
        return f"what the next step needs ({large[0]})"
    return None


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn what allocators raise while the block runs into an OutOfMemoryError that ends in
    ``advice``.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, LorryError) or (large := allocation_failure(error)) is None:
            raise
        raise OutOfMemoryError(f"out of memory: could not allocate {large}. {advice}") from error


def describe_value(value: object) -> str:
    """A value of a wrong type for a message: its type, and itself where that is short and says more."""
    if value is None:
        return "None"
    kind = type(value).__name__
    plain = isinstance(value, str | int | float | list | tuple | dict | os.PathLike)
    return f"a {kind} ({reprlib.repr(value):.80})" if plain else f"a {kind}"


def require_path(path: object, name: str, remedy: str = "") -> None:
    """Raises ConfigError for what is no path; ``name``: of the argument, ``remedy``: what to do."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"{name} is {describe_value(path)}; give a path{remedy}")


def suggest_nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for behind an unknown name, or an empty string when nothing is
    close. In brackets, so that whatever punctuation the sentence goes on with stands alone."""
    # 0.6 is difflib's own: two slips in a name of six letters
    by_lower = {name.lower(): name for name in known}  # `npoo` is as near to `NPO` as `NPOO` is
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def shortlist_names(names: Iterable[str], most: int = 12, longest: int = 80) -> str:
    """Names for a message: the first dozen, and how many more there are; a very long name loses its
    end.
    """
    listed = list(names)
    shown = [name if len(name) <= longest else f"{name[:longest]}..." for name in listed[:most]]
    return ", ".join(shown) + (f" and {len(listed) - most} more" if len(listed) > most else "")
