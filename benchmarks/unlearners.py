"""The engines of benchmarks/unlearn.py: Lorry, and plain loops over transformers and PEFT, with the
losses written out once more in terms of padded logits.

A step is ``rows_per_step`` rows to forget and as many to retain (with DPO, a refusal beside each row
to forget). Peers read them as open-unlearning does: a padded forward pass for each of these sets,
the start asked without a gradient. Their start is a copy of the base (``copy``, ``full``), made
before the adapter is attached, or the base under the adapter, switched off (``off``).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from case import IGNORED, Case, Row, read_rows
from engines import clean, count, fast_path, padded, turn
from measure import Watch

if TYPE_CHECKING:
    from torch import Tensor

FORGET, RETAIN, ALTERNATE = "forget", "retain", "alternate"
ROLES = (FORGET, RETAIN, ALTERNATE)
DIRECTION = "direction.safetensors"  # where RMU drives hidden states to: one vector for all engines
BETA, STEERING = 0.1, 2.0
# each with what it keeps R by; EMBED is there for its memory: GradDiff whose retain term it is
METHODS = {"NPO": "NLL", "KL": "KL", "DPO": "NLL", "RMU": "EMBED", "EMBED": "EMBED"}
RoleRows = Mapping[str, Sequence[Row]]
Measured = dict[str, Any]
Run = Callable[[Path, "UnlearnCase", RoleRows, Watch], Measured]


@dataclass(frozen=True, kw_only=True)
class UnlearnCase(Case):
    """``method``: a name of METHODS; ``layer``: whose output (0-based) RMU and EMBED look at."""

    kind: str = "unlearn"
    method: str = "NPO"
    dtype: str = "float32"
    rows_per_step: int = 4
    layer: int = 7

    @staticmethod
    def load(folder: Path) -> UnlearnCase:
        """Read case.json."""
        return UnlearnCase(**json.loads((folder / "case.json").read_text()))

    @property
    def lorry_method(self) -> tuple[str, dict[str, Any]]:
        """The method by Lorry's name, and its settings that are no defaults."""
        own = {"layer": self.layer} if METHODS[self.method] == "EMBED" else {}
        if self.method == "EMBED":
            return "GradDiff", {**own, "retain_loss": "EMBED"}
        return self.method, own


def rows_of_step(case: UnlearnCase, rows: RoleRows, step: int) -> RoleRows:
    """The rows of a step by role."""
    return {role: turn(own, step, case.rows_per_step) for role, own in rows.items()}


def read_roles(folder: Path) -> RoleRows:
    """The rows of a case by role."""
    return {role: read_rows(folder / role) for role in ROLES if (folder / role).is_dir()}


def tally(rows: RoleRows) -> tuple[int, int]:
    """(tokens, supervised tokens) of all roles; padding does not count."""
    return count([row for own in rows.values() for row in own])


# --- Lorry


def lorry(reference: Literal["live", "cached"]) -> Run:
    """Lorry's own path: the local backend, an unlearning task, and the start read by ``reference``."""
    from lorry.adapters.mix import AdapterContext, Mix
    from lorry.tasks.unlearn.methods.method import StartModel
    from lorry.tasks.unlearn.methods.registry import make_method
    from lorry.tasks.unlearn.reference import CachedReference, LiveReference
    from lorry.tasks.unlearn.task import UnlearnTask

    def run(folder: Path, case: UnlearnCase, rows: RoleRows, watch: Watch) -> Measured:
        model, adapter, backend, stream = _opened_by_lorry(folder, case, rows)
        start = StartModel(
            model.config["hidden_size"],
            head=lambda hidden: model.logits(hidden, AdapterContext(Mix.none())),
        )
        name, settings = case.lorry_method
        method = make_method(name, [settings], start)
        began = time.perf_counter()
        reader: Any = LiveReference(Mix.none())
        if reference == "cached":
            reader = CachedReference(Mix.none())
            for step in range(case.all_steps):
                for batch in stream.batches(step):
                    ready = method.prepare(batch)
                    if reader.lacks(ready):
                        reader.read(ready, method.reference_wants(ready), backend)
        seconds = time.perf_counter() - began
        models = {"self": backend}
        task = UnlearnTask(
            stream, [], case.all_steps, ["default"], method=method, reference=reader, models=models
        )
        _train(case, task, adapter, backend, models, watch)
        return {"reference_seconds": seconds}

    return run


