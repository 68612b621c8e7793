"""What a memory_budget leaves open in a run description, decided before any weight is loaded; `lorry plan` shows the search."""

from __future__ import annotations

from pathlib import Path

from lorry.config.parsing.sizes import in_words, parse_size
from lorry.config.schema import LoraConfig, Run, TrainConfig
from lorry.errors import ConfigError
from lorry.kernels.build import status
from lorry.models.loading.describe import describe, read_json
from lorry.models.loading.load import pick_device, pick_dtype
from lorry.models.loading.sources import adapters_in, resolve
from lorry.plan.memory import Device
from lorry.plan.search import Choice
from lorry.plan.settle import find, impossible, on_one_device, open_choices
from lorry.plan.shapes import shape_of
from lorry.runs.layout import ADAPTER_CONFIG


def settled(run: Run, notes: list[str]) -> Run:
    """The run with its rank, micro-batches and recompute chosen to fit `memory_budget`; as it is without one.

    A function of the description, the config and the device's kind, so that a resumed run settles on the same. Raises ConfigError
    when nothing fits, naming the smallest budget that would do.
    """
    if run.memory_budget is None or run.lora is None:
        return run
    if run.jobs:
        raise ConfigError("memory_budget is not planned for several jobs yet; leave out memory_budget or jobs")
    model = run.model
    place = resolve(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code, notes=[])
    described = describe(place.directory, trust_remote_code=model.trust_remote_code, native=model.native, notes=[])
    shape = shape_of(described.config, where=str(place.directory / "config.json"), native=described.family is not None)
    where = pick_device(model.device)
    device: Device = "cuda" if where.type == "cuda" else "cpu"
    precision = str(pick_dtype(model.dtype, where)).removeprefix("torch.")
    existing = _rank_of(place.adapter or (Path(model.adapter) if model.adapter else None))
    options = open_choices(run, shape, [precision], rank=existing)  # type: ignore[list-item]
    found = find(run, options, on_one_device(run, shape, device, status().amx))
    if found.best is None:
        raise impossible(run, found)
    notes.append(
        f"memory_budget={run.memory_budget}: {found.best.choice.words()}, predicted peak {in_words(found.best.memory.total)} of "
        f"{in_words(parse_size(run.memory_budget))}"
    )
    return _with(run, found.best.choice, existing)


def _rank_of(adapter: Path | None) -> int | None:
    """The rank of the adapter a run goes on with; None when it starts a new one."""
    folders = adapters_in(adapter) if adapter is not None else []
    rank = read_json(folders[0] / ADAPTER_CONFIG).get("r") if folders else None
    return rank if isinstance(rank, int) else None


def _with(run: Run, choice: Choice, existing: int | None) -> Run:
    """The description with a choice written into it; lora_alpha follows the rank unless it was given."""
    lora = run.lora
    if lora is not None and lora.r == "auto" and existing is None:
        lora = LoraConfig.model_validate({**lora.model_dump(exclude_none=True), "r": choice.rank})
    train = {
        "per_device_train_batch_size": choice.rows, "gradient_accumulation_steps": choice.accumulation,
        "gradient_checkpointing": choice.recompute == "full",
    }  # fmt: skip
    return run.model_copy(update={"lora": lora, "train": TrainConfig.model_validate({**run.train.model_dump(), **train})})
