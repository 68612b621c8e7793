"""Bank: the named adapters of one model, each in one flat fp32 buffer, with gradients in another of
the same shape.

Layout of an adapter's buffer: every A, then every B, in module order, then what a variant has besides
(`variants.parameters`). So clipping, stepping, saving and reducing an adapter are operations on one
tensor, and A and B are one contiguous range each (LoRA+ gives them different rates).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.flat_buffer import euclidean_norm
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.slot import AdapterSlot, CopyMemory
from lorry.adapters.mix import AdapterContext, Mix, MixtureRouter
from lorry.adapters.seeds import derive_seed
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.tensor_parallel.slices import SIDES, DimensionSlice, LayerSlices, Side
from lorry.adapters.variants.parameters import FurtherParameter, FurtherStart
from lorry.errors import ConfigError, ContractError, OutOfMemoryError

BYTES_PER_VALUE = 8  # of a master and its gradient, both float32; an optimizer adds as much again
# not only dots: "." and ".." are folders already; 64 characters fit every file system beside a
# suffix
NAME_PATTERN = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,64}")


def check_adapter_name(name: str) -> str:
    """The name, if it can be that of an adapter and of its folder. Raises ConfigError."""
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
        grads, modules = self.split_like(self.grads), self._names_by_module()
        seen = [any(bool(grads[name].any()) for name in names) for names in modules.values()]
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
        for name, param in zip(self._names(), self._params(), strict=True):
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
                flat = torch.cat([param.detach().flatten() for param in self._params()])
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
        if name in self.further:  # of what each rank has whole, each makes the whole gradient
            return False
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
        if self.grads.numel() < sum(param.numel() for param in self._params()):
            return
        for param, view in self._views(self.grads):
            # autograd adds in place to a .grad that exists, so the flat buffer is always the
            # gradient
            param.grad = view

    def use_buffers(self, values: Tensor, grads: Tensor) -> None:
        """Let the masters be views of ``values`` [P], a copy of what they are, and their gradients
        of ``grads`` (empty of one in the base)."""
        self.buffer, self.grads = values, grads
        # .data: the parameters stay the objects that others hold
        for param, view in self._views(values):
            param.data = view
        self.bind_grads()

    def use_held(self, held: Tensor) -> None:
        """Let the half that does not train be views of ``held`` [F], a copy of what it is."""
        self.held = held
        masters = self._held_masters()
        for param, part in zip(
            masters.values(), held.split([p.numel() for p in masters.values()]), strict=True
        ):
            param.data = part.view(param.shape)

    def _held_masters(self) -> dict[str, nn.Parameter]:
        """The half that does not train, by canonical names."""
        return {
            f"{module}.lora_{side}": getattr(slot, side)
            for side in SIDES
            if side not in self.sides
            for module, slot in self.slots.items()
        }

    def held_tensors(self) -> dict[str, Tensor]:
        """{canonical name: values} of the half that does not train."""
        return {name: param.detach() for name, param in self._held_masters().items()}

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
        moving = zip(self._names(), (p.detach() for p in self._params()), strict=True)
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
        self.grads = self.grads.new_empty(0)
        for param in self._params():
            param.requires_grad_(False)
            param.grad = None  # a view that would keep the buffer alive

    def _names(self) -> list[str]:
        # every A and then every B: not the order of `masters`, which goes by module
        low_rank = [f"{m}.lora_{side}" for side in self.sides for m in self.slots]
        return [*low_rank, *self.further]

    def _params(self) -> list[nn.Parameter]:
        low_rank = [getattr(slot, side) for side in self.sides for slot in self.slots.values()]
        return [*low_rank, *(one.param for one in self.further.values())]

    def _views(self, flat: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        params = self._params()
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


class AdapterBank:
    """Every adapter of a model, in the order they were added; an adapter's number in a Batch is its
    place here.

    ``base_adapters``: frozen ones that count as part of the base (`move_to_base`): their terms,
    g = 1, are under every mix, so that `Mix.none()` is the base with them. ``start``: where the last
    of these comes from, which an adapter trained over them remembers; None where there is none.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        # what gates the adapters, by name; one that trains is a `ParameterSet` too
        self.routers: dict[str, MixtureRouter] = {}
        self.base_adapters: dict[str, Adapter] = {}
        self.start: AdapterOrigin | None = None
        self.modules: dict[str, AdaptableLayer] = {}
        self.active = Mix()
        # of a plain `model(x)`; None: it drops nothing
        self.noise: DropoutNoise | None = None
        # what was active when `merge` folded it in; None while nothing is merged
        self.before_merge: Mix | None = None
        # (module, name in it, the base's parameter) where a merged adapter's own weight stands
        self.displaced: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __getitem__(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise ConfigError(
                f"no adapter named {name!r}; this model has {', '.join(self.adapters) or 'none'}"
            )
        return self.adapters[name]

    def names(self) -> list[str]:
        return list(self.adapters)

    def refuse_name(self, name: str) -> None:
        """Raises ConfigError if an adapter of this name is attached, or it could not be a folder's
        name when saved.
        """
        if check_adapter_name(name) in {**self.adapters, **self.base_adapters}:
            raise ConfigError(
                f"an adapter named {name!r} is already attached; choose another name or detach it first"
            )

    def add(
        self,
        name: str,
        spec: LoraSpec,
        targets: Mapping[str, AdaptableLayer],
        *,
        seed: int,
        trainable: bool = True,
        further: Mapping[str, FurtherStart] = MappingProxyType({}),
        from_file: bool = False,
    ) -> Adapter:
        """Create an adapter at the given modules, frozen unless it is ``trainable``, with what it has
        besides (``further``, by canonical name). A's values depend on (seed, module path) alone.
        ``from_file``: all values are about to be written, and those that the base would give are not asked for.

        Raises ConfigError if the name is taken.
        """
        self.refuse_name(name)
        ranks = {path: spec.rank(path) for path in targets}
        # A's first: the split between the halves is the number of values in them
        rows = {path: ranks[path] * module.num_experts for path, module in targets.items()}
        shapes = [(rows[p], m.in_features) for p, m in targets.items()]
        shapes += [(m.out_features, rows[p]) for p, m in targets.items()]
        sizes = [rows * columns for rows, columns in shapes]
        total = sum(sizes) + sum(start.numel for start in further.values())
        device = next(iter(targets.values())).weight.device
        if device.type == "meta":  # weights that are yet to come; an adapter's values are known
            device = torch.device("cpu")
        # before torch.zeros, which succeeds on Linux whatever is free
        refuse_too_large(name, max(ranks.values()), total, device)
        # of one that does not train at all, one buffer holds everything
        sides = spec.train if trainable else SIDES
        half = {"A": sum(sizes[: len(targets)]), "B": sum(sizes[len(targets) :])}
        held = sum(count for side, count in half.items() if side not in sides)
        values = torch.zeros(total - held, dtype=torch.float32, device=device)
        grads = torch.zeros_like(values) if trainable else values.new_empty(0)
        adapter = Adapter(name, spec, values, grads, half["A"] if "A" in sides else 0, sides=sides)
        still = values.new_zeros(held)
        adapter.held = still if held else None
        # Parameters over views of `values`: a step on the flat buffer is a step on each of them
        moving, rest = values.split([sum(sizes) - held, total - sum(sizes)])
        views = list[Tensor]()
        for side, own in (("A", sizes[: len(targets)]), ("B", sizes[len(targets) :])):
            if side in sides:
                mine, moving = moving.tensor_split([half[side]])
            else:
                mine = still
            views += mine.split(own)
        params = [nn.Parameter(view.view(shape)) for view, shape in zip(views, shapes, strict=True)]
        # of an adapter of which one half trains the other lies elsewhere
        copy_memory = CopyMemory(sum(sizes)) if sides == SIDES else None
        for (path, module), a, b in zip(
            targets.items(), params[: len(targets)], params[len(targets) :], strict=True
        ):
            slot = AdapterSlot(
                path,
                a,
                b,
                spec.scale(path),
                spec.lora_dropout,
                slices=module.slices,
                waits=bool(spec.alora_invocation_tokens),
                copy_memory=copy_memory,
            )
            adapter.slots[path] = module.slots[name] = slot
            self.modules[path] = module
            init_adapter(slot, spec, seed, embedding=isinstance(module, BankEmbedding))
        for key, start in further.items():
            mine, rest = rest.tensor_split([start.numel])
            param = nn.Parameter(mine.view(start.shape))
            slot_there = adapter.slots.get(start.module)
            if not from_file:
                param.data.copy_(start.make_values(slot_there))
            adapter.further[key] = start.parameter(param)
            start.use(param, slot_there)
        if trainable:
            for param in adapter._held_masters().values():
                param.requires_grad_(False)
            adapter.bind_grads()
        else:
            adapter.freeze()
        self.adapters[name] = adapter
        # a plain model(x) then applies all attached adapters, as their sum
        terms = (*self.active.terms, *Mix.one(name).terms)
        self.activate(replace(self.active, terms=terms))
        return adapter

    def remove(self, name: str) -> None:
        """Forget an adapter; the base is as it was before."""
        for path in self[name].slots:
            del self.modules[path].slots[name]
        for one in self[name].further.values():
            one.forget()
        del self.adapters[name]
        self.activate(self._active_without(name))

    def replace(self, name: str, spec: LoraSpec, modules: Sequence[str], *, seed: int) -> Adapter:
        """Make an adapter anew by another spec at some of its modules, in the place that it has among
        the others."""
        order, active, before = list(self.adapters), self.active, self[name]
        targets = {path: self.modules[path] for path in modules}
        self.remove(name)
        adapter = self.add(
            name, spec, targets, seed=seed, trainable=bool(before.wanting_gradients())
        )
        self.adapters = {each: self.adapters[each] for each in order}
        self.activate(active)
        return adapter

    def put_in_place(self, adapter: Adapter) -> None:
        """Put an adapter, not attached, in the place of the one of its name, whose number, and share of
        every mix, it takes over."""
        for path in self[adapter.name].slots:
            del self.modules[path].slots[adapter.name]
        for path, slot in adapter.slots.items():
            self.modules[path].slots[adapter.name] = slot
        self.adapters[adapter.name] = adapter

    def move_to_base(self, name: str, origin: AdapterOrigin) -> Adapter:
        """Freeze an adapter and make it part of the base: from now on it is under every mix with
        g = 1, without dropout and without a gradient buffer, and no longer one of the bank's names.
        Raises ConfigError if there is no such adapter."""
        adapter = self[name]
        adapter.refuse_further(
            "no other can be trained on top of it",
            "merge it into the base first (lorry merge ADAPTER output_dir=DIR), and train over model=DIR",
        )
        adapter.freeze()
        for path, slot in adapter.slots.items():
            # a policy that drops what the reference does not would not be the start at step 0
            slot.dropout = 0.0
            self.modules[path].base_terms += Mix.one(name).terms
        self.activate(self._active_without(name))
        self.base_adapters[name] = self.adapters.pop(name)
        self.start = origin
        return adapter

    def _active_without(self, name: str) -> Mix:
        """The active mix without an adapter, its router as it was: the others keep their columns."""
        terms = tuple(term for term in self.active.terms if term.adapter != name)
        return replace(self.active, terms=terms)

    def activate(self, mix: Mix) -> None:
        """Choose what a plain `model(x)`, without a mix of its own, uses."""
        for term in mix.terms:
            # looked up for its ConfigError alone: an unknown name must fail before anything changes
            self[term.adapter]
        self.active = mix
        for module in self.modules.values():
            module.default = AdapterContext(mix, self.noise)

    def to(self, device: torch.device) -> None:
        """Move every adapter's buffers; slots keep their identity."""
        for adapter in (*self.base_adapters.values(), *self.adapters.values()):
            if adapter.initial is not None:
                adapter.use_initial(adapter.initial.to(device))
            if adapter.held is not None:
                adapter.use_held(adapter.held.to(device))
            if adapter.buffer is not None:
                adapter.use_buffers(adapter.buffer.to(device), adapter.grads.to(device))
                continue
            for param in adapter._params():
                param.data = param.data.to(device)

    def frozen_tensors(self, trained: Collection[str]) -> dict[str, Tensor]:
        """{`NAME/MODULE.lora_A`: its values} of every adapter but those of these names, and what these
        take off or hold still: what training them must leave as it is, the start they stand on first.
        """
        others = {n: a for n, a in self.adapters.items() if n not in trained}
        frozen = {
            f"{name}/{tensor}": values.detach()
            for name, adapter in {**self.base_adapters, **others}.items()
            for tensor, values in adapter.tensors().items()
        }
        return (
            frozen
            | {
                f"{name}/{tensor} at first": values
                for name, adapter in self.adapters.items()
                if adapter.initial is not None
                for tensor, values in adapter.split_like(adapter.initial).items()
            }
            | self._held_tensors(trained)
        )

    def _held_tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """The halves that do not train, of these adapters."""
        adapters = {name: self.adapters[name] for name in names if name in self.adapters}
        return {
            f"{name}/{tensor}": values
            for name, adapter in adapters.items()
            for tensor, values in adapter.held_tensors().items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """All masters, A before B, adapter by adapter."""
        return [p for a in self.adapters.values() for p in a._params()]


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on ``device``: CUDA's own answer, else what the system can give without
    swapping.
    """
    return (
        # the driver's number, which counts other processes; torch's own statistics do not
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )


def refuse_too_large(name: str, rank: int, values: int, device: torch.device) -> None:
    """Say that an adapter cannot fit before any of it is made: Linux hands out memory that it does
    not have, and ends the process once it is written to. Raises OutOfMemoryError."""
    free = free_memory(device)
    if (needed := values * BYTES_PER_VALUE) > free:
        raise OutOfMemoryError(
            f"adapter {name!r} with r={rank} has {values:,} values, "
            f"{needed / 2**30:,.1f} GiB with their gradients; {free / 2**30:,.1f} "
            "GiB are free. Choose a smaller r or fewer target_modules; `lorry "
            "plan` shows what fits"
        )


@torch.no_grad()
def init_adapter(slot: AdapterSlot, spec: LoraSpec, seed: int, *, embedding: bool) -> None:
    """Fill A and B from a generator seeded by (seed, module path), on the CPU, so device, order and
    neighbours do not matter; nor do ranks that share the module: each draws the whole and cuts.
    """
    generator = torch.Generator().manual_seed(derive_seed("lora", seed, slot.module))
    # an embedding's A is looked up, so there B is the random side (as in PEFT)
    random_side: Side = "B" if embedding else "A"
    zero_side: Side = "A" if embedding else "B"
    shape = slot.whole_shape(random_side)
    kind = spec.init_lora_weights
    if spec.adalora is not None:
        # both, as in PEFT: what makes the low-rank term 0 is E
        for side in SIDES:
            drawn = torch.randn(slot.whole_shape(side), generator=generator) * 0.02
            slot.copy_whole(side, drawn)
        return
    if kind == "gaussian":
        # std 1/r, PEFT's "gaussian"
        drawn = torch.randn(shape, generator=generator) / spec.rank(slot.module)
    elif embedding:
        drawn = torch.randn(shape, generator=generator)
    else:
        # Kaiming-uniform with a = sqrt(5), as nn.Linear and the LoRA reference code:
        # U(-1/sqrt(in), 1/sqrt(in))
        drawn = torch.rand(shape, generator=generator).mul_(2).sub_(1).div_(math.sqrt(shape[1]))
    slot.copy_whole(random_side, drawn)
    if kind is False:
        # False: both random, PEFT's setting for debugging; the first step has gradients on both
        # sides
        drawn = torch.randn(slot.whole_shape(zero_side), generator=generator) * 0.02
        slot.copy_whole(zero_side, drawn)


def is_linear_or_embedding(module: nn.Module) -> bool:
    """Whether `wrap_module` knows a foreign module. Only the exact classes count: a subclass computes
    something else. Its weight is not looked at: FSDP1 leaves a view in a parameter's place."""
    return type(module) in (nn.Linear, nn.Embedding) or type(module).__name__ == "Conv1D"


def wrap_module(module: nn.Module, path: str) -> AdaptableLayer | None:
    """The bank layer that takes a foreign module's place and shares its parameters, or None if it
    is no linear or embedding.
    """
    if not is_linear_or_embedding(module):
        return None
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    if isinstance(module, nn.Embedding):
        return BankEmbedding(weight, path=path)
    return BankLinear(
        weight,
        bias if isinstance(bias, nn.Parameter) else None,
        transposed=type(module).__name__ == "Conv1D",
        path=path,
    )
