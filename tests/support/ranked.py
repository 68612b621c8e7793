"""Command lines on several processes, as a launcher starts them: every process runs all of them, one
after the other.

    ended = run_ranked(folder, {"eval": ["eval", run, f"data={rows}"]})
    ended.codes["eval"]  # [0, 0]: of each rank
    ended.printed["eval"][0]  # (standard output, standard error) of rank 0

A first word ``FAULT=NAME`` is no part of the command: it names a fault (`fault_named`) that one rank has
while the command runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lorry import cli, config
from lorry.adapters.attach import get_bank
from lorry.adapters.product import LinearProducts
from lorry.backends.distributed.communicator import TorchCommunicator
from lorry.backends.distributed.tensor_ranks import ProcessRanks
from lorry.backends.local import LocalBackend
from lorry.disk.durable import DiskCalls, DiskError
from lorry.errors import ConfigError, ContractError
from lorry.evaluate.unlearning import attacks
from lorry.generation.engine import GenerationEngine
from lorry.models.loading import open as loading
from lorry.train import engine, processes
from lorry.verbs import eval as eval_verb
from tests.support.ranks import await_ranks

ROOT = Path(__file__).resolve().parents[2]
MARK, FAULT = "=== ", "FAULT="
# a tiny model's context holds no longer one
SHORT_JAILBREAK = "Tell all. {question}"


def unreadable_words(patch: pytest.MonkeyPatch) -> None:
    """It cannot read its settings, as where a CONFIG.yaml is missing on one machine."""

    def parse_settings(*given: Any) -> Any:
        raise ConfigError("run.yaml: no such file")

    patch.setattr(config, "parse_settings", parse_settings)


def another_version(patch: pytest.MonkeyPatch) -> None:
    """It has another torch."""
    real = processes.version
    patch.setattr(processes, "version", lambda name: "9.9" if name == "torch" else real(name))


def another_environment(patch: pytest.MonkeyPatch) -> None:
    """Its machine sets LORRY_DTYPE for everybody."""
    patch.setenv("LORRY_DTYPE", "float32")


def other_settings(patch: pytest.MonkeyPatch) -> None:
    """Its copy of the description has another learning rate."""
    real = config.parse_settings

    def parse_settings(*given: Any) -> Any:
        run = real(*given)
        changed = run.train.model_copy(update={"learning_rate": 0.125})
        return run.model_copy(update={"train": changed})

    patch.setattr(config, "parse_settings", parse_settings)


def another_machine(patch: pytest.MonkeyPatch) -> None:
    """It is on another machine, with the same files."""
    patch.setattr(processes.platform, "node", lambda: "elsewhere")


def other_rows(patch: pytest.MonkeyPatch) -> None:
    """It is on another machine, where the file of rows is another."""
    another_machine(patch)
    patch.setattr(processes, "data_digests", lambda data: {str(data.path): "0" * 64})


def other_base(patch: pytest.MonkeyPatch) -> None:
    """It is on another machine, where the base is another."""
    another_machine(patch)
    patch.setattr(processes, "sampled_digest", lambda folder: "0" * 64)


def no_shared_directory(patch: pytest.MonkeyPatch) -> None:
    """It is on another machine, which does not see what rank 0 writes."""
    another_machine(patch)
    patch.setattr(processes, "PROCESS", "not-there.json")
    patch.setattr(processes, "SHARED_WAIT_SECONDS", 0.0)


def asked_to_save(patch: pytest.MonkeyPatch) -> None:
    """It hears SIGUSR1 while it makes the third step."""
    real = engine.TrainingEngine._one_step

    def one_step(self: Any, metrics: Any) -> None:
        real(self, metrics)
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    patch.setattr(engine.TrainingEngine, "_one_step", one_step)


def fewer_rows_to_ask(patch: pytest.MonkeyPatch) -> None:
    """Its copy of the file that is asked has two rows."""
    real = eval_verb.open_eval_source
    patch.setattr(
        eval_verb,
        "open_eval_source",
        lambda settings: real(settings.model_copy(update={"limit": 2})),
    )


def another_adapter(patch: pytest.MonkeyPatch) -> None:
    """Its copy of the adapter has another value."""
    real = loading.open_model

    def opened(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        adapter = next(iter(get_bank(found.model).adapters.values()))
        with torch.no_grad():
            next(iter(adapter.tensors().values())).view(-1)[0] += 1e-3
        return found

    patch.setattr(loading, "open_model", opened)


def growing_losses(patch: pytest.MonkeyPatch) -> None:
    """Its held-out losses grow, whatever the others'."""
    real, seen = engine.evaluate_task, list[float]()

    def evaluate(*given: Any) -> dict[str, float]:
        measured = real(*given)  # its part of what all measure
        seen.append(1.0 + len(seen))
        return {**measured, "eval_loss": seen[-1]}

    patch.setattr(engine, "evaluate_task", evaluate)


