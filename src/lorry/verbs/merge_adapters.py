"""`lorry merge RUN RUN ... method=...`: several adapters of one base made one, a PEFT adapter
directory with a receipt; opened again before it gets its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorry.config.evaluation import EvalSettings
from lorry.config.merge import EXACT_METHOD, MERGE_METHODS, MergeSettings
from lorry.config.schema.model import ModelConfig
from lorry.disk.integrity import file_digest
from lorry.errors import ConfigError, DataError, ModelError
from lorry.notes import ignore_note
from lorry.runs.layout import (
    ADAPTER_FACTS,
    ADAPTER_WEIGHTS,
    RECEIPT,
    ROUTER,
    ROUTER_FILE,
    RUN_FILE,
)
from lorry.verbs.checks import probe
from lorry.verbs.checks.logit_check import LogitsBeforeMerge, load_adapted_model
from lorry.verbs.open_model import open_with_adapters, print_note

if TYPE_CHECKING:
    from lorry.adapters.merging.weighted import AdapterMerge
    from lorry.evaluate.rows import EvalRows, TeacherForcedScore
    from lorry.models.loading.open import OpenedModel

GRID = tuple(step / 10 for step in range(1, 16))  # coefficients that scale=auto tries


class ScaleChoice(NamedTuple):
    """A coefficient, and mean losses per supervised token: of the rows it was chosen on, by
    coefficient, and of those held out: of the base, at 1, and at the chosen one.
    """

    scale: float
    losses: dict[float, float]
    held_out: dict[str, float]


def merge_several(settings: MergeSettings) -> int:
    """Open, merge, fit the scale, write, open again, compare, print where it is."""
    from lorry.disk import durable
    from lorry.models.loading.open import stored_dtype

    folders = adapter_folders([settings.run, *settings.others])
    weights = settings.weights or [1.0] * len(folders)
    if len(weights) != len(folders):
        raise ConfigError(
            f"weights has {len(weights)} numbers for {len(folders)} adapters: "
            f"{', '.join(map(str, folders))}"
        )
    # entered before any work: a place that is taken is refused at once
    with durable.build_directory(settings.output_dir) as built:
        first, *others = map(str, folders)
        dtype = probe.logits_dtype_name(first, stored_dtype(first))
        opened = open_with_adapters(
            ModelConfig.model_validate({"name": first, "dtype": dtype}), adapters=others
        )
        check_bases(folders, Path(opened.source["path"]))
        warn_other_tokenizers(folders)
        for line in write_merged_adapter(settings, opened, folders, weights, built):
            print_note(line)
    print(settings.output_dir)
    return 0


def write_merged_adapter(
    settings: MergeSettings,
    opened: OpenedModel,
    folders: Sequence[Path],
    weights: Sequence[float],
    built: Path,
) -> list[str]:
    """The merged adapter's files, tokenizer and receipt into ``built``; what to tell of it.
    ``opened`` is of no use afterwards. Raises ContractError if the adapter opened again is another
    one.
    """
    from lorry.adapters.attach import detach, get_bank
    from lorry.adapters.merging.weighted import merge_adapters
    from lorry.adapters.peft.files import adapter_files
    from lorry.adapters.peft.start_files import start_files, write_start_files
    from lorry.models.loading.open import pick_adapter_name
    from lorry.models.loading.reopen import free_model_memory

    method = settings.method or EXACT_METHOD
    name = pick_adapter_name(settings.output_dir, opened.adapters)
    named = dict(zip(opened.adapters, weights, strict=True))

    def merge(scale: float) -> AdapterMerge:
        return merge_adapters(
            opened.model,
            named,
            name,
            method=method,
            density=settings.density,
            majority_sign_method=settings.majority_sign_method,
            rank=settings.rank,
            seed=settings.seed,
            scale=scale,
        )

    lines = list[str]()
    merged = merge(1.0 if settings.scale == "auto" else settings.scale)
    choice = None
    if settings.scale == "auto":
        choice = choose_scale(settings, opened, name)
        lines += tell_choice(choice)
        # from the start: a factor on values that were rounded once would round them twice
        detach(opened.model, name)
        merged = merge(choice.scale)
    receipt = merge_receipt(settings, opened, merged, folders, named, choice)
    before = LogitsBeforeMerge.of(opened, {name: 1.0})
    over_start = get_bank(opened.model).start is not None
    files = adapter_files(opened.model, name, base_name=opened.source["path"])
    for file, content in files.items():
        (built / file).write_bytes(content)
    write_start_files(built, start_files(opened.model))
    opened.tokenizer.save_pretrained(built)
    receipt["adapters"] = {name: file_digest(built / ADAPTER_WEIGHTS)}
    (built / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    # two models at once need not fit
    free_model_memory(opened.model)
    base = opened.source["path"]
    if over_start:
        # PEFT has no adapter over an adapter
        dtype = str(before.dtype).removeprefix("torch.")
        config = {"name": base, "adapter": str(built), "dtype": dtype}
        model, library = open_with_adapters(ModelConfig.model_validate(config)).model, "lorry"
    else:
        model, library = load_adapted_model(built, base, before.dtype)
    return [
        *tell_merge(merged, method, named),
        *lines,
        *before.compare(model, "float32", library),
    ]


def adapter_folders(paths: Iterable[str]) -> list[Path]:
    """The adapter directories that paths stand for, a run of several being all of its own. Raises
    ModelError where there is none, ConfigError for one that is named twice and for a mixture.
    """
    from lorry.models.loading.open import list_adapter_folders

    folders = list[Path]()
    for path in map(Path, paths):
        if (path / ROUTER / ROUTER_FILE).is_file():
            raise ConfigError(
                f"{path} is a mixture of experts, and its router cannot be merged; "
                f"name the folders of its experts ({path}/EXPERT)"
            )
        folders += list_adapter_folders(path)
    places = dict[Path, Path]()
    for folder in folders:
        if (first := places.setdefault(folder.resolve(), folder)) is not folder:
            raise ConfigError(
                f"{folder} is named twice (first as {first}); name it once with the "
                "sum of its weights"
            )
    return folders


def check_bases(folders: Sequence[Path], base: Path) -> None:
    """Refuse adapters whose files, PEFT's, have no digest of their base and name another one.
    Those of ours were compared when they were opened. Raises ModelError.
    """
    from lorry.adapters.peft.config import read_adapter_json
    from lorry.models.loading.sources import resolve_model

    for folder in folders[1:]:
        facts = folder / ADAPTER_FACTS
        if facts.is_file() and read_adapter_json(facts).get("base_digest") is not None:
            continue
        own = resolve_model(str(folder), add_note=ignore_note).directory
        if own.resolve() != base.resolve() and weight_digests(own) != weight_digests(base):
            raise ModelError(
                f"{folder}: its base model is {own}, and that of {folders[0]} is "
                f"{base}, with other weights; only adapters of the same base model "
                "can be merged"
            )


def weight_digests(model: Path) -> list[str]:
    """SHA-256 of each file that a model's tensors lie in, by name."""
    from lorry.models.loading.tensor_files import read_tensor_entries

    files = {entry.file for entry in read_tensor_entries(model).values()}
    return [file_digest(file) for file in sorted(files)]


