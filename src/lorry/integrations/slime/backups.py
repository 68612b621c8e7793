"""slime's copies of weights on the CPU, by tag ("actor", "ref", ...), with no more than what differs: a
frozen weight that two tags have alike is kept once, and none is kept where nothing reads it.

slime keeps a whole copy of the model per tag, which scoring by another policy restores, and colocated
engines are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorry.errors import ContractError
from lorry.integrations.slime.arguments import other_scorer
from lorry.integrations.slime.provider import import_part
from lorry.integrations.slime.rebinding import Rebinding
from lorry.integrations.slime.sync.ranks import say

Source = Callable[[], Iterable[tuple[str, Tensor]]]


def install_backups(args: Any, rebinding: Rebinding) -> None:
    """Put it in the place of slime's backuper. Raises ConfigError."""
    keep_frozen = needs_frozen(args)

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        def create(source_getter: Source, single_tag: str | None) -> Any:
            if single_tag is not None:
                # slime keeps no copies
                return original(source_getter=source_getter, single_tag=single_tag)
            return AdapterBackuper(source_getter, keep_frozen=keep_frozen)

        return create

    owner = import_part("slime.utils.tensor_backper").TensorBackuper
    rebinding.put(owner, "create", replace, static=True)


def needs_frozen(args: Any) -> bool:
    """Whether anything reads copies of frozen weights: colocated engines are sent them, and another
    checkpoint is loaded over the model for a reference, a teacher or an old policy."""
    return bool(
        getattr(args, "colocate", False)
        or other_scorer(args)
        or getattr(args, "keep_old_actor", False)
    )


class AdapterBackuper:
    """slime's TensorBackuper, by its methods. ``keep_frozen``: off where there is one tag, and its frozen
    weights are those in the model. Between a restore or backup and the next nothing else writes frozen
    weights, but for a checkpoint that is loaded and backed up under a tag of its own."""

    def __init__(self, source_getter: Source, *, keep_frozen: bool) -> None:
        self._source, self._keep_frozen = source_getter, keep_frozen
        self._copies: dict[str, dict[str, Tensor]] = {}
        # whose frozen weights are in the model
        self._live: str | None = None

    @property
    def backup_tags(self) -> list[str]:
        """The tags there are."""
        return list(self._copies)

    def get(self, tag: str) -> dict[str, Tensor]:
        """{name: copy} of a tag; without frozen weights where those are not kept."""
        return self._copies[tag]

    @torch.no_grad()
    def backup(self, tag: str) -> None:
        """Keep the model as it is under a tag. Raises ContractError for a second tag where frozen
        weights are not kept."""
        if not self._keep_frozen and self._copies.keys() - {tag}:
            raise ContractError(
                f"a second copy of the model ({tag}) was not foreseen by the flags, and frozen weights "
                "were not kept; report the flags of this run"
            )
        is_new = tag not in self._copies
        copies = self._copies.setdefault(tag, {})
        for name, tensor in self._source():
            if not is_frozen(tensor):
                copies[name] = _copied(tensor, copies.get(name))
            elif self._keep_frozen and (is_new or self._live != tag):
                copies[name] = self._frozen(name, tensor, is_new)
        _wait()
        self._live = tag
        if is_new:
            self._report(tag)

    @torch.no_grad()
    def copy(self, *, src_tag: str, dst_tag: str) -> None:
        """Make one tag the other's."""
        source, target = self._copies[src_tag], self._copies[dst_tag]
        for name, tensor in self._source():
            if not is_frozen(tensor):
                target[name].copy_(source[name])
            elif name in source:
                target[name] = source[name]
        if self._live == dst_tag:
            # the model's may be others now
            self._live = None

    @torch.no_grad()
    def restore(self, tag: str) -> None:
        """Make the model what it was when it was backed up."""
        copies = self._copies[tag]
        there = self._copies.get(self._live or "", {})
        for name, tensor in self._source():
            # what it shares with the tag that is in the model is in the model
            if name in copies and not (is_frozen(tensor) and copies[name] is there.get(name)):
                tensor.copy_(copies[name], non_blocking=True)
        _wait()
        self._live = tag

    def _frozen(self, name: str, tensor: Tensor, is_new: bool) -> Tensor:
        """A copy of a frozen weight: another tag's, where that has the same bits."""
        if not is_new and self._live is not None:
            return self._copies[self._live][name]
        own = _copied(tensor, None)
        _wait()
        for copies in self._copies.values():
            if name in copies and torch.equal(copies[name], own):
                return copies[name]
        return own

    def _report(self, tag: str) -> None:
        copies = self._copies[tag]
        others = {
            id(t) for other, held in self._copies.items() if other != tag for t in held.values()
        }
        own = sum(t.nbytes for t in copies.values() if id(t) not in others)
        whole = sum(tensor.nbytes for _, tensor in self._source())
        say(
            f"backup {tag!r} keeps {own / 2**20:.4g} MiB on the CPU, where slime's copy of the model "
            f"has {whole / 2**20:.4g} MiB"
        )


def is_frozen(tensor: Tensor) -> bool:
    """Whether training leaves it alone; a buffer may change."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _copied(tensor: Tensor, into: Tensor | None) -> Tensor:
    if into is None:
        into = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    into.copy_(tensor.detach(), non_blocking=True)
    return into


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
