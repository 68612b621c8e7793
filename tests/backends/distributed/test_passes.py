"""Ranks that have different passes to make walk the same ones in the same order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from lorry.backends.distributed.passes import PassKind, PassSchedule


class Room:
    """`Communicator.exchange` of threads."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def exchange_of(self, rank: int) -> Callable[[str, Any], list[Any]]:
        def exchange(what: str, value: Any) -> list[Any]:
            self.values[rank] = (what, value)
            self.barrier.wait()
            seen = list(self.values)
            self.barrier.wait()
            assert len({each for each, _ in seen}) == 1, seen
            return [each for _, each in seen]

        return exchange


class Walked:
    """Weights that note the passes through them, their own and others'."""

    def __init__(self, name: str, into: list[str]) -> None:
        self.name, self.into = name, into

    def walk_along(self, kind: PassKind, number: int) -> None:
        self.into.append(f"{self.name} {kind}{f' {number}' if kind == 'gather' else ''}")

    def release(self) -> None:
        self.into.append(f"{self.name} released")


def walks(passes: list[list[str]]) -> list[list[str]]:
    """What each rank walked, whose own passes are these: MODEL KIND."""
    room, walked = Room(len(passes)), [list[str]() for _ in passes]
    failed = list[BaseException]()

    def run(rank: int) -> None:
        schedule = PassSchedule(room.exchange_of(rank))
        models = [Walked(name, walked[rank]) for name in "ab"]
        numbers = {model.name: schedule.join(model) for model in models}
        try:
            with schedule.together(), schedule.together():
                for own in passes[rank]:
                    name, kind, *number = own.split()
                    schedule.begin(numbers[name], kind, *map(int, number))  # type: ignore[arg-type]
                    walked[rank].append(own)
        except (AssertionError, threading.BrokenBarrierError) as error:
            failed.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(passes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return walked


RELEASED = ["a released", "b released"]


def test_ranks_with_fewer_passes_walk_along() -> None:
    two, none = ["a forward", "a backward"] * 2, list[str]()
    assert walks([two, none, two[:2]]) == [two + RELEASED] * 3


def test_who_has_a_graph_waits_for_another_forward() -> None:
    """A micro-batch of two frames on one rank, of one on the other: the backward passes meet."""
    own = [["a forward", "a backward"], ["a forward", "a forward", "a backward"]]
    both = ["a forward", "a forward", "a backward"]
    assert walks(own) == [both + RELEASED] * 2


def test_passes_of_another_model_come_between() -> None:
    """A teacher that one rank asks."""
    own = [["a forward", "a backward"], ["b forward", "a forward", "a backward"]]
    both = ["a forward", "b forward", "a forward", "a backward"]
    assert walks(own) == [both + RELEASED] * 2


def test_a_tensor_that_one_rank_reads_is_gathered_by_all() -> None:
    """Behind the passes of others, by its number."""
    own = [["b gather 2", "b gather 0"], ["a forward", "b gather 2"], []]
    both = ["a forward", "b gather 2", "b gather 0"]
    assert walks(own) == [both + RELEASED] * 3


def test_one_rank_alone_announces_its_passes() -> None:
    room, announced = Room(2), threading.Semaphore(0)
    walked: list[list[str]] = [[], []]

    def alone() -> None:
        schedule = PassSchedule(room.exchange_of(0))
        model = Walked("a", walked[0])
        number = schedule.join(model)
        with schedule.announced(announced.release):
            for _ in range(3):
                schedule.begin(number, "forward")

    thread = threading.Thread(target=alone)
    thread.start()
    schedule = PassSchedule(room.exchange_of(1))
    model = Walked("a", walked[1])
    schedule.join(model)
    with schedule.announced(None):
        for _ in range(3):
            assert announced.acquire(timeout=20)
            schedule.follow()
    thread.join()
    assert walked == [["a released"], [*["a forward"] * 3, "a released"]]


def test_an_error_inside_is_not_waited_for() -> None:
    """A rank that fails asks nobody for more passes: it says so elsewhere."""

    def exchange(what: str, value: Any) -> list[Any]:
        raise AssertionError("asked")

    schedule, released = PassSchedule(exchange), list[str]()
    model = Walked("a", released)
    schedule.join(model)
    with pytest.raises(ZeroDivisionError), schedule.together():
        raise ZeroDivisionError
    assert released == ["a released"]


def test_behind_a_failure_walkers_are_numbered_anew() -> None:
    """One rank has failed before it had a model, another behind that: of the next command's both say
    the same number."""
    numbers = list[int]()
    for joined in (0, 1):
        schedule, released = PassSchedule(lambda what, value: [value]), list[str]()
        models = [Walked("a", released) for _ in range(joined)]
        for model in models:
            schedule.join(model)
        schedule.forget()
        assert released == ["a released"] * joined
        later = Walked("b", [])
        numbers.append(schedule.join(later))
    assert numbers == [1, 1]


def test_without_such_models_nobody_is_asked() -> None:
    def exchange(what: str, value: Any) -> list[Any]:
        raise AssertionError("asked")

    with PassSchedule(exchange).together():
        pass
