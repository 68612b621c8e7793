"""Passes that all ranks walk: a model whose weights are cut over ranks runs on none of them alone, and
a tensor that is cut over them is made whole by none alone.

Ranks have as many passes to make as their rows need: micro-batches, prompts of a router, tokens of
answers. Before each they say which they are at, and the earliest kind is next: ranks that have
another one, or none any more, walk along. Where they may differ stands `together`, which a rank
leaves when all have made theirs:

    with schedule.together():
        for batch in own:
            model.hidden(...)          # asks `begin` by itself

A rank that fails says so where it would have asked, and the others raise (`Communicator.exchange`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol
from weakref import WeakValueDictionary

# a pass through a model's layers, or the gathering of one tensor
PassKind = Literal["forward", "backward", "gather"]
# forward first: who has a graph keeps it while others make theirs, and nobody waits for ever
KINDS: tuple[PassKind, ...] = ("forward", "backward", "gather")
WHAT = "a pass through sharded weights"


class Walker(Protocol):
    """A model's weights (`backends.distributed.sharded.ShardedWeights`), or tensors that are gathered
    one by one (`backends.distributed.shares.GatheredTensors`)."""

    def walk_along(self, kind: PassKind, number: int) -> None:
        """Take part in a pass of other ranks; ``number``: of the tensor that is gathered."""

    def finish_pass(self) -> None:
        """Walk the pass that is being walked, if any, to its end."""

    def release(self) -> None:
        """Let go of what passes have gathered."""


class PassSchedule:
    """Over ``exchange`` (`Communicator.exchange`). Walkers join in the same order on every rank."""

    def __init__(self, exchange: Callable[[str, Any], list[Any]]) -> None:
        self.exchange = exchange
        # by the number that each has on every rank; no longer than they are in use
        self.walkers: WeakValueDictionary[int, Walker] = WeakValueDictionary()
        self._joined = 0
        self._inside = 0  # blocks of `together`
        self._announce: Callable[[], None] | None = None

    def join(self, walker: Walker) -> int:
        """Let a walker's passes be agreed on; the number it has in `begin`."""
        self._joined += 1
        self.walkers[self._joined] = walker
        return self._joined

    def begin(self, walker: int, kind: PassKind, number: int = 0) -> None:
        """Return when every rank walks this pass. Raises what `exchange` raises."""
        mine = [KINDS.index(kind), walker, number]
        while (chosen := self._chosen(mine)) != mine:
            self._along(chosen)

    @contextmanager
    def together(self) -> Iterator[None]:
        """While the block runs, ranks make as many passes each as they like; behind it nobody holds
        more than its share."""
        # of blocks inside each other the outermost waits: the inner ones need not be the same
        self._inside += 1
        try:
            yield
            if self._inside == 1:
                self.walk_to_the_end()
        finally:
            self._inside -= 1
            if not self._inside:
                self._release()

    def walk_to_the_end(self) -> None:
        """Walk along until no rank has a pass to make any more; every rank calls it."""
        while self._joined and (chosen := self._chosen(None)) is not None:
            self._along(chosen)

    def finish_pass(self) -> None:
        """Walk the pass that is being walked, if any, to its end: what follows may be asked of all."""
        for walker in self.walkers.values():
            walker.finish_pass()

    def forget(self) -> None:
        """Know no walker any more: of a command that has failed ranks may have joined different ones."""
        self._release()
        self.walkers.clear()
        self._joined = 0

    @contextmanager
    def announced(self, announce: Callable[[], None] | None) -> Iterator[None]:
        """While the block runs, one rank alone makes passes: it calls ``announce`` before each, and
        the others `follow`."""
        self._announce = announce
        try:
            yield
        finally:
            self._announce = None
            self._release()

    def follow(self) -> None:
        """Walk along with one pass of another rank."""
        self._along(self._chosen(None))

    def _release(self) -> None:
        for walker in self.walkers.values():
            walker.release()

    def _chosen(self, mine: list[int] | None) -> list[int] | None:
        """The pass that comes next; None where no rank has one."""
        if self._announce is not None:
            self._announce()
        asked = [place for place in self.exchange(WHAT, mine) if place is not None]
        return min(asked, default=None)

    def _along(self, chosen: list[int] | None) -> None:
        assert chosen is not None
        kind, walker, number = chosen
        self.walkers[walker].walk_along(KINDS[kind], number)
