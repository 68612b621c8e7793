"""Which matrices an adapter sits on and at which rank, from names alone, by the rules of
`adapters/attach.py`; and those of a mixture under the router that trains.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

from lorry.config.adapter.initialization import find_initialization
from lorry.config.moe import RouterConfig
from lorry.config.schema.lora import LoraConfig
from lorry.config.schema.step_reads import StepReads
from lorry.errors import ConfigError, suggest_nearest
from lorry.families import SITES
from lorry.plan.ranks import MOST_RANK
from lorry.plan.shapes import ModelShape, Site


@dataclass(frozen=True, kw_only=True)
class AdaptedMatrix:
    """One adapted matrix: A is rank x inputs, B outputs x rank. ``layer`` is None for the head and
    the embedding. Of fused experts all of a layer's: ``experts`` of them, of which a token passes
    ``active``; ``router``: that of such, which is adapted only where it is named. ``magnitude``:
    with one for every output (DoRA); ``bias``: beside B; ``scored``: with a factor for every rank and two running means for
    every value (AdaLoRA); ``trained``: the halves that train.
    """

    path: str
    layer: int | None
    site: Site | None
    inputs: int
    outputs: int
    rank: int
    experts: int = 1
    active: int = 1
    router: bool = False
    magnitude: bool = False
    bias: bool = False
    scored: bool = False
    trained: tuple[Literal["A", "B"], ...] = ("A", "B")

    @property
    def parameters(self) -> int:
        """Values that train."""
        width = sum(self.inputs if half == "A" else self.outputs for half in self.trained)
        low_rank = self.experts * self.rank * width
        vectors = self.outputs * (self.magnitude + self.bias)
        return low_rank + vectors + self.rank * self.scored

    @property
    def held(self) -> int:
        """Values of the half that does not."""
        both = self.experts * self.rank * (self.inputs + self.outputs)
        return both - self.experts * self.rank * sum(
            self.inputs if half == "A" else self.outputs for half in self.trained
        )

    @property
    def passed(self) -> int:
        """Values that one token is multiplied with."""
        return (self.parameters + self.held) // self.experts * self.active

    @property
    def parameter(self) -> str:
        """The tensor it is added to, as `target_parameters` names it."""
        return self.path if self.experts > 1 else f"{self.path}.weight"


@dataclass(frozen=True)
class OwnValues:
    """``values`` that train in the base's place at a module, by its path or its kind (`HEAD`); ``rows``: of
    single tokens, which are never cut."""

    place: str
    values: int
    rows: bool = False


@dataclass(frozen=True)
class PlannedAdapter:
    """All of an adapter's matrices. ``beside``: values of other adapters that are held with it and
    that no token of a micro-batch passes; ``frozen``: values of adapters under it that do not train,
    which every token passes; ``idle``: of such as no token does; ``own``: matrices, rows and new tokens
    that train in the base's place.
    """

    matrices: tuple[AdaptedMatrix, ...]
    beside: int = 0
    frozen: int = 0
    idle: int = 0
    own: tuple[OwnValues, ...] = ()

    @cached_property
    def parameters(self) -> int:
        """P of the floor."""
        own = sum(each.values for each in self.own)
        return sum(s.parameters for s in self.matrices) + self.beside + own

    @cached_property
    def held(self) -> int:
        """Values of its own that do not train."""
        return sum(s.held for s in self.matrices)

    @property
    def scored(self) -> bool:
        """Whether every value has two running means besides its moments."""
        return any(s.scored for s in self.matrices)

    @cached_property
    def passed(self) -> int:
        """Of these, the ones that one token is multiplied with: not those of experts it never sees."""
        return sum(s.passed for s in self.matrices) + self.beside

    @property
    def lowest(self) -> int:
        """The first layer that runs backward: the lowest adapted one; 0 when the embedding is, past
        the last when no layer is.
        """
        layers = [s.layer for s in self.matrices if s.layer is not None]
        if self.own or any(is_embedding(s) for s in self.matrices):
            return 0
        # past the last of any model: an adapter on the head alone needs no layer's backward
        return min(layers, default=1 << 30)

    def ranks(self, layer: int, site: Site | None = None) -> list[int]:
        """Ranks of a layer's adapted matrices that one token passes, of one site or of all."""
        return [s.rank * s.active for s in self._of_layer(layer) if site in (None, s.site)]

    def kept_outputs(self, layer: int, *, attended: bool) -> int:
        """Elements per token that a layer keeps for magnitudes alone: what the MLP adds to the stream,
        and attention (``attended``: unless that stands in place of the stream behind it). The other outputs it
        has anyway."""
        sites = (SITES.attn_out, SITES.mlp_out) if attended else (SITES.mlp_out,)
        return sum(s.outputs for s in self._of_layer(layer) if s.magnitude and s.site in sites)

    def _of_layer(self, layer: int) -> Sequence[AdaptedMatrix]:
        return self._layers.get(layer, ())

    @cached_property
    def _layers(self) -> Mapping[int | None, Sequence[AdaptedMatrix]]:
        """By layer, which a plan of many choices asks for again and again."""
        layers = defaultdict[int | None, list[AdaptedMatrix]](list)
        for matrix in self.matrices:
            layers[matrix.layer].append(matrix)
        return layers

    @property
    def file_values(self) -> int:
        """Values of its file."""
        return self.parameters

    @property
    def token_flops(self) -> tuple[int, int]:
        """FLOPs of a token forward and backward beside the base's own: A and B multiply forward, their
        inputs' and their own gradients backward."""
        return 2 * self.passed, 4 * self.passed

    def adapts_head(self) -> bool:
        """Whether the output head is adapted: its scores are then recomputed in backward."""
        return any(each.place == HEAD for each in self.own) or any(
            s.layer is None and not is_embedding(s) for s in self.matrices
        )


