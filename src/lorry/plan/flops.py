"""FLOPs of a training step and the time they take at a given matrix rate.

Per token, with N = N_b + N_h weights of matrices used, P adapter values (of experts those that it
passes), L layers, causal attention
over T (its backward is 2.5 times its forward): forward F = 2N + 2 L q T + 2P, backward B = 2N + 5 L
q T + 4P, since the base is frozen and has no weight gradients; of base weights that train (lora=null)
2 more of each in place of P's. Recompute repeats the layers'
forward. Layers below the lowest adapter have no backward. Under a router at `level: expert` N_b has
the MLP once for each of a token's experts. A start that is asked with every step
(an unlearning run's) adds a forward: a third of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorry.plan.adapters import PlannedAdapter
from lorry.plan.constants import STEP_EFFICIENCIES
from lorry.plan.memory import MemorySetup, layer_path, layers_run
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
    reference: int = 0

    @property
    def step(self) -> int:
        return self.forward + self.backward + self.recompute + self.reference


def count_flops(shape: ModelShape, adapter: PlannedAdapter, setup: MemorySetup) -> TokenFlops:
    """Of one token in a sequence of ``setup.length``."""
    g, run = shape.geometry, layers_run(shape, setup)
    # the head's gradient always runs where the head does: the loss is behind it
    share = max(run - adapter.lowest, 0) / g.layers  # layers that run backward
    weights = shape.active_body + g.layers * max(setup.mixed_mlps - 1, 0) * shape.mlp_linears
    body, (up, down) = 2 * weights * run // g.layers, adapter.token_flops
    head = 2 * shape.head_size if setup.reads.highest_layer is None else 0
    # q k^T and p v over half the square, 2 FLOPs each
    scores = shape.queries * setup.length
    frozen = body + head + 2 * run * scores + 2 * adapter.frozen
    forward = frozen + up
    # that of a frozen adapter passes its term on: as much again as its forward
    backward = int(share * (2 * weights + 5 * g.layers * scores)) + head + down + 2 * adapter.frozen
    # the head is scored once whatever is recomputed, so it is not in here
    again = (
        int(share * (2 * weights + 2 * g.layers * scores)) + up if setup.recompute == "full" else 0
    )
    return TokenFlops(
        forward=forward,
        backward=backward,
        recompute=again,
        head=2 * head,
        attention=2 * run * scores + int(share * 5 * g.layers * scores),
        adapter=up + down,
        reference=frozen if setup.reads.asks_start and setup.reads.live else 0,
    )


def step_efficiencies(setup: MemorySetup) -> Mapping[str, float]:
    """The share of the matrix rate that a step is expected to reach, by the path of its layers."""
    if setup.device == "cuda":
        return STEP_EFFICIENCIES["cuda"]
    # the kernels of bfloat16 products leave float32 to vectors
    products = setup.attention in ("tiles", "dots") and setup.dtype == "float32"
    return STEP_EFFICIENCIES["vectors" if products else setup.attention]


def step_efficiency(shape: ModelShape, setup: MemorySetup) -> float:
    """That of a model's path."""
    return step_efficiencies(setup)[layer_path(shape)]
