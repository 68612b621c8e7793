"""Mixtures of LoRA experts without any training: adapters and a router of random values, in the
directory that `lorry moe` writes.

run = mixture_run(folder, base, top_k=1, straight_through=True)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import lorry
from lorry.adapters.router import RoutingRule, attach_router
from lorry.adapters.routing.sequence import PromptRule, PrototypeRouter, attach_sequence_router
from lorry.config import RouterRunConfig, dump_settings
from lorry.models.loading.open import OpenedModel
from lorry.train.mixture import write_mixture
from tests.support.verbworld import PEOPLE, write_rows

MLP = ("gate_proj", "up_proj", "down_proj")
NAMES = ("one", "two", "three")


def mixture_run(
    folder: Path,
    base: Path,
    *,
    targets: tuple[str, ...] = MLP,
    gates: Mapping[str, float] | None = None,
    prototypes: Tensor | None = None,
    described: bool = True,
    size: float = 0.2,
    **rule: Any,
) -> Path:
    """``folder``, the run of three experts on ``base``: ranks 2, 4 and 6, the third in the second
    layer alone. gates: of constant kinds, in place of a `RoutingRule` ``rule``; prototypes [3, D]: of
    that kind. described: with a
    run.yaml, and a file of rows for each expert beside the folder. size: of the adapters' values."""
    model, words = lorry.load(base, dtype="float32")
    generator = torch.Generator().manual_seed(3)
    for number, name in enumerate(NAMES):
        spec = lorry.LoraSpec(
            r=2 + 2 * number,
            lora_alpha=4 + 4 * number,
            target_modules=targets,
            layers_to_transform=(1,) if number == 2 else None,
        )
        adapter = lorry.attach(model, spec, name=name)
        adapter.values.copy_(size * torch.randn(adapter.values.shape, generator=generator))
    if prototypes is not None:
        attach_sequence_router(model, PrototypeRouter(NAMES, PromptRule(**rule), prototypes))
    elif gates is None:
        router = attach_router(model, NAMES, RoutingRule(**rule))
        router.values.copy_(torch.randn(router.values.shape, generator=generator))
    folder.mkdir()
    source = {"path": str(base), "name": str(base), "generation_config": {}}
    opened = OpenedModel(model, words, source, list(NAMES))
    write_mixture(folder, opened, NAMES, str(base), gates)
    if not described:
        return folder
    experts = [
        {
            "name": name,
            "adapter": str(folder / name),
            "data": {
                "path": str(write_rows(folder.parent / f"{name}.jsonl", PEOPLE[at : at + 2])),
                "max_length": 128,
            },
        }
        for at, name in enumerate(NAMES)
    ]
    run = RouterRunConfig.model_validate(
        {"model": {"name": str(base)}, "experts": experts, "output_dir": folder}
    )
    (folder / "run.yaml").write_text(dump_settings(run))
    return folder


def deltas_of(folder: Path) -> dict[str, Tensor]:
    """{module path: B A of alpha / r} of an adapter's files, as PEFT reads them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            # as `mixture_run` makes every adapter
            found[path] = 2 * tensors[key.replace("lora_A", "lora_B")] @ a
    return found
