"""`lorry export MIXTURE`: a mixture of LoRA experts, or the adapters of a run of several, for other
programs.

    to=hf-moe   Mixtral, Qwen2-MoE or Qwen3-MoE: whole MLPs, gated by the run's router or by prompts
    to=dense    one model: the experts added up by constant gates
    to=gguf     the same as a GGUF file
    to=peft     a PEFT folder for each expert, and routing.json: which of them a request gets

What of a run's routing a format cannot hold is refused by name. Where a format computes something
else than the run (a `delta` mixture adds adapters inside each MLP, a stock class adds MLPs;
constant gates are no router) the loss on every expert's domain is measured before and after, and
told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.schema.model import ModelConfig
from lorry.config.settings import ExportSettings
from lorry.errors import ConfigError, DataError
from lorry.runs.layout import ROUTER, ROUTER_FILE
from lorry.verbs.checks import probe
from lorry.verbs.checks.domain_loss import DomainLoss, row_prompts
from lorry.verbs.exports.gguf import GGUF_OUTTYPES, export_gguf
from lorry.verbs.exports.moe import (
    DEFAULT_TOP_K,
    EXACT_SHARE,
    RANDOM_GATES,
    expect_decoder,
    export_moe,
    untrained_note,
)
from lorry.verbs.exports.peft import expert_names, export_peft_experts
from lorry.verbs.merge import write_merged
from lorry.verbs.open_model import open_to_write, print_note

if TYPE_CHECKING:
    from lorry.adapters.routing.files import RouterRecord
    from lorry.models.loading.open import OpenedModel
    from lorry.models.moe.gates import ExpertPrompts

NO_MATRIX = "has no matrix over a layer's input, which is all that these classes have for a router"


def is_mixture(run: str) -> bool:
    """Whether a path is the directory of a mixture of experts."""
    return (Path(run) / ROUTER / ROUTER_FILE).is_file()


def export_mixture(settings: ExportSettings) -> Path:
    """Write what ``settings`` ask of a run of several experts, and open it again; returns where it
    is. Raises ConfigError, ModelError for what the format cannot hold, ContractError if what was
    written is another model when it is opened again; nothing is left then.
    """
    from lorry.adapters.routing.files import read_router_record
    from lorry.models.loading.open import stored_dtype

    assert settings.run is not None  # the settings say so
    folder, stored = Path(settings.run), stored_dtype(settings.run)
    record = read_router_record(folder) if is_mixture(settings.run) else None
    if settings.to == "hf-moe":
        # before the model is read: what no class can hold
        _refuse_other_routers(settings, record)
    dtype = "float32" if settings.to == "hf-moe" else probe.logits_dtype_name(settings.run, stored)
    opened = open_to_write(ModelConfig.model_validate({"name": settings.run, "dtype": dtype}))
    if len(opened.adapters) < 2:
        raise ConfigError(
            f"{settings.run} is no run of several experts; to={settings.to} takes that of `lorry "
            "moe`, or one of several adapters. Of one adapter to=hf makes a model"
        )
    if settings.to == "hf-moe":
        _export_hf_moe(settings, opened, folder, record, stored)
        return settings.output_dir
    if settings.to == "peft":
        export_peft_experts(opened, folder, record, settings.output_dir)
        return settings.output_dir
    weights = _expert_weights(settings, opened, record)
    summands = ", ".join(f"{gate:g} x {name}" for name, gate in weights.items())
    print_note(f"experts added up: {summands}")
    measure = _measure_domains(opened, folder)
    if settings.to == "gguf":
        outtype = GGUF_OUTTYPES[stored] if settings.outtype == "auto" else settings.outtype
        return export_gguf(
            opened, weights, settings.output_dir, outtype, title=folder.name, measure=measure
        )
    stored = stored if settings.dtype == "auto" else settings.dtype
    write_merged(opened, weights, settings.output_dir, stored, measure)
    return settings.output_dir


def _measure_domains(opened: OpenedModel, folder: Path) -> Callable[[Any], list[str]]:
    """What tells of a model the loss on each expert's rows beside that of the mixture, which is
    computed now. Where the rows are not there any more it says so."""
    if opened.mixture is None:
        return lambda model: []
    try:
        return DomainLoss.of(opened, folder, opened.mixture).compare
    except (DataError, ConfigError) as error:
        reason = str(error)
        return lambda model: [f"note: losses by domain were not compared: {reason}"]


def _expert_weights(
    settings: ExportSettings, opened: OpenedModel, record: RouterRecord | None
) -> dict[str, float]:
    """{expert: g}: those given, the gates of constant kinds, else 1/K each. Raises ConfigError."""
    names = expert_names(opened, record)
    if odd := [name for name in settings.weights if name not in names]:
        raise ConfigError(f"weights names {odd[0]!r}; the experts are {', '.join(names)}")
    constant = None if record is None else record.gates
    weights = settings.weights or constant or dict.fromkeys(names, 1 / len(names))
    if not any(weights.values()):
        raise ConfigError("every weight is 0, which leaves the base as it is; give another one")
    return {name: weights[name] for name in names if weights.get(name)}


def _refuse_other_routers(settings: ExportSettings, record: RouterRecord | None) -> None:
    """Raise ConfigError for routing that no stock class has, where it is to be exported."""
    mode, run = settings.gate_mode, settings.run
    prompts = "gate_mode=hidden (gates from prompts)"
    if record is None:
        if mode is None or mode == "router":
            raise ConfigError(
                f"{run} has no router ({ROUTER}/{ROUTER_FILE}); to=hf-moe takes base_model and "
                "experts as in a mergekit-moe file, a run of `lorry moe`, or a run of several "
                f"adapters with {prompts}"
            )
        return
    if mode is not None and mode != "router":
        return
    if settings.prompts:
        raise ConfigError(
            f"prompts are for gates made of them: give {prompts}; the run's router needs none"
        )
    if record.kind in ("uniform", "fixed"):
        raise ConfigError(
            f"{run}: a router of kind {record.kind} {NO_MATRIX}; to=dense is the same model "
            f"without one, and {prompts} makes one"
        )
    if record.kind != "token":
        raise ConfigError(
            f"{run}: a router of kind {record.kind} {NO_MATRIX}; nearest are {prompts}, "
            "router.kind=token, and to=peft for servers that choose an adapter for each request"
        )
    if record.hidden:
        raise ConfigError(
            f"{run}: a router with hidden layers {NO_MATRIX}; train it with router.hidden=[], or "
            f"give {prompts}"
        )
    if record.input == "attn":
        raise ConfigError(
            f"{run}: its router gates attention, and these classes route MLPs alone; nearest are "
            "router.input=mlp and to=dense"
        )
    if record.input == "both" and settings.attention == "refuse":
        raise ConfigError(
            f"{run}: its router gates attention too, and these classes route MLPs alone; "
            "attention=average puts the mean of the experts' attention into the shared weights, "
            "attention=drop leaves it out"
        )
    if settings.experts_per_token not in (None, record.top_k):
        raise ConfigError(
            f"experts_per_token={settings.experts_per_token}: the run's router was trained with "
            f"top_k={record.top_k}; leave it out"
        )


def _export_hf_moe(
    settings: ExportSettings,
    opened: OpenedModel,
    folder: Path,
    record: RouterRecord | None,
    stored: str,
) -> None:
    """A stock class with the run's router, or with gates from prompts."""
    from lorry.adapters.attach import get_bank
    from lorry.adapters.router import ROUTER_NAME
    from lorry.models.moe.checkpoint import describe_moe
    from lorry.models.moe.gates import gates_from_prompts

    model, names = expect_decoder(opened), expert_names(opened, record)
    routed = record is not None and settings.gate_mode in (None, "router")
    if routed:
        assert record is not None
        router = get_bank(model).routers[ROUTER_NAME]
        # the class has no temperature: W n / t is (W / t) n
        gates = [
            router.tensors()[f"layers.{layer}.mlp.weight"] / record.temperature
            for layer in range(model.geometry.layers)
        ]
        # a gate of 1 for one expert is what a class that normalises has
        top_k, normalize = record.top_k, record.normalize or record.straight_through
    else:
        top_k, normalize = settings.experts_per_token or DEFAULT_TOP_K, True
    # before a row is read: what the class cannot hold
    describe_moe(model.config, experts=len(names), top_k=top_k, normalize=normalize)
    if not routed:
        assert settings.gate_mode is not None
        prompts = _expert_prompts(settings, opened, folder, names)
        gates = gates_from_prompts(
            model, opened.tokenizer, prompts, settings.gate_mode, seed=settings.seed
        )
    measure = _measure_domains(opened, folder)
    # with attention averaged or dropped the class is another model at that level, too
    if routed and record is not None and record.level == "expert" and record.input == "mlp":
        measure = _expect_own_logits(opened, settings, stored, measure)
    export_moe(
        opened,
        settings.output_dir,
        {name: {name: 1.0} for name in names},
        gates,
        top_k=top_k,
        normalize=normalize,
        attention=settings.attention,
        dtype=stored if settings.dtype == "auto" else settings.dtype,
        measure=measure,
    )
    if not routed:
        print_note(untrained_note(str(settings.gate_mode)))
    elif record is not None and record.level == "delta":
        print_note(
            "note: level=delta: the run adds its experts' adapters inside each MLP, and the class "
            "adds whole MLPs, which is another model; the losses above say what it comes to"
        )


