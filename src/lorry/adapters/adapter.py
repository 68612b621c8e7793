"""One named adapter: its masters in one flat fp32 buffer, their gradients in another of the same shape.

Layout of the buffer: every A, then every B, in module order, then what a variant has besides
(`variants.parameters`). So clipping, stepping, saving and reducing an adapter are operations on one
tensor, and A and B are one contiguous range each (LoRA+ gives them different rates).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.flat_buffer import euclidean_norm, nonzero_somewhere
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.mix import Mix
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.tensor_parallel.slices import SIDES, DimensionSlice, LayerSlices, Side
from lorry.adapters.variants.parameters import FurtherParameter
from lorry.errors import ConfigError, ContractError, describe_value

# not only dots: "." and ".." are folders already; 64 characters fit every file system beside a
# suffix
NAME_PATTERN = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,64}")


def check_adapter_name(name: str) -> str:
    """The name, if it can be that of an adapter and of its folder. Raises ConfigError."""
    if not isinstance(name, str):
        raise ConfigError(
            f"an adapter's name is a text such as 'default', got {describe_value(name)}"
        )
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"adapter name {name!r:.80}: use 1 to 64 letters, digits, dots, dashes or underscores"
        )
    return name


@dataclass
class Adapter:
    """One named adapter. buffer: [P] fp32, or None of an expert whose masters lie among those of
    others (`routing.stacking.stack_masters`); grads: the same, or empty of one that is frozen; split: where
    the B half starts; slots: module path -> AdapterSlot; further: what lies behind the B's, by canonical
    name; initial: [P] fp32, the frozen values of which every slot takes the product off
    (`AdapterSlot.initial`), or None; sides: the halves in the buffer; held: [F] fp32, where the other one
    is, of an adapter of which one half trains (`LoraSpec.train`).
    """

    name: str
    spec: LoraSpec
    buffer: Tensor | None = field(repr=False)
    grads: Tensor = field(repr=False)
    split: int = field(repr=False)
    slots: dict[str, AdapterSlot] = field(default_factory=dict, repr=False)
    further: dict[str, FurtherParameter] = field(default_factory=dict, repr=False)
    initial: Tensor | None = field(default=None, repr=False)
    sides: tuple[Side, ...] = SIDES
    held: Tensor | None = field(default=None, repr=False)
    # ``grads``, and the views of it that are the masters' gradients, each with its address
    bound: tuple[Tensor, list[tuple[Tensor, int]]] | None = field(default=None, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        """A copy whose masters are views of its own buffers, as the original's are of its."""
        buffer = None if self.buffer is None else self.buffer.detach().clone()
        grads = self.grads.detach().clone()
        # the copied masters have memory of their own until the loop below points them into `buffer`
        twin = Adapter(self.name, self.spec, buffer, grads, self.split, deepcopy(self.slots, memo))
        twin.sides = self.sides
        twin.further = deepcopy(self.further, memo)
        memo[id(self)] = twin
        # not new ones: whoever was copied along (an optimizer) refers to these objects
        if buffer is not None:
            twin.use_buffers(buffer, grads)
        if self.initial is not None:
            twin.use_initial(self.initial.clone())
        if self.held is not None:
            twin.use_held(self.held.clone())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without the views of the gradients, each of which would be pickled with all of the buffer."""
        return {**self.__dict__, "bound": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickled one, whose masters come apart from its buffers: views of those again."""
        self.__dict__.update(state)
        if self.buffer is not None:
            self.use_buffers(self.buffer, self.grads)
        if self.initial is not None:
            self.use_initial(self.initial)
        if self.held is not None:
            self.use_held(self.held)

    @property
    def values(self) -> Tensor:
        """[P] fp32, every value in one piece. Raises ContractError for an expert that has none: a copy
        would take writes that nobody reads."""
        if self.buffer is None:
            raise ContractError(
                f"{self.label} is frozen in a mixture, and its values are in no piece of their own; "
                "read `tensors()`"
            )
        return self.buffer

    @property
    def kind(self) -> str:
        """Of its tensors in a checkpoint."""
        return "adapter"

    @property
    def label(self) -> str:
        """For messages."""
        return f"adapter {self.name!r}"

    def mix(self) -> Mix:
        """One term, g = 1."""
        return Mix.one(self.name)

    @property
    def drops(self) -> bool:
        """Whether it draws dropout masks."""
        return bool(self.spec.lora_dropout)

    @property
    def start_digest(self) -> None:
        """The base stays as it is."""
        return None

    def num_parameters(self) -> int:
        """How many numbers train, on all ranks that share its modules."""
        low_rank = sum(
            math.prod(slot.whole_shape(side)) for slot in self.slots.values() for side in self.sides
        )
        return low_rank + sum(one.num_parameters() for one in self.further.values())

    def ranges(self) -> list[tuple[slice, bool, bool]]:
        """Every A, then every B, which may have a rate of its own (LoRA+); both decay. Then what is
        further."""
        end = self.split
        if "B" in self.sides:
            end += sum(slot.B.numel() for slot in self.slots.values())
        parts = [(slice(0, self.split), False, True), (slice(self.split, end), True, True)]
        for one in self.further.values():
            here = slice(end, end := end + one.param.numel())
            if parts[-1][1:] == (False, one.decays) and parts[-1][0].stop == here.start:
                parts[-1] = (slice(parts[-1][0].start, here.stop), False, one.decays)
            else:
                parts.append((here, False, one.decays))
        # an embedding or linear has both halves; an adapter without modules has neither
        return [part for part in parts if part[0].start < part[0].stop]

    def targets(self) -> list[str]:
        """The modules it sits on, and others that it has a parameter of."""
        return list(self._names_by_module())

    def _names_by_module(self) -> dict[str, list[str]]:
        """{path: the canonical names of what it has there}."""
        names = {module: [f"{module}.lora_{side}" for side in self.sides] for module in self.slots}
        for name, one in self.further.items():
            names.setdefault(one.module, []).append(name)
        return names

    def masters(self) -> dict[str, Tensor]:
        """{`MODULE.lora_A`: its parameter, ...}, module by module, then what is further."""
        low_rank = {
            f"{module}.lora_{side}": getattr(slot, side)
            for module, slot in self.slots.items()
            for side in self.sides
        }
        return low_rank | {name: one.param for name, one in self.further.items()}

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """None: the base is frozen."""
        return {}

    def wanting_gradients(self) -> set[str]:
        """The masters that train."""
        return {name for name, param in self.masters().items() if param.requires_grad}

    def norm(self) -> float:
        """Euclidean norm of the whole gradient (inf or nan if any entry is)."""
        if self.ranks is not None:
            return math.sqrt(self.dot(self.grads, self.grads))
        return euclidean_norm(self.grads)

    def dot(self, a: Tensor, b: Tensor) -> float:
        """The inner product of two [P] tensors, in float64: both are sums over millions of products."""
        if self.ranks is None:
            return float(torch.dot(a.double(), b.double()))
        # a side that every rank has counts once
        own = [
            torch.dot(x.flatten().double(), y.flatten().double())
            for (name, x), y in zip(
                self.split_like(a).items(), self.split_like(b).values(), strict=True
            )
            if self.ranks.rank == 0 or self._slice_of(name) is not None
        ]
        return float(self.ranks.add_up(torch.stack(own).sum().reshape(1)))

    def zero_grad_names(self) -> list[str]:
        """The ``targets`` of which nothing has a gradient other than exactly zero."""
        modules = self._names_by_module()
        first = nonzero_somewhere(self.grads, [param.numel() for param in self.parameters()])
        moved = {name for name, one in zip(self._names(), first, strict=True) if one}
        seen = [not moved.isdisjoint(names) for names in modules.values()]
        if not all(seen):
            # nearly always the first values tell; all of them are read where they do not
            grads = self.split_like(self.grads)
            seen = [
                one or any(bool(grads[name].any()) for name in names)
                for one, names in zip(seen, modules.values(), strict=True)
            ]
        if self.ranks is not None:
            # a slice of a matrix may be zero on one rank alone
            counts = torch.tensor(seen, dtype=torch.int32, device=self.grads.device)
            seen = self.ranks.add_up(counts).bool().tolist()
        return [module for module, one in zip(modules, seen, strict=True) if not one]

    # --- of one whose modules ranks share (tensor parallel)

    @property
    def ranks(self) -> TensorRanks | None:
        """Those that share its modules, each with a part of the masters; None of one device."""
        slices = next((slot.slices for slot in self.slots.values()), None)
        return None if slices is None else slices.ranks

    @property
    def shard(self) -> None:
        """An adapter is never cut over data ranks."""
        return None

    def partial_sums(self) -> list[str]:
        """The tensors whose gradient has a part from every rank: those that each has whole, unless
        the terms there sum over ranks themselves."""
        return [name for name in self._names() if self._is_partial_sum(name)]

    def whole_tensors(self, flat: Tensor) -> dict[str, Tensor]:
        """`split_like` as one device has it: where ranks share the modules, their parts joined, and
        what each has whole as this one has it."""
        own = self.split_like(flat)
        if self.ranks is None:
            return own
        sizes = [self._sizes_on(rank) for rank in range(self.ranks.size)]
        longest = max(sum(torch.Size(s).numel() for s in each.values()) for each in sizes)
        # every rank sends as much, also where one has a row of the vocabulary more
        sent = F.pad(flat.detach(), (0, longest - flat.numel()))
        parts = [
            _split(part, shapes)
            for part, shapes in zip(self.ranks.gather(sent), sizes, strict=True)
        ]
        return {
            name: view if cut is None else cut[1].join([part[name] for part in parts], cut[0])
            for name, view, cut in ((n, v, self._slice_of(n)) for n, v in own.items())
        }

    def _sizes_on(self, rank: int) -> dict[str, list[int]]:
        """The shapes of what a rank has, in the order of `_names`."""
        shapes = dict[str, list[int]]()
        for name, param in zip(self._names(), self.parameters(), strict=True):
            shapes[name], cut = list(param.shape), self._slice_of(name)
            if cut is not None:
                shapes[name][cut[0]] = cut[1].of(rank).size
        return shapes

    def master_norms(self, gradients: Sequence[Tensor | None]) -> list[float]:
        """L2 norm, in float64, of each master's gradient, both in the order of `masters`: as autograd
        gives them to this process, 0 of None. All ranks that share the modules call this together."""
        if self.ranks is None:
            return [0.0 if g is None else float(g.double().norm()) for g in gradients]
        masters = self.masters()
        own = [
            (torch.zeros_like(master) if g is None else g).double()
            for master, g in zip(masters.values(), gradients, strict=True)
        ]
        is_sum = [self._is_partial_sum(name) for name in masters]
        is_whole = [self._slice_of(name) is None for name in masters]
        if parts := [g for g, partial in zip(own, is_sum, strict=True) if partial]:
            sums = self.ranks.add_up(torch.cat([part.flatten() for part in parts]))
            for part, total in zip(parts, sums.split([p.numel() for p in parts]), strict=True):
                part.copy_(total.view(part.shape))
        squares = torch.stack([g.square().sum() for g in own])
        if self.ranks.rank:  # a side that every rank has counts once
            squares.masked_fill_(torch.tensor(is_whole, device=squares.device), 0)
        norms: list[float] = self.ranks.add_up(squares).sqrt().tolist()
        return norms

    def whole_factors(self) -> dict[str, Tensor]:
        """All that the adapter adds, by the names of `tensors`, with `AdapterSlot.factors` as one device
        has them; all ranks that share the modules call this together."""
        if self.ranks is None:
            whole = self.tensors()
        else:
            flat = self.buffer
            if flat is None:  # of an expert, frozen in a mixture
                flat = torch.cat([param.detach().flatten() for param in self.parameters()])
            whole = self.whole_tensors(flat)
        if self.initial is not None:
            assert self.ranks is None, self.label
            for module, slot in self.slots.items():
                whole[f"{module}.lora_A"], whole[f"{module}.lora_B"] = slot.factors()
        return whole

    @property
    def plain_spec(self) -> LoraSpec:
        """The spec of what `whole_factors` gives, which is plain LoRA over the base as it is."""
        return self.spec if self.initial is None else self.spec.with_doubled_rank()

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """Of a whole tensor by its canonical name what this rank has of it."""
        cut = self._slice_of(name)
        return whole if cut is None else cut[1].cut(whole, cut[0])

    def _is_partial_sum(self, name: str) -> bool:
        if name in self.further:
            return self.further[name].partial
        slices = self._slices_at(name)
        return slices is not None and self._slice_of(name) is None and not slices.sums_ranks

    def _slices_at(self, name: str) -> LayerSlices | None:
        """How the module of a tensor is cut."""
        return self.slots[name.rpartition(".lora_")[0]].slices

    def _slice_of(self, name: str) -> tuple[int, DimensionSlice] | None:
        """Along which dimension a tensor is cut, and how."""
        if name in self.further:
            return self.further[name].cut
        side, slices = name.rpartition(".lora_")[2], self._slices_at(name)
        return None if slices is None else slices.of("A" if side == "A" else "B")

    def bind_grads(self) -> None:
        """Point every master's .grad into the flat gradient buffer, so that autograd accumulates
        there. A frozen adapter has no buffer, and nothing to point to.
        """
        params = self.parameters()
        if self.grads.numel() < sum(param.numel() for param in params):
            return
        known = self.bound
        # a view may hold other memory by now, where somebody has set its .data
        if (
            known is None
            or known[0] is not self.grads
            or any(view.data_ptr() != at for view, at in known[1])
        ):
            views = [view for _, view in self._views(self.grads)]
            known = self.bound = (self.grads, [(view, view.data_ptr()) for view in views])
        for param, (view, _) in zip(params, known[1], strict=True):
            # autograd adds in place to a .grad that exists, so the flat buffer is always the
            # gradient
            if param.grad is not view:
                param.grad = view

    def use_buffers(self, values: Tensor, grads: Tensor) -> None:
        """Let the masters be views of ``values`` [P], a copy of what they are, and their gradients
        of ``grads`` (empty of one in the base)."""
        self.buffer, self.grads = values, grads
        # .data: the parameters stay the objects that others hold
        for param, view in self._views(values):
            param.data = view
        self.bind_grads()
        self.watch_buffers()

    def use_held(self, held: Tensor) -> None:
        """Let the half that does not train be views of ``held`` [F], a copy of what it is."""
        self.held = held
        masters = self.held_masters()
        for param, part in zip(
            masters.values(), held.split([p.numel() for p in masters.values()]), strict=True
        ):
            param.data = part.view(param.shape)
        self.watch_buffers()

    def watch_buffers(self) -> None:
        """Let a write to the buffers, as a whole, count as one to every master in them."""
        buffers = tuple(one for one in (self.buffer, self.held) if one is not None)
        for slot in self.slots.values():
            slot.buffers = buffers

    def held_masters(self) -> dict[str, nn.Parameter]:
        """The half that does not train, by canonical names."""
        return {
            f"{module}.lora_{side}": getattr(slot, side)
            for side in SIDES
            if side not in self.sides
            for module, slot in self.slots.items()
        }

    def held_tensors(self) -> dict[str, Tensor]:
        """{canonical name: values} of the half that does not train."""
        return {name: param.detach() for name, param in self.held_masters().items()}

    def use_initial(self, initial: Tensor) -> None:
        """Take the scaled product of these values [P] off, at every module, from now on."""
        self.initial = initial
        views = self.split_like(initial)
        for path, slot in self.slots.items():
            slot.initial = (views[f"{path}.lora_A"], views[f"{path}.lora_B"])
            # as a reader of the saved file computes it, to the last bit
            slot.scale = self.plain_spec.scale(path)
        self.touch()

    def frozen_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it besides what trains: {kind: [P]}."""
        return {} if self.initial is None else {"adapter_initial": self.initial}

    def touch(self) -> None:
        """Say that ``values`` was written as a whole (a step, a load): every compute copy is remade
        at its next use.
        """
        for slot in self.slots.values():
            slot.touch()
        for one in self.further.values():
            one.touch()

    def versions(self) -> tuple[object, ...]:
        """Other ones whenever what the adapter computes may have changed, and for every other adapter."""
        params = [one.param for one in self.further.values()]
        tensors = [t for t in (self.buffer, self.held, self.initial, *params) if t is not None]
        return (
            *((slot.slot_id, slot.stamp()) for slot in self.slots.values()),
            *((t.data_ptr(), t._version) for t in tensors),
        )

    @contextmanager
    def held_still(self) -> Iterator[None]:
        """While the block runs nobody writes the masters without saying so (`touch`), as between the
        micro-batches of one step: what is made of them stays, whatever gradients are made. Elsewhere a
        backward pass means that an optimizer may write them next."""
        for slot in self.slots.values():
            slot.still = True
        try:
            yield
        finally:
            for slot in self.slots.values():
                slot.still = False
            self.touch()

    def tensors(self) -> dict[str, Tensor]:
        """{`MODULE.lora_A`: [R,I], `MODULE.lora_B`: [O,R], ...} views of the masters, canonical names, in
        the buffer's order."""
        moving = zip(self._names(), (p.detach() for p in self.parameters()), strict=True)
        return dict(moving) | self.held_tensors()

    def split_like(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut any [P] tensor (values, moments) into named views."""
        return {n: view for n, (_, view) in zip(self._names(), self._views(flat), strict=True)}

    def refuse_further(self, what: str, merged: str = "") -> None:
        """Raises ConfigError if it is more than low-rank terms, for ``what`` can be done with those alone.
        ``merged``: what to do with one that can be merged into the base, as one that tokens invoke cannot.
        """
        beside = [name for name, one in self.further.items() if not one.low_rank]
        if self.spec.alora_invocation_tokens:
            raise ConfigError(f"{self.label} counts from its invocation tokens on; {what}")
        if beside:
            remedy = merged and f"; {merged}"
            raise ConfigError(
                f"{self.label} has {beside[0]} beside its low-rank terms; {what}{remedy}"
            )

    def freeze(self) -> None:
        """Nothing of it trains from now on, and it holds no memory for gradients."""
        # as large as its values, and nothing would ever fill it
        self.grads, self.bound = self.grads.new_empty(0), None
        for param in self.parameters():
            param.requires_grad_(False)
            param.grad = None  # a view that would keep the buffer alive

    def _names(self) -> list[str]:
        # every A and then every B: not the order of `masters`, which goes by module
        low_rank = [f"{m}.lora_{side}" for side in self.sides for m in self.slots]
        return [*low_rank, *self.further]

    def parameters(self) -> list[nn.Parameter]:
        """The masters in the buffer, in its order."""
        low_rank = [getattr(slot, side) for side in self.sides for slot in self.slots.values()]
        return [*low_rank, *(one.param for one in self.further.values())]

    def _views(self, flat: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        params = self.parameters()
        parts = flat.split([p.numel() for p in params])
        return [(p, part.view(p.shape)) for p, part in zip(params, parts, strict=True)]


def _split(flat: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Views of these shapes, one behind the other; what is left over is nobody's."""
    counts = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = flat[: sum(counts)].split(counts)
    return {name: p.view(*shape) for (name, shape), p in zip(shapes.items(), parts, strict=True)}


@dataclass(frozen=True)
class AdapterOrigin:
    """The directory an adapter was read from, and the SHA-256 of its weights and settings."""

    path: str
    sha256: str
