"""Unlearning written a second time, plainly: transformers' model in float64, one row at a time,
whole logits, autograd. Nothing of Lorry's losses, scores or batches is used.

A `Row` has tokens and the place where its answer begins; a twin's loss is the mean over all rows of a
step at once, so that accumulation and packing have something to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import get_bank
from lorry.models.decoder.model import Decoder
from tests.support import tiny

VOCAB, LAYERS, LAYER = 131, 3, 1
FORGET, RETAIN, IDK, RETAIN_IDK = "forget", "retain", "alternate", "retain's alternate"


@dataclass(frozen=True)
class Row:
    """``kind``: forget, retain, or another answer to the question of either; ``group``: of rows of
    one question."""

    kind: str
    group: int
    tokens: list[int]
    answer: int

    @property
    def weights(self) -> list[float]:
        return [float(t >= self.answer) for t in range(len(self.tokens))]


def ragged_rows(seed: int = 0, pairs: int = 4, answers: tuple[int, int] = (2, 8)) -> list[Row]:
    """Prompts and answers of several lengths; group g holds a forget row, a retain row and another
    answer to either.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(0, VOCAB, (n,), generator=draw).tolist()  # noqa: E731
    between = lambda low, high: int(torch.randint(low, high, (), generator=draw))  # noqa: E731
    rows = []
    for g in range(pairs):
        for offset, kind, other in ((0, FORGET, IDK), (pairs, RETAIN, RETAIN_IDK)):
            prompt = ids(between(2, 6))
            for of in (kind, other):
                answer = ids(between(*answers))
                rows.append(Row(of, g + offset, prompt + answer, len(prompt)))
    return rows


def twin_model(path: Path, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Decoder]:
    """transformers' model in float64, and Lorry's of the same weights."""
    theirs = tiny.fresh("llama", vocab_size=VOCAB, num_hidden_layers=LAYERS)
    ours = tiny.decoder(theirs, path, dtype)
    return theirs.double().requires_grad_(False), ours


@dataclass(frozen=True)
class Seen:
    """Of a row: logits [L,V], the output of layer `LAYER` [L,D]; and the start's."""

    row: Row
    logits: Tensor
    states: Tensor
    start_logits: Tensor
    start_states: Tensor

    @property
    def targets(self) -> Tensor:
        return torch.tensor(self.row.tokens[self.row.answer :])

    def answer(self, values: Tensor) -> Tensor:
        """The rows of logits that predict the answer."""
        return values[self.row.answer - 1 : -1]

    def nll(self, values: Tensor | None = None) -> Tensor:
        """Sum over the answer."""
        logits = self.answer(self.logits if values is None else values)
        return F.cross_entropy(logits, self.targets, reduction="sum")

    @property
    def start_nll(self) -> Tensor:
        return self.nll(self.start_logits)


class Twin:
    """transformers' model with one of Lorry's adapters as W + s B A by hooks, in float64.
    ``leaves``: {module: (A, B)}, with gradients after `backward`.
    """

    def __init__(self, theirs: nn.Module, ours: Decoder, adapter: str) -> None:
        self.theirs, self.on = theirs, True
        slots = get_bank(ours)[adapter].slots
        self.leaves = {
            path: (
                slot.A.detach().double().requires_grad_(),
                slot.B.detach().double().requires_grad_(),
            )
            for path, slot in slots.items()
        }
        self.scales = {path: slot.scale for path, slot in slots.items()}

    def see(self, row: Row) -> Seen:
        with torch.no_grad():
            start_logits, start_states = self._run(row, {})
        return Seen(row, *self._run(row, self.leaves), start_logits, start_states)

    def _run(self, row: Row, leaves: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        handles = []
        for path, (a, b) in leaves.items():

            def add(
                _: nn.Module, args: Any, out: Tensor, a: Tensor = a, b: Tensor = b,
                scale: float = self.scales[path],
            ) -> Tensor:  # fmt: skip
                return out + scale * (args[0] @ a.t()) @ b.t()

            handles.append(self.theirs.get_submodule(path).register_forward_hook(add))
        out = self.theirs(input_ids=torch.tensor([row.tokens]), output_hidden_states=True)
        for handle in handles:
            handle.remove()
        return out.logits[0], out.hidden_states[LAYER + 1][0]

    def gradient(self, loss: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """{module: (dA, dB)}; zeros where the loss does not reach."""
        flat = [x for pair in self.leaves.values() for x in pair]
        found = torch.autograd.grad(loss, flat, allow_unused=True, retain_graph=True)
        whole = [torch.zeros_like(x) if g is None else g for x, g in zip(flat, found, strict=True)]
        return {path: (whole[2 * i], whole[2 * i + 1]) for i, path in enumerate(self.leaves)}


# --- the losses, from whole logits


def of_kind(seen: Sequence[Seen], kind: str) -> list[Seen]:
    return [s for s in seen if s.row.kind == kind]


def token_mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)).mean()


