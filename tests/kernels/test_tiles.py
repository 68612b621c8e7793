"""The kernels on matrix tiles (AMX), which are emulated (tiles/emulated_tiles.h), against float64: on any processor that has the
rest of what their source is written in, AVX-512 with bfloat16.

A few small cases; `make test-tiles` runs every kernel's tests so. Nothing is said of a speed.
"""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorry.kernels import attention as kernel
from lorry.kernels import build, decode
from lorry.kernels.build import KernelStatus
from lorry.models.decoder.low_rank import TermDescription
from lorry.processor import processor_flags
from tests.kernels.test_attention_kernel import PRODUCTS, inputs, worst
from tests.kernels.test_decode import near, random
from tests.kernels.test_low_rank import check, eight_adapters
from tests.support.checked_kernels import HEADER

COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no g++"),
    pytest.mark.skipif(
        "avx512_bf16" not in processor_flags(), reason="no AVX-512 with bfloat16, beside the tiles"
    ),
]
# what is written for tiles, and what calls it; the other sources know nothing of them
SOURCES = ("amx.cpp", "attention.cpp", "few_rows.cpp", "rows.cpp")
FLAGS = (*build.FLAGS, "-march=native", "-mprefer-vector-width=512", *build.LIBRARY_FLAGS)


def compile_for_tiles(folder: Path, sources: Sequence[Path], *more: str) -> Path:
    """A library of those sources, which may include those of the kernels, for emulated tiles. ``more``: options
    of the linker."""
    objects = [folder / f"{source.stem}.o" for source in sources]
    command = (str(COMPILER), *FLAGS, "-O0", "-include", str(HEADER), f"-I{build.SOURCES}", "-c")
    for source, made in zip(sources, objects, strict=True):
        subprocess.run([*command, str(source), "-o", str(made)], check=True)
    library = folder / "tiles.so"
    subprocess.run(
        [str(COMPILER), *build.LIBRARY_FLAGS, *map(str, objects), *more, "-o", str(library)],
        check=True,
    )
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("tiles")
    # OpenMP is that of torch, as for every build
    return ctypes.CDLL(str(compile_for_tiles(folder, [build.SOURCES / name for name in SOURCES])))


@pytest.fixture
def _tiles(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as on a processor that has tiles."""
    assert library.lorry_amx()
    loaded = (library, KernelStatus(True, "", "emulated", amx=True, isa="amx"))
    monkeypatch.setattr(build, "_build_and_load", lambda: loaded)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("heads", "groups", "width"), [(3, 1, 64), (2, 2, 32), (2, 1, 128)])
@pytest.mark.parametrize("starts", [[0, 1, 64], [0, 65, 70, 198]])
def test_attention_and_its_gradients(
    heads: int, groups: int, width: int, starts: list[int]
) -> None:
    given = inputs(starts[-1], heads, groups, width, torch.bfloat16)
    assert kernel.attends_in_bfloat16(given[0])
    assert worst(given, starts, PRODUCTS.floor) < PRODUCTS.bound


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("rows", [1, 16, 17, 33])
@pytest.mark.parametrize(("ins", "outs"), [(2, 31), (30, 32), (64, 33), (576, 70)])
def test_a_product_of_rows(rows: int, ins: int, outs: int) -> None:
    x, w, bias = random(rows, ins), random(outs, ins, seed=1), random(outs, seed=2)
    truth = x.double() @ w.double().t() + bias.double()
    near(decode.linear_product(x, w, bias), truth, torch.bfloat16, truth.abs() + 1e-2)


@pytest.mark.usefixtures("_tiles")
def test_terms_of_adapters() -> None:
    """Among them ranks of no tile, 1 and 5, which go another way."""
    stacks, x, ys = eight_adapters(torch.bfloat16, width=64)
    gates: list[Tensor | None] = [None] * len(stacks)
    outs = [y.clone() for y in ys]
    decode.add_low_rank_terms(TermDescription.of(stacks, gates, x.dtype).words, x, outs)
    check(stacks, gates, x, ys, outs)


# in rows.cpp: what is written, what would be wrong, and what a processor says of it
WRONG = {
    "a row too few": (
        "rows[6] = rows[7] = step / 2;",
        "rows[6] = rows[7] = step / 2 - 1;",
        "TDPBF16PS would fault: the tiles' rows and columns do not fit",
    ),
    "a row too few of sums": (
        "bytes[4] = bytes[5] = 2 * step;",
        "bytes[4] = bytes[5] = 2 * step, rows[0] = 15;",
        "TDPBF16PS would fault: the tiles' rows and columns do not fit",
    ),
    "a row too many": (
        "bytes[4] = bytes[5] = 2 * step;",
        "bytes[4] = bytes[5] = 2 * step, rows[0] = 17;",
        "LDTILECFG would fault: a tile has no more than 16 rows of 64 bytes",
    ),
    "another palette": (
        "palette = 1",
        "palette = 2",
        "LDTILECFG would fault: there is no such palette",
    ),
    "no configuration": (
        "_tile_loadconfig(&config);",
        "",
        "TILEZERO would fault: no tiles are configured",
    ),
    "nothing": ("", "", ""),
}
# two rows by a matrix of 32 outputs and 64 inputs
CALL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
x, w, y = ((ctypes.c_uint16 * n)() for n in (2 * 64, 32 * 64, 2 * 32))
sizes = [ctypes.c_long(n) for n in (2, 64, 32, 64, 0, 0)]
sys.exit(library.rows_product(x, w, None, y, *sizes, ctypes.c_float(1)))
"""


@pytest.mark.parametrize("case", list(WRONG))
def test_what_a_processor_would_refuse(case: str, tmp_path: Path) -> None:
    """Of the same source with one mistake."""
    right, wrong, said = WRONG[case]
    text = (build.SOURCES / "rows.cpp").read_text()
    assert right in text
    source = tmp_path / "rows.cpp"
    source.write_text(text.replace(right, wrong) if right else text)
    library = compile_for_tiles(tmp_path, [source], "-fopenmp")
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(library)], capture_output=True, text=True
    )
    assert done.returncode == (-signal.SIGABRT if said else 0), done.stderr
    assert said in done.stderr
