"""Adapters at parameters in PEFT's files: the names of their tensors and targets, and files of the
time when each expert had linears of its own.

PEFT wraps a module once for each of its parameters, the first one inside: of a module of experts with
adapters on gate_up_proj and down_proj, `experts.base_layer.lora_A.weight` belongs to the first and
`experts.lora_A.weight` to the second. Which is which follows from `target_parameters` and the order
of the module's parameters alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorry.adapters.attach import get_bank
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.parameters.experts import ExpertMatrices
from lorry.adapters.parameters.weights import ForeignWeight
from lorry.adapters.peft.config import check_pattern_time, match_peft_targets
from lorry.adapters.peft.tensor_file import TensorFile
from lorry.adapters.spec import LAYER_NUMBER, LoraSpec
from lorry.adapters.targets.candidates import find_adaptable
from lorry.adapters.targets.selection import UNFUSED_NAMES
from lorry.errors import ModelError

Number = TypeVar("Number", int, float)
WRAPPED = ".base_layer"
# what PEFT, on a model with fused experts, takes for linears of single experts or for the router,
# whatever else has the name: such a linear is a target by its parameter
MISTAKEN_LEAVES = frozenset(
    ["gate", *(leaf for ways in UNFUSED_NAMES.values() for way in ways for leaf in way)]
)
UNFUSED_TENSOR = re.compile(
    r"(?P<module>(?P<holder>.+\.experts)\.(?P<expert>\d{1,6})\.(?P<leaf>w[123]|gate_proj|up_proj|down_proj))"
    r"\.lora_(?P<side>[AB])\.weight"
)
OLD_HOLDER, NEW_HOLDER = ".block_sparse_moe.", ".mlp."  # Mixtral's, before transformers 5


def tensor_modules(paths: Collection[str], layers: Mapping[str, AdaptableLayer]) -> dict[str, str]:
    """{path of an adapted place: the module that PEFT's tensor names say}, for one adapter."""
    names = dict[str, str]()
    for path in paths:
        layer = layers[path]
        if not isinstance(layer, ExpertMatrices):
            names[path] = path
            continue
        holder = path.rpartition(".")[0]
        order = [f"{holder}.{leaf}" for leaf in layer.holders[0]._parameters]
        adapted = [p for p in order if p in paths]
        names[path] = holder + WRAPPED * (len(adapted) - 1 - adapted.index(path))
    return names


def split_targets(
    model: nn.Module, spec: LoraSpec, paths: Collection[str]
) -> tuple[list[str], list[str]]:
    """(those that are target_modules, the parameters that are target_parameters) of an adapter's
    places, as PEFT finds them in this model."""
    # the bank's own: a trainer that wraps the model puts parts of its own into the paths of its modules
    found, fused = get_bank(model).modules, holds_experts(model)
    # PEFT has none of these at parameters
    allowed = not (spec.lora_dropout or spec.use_dora or spec.lora_bias)
    parameters = {
        path: path if isinstance(found[path], ExpertMatrices) else f"{path}.weight"
        for path in paths
        if isinstance(found[path], ExpertMatrices | ForeignWeight)
        or (fused and allowed and path.rpartition(".")[2] in MISTAKEN_LEAVES)
    }
    return [p for p in paths if p not in parameters], _shorten(model, list(parameters.values()))


def holds_experts(model: nn.Module) -> bool:
    """Whether a model has fused experts."""
    return any(isinstance(layer, ExpertMatrices) for layer in find_adaptable(model).values())


def _shorten(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The ends of parameter names, behind the layer's number, where they select exactly these."""
    ends = list(dict.fromkeys(LAYER_NUMBER.split(name)[-1] for name in names))
    selected = {
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if any(name == end or name.endswith(f".{end}") for end in ends)
    }
    return ends if selected == set(names) else list(names)


def match_peft_parameters(spec: LoraSpec, layers: Mapping[str, AdaptableLayer]) -> set[str]:
    """The places whose parameter a file's `target_parameters` name, by PEFT's rules."""
    wanted = spec.target_parameters or ()
    tensors = {
        path: path if isinstance(layer, ExpertMatrices) else f"{path}.weight"
        for path, layer in layers.items()
    }
    return {
        path
        for path, tensor in tensors.items()
        if any(tensor == name or tensor.endswith(f".{name}") for name in wanted)
    }


def name_patterns(spec: LoraSpec, names: Mapping[str, str]) -> LoraSpec:
    """The spec with the same rank and alpha at names of one's own: ``names`` {what `rank_pattern` and
    `alpha_pattern` are to match: what they match in ``spec``}. PEFT reads them by the name of a
    parameter (`gate.weight`), Lorry by the module's (`gate`).
    """
    ranks = {n: spec.rank(old) for n, old in names.items() if spec.rank(n) != spec.rank(old)}
    alphas = {n: spec.alpha(old) for n, old in names.items() if spec.alpha(n) != spec.alpha(old)}
    # the first that matches counts
    return replace(
        spec,
        rank_pattern={**ranks, **spec.rank_pattern},
        alpha_pattern={**alphas, **spec.alpha_pattern},
    )


@dataclass(frozen=True)
class _JoinedTensor:
    """The tensors of single experts as the one of all of them. ``parts``: [of gate and of up, or the
    one][expert], as (name in the file, factor)."""

    file: TensorFile
    side: str
    parts: Sequence[Sequence[tuple[str, float]]]

    @cached_property
    def shapes(self) -> list[list[int]]:
        """Of each part, alike for all experts. Raises ModelError where they are not."""
        shapes = []
        for part in self.parts:
            first, *others = (list(self.file.get_slice(name).get_shape()) for name, _ in part)
            for (name, _), other in zip(part[1:], others, strict=True):
                if other != first:
                    raise ModelError(
                        f"{name} is {other}, and that of another expert {first}; experts of different "
                        "ranks cannot be one adapter of all of them"
                    )
            if len(first) != 2:
                raise ModelError(f"{part[0][0]} is {first}; it must be a matrix")
            shapes.append(first)
        return shapes

    @property
    def rank(self) -> int:
        """Of gate and up together."""
        return sum(shape[0 if self.side == "A" else 1] for shape in self.shapes)

    def get_shape(self) -> list[int]:
        rows, columns = zip(*self.shapes, strict=True)
        experts = len(self.parts[0])
        if self.side == "A":  # what both read is the same
            return [experts * sum(rows), columns[0]]
        return [sum(rows), experts * sum(columns)]

    def get_tensor(self) -> Tensor:
        """A [E r, in], rows (expert, rank), or B [out, r E], columns (rank, expert): gate's rank and
        up's are apart, so B_e has two blocks."""
        experts = range(len(self.parts[0]))
        of_expert = [
            [self.file.get_tensor(name).float() * factor for name, factor in part]
            for part in self.parts
        ]
        if self.side == "A":
            return torch.cat([part[e] for e in experts for part in of_expert])
        blocks = [torch.block_diag(*(part[e] for part in of_expert)) for e in experts]
        return torch.stack(blocks, dim=-1).flatten(1)


@dataclass(frozen=True)
class JoinedFile:
    """A file with linears of single experts, as if it held those of all: PEFT's current layout."""

    file: TensorFile
    joined: Mapping[str, _JoinedTensor]
    left: Sequence[str]

    def keys(self) -> list[str]:
        return [*self.left, *self.joined]

    def get_slice(self, name: str) -> Any:
        return self.joined[name] if name in self.joined else self.file.get_slice(name)

    def get_tensor(self, name: str) -> Tensor:
        if name in self.joined:
            return self.joined[name].get_tensor()
        return self.file.get_tensor(name)


def join_single_experts(
    file: TensorFile,
    prefix: str,
    spec: LoraSpec,
    layers: Mapping[str, AdaptableLayer],
    where: str,
) -> tuple[TensorFile, LoraSpec]:
    """The file and its settings as PEFT writes them today; both as they are where it has no tensors
    of single experts. Raises ModelError where some of them are missing or not named."""
    found = dict[tuple[str, str], dict[str, str]]()  # (holder here, leaf): {expert and side: key}
    modules, left = dict[str, str](), list[str]()
    for key in file.keys():  # noqa: SIM118 (not a mapping)
        match = UNFUSED_TENSOR.fullmatch(key.removeprefix(prefix))
        holder = None if match is None else _holder_here(layers, match["holder"], match["leaf"])
        if match is None or holder is None or match["module"] in layers:
            left.append(key)
            continue
        place = f"{int(match['expert'])}.{match['side']}"
        found.setdefault((holder, match["leaf"]), {})[place] = key
        modules[f"{holder}.{int(match['expert'])}.{match['leaf']}"] = match["module"]
    if not found:
        return file, spec
    old = any(here != module for here, module in modules.items())
    joined, ranks, alphas = dict[str, _JoinedTensor](), dict[str, int](), dict[str, float]()
    places = {p: m for p, m in layers.items() if isinstance(m, ExpertMatrices)}
    spellings = {path: _spelling(path, layer, found) for path, layer in places.items()}
    singles = {
        path: [
            [_file_path(path, e, leaf, old) for e in range(places[path].num_experts)]
            for leaf in spelling
        ]
        for path, spelling in spellings.items()
    }
    every = [name for leaves in singles.values() for leaf in leaves for name in leaf]
    check_pattern_time(spec, every, where)
    named = match_peft_targets(spec, every, every)
    for path, layer in places.items():
        holder = path.rpartition(".")[0]
        names = [name for leaf in singles[path] for name in leaf]
        keys = [found.get((holder, leaf), {}) for leaf in spellings[path]]
        if not any(keys) and not named.intersection(names):
            continue
        if missing := [name for name in names if name not in named]:
            raise ModelError(f"{where}: does not name {missing[0]} as a target, but others like it")
        scales = [spec.scale(leaf[0]) for leaf in singles[path]]
        for side in "AB":
            parts = []
            for leaf_keys, leaf, scale in zip(keys, singles[path], scales, strict=True):
                part = [leaf_keys.get(f"{e}.{side}") for e in range(layer.num_experts)]
                if None in part or len(leaf_keys) != 2 * layer.num_experts:
                    lost = leaf[part.index(None)] if None in part else leaf[0]
                    raise ModelError(
                        f"{where}: the tensors of its experts are not complete: lora_{side} of {lost}, of "
                        f"{layer.num_experts} experts"
                    )
                factor = scale / scales[0] if side == "B" else 1.0
                parts.append([(name, factor) for name in part if name is not None])
            joined[f"{path}.lora_{side}"] = _JoinedTensor(file, side, parts)
        rank = joined[f"{path}.lora_A"].rank
        # one scale for gate and up together: that of the first, which the second's B has been given
        ranks[path] = rank
        alphas[path] = scales[0] * (math.sqrt(rank) if spec.use_rslora else rank)
    modules_of = tensor_modules(list(ranks), layers)
    named_keys = {
        f"{prefix}{modules_of[path]}.lora_{side}.weight": joined[f"{path}.lora_{side}"]
        for path in ranks
        for side in "AB"
    }
    return JoinedFile(file, named_keys, left), replace(
        spec,
        target_parameters=(*(spec.target_parameters or ()), *ranks),
        rank_pattern={**_by_end(ranks), **spec.rank_pattern},
        alpha_pattern={**_by_end(alphas), **spec.alpha_pattern},
    )


def _holder_here(layers: Mapping[str, AdaptableLayer], holder: str, leaf: str) -> str | None:
    """The module that holds the tensor of which a file's linear of a single expert is a part; None
    where the model has none."""
    fused = [f for f, ways in UNFUSED_NAMES.items() if any(leaf in way for way in ways)]
    for name in (holder, holder.replace(OLD_HOLDER, NEW_HOLDER)):
        if any(isinstance(layers.get(f"{name}.{f}"), ExpertMatrices) for f in fused):
            return name
    return None


def _spelling(
    path: str, layer: ExpertMatrices, found: Collection[tuple[str, str]]
) -> tuple[str, ...]:
    """The names that a tensor's parts have in a file: those that it uses anywhere."""
    used = {leaf for _, leaf in found}
    ways = UNFUSED_NAMES.get(layer.leaf, ())
    return next((way for way in ways if used.intersection(way)), ways[0] if ways else ())


def _file_path(path: str, expert: int, leaf: str, old: bool) -> str:
    """What a file calls the linear of one expert."""
    holder = path.rpartition(".")[0]
    return f"{holder.replace(NEW_HOLDER, OLD_HOLDER) if old else holder}.{expert}.{leaf}"


def _by_end(values: Mapping[str, Number]) -> dict[str, Number]:
    """Numbers by path, or by the end of the path where all that end so have the same."""
    ends = dict[str, set[Number]]()
    for path, value in values.items():
        ends.setdefault(".".join(path.split(".")[-2:]), set()).add(value)
    if all(len(each) == 1 for each in ends.values()):
        return {end: next(iter(each)) for end, each in ends.items()}
    return dict(values)