def sequence_mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).mean()


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


def token_nll(s: Seen) -> Tensor:
    return F.cross_entropy(s.answer(s.logits), s.targets, reduction="none")


def target_prob(s: Seen) -> Tensor:
    return s.answer(s.logits).softmax(1).gather(1, s.targets[:, None])[:, 0]


def retain_nll(seen: Sequence[Seen]) -> Tensor:
    return token_mean([token_nll(s) for s in of_kind(seen, RETAIN)])


def kl(q: Tensor, p: Tensor) -> Tensor:
    """[t]: KL(q || p) of logits."""
    return (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).sum(1)


def retain_kl(seen: Sequence[Seen]) -> Tensor:
    return token_mean(
        [kl(s.answer(s.start_logits), s.answer(s.logits)) for s in of_kind(seen, RETAIN)]
    )


def retain_embed(seen: Sequence[Seen]) -> Tensor:
    return sequence_mean(
        [
            (s.states - s.start_states)[s.row.answer :].square().mean(1).mean()
            for s in of_kind(seen, RETAIN)
        ]
    )


def ascent(seen: Sequence[Seen]) -> Tensor:
    return -token_mean([token_nll(s) for s in of_kind(seen, FORGET)])


def npo(seen: Sequence[Seen], beta: float = 0.1) -> Tensor:
    return sequence_mean(
        [-2 / beta * log_sigmoid(beta * (s.nll() - s.start_nll)) for s in of_kind(seen, FORGET)]
    )


def simnpo(seen: Sequence[Seen], beta: float = 4.5, delta: float = 0.0) -> Tensor:
    return sequence_mean(
        [
            -2 / beta * log_sigmoid(beta * (s.nll() / len(s.targets) - delta))
            for s in of_kind(seen, FORGET)
        ]
    )


def dpo(seen: Sequence[Seen], beta: float = 0.1) -> Tensor:
    other = {s.row.group: s for s in of_kind(seen, IDK)}
    reward = lambda s: s.start_nll - s.nll()  # noqa: E731
    return sequence_mean(
        [
            -2 / beta * log_sigmoid(beta * (reward(other[s.row.group]) - reward(s)))
            for s in of_kind(seen, FORGET)
        ]
    )


def rmu(direction: Tensor, adaptive: bool = False) -> Callable[[Sequence[Seen]], Tensor]:
    def loss(seen: Sequence[Seen]) -> Tensor:
        parts = []
        for s in of_kind(seen, FORGET):
            own, start = s.states[s.row.answer :], s.start_states[s.row.answer :]
            length = 2.0 * (start.norm(dim=1).mean() if adaptive else 1.0)
            parts.append((own - length * direction).square().mean(1).mean())
        return sequence_mean(parts)

    return loss


def undial(seen: Sequence[Seen], beta: float = 10.0) -> Tensor:
    parts = []
    for s in of_kind(seen, FORGET):
        lowered = s.answer(s.start_logits) - beta * F.one_hot(s.targets, VOCAB)
        parts.append(-(lowered.softmax(1) * s.answer(s.logits).log_softmax(1)).sum(1))
    return token_mean(parts)


def ceu(seen: Sequence[Seen], skip: int = 1) -> Tensor:
    parts = []
    for s in of_kind(seen, FORGET):
        logits, targets = s.answer(s.logits)[skip:], s.targets[skip:]
        p = logits.softmax(1)
        q = (p * (1 - F.one_hot(targets, VOCAB))).detach()
        q = q / q.sum(1, keepdim=True)
        parts.append(-(q * p.log()).sum(1))
    return token_mean(parts)