HEAD = "head"
EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in")


def is_embedding(matrix: AdaptedMatrix) -> bool:
    """Whether it is the input embedding, whose inputs are the vocabulary."""
    return matrix.layer is None and matrix.path.endswith(EMBEDDING_NAMES)


def plan_adapter(shape: ModelShape, lora: LoraConfig, rank: int) -> PlannedAdapter:
    """The adapter that ``lora`` describes, at this rank. Raises ConfigError for a name that matches
    no matrix.
    """
    g = shape.geometry
    known = [
        AdaptedMatrix(
            path=linear.path.format(i=i),
            layer=i,
            site=linear.site,
            inputs=linear.inputs,
            outputs=linear.outputs,
            rank=rank,
        )
        for i in range(g.layers)
        for linear in shape.linears
    ]
    known += [matrix for i in range(g.layers) for matrix in _expert_matrices(shape, i, rank)]
    embed = AdaptedMatrix(
        path=shape.embed, layer=None, site=None, inputs=g.vocab, outputs=g.width, rank=rank
    )
    head = AdaptedMatrix(
        path=shape.head, layer=None, site=None, inputs=g.width, outputs=g.vocab, rank=rank
    )
    chosen = _targeted_matrices({s.path: s for s in (embed, *known, head)}, known, shape, lora)
    if lora.lora_dropout and (stacked := [s for s in chosen if s.experts > 1 or s.router]):
        raise ConfigError(
            f"lora.lora_dropout does not work on fused experts ({stacked[0].path}); set "
            "lora_dropout=0, or leave them out with lora.exclude_modules=[experts]"
        )
    if lora.layers_to_transform is not None:
        wanted = (
            lora.layers_to_transform
            if isinstance(lora.layers_to_transform, list)
            else [lora.layers_to_transform]
        )
        if absent := sorted(set(wanted) - set(range(g.layers))):
            raise ConfigError(
                f"lora.layers_to_transform names layer {absent[0]}; this model has "
                f"layers 0 to {g.layers - 1}"
            )
        chosen = [s for s in chosen if s.layer in wanted]
    if not chosen:
        raise ConfigError("lora.target_modules and lora.exclude_modules leave no layer")
    trained = ("A",) if lora.init_lora_weights == "mica" else tuple(lora.train)
    chosen = [
        replace(
            s,
            magnitude=lora.use_dora,
            bias=lora.lora_B_bias,
            scored=lora.variant == "adalora",
            trained=trained,
        )
        for s in chosen
    ]
    planned = PlannedAdapter(tuple(_with_pattern_rank(s, lora) for s in chosen))
    way = find_initialization(lora.init_lora_weights)
    # what it takes off the base lies beside it, frozen, and every token passes it too
    taken_off = planned.parameters if way is not None and way.takes_off else 0
    own = _own_values(shape, lora, [embed, *known, head])
    return replace(planned, frozen=taken_off, own=own)


