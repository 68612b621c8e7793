"""`lorry moe CONFIG.yaml`: experts in one run over one base, then a router over them.

Two stages, each a run of its own that goes on where it was stopped: OUTPUT/experts, a run of one
job for each expert that is not brought along, and OUTPUT, the router's, which holds a copy of every
expert and is the mixture. A finished stage is not done again while nothing that it was made of has
changed: settings, code, base, data files, experts (moe_stages.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lorry.config.jobs import runs_by_adapter
from lorry.config.moe import ROUTER_KINDS, MoeRunConfig, RouterRunConfig, router_train
from lorry.config.schema import RunConfig, TrainConfig
from lorry.errors import ConfigError
from lorry.runs.layout import EXPERTS, ROUTER, RunDir
from lorry.verbs.moe_stages import Stages, adapter_inputs, clear_constant_mixture, row_inputs

if TYPE_CHECKING:
    from lorry.models.loading.open import OpenedModel


def main(run: MoeRunConfig) -> int:
    """Train what is to be trained. The last line of standard output is the mixture's directory."""
    if not run.jobs:
        raise ConfigError("experts is missing: give experts=[{name: a, data: a.jsonl}, ...]")
    if run.background:
        raise ConfigError("background: `lorry moe` runs in the terminal; leave it out")
    if run.train.push_to_hub or run.router.train.get("push_to_hub"):
        raise ConfigError(
            "push_to_hub: `lorry moe` uploads nothing; leave it out, and push the run of its experts afterwards "
            f"(lorry push {run.output_dir / EXPERTS})"
        )
    refuse_missing_rows(run)
    folders = expert_folders(run)
    # before the experts train: hours later its settings would be as wrong
    router = router_run(run, folders) if ROUTER_KINDS[run.router.kind].trains else None
    stages = Stages(run.output_dir, run.model)
    train_experts(run, stages)
    experts = adapter_inputs(folders)
    if router is not None:
        clear_constant_mixture(run.output_dir)
        stages.train("router", router, (one.data for one in router.experts), experts)
    else:
        own = runs_by_adapter(run)
        reads = (
            [own[name].data for name in folders] if ROUTER_KINDS[run.router.kind].needs_rows else []
        )
        stages.write(
            "router",
            [run.output_dir / name for name in (ROUTER, *folders)],
            {**experts, **row_inputs(reads)},
            lambda: write_untrained_mixture(run, folders),
            "\n".join(one.model_dump_json() for one in (run.router, *reads)),
        )
    print(f"chat    lorry chat {run.output_dir}", file=sys.stderr)
    print(Path(run.output_dir))
    return 0


def brought_adapters(run: MoeRunConfig) -> dict[str, Path]:
    """{expert: its PEFT directory} of those that are not trained here."""
    return {job.name: Path(job.expert["adapter"]) for job in run.jobs if job.expert.get("adapter")}


def refuse_missing_rows(run: MoeRunConfig) -> None:
    """Raise ConfigError for an expert without the rows that it, or the router, is trained on."""
    brought, alone = brought_adapters(run), runs_by_adapter(run)
    for name, own in alone.items():
        if own.data.path or own.data.mix:
            continue
        if name not in brought:
            raise ConfigError(f"expert {name!r} has neither data=FILE nor adapter=DIR; give one")
        if ROUTER_KINDS[run.router.kind].needs_rows:
            raise ConfigError(
                f"expert {name!r} has no data: a router of kind={run.router.kind} is made of rows of every expert's "
                "domain; give data=FILE"
            )


def expert_folders(run: MoeRunConfig) -> dict[str, Path]:
    """{expert: where its adapter lies}, in their order; of those that are trained, where it will."""
    brought, folder = brought_adapters(run), RunDir(run.output_dir / EXPERTS)
    own = len(run.jobs) - len(brought)
    return {job.name: brought.get(job.name) or folder.adapter(job.name, own) for job in run.jobs}


