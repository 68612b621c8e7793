"""The kernels' tests on kernels that were built to be looked at: `python -m tests.support.checked_kernels WAY [FILE ...]`.

``sanitized``: with AddressSanitizer and UndefinedBehaviorSanitizer. ``tiles``: for matrix tiles, which are emulated
(tests/kernels/tiles/emulated_tiles.h). ``sanitized-tiles``: both. Each file of tests runs in a process of its own, which a finding ends, and
where those kernels cannot be built and loaded it fails: tests would leave them out, or run torch instead.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "tests" / "kernels" / "tiles" / "emulated_tiles.h"
# Everything that calls a kernel with shapes of all kinds: in order dropout, attention, generation, extreme numbers, low-rank terms, an
# adapter's and other products, norms and gates, the vocabulary, packed formats, layers of a step, and the head of packed bytes.
FILES = (
    "tests/adapters/test_random.py",
    "tests/kernels/test_attention_kernel.py",
    "tests/kernels/test_decode.py",
    "tests/kernels/test_extremes.py",
    "tests/kernels/test_low_rank.py",
    "tests/kernels/test_adapter_products.py",
    "tests/kernels/test_matmul.py",
    "tests/kernels/test_pointwise.py",
    "tests/kernels/test_softmax.py",
    "tests/adapters/quantization/test_packed.py",
    "tests/adapters/quantization/test_few_rows.py",
    "tests/models/test_decode_step.py",
    "tests/models/test_kept_gguf.py",
    "tests/models/test_kept_head.py",
)
# -O1: with -O3 the sources take a compiler some minutes each
SANITIZERS = (
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow "
    "-fno-sanitize-recover=all"
)
WAYS = ("sanitized", "tiles", "sanitized-tiles")


def tile_flags() -> str:
    """What builds kernels for emulated tiles; the header's own digest, since its name stays the same."""
    digest = hashlib.sha256(HEADER.read_bytes()).hexdigest()[:15]
    return f"-include {shlex.quote(str(HEADER))} -DEMULATED_TILES=0x{digest}"


def environment(way: str) -> dict[str, str]:
    """What builds and loads the kernels of a way."""
    out = dict(os.environ)
    flags = list[str]()
    if "tiles" in way:
        flags.append(tile_flags())
    if "sanitized" in way:
        flags.append(SANITIZERS)
        runtimes = [
            subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        # the sanitizers' runtimes have to be there before Python is, whose own leaks are none of ours
        out["LD_PRELOAD"] = " ".join(runtimes)
        out["ASAN_OPTIONS"] = "detect_leaks=0"
        out["UBSAN_OPTIONS"] = "print_stacktrace=1"
    out["LORRY_KERNELS_FLAGS"] = " ".join(flags)
    out["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), out.get("PYTHONPATH")]))
    return out


def run_here(way: str, file: str) -> int:
    """Tests of a file in this process, whose environment is that of the way."""
    # a compiler would run with it at a fraction of its speed
    os.environ.pop("LD_PRELOAD", None)
    home = os.environ.get("LORRY_HOME")
    os.environ["LORRY_HOME"] = str(ROOT / "build" / "checked")
    from lorry.kernels import kernel_status

    status = kernel_status()  # loaded once for the process
    if home is None:
        del os.environ["LORRY_HOME"]
    else:
        os.environ["LORRY_HOME"] = home
    if not status.active or ("tiles" in way and not status.amx):
        print(f"no {way} kernels here: {status.line()}", file=sys.stderr)
        return 1
    import pytest

    # what a sanitizer and a tile say last is not to be captured with the process that it ends
    return int(pytest.main(["-q", "-rs", "-p", "no:cacheprovider", "--capture=sys", file]))


def main() -> int:
    """Exit code: 0, or 1 where a file failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return run_here(options.way, *options.files)
    failed = list[str]()
    for file in options.files:
        began = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "tests.support.checked_kernels",
            options.way,
            file,
            "--here",
        ]
        code = subprocess.run(command, env=environment(options.way), cwd=ROOT).returncode
        print(
            f"{options.way}: {file}: exit code {code}, {time.monotonic() - began:.0f} s", flush=True
        )
        if code:
            failed.append(file)
    if failed:
        print(f"{options.way}: failed in {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
