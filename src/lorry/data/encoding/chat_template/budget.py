"""The account of one rendering of a chat template: work, bytes and characters that it may still
spend, and a clock.

    budget.open(size=characters_of_the_messages)
    budget.work(3)          # three steps, see below
    budget.charge(value)    # a value was built: its bytes count until the rendering ends
    budget.compare(value)   # before it is compared, searched or hashed

A **step** is about ten microseconds of this process or less: one round of a loop, one call, 64
characters for a function that looks at each of them, 4 KiB that are only copied or compared, eight
elements of a list. The limit in steps decides, since it is the same on every machine and under
every load; the clock (of this thread's own processor time) is the last resort, for an operation
that costs more than is known here. No single operation is long: texts and lists are bounded by
``room``, integers by ``LARGEST_BITS``, and what costs a product of two sizes pays for the product
first.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from jinja2.sandbox import SecurityError

MOST_STEPS = 200_000  # of a rendering, and one more for every two characters given
# steps: Gemma 4's own template goes through all messages at each message
MOST_FOR_TURNS = 2_000_000
MOST_CHARACTERS = (
    1 << 20
    # characters a rendering may write, and the size of any value, beyond a multiple of what it was
    # given
)
# bytes of all values made in one rendering, beyond 256 for every character given
MOST_MEMORY_BYTES = 1 << 27
LARGEST_BITS = 8192  # of an integer; a template counts messages
# seconds of processor time; the steps of the longest real conversations take less than one
MOST_SECONDS = 30.0
READ_PER_STEP, COPIED_PER_STEP, ITEMS_PER_STEP = 64, 4096, 8  # characters, bytes, elements
WEIGHED_PER_STEP = 4  # values that are looked at one by one
CONTAINER_TYPES = (dict, list, tuple, set, frozenset)
BYTES_PER_ITEM = 56  # an element made anew, beside its place in the list


class RenderBudgetError(SecurityError):
    """The template wants more work, bytes or characters than a chat template can need."""


class RenderBudget:
    """What one rendering has spent. Every method raises OverBudget when it is too much."""

    def __init__(self) -> None:
        self.open(0)

    def open(self, size: int, turns: int = 0) -> None:
        """Start anew for a rendering of so many messages, which hold ``size`` characters."""
        self.steps, self.patience = (
            0,
            MOST_STEPS + size // 2 + min(4 * turns * turns, MOST_FOR_TURNS),
        )
        self.bytes, self.memory = 0, MOST_MEMORY_BYTES + 256 * size
        self.characters, self.room = 0, MOST_CHARACTERS + 4 * size
        self.deadline, self._next_look = time.thread_time() + MOST_SECONDS, 0

    def work(self, steps: int = 1) -> None:
        """Pay for that many steps, at least one."""
        self.steps += max(1, steps)
        if self.steps > self.patience:
            raise RenderBudgetError(f"it takes more than {self.patience} steps")
        if self.steps >= self._next_look:
            self._next_look = self.steps + 1000
            if time.thread_time() > self.deadline:
                raise RenderBudgetError(f"it takes more than {MOST_SECONDS:.0f} seconds")

    def read(self, value: Any) -> None:
        """Pay for going through a value once: each character of a text, each element of a list."""
        if isinstance(value, str):
            self.work(len(value) // READ_PER_STEP)
        else:
            self.work(len(value) // ITEMS_PER_STEP if hasattr(value, "__len__") else 1)

    def charge(self, value: Any, *, anew: bool = False) -> Any:
        """Count the bytes of a value that an operation has built; ``anew``: its elements as well.
        Gives the value back.
        """
        if type(value) is int:
            self.afford_bits(value.bit_length())
        elif isinstance(value, str | list | tuple | dict):
            self.hold(
                sys.getsizeof(value)
                + (BYTES_PER_ITEM * len(value) if anew and not isinstance(value, str) else 0)
            )
        elif isinstance(value, bytes | bytearray):
            raise RenderBudgetError("it works with bytes, which no chat template needs")
        return value

    def hold(self, size: int) -> None:
        """Count bytes that were written; they count until the rendering ends, whether or not
        something still holds them.
        """
        self.bytes += size
        if self.bytes > self.memory:
            raise RenderBudgetError(f"its values take more than {self.memory} bytes")
        if size > COPIED_PER_STEP:
            self.work(size // COPIED_PER_STEP)

    def afford(self, characters: int) -> None:
        """Refuse a text or list of that size before it is built."""
        if characters > self.room:
            raise RenderBudgetError(
                f"it builds a value of {characters} characters; {self.room} are allowed"
            )

    def afford_bits(self, bits: int) -> None:
        """Refuse an integer before, or where, it is made."""
        if bits > LARGEST_BITS:
            raise RenderBudgetError(
                f"it builds an integer of {bits} bits; {LARGEST_BITS} are allowed"
            )

    def write(self, characters: int) -> None:
        """Count characters of the output."""
        self.characters += characters
        self.afford(self.characters)

    def weigh(self, value: Any) -> int:
        """Characters that printing a value takes, counted without printing it and never past the
        room; pays for the counting.

        What is shared counts wherever it stands: ``[x, x]`` sixty times over is 2^60 to whoever
        prints, compares or hashes it.
        """
        if not isinstance(value, CONTAINER_TYPES):
            return len(value) if isinstance(value, str) else 1
        total, items, waiting = 0, 0, [value]
        while waiting:
            item = waiting.pop()
            items += 1
            if isinstance(item, str):
                total += len(item)
                continue
            total += 1
            if isinstance(item, list | tuple | set | frozenset):
                waiting += item
            elif isinstance(item, dict):
                waiting += item.keys()
                waiting += item.values()
            if total + len(waiting) > self.room:
                self.afford(total + len(waiting))
            if items % 1024 == 0:
                self.work(1024 // WEIGHED_PER_STEP)
        self.afford(total)
        self.work(items % 1024 // WEIGHED_PER_STEP)
        return total

    def compare(self, value: Any) -> Any:
        """Pay before a value is compared, searched or hashed. Gives the value back."""
        if isinstance(value, str):
            if len(value) > READ_PER_STEP:
                self.work(len(value) // COPIED_PER_STEP)
        elif isinstance(value, CONTAINER_TYPES):
            self.work(self.weigh(value) // COPIED_PER_STEP)
        return value
