"""`lorry distill teacher=MODEL data=FILE`: train a student as `lorry sft` trains, on the teacher's
distributions as well.
"""

from __future__ import annotations

from lorry.verbs.sft import main

__all__ = ["main"]
