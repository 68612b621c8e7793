"""What trains on the base of a run: an adapter for each job, or the base's own weights."""

from __future__ import annotations

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.spec import lora_spec_of
from lorry.adapters.targets.skipped import list_skipped_modules
from lorry.adapters.variants.new_tokens import begin_rows
from lorry.config import RunConfig, runs_by_adapter
from lorry.config.schema.lora import LoraConfig
from lorry.errors import ConfigError
from lorry.models.causal_lm import CausalLM
from lorry.models.loading.open import OpenedModel
from lorry.models.new_tokens import add_new_tokens
from lorry.notes import NoteCallback
from lorry.tasks.registry import TASKS
from lorry.train.full import enable_base_training, refuse_adapter_settings


def attach_jobs(
    run: RunConfig, opened: OpenedModel, add_note: NoteCallback
) -> dict[str, RunConfig]:
    """What the task trains; else one new adapter for each job (or the one that the model came
    with): {name: the run it would be alone}. Raises what `attach_adapter` raises.
    """
    if (attach_own := TASKS[run.task].attach) is not None:
        return attach_own(run, opened, add_note)
    return {
        attach_adapter(job_run, opened, add_note): job_run
        for job_run in runs_by_adapter(run).values()
    }


def attach_adapter(run: RunConfig, opened: OpenedModel, add_note: NoteCallback) -> str:
    """Attach a new adapter, or go on with the one the model came with; with lora=null, switch the
    base's own weights on. Returns its name. Raises ConfigError."""
    if run.lora is None:
        refuse_adapter_settings(run.train, run.memory_budget)
        return enable_base_training(opened, run.trainable or "all", run.output_dir, add_note)
    if not opened.adapters:
        spec, new = add_new_tokens(opened, run.lora, lora_spec_of(run.lora))
        adapter = attach(
            opened.model,
            spec,
            run.lora.adapter_name,
            seed=run.train.seed,
            # from rows, which are read next
            initialize=False,
        )
        if new is not None:
            begin_rows(opened.model, adapter, new)
        _note_skipped_modules(opened.model, adapter, add_note)
        # a bound is no rank that the adapter will have
        if not run.lora.ranks_follow_data:
            _note_idle_ranks(opened.model, adapter, add_note)
        return adapter.name
    if len(opened.adapters) > 1:
        raise ConfigError(
            f"{run.model.name} holds several adapters "
            f"({', '.join(opened.adapters)}); name the folder of one"
        )
    # by value and not by what was given: settings equal to the defaults ask for nothing else
    if run.lora != LoraConfig(adapter_name=run.lora.adapter_name):
        raise ConfigError(
            f"{run.model.name} already has an adapter, which training continues; "
            "leave out the lora settings"
        )
    add_note(f"training continues the adapter of {run.model.name}")
    adapter = get_bank(opened.model)[opened.adapters[0]]
    _note_skipped_modules(opened.model, adapter, add_note)
    return adapter.name


def _note_idle_ranks(model: CausalLM, adapter: Adapter, add_note: NoteCallback) -> None:
    """Say of which linears the rank is above the smaller side: no update of theirs has as many directions."""
    modules = get_bank(model).modules
    sides = {
        path: min(layer.in_features, layer.out_features)
        for path, layer in modules.items()
        # of a share of a matrix the sides are others
        if path in adapter.slots and isinstance(layer, BankLinear) and layer.slices is None
    }
    ranks = {path: adapter.spec.rank(path) for path in sides}
    if idle := [path for path, side in sides.items() if ranks[path] > side]:
        first = idle[0]
        add_note(
            f"adapter {adapter.name!r}: r={ranks[first]} is more than an update of {len(idle)} modules can use, "
            f"such as {first}, whose smaller side is {sides[first]}; a smaller r, or rank_pattern, does the same"
        )


def _note_skipped_modules(model: CausalLM, adapter: Adapter, add_note: NoteCallback) -> None:
    for module in list_skipped_modules(model, adapter):
        add_note(f"not adapted: {module.what}; {module.why}")
