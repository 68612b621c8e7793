"""The contracts of a run (docs/architecture.md lists them): each is checked while it runs, stops it
when broken, and is reported.

A run that is silently wrong looks healthy; these look where it would show. Every check has a test
that makes it fail.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor

from lorry.adapters.trainable import PARAMETER_KINDS
from lorry.adapters.variants.starts import TOKEN_ROWS
from lorry.backends.distributed.communicator import Communicator
from lorry.backends.protocol import Backend, GradientNorms, ParameterInspection, Task
from lorry.data.batch import Batch
from lorry.errors import ConfigError, ContractError, ModelError, NonFiniteError
from lorry.evaluate.packing import (
    PackedSequences,
    packed_loss_difference,
    packing_leak,
    repeat_difference,
)
from lorry.train.jobs import StepCount, validate_strict

# numbers and order are those of docs/architecture.md, and stand in every contracts.json
CONTRACT_NAMES = {
    1: "every target matched",
    2: "trainable = optimized = saved, frozen weights unchanged",
    3: "every trained parameter gets a gradient and changes",
    4: "loss weights and packing",
    5: "saved weights = trained weights",
    6: "checkpoints are complete",
    7: "all losses and gradients finite",
    8: "input rows accounted for",
}
PROOF_STEPS = 3  # steps with a rate above 0 after which every target must have seen a gradient
ZERO_FINGERPRINT = "zero"
MAX_NAMED_MODULES = 12  # names of layers in one message
# of a backend's state, what trains
STATE_PREFIXES = tuple(f"{kind}/" for kind in PARAMETER_KINDS)

ContractStatus = Literal["held", "failed", "not_checked"]


@dataclass(frozen=True)
class ContractResult:
    """One line of contracts.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: int
    name: str
    status: ContractStatus
    detail: str


