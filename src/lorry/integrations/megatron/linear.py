"""Low-rank terms on one of Megatron-core's parallel linears, in place: the linear stays the object it
is, with its weight under its own name, and gains parameters `lora_A`, `lora_B` (of a projection among
several `lora_A_q`, `lora_B_q` ...) and a forward that adds s B (A x).

Where ranks have to add up, they do so on A x, which is as wide as the rank, never on x:

    column-parallel  A is whole, B is cut.  backward: the gradient of A x is summed over ranks;
                     under sequence parallel A sees this rank's tokens, and A x is gathered
    row-parallel     A is cut, B is whole.  forward: A x is summed over ranks; under sequence parallel
                     summed and scattered

What is whole is the same on every rank. Under sequence parallel its gradient is a part of a sum,
which Megatron forms for parameters marked `sequence_parallel`. Values are fp32 masters whatever the
model computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.nn.functional import linear as matrix_product

from lorry.adapters.dropout import DropoutNoise, SeededDropout
from lorry.adapters.tensor_parallel.slices import DimensionSlice
from lorry.errors import ConfigError, ContractError
from lorry.models.megatron.layout import (
    MegatronLinear,
    Parallel,
    RowOrder,
    Side,
    cut,
    shard_dim,
)

# by name: Transformer Engine's are known without importing it, and only the exact classes count, as a
# subclass computes something else
PARALLEL_CLASSES: dict[str, Parallel | None] = {
    "ColumnParallelLinear": "column",
    "RowParallelLinear": "row",
    "TEColumnParallelLinear": "column",
    "TELayerNormColumnParallelLinear": "column",
    "TERowParallelLinear": "row",
    "TELinear": None,  # its parallel_mode says
}
SIDES: tuple[Side, ...] = ("A", "B")
# its norm is inside: what A has to see is neither its input nor its output
NORMED_INSIDE = "TELayerNormColumnParallelLinear"


@dataclass(frozen=True)
class LoraTerm:
    """One low-rank pair of a linear. ``targets``: the projections it stands for, one in canonical mode,
    all of the linear's in fused mode; ``suffix``: of its parameters' names."""

    targets: tuple[str, ...]
    rank: int
    scale: float
    suffix: str = ""

    def parameter(self, side: Side) -> str:
        """`lora_A_q`."""
        return f"lora_{side}{self.suffix}"


@dataclass
class DropoutClock:
    """What names the dropout masks of the micro-batch that a chunk runs: ``seed``, ``step``, and how many
    micro-batches of the step came before it."""

    seed: int
    step: int = 0
    micro_batch: int = -1

    def set_step(self, step: int) -> None:
        """Begin a step; its first micro-batch is number 0."""
        self.step, self.micro_batch = step, -1


@dataclass
class LoraTerms:
    """The terms of one linear. ``place``: which of the four; ``layer``: its number in the whole model;
    ``order``: of its rows on this rank; ``enabled``: off for a reference model."""

    place: MegatronLinear
    layer: int
    terms: tuple[LoraTerm, ...]
    order: RowOrder
    sequence_parallel: bool
    normed_inside: bool
    dropout: float
    clock: DropoutClock
    group: Any = field(repr=False)
    enabled: bool = True

    @property
    def site(self) -> str:
        """The name of the input for dropout, as Lorry's own decoder has it."""
        return f"{self.layer}.{self.place.site}"


