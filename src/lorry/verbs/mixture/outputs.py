"""What `lorry moe` writes of a finished mixture: experts merged into their base, the mixture in a
stock class (`lorry export to=hf-moe`), that one finetuned (`lorry sft lora=null`), and a GGUF file.

Each is a stage (stages.py), of what the one before it has written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorry.config import build_settings
from lorry.config.data import DataConfig
from lorry.config.jobs import runs_by_adapter
from lorry.config.merge import MergeSettings
from lorry.config.moe import MoeRunConfig
from lorry.config.moe.stages import ExportStage
from lorry.config.schema.run import RunConfig
from lorry.config.settings import ExportSettings
from lorry.disk import durable
from lorry.disk.integrity import iter_blocks
from lorry.errors import ConfigError, ModelError
from lorry.notes import ignore_note
from lorry.runs.layout import MERGED, PREVIOUS, ROUTER, ROUTER_FILE
from lorry.runs.ownership import is_run
from lorry.runs.stages import path_digest
from lorry.verbs import export, merge
from lorry.verbs.mixture.experts import whole_folders
from lorry.verbs.mixture.stages import Stages, call_verb, model_digest

# of the finetuning's settings, the one that is not of `lorry sft`
TRAIN_ROUTER = "train_router"


def check_outputs(run: MoeRunConfig) -> None:
    """Raise ConfigError or ModelError, before anything trains, for what could not be written: a
    family without such a class, another class, finetuning settings that are none."""
    if run.finetune and not run.skip_finetune:
        finetune_run(run)
    moe = run.export_of("hf-moe")
    if moe is None or run.skip_merge:
        return
    from lorry.models.gguf.architecture import describe_architecture
    from lorry.models.loading.describe import read_model_json
    from lorry.models.loading.sources import resolve_model
    from lorry.models.moe.checkpoint import describe_moe

    place = resolve_model(run.model.name, revision=run.model.revision, add_note=ignore_note)
    config = read_model_json(place.directory / "config.json")
    count = len(run.jobs)
    top_k = moe.experts_per_token or min(run.router.top_k, count)
    if top_k > count:
        raise ConfigError(
            f"export: experts_per_token={top_k}: there are {count} experts; give 1 to {count}"
        )
    twin = describe_moe(config, experts=count, top_k=top_k, normalize=run.router.normalize)
    if moe.architecture not in ("auto", twin.names.model_type):
        raise ConfigError(
            f"export: architecture={moe.architecture}: a {config.get('model_type')} becomes a "
            f"{twin.names.model_type}; leave it out, or take another base"
        )
    moe_settings(run, moe, run.folders.mixture)
    if run.export_of("gguf") is None or run.skip_convert or run.conversion_mode == "average":
        return
    try:
        describe_architecture(twin.config)
    except ModelError as error:
        raise ModelError(
            f"the GGUF file of this mixture: {error}. Else conversion_mode=average makes one dense "
            "model, and skip_convert=true none"
        ) from None


def merge_experts(run: MoeRunConfig, stages: Stages, folders: Mapping[str, Path]) -> None:
    """Each expert folded into the base's weights, in its folder. Raises LorryError."""
    from lorry.adapters.peft.files import find_adapter
    from lorry.adapters.peft.start_files import adapter_digest

    for name, folder in folders.items():
        adapter, _ = find_adapter(folder)
        output = run.folders.experts / name / MERGED
        settings = MergeSettings.model_validate(
            {"run": str(adapter), "output_dir": str(output), "dtype": run.merge_dtype}
        )
        stages.write(
            f"expert {name} merged",
            [output],
            {f"expert {name}": adapter_digest(adapter)},
            lambda settings=settings: call_verb(merge.main, settings),  # type: ignore[misc]  # a default binds it now
            settings.model_dump_json(),
        )


def write_moe(run: MoeRunConfig, stage: ExportStage, stages: Stages) -> None:
    """The mixture in a stock class. Raises LorryError."""
    if run.whole_experts:
        source = run.folders.experts
        inputs = {f"expert {n}": model_digest(folder) for n, folder in whole_folders(run).items()}
    else:
        source = export_source(run, stage)
        inputs = mixture_inputs(source)
    settings = moe_settings(run, stage, source)
    stages.write(
        "merge",
        [run.folders.moe],
        inputs,
        lambda: call_verb(export.main, settings),
        settings.model_dump_json(),
    )


