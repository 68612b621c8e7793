"""What holds a file descriptor of a run open until it is closed, or a ``with`` block ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class CloseableResource(ABC):
    """A context manager by its ``close``, like `contextlib.closing`, for classes that own a
    descriptor themselves. An error of the block goes on; one of ``close`` is raised.
    """

    @abstractmethod
    def close(self) -> None:
        """Give the descriptor back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
