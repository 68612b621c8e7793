"""`lorry unlearn model=M forget=FILE retain=FILE`: train an adapter that makes M forget, as `lorry
sft` trains one.
"""

from __future__ import annotations

from lorry.verbs.sft import main

__all__ = ["main"]