def _own_values(
    shape: ModelShape, lora: LoraConfig, matrices: Sequence[AdaptedMatrix]
) -> tuple[OwnValues, ...]:
    """What trains in the base's place: whole matrices by the end of their path, and rows. Norms and biases,
    thousands of values, are left out; tokens of a file count as none."""
    g, names = shape.geometry, {"lm_head": shape.head, "embed": shape.embed}
    kind = {shape.embed: "embedding", shape.head: HEAD}
    asked_paths = tuple(names.get(name, name) for name in lora.modules_to_save or ())
    parents = tuple(f"{path}." for path in asked_paths)
    own = [
        OwnValues(kind.get(m.path, m.path), m.inputs * m.outputs)
        for m in matrices
        # a module may hold it: mlp
        if asked_paths and (m.path.endswith(asked_paths) or any(p in f"{m.path}." for p in parents))
    ]
    ends = {each.place for each in own} & {HEAD, "embedding"}
    if lora.ensure_weight_tying and g.tied and len(ends) == 2:
        own = [each for each in own if each.place != "embedding"]
    asked = lora.trainable_token_indices
    lists = asked if isinstance(asked, dict) else {"embedding": asked or []}
    for name, ids in lists.items():
        if ids:
            is_head = names.get(name, name) == shape.head or g.tied
            place = HEAD if is_head else "embedding"
            own.append(OwnValues(place, len(ids) * g.width, rows=True))
    if isinstance(lora.new_tokens, list):
        values = len(lora.new_tokens) * g.width * (1 if g.tied else 2)
        own.append(OwnValues(HEAD, values, rows=True))
    return tuple(own)


def _expert_matrices(shape: ModelShape, layer: int, rank: int) -> list[AdaptedMatrix]:
    """A layer's fused experts and their router, by the names that most of transformers' classes
    have; none of a dense model."""
    if shape.experts is None:
        return []
    width, inner = shape.geometry.width, shape.experts.width
    mlp, up = f"{shape.layer.format(i=layer)}.mlp", "gate_up_proj" if shape.gated else "up_proj"
    sizes = ((up, width, (2 if shape.gated else 1) * inner), ("down_proj", inner, width))
    matrices = [
        AdaptedMatrix(
            path=f"{mlp}.experts.{name}",
            layer=layer,
            site="mlp.in" if name == up else "mlp.out",
            inputs=inputs,
            outputs=outputs,
            rank=rank,
            experts=shape.experts.count,
            active=shape.experts.active,
        )
        for name, inputs, outputs in sizes
    ]
    router = AdaptedMatrix(
        path=f"{mlp}.gate",
        layer=layer,
        site="mlp.in",
        inputs=width,
        outputs=shape.experts.count,
        rank=rank,
        router=True,
    )
    return [*matrices, router]


def router_reads(shape: ModelShape, router: RouterConfig, experts: int) -> StepReads:
    """A row of every expert's domain in each micro-batch; of a classifier up to the layer that it
    reads, and never the head."""
    reads = StepReads(together=experts, passes=experts)
    if router.lora is None:
        return reads
    highest = read_layer(shape, router)
    return replace(reads, highest_layer=shape.geometry.layers - 1 if highest is None else highest)


def count_router_values(shape: ModelShape, router: RouterConfig, experts: int) -> int:
    """Values of W_r [K, width] of each layer and routed half, and of an MLP's hidden layers."""
    halves = 2 if router.input == "both" else 1
    widths = [shape.geometry.width, *router.hidden, experts]
    values = sum(before * after for before, after in pairwise(widths))
    return shape.geometry.layers * halves * values


def plan_router(
    shape: ModelShape,
    router: RouterConfig,
    experts: Mapping[str, PlannedAdapter],
    brought: Sequence[int] = (),
) -> PlannedAdapter:
    """What trains and what is held of a mixture of planned ``experts``; ``brought``: the values of
    those that are there already. The ranks of one matrix add up: its terms are one product; a
    classifier's own LoRA (`router.lora`) trains without them."""
    count = len(experts) + len(brought)
    frozen = sum(adapter.parameters for adapter in experts.values()) + sum(brought)
    if router.lora is not None:
        return _plan_lora_classifier(shape, router, count, frozen)
    stacked: dict[str, AdaptedMatrix] = {}
    for adapter in experts.values():
        for matrix in adapter.matrices:
            before = stacked.get(matrix.path)
            rank = matrix.rank + (0 if before is None else before.rank)
            stacked[matrix.path] = replace(matrix, rank=rank)
    matrices = tuple(stacked.values())
    # phatgoose has a vector for each expert and linear
    vectors = count * sum(matrix.inputs for matrix in matrices)
    trained = vectors if router.kind == "phatgoose" else count_router_values(shape, router, count)
    if router.train_experts:
        return PlannedAdapter(matrices, trained + sum(brought), 0)
    # `parameters` adds the matrices' own, which do not train here
    return PlannedAdapter(matrices, trained - sum(m.parameters for m in matrices), frozen)


