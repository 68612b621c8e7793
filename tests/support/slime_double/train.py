"""slime's driver lies in the root of its repository; the double's only keeps what it was started with."""

from __future__ import annotations

from argparse import Namespace

from slime.utils.arguments import RAN, parse_args


def train(args: Namespace) -> None:
    """In slime: placement groups, actors, and the loop generate, train, save, update weights."""
    RAN.append(args)
    told = ("lora", "only_train")
    print("trained with", {n: v for n, v in vars(args).items() if any(t in n for t in told)})


if __name__ == "__main__":
    train(parse_args())