class LoraParallelLinear(nn.Module):
    """A parallel linear with low-rank terms; mixed into the linear's own class by `add_terms`."""

    lora: LoraTerms

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The linear's own (output, bias), the terms added to the output. x [sequence, batch, in]."""
        returned = super().forward(x, *args, **kwargs)
        if self.lora.normed_inside:
            output, bias, x = _unpack_normed(returned)
        else:
            output, bias = returned
        if not self.lora.enabled:
            if torch.is_grad_enabled():
                # a recompute in backward would see another state than its forward did
                raise ContractError(
                    "adapters are switched off for a pass with gradients; "
                    "disable_lora is for scoring under torch.no_grad()"
                )
            return output, bias
        return output + self.lora_output(x), bias

    def lora_output(self, x: Tensor) -> Tensor:
        """s B (A x) of every term, in the order of the linear's rows."""
        lora = self.lora
        # one product and one collective for all projections that read x
        whole_a = torch.cat([getattr(self, t.parameter("A")) for t in lora.terms])
        hidden = _across_ranks(matrix_product(self._drop(x), whole_a.to(x.dtype)), lora)
        outputs: list[Tensor | None] = [None] * len(lora.place.targets)
        parts = hidden.split([term.rank for term in lora.terms], -1)
        for term, part in zip(lora.terms, parts, strict=True):
            b = getattr(self, term.parameter("B")).to(x.dtype)
            output = matrix_product(part * term.scale, b)
            if len(term.targets) == len(lora.place.targets):
                return output
            outputs[lora.place.targets.index(term.targets[0])] = output
        # a projection without an adapter
        filled = [
            hidden.new_zeros(*hidden.shape[:-1], lora.order.groups * size) if out is None else out
            for out, size in zip(outputs, lora.order.sizes, strict=True)
        ]
        return lora.order.fuse(filled, -1)

    def _drop(self, x: Tensor) -> Tensor:
        lora = self.lora
        if not (lora.dropout and self.training):
            return x
        rows = x.transpose(0, 1)
        dropped = _dropout(lora, x.shape).apply(rows.flatten(0, 1), slice(None))
        return dropped.view(rows.shape).transpose(0, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves the terms with the model, but keeps them fp32: what Megatron's Float16Module does to a
        whole model would round the masters away."""
        before = {name: p.detach() for name, p in self.lora_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.lora_parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = before[name].to(parameter.device, torch.float32)
        return self

    def lora_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of every term, A before B."""
        for term in self.lora.terms:
            for side in SIDES:
                name = term.parameter(side)
                yield name, getattr(self, name)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's entries, with those of the terms: without them the parts that ranks have of a cut
        matrix would count as copies of one, and 1/TP of it would be saved."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        base: Any = super()
        entries: dict[str, Any] = base.sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in list(entries):
            # counted as copies, and stacked with those of other layers, which may have none
            if name.startswith(f"{prefix}lora_"):
                del entries[name]
        for term in self.lora.terms:
            for side in SIDES:
                name = term.parameter(side)
                entries[prefix + name] = self._sharded_entry(term, side, prefix, metadata)
        return entries

    def _sharded_entry(
        self, term: LoraTerm, side: Side, prefix: str, metadata: dict[str, Any]
    ) -> Any:
        """The entry of one matrix, by its layer's number: layers may differ in rank, or have none."""
        lora, name = self.lora, term.parameter(side)
        key = f"{name}.layer_{lora.layer}"
        dim = shard_dim(lora.place.parallel, side)
        (entry,) = make_sharded_tensors_for_checkpoint(
            {key: getattr(self, name)},
            prefix,
            {} if dim is None else {key: dim},
            tp_group=lora.group,
            dp_cp_group=metadata["dp_cp_group"],
        ).values()
        if side == "B" and lora.place.name == "linear_fc1" and len(term.targets) > 1:
            # rows [gate_i; up_i]: a rank's part is two pieces of the whole
            single = metadata.get("singleton_local_shards", False)
            return apply_swiglu_sharded_factory(entry, (), single)
        return entry


def check_linear(linear: nn.Module, place: MegatronLinear, where: str) -> None:
    """Raises ConfigError for a linear of a class that adapters do not know, one that is cut otherwise
    than its place says, or one with a setting under which the terms would be wrong."""
    name = type(linear).__name__
    if name not in PARALLEL_CLASSES:
        raise ConfigError(
            f"{where} is a {name}; adapters sit on {', '.join(PARALLEL_CLASSES)} (exactly these)"
        )
    for attribute, value, what in (
        ("gather_output", True, "gathers its output"),
        ("input_is_parallel", False, "cuts its input itself"),
        ("disable_grad_reduce", True, "leaves the gradient of its input unsummed"),
        ("explicit_expert_comm", True, "is an expert's"),
        ("return_layernorm_output_gathered", True, "returns the normed input of all ranks"),
    ):
        if getattr(linear, attribute, None) is value:
            raise ConfigError(f"{where} has {attribute}={value} ({what}): not supported")
    parallel = PARALLEL_CLASSES[name] or getattr(linear, "parallel_mode", None)
    if parallel != place.parallel and tensor_group(linear).size() > 1:
        raise ConfigError(
            f"{where} is a {name} that is cut by {parallel or 'nothing'}; {place.name} is cut by "
            f"{place.parallel}"
        )


def tensor_group(linear: nn.Module) -> Any:
    """The process group over which a linear is cut: `tp_group` of Megatron's own, `_tp_group` of
    Transformer Engine's."""
    for name in ("_tp_group", "tp_group"):
        if (group := getattr(linear, name, None)) is not None:
            return group
    return parallel_state.get_tensor_model_parallel_group()


_ADAPTED_CLASSES = dict[type[nn.Module], type[nn.Module]]()


def add_terms(
    linear: nn.Module, lora: LoraTerms, values: Sequence[tuple[Tensor, Tensor]]
) -> LoraParallelLinear:
    """Give a linear its terms; ``values``: the whole A [r, in] and B [out, r] of each, B in the order of
    Hugging Face's rows, one projection after the other. Returns the same object, of a class of ours."""
    size, rank = lora.group.size(), lora.group.rank()
    weight = linear.get_parameter("weight")
    kind = type(linear)
    if kind not in _ADAPTED_CLASSES:
        # the linear's own class with the terms mixed in
        _ADAPTED_CLASSES[kind] = type(f"Lora{kind.__name__}", (LoraParallelLinear, kind), {})
    linear.__class__ = _ADAPTED_CLASSES[kind]
    assert isinstance(linear, LoraParallelLinear)
    linear.lora = lora
    if lora.normed_inside:
        linear.return_layernorm_output = True  # type: ignore[assignment]
    for term, (a, b) in zip(lora.terms, values, strict=True):
        local = local_values(lora, term, a, b, rank, size)
        for side, value in zip(SIDES, local, strict=True):
            parameter = nn.Parameter(value.to(weight.device, torch.float32).clone())
            _mark(parameter, lora, side)
            linear.register_parameter(term.parameter(side), parameter)
    return linear


def local_values(
    lora: LoraTerms, term: LoraTerm, a: Tensor, b: Tensor, rank: int, size: int
) -> tuple[Tensor, Tensor]:
    """What this rank has of a term's whole A and B."""
    a = cut(a, shard_dim(lora.place.parallel, "A"), rank, size)
    dim = shard_dim(lora.place.parallel, "B")
    if len(term.targets) == 1:
        return a, cut(b, dim, rank, size)
    # a fused B: each projection's rows are cut, and laid out as the weight's are
    shards = size if dim is not None else 1
    whole = b.split([lora.order.groups * rows * shards for rows in lora.order.sizes])
    return a, lora.order.fuse([cut(part, dim, rank, size) for part in whole])


def _mark(parameter: nn.Parameter, lora: LoraTerms, side: Side) -> None:
    """Megatron's marks: gradient norms count what is cut on every rank and what is whole on one; what
    is whole is summed over the ranks of sequence parallel."""
    dim = shard_dim(lora.place.parallel, side)
    set_tensor_model_parallel_attributes(parameter, dim is not None, -1 if dim is None else dim, 1)
    marked: Any = parameter
    marked.sequence_parallel = lora.sequence_parallel and dim is None
    marked.allreduce = True


def _across_ranks(hidden: Tensor, lora: LoraTerms) -> Tensor:
    """A x as every B has to see it: of all tokens and of the whole input."""
    # Megatron's all-reduce sums a copy of what is not contiguous, and returns what it was given
    hidden = hidden.contiguous()
    if lora.place.parallel == "column":
        if lora.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=lora.group)
        return copy_to_tensor_model_parallel_region(hidden, group=lora.group)
    if lora.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(hidden, group=lora.group)
    return reduce_from_tensor_model_parallel_region(hidden, group=lora.group)