def _plan_lora_classifier(
    shape: ModelShape, router: RouterConfig, experts: int, held: int
) -> PlannedAdapter:
    """The LoRA of a classifier, up to the layer that it reads, and the classifier's linears. ``held``:
    values of the experts, through which nothing passes."""
    lora = LoraConfig.model_validate(router.lora)
    highest = read_layer(shape, router)
    if highest is not None and lora.layers_to_transform is None:
        lora = lora.model_copy(update={"layers_to_transform": list(range(highest + 1))})
    assert isinstance(lora.r, int)  # auto is refused
    widths = [shape.geometry.width, *router.hidden, experts]
    linears = sum((before + 1) * after for before, after in pairwise(widths))
    matrices = plan_adapter(shape, lora, lora.r).matrices
    return PlannedAdapter(matrices, linears, idle=held)


def read_layer(shape: ModelShape, router: RouterConfig) -> int | None:
    """The layer whose output a router of the sequence reads, the middle one unless it is named; None:
    all of them are run."""
    if router.layer == "final":
        return None
    return shape.geometry.layers // 2 if router.layer is None else router.layer


def _targeted_matrices(
    every: dict[str, AdaptedMatrix], inner: list[AdaptedMatrix], shape: ModelShape, lora: LoraConfig
) -> list[AdaptedMatrix]:
    wanted, excluded = lora.target_modules, lora.exclude_modules
    if isinstance(wanted, str):
        # "all-linear" is every linear of the layers; never the head, as in PEFT. Experts are in it
        # unless they are named one by one
        listed = lora.target_parameters is not None
        chosen = (
            [s for s in inner if not s.router and not (listed and s.experts > 1)]
            if wanted in ("auto", "all-linear")
            else [s for p, s in every.items() if not s.router and re.fullmatch(wanted, p)]
        )
        if not chosen:
            raise ConfigError(
                f"lora.target_modules={wanted!r} matches no layer; {_list_known_names(every)}"
            )
    else:
        names = {name: [name] for name in wanted}
        names |= {"lm_head": [shape.head], "embed": [shape.embed]}
        if shape.experts is not None and {"gate_proj", "up_proj"} <= {*wanted}:
            names["gate_proj"].append("gate_up_proj")
            names["up_proj"].append("gate_up_proj")
        for name in wanted:
            if not any(_ends_with(p, end) for p in every for end in names[name]):
                leaves = {p.rpartition(".")[2] for p in every}
                raise ConfigError(
                    f"lora.target_modules names {name!r}, which matches no layer{suggest_nearest(name, leaves)}; {_list_known_names(every)}"
                )
        ends = [end for name in wanted for end in names[name]]
        chosen = [s for p, s in every.items() if any(_ends_with(p, end) for end in ends)]
    for name in lora.target_parameters or ():
        hits = [s for s in every.values() if _ends_with(s.parameter, name)]
        if not hits:
            raise ConfigError(
                f"lora.target_parameters names {name!r}, which matches no parameter; "
                f"{_list_known_names(every)}"
            )
        chosen += [s for s in hits if s not in chosen]
    if isinstance(excluded, str):
        return [s for s in chosen if not re.fullmatch(excluded, s.path)]
    # experts also by the module that holds them
    return [
        s
        for s in chosen
        if not any(
            _ends_with(s.path, e) or (s.experts > 1 and _ends_with(s.path.rpartition(".")[0], e))
            for e in excluded or ()
        )
    ]


def _with_pattern_rank(matrix: AdaptedMatrix, lora: LoraConfig) -> AdaptedMatrix:
    """The rank that `rank_pattern` gives this matrix, as PEFT reads it."""
    for key, rank in lora.rank_pattern.items():
        # the first pattern that matches counts, at the end of a name or as a regular expression
        if re.match(rf"(.*\.)?({key})$", matrix.path):
            return AdaptedMatrix(**{**vars(matrix), "rank": rank})
    return matrix


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _list_known_names(paths: Iterable[str]) -> str:
    return f"the layers here end in {', '.join(dict.fromkeys(p.rpartition('.')[2] for p in paths))}"


def largest_rank(shape: ModelShape, lora: LoraConfig, most: int = MOST_RANK) -> int:
    """The largest that is no larger than any adapted matrix's smaller side: beyond it a rank adds
    nothing.
    """
    smaller = min(min(s.inputs, s.outputs) for s in plan_adapter(shape, lora, 1).matrices)
    return min(most, smaller)