def lorry_sft() -> Run:
    """`lorry sft` on the rows of the same steps: what unlearning's memory is measured by."""
    from lorry.tasks.sft import SftTask

    def run(folder: Path, case: UnlearnCase, rows: RoleRows, watch: Watch) -> Measured:
        _, adapter, backend, stream = _opened_by_lorry(folder, case, rows)
        _train(case, SftTask(stream, [], case.all_steps, ["default"]), adapter, backend, {}, watch)
        return {}

    return run


def _opened_by_lorry(folder: Path, case: UnlearnCase, rows: RoleRows) -> tuple[Any, Any, Any, Any]:
    """(model, adapter, backend, stream of the steps)."""
    from lorry.adapters.peft.files import load_adapter
    from lorry.backends.local import LocalBackend
    from lorry.backends.optim import OptimSettings
    from lorry.data.batch import Batch, TokenizedExample, collate
    from lorry.models.loading.load import load_model
    from lorry.notes import ignore_note
    from lorry.train.resources.peak import tune_allocator

    class Steps:
        """Each step as one micro-batch, laid out as `RoleStream` does."""

        def batches(self, step: int) -> list[Batch]:
            examples = []
            mine = rows_of_step(case, rows, step)
            for place in range(case.rows_per_step):
                for role in (FORGET, ALTERNATE, RETAIN):
                    if role not in mine:
                        continue
                    ids, labels = mine[role][place]
                    group = place if ALTERNATE in mine and role != RETAIN else -1
                    weights = [float(label != IGNORED) for label in labels]
                    examples.append(TokenizedExample(ids, weights, role=role, group=group))
            return [collate(examples)]

    fast_path()
    tune_allocator()
    loaded = load_model(str(folder / "base"), dtype=case.dtype, add_note=ignore_note)
    adapter = load_adapter(loaded.model, folder / "init", "default")
    return loaded.model, adapter, LocalBackend(loaded.model, ["default"], OptimSettings()), Steps()


def _train(
    case: UnlearnCase, task: Any, adapter: Any, backend: Any, models: Any, watch: Watch
) -> None:
    watch.start()
    for step in range(case.all_steps):
        batches = task.step_batches(step, models)
        watch.saw([b.tokens[i:j].tolist() for b in batches for i, j in b.segments])
        stats = backend.forward_backward(batches, task, step)
        watch.gradients(
            lambda: {n: g.clone() for n, g in adapter.split_like(adapter.grads).items()}
        )
        backend.step({"default": case.learning_rate})
        watch.step(stats.loss["default"], stats.tokens, stats.supervised)


# --- plain loops


@dataclass(frozen=True)
class Peer:
    """A model of transformers or PEFT that trains, and its start: ``start_model`` within ``off``."""

    model: Any
    start_model: Any
    off: Callable[[], AbstractContextManager[Any]]
    case: UnlearnCase
    direction: Tensor

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """[rows, longest - 1, V] of the next tokens."""
        return _logits(self.model, rows)

    def states(self, rows: Sequence[Row]) -> Tensor:
        """[answer tokens, D]: the layer's output at them."""
        return _states(self.model, rows, self.case.layer)

    def start_logits(self, rows: Sequence[Row]) -> Tensor:
        """`logits` of the start."""
        return self._of_the_start(lambda: _logits(self.start_model, rows))

    def start_states(self, rows: Sequence[Row]) -> Tensor:
        """`states` of the start."""
        return self._of_the_start(lambda: _states(self.start_model, rows, self.case.layer))

    def _of_the_start(self, ask: Callable[[], Tensor]) -> Tensor:
        import torch

        with torch.no_grad(), self.off():
            return ask()


def _logits(model: Any, rows: Sequence[Row]) -> Tensor:
    given = padded(rows)
    given.pop("labels")
    return model(**given).logits[:, :-1]  # type: ignore[no-any-return]


def _states(model: Any, rows: Sequence[Row], layer: int) -> Tensor:
    given, kept = padded(rows), list[Any]()
    asked = given.pop("labels") != IGNORED
    layers = next(m for name, m in model.named_modules() if name.endswith("model.layers"))
    hook = layers[layer].register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(**given)  # all of it, as the peer does
    hook.remove()
    states = kept[0] if not isinstance(kept[0], tuple) else kept[0][0]
    return states[asked]  # type: ignore[no-any-return]


def wide(values: Tensor) -> Tensor:
    """At least float32."""
    import torch

    return values.to(torch.promote_types(values.dtype, torch.float32))


