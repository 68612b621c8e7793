"""What a memory_budget leaves open in a run description, decided before any weight is loaded;
`lorry plan` shows the search.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from lorry.config.parsing.sizes import parse_size, size_in_words
from lorry.config.schema.lora import LoraConfig
from lorry.config.schema.run import RunConfig
from lorry.config.schema.train import TrainConfig
from lorry.kernels.build import kernel_status
from lorry.models.loading.describe import describe_model, read_model_json
from lorry.models.loading.load import pick_device, pick_dtype
from lorry.models.loading.sources import find_adapters_in, resolve_model
from lorry.notes import NoteCallback, ignore_note
from lorry.plan.choices import (
    base_precisions,
    find_fitting_choice,
    no_choice_fits_error,
    open_choices,
    refuse_budget_of_jobs,
    single_device_memory,
)
from lorry.plan.configs import count_start_values
from lorry.plan.memory import DeviceType, PrecisionName, kept_precision, packed_precision
from lorry.plan.search import PlanChoice
from lorry.plan.shapes import read_model_shape
from lorry.runs.layout import ADAPTER_CONFIG


def resolve_memory_budget(run: RunConfig, add_note: NoteCallback) -> RunConfig:
    """The run with its rank, micro-batches and recompute chosen to fit `memory_budget`; as it is
    without one.

    A function of the description, the config and the device's kind, so that a resumed run settles
    on the same. Raises ConfigError when nothing fits, naming the smallest budget that would do.
    """
    # lora=null is refused with words of its own by `refuse_adapter_settings`
    if run.memory_budget is None or run.lora is None:
        return run
    refuse_budget_of_jobs(run.memory_budget, run.jobs)
    model = run.model
    # config.json and headers alone: nothing that weighs is read before there is a plan
    place = resolve_model(
        model.name,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        add_note=ignore_note,
    )
    description = describe_model(
        place.directory,
        trust_remote_code=model.trust_remote_code,
        native=model.native,
        packed=True,
        add_note=ignore_note,
    )
    shape = read_model_shape(
        description.config,
        where=str(place.directory / "config.json"),
        native=description.family is not None,
    )
    where = pick_device(model.device)
    device: DeviceType = "cuda" if where.type == "cuda" else "cpu"
    whole = cast(PrecisionName, str(pick_dtype(model.dtype, where)).removeprefix("torch."))
    stated = read_model_json(place.directory / "config.json")
    held = packed_precision(stated)
    # a GGUF file is converted to bfloat16, and keeps its own
    kept = kept_precision(stated) if place.file is None else "int8"
    precisions = base_precisions(model.quantize, held, whole, kept)
    # an adapter that is trained further has its rank already; only the batch is left to choose
    adapter = place.adapter or (Path(model.adapter) if model.adapter else None)
    frozen = 0
    if run.freezes_start and adapter is not None:
        # the one that trains is new; this one and those under it are held beside it
        frozen, adapter = sum(map(count_start_values, find_adapters_in(adapter)[:1])), None
    adapter_rank = _adapter_rank(adapter)
    options = open_choices(
        run.lora,
        run.train,
        shape,
        precisions,
        has_budget=True,
        rank=adapter_rank,
    )
    need = single_device_memory(
        run.lora,
        run.data.max_length,
        shape,
        device,
        kernel_status().attention,
        reads=run.step_reads,
        frozen=frozen,
        compute=whole,
    )
    search = find_fitting_choice(run.memory_budget, options, need)
    if search.best is None:
        raise no_choice_fits_error(run.memory_budget, search)
    add_note(
        f"memory_budget={run.memory_budget}: {search.best.choice.words()}, predicted peak {size_in_words(search.best.memory.total)} of "
        f"{size_in_words(parse_size(run.memory_budget))}"
    )
    return _apply_choice(run, search.best.choice, adapter_rank, whole if held is None else None)


def _adapter_rank(adapter: Path | None) -> int | None:
    """The rank of the adapter a run goes on with; None when it starts a new one."""
    folders = find_adapters_in(adapter) if adapter is not None else []
    rank = read_model_json(folders[0] / ADAPTER_CONFIG).get("r") if folders else None
    return rank if isinstance(rank, int) else None


def _apply_choice(
    run: RunConfig, choice: PlanChoice, existing: int | None, whole: str | None
) -> RunConfig:
    """The description with a choice written into it. ``whole``: the precision of a base that is not
    packed; None of one that is so already."""
    lora = run.lora
    if lora is not None and lora.r == "auto" and existing is None:
        # the scale of ranks that rows choose does not hang on how many would fit
        alpha = {"lora_alpha": lora.alpha_at(choice.rank)} if lora.ranks_follow_data else {}
        lora = LoraConfig.model_validate(
            {
                **lora.model_dump(exclude_none=True),
                **alpha,
                "r": choice.rank,
                "rank_by": lora.rank_by or "data",
            }
        )
    train = {
        "per_device_train_batch_size": choice.rows,
        "gradient_accumulation_steps": choice.accumulation,
        "gradient_checkpointing": choice.recompute == "full",
    }
    model = run.model
    if model.quantize == "auto":
        packs = whole is not None and choice.precision != whole
        model = model.model_copy(update={"quantize": choice.precision if packs else None})
    return run.model_copy(
        update={
            "model": model,
            "lora": lora,
            "train": TrainConfig.model_validate({**run.train.model_dump(), **train}),
        }
    )
