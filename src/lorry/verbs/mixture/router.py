"""The router of `lorry moe`: the run that trains it, or one that is made of the experts without training,
and the mixture of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lorry.config import dump_settings
from lorry.config.jobs import runs_by_adapter
from lorry.config.moe import (
    ROUTER_KINDS,
    MoeRunConfig,
    RouterConfig,
    RouterRunConfig,
    check_router,
    router_train,
)
from lorry.config.schema.train import TrainConfig
from lorry.errors import ConfigError
from lorry.runs.layout import RECEIPT, ROUTER, RUN_FILE, RunDir
from lorry.runs.stages import data_digests
from lorry.verbs.mixture.stages import Stages, clear_undescribed_mixture, row_inputs

if TYPE_CHECKING:
    from lorry.models.loading.open import OpenedModel


def router_run(
    run: MoeRunConfig,
    folders: dict[str, Path],
    router: RouterConfig | None = None,
    output: Path | None = None,
) -> RouterRunConfig:
    """The run of the router, or of another one, in the mixture's own directory or ``output``. Raises
    ConfigError for what it cannot be."""
    router = router or run.router
    alone = runs_by_adapter(run)
    experts = [
        {
            "name": name,
            "adapter": str(path),
            # a loss on the prompt would leave nothing before the first supervised token
            "data": alone[name].data.model_dump(mode="json")
            | ({} if router.lora is None else {"completion_only_loss": True}),
        }
        for name, path in folders.items()
    ]
    settings: dict[str, Any] = {
        "model": run.model.model_dump(mode="json"),
        "backend": run.backend.model_dump(mode="json"),
        "experts": experts,
        "router": router.model_dump(mode="json"),
        "output_dir": output or run.folders.mixture,
    }
    try:
        return RouterRunConfig.model_validate({**settings, "train": router_train(run, router)})
    except ValidationError as error:
        of_train = error.title == TrainConfig.__name__
        lines = [
            ".".join(map(str, ["router.train"] * of_train + list(detail["loc"])))
            + f": {detail['msg']}"
            for detail in error.errors(include_url=False)
        ]
        raise ConfigError("the router's run: " + "; ".join(lines)) from None


def export_router_run(run: MoeRunConfig, folders: dict[str, Path]) -> RouterRunConfig | None:
    """The run of a router for the export alone, if it needs one. Raises ConfigError."""
    router = run.export_router()
    if router is None:
        return None
    check_router(router, [job.name for job in run.jobs])
    return router_run(run, folders, router, run.folders.moe_router)


def make_mixture(
    run: MoeRunConfig,
    router: RouterRunConfig,
    folders: dict[str, Path],
    experts: Mapping[str, str],
    stages: Stages,
) -> None:
    """Train the router, or write one that nothing trains. ``experts``: their digests. Raises
    LorryError."""
    output = run.folders.mixture
    if run.router.is_trained_by_run:
        stages.on_main(lambda: clear_undescribed_mixture(output))
        stages.train("router", router, (expert.data for expert in router.experts), experts)
        return
    needs_rows = ROUTER_KINDS[run.router.kind].needs_rows
    reads = [expert.data for expert in router.experts] if needs_rows else []
    stages.write(
        "router",
        [output / name for name in (RUN_FILE, RECEIPT, ROUTER, *folders)],
        {**experts, **row_inputs(reads)},
        lambda: write_untrained_mixture(run, router, folders),
        dump_settings(router),
    )


def write_untrained_mixture(
    run: MoeRunConfig, router: RouterRunConfig, folders: dict[str, Path]
) -> None:
    """A mixture whose router is made without training: a run's directory all the same, of its
    description ``router``, with a receipt and a report; without steps and contracts. Raises
    LorryError."""
    from lorry.adapters.peft.files import find_adapter, load_adapter
    from lorry.disk import durable
    from lorry.report import write_report
    from lorry.train.finish import base_model_name
    from lorry.train.mixture import describe_untrained_mixture, write_mixture

    durable.make_directory(run.folders.mixture)
    opened = open_mixture_base(run)
    for name, path in folders.items():
        load_adapter(opened.model, find_adapter(path)[0], name, trainable=False)
    gates = UNTRAINED[run.router.kind](run, opened, list(folders))
    digests = write_mixture(
        run.folders.mixture, opened, list(folders), base_model_name(opened), gates
    )
    reads = router.experts if ROUTER_KINDS[run.router.kind].needs_rows else []
    rows = {expert.name: {"files": data_digests(expert.data)} for expert in reads}
    describe_untrained_mixture(router, opened, digests, rows)
    write_report([run.folders.mixture])


def _constant_gates(
    run: MoeRunConfig, opened: OpenedModel, experts: list[str]
) -> dict[str, float] | None:
    return run.router.gates or dict.fromkeys(experts, 1 / len(experts))


def _prompt_router(run: MoeRunConfig, opened: OpenedModel, experts: list[str]) -> None:
    """A router of the sequence, of prompts of every expert's rows."""
    from lorry.tasks.moe.prompts import PROMPT_ROUTERS, read_prompts
    from lorry.verbs.open_model import print_note

    alone, folder = runs_by_adapter(run), RunDir(run.folders.mixture)
    prompts = {
        name: read_prompts(
            alone[name].data,
            run.train,
            opened,
            name,
            quarantine=folder.quarantine(name, len(experts)),
            tell=print_note,
        )
        for name in experts
    }
    PROMPT_ROUTERS[run.router.kind](
        opened, prompts, run.router, seed=run.train.seed, tell=print_note
    )


def _attach_spectral_router(run: MoeRunConfig, opened: OpenedModel, experts: list[str]) -> None:
    from lorry.adapters.routing.linear_router import attach_spectral_router

    settings = run.router
    attach_spectral_router(
        opened.model,
        settings.kind,
        experts,
        top_k=settings.top_k,
        temperature=settings.temperature,
    )


# kind -> what makes its router over the experts of the opened base: gates that are numbers, or None
# where it attaches one to the model's bank (`AdapterBank.routers`)
UNTRAINED: dict[str, Callable[[MoeRunConfig, OpenedModel, list[str]], dict[str, float] | None]] = {
    "uniform": _constant_gates,
    "fixed": _constant_gates,
    "sequence": _prompt_router,
    "prototype": _prompt_router,
    "arrow": _attach_spectral_router,
    "spectr": _attach_spectral_router,
}


def open_mixture_base(run: MoeRunConfig) -> OpenedModel:
    """The model that the experts are over. Raises ConfigError where it has an adapter already."""
    from lorry.verbs.open_model import open_with_adapters

    opened = open_with_adapters(run.model)
    if opened.adapters:
        raise ConfigError(
            f"{run.model.name} already has an adapter; a mixture is built on a base "
            "model: name that"
        )
    return opened
