"""What transformers said of a model's files before, kept by their content."""

import ast
import sys
from typing import Any


def transformers_is_imported() -> bool:
    """Whether this process has imported it: asking it costs little then."""
    return "transformers" in sys.modules


def parse_values(text: str) -> Any:
    """The values of a kept answer, in Python's own notation: JSON would make text of the numbers of
    labels, and lists of tuples. None where it cannot be read."""
    try:
        return ast.literal_eval(text)
    # SystemError: CPython 3.11 and 3.12 count how deep `ast` is for all threads at once, and one that
    # reads while another does may find a wrong count
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, SystemError):
        return None
