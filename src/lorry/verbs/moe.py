"""`lorry moe CONFIG`: experts over one base, a router over them, and what is made of both.

Its stages (mixture/stages.py): OUTPUT/experts (mixture/experts.py), a run of one job for each expert
that is not brought along, or a run for each; OUTPUT (of a workspace OUTPUT/gating_network), the router's
run (mixture/router.py), which holds a copy of every expert and is the mixture; then what is asked for:
the mixture in a stock class, that one finetuned, a GGUF file (mixture/outputs.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorry.config.moe import MoeRunConfig, RouterRunConfig
from lorry.errors import ConfigError
from lorry.runs.layout import ADAPTER_CONFIG, EXPERTS, REPORT, ROUTER, ROUTER_FILE
from lorry.verbs.mixture.checks import (
    check_experts_on_base,
    check_rows,
    refuse_missing_rows,
    refuse_own_experts,
    refuse_pickled_router,
    refuse_undescribed_experts,
    refuse_untrained_experts,
    remade_folders,
)
from lorry.verbs.mixture.experts import brought_adapters, expert_folders, make_experts
from lorry.verbs.mixture.outputs import (
    check_outputs,
    convert,
    finetune,
    merge_experts,
    write_export,
    write_moe,
)
from lorry.verbs.mixture.router import (
    export_router_run,
    make_mixture,
    open_mixture_base,
    router_run,
)
from lorry.verbs.mixture.stages import Stages, adapter_inputs

LOG = "train.log"  # of a workspace: what its stages said


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
                    run, open_mixture_base(run), there or brought_adapters(run), trained
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