@dataclass(frozen=True)
class ContractState:
    """What a checkpoint keeps of the checks. ``silent``: per adapter, modules without a gradient so
    far; ``unreached``: those that no gradient could have reached so far, as no supervised token
    went through them.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    found: list[ContractResult]
    silent: dict[str, list[str]]
    proof: dict[str, StepCount]
    moved: dict[str, StepCount]
    unreached: dict[str, list[str]] = field(default_factory=dict)


_CONTRACT_STATE_ADAPTER = TypeAdapter(ContractState)


class ContractChecks:
    """Collects what held. A broken contract raises ContractError at once, after recording it as
    failed.
    """

    def __init__(self) -> None:
        self.results: dict[int, ContractResult] = {}
        self._silent: dict[str, set[str]] = {}
        self._unreached: dict[str, set[str]] = {}
        self._proof: dict[str, int] = {}
        self._moved: dict[str, int] = {}
        # of every tensor of the adapters, its `tensor_fingerprint` as the run began
        self._start: dict[str, str] = {}
        self._inspection: ParameterInspection | None = None

    def held(self, number: int, detail: str) -> None:
        """Record that a contract held."""
        self.results[number] = ContractResult(number, CONTRACT_NAMES[number], "held", detail)

    def skipped(self, number: int, why: str) -> None:
        """Record that there was nothing to check."""
        self.results[number] = ContractResult(number, CONTRACT_NAMES[number], "not_checked", why)

    def fail(self, number: int, detail: str) -> ContractError:
        """Record a broken contract and return the error to raise."""
        self.results[number] = ContractResult(number, CONTRACT_NAMES[number], "failed", detail)
        error = ContractError(f"contract {number} broken ({CONTRACT_NAMES[number]}): {detail}")
        error.contract = number
        return error

    def note_failure(self, error: ContractError) -> None:
        """Record a contract that another rank found broken; one of this rank's is
        recorded already."""
        number = error.contract
        if number is not None and error.shared and number in CONTRACT_NAMES:
            self.results[number] = ContractResult(
                number, CONTRACT_NAMES[number], "failed", str(error)
            )

    def report(self) -> list[dict[str, Any]]:
        """All eight, for contracts.json."""
        missing = {
            n: ContractResult(
                n, CONTRACT_NAMES[n], "not_checked", "the run ended before this check"
            )
            for n in CONTRACT_NAMES
            if n not in self.results
        }
        return [asdict(c) for _, c in sorted({**self.results, **missing}.items())]

    # --- before the first step

    def begin(
        self, backend: Backend, targets: Mapping[str, Sequence[str]], left_out: Sequence[str] = ()
    ) -> None:
        """Contracts 1 and 2 at the start: the modules that adapters sit on (of a base that trains:
        its tensors that do), and that the three sets are one. ``left_out``: what no adapter sits
        on, to be said with the modules.
        """
        for name, modules in targets.items():
            if not modules:
                raise self.fail(1, f"adapter {name!r} is attached to no module")
        module_names = [
            m
            for names in targets.values()
            for m in dict.fromkeys(re.sub(r"\.(weight|bias)$", "", n) for n in names)
        ]
        besides = f"; not adapted: {'; '.join(left_out)}" if left_out else ""
        self.held(
            1,
            f"{len(module_names)} modules: {', '.join(sorted({m.rsplit('.', 1)[-1] for m in module_names}))}{besides}",
        )
        self._inspection = self._same_sets(backend)
        # a resumed run took them before it loaded the checkpoint's weights: earlier moves count
        if not self._start:
            self._start = _parameter_fingerprints(backend)
            self._silent = {name: set(modules) for name, modules in targets.items()}
            self._unreached = {name: set(modules) for name, modules in targets.items()}
            self._proof = dict.fromkeys(targets, 0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run reports what one never stopped would:
        JSON.
        """
        findings = [asdict(c) for c in self.results.values()]
        silent = {name: sorted(s) for name, s in self._silent.items()}
        return {
            "found": findings,
            "silent": silent,
            "proof": dict(self._proof),
            "moved": dict(self._moved),
            "unreached": {name: sorted(s) for name, s in self._unreached.items()},
        }

    def resume(self, backend: Backend, state: object) -> None:
        """Take back what `state` gave; the backend must still hold the adapters as the run began
        with them. Raises ModelError for what no run could have written."""
        checked: ContractState = validate_strict(_CONTRACT_STATE_ADAPTER, "checks", state)
        if unknown := [c.id for c in checked.found if c.id not in CONTRACT_NAMES]:
            raise ModelError(f"checks.found: there is no contract {unknown[0]}")
        self._start = _parameter_fingerprints(backend)
        self.results = {c.id: c for c in checked.found}
        self._silent = {name: set(modules) for name, modules in checked.silent.items()}
        self._unreached = {name: set(modules) for name, modules in checked.unreached.items()}
        self._proof, self._moved = dict(checked.proof), dict(checked.moved)

    def _same_sets(self, backend: Backend) -> ParameterInspection:
        inspection = backend.inspect()
        # each pair has its own remedy, so each has its own words
        for names, other, words in (
            (inspection.trainable, inspection.optimized, "is trainable but no optimizer holds it"),
            (inspection.optimized, inspection.trainable, "is optimized but not trainable"),
            (inspection.optimized, inspection.saved, "is trained but would not be saved"),
            (
                inspection.saved,
                inspection.optimized,
                "is saved as trained but no optimizer holds it",
            ),
        ):
            if unmatched := sorted(names - other):
                raise self.fail(2, f"{unmatched[0]} {words} ({len(unmatched)} tensors)")
        return inspection

    def first_batches(
        self,
        backend: Backend,
        batches: Sequence[Batch],
        ends: Sequence[Collection[int]],
        *,
        tolerance: float,
        leak_tolerance: float = 0.0,
        ranks: int = 1,
    ) -> None:
        """Contract 4 on the first batches, across adapters, too. ``ends``: per adapter, token ids
        of which one must be supervised in each of its sequences (empty: any); ``tolerance`` of the
        mean loss packed and alone, ``leak_tolerance`` of one token's score, both in nats; ``ranks``:
        how many share a batch's sequences."""
        for batch in batches:
            for s, (start, stop) in enumerate(batch.segments):
                # [tokens of s], bool; the weight of token t is that of t as target
                supervised = batch.weights[start:stop] != 0
                if not supervised.any():
                    raise self.fail(
                        4, f"sequence {s} (key {int(batch.key[s])}) has no supervised token"
                    )
                stops = set(ends[int(batch.adapter[s])])
                if stops and not set(batch.tokens[start:stop][supervised].tolist()) & stops:
                    raise self.fail(
                        4,
                        (
                            f"sequence {s} (key {int(batch.key[s])}) does not teach the "
                            "model to stop: no end token is supervised"
                        ),
                    )
        # the first of those with the most adapters; a few sequences suffice: the mask is made the same
        # way for all
        shared = max(batches, key=lambda batch: len(batch.adapter.unique()))
        packed = PackedSequences(backend, shared, len(ends), ranks)
        leaked = packing_leak(packed)
        # NaN is the next check's: it says which
        if leaked > leak_tolerance:
            again = repeat_difference(packed)
            # a sequence alone has no neighbours that could have changed it
            if again > leak_tolerance or len(packed.examples) == 1:
                raise self.fail(
                    4,
                    (
                        f"the scores of one batch change by {max(leaked, again):.2e} when it is scored again: the "
                        "processor, its memory or a library does not repeat its results; if LORRY_KERNELS=0 "
                        "mends it, please report it with what `lorry doctor` prints"
                    ),
                )
            raise self.fail(
                4,
                (
                    f"a sequence's scores change by {leaked:.2e} with the tokens of "
                    "other sequences in the batch"
                ),
            )
        difference = packed_loss_difference(packed)
        if math.isnan(difference):
            # scores that are not finite are another contract's business: the loss is looked at next
            return
        # not `>`: written this way NaN would fail as well
        if not difference <= tolerance:
            raise self.fail(
                4,
                (
                    "the loss of packed and of single sequences differs by "
                    f"{difference:.2e} (at most {tolerance:.0e})"
                ),
            )
        self.held(
            4,
            (
                "every sequence supervised; no leak between sequences; loss of packed "
                f"= loss of single sequences within {difference:.1e}"
            ),
        )

    # --- while it goes

    def after_step(
        self,
        backend: Backend,
        norms: GradientNorms,
        rates: Mapping[str, float],
        unreached: Mapping[str, Collection[str]],
    ) -> None:
        """Contract 3, until it is proven: the modules without a gradient so far, and whether the
        adapter moved. ``unreached``: the modules that no supervised token of the step went through,
        where a token has some of the experts, or only rows of an embedding train: that they are
        silent proves nothing.
        """
        unproven = [
            n
            for n in norms.norms
            if rates.get(n, 0.0) > 0 and self._proof.get(n, PROOF_STEPS) < PROOF_STEPS
        ]
        for name in unproven:
            # what had a gradient in any step so far is silent no more
            self._silent[name] &= set(norms.silent.get(name, ()))
            self._unreached[name] = self._unreached.get(name, set()) & set(unreached.get(name, ()))
            self._proof[name] += 1
        self._prove(backend, [name for name in unproven if self._proof[name] == PROOF_STEPS])

    def prove(self, backend: Backend) -> None:
        """Contract 3 for adapters whose steps were too few for `after_step` to decide: at the end,
        before others are loaded.
        """
        for name, steps in self._proof.items():
            # without a step that could move anything nothing was shown; a run as short as that is
            # wrong
            if steps == 0:
                raise self.fail(
                    3,
                    (
                        f"adapter {name!r} had no step with a learning rate above 0: "
                        "the warmup is longer than the run"
                    ),
                )
        self._prove(backend, [name for name, steps in self._proof.items() if steps < PROOF_STEPS])

    def _prove(self, backend: Backend, names: Sequence[str]) -> None:
        """Contract 3 for adapters that have made their steps."""
        for name in names:
            if where := sorted(self._silent[name] - self._unreached.get(name, set())):
                whose = (
                    f" of adapter {name!r} ({len(where)} modules)"
                    if self._low_rank(name)
                    else f" ({len(where)} tensors)"
                )
                remedy = (
                    f"leave it out, {self._excluding(name, where)}"
                    if self._low_rank(name)
                    else "leave it out of trainable"
                )
                raise self.fail(
                    3, f"no gradient reached {where[0]}{whose}, so it would never train; {remedy}"
                )
        # hashes of every tensor that trains: only when there is something to prove
        fingerprints = _parameter_fingerprints(backend) if names else {}
        for name in names:
            unmoved = [t for t in self._moving(name) if fingerprints[t] == self._start[t]]
            unmoved = self._without_taken_ranks(name, unmoved)
            if unmoved:
                raise self.fail(
                    3,
                    (
                        f"{unmoved[0]} did not change in {self._proof[name]} steps "
                        f"({len(unmoved)} tensors): not trained"
                    ),
                )
            self._moved[name] = len(self._moving(name))
        # held only when the last adapter was proven
        if names and len(self._moved) == len(self._proof):
            steps = max(self._proof.values())
            # an expert may get no token for a while, and a row's token not occur, which is no
            # fault: it is told, not proven
            asleep = sum(
                len(modules & self._silent[name]) for name, modules in self._unreached.items()
            )
            unproven = f"; {asleep} modules got no supervised token in them" if asleep else ""
            self.held(
                3,
                f"{self._describe_moved()} changed within {steps} steps; each had a "
                f"gradient{unproven}",
            )

    def _describe_moved(self) -> str:
        """How many tensors moved, of what."""
        adapters = [name for name in self._moved if self._low_rank(name)]
        others = sum(n for name, n in self._moved.items() if name not in adapters)
        parts = list[str]()
        if others:
            is_router = any(t.startswith("router/") for t in self._start)
            parts.append(f"{others} tensors of the {'router' if is_router else 'base'}")
        if adapters:
            whose = f" of {len(adapters)} adapters" if len(adapters) > 1 else ""
            # experts that train with their router began with what they had learned
            what = "matrices B" if others else "zero-initialised matrices"
            parts.append(f"{sum(self._moved[name] for name in adapters)} {what}{whose}")
        return " and ".join(parts)

    def _without_taken_ranks(self, name: str, unmoved: Sequence[str]) -> list[str]:
        """Tensors that did not move, but for those of modules whose ranks AdaLoRA has all taken: their
        factors had a gradient, and are 0 again as they began. Where no factor moved none is left out.
        """
        factors = [t for t in self._moving(name) if t.endswith(".lora_E")]
        taken = [t.removesuffix("lora_E") for t in factors if t in set(unmoved)]
        if len(taken) == len(factors):
            return list(unmoved)
        return [t for t in unmoved if not t.startswith(tuple(taken))]

    def _excluding(self, name: str, silent: Sequence[str]) -> str:
        """The setting that leaves out these modules of an adapter and none that trains: the
        shortest ends of their names.
        """
        prefix = f"adapter/{name}/"
        modules = {
            t.removeprefix(prefix).rpartition(".")[0] for t in self._start if t.startswith(prefix)
        }
        # with a leading dot, so that "proj" is no end of "q_proj"
        other_modules = [f".{module}" for module in modules - set(silent)]
        suffixes = []
        for module in silent:
            parts = module.split(".")
            tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
            suffixes.append(
                next(
                    (t for t in tails if not any(m.endswith(f".{t}") for m in other_modules)),
                    module,
                )
            )
        distinct = list(dict.fromkeys(suffixes))
        more = (
            f" and {len(distinct) - MAX_NAMED_MODULES} more"
            if len(distinct) > MAX_NAMED_MODULES
            else ""
        )
        return f"lora.exclude_modules=[{','.join(distinct[:MAX_NAMED_MODULES])}]{more}"

    def _moving(self, name: str) -> list[str]:
        """The tensors that must move: of a base or a router all that train, but of low-rank
        matrices, an adapter's or a router's own, those that began at zero (lora_B; an embedding's
        lora_A), or else lora_B; none of a module that no supervised token went through."""
        # what had a gradient moves, whether or not tokens were counted there
        asleep = self._unreached.get(name, set()) & self._silent.get(name, set())
        mine = [
            t
            for t in self._start
            if t.split("/")[1] == name and _module_of(t.split("/", 2)[2]) not in asleep
        ]
        low_rank = [t for t in mine if t.endswith((".lora_A", ".lora_B"))]
        others = [t for t in mine if t not in set(low_rank)]
        # The matrix at zero is where a first gradient shows; the other moves only after it.
        zero = [t for t in low_rank if self._start[t] == ZERO_FINGERPRINT]
        return others + (zero or [t for t in low_rank if t.endswith(".lora_B")])

    def _low_rank(self, name: str) -> bool:
        return not any(t.startswith((f"weights/{name}/", f"router/{name}/")) for t in self._start)

    def finite(self, backend: Backend, step: int) -> None:
        """Contract 7 for what an update made: every master and moment after ``step`` updates. An
        infinity there is in no loss or gradient yet, and must not become a checkpoint that takes
        the last good one's place, nor the adapter that a run ends with.

        Raises NonFiniteError naming the tensors.
        """
        nonfinite, count = backend.nonfinite()
        if nonfinite:
            message = (
                f"step {step}: the update made {nonfinite[0]} infinite or NaN "
                f"({len(nonfinite)} of {count} tensors that are saved); they "
                "are not saved, and the last checkpoint is unchanged. Lower "
                "learning_rate"
            )
            self.fail(7, message)
            raise NonFiniteError(message)

    # --- between the ranks of a run

    def same_run_on_all_ranks(
        self, communicator: Communicator, identity: Mapping[str, Any]
    ) -> None:
        """Every rank has to have rank 0's data, base and code, and the same torch: raises
        ConfigError naming what differs. Settings are rank 0's anyway."""
        environment = identity.get("environment", {})
        mine = {
            **identity.get("digests", {}),
            **{name: environment.get(name) for name in ("torch", "transformers")},
        }
        if communicator.size == 1:
            return
        first, *others = communicator.exchange("data, base and versions", mine)
        for rank, other in enumerate(others, 1):
            if differing := [name for name in first if other.get(name) != first[name]]:
                name = differing[0]
                raise ConfigError(
                    f"rank {rank} has another {name} than rank 0 ({str(other.get(name))[:16]} and "
                    f"{str(first[name])[:16]}): every process needs the same files and versions"
                )

    def equal_on_all_ranks(self, backend: Backend, number: int, when: str) -> None:
        """Part of contract ``number``: what trains is the same to the last bit on every rank.
        Raises ContractError naming the first tensor that is not."""
        communicator = backend.communicator
        if communicator.size == 1:
            return
        fingerprints = {name: tensor_fingerprint(t) for name, t in backend.held().items()}
        frames = communicator.exchange(f"weights {when}", fingerprints)
        # {tensor: the first rank that has it}: ranks have others where weights are cut over them
        first = dict[str, int]()
        for rank, frame in enumerate(frames):
            holders = {name: first.setdefault(name, rank) for name in frame}
            differing = [n for n, holder in holders.items() if frame[n] != frames[holder][n]]
            if differing or len(frame) != len(frames[0]):
                what = differing[0] if differing else "number of tensors"
                raise self.fail(
                    number,
                    f"{when} rank {rank} holds another {what} than rank "
                    f"{holders.get(what, 0)} ({len(differing)} of {len(frame)} tensors): the ranks "
                    "train different values",
                )

    # --- at the end

    def end(self, backend: Backend, task: Task) -> None:
        """Contracts 2 and 7 at the end."""
        assert self._inspection is not None
        inspection = self._same_sets(backend)
        # a digest of a sample: the whole base would take as long as loading it
        if inspection.base_digest != self._inspection.base_digest:
            raise self.fail(
                2, ("a weight of the base model or of a frozen adapter changed during training")
            )
        whose = (
            "a sample of the base model"
            if all(map(self._low_rank, self._proof))
            else "a sample of the frozen weights"
        )
        frozen = (
            f"digest of {whose} {inspection.base_digest[:12]} before and after"
            if inspection.base_digest
            else "nothing is frozen"
        )
        self.held(2, f"{len(inspection.saved)} tensors; {frozen}")
        self.held(7, "every loss and gradient was finite")


def _module_of(tensor: str) -> str:
    """The module of one of an adapter's tensors, by its canonical name."""
    for part in (".lora_A", ".lora_B", f".{TOKEN_ROWS}"):
        tensor = tensor.removesuffix(part)
    return tensor


def _parameter_fingerprints(backend: Backend) -> dict[str, str]:
    """The fingerprint of every tensor that trains: digests, since copies of all of them would stay
    for the whole run.
    """
    state = backend.state()
    # by name: of what is cut over ranks no moment need be made whole
    return {n: tensor_fingerprint(state[n]) for n in state if n.startswith(STATE_PREFIXES)}


def tensor_fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, or that it is all zeros."""
    # [numel], as bytes: numpy has no bfloat16
    flat = tensor.contiguous().reshape(-1)
    return (
        hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
        if flat.any()
        else ZERO_FINGERPRINT
    )
