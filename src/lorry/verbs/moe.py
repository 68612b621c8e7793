"""`lorry moe CONFIG`: experts over one base, a router over them, and what is made of both.

Its stages (mixture/stages.py): OUTPUT/experts, a run of one job for each expert that is not brought
along, or a run for each; OUTPUT (of a workspace OUTPUT/gating_network), the router's run, which
holds a copy of every expert and is the mixture; then what is asked for: the mixture in a stock
class, that one finetuned, a GGUF file (mixture/outputs.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lorry.config import dump_settings
from lorry.config.jobs import runs_by_adapter
from lorry.config.merge import EXACT_METHOD, MergeSettings
from lorry.config.moe import (
    ROUTER_KINDS,
    MoeRunConfig,
    RouterConfig,
    RouterRunConfig,
    check_router,
    router_train,
)
from lorry.config.schema import RunConfig, TrainConfig
from lorry.errors import ConfigError
from lorry.runs.layout import (
    ADAPTER_CONFIG,
    EXPERTS,
    RECEIPT,
    REPORT,
    ROUTER,
    ROUTER_FILE,
    RUN_FILE,
    RunDir,
)
from lorry.runs.ownership import is_run
from lorry.runs.stages import data_digests
from lorry.verbs import merge
from lorry.verbs.mixture.checks import check_experts_on_base, check_rows, refuse_own_experts
from lorry.verbs.mixture.outputs import (
    call_verb,
    check_outputs,
    convert,
    finetune,
    merge_experts,
    whole_folders,
    write_export,
    write_moe,
)
from lorry.verbs.mixture.stages import (
    Stages,
    adapter_inputs,
    clear_undescribed_mixture,
    row_inputs,
)

LOG = "train.log"  # of a workspace: what its stages said

if TYPE_CHECKING:
    from lorry.models.loading.open import OpenedModel


def main(run: MoeRunConfig) -> int:
    """Train what is to be trained. The last line of standard output is the mixture's directory;
    where skip_gating finds none, the experts'."""
    from lorry.backends.distributed.communicator import join_processes

    if not run.jobs:
        raise ConfigError("experts is missing: give experts=[{name: a, data: a.jsonl}, ...]")
    if run.background:
        raise ConfigError("background: `lorry moe` runs in the terminal; leave it out")
    if run.train.push_to_hub or run.router.train.get("push_to_hub"):
        raise ConfigError(
            "push_to_hub: `lorry moe` uploads nothing; leave it out, and push the "
            f"experts' run afterwards (lorry push {run.output_dir / EXPERTS})"
        )
    own = len(run.jobs) - len(brought_adapters(run))
    if run.memory_budget is not None and own > 1 and run.together:
        raise ConfigError(
            "memory_budget is chosen for a run of one adapter: give together=false, which trains the experts in turn, "
            "each with the rank that fits (r=auto); or leave memory_budget out"
        )
    refuse_missing_rows(run)
    refuse_undescribed_experts(run)
    if run.skip_gating:
        refuse_pickled_router(run.folders.mixture)
    refuse_own_experts(run.folders.mixture, remade_folders(run), brought_adapters(run))
    folders = expert_folders(run)
    if run.skip_experts:
        refuse_untrained_experts(folders, "config.json" if run.whole_experts else ADAPTER_CONFIG)
    # before the experts train: hours later its settings would be as wrong
    router = None if run.whole_experts else router_run(run, folders)
    check_outputs(run)
    moe_router = export_router_run(run, folders)
    check_rows(run)
    there = {n: [str(path)] for n, path in folders.items()} if run.skip_experts else None
    trained = [r for r in (router, moe_router) if r is not None and r.router.is_trained_by_run]
    with join_processes(run.backend) as communicator:
        if not run.whole_experts:
            communicator.on_main(
                "the experts' base",
                lambda: check_experts_on_base(
                    run, _open_base(run), there or brought_adapters(run), trained
                ),
            )
        log = run.output_dir / LOG if run.layout == "workspace" else None
        make_stages(
            run,
            Stages(run.output_dir, run.model, log, communicator),
            folders,
            router,
            moe_router,
        )
    return 0