def write_export(run: MoeRunConfig, stage: ExportStage, stages: Stages) -> Path:
    """The mixture as one dense model, or as its adapters; returns where it is. Raises
    LorryError."""
    source, output = run.folders.mixture, run.folders.export(stage.to)
    dtype = {"dtype": stage.dtype} if stage.to == "dense" else {}
    settings = _export_settings(
        {"run": str(source), "to": stage.to, "output_dir": str(output), **dtype}
    )
    stages.write(
        f"export to={stage.to}",
        [output],
        mixture_inputs(source),
        lambda: call_verb(export.main, settings),
        settings.model_dump_json(),
    )
    return output


def moe_settings(run: MoeRunConfig, stage: ExportStage, source: Path) -> ExportSettings:
    """`lorry export` of ``source``, or of whole models, as the stage describes it. Raises
    ConfigError."""
    stage_settings = stage.model_dump(mode="json", exclude={"architecture", "outtype", "path"})
    made_of: dict[str, Any] = {"run": str(source)}
    if run.whole_experts:
        experts = [{"source_model": str(folder)} for folder in whole_folders(run).values()]
        made_of = {"base_model": run.model.name, "experts": experts}
    return _export_settings(
        {
            **{key: value for key, value in stage_settings.items() if value is not None},
            **made_of,
            "output_dir": str(run.folders.moe),
        }
    )


def export_source(run: MoeRunConfig, stage: ExportStage) -> Path:
    """The directory that the stock class is made of: a mixture with a token router, or, where gates
    come from prompts, one that says which rows are whose. Raises ConfigError for one that is
    missing."""
    folders = run.folders
    if stage.gate_mode == "random" and (folders.mixture / ROUTER / ROUTER_FILE).is_file():
        return folders.mixture  # with every expert, also one that no run has trained
    if stage.gate_mode != "router":
        described = (folder for folder in (folders.mixture, folders.experts) if is_run(folder))
        return next(described, folders.mixture)
    source = folders.mixture if run.router.kind == "token" else folders.moe_router
    if not (source / ROUTER / ROUTER_FILE).is_file():
        raise ConfigError(
            f"skip_gating: {source} holds no mixture yet, and the export's gates are its router's; "
            "leave skip_gating out, or give gate_mode: hidden"
        )
    return source


def mixture_inputs(folder: Path) -> dict[str, str]:
    """The digests of a mixture's files, or of adapters in a folder. Raises ModelError."""
    from lorry.adapters.peft.start_files import adapter_digest
    from lorry.runs.layout import list_adapter_subfolders

    files = {
        f"expert {path.name}": adapter_digest(path) for path in list_adapter_subfolders(folder)
    }
    router = folder / ROUTER
    return {**files, "the router": path_digest(router)} if router.is_dir() else files


def finetune_run(run: MoeRunConfig) -> RunConfig:
    """The run that trains the weights of the hf-moe on the rows of all experts. Raises ConfigError
    for settings that are none, and for rows that no single run reads."""
    settings = dict(run.finetune)
    router = settings.pop(TRAIN_ROUTER, True)
    if not isinstance(router, bool):
        raise ConfigError(f"finetune.{TRAIN_ROUTER}: give true or false")
    model = {**run.model.model_dump(mode="json"), "name": str(run.folders.moe)}
    # a setting that the finetuning has goes before that of the experts' rows
    data = {key: value for key, value in finetune_data(run).items() if key not in settings}
    defaults = {
        "model": model,
        "backend": run.backend.model_dump(mode="json"),
        "lora": None,
        "trainable": None if router else "all-but-router",
        "data": data,
        "output_dir": str(run.folders.finetuned),
        "seed": run.train.seed,
        "logging_steps": run.train.logging_steps,
    }
    try:
        return build_settings(RunConfig, {**defaults, **settings}, ignore_note)
    except ConfigError as error:
        raise ConfigError(f"finetune: {error}") from None


