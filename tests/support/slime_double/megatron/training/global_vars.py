"""The arguments of a process, as Megatron keeps them."""

from __future__ import annotations

from argparse import Namespace

ARGS: list[Namespace] = []


def set_args(args: Namespace) -> None:
    ARGS[:] = [args]


def get_args() -> Namespace:
    assert ARGS, "args is not initialized"
    return ARGS[0]
