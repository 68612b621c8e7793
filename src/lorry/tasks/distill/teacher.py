"""A teacher: opened as any model is, frozen, asked for what its head reads; the student's own base
where that is the teacher.

place = TeacherLocation.of(run.distill, opened, shareable=run.lora is not None, add_note=add_note)    # nothing is loaded yet
teacher = open_teacher(place, run.distill, opened, device="cpu", add_note=add_note)
teacher.head(temperature=2.0)(hidden)       # its logits / 2
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.adapters.attach import get_bank
from lorry.adapters.bank import AdapterBank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.peft.files import load_adapter
from lorry.adapters.peft.start_files import start_chain
from lorry.adapters.quantization.packed import KEPT_BFLOAT16, KEPT_GGUF
from lorry.config import DistillConfig, ModelConfig
from lorry.disk.integrity import file_digest
from lorry.errors import ConfigError
from lorry.generation.scorer import ModelScorer
from lorry.models.loading.describe import has_packed_matrices, read_model_json
from lorry.models.loading.load import KEEP, pick_device, pick_dtype, trained_quantization
from lorry.models.loading.open import (
    OpenedModel,
    list_adapter_folders,
    open_model,
    pick_adapter_name,
)
from lorry.models.loading.sources import ModelLocation, resolve_model
from lorry.models.loading.tokenizer import load_tokenizer
from lorry.models.scoring.score import scale_by_temperature
from lorry.notes import NoteCallback

# files that say which model, or adapter, a directory holds, and how it reads text
DIGESTED_SUFFIXES = (".safetensors", "config.json", "tokenizer.json", ".jinja")


@dataclass(frozen=True)
class TeacherLocation:
    """Where a teacher lies. ``shared``: its base is the model that the student adapts; ``adapter``:
    the one it uses, if any.
    """

    place: ModelLocation
    adapter: Path | None
    shared: bool

    @staticmethod
    def of(
        config: DistillConfig, opened: OpenedModel, *, shareable: bool, add_note: NoteCallback
    ) -> TeacherLocation:
        """From the settings and the student. ``shareable``: the student's base stays as it is.
        Raises ConfigError, ModelError.
        """
        base = ModelLocation(Path(opened.source["path"]), str(opened.source["kind"]))
        place = base if config.teacher is None else resolve_model(config.teacher, add_note=add_note)
        adapter_paths = [p for p in (place.adapter, config.teacher_adapter) if p is not None]
        folders = [folder for path in adapter_paths for folder in list_adapter_folders(Path(path))]
        if len(folders) > 1:
            raise ConfigError(
                f"the teacher has {len(folders)} adapters "
                f"({', '.join(map(str, folders[:3]))}); name the folder of one"
            )
        # by place: the same files loaded again would be a second model in memory that says the same
        # the student's base has the start in it: a teacher on the same weights with another start,
        # or none, is another model
        start = get_bank(opened.model, create=True).start
        over = next((origin.sha256 for f in folders for _, origin in start_chain(f)), None)
        own = config.teacher is None and not folders
        # an adapter's base is held as it was when the adapter was trained
        held: str | None = config.teacher_quantize
        if held is None and folders:
            held = trained_quantization(folders[0])
        same_base = (
            place.directory.resolve() == base.directory.resolve()
            and (own or _same_matrices(base.directory, held, opened.source["quantize"]))
            and (own or over == (None if start is None else start.sha256))
        )
        # in another dtype the base would say something else, and has to be loaded in it
        dtype_name = str(
            pick_dtype(config.teacher_dtype, pick_device(opened.source["device"]))
        ).removeprefix("torch.")
        shared = (
            same_base
            and shareable
            and (config.teacher_dtype == "auto" or dtype_name == opened.source["dtype"])
        )
        return TeacherLocation(place, folders[0] if folders else None, shared)

    def tokenizer(self, add_note: NoteCallback) -> Any:
        """The teacher's tokenizer, without its weights. Raises ConfigError when it has none."""
        tokenizer = load_tokenizer(self.place.directory, add_note=add_note)
        if tokenizer is None:
            raise ConfigError(
                f"distill.teacher={self.place.directory} has no tokenizer; put tokenizer.json beside the weights"
            )
        return tokenizer

    def vocab_size(self) -> int | None:
        """Rows of its embedding table, as its config.json says; None where there is no such file or
        it does not say.
        """
        path = self.place.directory / "config.json"
        config = read_model_json(path) if path.is_file() else {}
        # configs of multimodal models keep the text part's numbers there
        nested = config.get("text_config")
        size = config.get(
            "vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None
        )
        return size if isinstance(size, int) and not isinstance(size, bool) else None

    def digest(self, config: DistillConfig, dtype: str) -> str:
        """SHA-256 of the files that make the teacher what it is, and of how they are opened: every
        byte of them is read.
        """
        total = hashlib.sha256(f"{dtype} {config.teacher_quantize}".encode())
        adapter = [self.adapter] if self.adapter else []
        over = [folder for start in adapter for folder, _ in start_chain(start)]
        for folder in [self.place.directory, *adapter, *over]:
            for path in sorted(
                p for p in folder.iterdir() if p.is_file() and p.name.endswith(DIGESTED_SUFFIXES)
            ):
                total.update(f"{path.name} {file_digest(path)}".encode())
        return total.hexdigest()


