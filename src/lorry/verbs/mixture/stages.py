"""The stages of `lorry moe`: each is left out where it has finished and all that it was made of is
as it was, goes on where it was stopped, and is done again, which is said, where anything has
changed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lorry.config import dump_settings
from lorry.config.data import DataConfig
from lorry.config.moe import RouterRunConfig
from lorry.config.schema.model import ModelConfig
from lorry.config.schema.run import RunConfig
from lorry.disk import durable, receipt
from lorry.disk.durable import DiskError
from lorry.errors import ConfigError, LorryError, ModelError
from lorry.runs import ownership
from lorry.runs.layout import (
    CHECKPOINTS,
    MERGED,
    RECEIPT,
    ROUTER,
    ROUTER_FILE,
    RUN_FILE,
    TOKENIZER_FILES,
    list_adapter_subfolders,
)
from lorry.runs.stages import StageRecord, data_digests, path_digest, text_digest
from lorry.verbs.open_model import print_note
from lorry.visible import make_visible

if TYPE_CHECKING:
    from lorry.backends.distributed.communicator import Communicator
    from lorry.train.monitoring.events import TrainingListener

ANEW, RESUME = "anew", "resume"  # how a stage's run begins
# what of a model's directory is read; a report or a card beside it may change
MODEL_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", *TOKENIZER_FILES)


def _one_process() -> Communicator:
    # imported here: torch
    from lorry.backends.distributed.communicator import ONE_PROCESS

    return ONE_PROCESS


@dataclass(frozen=True)
class Stages:
    """The stages below ``folder``, of one base. ``log``: a file to which all that is told of them
    is added; ``communicator``: the processes that train together; what is to be done rank 0
    decides, and alone writes what is no run."""

    folder: Path
    model: ModelConfig
    log: Path | None = None
    communicator: Communicator = field(default_factory=_one_process)

    @cached_property
    def record(self) -> StageRecord:
        """What each was made of."""
        return StageRecord(self.folder)

    @cached_property
    def shared_inputs(self) -> dict[str, str]:
        """What every stage is made of: code and base. Raises ModelError."""
        from lorry.models.loading.sources import resolve_model
        from lorry.notes import ignore_note
        from lorry.train.checkpoint import code_digest

        place = resolve_model(
            self.model.name, revision=self.model.revision, add_note=ignore_note
        ).directory
        extra = {
            f"model.{name}": path_digest(Path(path).expanduser())
            for name in ("adapter", "chat_template_path")
            if (path := getattr(self.model, name)) is not None and Path(path).expanduser().exists()
        }
        return {
            "Lorry itself": code_digest(),
            f"the base {self.model.name}": model_digest(place),
            **extra,
        }

    def train(
        self,
        stage: str,
        run: RunConfig,
        data: Iterable[DataConfig],
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """A stage that is a run, which reads ``data``. ``inputs``: digests of what else it is made
        of. Raises LorryError."""
        from lorry.train.session import train_run

        whole = dict[str, str]()

        def begin() -> str | None:
            whole.update({"its settings": _settings_digest(run), **self.shared_inputs})
            whole.update({**row_inputs(data), **(inputs or {})})
            return self._begin_training(stage, run, whole)

        how = self.communicator.on_main(stage, begin)
        if how is None:
            return
        if how == RESUME:
            train = run.train.model_copy(update={"resume_from_checkpoint": "auto"})
            run = run.model_copy(update={"train": train})
        if self.communicator.rank:
            train_run(run)
        else:
            self._train_and_report(stage, run, whole)

    def _begin_training(self, stage: str, run: RunConfig, inputs: Mapping[str, str]) -> str | None:
        """Make room for a stage's run and say so: `RESUME` where it goes on, `ANEW`, or None where
        it has finished. Raises LorryError."""
        from lorry.train.start import archive_previous_run, claim_output_dir

        folder, how = run.output_dir, ANEW
        ended = receipt.read(folder / RECEIPT) is not None
        routed = isinstance(run, RouterRunConfig)
        if self._is_finished(stage, inputs, folder, there=ended, routed=routed):
            return None
        stopped = not ended and (folder / CHECKPOINTS).is_dir()
        changed = self.record.changes(stage, inputs)
        if stopped and changed:
            # else it would be refused as the unfinished run of other settings
            self.tell(f"{folder} is in {archive_previous_run(folder, going_on=False)} now")
        elif stopped and changed is not None:
            self.tell(
                f"{stage}: {folder} is unfinished; training resumes from its newest checkpoint"
            )
            how = RESUME
        claim_output_dir(folder, run.job_names)  # before a file of ours is there
        self.record.begin(stage, inputs)
        self.tell(f"{stage}: training in {folder}")  # else the lines of two runs look like one
        return how

    def _train_and_report(self, stage: str, run: RunConfig, inputs: Mapping[str, str]) -> None:
        from lorry.report import write_report
        from lorry.train.monitoring.events import PlainListener, terminal_listener
        from lorry.train.session import train_run

        folder, every = run.output_dir, run.train.logging_steps
        with self._open_log() as log:
            listeners: list[TrainingListener] = [terminal_listener(every)]
            if log is not None:
                listeners.append(PlainListener(every, log))
            try:
                train_run(run, listeners=listeners)
            except LorryError:
                if not folder.exists():  # refused before it began: nothing half-written
                    self.record.forget(stage)
                raise
        write_report([folder])
        self.record.finish(stage, inputs)

    def on_main(self, work: Callable[[], None]) -> None:
        """What rank 0 does alone, and the others wait for. Raises what it raises."""
        self.communicator.on_main("a part of a stage", work)

    def tell(self, text: str) -> None:
        """A line for a person, and in the log."""
        if self.communicator.rank:
            return
        print_note(text)
        # a log that is full is no reason to lose a run
        with self._open_log() as log, contextlib.suppress(OSError):
            if log is not None:
                print(make_visible(text), file=log, flush=True)

    def _open_log(self) -> contextlib.AbstractContextManager[TextIO | None]:
        """The log, to add to; None without one."""
        if self.log is None:
            return contextlib.nullcontext()
        durable.make_directory(self.log.parent)
        try:
            return self.log.open("a", encoding="utf-8")
        except OSError as error:
            raise DiskError(error.errno, error.strerror, str(self.log)) from error

    def write(
        self,
        stage: str,
        outputs: list[Path],
        inputs: Mapping[str, str],
        write: Callable[[], None],
        settings: str,
    ) -> None:
        """A stage that only writes: ``outputs``, all of them beside each other; what an earlier one
        left there moves to previous/N, of a mixture all that tells of it. ``settings``: what it is
        told. Raises LorryError, ConfigError for a place that is somebody else's."""
        self.communicator.on_main(
            stage, lambda: self._write(stage, outputs, inputs, write, settings)
        )

    def _write(
        self,
        stage: str,
        outputs: list[Path],
        inputs: Mapping[str, str],
        write: Callable[[], None],
        settings: str,
    ) -> None:
        inputs = {"its settings": text_digest(settings), **self.shared_inputs, **inputs}
        place = outputs[0].parent
        # a mixture is its folder with all in it, any other stage the one folder that it makes
        made = place if len(outputs) > 1 else outputs[0]
        there = [path.name for path in outputs if path.exists()]
        routed = place / ROUTER in outputs
        if self._is_finished(stage, inputs, made, there=len(there) == len(outputs), routed=routed):
            return
        if routed:
            self._clear_mixture_run(place)
            there = [path.name for path in outputs if path.exists()]
        if there and self.record.changes(stage, inputs) is None:
            raise ConfigError(f"{place / there[0]} already exists; give another output_dir")
        if there:
            self.tell(f"{made} held an earlier one; it is in "
                       f"{ownership.move_to_previous(place, there)} now")  # fmt: skip
        self.record.begin(stage, inputs)
        try:
            write()
        except LorryError:
            if not any(path.exists() for path in outputs):  # refused before anything was written
                self.record.forget(stage)
            raise
        self.record.finish(stage, inputs)

    def clear_other_experts(
        self, folder: Path, names: Sequence[str], *, in_turn: bool, whole: bool
    ) -> None:
        """Make room in the folder of the experts where they were trained another way before: a run
        of them together in it, or one of each ``names`` below it, of an adapter or (``whole``) of a
        whole model. Raises DiskError."""
        self.communicator.on_main(
            "room for the experts", lambda: self._clear_other_experts(folder, names, in_turn, whole)
        )

    def _clear_other_experts(
        self, folder: Path, names: Sequence[str], in_turn: bool, whole: bool
    ) -> None:
        from lorry.train.start import archive_previous_run

        aside = None
        if in_turn and ownership.is_run(folder):
            aside = archive_previous_run(folder, going_on=False)
        runs = [] if in_turn else [name for name in names if ownership.is_run(folder / name)]
        how = "together" if in_turn else "in turn"
        other = [
            name for name in names if ownership.is_run(folder / name / ("" if whole else MERGED))
        ]
        if other:
            runs, how = [*runs, *other], "as adapters" if whole else "as whole models"
        if runs:
            aside = ownership.move_to_previous(folder, runs)
        if aside is not None:
            self.tell(f"{folder} held experts that were trained {how}; they are in {aside} now")

    def _clear_mixture_run(self, folder: Path) -> None:
        """Move a mixture's run to FOLDER/previous/N, whole: its description, card, receipt and what
        was measured of it would go on telling of a router that is there no more. Raises ConfigError
        for a place that is somebody else's, DiskError."""
        from lorry.train.start import archive_previous_run

        if not ownership.is_run(folder):
            return
        described = ownership.run_description_of(folder)
        if described and "experts" not in described:
            raise ConfigError(f"{folder} holds a run of its own; give another output_dir")
        if (aside := archive_previous_run(folder, going_on=False)) is not None:
            self.tell(f"{folder} held a run; it is in {aside} now")

    def _is_finished(
        self, stage: str, inputs: Mapping[str, str], place: Path, *, there: bool, routed: bool
    ) -> bool:
        """Whether a stage need not be done, and say why it is, or is not. ``routed``: what it made
        is a mixture, which has to be whole."""
        changed = self.record.changes(stage, inputs)
        if there and changed == [] and self.record.is_finished(stage):
            if routed and (damage := mixture_damage(place)):
                self.tell(f"{stage}: {damage}: done again")
                return False
            self.tell(f"{stage}: {place} has finished, and nothing it was made of has changed")
            return True
        if there and changed:
            self.tell(f"{stage}: {', '.join(changed)} changed since {place} was made: done again")
        return False


