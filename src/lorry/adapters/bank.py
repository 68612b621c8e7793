"""Bank: the named adapters of one model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import psutil
import torch
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter, AdapterOrigin, check_adapter_name
from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.initialization.random_values import init_adapter
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.slot import AdapterSlot, CopyMemory
from lorry.adapters.mix import AdapterContext, Mix, MixtureRouter
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.slices import SIDES
from lorry.adapters.variants.parameters import FurtherStart
from lorry.errors import ConfigError, OutOfMemoryError

BYTES_PER_VALUE = 8  # of a master and its gradient, both float32; an optimizer adds as much again


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
        # a list, too, is named and not looked up
        if not isinstance(name, str) or name not in self.adapters:
            raise ConfigError(
                f"no adapter named {name!r:.80}; this model has {', '.join(self.adapters) or 'none'}"
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
        params = [parameter_over(v.view(shape)) for v, shape in zip(views, shapes, strict=True)]
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
            # what is in the base's place has no slot that would see a write to the buffer
            view = mine.view(start.shape)
            param = nn.Parameter(view) if start.replaces else parameter_over(view)
            slot_there = adapter.slots.get(start.module)
            if not from_file:
                param.data.copy_(start.make_values(slot_there))
            adapter.further[key] = start.parameter(param)
            start.use(param, slot_there)
        adapter.watch_buffers()
        if trainable:
            for param in adapter.held_masters().values():
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
            for param in adapter.parameters():
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
        return [p for a in self.adapters.values() for p in a.parameters()]


def parameter_over(view: Tensor) -> nn.Parameter:
    """A parameter in a view's memory, with a version counter of its own. All views of a buffer share
    one: an optimizer that steps each parameter as soon as it has its gradient, in the midst of a backward
    pass, would seem to write all those whose gradients are yet to come.
    """
    param = nn.Parameter(view.new_empty(0))
    param.data = view
    return param


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
