"""The backend for one device: the model, its bank, and an optimizer per adapter; or one for the
base weights that train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from lorry.adapters.attach import get_bank
from lorry.adapters.bank import AdapterBank
from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.router import RouterParameters
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.trainable import PARAMETER_KINDS, ParameterSet, parameter_set
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.backends.optim import OptimSettings, ParameterSetOptimizer
from lorry.backends.protocol import (
    GradientNorms,
    GradientRule,
    ParameterInspection,
    StepStats,
    Task,
    TensorsWhenRead,
    like_stored,
    term_totals,
)
from lorry.data.batch import BASE, Batch
from lorry.errors import ModelError, NonFiniteError
from lorry.generation.engine import generate_completions
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import CausalLM
from lorry.models.loading.digest import sample_digest
from lorry.models.loading.tensor_files import is_finite
from lorry.models.scoring.score import Want, evaluate_wants


class LocalBackend:
    """One model on one device. ``trained``: the adapters this run steps (others of the bank stay
    frozen), or the name of the base weights that `make_weights_trainable` has switched on, or a
    router, and behind it the experts that step with it; ``gradient``: how a step's gradient is made;
    None: it is that of the loss; ``communicator``: the processes of the run, of which this backend
    has one; ``moment_ranks``: those of them that share AdamW's moments of what each has whole.
    """

    def __init__(
        self,
        model: CausalLM,
        trained: Sequence[str],
        optim: OptimSettings | Mapping[str, OptimSettings],
        *,
        seed: int = 0,
        gradient: GradientRule | None = None,
        communicator: Communicator = ONE_PROCESS,
        moment_ranks: TensorRanks | None = None,
    ) -> None:
        self.model, self.seed, self.gradient = model, seed, gradient
        self.communicator = communicator
        self.bank: AdapterBank = get_bank(model)
        self.trained = list(trained)
        self.owners: dict[str, ParameterSet] = {
            name: parameter_set(model, name) for name in self.trained
        }
        each = optim if isinstance(optim, Mapping) else dict.fromkeys(self.trained, optim)
        self.optimizers = {
            # what is cut over ranks has its moments cut already
            name: ParameterSetOptimizer(
                owner, each[name], moment_ranks if owner.shard is None else None
            )
            for name, owner in self.owners.items()
        }
        if gradient is not None:
            gradient.bind(self.owners)
        self.present: frozenset[str] = frozenset()
        self.at, self.keys = 0, list[int]()  # the step being made and its sequences, for messages

    def mix_of(self, name: str) -> Mix:
        """What a name's sequences run under: what trains says it itself, another is an adapter."""
        return self.owners[name].mix() if name in self.owners else Mix.one(name)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # --- training

    def forward_backward(self, batches: Sequence[Batch], task: Task, step: int) -> StepStats:
        """The micro-batches of one optimizer step. Raises NonFiniteError, naming the sequences,
        before any update.
        """
        # over all micro-batches first: how rows are spread over them changes nothing
        totals = term_totals(batches)
        self.at, self.keys = step, [key for batch in batches for key in batch.key.tolist()]
        for owner in self.owners.values():
            # AdamW is given views of this buffer: autograd must write into it, not beside it
            owner.bind_grads()
        sums = {term: torch.zeros(len(task.adapters), dtype=torch.float64) for term in totals}

        def add(some: Sequence[Batch], counted: bool = True) -> None:
            for term_sums in self.run_micro_batches(some, task, step, totals):
                for term, values in term_sums.items():
                    sums[term] += values if counted else 0.0

        with ExitStack() as stack:
            for owner in self.owners.values():
                stack.enter_context(owner.held_still())
            if self.gradient is None:
                add(batches)
            else:
                self.gradient.make(batches, add)
        # a reported term makes no gradient: an adapter with nothing else does not step
        weights = torch.stack([w for term, w in totals.items() if term not in task.reported]).sum(0)
        named = {n for n, w in zip(task.adapters, weights.tolist(), strict=True) if w > 0}
        # the experts of a router have no sequences of their own: they are in its mix
        in_mixes = {term.adapter for n in named for term in self.mix_of(n).terms}
        self.present = frozenset(named | (in_mixes & self.owners.keys()))
        terms = {
            t: {n: float(v) for n, v in zip(task.adapters, values, strict=True)}
            for t, values in sums.items()
        }
        return StepStats(
            loss={
                n: sum(values[n] for term, values in terms.items() if term not in task.reported)
                for n in task.adapters
            },
            terms=terms,
            tokens=sum(b.tokens.numel() for b in batches),
            supervised=sum(int(b.rows.numel()) for b in batches),
            present=self.present,
        )

    def run_micro_batches(
        self, batches: Sequence[Batch], task: Task, step: int, totals: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        """Forward and backward of each, gradients added up; what `_micro_batch` returns of each. What
        a backend of several processes does otherwise."""
        return [self._micro_batch(b.to(self.device), task, step, totals) for b in batches]

    def _micro_batch(
        self, batch: Batch, task: Task, step: int, totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Forward, loss, backward. Returns each term's normalised sum per adapter, [K] float64 on
        the CPU.
        """
        # [S]; BASE is -1 and no index: its sequences are left out of every sum below
        owner = batch.adapter.clamp(min=0)
        call = AdapterContext(
            self.batch_mix(batch, task.adapters), self._noise(batch, task.adapters, step)
        )
        losses = task.loss(evaluate_wants(self.model, batch, task.wants(batch), call), batch)
        total, seen = torch.zeros((), device=self.device), {}
        for term, values in losses.items():
            weight = totals[term].to(self.device)[owner]
            # [S]: over the term's total of the sequence's adapter, 0 for those left out
            share = torch.where(
                (weight > 0) & (batch.adapter >= 0),
                values / weight.clamp(min=1e-30).to(values.dtype),
                0.0,
            )
            if term not in task.reported:
                total = total + share.sum()
            # before backward, where an infinity would reach all that share the batch
            self._finite(values, batch, term, step)
            seen[term] = torch.zeros(len(task.adapters), dtype=torch.float64).index_add_(
                0, owner.cpu(), share.detach().double().cpu()
            )
        # a batch without a sequence of what trains has nothing to differentiate
        if total.requires_grad:
            with self.model.layer_weights.backward_pass():
                total.backward()
        return seen

    def _finite(self, values: Tensor, batch: Batch, term: str, step: int) -> None:
        bad = torch.nonzero(~torch.isfinite(values.detach()))[:, 0].tolist()
        if bad:
            keys = [int(batch.key[s]) for s in bad[:8]]
            self._forget()
            raise NonFiniteError(
                f"step {step + 1}: the loss term {term!r} is not finite for "
                f"{len(bad)} of {len(batch)} sequences of a micro-batch (rows "
                f"{bad[:8]}, keys {keys}); nothing was updated. Lower "
                "learning_rate, or check those rows"
            )

    def _noise(self, batch: Batch, adapters: Sequence[str], step: int) -> DropoutNoise | None:
        if not any(
            (self.owners[name] if name in self.owners else self.bank[name]).drops
            for name in {*adapters, *self.owners}
        ):
            return None
        return DropoutNoise(
            self.seed, step, tuple(batch.key.tolist()), tuple(batch.starts.tolist())
        )

    def batch_mix(self, batch: Batch, adapters: Sequence[str]) -> Mix:
        """Each sequence under the mix of what its adapter number names; BASE is none. What a router
        trains under its sequences' roles may say (`RouterParameters.training_mix`)."""
        own = [self.mix_of(name) for name in adapters]
        routers = [self.owners.get(name) for name in adapters]
        mixes = list[Mix]()
        for k, role in zip(batch.adapter.tolist(), batch.role, strict=True):
            router = None if k == BASE else routers[k]
            if isinstance(router, RouterParameters):
                mixes.append(router.training_mix(role))
            else:
                mixes.append(Mix.none() if k == BASE else own[k])
        return Mix.packed(mixes, batch.starts.tolist())

    def step(self, lr: Mapping[str, float]) -> GradientNorms:
        """Update every adapter that was present, at its own rate. Raises NonFiniteError, and
        updates nobody, if any gradient is not finite."""
        for name in self.trained:
            if name in self.present:
                self.optimizers[name].add_penalty_gradients()
        norms = self._norms()
        # all of them before the first steps: nobody is updated by a step that failed for one
        for name, norm in norms.norms.items():
            # not `>=`: written this way NaN is caught as well
            if not norm < float("inf"):
                owner = self.owners[name]
                where = self._not_finite(owner)
                self._forget()
                raise NonFiniteError(
                    f"step {self.at + 1}: the gradient of "
                    f"{where[0] if where else name} ({owner.label}) is not finite "
                    f"in {len(where)} tensors, with sequences of keys "
                    f"{self.keys[:8]}; nothing was updated. Lower learning_rate or "
                    "max_grad_norm, or check those rows"
                )
        for name in norms.norms:
            self.optimizers[name].step(lr[name], norms.norms[name], self.at + 1)
        return norms

    def discard(self) -> GradientNorms:
        """Forget the gradients of this step."""
        norms = self._norms()
        self._forget()
        return norms

    def _forget(self) -> None:
        """`discard` without norms, which ranks would have to take together."""
        for owner in self.owners.values():
            owner.grads.zero_()

    def _not_finite(self, owner: ParameterSet) -> list[str]:
        """The tensors whose gradient is not finite on some rank; all of them call it."""
        views = owner.split_like(owner.grads).items()
        found = [tensor for tensor, grad in views if not torch.isfinite(grad).all()]
        frames = self.communicator.exchange("gradients that are not finite", found)
        return list(dict.fromkeys(tensor for frame in frames for tensor in frame))

    def _norms(self) -> GradientNorms:
        stepping = [n for n in self.trained if n in self.present]
        return GradientNorms(
            {n: self.owners[n].norm() for n in stepping},
            {n: self.owners[n].zero_grad_names() for n in stepping},
        )

    # --- no gradients

    @torch.no_grad()
    def score(
        self, batches: Sequence[Batch], wants: Mapping[str, Want], mix: Mix | None = None
    ) -> list[dict[str, Tensor]]:
        """Per batch, everything wanted, on the CPU. ``mix`` None: the batch's own adapter numbers
        over the trained adapters.
        """
        out = []
        for batch in batches:
            # a batch at a time, results on the CPU: a set may be larger than the device
            moved = batch.to(self.device)
            call = AdapterContext(self.batch_mix(batch, self.trained) if mix is None else mix)
            out.append(
                {
                    name: value.cpu()
                    for name, value in evaluate_wants(self.model, moved, wants, call).items()
                }
            )
        return out

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapters: Mix | Sequence[Mix | str | None] | str | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[Completion]:
        """See `generation.engine.generate_completions`."""
        return generate_completions(self.model, prompts, params, adapters=adapters, rows=rows)

    # --- state

    def state(self) -> Mapping[str, Tensor]:
        """adapter/NAME/MODULE.lora_A (of base weights weights/NAME/TENSOR), adam_m/..., adam_v/...,
        adam_count/NAME, what AdaLoRA and a gradient rule keep, and rng/cpu: everything a resumed run
        needs.

        On a CPU these are the tensors in use, not copies (K adapters with their moments would be
        held twice): who wants to keep them beyond the next step clones them. Where ranks share a
        model, or weights that train are cut over them, every rank calls this; in the latter case a
        tensor is made whole when it is read (`TensorsWhenRead`).
        """
        state, parts = {"rng/cpu": torch.get_rng_state()}, dict[str, TensorsWhenRead]()
        for name, owner in self.owners.items():
            for kind, flat in self._flat_tensors(name):
                whole = owner.whole_tensors(flat)
                if isinstance(whole, TensorsWhenRead):
                    parts[f"{kind}/{name}/"] = whole
                else:
                    state |= {f"{kind}/{name}/{t}": v.detach().cpu() for t, v in whole.items()}
            for kind, counter in self.optimizers[name].counters().items():
                state[f"{kind}/{name}"] = counter.cpu()
        return _StateInParts(state, parts) if parts else state

    def held(self) -> Mapping[str, Tensor]:
        """See `Backend.held`: of a set that is cut over ranks, this rank's rows under a name that says
        which; else whole tensors, which ranks that share a model make together."""
        held = dict[str, Tensor]()
        for name, owner in self.owners.items():
            own, part = owner.whole_tensors(owner.values), ""
            if owner.shard is not None:
                own, part = owner.split_like(owner.values), f" (share {owner.shard})"
            held |= {f"{owner.kind}/{name}/{t}{part}": v.detach().cpu() for t, v in own.items()}
        return held

    def nonfinite(self) -> tuple[list[str], int]:
        """See `Backend.nonfinite`."""
        own = {
            f"{kind}/{name}/{tensor}": values
            for name, owner in self.owners.items()
            for kind, flat in self._flat_tensors(name)
            for tensor, values in owner.split_like(flat).items()
        }
        own |= {
            f"{kind}/{name}": counter
            for name, optim in self.optimizers.items()
            for kind, counter in optim.counters().items()
        }
        found = [name for name, values in own.items() if not is_finite(values)]
        frames = self.communicator.exchange("values that are not finite", found)
        return list(dict.fromkeys(name for frame in frames for name in frame)), len(own)

    def _flat_tensors(self, name: str) -> list[tuple[str, Tensor]]:
        """What a checkpoint holds of an owner: kinds and whole buffers."""
        owner, (m, v) = self.owners[name], self.optimizers[name].moments()
        buffers = dict(self.optimizers[name].buffers())
        if self.gradient is not None:
            buffers |= self.gradient.buffers(name)
        frozen = owner.frozen_state()
        moving = [(owner.kind, owner.values), ("adam_m", m), ("adam_v", v)]
        return [*moving, *buffers.items(), *frozen.items()]

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave. Raises ModelError unless names and shapes are exactly those
        of this run and every value is finite."""
        mine = self.state()
        # everything is compared before anything is copied: a refused checkpoint changes nothing
        if odd := sorted(set(mine) ^ set(state)):
            raise ModelError(
                f"the checkpoint and this run differ in {odd[0]!r} ({len(odd)} tensors in all)"
            )
        for tensor in mine:
            facts = (like_stored(mine, tensor), like_stored(state, tensor))
            here, there = ((t.dtype, tuple(t.shape)) for t in facts)
            if here != there:
                raise ModelError(
                    f"{tensor} is {there[0]} {there[1]} in the checkpoint and {here[0]} {here[1]} here"
                )
            if not is_finite(state[tensor]):
                raise ModelError(
                    f"{tensor} holds NaN or infinity in the checkpoint; resume from an earlier one"
                )
        for name, owner in self.owners.items():
            flats = dict(self._flat_tensors(name))
            for kind, flat in flats.items():
                for tensor, view in owner.split_like(flat).items():
                    view.copy_(owner.own_part(tensor, state[f"{kind}/{name}/{tensor}"]))
            # compute copies are remade from the masters before the next forward
            owner.touch()
            optimizer = self.optimizers[name]
            counters = {kind: state[f"{kind}/{name}"] for kind in optimizer.counters()}
            optimizer.set_moments(flats["adam_m"], flats["adam_v"], counters)
        torch.set_rng_state(state["rng/cpu"])

    def inspect(self) -> ParameterInspection:
        """Trainable, optimized and saved tensors, the first two found by the memory they occupy."""
        trainable, optimized = (
            {n for n, p in self.model.named_parameters() if p.requires_grad},
            set[str](),
        )
        for name, owner in self.owners.items():
            stepped = self._stepped(name)
            # by memory and not by name: a name may lead to a tensor that nobody trains
            masters, own = owner.masters(), owner.base_parameters()
            trainable = {f"{name}/{n}" if n in own else n for n in trainable}
            trainable |= {f"{name}/{tensor}" for tensor in owner.wanting_gradients()}
            optimized |= {
                f"{name}/{n}"
                for n, master in masters.items()
                if any(_covers_memory(part, owner.values, master) for part in stepped)
            }
        saved = {
            rest
            for kind, _, rest in (t.partition("/") for t in self.state())
            if kind in PARAMETER_KINDS
        }
        # an adapter that must not move is no parameter of the model: nothing else would see it
        frozen = self.bank.frozen_tensors(self.trained)
        moving = [p for owner in self.owners.values() for p in owner.base_parameters().values()]
        return ParameterInspection(
            frozenset(trainable),
            frozenset(optimized),
            frozenset(saved),
            sample_digest(self.model, trained=moving, frozen=frozen),
        )

    def end_steps(self) -> None:
        """See `Backend.end_steps`."""
        self.optimizers.clear()

    def _stepped(self, name: str) -> list[tuple[int, int]]:
        """(start, stop), in bytes of a set's values, of what its optimizer holds, on this rank or on
        those that share the moments with it; every rank calls it."""
        optimizer, mesh = self.optimizers[name], self.communicator.mesh
        ranges = optimizer.stepped()
        if optimizer.ranks is not None:
            frames = self.communicator.exchange("what optimizers hold", ranges)
            mates = mesh.data_group(mesh.tensor_rank)
            ranges = [(start, stop) for rank in mates for start, stop in frames[rank]]
        joined = list[tuple[int, int]]()
        for start, stop in sorted(ranges):
            if joined and start <= joined[-1][1]:
                start, stop = joined[-1][0], max(joined.pop()[1], stop)
            joined.append((start, stop))
        return joined


class _StateInParts(TensorsWhenRead):
    """``ready`` tensors, and those of ``parts`` by a prefix of their names."""

    def __init__(self, ready: Mapping[str, Tensor], parts: Mapping[str, TensorsWhenRead]) -> None:
        self.ready = dict(ready)
        self.parts = {
            f"{prefix}{name}": (tensors, name)
            for prefix, tensors in parts.items()
            for name in tensors
        }

    def __getitem__(self, name: str) -> Tensor:
        if name in self.ready:
            return self.ready[name]
        tensors, own = self.parts[name]
        return tensors[own].cpu()

    def __iter__(self) -> Iterator[str]:
        yield from self.ready
        yield from self.parts

    def __len__(self) -> int:
        return len(self.ready) + len(self.parts)

    def like(self, name: str) -> Tensor:
        """See `TensorsWhenRead.like`."""
        if name in self.ready:
            return self.ready[name]
        tensors, own = self.parts[name]
        return tensors.like(own)


def _covers_memory(part: tuple[int, int], values: Tensor, master: Tensor) -> bool:
    """Whether ``part`` of the memory of ``values`` (start and stop in bytes) has all of a master."""
    start = master.data_ptr() - values.data_ptr()
    return part[0] <= start and start + master.nbytes <= part[1]
