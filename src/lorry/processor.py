"""The processor: what it is called, what it can do, and the instruction set that Lorry computes with.

That is the best this processor has, or less where ``LORRY_ISA`` holds Lorry to less, so that one
machine can run, and measure, what another kind would: the kernels are built for it
(kernels/build.py), and dtype=auto means what it would mean there. Torch's own libraries have
switches of their own, which they read once, as torch starts: see docs/running.md.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Literal, get_args

from lorry.errors import ConfigError, suggest_nearest

CPUINFO = Path("/proc/cpuinfo")

# From the most to the least; each has all that those after it have. `portable` is what every
# processor of its kind has: SSE2 on x86-64, NEON on aarch64.
Isa = Literal["amx", "avx512_bf16", "avx512", "avx2", "portable"]
ISAS: tuple[Isa, ...] = get_args(Isa)
X86 = ("x86_64", "AMD64")

# What computes attention on a CPU: kernels on matrix tiles, in dot products of bfloat16 pairs (what
# is float32 then on vectors), on vectors, or torch's own.
AttentionKernel = Literal["tiles", "dots", "vectors", "none"]

# What each wants of an x86-64 processor beyond those after it, as /proc/cpuinfo writes it; avx512
# and avx2 are the psABI's levels x86-64-v4 and x86-64-v3.
FEATURES: dict[Isa, frozenset[str]] = {
    "amx": frozenset({"amx_tile", "amx_bf16"}),
    "avx512_bf16": frozenset({"avx512_bf16"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "avx2": frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
    "portable": frozenset(),
}


def cpuinfo_values(*names: str) -> list[str]:
    """Values of the first processor under these names, those that the system gives, in order."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    values = dict[str, str]()
    for line in lines:
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    return [values[name] for name in names if name in values]


def processor_name() -> str:
    """The processor's name."""
    return (
        next(iter(cpuinfo_values("model name")), "") or platform.processor() or platform.machine()
    )


def processor_flags() -> set[str]:
    """The processor's features as Linux lists them; none where it is another system."""
    return set(" ".join(cpuinfo_values("flags", "Features")).split())


def processor_isas() -> tuple[Isa, ...]:
    """The instruction sets that this processor has, the best first; always `portable`."""
    found: list[Isa] = []
    flags = processor_flags() if platform.machine() in X86 else frozenset[str]()
    for isa in reversed(ISAS):
        if not flags >= FEATURES[isa]:
            break
        found.insert(0, isa)
    return tuple(found)


def requested_isa() -> Isa | None:
    """The instruction set that ``LORRY_ISA`` holds Lorry to, in capitals or not; None: the best there is.

    Raises ConfigError for an unknown name, and for one that this processor lacks.
    """
    word = os.environ.get("LORRY_ISA", "")
    if not word:
        return None
    here = processor_isas()
    # oneDNN's switch beside it is written in capitals
    for isa in here:
        if isa == word.lower():
            return isa
    why = (
        f"this processor ({processor_name()}, {platform.machine()}) lacks it"
        if word.lower() in ISAS
        else f"there is no such instruction set{suggest_nearest(word, here)}"
    )
    raise ConfigError(
        f"LORRY_ISA={word!r} in the environment: {why}; give one of those it has, "
        f"{', '.join(here)}, or leave it out"
    )


def isa_in_words() -> str:
    """The instruction set that Lorry computes with. `native` where it is the compiler that knows what
    there is: on aarch64, and where the system does not tell the features. Raises ConfigError as
    `requested_isa`.
    """
    best = processor_isas()[0]
    return requested_isa() or (best if best != "portable" else "native")


def may_use_bfloat16() -> bool:
    """Whether bfloat16 products of the processor may be used, if it has them, and are worth it. Raises
    ConfigError as `requested_isa`.

    Without tiles Intel's take longer than those in float32: of a SmolLM2's matrices, forward and
    backward, oneDNN did 100 GFLOP/s against 190 (model 207, one thread). AMD's do twice as many
    numbers in an instruction as float32, and oneDNN 500 GFLOP/s against MKL's 110 and the 230 of
    `kernels/matmul.py` (family 26, model 2, Zen 5, one thread).
    """
    isa = requested_isa()
    if isa not in (None, "amx", "avx512_bf16"):
        return False
    tiles = isa != "avx512_bf16" and "amx_bf16" in processor_flags()
    return tiles or cpuinfo_values("vendor_id") != ["GenuineIntel"]


def has_fast_dots() -> bool:
    """Whether dot products of bfloat16 pairs (AVX512-BF16) may be used by the kernels and are worth it:
    AMD's do twice as many numbers in an instruction as float32 there, Intel's take three times as long.
    Raises ConfigError as `requested_isa`.
    """
    return (
        processor_isas()[0] == "avx512_bf16"
        and requested_isa() in (None, "avx512_bf16")
        and cpuinfo_values("vendor_id") == ["AuthenticAMD"]
    )


def has_bfloat16() -> bool:
    """Whether matrices are multiplied in bfloat16 by this processor itself, and may be: what
    models/loading/load.py asks torch, without it. On macOS they are not: Apple's chips could, but
    Accelerate, which torch calls there, has float32 alone.
    """
    return may_use_bfloat16() and bool(
        processor_flags() & {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}
    )


def mkl_is_slow() -> bool:
    """Whether MKL multiplies float32 with half of what this processor may use: AVX2, on AMD's that have
    AVX-512. Raises ConfigError as `requested_isa`.
    """
    isa = requested_isa() or processor_isas()[0]
    return isa not in ("avx2", "portable") and cpuinfo_values("vendor_id") == ["AuthenticAMD"]


def compiler_flags() -> tuple[str, ...]:
    """What tells GCC and clang, and the kernels' sources, which instructions to use. Raises ConfigError as `requested_isa`."""
    isa, x86 = requested_isa(), platform.machine() in X86
    # as wide as there is: GCC prefers 256 bits on its own, which clocks of today no longer ask for
    wide = ("-mprefer-vector-width=512",) if x86 else ()
    # which are worth it no compiler knows
    dots = ("-DLORRY_DOTS",) if has_fast_dots() else ()
    match isa:
        case None | "amx":
            return ("-march=native", *wide, *dots)
        case "avx512_bf16":
            # a compiler for a processor without tiles may not know their names
            tiles = ("-mno-amx-bf16", "-mno-amx-int8", "-mno-amx-tile")
            return (
                "-march=native",
                *(tiles if "amx_tile" in processor_flags() else ()),
                *wide,
                *dots,
            )
        case "avx512":
            return ("-march=x86-64-v4", *wide)
        case "avx2":
            return ("-march=x86-64-v3",)
        case "portable":
            arm = platform.machine() in ("aarch64", "arm64")
            return ("-march=x86-64",) if x86 else ("-march=armv8-a",) if arm else ()
