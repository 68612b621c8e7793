"""`lorry eval RUN suite=tofu|muse|wmdp`: a suite of unlearning, asked of a run's adapters (of a
base without one; of a mixture each expert, and all as its router has them), into open-unlearning's
two files.

Everything that can be wrong with settings, rows and the oracle's logs is told before a model is
loaded, and nothing is written then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lorry.config.evaluation import EvalSettings
from lorry.config.suite import SuiteConfig
from lorry.console import VisibleConsole
from lorry.errors import ConfigError
from lorry.formatting import format_number
from lorry.runs import ownership
from lorry.runs.layout import SUITES, is_adapter_folder
from lorry.verbs.open_model import MIXTURE_SIDE, open_on_ranks, print_note
from lorry.visible import make_visible

if TYPE_CHECKING:
    from lorry.adapters.mix import Mix
    from lorry.backends.distributed.communicator import Communicator
    from lorry.evaluate.unlearning.evaluation import SuiteEvaluation
    from lorry.evaluate.unlearning.suite import MetricRecord
    from lorry.models.loading.open import OpenedModel


def evaluate_suite(settings: EvalSettings, communicator: Communicator) -> None:
    """Read, measure what is not measured yet, write after every metric, print the values."""
    from lorry.evaluate.unlearning.evaluation import SuiteEvaluation
    from lorry.evaluate.unlearning.results import eval_file, refuse_foreign_suite
    from lorry.evaluate.unlearning.suites import SUITES as BY_NAME
    from lorry.train.processes import refuse_other_questions

    assert settings.suite.name is not None
    # whose the files there are, before rows are read and a model is loaded
    folder, title = suite_folder(settings), BY_NAME[settings.suite.name].title
    refuse_foreign_suite(folder, title)
    # all that can be wrong with rows, metrics and logs is said in here
    evaluation = SuiteEvaluation.load(
        choose_forget_split(settings),
        settings.local,
        limit=settings.limit,
        max_new_tokens=settings.max_new_tokens,
        peer_floor=settings.peer_masks,
    )
    for note in evaluation.notes:
        print_note(note)
    opened = open_on_ranks(settings, communicator)
    sides = suite_mixes(opened, settings.weight)
    # which adapters there are is known only now, and theirs are files that may be somebody's, too
    places = [folder if len(sides) == 1 else folder / name for name in sides]
    for place in places:
        refuse_foreign_suite(place, title)
    communicator.exchange("the places of the sides")
    refuse_other_questions(communicator, opened.model, evaluation.digest)
    for (name, mix), place in zip(sides.items(), places, strict=True):
        records = measure_side(settings, evaluation, opened, mix, place, communicator)
        share = (
            "" if settings.weight == 1 or name not in opened.adapters else f" x {settings.weight:g}"
        )
        label = settings.model.name + (f" ({name}{share})" if name else "")
        VisibleConsole(soft_wrap=True).print(suite_table(label, evaluation.names, records))
        print_note(f"written to {place / eval_file(title)}")


def choose_forget_split(settings: EvalSettings) -> SuiteConfig:
    """The suite's settings, with the split that the run was to forget where none is named: the
    numbers of another would read as if little had been forgotten. Raises DiskError.
    """
    from lorry.data.reading.suite_splits import FORGET_ROWS, TOFU

    suite, model = settings.suite, settings.model
    if suite.name != TOFU or "forget_split" in suite.model_fields_set:
        return suite
    own = ownership.forget_set_of(Path(model.name), model.adapter)
    split = own.removeprefix(f"{TOFU}:") if isinstance(own, str) else ""
    if split not in FORGET_ROWS or split in (own, suite.forget_split):
        return suite
    print_note(f"forget_split={split}, as the run has it")
    return suite.model_copy(update={"forget_split": split})


def suite_folder(settings: EvalSettings) -> Path:
    """Where the two files go: output_dir, or a folder of the run. Raises ConfigError for a model
    that is neither.
    """
    if settings.output_dir is not None:
        return settings.output_dir
    model = Path(settings.model.adapter or settings.model.name)
    if is_adapter_folder(model) or ownership.run_description_of(model):
        # another weight is another model, whose numbers do not take the place of the whole one's
        share = [] if settings.weight == 1 else [f"weight{settings.weight:g}"]
        return model.joinpath(SUITES, *share)
    raise ConfigError(
        f"suite={settings.suite.name} writes two files, and {model} is not a run; "
        "give output_dir=FOLDER"
    )


def suite_mixes(opened: OpenedModel, weight: float) -> dict[str, Mix]:
    """{name: what is asked}: each adapter times ``weight``, and a mixture's experts as its router
    has them; of a model without adapters itself, under no name."""
    from lorry.adapters.mix import Mix

    if not opened.adapters:
        return {"": Mix.none()}
    mixes = {name: Mix.constants({name: weight}) for name in opened.adapters}
    if opened.mixture is None:
        return mixes
    name = MIXTURE_SIDE
    while name in mixes:  # an expert may be called so, and each has a folder of its name
        name += "_"
    return {**mixes, name: opened.mixture}


def measure_side(
    settings: EvalSettings,
    evaluation: SuiteEvaluation,
    opened: OpenedModel,
    mix: Mix,
    folder: Path,
    communicator: Communicator,
) -> dict[str, MetricRecord]:
    """{metric: its record} under a mix, of a model without adapters too."""
    from lorry.adapters.mix import Mix

    suite_model = evaluation.ask(
        opened,
        mix,
        # what the adapters were trained over; a base alone has nothing to be compared with
        start=Mix.none() if mix.terms else None,
        batch_rows=settings.batch_size,
        system=settings.data.system,
        communicator=communicator,
    )
    results = evaluation.open_results(suite_model, folder)
    names = evaluation.names
    done = [name for name in names if results.saved_record(name) is not None]
    if done:
        print_note(f"{len(done)} of {len(names)} metrics were measured before: {', '.join(done)}")
    with VisibleConsole(stderr=True).status("evaluating") as status:
        return evaluation.measure(
            suite_model, results, lambda name: status.update(f"measuring {name}")
        )


def suite_table(title: str, names: Sequence[str], records: Mapping[str, MetricRecord]) -> Table:
    """A row per metric."""
    table = Table(
        title=Text(make_visible(title)), title_justify="left", header_style="dim", box=SIMPLE_HEAD
    )
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in names:
        table.add_row(Text(name), Text(format_number(records[name]["agg_value"])))
    return table
