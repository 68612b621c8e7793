"""Base weights that train on several processes: trainings and faults as `tests/support/layouts.py` has them
of adapters, and the runs of `tests/contracts/test_base_layouts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.backends.local import LocalBackend
from lorry.tasks.unlearn.gradients import GradientRectified, SharpnessAware
from lorry.train.checks import ContractChecks
from tests.support.layout_faults import endings
from tests.support.layout_runs import EVALUATED, words_of
from tests.support.layouts import (
    MODELS,
    few,
    flat,
    local_bytes,
    parted,
    sharded,
    steps_of,
    trained,
    uneven,
)
from tests.support.seam import Fixed

BASE_RATE = 1e-3
FLOATS = (torch.float32, torch.float64, torch.bfloat16)


def is_of_few(family: str, dtype: torch.dtype) -> bool:
    """Whether a training of base weights is made in every layout: of each family one."""
    return dtype == torch.float64 or (family, dtype) == ("llama", torch.bfloat16)


def base_trainings(
    folder: Path, start: Callable[..., LocalBackend], few_only: bool = False
) -> dict[str, Tensor]:
    """Of base weights: all of each family, and a part; ``share``: the bytes that train here; ``few_only``:
    those of `is_of_few`, and steps of one row."""
    plain, results = Fixed(steps_of(uneven), ["base"]), dict[str, dict[str, Tensor]]()
    chosen: list[tuple[str, torch.dtype, str | list[str]]] = [
        (family, dtype, "all")
        for family in MODELS
        for dtype in FLOATS
        if not few_only or is_of_few(family, dtype)
    ]
    if not few_only:
        chosen.append(("llama", torch.float32, ["lm_head", "mlp.up_proj"]))
    for family, dtype, specs in chosen:
        backend = start(specs, dtype, family=family)
        name = f"{family} {dtype} {'all' if specs == 'all' else 'part'}"
        results[name] = trained(backend, plain, BASE_RATE)
        buffers = (backend.owners["base"].values, *backend.optimizers["base"].moments())
        results[f"share {name}"] = {
            "model": torch.tensor(sum(map(local_bytes, backend.model.parameters()))),
            "training": torch.tensor(
                sum(b.nbytes for b in (*buffers, backend.owners["base"].grads))
            ),
        }
    rules = {"sam": SharpnessAware({"base": 0.05}), "gru": GradientRectified()}
    for name, rule in rules.items() if not few_only else ():
        task = Fixed(steps_of(parted), ["base"])
        results[name] = trained(start("all", gradient=rule), task, BASE_RATE)
    few_rows = Fixed(steps_of(few), ["base"])
    results["few"] = trained(start("all"), few_rows, BASE_RATE)
    return {f"base {key}": value for key, value in flat(results).items()}


def base_faults(out: Path) -> dict[str, list[str]]:
    """`layout_faults.sharded_faults` of weights that train."""
    communicator, start = sharded(out)
    second = communicator.rank == 1
    base = Fixed(steps_of(uneven), ["base"])

    def late_gradient(folder: Path) -> None:
        backend = start("all")
        weights: Any = backend.model.layer_weights
        backend.forward_backward(base.step_batches(0, {}), base, 0)
        reduce = weights._reduce
        # the highest layer is left too early
        weights._reduce = lambda group: None if group is weights.layers[-1] else reduce(group)
        backend.forward_backward(base.step_batches(0, {}), base, 0)

    def infinite_gradient(folder: Path) -> None:
        backend = start("all")
        backend.forward_backward(base.step_batches(0, {}), base, 0)
        owner = backend.owners["base"]
        if second:
            owner.split_like(owner.grads)["model.norm.weight"][1] = float("inf")
        backend.step({"base": BASE_RATE})

    def infinite_value(folder: Path) -> None:
        backend = start("all")
        if second:
            backend.optimizers["base"].m[3] = float("nan")
        ContractChecks().finite(backend, 1)

    return endings(
        communicator,
        out,
        {
            "late gradient": late_gradient,
            "infinite gradient": infinite_gradient,
            "infinite value": infinite_value,
        },
    )


# of base weights that train
BASE_RUN: dict[str, Any] = {
    **EVALUATED,
    "lora": "null",
    "learning_rate": 1e-3,
    "load_best_model_at_end": True,
}
del BASE_RUN["lora_dropout"]


def base_runs(out: Path) -> dict[str, dict[str, Any]]:
    """The whole run, one that goes on from its checkpoint, and one from a checkpoint of one process;
    through transformers' own code; a part of the weights."""
    step = "checkpoints/step-00000002"
    return {
        "": BASE_RUN,
        " resumed": {**BASE_RUN, "resume_from_checkpoint": out / "fsdp-base" / step},
        " from one": {**BASE_RUN, "resume_from_checkpoint": out / "one-base" / step},
        " foreign": {**BASE_RUN, "model": out / "foreign"},
        " part": {**BASE_RUN, "trainable": "mlp", "dtype": "bfloat16"},
    }


def base_words(folder: Path, out: Path, **settings: Any) -> list[str]:
    """`words_of`, without an adapter's."""
    return [word for word in words_of(folder, out, **settings) if not word.startswith("r=")]