def _expert_prompts(
    settings: ExportSettings, opened: OpenedModel, folder: Path, names: list[str]
) -> list[ExpertPrompts]:
    """Of each expert: the prompts given, or those of some of its training rows. Raises ConfigError,
    DataError."""
    from lorry.models.moe.gates import ExpertPrompts

    if settings.gate_mode in RANDOM_GATES:
        if settings.prompts:
            raise ConfigError(f"gate_mode={settings.gate_mode} reads no prompts; leave them out")
        return [ExpertPrompts([])] * len(names)
    if settings.prompts:
        if odd := sorted(set(settings.prompts) ^ set(names)):
            raise ConfigError(
                f"prompts has {'no texts for' if odd[0] in names else 'an unknown expert,'} "
                f"{odd[0]!r}; give some for each of {', '.join(names)}, or leave it out"
            )
        return [ExpertPrompts(settings.prompts[name]) for name in names]
    try:
        return [ExpertPrompts(texts) for texts in row_prompts(opened, folder, names).values()]
    except (ConfigError, DataError) as error:
        raise ConfigError(f"{error}; give prompts={{EXPERT: [TEXT, ...]}}") from None


def _expect_own_logits(
    opened: OpenedModel,
    settings: ExportSettings,
    stored: str,
    measure: Callable[[Any], list[str]],
) -> Callable[[Any], list[str]]:
    """``measure``, and before it the run's own logits on a few rows, to which those of the model
    opened again must be equal: at `level: expert` both compute one thing. It raises ContractError.
    In fewer bits than float32 the difference is told alone: rounded routers choose other experts.
    """
    from lorry.models.loading.reopen import compare_logits, compute_fp32_logits

    rows, rows_words = probe.probe_rows(opened)
    own = compute_fp32_logits(opened.model, rows)
    dtype = stored if settings.dtype == "auto" else settings.dtype
    share = EXACT_SHARE if dtype == "float32" else math.inf

    def compare(model: Any) -> list[str]:
        difference, bound = compare_logits(own, compute_fp32_logits(model, rows), share, dtype)
        beside = f"bound {bound:.1e}" if dtype == "float32" else f"stored in {dtype}"
        line = f"largest logit difference to the run itself {difference:.1e} ({beside}), on {rows_words}"
        return [line, *measure(model)]

    return compare