def _unpack_normed(returned: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """(output, bias, normed input) of a linear with its norm inside: Transformer Engine appends the
    normed input to what it returns, and Megatron adds a bias of None where there is none."""
    first, *rest = returned
    if isinstance(first, tuple):
        output, normed = first
        return output, rest[0], normed
    bias, normed = rest
    return first, bias, normed


def _dropout(lora: LoraTerms, shape: torch.Size) -> SeededDropout:
    """The dropout of this rank's part of an input [sequence, batch, in], rows taken sequence by sequence.
    Masks are named by (seed, step, micro-batch, sequence, place) alone: so tensor and pipeline
    parallel sizes do not matter."""
    tokens, batch, width = shape
    size, rank = lora.group.size(), lora.group.rank()
    by_columns = lora.place.parallel == "row"
    # sequence parallel cuts the input of a column-parallel linear by tokens
    by_tokens = lora.sequence_parallel and not by_columns
    length, first = (tokens * size, rank * tokens) if by_tokens else (tokens, 0)
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    keys = tuple(
        (replica << 40) + (lora.clock.micro_batch << 16) + sequence for sequence in range(batch)
    )
    starts = tuple(length * sequence for sequence in range(batch + 1))
    rows = torch.arange(first, first + tokens).repeat(batch)
    rows += torch.arange(batch).repeat_interleave(tokens) * length
    noise = DropoutNoise(lora.clock.seed, lora.clock.step, keys, starts, rows)
    columns = DimensionSlice(width * size, size, rank) if by_columns and size > 1 else None
    dropout = noise.at(lora.site, lora.dropout, columns)
    assert dropout is not None  # DropoutNoise always has one
    return dropout