def warn_other_tokenizers(folders: Sequence[Path]) -> None:
    """A warning for each adapter whose tokenizer or chat template, where it has one beside it, is
    not that of the first."""
    first, *others = [tokenizer_contents(folder) for folder in folders]
    for folder, contents in zip(folders[1:], others, strict=True):
        if odd := [
            name for name in sorted(first.keys() & contents) if first[name] != contents[name]
        ]:
            print_note(
                f"warning: {folder / odd[0]} differs from that of {folders[0]}; the "
                "merged adapter gets the tokenizer and chat template of the latter"
            )


def tokenizer_contents(adapter: Path) -> dict[str, str]:
    """{file name: SHA-256} of the files that say how text becomes tokens, beside an adapter or in
    the run of several that it is of.
    """
    run = adapter.parent if (adapter.parent / RUN_FILE).is_file() else adapter
    names = ("tokenizer.json", "chat_template.jinja")
    files = {name: folder / name for folder in (run, adapter) for name in names}
    return {name: file_digest(file) for name, file in files.items() if file.is_file()}


def choose_scale(settings: MergeSettings, opened: OpenedModel, name: str) -> ScaleChoice:
    """The coefficient of `GRID` with the lowest loss on the rows 0, 2, 4 ... of data; 1, 3, 5 ...
    are held out. Raises DataError for fewer than two rows, ModelError where no loss is finite.
    """
    from lorry.adapters.mix import Mix
    from lorry.verbs.eval import encode_eval_rows, open_eval_source

    evaluation = EvalSettings.model_validate(
        {"model": {"name": settings.run}, "data": settings.data.model_dump()}
    )
    rows = encode_eval_rows(evaluation, opened, open_eval_source(evaluation))
    for line in rows.tokens.report.lines():
        print_note(line)
    if len(rows.rows) < 2:
        raise DataError(
            f"data.path={settings.data.path}: only one row; scale=auto chooses on "
            "one half of the rows and reports the loss of the other half"
        )

    def losses(scale: float) -> tuple[float, float]:
        mix = Mix.constants({name: scale}) if scale else Mix.none()
        return halves_loss(opened, rows, mix, evaluation.batch_size)

    base, scale_losses = losses(0.0), {scale: losses(scale) for scale in GRID}
    # NaN is below nothing, so that `min` keeps one that comes first
    finite = [scale for scale in GRID if math.isfinite(scale_losses[scale][0])]
    if not finite:
        raise ModelError(
            f"scale=auto: the loss on {settings.data.path} is infinite or NaN at every scale; "
            "look at the weights and adapters"
        )
    best = min(finite, key=lambda scale: scale_losses[scale][0])
    held_out = {"base": base[1], "1": scale_losses[1.0][1], "chosen": scale_losses[best][1]}
    return ScaleChoice(
        best, {scale: chosen for scale, (chosen, _) in scale_losses.items()}, held_out
    )


