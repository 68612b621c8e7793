"""The two ways that Lorry's own decoder generates."""

from __future__ import annotations

import pytest

from lorry.kernels import decode as kernel
from lorry.kernels import kernel_status, load_library


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the C++ kernels and the cache for them, where there are any, and without."""
    if request.param == "torch":
        monkeypatch.setattr(kernel, "supports_decode", lambda dtype, device: False)
    elif load_library() is None:
        pytest.skip(f"kernels: {kernel_status().reason}")
    return str(request.param)
