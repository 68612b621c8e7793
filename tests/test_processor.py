"""What LORRY_ISA holds Lorry to: what the compiler is told, what dtype=auto means, what is refused."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from lorry import kernels, processor
from lorry.errors import ConfigError
from lorry.kernels import matmul
from lorry.models.loading.load import has_fast_bfloat16

# what Linux tells of some processors, as far as it matters here
V3 = "sse2 avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
SKYLAKE, COOPER_LAKE = V4, f"{V4} avx512_bf16"
SAPPHIRE_RAPIDS = f"{COOPER_LAKE} avx512_fp16 amx_tile amx_bf16 amx_int8"
WIDE = "-mprefer-vector-width=512"


def put_in(
    flags: str,
    patch: pytest.MonkeyPatch,
    folder: Path,
    *,
    machine: str = "x86_64",
    isa: str = "",
    vendor: str = "GenuineIntel",
) -> None:
    """Another processor, and what LORRY_ISA says there."""
    (folder / "cpuinfo").write_text(f"vendor_id : {vendor}\nmodel name : A Xeon\nflags : {flags}\n")
    patch.setattr(processor, "CPUINFO", folder / "cpuinfo")
    patch.setattr(processor.platform, "machine", lambda: machine)
    patch.setenv("LORRY_ISA", isa)


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        (SAPPHIRE_RAPIDS, ("amx", "avx512_bf16", "avx512", "avx2", "portable")),
        (COOPER_LAKE, ("avx512_bf16", "avx512", "avx2", "portable")),
        (SKYLAKE, ("avx512", "avx2", "portable")),
        (V3, ("avx2", "portable")),
        ("sse2 avx", ("portable",)),
        # bfloat16 without 512 bits is none of these sets
        (f"{V3} avx512_bf16", ("avx2", "portable")),
    ],
)
def test_what_a_processor_has(
    flags: str, has: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_in(flags, monkeypatch, tmp_path)
    assert processor.processor_isas() == has
    assert processor.isa_in_words() == (has[0] if len(has) > 1 else "native")
    assert processor.compiler_flags() == ("-march=native", WIDE)


@pytest.mark.parametrize(
    ("isa", "flags", "bfloat16"),
    [
        ("amx", ("-march=native", WIDE), True),
        (
            "avx512_bf16",
            ("-march=native", "-mno-amx-bf16", "-mno-amx-int8", "-mno-amx-tile", WIDE),
            False,
        ),
        ("avx512", ("-march=x86-64-v4", WIDE), False),
        ("avx2", ("-march=x86-64-v3",), False),
        ("portable", ("-march=x86-64",), False),
    ],
)
def test_what_each_means(
    isa: str,
    flags: tuple[str, ...],
    bfloat16: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    put_in(SAPPHIRE_RAPIDS, monkeypatch, tmp_path, isa=isa)
    assert processor.isa_in_words() == isa
    assert processor.compiler_flags() == flags
    assert processor.has_bfloat16() == has_fast_bfloat16(torch.device("cpu")) == bfloat16


@pytest.mark.parametrize(
    ("flags", "vendor", "fast", "dots"),
    [
        (SAPPHIRE_RAPIDS, "GenuineIntel", True, False),
        (COOPER_LAKE, "GenuineIntel", False, False),  # slower than float32, where it was measured
        (COOPER_LAKE, "AuthenticAMD", True, True),
        (SKYLAKE, "AuthenticAMD", False, False),
    ],
)
def test_where_bfloat16_is_worth_it(
    flags: str,
    vendor: str,
    fast: bool,
    dots: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags.split(), True))
    put_in(flags, monkeypatch, tmp_path, vendor=vendor)
    assert processor.has_bfloat16() == has_fast_bfloat16(torch.device("cpu")) == fast
    assert processor.has_fast_dots() == dots
    monkeypatch.setenv("LORRY_ISA", "avx2")  # held to less, there are none
    assert not processor.has_fast_dots()


@pytest.mark.parametrize(
    ("flags", "vendor", "isa", "slow"),
    [
        (COOPER_LAKE, "AuthenticAMD", "", True),
        (SKYLAKE, "AuthenticAMD", "", True),
        (COOPER_LAKE, "AuthenticAMD", "avx512", True),
        (COOPER_LAKE, "AuthenticAMD", "avx2", False),
        (V3, "AuthenticAMD", "", False),
        (SAPPHIRE_RAPIDS, "GenuineIntel", "", False),
        (SKYLAKE, "GenuineIntel", "", False),
    ],
)
def test_where_mkl_is_slow(
    flags: str, vendor: str, isa: str, slow: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_in(flags, monkeypatch, tmp_path, vendor=vendor, isa=isa)
    assert processor.mkl_is_slow() == slow
    for mkl, kernels_run in ((True, True), (False, True), (True, False)):
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda has=mkl: has)
        monkeypatch.setattr(matmul, "load_library", lambda has=kernels_run: has or None)
        used = matmul.multiplies_float32.__wrapped__()
        assert used == (slow and mkl and kernels_run)


def test_capitals_mean_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ONEDNN_MAX_CPU_ISA=AVX2 is written so, and LORRY_ISA=AVX2 beside it was no such instruction set."""
    for isa in processor.ISAS:
        put_in(SAPPHIRE_RAPIDS, monkeypatch, tmp_path, isa=isa.upper())
        assert processor.requested_isa() == processor.isa_in_words() == isa