def halves_loss(
    opened: OpenedModel, rows: EvalRows, mix: Any, batch_rows: int
) -> tuple[float, float]:
    """Mean losses per supervised token of every other row, from the first and from the second."""
    from lorry.evaluate.rows import TeacherForcedScore, score_teacher_forced
    from lorry.generation.scorer import ModelScorer

    scores = score_teacher_forced(ModelScorer(opened.model), rows, mix, batch_rows)

    def mean(part: Sequence[TeacherForcedScore]) -> float:
        return sum(part, TeacherForcedScore()).metrics()["loss"]

    return mean(scores[::2]), mean(scores[1::2])


def tell_choice(choice: ScaleChoice) -> list[str]:
    """What scale=auto found."""
    curve = ", ".join(f"{scale:g}: {loss:.4f}" for scale, loss in choice.losses.items())
    at_end = " (the largest tried)" if choice.scale == GRID[-1] else ""
    return [
        f"loss by scale on the rows for choosing it: {curve}",
        (
            f"scale={choice.scale:g}{at_end}; held-out loss "
            f"{choice.held_out['chosen']:.4f}, at 1 {choice.held_out['1']:.4f}, of the "
            f"base model {choice.held_out['base']:.4f}"
        ),
    ]


def tell_merge(
    merged: AdapterMerge, requested_method: str, weights: Mapping[str, float]
) -> list[str]:
    """The method, the weights by name, the rank, and what the rank lost."""
    ranks = sorted({module.rank for module in merged.modules})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    summands = ", ".join(f"{weight:g} x {name}" for name, weight in weights.items())
    lines = [f"merged by {merged.method}: {summands}; {len(merged.modules)} modules of rank {rank}"]
    if merged.method != requested_method:
        lines[0] += f" (one adapter is copied, as in PEFT; {requested_method} has nothing to do)"
    if "rank" in MERGE_METHODS[merged.method].settings:
        worst = max(merged.modules, key=lambda m: m.lost / m.energy if m.energy else 0.0)
        most = worst.lost / worst.energy if worst.energy else 0.0
        lines.append(
            f"energy lost to the rank: {merged.energy_lost:.2%} of the squared norm (most at {worst.module}: {most:.2%})"
        )
    if partial := [module for module in merged.modules if module.adapters < len(weights)]:
        lines.append(
            f"note: {len(partial)} modules are targets of some adapters only ({partial[0].module}), and merged from those"
        )
    return lines


def merge_receipt(
    settings: MergeSettings,
    opened: OpenedModel,
    merged: AdapterMerge,
    folders: Sequence[Path],
    weights: dict[str, float],
    choice: ScaleChoice | None,
) -> dict[str, Any]:
    """What the result was made of: base, sources with digests and weights, method and what it
    read.
    """
    from lorry.adapters.peft.start_files import adapter_digest

    sources = [
        {
            "name": name,
            "path": str(folder.resolve()),
            # of all that it adds to a model: weights, scales, targets, start
            "sha256": adapter_digest(folder),
            "weight": weights[name],
        }
        for name, folder in zip(opened.adapters, folders, strict=True)
    ]
    read = MERGE_METHODS[merged.method].settings
    return {
        "merge": {
            "method": merged.method,
            **{name: getattr(settings, name) for name in read},
            # what it came to, where it was left open
            "rank": max(module.rank for module in merged.modules),
            "scale": settings.scale if choice is None else choice.scale,
            "sources": sources,
            "energy_lost": merged.energy_lost,
            **({} if choice is None else {"chosen_on": choice_record(settings, choice)}),
            "lorry": version("lorry"),
        },
        "base": {key: opened.source[key] for key in ("path", "dtype", "device", "family", "why")},
    }


def choice_record(settings: MergeSettings, choice: ScaleChoice) -> dict[str, Any]:
    """What scale=auto read and found; null for a loss that is not finite, which JSON has not."""

    def numbers(losses: Mapping[str, float]) -> dict[str, float | None]:
        return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}

    return {
        "data": settings.data.path,
        "losses": numbers({f"{scale:g}": loss for scale, loss in choice.losses.items()}),
        "held_out_losses": numbers(choice.held_out),
    }
