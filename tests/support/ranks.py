"""Ranks of one program: started with a store of their own, and waited for.

They are clones of one process that has imported what all of them need (a server of multiprocessing's,
which the first start makes): a rank's imports are five seconds of processor time. What clones share is
the order of their sets, by the hashes of names; processes that a launcher starts
(`tests/contracts/test_layout_runs.py`, `tests/integrations/test_trainer_examples.py`) have each their own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lorry.backends.distributed.launch import open_store, worker_environments

ROOT = Path(__file__).resolve().parents[2]
CLONES = multiprocessing.get_context("forkserver")
CLONES.set_forkserver_preload(
    ["tests.support.layouts", "tests.support.ranked", "lorry.train.session", "lorry.report"]
)


def run_ranks(
    module: str, *arguments: str | Path, ranks: int = 2, **environment: str
) -> list[tuple[str, str]]:
    """Run `python -m MODULE ARGUMENTS` as so many ranks, and return what each printed (standard output,
    standard error). Fails the test where one ends badly."""
    ended = await_ranks(module, *arguments, ranks=ranks, **environment)
    assert [code for code, _, _ in ended] == [0] * ranks, "\n".join(err for _, _, err in ended)
    return [(out, err) for _, out, err in ended]


def await_ranks(
    module: str, *arguments: str | Path, ranks: int = 2, **environment: str
) -> list[tuple[int, str, str]]:
    """The same; (exit code, standard output, standard error) of each, whatever became of it."""
    store = open_store()
    with tempfile.TemporaryDirectory() as folder:
        said = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(ranks)]
        children = [
            CLONES.Process(
                target=run_clone,
                args=(module, list(map(str, arguments)), {**os.environ, **own, **environment}, files),
            )
            for own, files in zip(
                worker_environments(ranks, store.port).values(), said, strict=True
            )
        ]
        try:
            for child in children:
                child.start()
            for child in children:
                child.join()
        finally:
            for child in children:
                if child.pid is not None:
                    child.kill()
        codes = [child.exitcode for child in children]
        texts = [(out.read_text(), err.read_text()) for out, err in said]
    return [(code, *each) for code, each in zip(codes, texts, strict=True) if code is not None]


def run_clone(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], said: tuple[Path, Path]
) -> None:
    """What `python -m MODULE ARGUMENTS` is to a clone, its output in two files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    # by lines, as Python's own is, wherever it goes
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # read where torch is imported, which is done
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # imported by the server; a program is not
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.stdout.flush()