def test_aarch64(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_in("", monkeypatch, tmp_path, machine="aarch64")
    (tmp_path / "cpuinfo").write_text("Features : fp asimd bf16\n")
    assert processor.isa_in_words() == "native"
    assert processor.compiler_flags() == ("-march=native",)
    assert processor.has_bfloat16()
    # macOS lists nothing, and its torch has no library for bfloat16
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert not processor.has_bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
        assert has_fast_bfloat16(torch.device("cpu"))
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not has_fast_bfloat16(torch.device("cpu"))
    monkeypatch.setenv("LORRY_ISA", "portable")
    assert processor.compiler_flags() == ("-march=armv8-a",)
    assert not processor.has_bfloat16()
    monkeypatch.setenv("LORRY_ISA", "avx2")
    with pytest.raises(
        ConfigError, match=r"aarch64. lacks it; give one of those it has, portable,"
    ):
        processor.compiler_flags()


@pytest.mark.parametrize(
    ("isa", "why"),
    [
        ("amx", "this processor .A Xeon, x86_64. lacks it; .* it has, avx512, avx2, portable, or"),
        ("AMX", "this processor .A Xeon, x86_64. lacks it; .* it has, avx512, avx2, portable, or"),
        ("neon", "there is no such instruction set; give one of those it has"),
        ("AVX-512", "there is no such instruction set .did you mean 'avx512'..; give one of those"),
        # the nearest that it has
        ("avx512_bf", "there is no such instruction set .did you mean 'avx512'..; give one of"),
    ],
)
def test_what_the_processor_lacks_is_refused_wherever_it_is_asked(
    isa: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LORRY_KERNELS", raising=False)
    monkeypatch.setattr(kernels.build, "_build_and_load", kernels.build._build_and_load.__wrapped__)
    put_in(SKYLAKE, monkeypatch, tmp_path, isa=isa)
    for ask in (
        kernels.kernel_status,
        kernels.load_library,
        processor.has_bfloat16,
        lambda: has_fast_bfloat16(torch.device("cpu")),
    ):
        with pytest.raises(ConfigError, match=f"LORRY_ISA='{isa}' in the environment: {why}"):
            ask()
    # the command that builds them has one line too, and an exit code
    monkeypatch.delitem(sys.modules, "lorry.kernels.__main__", raising=False)
    with pytest.raises(SystemExit, match=f"LORRY_ISA='{isa}' in the environment: {why}"):
        runpy.run_module("lorry.kernels")
