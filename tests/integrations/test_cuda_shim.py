"""The CUDA shim is the tests' own: nothing that is shipped imports it, and it says what it replaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHIM = "cuda_shim"


def names_it(path: Path) -> bool:
    return SHIM in path.read_text()


def test_nothing_that_is_shipped_imports_it() -> None:
    shipped = (ROOT / room for room in ("src", "examples", "benchmarks"))
    assert [p for room in shipped for p in room.rglob("*.py") if names_it(p)] == []
    # the check sees an import where there is one
    assert names_it(ROOT / "tests/support/megatron_gradients.py")


def test_it_lists_what_it_replaces_and_puts_it_back() -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is an extra")
    from tests.support import cuda_shim

    before = torch.cuda.current_device
    with cuda_shim.cuda_on_cpu():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert str(torch.cuda.current_device()) == "cpu"
    assert torch.cuda.current_device is before
    assert all(name in str(cuda_shim.__doc__) for name in cuda_shim.REPLACED)


def test_without_megatron_the_package_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['megatron'] = None; sys.modules['megatron.core'] = None\n"
        "import lorry.integrations.arguments\n"
        "try:\n    import lorry.integrations.megatron\n"
        "except Exception as e:\n    print(type(e).__name__, e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigError megatron-core is not installed")
    assert "lorry[megatron]" in done.stdout
