"""What an adapter does not sit on although one could think so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.parameters.experts import ExpertMatrices
from lorry.adapters.parameters.weights import ForeignWeight
from lorry.adapters.spec import LAYER_NUMBER
from lorry.adapters.targets.candidates import (
    find_adaptable,
    find_linears,
    find_unadaptable,
    head_and_embedding,
)
from lorry.adapters.targets.selection import leaf_names, text_layers


@dataclass(frozen=True)
class SkippedModule:
    """What an adapter does not sit on although one could think so, and why."""

    what: str
    why: str


def list_skipped_modules(model: nn.Module, adapter: Adapter) -> list[SkippedModule]:
    """What `auto` and `all-linear` pass over, and experts always: "all linear layers" of a mixture
    of experts may be its attention alone."""
    experts, others = find_unadaptable(model)
    left_out, routers = list[str](), list[str]()
    for path, layer in find_adaptable(model).items():
        if isinstance(layer, ExpertMatrices) and path not in adapter.slots:
            left_out.append(path)
        elif isinstance(layer, ForeignWeight) and path not in adapter.slots:
            routers.append(f"{path}.weight")
    skipped = []
    on = f"the adapter is on {', '.join(leaf_names(adapter.slots))}"
    if experts:
        skipped.append(
            SkippedModule(
                _describe_experts(model, experts),
                f"their module has a form that no adapter can sit on; {on}",
            )
        )
    if left_out:
        skipped.append(
            SkippedModule(_describe_experts(model, left_out), f"the targets do not name them; {on}")
        )
    if adapter.spec.target_modules not in ("auto", "all-linear"):
        return skipped
    if routers:
        skipped.append(
            SkippedModule(
                f"{len(routers)} weights such as {routers[0]}",
                "no linear layer: a router and its like are adapted where they are named",
            )
        )
    if others:
        skipped.append(
            SkippedModule(
                f"{len(others)} tensors such as {others[0]}", "they are not linear layers"
            )
        )
    if adapter.spec.target_modules == "auto" and getattr(model, "reached", None) is not None:
        head, _ = head_and_embedding(model)
        linears = find_linears(model)
        numbered = [p for p in linears if LAYER_NUMBER.search(p) and p != head]
        numbered = [
            p
            for p in numbered
            if not isinstance(model.get_submodule(p), (nn.Embedding, BankEmbedding))
        ]
        if unread := [p for p in numbered if p not in set(text_layers(model, numbered, linears))]:
            skipped.append(
                SkippedModule(
                    f"{len(unread)} linear layers such as {unread[0]}",
                    (
                        "text gives them no gradient: they are not called, or their "
                        "output is not used"
                    ),
                )
            )
    return skipped


def _describe_experts(model: nn.Module, names: Sequence[str]) -> str:
    total = sum(p.numel() for p in model.parameters())
    share = sum(model.get_parameter(n).numel() for n in names) / total
    return f"experts ({len(names)} tensors such as {names[0]}, {share:.0%} of the base model's weights)"
