"""The experts of `lorry moe`: where each lies, and the runs and sums by which those that are not brought
along are made.
"""

from __future__ import annotations

from pathlib import Path

from lorry.config.jobs import runs_by_adapter
from lorry.config.merge import EXACT_METHOD, MergeSettings
from lorry.config.moe import MoeRunConfig
from lorry.config.schema.run import RunConfig
from lorry.runs.layout import MERGED, RunDir
from lorry.verbs import merge
from lorry.verbs.mixture.stages import Stages, adapter_inputs, call_verb


def brought_adapters(run: MoeRunConfig) -> dict[str, list[str]]:
    """{expert: its PEFT directories} of those that are not trained here."""
    adapters = {job.name: job.expert.get("adapter") for job in run.jobs}
    return {
        n: [adapter] if isinstance(adapter, str) else list(adapter)
        for n, adapter in adapters.items()
        if adapter
    }


def whole_folders(run: MoeRunConfig) -> dict[str, Path]:
    """{expert: the directory of its run, a whole model}, where the project has merged ones."""
    return {job.name: run.folders.experts / job.name / MERGED for job in run.jobs}


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