def finetune_data(run: MoeRunConfig) -> dict[str, Any]:
    """The rows of all experts as one run's data, read as theirs are; what is held out is the
    finetuning's to say. Raises ConfigError where they are read in more than one way."""
    from lorry.data.stream.mixtures import training_locations

    own = [expert_run.data for expert_run in runs_by_adapter(run).values()]
    names = [name for data in own for name in data.mix]
    paths = [
        path
        for data in own
        for path in ([data.path] if isinstance(data.path, str) else data.path or [])
    ]
    if not names and not paths:
        raise ConfigError("finetune: no expert has data to train the weights on")
    apart = {"path", "mix", "local", "max_length", "eval", "eval_split", "eval_n", "test_size"}
    first, *others = (data.model_dump(mode="json", exclude=apart) for data in own)
    odd = next((key for other in others for key in first if other[key] != first[key]), "")
    if odd or (names and paths):
        what = f"data.{odd} is not the same for all" if odd else "some are named sets, others files"
        raise _read_apart(run, what)
    local = {key: value for data in own for key, value in data.local.items()}
    length = max(data.max_length for data in own)
    rows = {"mix": list(dict.fromkeys(names))} if names else {"path": list(dict.fromkeys(paths))}
    joined = {**first, **rows, "local": local, "max_length": length}
    # one name, other files: a run has one place for each set, and the other expert's rows would go
    places = {place for data in own for place in training_locations(data)}
    if set(training_locations(DataConfig.model_validate(joined))) != places:
        raise _read_apart(run, "data.local is not the same for all")
    return joined


def _read_apart(run: MoeRunConfig, what: str) -> ConfigError:
    return ConfigError(
        f"finetune: the experts' rows are read in several ways ({what}), which no single run does; "
        f"finetune the export by itself: lorry sft lora=null model={run.folders.moe} data=..."
    )


def finetune(run: MoeRunConfig, stages: Stages) -> None:
    """Train the weights of the hf-moe. Raises LorryError."""
    run_config = finetune_run(run)
    if not run.folders.moe.is_dir():
        raise ModelError(f"{run.folders.moe} is not there: skip_merge takes one that was written")
    stages.train(
        "finetune", run_config, [run_config.data], {"the hf-moe": model_digest(run.folders.moe)}
    )


def convert(run: MoeRunConfig, stage: ExportStage, stages: Stages) -> Path:
    """A GGUF file of the finetuned model, else of the hf-moe, else of the experts' mean; returns
    its path. Raises LorryError."""
    folders = run.folders
    average = run.conversion_mode == "average"
    source = folders.mixture if average else folders.moe
    # skipped stages leave what an earlier call made
    if run.finetune and not average and (not run.skip_finetune or folders.finetuned.is_dir()):
        source = folders.finetuned
    if not source.is_dir():
        raise ModelError(
            f"{source} is not there, so there is nothing to convert; leave skip_merge out"
        )
    settings = _export_settings(
        {
            "run": str(source),
            "to": "gguf",
            "outtype": stage.outtype,
            "output_dir": str(folders.gguf),
        }
    )
    inputs = mixture_inputs(source) if average else {"its model": model_digest(source)}
    earlier = folders.output / PREVIOUS
    stages.write(
        "convert",
        [folders.gguf],
        inputs,
        lambda: call_verb(export.main, settings),
        settings.model_dump_json(),
    )
    (file,) = folders.gguf.glob("*.gguf")
    if stage.path is not None:
        path = Path(stage.path)
        before = list(earlier.glob(f"*/{folders.gguf.name}/*.gguf"))
        stages.on_main(lambda: place_copy(file, path, before))
        return path
    return file


def place_copy(file: Path, target: Path, earlier: Sequence[Path]) -> None:
    """Copy a file to ``target``, where there may be a copy of an ``earlier`` one. Raises
    ConfigError for a name that holds anything else, DiskError."""
    if target.exists():
        there = path_digest(target)
        if there == path_digest(file):
            return
        if there not in (path_digest(earlier_file) for earlier_file in earlier):
            raise ConfigError(
                f"{target} is there already and is not ours to replace; the new file is {file}"
            )
    durable.make_directory(target.parent)
    durable.write_files(target.parent, {target.name: iter_blocks(file)})


def _export_settings(values: Mapping[str, Any]) -> ExportSettings:
    try:
        return ExportSettings.model_validate(values)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"export: {message}") from None
