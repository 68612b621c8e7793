"""Copies of all weights on the CPU, by tag: what scoring switches between, and the colocated updater
sends from. (The file's name is slime's.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SourceGetter = Callable[[], Iterable[tuple[str, Tensor]]]


class TensorBackuper:
    """Backups of what ``source_getter`` yields; a tag is one whole copy."""

    @staticmethod
    def create(source_getter: SourceGetter, single_tag: str | None) -> TensorBackuper:
        assert single_tag is None, "the double keeps copies"
        return TensorBackuper(source_getter)

    def __init__(self, source_getter: SourceGetter) -> None:
        self._source_getter = source_getter
        self._backups: dict[str, dict[str, Tensor]] = {}

    @property
    def backup_tags(self) -> list[str]:
        return list(self._backups)

    def get(self, tag: str) -> dict[str, Tensor]:
        return self._backups[tag]

    @torch.no_grad()
    def backup(self, tag: str) -> None:
        copies = self._backups.setdefault(tag, {})
        for name, tensor in self._source_getter():
            if name not in copies:
                copies[name] = torch.empty_like(tensor, device="cpu")
            copies[name].copy_(tensor.detach())

    @torch.no_grad()
    def copy(self, *, src_tag: str, dst_tag: str) -> None:
        for name, tensor in self._backups[dst_tag].items():
            tensor.copy_(self._backups[src_tag][name])

    @torch.no_grad()
    def restore(self, tag: str) -> None:
        copies = self._backups[tag]
        for name, tensor in self._source_getter():
            assert name in copies
            tensor.copy_(copies[name])