def make_stages(
    run: MoeRunConfig,
    stages: Stages,
    folders: dict[str, Path],
    router: RouterRunConfig | None,
    moe_router: RouterRunConfig | None,
) -> None:
    """All that is to be made, in its order; ``router``: None where the experts are whole models.
    Raises LorryError."""
    if not run.skip_experts:
        make_experts(run, stages)
    if router is None:
        finish_whole_experts(run, stages)
        return
    experts = adapter_inputs(folders)
    if run.merge_experts:
        merge_experts(run, stages, folders)
    if not run.skip_gating:
        make_mixture(run, router, folders, experts, stages)
    if moe_router is not None and not run.skip_merge:
        stages.train(
            "router of the export", moe_router, (e.data for e in moe_router.experts), experts
        )
    routed = (run.folders.mixture / ROUTER / ROUTER_FILE).is_file()
    outputs = [run.folders.mixture if routed else run.folders.experts, *write_outputs(run, stages)]
    if run.layout == "workspace":
        stages.on_main(lambda: write_stages_report(run))
    for path in outputs[1:]:
        stages.tell(f"wrote   {path}")
    page = (run.output_dir if run.layout == "workspace" else outputs[0]) / REPORT
    if page.is_file():  # none where skip_gating has left the mixture out
        print(f"report  {page}", file=sys.stderr)
    if routed:
        print(f"chat    lorry chat {outputs[0]}", file=sys.stderr)
    print(outputs[0])


def finish_whole_experts(run: MoeRunConfig, stages: Stages) -> None:
    """What is made of experts that are whole models: no mixture of adapters, but their stock class.
    The last line of standard output is the last model that was made, else the experts' folder."""
    stages.tell(
        "router: left out: it gates adapters over one base, and these experts are whole models; a "
        "stock class has gates of prompts"
    )
    outputs = [run.folders.experts, *write_outputs(run, stages)]
    # in either layout no run is the output directory itself
    stages.on_main(lambda: write_stages_report(run))
    for path in outputs[1:]:
        stages.tell(f"wrote   {path}")
    print(outputs[-1])


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


def write_outputs(run: MoeRunConfig, stages: Stages) -> list[Path]:
    """The stages behind the mixture; returns what they wrote. Raises LorryError."""
    written = list[Path]()
    moe, gguf = run.export_of("hf-moe"), run.export_of("gguf")
    if moe is not None and not run.skip_merge:
        write_moe(run, moe, stages)
        written.append(run.folders.moe)
    for form in ("dense", "peft"):
        if (stage := run.export_of(form)) is not None and not run.skip_merge:
            written.append(write_export(run, stage, stages))
    if run.finetune and not run.skip_finetune:
        finetune(run, stages)
        written.append(run.folders.finetuned)
    if gguf is not None and not run.skip_convert:
        written.append(convert(run, gguf, stages))
    return written


def write_stages_report(run: MoeRunConfig) -> None:
    """One page for the runs of all stages."""
    from lorry.report import write_report
    from lorry.runs.status import find_runs

    if there := list(find_runs(run.output_dir)):
        write_report(there, run.output_dir / REPORT)


def refuse_untrained_experts(folders: Mapping[str, Path], file: str) -> None:
    """Raise ConfigError where skip_experts counts on one that is not there: ``file`` says that it
    is."""
    for name, folder in folders.items():
        if not (folder / file).is_file():
            raise ConfigError(
                f"skip_experts: expert {name!r} is not in {folder}; leave skip_experts out to train it"
            )


def refuse_pickled_router(folder: Path) -> None:
    """Raise ConfigError where skip_gating would pass over a router of another program's: a pickle,
    which nothing here reads."""
    if (folder / ROUTER / ROUTER_FILE).is_file():
        return
    if pickled := sorted(folder.glob("*.pt")):
        raise ConfigError(
            f"skip_gating: {pickled[0]} is a pickle, which is never read; leave skip_gating out to "
            "make a router of the experts' rows"
        )


def brought_adapters(run: MoeRunConfig) -> dict[str, list[str]]:
    """{expert: its PEFT directories} of those that are not trained here."""
    adapters = {job.name: job.expert.get("adapter") for job in run.jobs}
    return {
        n: [adapter] if isinstance(adapter, str) else list(adapter)
        for n, adapter in adapters.items()
        if adapter
    }


def remade_folders(run: MoeRunConfig) -> list[Path]:
    """Where this call writes adapters or a mixture, and moves away what an earlier one
    left there."""
    remade, brought, folder = list[Path](), brought_adapters(run), run.folders.experts
    if not run.skip_experts:
        # of its own, or a sum; together or in turn: each way makes room where it was the other
        made = [job.name for job in run.jobs if len(brought.get(job.name, ())) != 1]
        remade += [folder / name for name in made]
        if any(name not in brought for name in made):
            remade.append(folder)
    if not run.skip_gating:
        remade.append(run.folders.mixture)
    if run.export_router() is not None and not run.skip_merge:
        remade.append(run.folders.moe_router)
    return remade


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


