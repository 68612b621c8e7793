"""`lorry attack RUN relearn|quantize|rephrase`: try to get back what a run has unlearned; a table, and
a part of attacks.json.

All that can be wrong with settings and rows is told before a model is loaded, and nothing is written
then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lorry.config.schema.model import ModelConfig
from lorry.config.unlearning.attack import AttackSettings
from lorry.console import VisibleConsole
from lorry.disk import documents, durable
from lorry.errors import ConfigError
from lorry.formatting import format_count, format_number
from lorry.runs import ownership
from lorry.runs.layout import ATTACKS, SUITES, is_adapter_folder, list_adapter_subfolders
from lorry.verbs.open_model import open_on_ranks, print_note, resolve_adapter_name
from lorry.visible import make_visible

if TYPE_CHECKING:
    from lorry.backends.distributed.communicator import Communicator
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.data.reading.rows import DataRow
    from lorry.models.loading.open import OpenedModel

MARK = {"written_by": "lorry attack"}
# what each attack's table shows, in this order: what follows knowledge best comes first
SHOWN = {
    "relearn": ("extraction_strength", "truth_ratio", "probability"),
    "quantize": ("extraction_strength", "truth_ratio", "probability"),
    "rephrase": ("extraction_strength", "probability", "rougeL_recall"),
}
# what was done, to which model, and what was measured then
TableLine = tuple[str, str, Mapping[str, float]]
RUN_SIDE, START_SIDE, ORACLE_SIDE = "run", "start", "oracle"


def main(settings: AttackSettings) -> int:
    """Read the rows, attack the run (and the oracle), print, write."""
    from lorry.train.processes import share_command

    with share_command(settings) as (placed, communicator):
        attack(placed, communicator)
    return 0


def attack(settings: AttackSettings, communicator: Communicator) -> None:
    """One of the attacks, by the ranks of ``communicator`` together."""
    folder = attacks_folder(settings)
    settings = choose_forget_set(settings)
    settings = settings.model_copy(update={"model": choose_adapter(settings.model)})
    if settings.oracle is not None:
        oracle = choose_adapter(oracle_model(settings, settings.oracle), "oracle")
        settings = settings.model_copy(update={"oracle": oracle.name})
    ownership.refuse_foreign(
        {folder / ATTACKS: ownership.is_attacks_file}, "name another output_dir"
    )
    name, rows = read_attacked_rows(settings)
    communicator.exchange("the place of the results")
    attacks = {"relearn": attack_relearn, "quantize": attack_quantize, "rephrase": attack_rephrase}
    with VisibleConsole(stderr=True).status("attacking") as status:
        part, lines = attacks[settings.attack](settings, name, rows, status.update, communicator)
    if communicator.rank:  # rank 0 shows and writes
        return
    document = add_part(folder / ATTACKS, settings.attack, part)
    print_table(settings, lines)
    for metric, values in (document.get("robustness") or part.get("robustness") or {}).items():
        numbers = values if isinstance(values, dict) else {settings.attack: values}
        summary = ", ".join(f"{k} {format_number(v)}" for k, v in numbers.items())
        print_note(f"robustness by {metric}: {summary}")
    print_note(f"written to {folder / ATTACKS}")


def attacks_folder(settings: AttackSettings) -> Path:
    """Where attacks.json goes: output_dir, or a folder of the run. Raises ConfigError for a model
    that is neither.
    """
    if settings.output_dir is not None:
        if settings.output_dir.suffix or settings.output_dir.is_file():
            raise ConfigError(f"output_dir={settings.output_dir} is a file name; give a folder")
        return settings.output_dir
    model = Path(settings.model.adapter or settings.model.name)
    if len(adapters := adapters_of_run(settings.model.name)) > 1:
        # where `lorry eval suite=...` writes what it measures of each
        chosen = choose_adapter(settings.model)
        name = next(name for name, folder in adapters.items() if str(folder) == chosen.name)
        return Path(settings.model.name) / SUITES / name
    if is_adapter_folder(model) or ownership.run_description_of(model):
        return model / SUITES
    raise ConfigError(f"{model} is not a run; give output_dir=FOLDER for {ATTACKS}")


def adapters_of_run(name: str) -> dict[str, Path]:
    """{adapter: its folder} of a run that has a folder for each; none of any other model."""
    place = Path(name)
    if not place.is_dir() or is_adapter_folder(place):
        return {}
    return {folder.name: folder for folder in list_adapter_subfolders(place)}


def choose_adapter(model: ModelConfig, setting: str = "adapter") -> ModelConfig:
    """The one adapter that is attacked: of a run of several the one that ``model.adapter`` names, by
    its folder; any other model as it is. ``setting``: what a person would name it with. Raises
    ConfigError where none, or an unknown one, is named.
    """
    if model.adapter is not None and len(beside := adapters_of_run(model.adapter)) > 1:
        raise ConfigError(
            f"adapter={model.adapter} has several adapters ({', '.join(beside)}); name the folder of one, such as "
            f"adapter={next(iter(beside.values()))}"
        )
    adapters = adapters_of_run(model.name)
    if not adapters or (len(adapters) == 1 and model.adapter is None):
        return model
    if model.adapter in adapters:
        folder = str(adapters[model.adapter])
        return model.model_copy(update={"name": folder, "adapter": None})
    listed, first = ", ".join(adapters), next(iter(adapters))
    if model.adapter is not None:
        raise ConfigError(
            f"adapter={model.adapter}: {model.name} has no such adapter; it has {listed}"
        )
    raise ConfigError(
        f"{model.name} has several adapters ({listed}), and one is attacked at a time; choose it, such as "
        f"{setting}={first if setting == 'adapter' else adapters[first]}"
    )


def choose_forget_set(settings: AttackSettings) -> AttackSettings:
    """The settings with the run's own split of TOFU where no forget set is named: of rows that it
    was never asked to forget the numbers would say nothing. Raises ConfigError for a run of other
    rows, DiskError.
    """
    from lorry.data.reading.suite_splits import FORGET_ROWS, TOFU

    if settings.forget is not None or "forget_split" in settings.model_fields_set:
        return settings
    own = ownership.forget_set_of(Path(settings.model.name), settings.model.adapter)
    split = own.removeprefix(f"{TOFU}:") if isinstance(own, str) else ""
    if own is None or split == settings.forget_split:
        return settings
    if split in FORGET_ROWS and split != own:
        print_note(f"forget_split={split}, as the run has it")
        return settings.model_copy(update={"forget_split": split})
    shown = own if isinstance(own, str) else ", ".join(own)
    raise ConfigError(
        f"{settings.model.name} was to forget {shown}, which is no split of TOFU; give forget=FILE "
        "with its rows (question, answer, paraphrased_answer, perturbed_answer), or the "
        "forget_split to attack"
    )


def oracle_model(settings: AttackSettings, oracle: str) -> ModelConfig:
    """The oracle, opened as the run is."""
    return settings.model.model_copy(update={"name": oracle, "adapter": None, "revision": None})


def read_attacked_rows(settings: AttackSettings) -> tuple[str, list[DataRow]]:
    """(what they are called, the rows that were to be forgotten). Raises ConfigError, DataError."""
    from lorry.data.reading.sources import open_source
    from lorry.data.reading.suite_splits import FORGET_ROWS, PERTURBED, TOFU

    if settings.forget is not None:
        return settings.forget, list(open_source(settings.forget, local=settings.local))
    if settings.forget_split not in FORGET_ROWS:
        raise ConfigError(
            f"forget_split={settings.forget_split}: TOFU has {', '.join(FORGET_ROWS)}"
        )
    name = settings.forget_split + PERTURBED
    return name, list(open_source(f"{TOFU}:{name}", local=settings.local))


def attack_relearn(
    settings: AttackSettings,
    name: str,
    rows: Sequence[DataRow],
    tell: Any,
    communicator: Communicator,
) -> tuple[dict[str, Any], list[TableLine]]:
    """Fine-tune the unlearned model, and the oracle, on a part of the rows; measure the others."""
    from lorry.adapters.mix import Mix
    from lorry.evaluate.unlearning import attacks
    from lorry.evaluate.unlearning.scores import SuiteModel
    from lorry.train.processes import refuse_other_questions

    wanted = attacks.RelearnSettings(
        settings.relearn_steps,
        settings.learning_rate,
        settings.r,
        settings.batch_size,
        settings.seed,
        settings.backend.name,
    )
    whole = attacks.knowledge_set(name, rows)
    train, measure = attacks.split_rows(whole, settings.relearn_share, settings.seed)
    print_note(
        f"{name}: {format_count(len(train.rows), 'row')} "
        f"{'is' if len(train.rows) == 1 else 'are'} to train on, "
        f"{len(measure.rows)} measured"
    )
    curves, digest = {}, ""
    for side, model in sides_of(settings).items():
        # its adapter is a part of the frozen base: a new one is trained over it
        opened = open_on_ranks(settings, communicator, model, as_start=True)
        refuse_other_questions(communicator, opened.model, whole.digest)
        encoder = encoder_of(opened)
        if side == RUN_SIDE:
            digest = SuiteModel(opened.model, encoder, {}, Mix.none()).digest()
        curves[side] = attacks.relearn(
            opened.model, encoder, train, measure, wanted, tell, communicator
        )
        del opened  # two models at once need not fit
    part: dict[str, Any] = {
        "model": digest,
        "rows": whole.digest,
        "settings": {**vars(wanted), "relearn_share": settings.relearn_share},
        "rows_relearnt": len(train.rows),
        "rows_measured": len(measure.rows),
        "curves": curves,
    }
    if ORACLE_SIDE in curves:
        robust = attacks.relearn_robustness(curves[RUN_SIDE], curves[ORACLE_SIDE])
        part["robustness"] = robust
    lines: list[TableLine] = [
        (f"step {point['step']}", side, point)
        for at in range(len(settings.relearn_steps))
        for side, curve in curves.items()
        for point in [curve[at]]
    ]
    return part, lines


def attack_quantize(
    settings: AttackSettings,
    name: str,
    rows: Sequence[DataRow],
    tell: Any,
    communicator: Communicator,
) -> tuple[dict[str, Any], list[TableLine]]:
    """Fold the adapter in, round the weights, measure the rows."""
    from lorry.adapters.mix import Mix
    from lorry.evaluate.unlearning import attacks
    from lorry.evaluate.unlearning.scores import SuiteModel
    from lorry.train.processes import refuse_other_questions

    whole = attacks.knowledge_set(name, rows)
    values, digest = {}, ""
    for side, model in sides_of(settings).items():
        opened = open_on_ranks(settings, communicator, model)
        refuse_other_questions(communicator, opened.model, whole.digest)
        encoder, adapter = encoder_of(opened), only_adapter(opened, model)
        mix = Mix.none() if adapter is None else Mix.one(adapter)
        if side == RUN_SIDE:
            digest = SuiteModel(opened.model, encoder, {}, mix).digest()
        values[side] = attacks.quantize(opened.model, encoder, whole, adapter, tell, communicator)
        del opened
    part: dict[str, Any] = {
        "model": digest,
        "rows": whole.digest,
        "values": values,
        "robustness": attacks.quantize_robustness(values[RUN_SIDE]),
        "note": (
            "weights are quantized and dequantized in plain torch (NF4 in blocks of "
            "64, int8 by rows); activations, output head and embeddings are not "
            "quantized"
        ),
    }
    lines: list[TableLine] = [
        (kind, side, results[kind]) for kind in values[RUN_SIDE] for side, results in values.items()
    ]
    return part, lines


def attack_rephrase(
    settings: AttackSettings,
    name: str,
    rows: Sequence[DataRow],
    tell: Any,
    communicator: Communicator,
) -> tuple[dict[str, Any], list[TableLine]]:
    """Ask the same in other words: the run, what it began from, and the oracle."""
    from lorry.adapters.mix import Mix
    from lorry.evaluate.unlearning import attacks
    from lorry.evaluate.unlearning.scores import SuiteModel
    from lorry.train.processes import refuse_other_questions

    whole, sets = attacks.knowledge_set(name, rows), attacks.rephrased_sets(name, rows)
    values, digest = {}, ""
    for side, model in sides_of(settings).items():
        opened = open_on_ranks(settings, communicator, model)
        refuse_other_questions(communicator, opened.model, whole.digest)
        encoder, adapter = encoder_of(opened), only_adapter(opened, model)
        mixes = {side: Mix.none() if adapter is None else Mix.one(adapter)}
        if side == RUN_SIDE and adapter is not None:
            # without the run's adapter: the frozen start that unlearning began from, or the base
            mixes[START_SIDE] = Mix.none()
        for label, mix in mixes.items():
            tell(f"rephrasing: {label}")
            suite_model = SuiteModel(
                opened.model,
                encoder,
                sets,
                mix,
                max_new_tokens=settings.max_new_tokens,
                limit=settings.limit,
                batch_rows=settings.batch_size,
                communicator=communicator,
            )
            if label == RUN_SIDE:
                digest = suite_model.digest()
            values[label] = attacks.rephrase(suite_model)
        del opened
    part: dict[str, Any] = {
        "model": digest,
        "rows": whole.digest,
        "settings": {"limit": settings.limit, "max_new_tokens": settings.max_new_tokens},
        "values": values,
        "templates": {"format": attacks.FORMAT, "jailbreak": attacks.JAILBREAK},
    }
    lines: list[TableLine] = [
        (wording, side, results[wording]) for wording in sets for side, results in values.items()
    ]
    return part, lines


def sides_of(settings: AttackSettings) -> dict[str, ModelConfig]:
    """The run, and the oracle beside it, opened alike."""
    models = {RUN_SIDE: settings.model}
    if settings.oracle is not None:
        models[ORACLE_SIDE] = oracle_model(settings, settings.oracle)
    return models


def only_adapter(opened: OpenedModel, model: ModelConfig) -> str | None:
    """The adapter of a run; None of a model without one. Raises ConfigError for several."""
    return resolve_adapter_name(opened, None, model.name) if opened.adapters else None


def encoder_of(opened: OpenedModel) -> ExampleEncoder:
    """Rows as a suite asks them."""
    from lorry.data.encoding.encode import ExampleEncoder

    return ExampleEncoder(
        opened.tokenizer,
        max_length=opened.model.context or 1 << 20,
        embeddings=opened.model.vocab_size,
    )


def add_part(path: Path, attack: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """Put an attack's part into attacks.json and give all of it; parts of another model or other rows
    leave. Raises DataError for a damaged file, DiskError.
    """
    from lorry.evaluate.unlearning.attacks import mean_robustness

    known = documents.read_object(path) if ownership.is_attacks_file(path) else {}
    same = {
        name: other
        for name, other in known.items()
        if isinstance(other, dict)
        and (other.get("model"), other.get("rows")) == (part["model"], part["rows"])
    }
    parts = {**same, attack: dict(part)}
    document: dict[str, Any] = {**MARK, **dict(sorted(parts.items()))}
    relearned, quantized = (parts.get(n, {}).get("robustness") for n in ("relearn", "quantize"))
    if relearned and quantized:
        document["robustness"] = mean_robustness(relearned, quantized)
    durable.make_directory(path.parent)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    durable.write_files(path.parent, {path.name: text.encode()})
    return document


def print_table(settings: AttackSettings, lines: Sequence[TableLine]) -> None:
    """A row per (what was done, side), a column per metric."""
    table = Table(
        title=Text(make_visible(f"{settings.attack}: {settings.model.name}")),
        title_justify="left",
        header_style="dim",
        box=SIMPLE_HEAD,
    )
    columns = SHOWN[settings.attack]
    table.add_column(settings.attack)
    table.add_column("model")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for what, side, values in lines:
        table.add_row(what.replace("_", " "), side, *(format_number(values[c]) for c in columns))
    VisibleConsole(soft_wrap=True).print(table)