def wga(seen: Sequence[Seen], beta: float = 1.0) -> Tensor:
    return -token_mean(
        [(target_prob(s) ** beta).detach() * token_nll(s) for s in of_kind(seen, FORGET)]
    )


def satimp(seen: Sequence[Seen], beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    parts = []
    for s in of_kind(seen, FORGET):
        p = target_prob(s).detach()
        parts.append(p**beta1 * (1 - p) ** beta2 * token_nll(s))
    return -token_mean(parts)


def pdu(seen: Sequence[Seen]) -> Tensor:
    spread = lambda z: (z.max(1).values - z.mean(1)) ** 2  # noqa: E731
    return token_mean([spread(s.answer(s.logits)) for s in of_kind(seen, FORGET)])


def ihl(seen: Sequence[Seen]) -> Tensor:
    parts = []
    for s in of_kind(seen, FORGET):
        p = s.answer(s.logits).softmax(1)
        rival = p.masked_fill(F.one_hot(s.targets, VOCAB).bool(), 0).max(1).values
        parts.append((1 + target_prob(s) - rival).clamp(min=0))
    return token_mean(parts)


def me(seen: Sequence[Seen]) -> Tensor:
    logp = lambda s: s.answer(s.logits).log_softmax(1)  # noqa: E731
    return token_mean([-math.log(VOCAB) - logp(s).mean(1) for s in of_kind(seen, FORGET)])


def idk_learnt(seen: Sequence[Seen]) -> Tensor:
    return token_mean([token_nll(s) for s in of_kind(seen, IDK)])


def answer_preserved(seen: Sequence[Seen], beta: float = 0.1) -> Tensor:
    other = {s.row.group: s for s in of_kind(seen, RETAIN_IDK)}
    return sequence_mean(
        [
            -log_sigmoid(beta * (other[s.row.group].nll() - s.nll())) / beta
            for s in of_kind(seen, RETAIN)
        ]
    )


def jsd(p: Tensor, q: Tensor) -> Tensor:
    """[t]: (KL(p || m) + KL(q || m)) / 2 of probabilities, m their mean; 0 log 0 = 0."""
    m = (p + q) / 2
    part = lambda x: torch.where(x > 0, x * (x.clamp(min=1e-300) / m).log(), 0.0).sum(1)  # noqa: E731
    return (part(p) + part(q)) / 2


def jensun(seen: Sequence[Seen]) -> Tensor:
    refusal = {s.row.group: s.targets.tolist() for s in of_kind(seen, IDK)}
    parts = []
    for s in of_kind(seen, FORGET):
        words = refusal[s.row.group]
        ids = torch.tensor([words[i % len(words)] for i in range(len(s.targets))])
        parts.append(jsd(s.answer(s.logits).softmax(1), F.one_hot(ids, VOCAB).double()))
    return token_mean(parts)


def retain_jsd(seen: Sequence[Seen]) -> Tensor:
    return token_mean(
        [
            jsd(s.answer(s.logits).softmax(1), s.answer(s.start_logits).softmax(1))
            for s in of_kind(seen, RETAIN)
        ]
    )


# --- the peer's averages: over prompts, and not shifted


def peer_kl(seen: Sequence[Seen]) -> Tensor:
    """Over all logits of retain rows."""
    return token_mean([kl(s.start_logits, s.logits) for s in of_kind(seen, RETAIN)])


def peer_undial(seen: Sequence[Seen], beta: float = 10.0) -> Tensor:
    """Prompts count, and where the label is -100 the mask is written at entry -100."""
    parts = []
    for s in of_kind(seen, FORGET):
        labels = torch.tensor(
            [t if i >= s.row.answer else -100 for i, t in enumerate(s.row.tokens)]
        )[1:]
        mask = torch.zeros(len(labels), VOCAB, dtype=torch.float64)
        mask[torch.arange(len(labels)), labels] = 1.0
        soft = (s.start_logits[:-1] - beta * mask).softmax(1)
        parts.append(-(soft * s.logits[:-1].log_softmax(1)).sum(1))
    return token_mean(parts)


def peer_pdu(seen: Sequence[Seen]) -> Tensor:
    """The mask of the labels taken for that of the logits."""
    parts = []
    for s in of_kind(seen, FORGET):
        z = s.logits[s.row.answer :]
        parts.append((z.max(1).values - z.mean(1)) ** 2)
    return token_mean(parts)


LN2 = math.log(2)