def refuse_undescribed_experts(run: MoeRunConfig) -> None:
    """Raise ConfigError for gates of an export from prompts where no run has all experts and says
    which rows are whose: neither the mixture's, nor one that trains all of them."""
    moe = run.export_of("hf-moe")
    # a whole model is a run with rows of its own
    if moe is None or run.skip_merge or moe.gate_mode == "router" or run.whole_experts:
        return
    mixture = run.folders.mixture
    if run.skip_gating:
        has_all, describes = (mixture / ROUTER / ROUTER_FILE).is_file(), is_run(mixture)
    else:
        own = runs_by_adapter(run).values()
        has_all, describes = True, all(one.data.path or one.data.mix for one in own)
    # random gates read no rows
    if has_all and (describes or moe.gate_mode == "random"):
        return
    if in_turn(run) or brought_adapters(run):
        raise ConfigError(
            f"export: gate_mode={moe.gate_mode} takes experts and prompts from one run, and here "
            "none has all experts and their rows; give data=FILE to each expert, gate_mode=router, "
            f"or export afterwards: lorry export {mixture} to=hf-moe gate_mode={moe.gate_mode} "
            "prompts={EXPERT: [TEXT, ...]}"
        )


def expert_folders(run: MoeRunConfig) -> dict[str, Path]:
    """{expert: where its adapter, or whole model, lies}, in their order; of those that are made,
    where it will."""
    if run.whole_experts:
        return whole_folders(run)
    brought, folder = brought_adapters(run), run.folders.experts
    own = len(run.jobs) - len(brought)

    def place(name: str) -> Path:
        adapters = brought.get(name, [])
        if len(adapters) == 1:
            return Path(adapters[0])
        # several are added up in a folder of the expert's name, as experts in turn have one
        return folder / name if adapters or in_turn(run) else RunDir(folder).adapter(name, own)

    return {job.name: place(job.name) for job in run.jobs}


def in_turn(run: MoeRunConfig) -> bool:
    """Whether each expert is trained by a run of its own."""
    # a workspace has a folder for each expert, also where only one trains
    own = len(run.jobs) - len(brought_adapters(run))
    return not run.together or run.whole_experts or (own == 1 and run.layout == "workspace")


def make_experts(run: MoeRunConfig, stages: Stages) -> None:
    """Train those that were not brought along; add up those that are several adapters. Raises
    LorryError."""
    brought, alone = brought_adapters(run), runs_by_adapter(run)
    own = [job.name for job in run.jobs if job.name not in brought]
    if own:
        stages.clear_other_experts(
            run.folders.experts, own, in_turn=in_turn(run), whole=run.whole_experts
        )
    for names in [[name] for name in own] if in_turn(run) else [own] if own else []:
        experts_run = _experts_run(run, names, alone)
        stage = f"expert {names[0]}" if in_turn(run) else "experts"
        stages.train(stage, experts_run, (alone[name].data for name in names))
    weights = {job.name: job.expert.get("adapter_weights") for job in run.jobs}
    for name, adapters in brought.items():
        if len(adapters) > 1:
            add_up_adapters(run.folders.experts / name, adapters, weights[name], stages)


def add_up_adapters(
    folder: Path, adapters: list[str], weights: list[float] | None, stages: Stages
) -> None:
    """One expert of several adapters of the same base: their exact sum. Raises LorryError."""
    first, *others = adapters
    settings = MergeSettings.model_validate(
        {"run": first, "others": others, "method": EXACT_METHOD, "weights": weights}
        | {"output_dir": str(folder)}
    )
    stages.write(
        f"expert {folder.name}",
        [folder],
        adapter_inputs({adapter: Path(adapter) for adapter in adapters}),
        lambda: call_verb(merge.main, settings),
        settings.model_dump_json(),
    )


def _experts_run(run: MoeRunConfig, names: list[str], alone: dict[str, RunConfig]) -> RunConfig:
    """The run of the experts that are trained: a job each, or a run of a single adapter."""
    own_fields = MoeRunConfig.model_fields.keys() - RunConfig.model_fields.keys()
    shared = run.model_dump(
        mode="json", exclude={"jobs", "task", "output_dir", "background", *own_fields}
    )
    folder = run.folders.experts
    shared |= {"output_dir": folder / names[0] if in_turn(run) else folder}
    if run.whole_experts:
        shared |= {"output_dir": whole_folders(run)[names[0]]}
        # all that a stock class routes
        shared |= {"trainable": run.trainable or "mlp"}
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
    opened = _open_base(run)
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


def _open_base(run: MoeRunConfig) -> OpenedModel:
    from lorry.verbs.open_model import open_with_adapters

    opened = open_with_adapters(run.model)
    if opened.adapters:
        raise ConfigError(
            f"{run.model.name} already has an adapter; a mixture is built on a base "
            "model: name that"
        )
    return opened
