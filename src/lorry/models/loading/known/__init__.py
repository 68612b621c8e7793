"""What transformers said of a model's files before, kept by their content."""

import sys


def transformers_is_imported() -> bool:
    """Whether this process has imported it: asking it costs little then."""
    return "transformers" in sys.modules
