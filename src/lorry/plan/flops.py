"""FLOPs of a training step and the time they take at a given matrix rate.

Per token, with N = N_b + N_h weights of matrices used, P adapter values, L layers, causal attention
over T (its backward is 2.5 times its forward): forward F = 2N + 2 L q T + 2P, backward B = 2N + 5 L
q T + 4P, since the base is frozen and has no weight gradients. Recompute repeats the layers'
forward. Layers below the lowest adapter have no backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorry.plan.adapters import PlannedAdapter
from lorry.plan.constants import STEP_EFFICIENCIES
from lorry.plan.memory import MemorySetup, layer_path
from lorry.plan.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """FLOPs per token."""

    forward: int
    backward: int
    recompute: int
    head: int
    attention: int
    adapter: int

    @property
    def step(self) -> int:
        return self.forward + self.backward + self.recompute


def count_flops(shape: ModelShape, adapter: PlannedAdapter, setup: MemorySetup) -> TokenFlops:
    """Of one token in a sequence of ``setup.length``."""
    g = shape.geometry
    # the head's gradient always runs: the loss is behind it
    share = (g.layers - min(adapter.lowest, g.layers)) / g.layers  # layers that run backward
    body, head, p = 2 * shape.active_body, 2 * shape.head_size, adapter.parameters
    # q k^T and p v over half the square, 2 FLOPs each
    scores = g.layers * shape.queries * setup.length
    forward = body + head + 2 * scores + 2 * p
    backward = int(share * (body + 5 * scores)) + head + 4 * p
    # the head is scored once whatever is recomputed, so it is not in here
    again = int(share * (body + 2 * scores)) + 2 * p if setup.recompute == "full" else 0
    return TokenFlops(
        forward=forward,
        backward=backward,
        recompute=again,
        head=2 * head,
        attention=2 * scores + int(share * 5 * scores),
        adapter=6 * p,
    )


def step_efficiency(shape: ModelShape, setup: MemorySetup) -> float:
    """The share of the matrix rate that a step is expected to reach."""
    return STEP_EFFICIENCIES[setup.device, layer_path(shape)]
