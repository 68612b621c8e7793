"""What an optimizer step reads, as `lorry plan` counts it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class StepReads:
    """What an optimizer step reads for each row of `per_device_train_batch_size`, for `lorry plan`:
    the task's settings say it. ``together``: sequences beside each other in a micro-batch;
    ``passes``: sequences run forward and backward in all; ``asks_start``: what is asked of the
    frozen start about the same sequences and kept beside the micro-batches: scores (a number a
    token) or hidden (a row of the model's width); ``live``: whether it is asked with every step;
    ``copies``: fp32 buffers besides, as large as what trains; ``highest_layer``: the last layer
    that runs, without the output head; None: all of it.
    """

    together: int = 1
    passes: int = 1
    asks_start: Literal["scores", "hidden"] | None = None
    live: bool = False
    copies: int = 0
    highest_layer: int | None = None

    @property
    def start_answer(self) -> str:
        """What the start is asked for, in words."""
        return "hidden states" if self.asks_start == "hidden" else "scores"


ROW_ALONE = StepReads()
