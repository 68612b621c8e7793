"""Every engine held to one instruction set: what this processor has, or less, as a machine without it
would run.

`hold_to` sets the switch of each library in the environment, which Lorry's and the peers' processes
inherit; they read it as torch starts, so it has to be called before that. `libraries` asks them
what they took.

    python benchmarks/isa.py avx2        # what ATen, oneDNN, MKL and Lorry make of it here
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from lorry.errors import ConfigError
from lorry.processor import ISAS, has_bfloat16, isa_in_words, requested_isa

# ATen, oneDNN and MKL know these by names of their own; GCC, which torch.compile calls, by the levels
# of the x86-64 ABI. Each is a limit: nothing is used that the processor lacks.
LIBRARY_NAMES: Mapping[str, tuple[str, str, str, str]] = {
    "amx": ("avx512", "AVX10_1_512_AMX_FP16", "AVX512_E4", "native"),
    "avx512_bf16": ("avx512", "AVX10_1_512", "AVX512_E3", "native"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512", "x86-64-v4"),
    "avx2": ("avx2", "AVX2", "AVX2", "x86-64-v3"),
    "portable": ("default", "SSE41", "SSE4_2", "x86-64"),
}
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "TORCHINDUCTOR_CPP_MARCH",
)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option --isa."""
    parser.add_argument(
        "--isa", choices=ISAS, help="hold every engine to it; as it comes: the best there is here"
    )


def switches(isa: str) -> dict[str, str]:
    """The environment that holds Lorry, and everything that peers call, to an instruction set."""
    return {"LORRY_ISA": isa, **dict(zip(VARIABLES, LIBRARY_NAMES[isa], strict=True))}


def hold_to(isa: str | None) -> None:
    """Set the switches for this process and those that it starts; None: leave all as it is.

    Raises SystemExit for what this processor lacks, and where torch has started already.
    """
    if isa is None:
        return
    if "torch" in sys.modules:
        raise SystemExit(f"torch has started already and cannot be held to {isa}")
    os.environ |= switches(isa)
    try:
        requested_isa()
    except ConfigError as e:
        raise SystemExit(str(e)) from None


def described() -> dict[str, Any]:
    """For a record: the set's name, whether it was asked for, whether bfloat16 is native to it, and
    what the libraries say."""
    return {
        "name": isa_in_words(),
        "held": requested_isa() is not None,
        "bfloat16": has_bfloat16(),
        "libraries": libraries(),
    }


PROBE = """
import torch
from lorry import kernels
a = torch.ones(64, 64)
a @ a
torch.nn.functional.linear(a.bfloat16(), a.bfloat16())
torch.ops.mkldnn._linear_pointwise(a.to_mkldnn().to_dense(), a, None, "none", [], "")
print("ATen:", torch.backends.cpu.get_cpu_capability())
print("Lorry:", kernels.kernel_status().line())
"""


def libraries() -> dict[str, str]:
    """What each library says that it computes with, in a process of its own."""
    said = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {}
    for name, pattern in {
        "ATen": r"^ATen: (.*)",
        "oneDNN": r"^onednn_verbose,.*info,cpu,isa:(.*)",
        "MKL": r"^MKL_VERBOSE .*64 architecture (.*), Lnx",
        "Lorry": r"^Lorry: (.*)",
    }.items():
        if match := re.search(pattern, said, flags=re.MULTILINE):
            found[name] = match[1]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("isa", nargs="?", choices=ISAS)
    hold_to(parser.parse_args().isa)
    print(json.dumps(described(), indent=1))
