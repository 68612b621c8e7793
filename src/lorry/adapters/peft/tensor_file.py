"""What is read of an open file of tensors."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class TensorFile(Protocol):
    """The face of `safetensors.safe_open`."""

    def keys(self) -> list[str]:
        """Names of its tensors."""

    def get_slice(self, name: str) -> Any:
        """What knows the shape of a tensor (`get_shape`), nothing read."""

    def get_tensor(self, name: str) -> Tensor:
        """Its values."""
