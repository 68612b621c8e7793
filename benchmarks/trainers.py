"""The trainers of others as engines: transformers' Trainer, TRL's SFTTrainer as it comes, and with
its packing.

All settings are theirs, but for what makes the work comparable: the same rows in the same order,
the same base in bf16, the same adapter, a constant rate, no report and no checkpoint. They are
handed token ids and labels, so their tokenising is not timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from case import IGNORED, Case, Row
from engines import Run, clean
from measure import Watch


def hf_trainer() -> Run:
    """transformers' Trainer around a PEFT model, one row a micro-batch."""
    from transformers import DefaultDataCollator, Trainer, TrainingArguments

    libraries = imports()

    def run(folder: Path, case: Case, rows: Sequence[Row], watch: Watch) -> None:
        if len({len(ids) for ids, _ in rows}) > 1:
            raise SystemExit("the Trainer's collator does not pad; give rows of one length")
        model, data = opened(libraries, folder, rows)
        made, ends = watched(Trainer, watch)
        args = TrainingArguments(**settings(folder, case, case.rows_per_step))
        trainer = made(
            model=model,
            args=args,
            train_dataset=data,
            data_collator=DefaultDataCollator(),
            callbacks=[ends],
        )
        watch.start()
        trainer.train()

    return run


def trl(packing: bool = False) -> Run:
    """TRL's SFTTrainer: gradient checkpointing, bf16 autocast and the chunked loss are its
    defaults.

    With packing, rows are put together by best fit into ``length`` tokens and laid end to end
    ("bfd", its default). Without a FlashAttention kernel transformers keeps them apart by a mask
    over the whole batch; the gates check that this is so.
    """
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    libraries = imports()

    def run(folder: Path, case: Case, rows: Sequence[Row], watch: Watch) -> None:
        model, data = opened(libraries, folder, rows)
        batch = case.packed_rows if packing else case.rows_per_step
        args = SFTConfig(packing=packing, max_length=case.length, **settings(folder, case, batch))
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        made, ends = watched(SFTTrainer, watch)
        trainer = made(
            model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[ends]
        )
        watch.start()
        trainer.train()

    return run


def imports() -> Any:
    """What both need besides themselves."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401  loaded lazily otherwise, and imports are not counted

    return Dataset, PeftModel, AutoModelForCausalLM


def opened(libraries: Any, folder: Path, rows: Sequence[Row]) -> tuple[Any, Any]:
    """The model with its adapter, and the rows as a data set."""
    import torch

    dataset, peft_model, auto = libraries
    base = auto.from_pretrained(folder / "base", dtype=torch.bfloat16)
    base.config.use_cache = False
    model = peft_model.from_pretrained(base, folder / "init", is_trainable=True)
    return model, dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])


def settings(folder: Path, case: Case, batch: int) -> dict[str, Any]:
    """What must be equal, and nothing else."""
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": batch,
        "max_steps": case.all_steps,
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def watched(trainer: type, watch: Watch) -> tuple[type, Any]:
    """A trainer that tells the watch what it does after each backward, and the callback that tells
    of each step's end.
    """
    from transformers import TrainerCallback

    told: dict[str, Any] = {}

    class Watched(trainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            sequences, supervised = split(inputs), int((inputs["labels"] != IGNORED).sum())
            watch.saw(sequences)
            loss = super().training_step(model, inputs, *rest, **more)
            watch.gradients(
                lambda: {
                    clean(n): p.grad.clone()
                    for n, p in model.named_parameters()
                    if p.grad is not None
                }
            )
            told.update(loss=float(loss), tokens=sum(map(len, sequences)), supervised=supervised)
            return loss

    class StepEnds(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.step(**told)

    return Watched, StepEnds()


def split(inputs: dict[str, Any]) -> list[list[int]]:
    """The sequences in a collated batch: padded rows, or rows laid end to end whose positions
    restart.
    """
    ids, mask, positions = (
        inputs["input_ids"],
        inputs.get("attention_mask"),
        inputs.get("position_ids"),
    )
    if positions is not None:
        starts = [n for n, p in enumerate(positions[0].tolist()) if p == 0]
        flat = ids[0].tolist()
        return [flat[a:b] for a, b in zip(starts, [*starts[1:], len(flat)], strict=True)]
    if mask is None:
        return [row.tolist() for row in ids]
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