def answer_losses(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """[rows]: NLL of each answer, in fp32 as transformers' own loss."""
    from torch.nn import functional as F

    labels = padded(rows)["labels"][:, 1:]
    each = F.cross_entropy(wide(logits).transpose(1, 2), labels, reduction="none")
    return each.sum(1)


def divergence(policy: Tensor, start: Tensor, rows: Sequence[Row]) -> Tensor:
    """Sum over the answer tokens of KL(start || policy)."""
    from torch.nn import functional as F

    asked = padded(rows)["labels"][:, 1:] != IGNORED
    mine, base = (wide(logits[asked]).log_softmax(-1) for logits in (policy, start))
    return F.kl_div(mine, base, log_target=True, reduction="sum")


def squared_distances(states: Tensor, target: Tensor, rows: Sequence[Row]) -> Tensor:
    """Sum over rows of the mean over a row's answer tokens, and the width, of (h - target)^2."""
    per_token = (wide(states) - wide(target)).square().mean(-1)
    return sum(part.mean() for part in per_token.split([count([row])[1] for row in rows]))  # type: ignore[return-value]


def loss_terms(peer: Peer, rows: RoleRows, whole: RoleRows) -> dict[str, Callable[[], Tensor]]:
    """{term: its part of the step's loss}: of ``rows``, all of a step or some, ``whole`` being all."""
    from torch.nn import functional as F

    forget, retain = rows[FORGET], rows[RETAIN]
    sequences, tokens = len(whole[FORGET]), count(whole[FORGET])[1]
    kept, kept_tokens = len(whole[RETAIN]), count(whole[RETAIN])[1]

    def gap(own: Sequence[Row]) -> Tensor:
        """[rows]: NLL minus that of the start."""
        mine = answer_losses(peer.logits(own), own)
        return mine - answer_losses(peer.start_logits(own), own)

    def preference(scaled: Tensor) -> Tensor:
        return -(2 / BETA) * F.logsigmoid(BETA * scaled).sum() / sequences

    def ascent() -> Tensor:
        return -answer_losses(peer.logits(forget), forget).sum() / tokens

    def steering() -> Tensor:
        states = peer.states(forget)
        return squared_distances(states, STEERING * peer.direction, forget) / sequences

    def embedding() -> Tensor:
        states = peer.states(retain)
        return squared_distances(states, peer.start_states(retain), retain) / kept

    first = {
        "NPO": lambda: preference(gap(forget)),
        "DPO": lambda: preference(gap(forget) - gap(rows[ALTERNATE])),
        "RMU": steering,
    }
    second = {
        "NLL": lambda: answer_losses(peer.logits(retain), retain).sum() / kept_tokens,
        "KL": lambda: (
            divergence(peer.logits(retain), peer.start_logits(retain), retain) / kept_tokens
        ),
        "EMBED": embedding,
    }
    method = peer.case.method
    return {FORGET: first.get(method, ascent), RETAIN: second[METHODS[method]]}


def plain(start: Literal["copy", "off", "full"]) -> Run:
    """A plain loop: clip at 1, fused AdamW. ``full``: all weights train."""
    from transformers.models.llama import modeling_llama  # noqa: F401  imports are not counted

    if start != "full":
        import peft  # noqa: F401

    def run(folder: Path, case: UnlearnCase, rows: RoleRows, watch: Watch) -> Measured:
        import torch

        peer = opened(folder, case, start, case.dtype)
        params = {clean(n): p for n, p in peer.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            params.values(), lr=case.learning_rate, weight_decay=0.0, fused=True
        )
        watch.start()
        for step in range(case.all_steps):
            mine = rows_of_step(case, rows, step)
            watch.saw([ids for own in mine.values() for ids, _ in own])
            terms = loss_terms(peer, mine, mine)
            loss = terms[FORGET]() + terms[RETAIN]()
            loss.backward()
            if start != "full":
                watch.gradients(
                    lambda: {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
                )
            torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss.item(), *tally(mine))
        return {}

    return run


def opened(
    folder: Path, case: UnlearnCase, start: Literal["copy", "off", "full"], dtype: str
) -> Peer:
    """The base in this format, PEFT's adapter over it (not ``full``), and its start."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))
    base.config.use_cache = False
    asked = copy.deepcopy(base).eval().requires_grad_(False) if start != "off" else None
    model: Any = base
    if start != "full":
        from peft import PeftModel

        model = PeftModel.from_pretrained(base, folder / "init", is_trainable=True)
        if dtype == "float64":
            model.double()  # PEFT leaves its adapter in fp32
    model.train()
    off = model.disable_adapter if start == "off" else nullcontext
    direction = load_file(folder / DIRECTION)["direction"]
    return Peer(model, model if asked is None else asked, off, case, direction)