def mixture_damage(folder: Path) -> str | None:
    """What is missing in a mixture's directory or is not as it was made; None for a whole one."""
    from lorry.adapters.routing.files import (
        read_router_record,
        verify_experts,
        verify_router_adapter,
        verify_weights,
    )

    try:
        record = read_router_record(folder)
        verify_weights(folder, record)
        verify_router_adapter(folder, record)
        verify_experts(
            folder, record, {expert.name: expert for expert in list_adapter_subfolders(folder)}
        )
    except ModelError as error:
        return str(error)
    return None


def model_digest(folder: Path) -> str:
    """SHA-256 of a model's files, whatever reports lie beside them. Raises ModelError,
    DiskError."""
    files = sorted({file for pattern in MODEL_PATTERNS for file in folder.glob(pattern)})
    return text_digest("\n".join(f"{file.name} {path_digest(file)}" for file in files))


def adapter_inputs(folders: Mapping[str, Path]) -> dict[str, str]:
    """The digests of experts, of those that are there. Raises ModelError."""
    from lorry.adapters.peft.files import find_adapter
    from lorry.adapters.peft.start_files import adapter_digest

    return {
        f"expert {name}": adapter_digest(find_adapter(folder)[0])
        for name, folder in folders.items()
    }


def row_inputs(data: Iterable[DataConfig]) -> dict[str, str]:
    """The digests of the files that these settings read. Raises ModelError."""
    return {
        f"the rows in {path}": digest
        for settings in data
        for path, digest in data_digests(settings).items()
    }


def clear_undescribed_mixture(folder: Path) -> None:
    """Move a mixture without a run.yaml (earlier versions wrote none where nothing trained) to
    FOLDER/previous/N: a run would not know its files. Raises DiskError, ModelError for a
    router.json that is none."""
    from lorry.adapters.routing.files import read_router_record

    if not (folder / ROUTER / ROUTER_FILE).is_file() or (folder / RUN_FILE).exists():
        return
    names = [expert.name for expert in read_router_record(folder).experts]
    tokenizer = sorted({file.name for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})
    there = [name for name in (*tokenizer, *names, ROUTER) if (folder / name).exists()]
    print_note(f"{folder} held a mixture; it is in {ownership.move_to_previous(folder, there)} now")


def _settings_digest(run: RunConfig) -> str:
    """Of a run's description, resuming aside."""
    lines = dump_settings(run).splitlines()
    return text_digest("\n".join(line for line in lines if "resume_from_checkpoint:" not in line))


def call_verb(verb: Any, settings: Any) -> None:
    """Another verb's work, its last line beside the results: on standard output is the
    mixture's."""
    with contextlib.redirect_stdout(sys.stderr):
        verb(settings)