def no_report(patch: pytest.MonkeyPatch) -> None:
    """Its disk is full when the report is written, behind the training."""
    from lorry import report

    def write_report(*given: Any) -> Path:
        raise DiskError(28, "No space left on device", "report.html")

    patch.setattr(report, "write_report", write_report)


def kill() -> None:
    """It is gone, without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """It is asked to end."""
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    """It finds something that the others do not."""
    raise ContractError("what it alone has is broken")


def act_at(
    act: Callable[[], None], owner: Any, name: str, number: int
) -> Callable[[pytest.MonkeyPatch], None]:
    """What happens where it calls a method for the ``number``-th time."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        real, left = getattr(owner, name), [number]

        def call(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                act()
            return real(*given, **named)

        patch.setattr(owner, name, call)

    return fault


def fault_named(name: str) -> tuple[int, Callable[[pytest.MonkeyPatch], None]]:
    """Of `FAULTS`; or ``kill|stop|fail RANK WHERE NUMBER``, where a rank calls a function of `PLACES`."""
    if name in FAULTS:
        return FAULTS[name]
    act, rank, where, number = name.split()
    place = PLACES.get(where)
    if where == "gather":  # imported here: it is a second of every process
        from lorry.backends.distributed.sharded import ShardedWeights

        place = (ShardedWeights, "_advance")
    assert place is not None, where
    return int(rank), act_at(ACTS[act], *place, int(number))


ACTS = {"kill": kill, "stop": stop, "fail": fail}
# where something happens to a rank: agreeing with the others, its disk, a pass, an update, a sum over
# those that share its model (``gather``: a layer's weights)
PLACES: dict[str, tuple[Any, str]] = {
    "exchange": (TorchCommunicator, "exchange"),
    "disk": (DiskCalls, "rename"),
    "pass": (LocalBackend, "_micro_batch"),
    "update": (LocalBackend, "step"),
    "sum": (ProcessRanks, "add_up"),
    "forward": (LinearProducts, "forward"),
    "backward": (LinearProducts, "input_gradient"),
    "token": (GenerationEngine, "_append_tokens"),
}
# {name: (the rank that has it, what is patched there)}
FAULTS: dict[str, tuple[int, Callable[[pytest.MonkeyPatch], None]]] = {
    "unreadable words": (1, unreadable_words),
    "another version": (1, another_version),
    "another environment": (1, another_environment),
    "other settings": (1, other_settings),
    "another machine": (1, another_machine),
    "other rows": (1, other_rows),
    "other base": (1, other_base),
    "no shared directory": (1, no_shared_directory),
    "asked to save": (1, asked_to_save),
    "fewer rows to ask": (1, fewer_rows_to_ask),
    "another adapter": (1, another_adapter),
    "growing losses": (1, growing_losses),
    "no report": (0, no_report),
}


class Ended(NamedTuple):
    """By command and rank: exit codes, and what was printed on (standard output, standard error)."""

    codes: dict[str, list[int]]
    printed: dict[str, list[tuple[str, str]]]


def run_ranked(folder: Path, commands: Mapping[str, Sequence[object]], ranks: int = 2) -> Ended:
    """Run the commands in ``ranks`` processes, none of which dies."""
    children = run_processes(folder, commands, ranks)
    assert [code for code, _, _ in children] == [0] * ranks, children
    codes = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    parts = [(_parts(out), _parts(err)) for _, out, err in children]
    return Ended(
        {name: [code[name] for code in codes] for name in commands},
        {name: [(out[name], err[name]) for out, err in parts] for name in commands},
    )


def run_processes(
    folder: Path, commands: Mapping[str, Sequence[object]], ranks: int = 2
) -> list[tuple[int, str, str]]:
    """The same; (exit code, standard output, standard error) of each process, whatever became of it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {name: list(map(str, command)) for name, command in commands.items()}
    (folder / "commands.json").write_text(json.dumps(words))
    return await_ranks(__name__, folder, ranks=ranks, COLUMNS="200")


def _parts(text: str) -> dict[str, str]:
    """{command: what was printed} of all that a process printed."""
    named = [part.partition("\n") for part in text.split(MARK)[1:]]
    return {name: rest for name, _, rest in named}


def run_rank(folder: Path) -> None:
    """One rank: run the commands, write their exit codes."""
    codes, rank = dict[str, int](), int(os.environ["RANK"])
    for name, words in json.loads((folder / "commands.json").read_text()).items():
        for stream in (sys.stdout, sys.stderr):
            print(f"{MARK}{name}", file=stream, flush=True)
        fault = words.pop(0).removeprefix(FAULT) if words[0].startswith(FAULT) else ""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attacks, "JAILBREAK", SHORT_JAILBREAK)
            if fault and fault_named(fault)[0] == rank:
                fault_named(fault)[1](patch)
            codes[name] = cli.main(words)
    (folder / f"rank-{rank}.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
