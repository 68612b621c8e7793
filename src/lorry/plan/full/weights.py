"""Base weights that train (`lora=null`), counted in an adapter's place: how many, of which layers, and
what else their training holds.

    fp32 on one device   the weight is its own master: gradient 4 and moments 8 bytes a value beside it
    bf16, or cut by FSDP2   master 4, gradient 4, moments 8 beside the weight that is computed with

Of weights that FSDP2 cuts a rank has its rows of all four. Names are those of
`adapters.base_weights.select_parameters`, as far as a config tells them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorry.errors import ConfigError
from lorry.plan.adapters import PlannedAdapter
from lorry.plan.shapes import ModelShape

# what `trainable` calls the linears of each half of a layer; so their sites begin
HALVES = ("attention", "mlp")


@dataclass(frozen=True)
class PlannedWeights(PlannedAdapter):
    """Values that train: ``layer_values`` of each of ``layers``, ``largest`` of the largest matrix among
    them; ``ends`` of embedding, final norm and head; ``file_values``: of the model, all of which is saved.
    ``multiplied``: weights among them that a token is multiplied with; ``trains_head``: whether the
    head is one.
    """

    layers: int = 0
    layer_values: int = 0
    ends: int = 0
    largest: int = 0
    file_values: int = 0
    multiplied: int = 0
    trains_head: bool = False
    trains_embedding: bool = False

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_values + self.ends

    @property
    def lowest(self) -> int:
        """0 but where the head alone trains, which needs no layer's backward."""
        return 0 if self.layer_values or self.trains_embedding else 1 << 30

    def adapts_head(self) -> bool:
        return self.trains_head

    @property
    def token_flops(self) -> tuple[int, int]:
        """The weights' own gradients: a product more in backward."""
        return 0, 2 * self.multiplied


def plan_weights(shape: ModelShape, trainable: str | list[str] | None) -> PlannedWeights:
    """The weights that ``trainable`` chooses. Raises ConfigError where it matches none."""
    g = shape.geometry
    experts = shape.layer_experts
    linears = {linear.path: linear for linear in shape.linears}
    small = shape.layer_small  # norms, biases, a router
    is_tied, ends = g.tied, shape.embedding + shape.final_norm
    if trainable in (None, "all", "all-but-router"):
        router = 0 if shape.experts is None else shape.experts.count * g.width
        values = shape.layer_linears + experts + small
        return _planned(
            shape,
            layer_values=values - (router if trainable == "all-but-router" else 0),
            ends=ends + (0 if is_tied else shape.head_size),
            largest=max(shape.head_size, *(one.size for one in linears.values())),
            layer_multiplied=shape.active_body // g.layers,
            head=True,
            embedding=True,
        )
    half = trainable if isinstance(trainable, str) and trainable in HALVES else None
    chosen = [
        linear
        for path, linear in linears.items()
        if (linear.site.startswith(half) if half else _is_named(path.format(i=0), trainable))
    ]
    head, embedding = (
        half is None and _is_named(path, trainable) for path in (shape.head, shape.embed)
    )
    expert_values = experts if half == "mlp" else 0
    if not (chosen or head or embedding or expert_values):
        names = sorted({path.rpartition(".")[2] for path in (*linears, shape.embed, shape.head)})
        raise ConfigError(f"trainable={trainable} matches no weight; there are {', '.join(names)}")
    active = 0
    if shape.experts is not None:
        active = expert_values * shape.experts.active // shape.experts.count
    both = is_tied and (head or embedding)
    matrices = [one.size for one in chosen] + [shape.head_size] * (head or embedding)
    return _planned(
        shape,
        layer_values=sum(one.size + (one.outputs if one.bias else 0) for one in chosen)
        + expert_values,
        ends=shape.head_size * (1 if both else head + embedding),
        largest=max(matrices, default=expert_values),
        layer_multiplied=sum(one.size for one in chosen) + active,
        head=head or both,
        embedding=embedding or both,
    )


def _planned(
    shape: ModelShape,
    *,
    layer_values: int,
    ends: int,
    largest: int,
    layer_multiplied: int,
    head: bool,
    embedding: bool,
) -> PlannedWeights:
    layers = shape.geometry.layers
    return PlannedWeights(
        (),
        layers=layers,
        layer_values=layer_values,
        ends=ends,
        largest=largest,
        file_values=shape.parameters,
        multiplied=layers * layer_multiplied + (shape.head_size if head else 0),
        trains_head=head,
        trains_embedding=embedding,
    )


def _is_named(path: str, trainable: str | list[str] | None) -> bool:
    """As `target_modules` reads names: the end of a path, or a regular expression over all of it."""
    if isinstance(trainable, list):
        return any(path == name or path.endswith(f".{name}") for name in trainable)
    return trainable is not None and re.fullmatch(trainable, path) is not None
