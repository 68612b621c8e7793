"""The engines that are compared: Lorry and plain PyTorch loops over PEFT (the trainers of others
are in trainers.py).

Each function here imports what it needs, so that memory can be counted from there, and returns a
function of (folder, case, rows, watch) that trains ``case.all_steps`` steps and tells the watch of
each. turns.py names them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from case import CHAT, IGNORED, Case, Row
from measure import Watch

if TYPE_CHECKING:
    from torch import Tensor

Run = Callable[[Path, Case, Sequence[Row], Watch], None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """``work``: what a step computes, for the floor; ``anchor``: not LoRA training, only there to
    compare with; ``dtype``: what it multiplies matrices in, as Lorry writes it.
    """

    make: Callable[[], Run]
    says: str
    work: str = "lora"
    anchor: bool = False
    dtype: str = "bfloat16"


def fast_path() -> dict[str, Any]:
    """What Lorry's compiled kernels say of themselves. Raises SystemExit on a fallback path: its
    speed is not Lorry's.
    """
    from lorry import kernels

    status = kernels.kernel_status()
    if not status.active:
        raise SystemExit(
            f"lorry would run without its compiled kernels, whose speed is not what is measured here: {status.line()}"
        )
    return dataclasses.asdict(status)


# --- Lorry


def lorry(packing: bool = False, dtype: str = "auto") -> Run:
    """Lorry's own path: its data stream, the local backend and the SFT loss; the base in what
    dtype=auto is on this processor, unless another is given.
    """
    from lorry.adapters.peft.files import load_adapter
    from lorry.backends.local import LocalBackend
    from lorry.backends.optim import OptimSettings
    from lorry.data.batch import Batch, TokenizedExample, collate
    from lorry.models.loading.load import load_model
    from lorry.notes import ignore_note
    from lorry.tasks.sft import SftTask
    from lorry.train.resources.peak import tune_allocator

    class Rows:
        """Steps of plain rows, as the other engines get them."""

        def __init__(self, rows: Sequence[Row], per_step: int) -> None:
            self.rows, self.per_step = rows, per_step

        def batches(self, step: int) -> list[Batch]:
            examples = []
            for ids, labels in turn(self.rows, step, self.per_step):
                examples.append(
                    TokenizedExample(ids, [float(label != IGNORED) for label in labels])
                )
            return [collate(examples)]

    def run(folder: Path, case: Case, rows: Sequence[Row], watch: Watch) -> None:
        fast_path()
        tune_allocator()
        loaded = load_model(str(folder / "base"), dtype=dtype, add_note=ignore_note)
        adapter = load_adapter(loaded.model, folder / "init", "default")
        backend = LocalBackend(loaded.model, ["default"], OptimSettings())
        stream: Any = Rows(rows, case.rows_per_step)
        if (folder / CHAT).exists():
            stream = chat_stream(folder, case, loaded.tokenizer, packing)
        task = SftTask(stream, [], case.all_steps, ["default"])
        watch.start()
        for step in range(case.all_steps):
            batches = task.step_batches(step, {})
            watch.saw(
                [b.tokens[start:stop].tolist() for b in batches for start, stop in b.segments]
            )
            stats = backend.forward_backward(batches, task, step)
            watch.gradients(
                lambda: {n: g.clone() for n, g in adapter.split_like(adapter.grads).items()}
            )
            backend.step({"default": case.learning_rate})
            watch.step(stats.loss["default"], stats.tokens, stats.supervised)

    return run


def chat_stream(folder: Path, case: Case, tokenizer: Any, packing: bool) -> Any:
    """The stream that `lorry sft` makes of chat.jsonl."""
    from lorry.config.data import DataConfig
    from lorry.config.schema.train import TrainConfig
    from lorry.data.prepare import prepare_data

    data = DataConfig(
        path=str(folder / CHAT), max_length=case.length, packing=packing, shuffle=False
    )
    train = TrainConfig(
        per_device_train_batch_size=case.packed_rows if packing else case.rows_per_step
    )
    return prepare_data(data, train, tokenizer, quarantine=folder / "quarantine.jsonl").stream


# --- plain loops


def peft(
    *,
    float32: bool = False,
    bf16_adapters: bool = False,
    malloc: bool = False,
    compiled: bool = False,
) -> Run:
    """PEFT with a plain loop. Its default keeps adapters in fp32 over a bf16 base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401  loaded lazily otherwise, and imports are not counted

    from lorry.train.resources.peak import tune_allocator

    if compiled:
        import torch._inductor.compile_fx

    def run(folder: Path, case: Case, rows: Sequence[Row], watch: Watch) -> None:
        if malloc:
            tune_allocator()
        dtype = torch.float32 if float32 else torch.bfloat16
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        model = PeftModel.from_pretrained(
            base, folder / "init", is_trainable=True, autocast_adapter_dtype=not bf16_adapters
        )
        model.config.use_cache = False
        model.train()
        params = {clean(n): p for n, p in model.named_parameters() if p.requires_grad}
        loop(torch.compile(model) if compiled else model, params, case, rows, watch, lora=True)

    return run


def full() -> Run:
    """Full fine-tuning: every weight trains, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401

    def run(folder: Path, case: Case, rows: Sequence[Row], watch: Watch) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        model.config.use_cache = False
        model.train()
        loop(model, dict(model.named_parameters()), case, rows, watch, lora=False)

    return run


def forward() -> Run:
    """The frozen model's forward pass and loss, no gradient: what nobody can be faster than by
    training less.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401

    @torch.no_grad()
    def run(folder: Path, case: Case, rows: Sequence[Row], watch: Watch) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        model.config.use_cache = False
        model.eval()
        watch.start()
        for step in range(case.all_steps):
            mine = turn(rows, step, case.rows_per_step)
            watch.saw([ids for ids, _ in mine])
            watch.step(float(model(**padded(mine)).loss), *count(mine))

    return run


def loop(
    model: Any,
    params: dict[str, Tensor],
    case: Case,
    rows: Sequence[Row],
    watch: Watch,
    *,
    lora: bool,
) -> None:
    """A plain training loop: forward, backward, clip at 1, fused AdamW. ``lora``: the gradients can
    be compared.
    """
    import torch

    optimizer = torch.optim.AdamW(
        params.values(), lr=case.learning_rate, weight_decay=0.0, fused=True
    )
    watch.start()
    for step in range(case.all_steps):
        mine = turn(rows, step, case.rows_per_step)
        watch.saw([ids for ids, _ in mine])
        loss = model(**padded(mine)).loss
        loss.backward()
        if lora:
            watch.gradients(
                lambda: {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
            )
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss.item(), *count(mine))


# --- rows


def turn(rows: Sequence[Row], step: int, per_step: int) -> list[Row]:
    """The rows of a step, from the beginning again when they are used up."""
    return [rows[(step * per_step + n) % len(rows)] for n in range(per_step)]


def count(rows: Sequence[Row]) -> tuple[int, int]:
    """(tokens, supervised tokens)."""
    return sum(len(ids) for ids, _ in rows), sum(
        label != IGNORED for _, labels in rows for label in labels
    )


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch as transformers wants it; without a mask where nothing is padded."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    if all(len(ids) == longest for ids, _ in rows):
        return {"input_ids": ids, "labels": labels}
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def clean(name: str) -> str:
    """PEFT's parameter name in Lorry's words."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")