def train_experts(run: MoeRunConfig, stages: Stages) -> None:
    """Train those that were not brought along. Raises LorryError."""
    brought, alone = brought_adapters(run), runs_by_adapter(run)
    if own := [job.name for job in run.jobs if job.name not in brought]:
        stages.train("experts", _experts_run(run, own, alone), (alone[name].data for name in own))


def _experts_run(run: MoeRunConfig, names: list[str], alone: dict[str, RunConfig]) -> RunConfig:
    """The run of the experts that are trained: a job each, or a run of a single adapter."""
    shared = run.model_dump(
        mode="json", exclude={"jobs", "router", "expert", "task", "output_dir", "background"}
    )
    shared |= {"output_dir": run.output_dir / EXPERTS}
    groups = ("lora", "data", "train")
    dumped = {name: alone[name].model_dump(mode="json") for name in names}
    first = dumped[names[0]]
    if len(names) == 1:
        return RunConfig.model_validate({**shared, **{g: first[g] for g in groups}})
    # what the run has is that of the first expert, so that its rows are there
    base = {**shared, **{group: first[group] for group in groups}}
    base["lora"] = {**base["lora"], "adapter_name": "default"}
    jobs = [
        {
            "name": name,
            **{
                group: {
                    key: value
                    for key, value in dumped[name][group].items()
                    if value != base[group][key] and (group, key) != ("lora", "adapter_name")
                }
                for group in groups
            },
        }
        for name in names
    ]
    return RunConfig.model_validate({**base, "jobs": jobs})


def router_run(run: MoeRunConfig, folders: dict[str, Path]) -> RouterRunConfig:
    """The router's run, in the mixture's own directory. Raises ConfigError for what it cannot be."""
    alone = runs_by_adapter(run)
    experts = [
        {"name": name, "adapter": str(path), "data": alone[name].data.model_dump(mode="json")}
        for name, path in folders.items()
    ]
    settings: dict[str, Any] = {
        "model": run.model.model_dump(mode="json"),
        "backend": run.backend.model_dump(mode="json"),
        "experts": experts,
        "router": run.router.model_dump(mode="json"),
        "output_dir": run.output_dir,
    }
    try:
        return RouterRunConfig.model_validate({**settings, "train": router_train(run)})
    except ValidationError as error:
        of_train = error.title == TrainConfig.__name__
        lines = [
            ".".join(map(str, ["router.train"] * of_train + list(one["loc"]))) + f": {one['msg']}"
            for one in error.errors(include_url=False)
        ]
        raise ConfigError("the router's run: " + "; ".join(lines)) from None


def write_untrained_mixture(run: MoeRunConfig, folders: dict[str, Path]) -> None:
    """A mixture whose router is made without training."""
    from lorry.adapters.peft.files import find_adapter, load_adapter
    from lorry.disk import durable
    from lorry.train.finish import base_model_name
    from lorry.train.mixture import write_mixture

    durable.make_directory(run.output_dir)
    opened = _open_base(run)
    for name, path in folders.items():
        load_adapter(opened.model, find_adapter(path)[0], name, trainable=False)
    gates = UNTRAINED[run.router.kind](run, opened, list(folders))
    write_mixture(run.output_dir, opened, list(folders), base_model_name(opened), gates)


def _constant_gates(
    run: MoeRunConfig, opened: OpenedModel, experts: list[str]
) -> dict[str, float] | None:
    return run.router.gates or dict.fromkeys(experts, 1 / len(experts))


# kind -> what makes its router over the experts of the opened base: gates that are numbers, or None
# where it attaches one to the model's bank (`AdapterBank.routers`)
UNTRAINED: dict[str, Callable[[MoeRunConfig, OpenedModel, list[str]], dict[str, float] | None]] = {
    "uniform": _constant_gates,
    "fixed": _constant_gates,
}


def _open_base(run: MoeRunConfig) -> OpenedModel:
    from lorry.verbs.open_model import open_with_adapters

    opened = open_with_adapters(run.model)
    if opened.adapters:
        raise ConfigError(
            f"{run.model.name} has an adapter already; a mixture stands on a base: name that"
        )
    return opened
