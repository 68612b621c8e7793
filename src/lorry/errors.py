"""The errors Lorry raises for people: what was wrong, where, and what to do.

Every one is a ``LorryError``; the command line prints it without a traceback and exits with its ``exit_code``.
Mistakes of ours (a broken invariant) stay ``AssertionError`` and do show a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorryError(Exception):
    """Base of all errors meant for the user."""

    exit_code = 1


class ConfigError(LorryError, ValueError):
    """The run description is wrong: an unknown key, a bad value, two settings that exclude each other."""

    exit_code = 2


class DataError(LorryError, ValueError):
    """A data file or row is unusable; the message opens with ``file:line``."""

    exit_code = 3


class ModelError(LorryError, ValueError):
    """A model or adapter cannot be loaded, or is not the one that was asked for."""

    exit_code = 4


class ContractError(LorryError, RuntimeError):
    """A run broke one of its contracts (DESIGN section 7): it would have been silently wrong, so it stopped."""

    exit_code = 5


class NonFiniteError(ContractError):
    """A NaN or an infinity appeared in the loss or a gradient; nothing was updated."""

    exit_code = 6


class Interrupted(LorryError):
    """SIGTERM or SIGINT arrived; a checkpoint of the last finished step is on disk."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: run it again and it goes on


def nearest(word: str, known: Iterable[str]) -> str:
    """A ``; did you mean 'x'?`` tail for an unknown name, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