class TeacherScorer(ModelScorer):
    """A teacher: a model under one mix, and its head."""

    @property
    def vocab_size(self) -> int:
        """Columns of its logits."""
        return self.model.vocab_size

    def head(self, temperature: float, columns: int | None = None) -> Callable[[Tensor], Tensor]:
        """What turns its final hidden states [t,d] into logits [t,V] / temperature, of the first
        ``columns`` tokens only.
        """
        # it is asked in the middle of the student's passes, where none of the teacher's begins
        self.model.layer_weights.keep_rest()

        @torch.no_grad()
        def logits(hidden: Tensor) -> Tensor:
            ready, left = scale_by_temperature(
                self.model, hidden.to(self.model.device), temperature
            )
            # columns that the student lacks are padding of the embedding, not tokens
            teacher_logits = self.model.logits(ready, AdapterContext(self.mix))[:, :columns].to(
                hidden.device
            )
            return teacher_logits if left == 1.0 else teacher_logits / left

        return logits


def open_teacher(
    place: TeacherLocation,
    config: DistillConfig,
    opened: OpenedModel,
    add_note: NoteCallback,
    open_other: Callable[[ModelConfig, NoteCallback], OpenedModel] = open_model,
) -> TeacherScorer:
    """The teacher ready to score: another adapter (or none) on the student's own base, or a model
    of its own, which ``open_other`` opens.

    Raises ConfigError, ModelError.
    """
    if place.shared:
        if place.adapter is None:
            return TeacherScorer(opened.model, Mix.none())
        name = pick_adapter_name(place.adapter, _adapter_bank_names(opened))
        # beside the student's adapters, under a name of its own, and in no optimizer
        load_adapter(opened.model, place.adapter, name, trainable=False)
        add_note(
            "the teacher is the student's base with the adapter of "
            f"{place.adapter}: no second model is loaded"
        )
        return TeacherScorer(opened.model, Mix.one(name))
    name, device = str(place.place.directory), str(opened.source["device"])
    if config.teacher_quantize is not None and place.adapter is not None:
        raise ConfigError(
            "distill.teacher_quantize with an adapter: merge the adapter first (lorry merge), then quantize"
        )
    adapter = None if place.adapter is None else str(place.adapter)
    opened_teacher = open_other(
        ModelConfig(
            name=name,
            dtype=config.teacher_dtype,
            quantize=config.teacher_quantize,
            device=device,
            adapter=adapter,
        ),
        add_note,
    )
    return TeacherScorer(
        opened_teacher.model,
        Mix.one(opened_teacher.adapters[0]) if opened_teacher.adapters else Mix.none(),
    )


def _same_matrices(directory: Path, asked: str | None, held: str | None) -> bool:
    """Whether matrices held as is asked have the values of those that are held: what files pack is the
    same whoever asks, and what is kept of a GGUF or bfloat16 file is the whole base."""
    plain = (None, KEEP, KEPT_GGUF.name, KEPT_BFLOAT16.name)
    return has_packed_matrices(directory) or asked == held or (asked in plain and held in plain)


def _adapter_bank_names(opened: OpenedModel) -> list[str]:
    bank: AdapterBank | None = opened.model.__dict__.get("lorry_bank")
    return [] if bank is None else bank.names()
