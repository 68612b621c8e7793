"""What one of several processes runs for the tests of layouts, and how they are started.

    RANK=0 WORLD_SIZE=2 ... python -m tests.support.layout_ranks OUT PART...

OUT holds the models of `layouts.write_models`; a PART is of `PARTS`. It writes OUT/2-rank-0.safetensors
(what each training came to) and OUT/2-rank-0.json (how each fault ended, and each command line of
OUT/commands.json, with its exit code). Of four processes the base is cut over four and over two
twice.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorry import cli
from lorry.backends.distributed.communicator import Communicator, open_communicator
from lorry.backends.distributed.tensor_ranks import data_ranks
from lorry.config.schema.backend import TrainBackendConfig
from lorry.train import session
from lorry.train.setup.base import open_base
from tests.support import base_layouts, layouts
from tests.support.layout_faults import faults, sharded_faults
from tests.support.ranks import run_ranks

COMMANDS = "commands.json"


class Ranks(NamedTuple):
    """What several processes came to: tensors by rank, {fault or command: how it ended} by rank, what
    each printed, the run directories' folder."""

    tensors: list[dict[str, Tensor]]
    ended: list[dict[str, Any]]
    printed: list[tuple[str, str]]
    folder: Path


def start_ranks(
    folder: Path, *parts: str, ranks: int = 2, commands: Mapping[str, Sequence[str]] | None = None
) -> Ranks:
    """Run these parts, and the command lines behind them, on so many processes."""
    (folder / COMMANDS).write_text(json.dumps(commands or {}))
    printed = run_ranks("tests.support.layout_ranks", folder, *parts, ranks=ranks)
    names = [folder / f"{ranks}-rank-{rank}" for rank in range(ranks)]
    return Ranks(
        [load_file(name.with_suffix(".safetensors")) for name in names],
        [json.loads(name.with_suffix(".json").read_text()) for name in names],
        printed,
        folder,
    )


def in_layouts(communicator: Communicator, out: Path) -> dict[str, Tensor]:
    """{layout/training/key: tensor} of `layouts.trainings`, also of families and of moments that ranks
    share."""
    four, results = communicator.size == 4, dict[str, Tensor]()
    if not four:
        whole = partial(layouts.backend_for, communicator)
        made = layouts.trainings(whole)
        made |= _named("moments", layouts.moment_trainings(whole, data_ranks(communicator)))
        made |= layouts.packed_trainings(partial(layouts.read_backend_for, communicator, None, out))
        results |= _named("ddp", made)
    for layout, settings in (FOUR if four else TWO).items():
        processes, start = layouts.sharded(out, **settings)
        made = layouts.family_trainings(
            out,
            start,
            own_decoder="tensor_parallel" in settings,
            # float32 of each family is what two have
            **({"dtypes": [torch.float64]} if four else {}),
        )
        if layout == "fsdp":
            moments = layouts.moment_trainings(start, data_ranks(processes))
            made |= _named("moments", moments)
        if not four:
            made |= layouts.packed_trainings(start)
        results |= _named(layout, made | layouts.trainings(start, few_only=four))
    return results


# layouts that cut the base, by how many processes there are
TWO: dict[str, dict[str, Any]] = {"fsdp": {}}
FOUR: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "hsdp": {"replicas": 2, "reshard_after_forward": False},
    "fsdp x tensor": {"tensor_parallel": 2},
}


def of_base_weights(communicator: Communicator, out: Path) -> dict[str, Tensor]:
    """The same of base weights, which do not train where ranks share them."""
    four = communicator.size == 4
    chosen = FOUR if four else TWO
    return {
        name: value
        for layout, settings in chosen.items()
        if "tensor_parallel" not in settings
        for name, value in _named(
            layout,
            base_layouts.base_trainings(out, layouts.sharded(out, **settings)[1], few_only=four),
        ).items()
    }


def of_real_model(communicator: Communicator, out: Path) -> dict[str, Tensor]:
    """The same of SmolLM2, in one layout: as three processes that share it, or as those that cut it."""
    three = communicator.size == 3
    settings = {"name": "ddp", "tensor_parallel": 3} if three else {}
    made = layouts.family_trainings(out, layouts.sharded(out, **settings)[1])
    return _named("tensor" if three else "fsdp", made)


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


TRAININGS = {"adapters": in_layouts, "base": of_base_weights, "real model": of_real_model}
FAULTS = {
    "faults": lambda communicator, out: faults(communicator, out) | sharded_faults(out),
    "base faults": lambda communicator, out: base_layouts.base_faults(out),
}
PARTS = (*TRAININGS, *FAULTS)


def run_commands(communicator: Communicator, out: Path) -> dict[str, int]:
    """{name: exit code} of the command lines; fsdp where a name begins so, else ddp."""
    ended = dict[str, int]()
    for name, words in json.loads((out / COMMANDS).read_text()).items():
        if name == "continued":  # in its own directory, by a rank 1 that reads it late
            if communicator.rank == 0:
                shutil.copytree(out / "run", out / name)
            else:
                session.open_base = open_late
        kind = "fsdp" if name.startswith("fsdp") else "ddp"
        ended[name] = cli.main([*words, f"backend={kind}", "keep_total=true"])
        session.open_base = open_base
    return ended


def open_late(*given: Any) -> Any:
    """`open_base` of a slow machine."""
    time.sleep(1.0)
    return open_base(*given)


def main(out: Path, parts: Sequence[str]) -> None:
    torch.set_num_threads(1)
    communicator = open_communicator(TrainBackendConfig(name="ddp", timeout=300.0))
    tensors, ended = dict[str, Tensor](), dict[str, Any]()
    for part in parts:
        if part in TRAININGS:
            tensors |= TRAININGS[part](communicator, out)
        else:
            ended |= FAULTS[part](communicator, out)
    ended |= run_commands(communicator, out)
    name = out / f"{communicator.size}-rank-{communicator.rank}"
    save_file(tensors, name.with_suffix(".safetensors"))
    name.with_suffix(".json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
