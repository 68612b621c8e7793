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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lorry.backends.distributed.launch import open_store, worker_environments
from tests.support.charts import without_charts

ROOT = Path(__file__).resolve().parents[2]
CLONES = multiprocessing.get_context("forkserver")
# no program itself: a clone is to find it as a new process does
CLONES.set_forkserver_preload(
    [
        "tests.support.layout_faults",
        "lorry.train.session",
        "lorry.report",
        "lorry.verbs.eval",
        "lorry.evaluate.unlearning.attacks",
        "lorry.backends.distributed.fsdp",
        "matplotlib.backends.backend_agg",
        "transformers.models.llama.modeling_llama",
    ]
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
    with started_ranks(module, *arguments, ranks=ranks, **environment) as children:
        return [child.communicate() for child in children]


@contextmanager
def started_ranks(
    module: str, *arguments: str | Path, ranks: int = 2, **environment: str
) -> Iterator[list[Clone]]:
    """The same, while they run; what still does at the end of the block is killed."""
    store, children = open_store(), list[Clone]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank, own in worker_environments(ranks, store.port).items():
                said = (Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err")
                every = {**os.environ, **own, **environment}
                children.append(Clone(module, list(map(str, arguments)), every, said))
            yield children
        finally:
            for child in children:
                child.process.kill()
                child.process.join()


class Clone:
    """`python -m MODULE ARGUMENTS` as a clone, with what a Popen of it would tell."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        said: tuple[Path, Path],
    ) -> None:
        self.said = said
        for file in said:
            file.touch()
        self.process = CLONES.Process(target=run_clone, args=(module, arguments, environment, said))
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def communicate(self) -> tuple[int, str, str]:
        """(exit code, standard output, standard error), once it has ended."""
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        return code, *(file.read_text() for file in self.said)


def run_clone(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], said: tuple[Path, Path]
) -> None:
    """What `python -m MODULE ARGUMENTS` is to a clone, its output in two files; reports without charts."""
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
    with without_charts():
        runpy.run_module(module, run_name="__main__", alter_sys=True)
