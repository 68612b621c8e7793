"""`lorry eval RUN suite=tofu|muse|wmdp`: a suite of unlearning, asked of a run's adapter (of a base without
one), into open-unlearning's two files.

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
from lorry.console import VisibleConsole
from lorry.errors import ConfigError
from lorry.formatting import format_number
from lorry.runs import ownership
from lorry.runs.layout import ADAPTER_CONFIG, SUITES
from lorry.verbs.open_model import open_with_adapters, print_note
from lorry.visible import make_visible

if TYPE_CHECKING:
    from lorry.evaluate.unlearning.retain_logs import RetainLogs
    from lorry.evaluate.unlearning.rows import SuiteSet
    from lorry.evaluate.unlearning.suite import MetricRecord, Suite
    from lorry.models.loading.open import OpenedModel


def evaluate_suite(settings: EvalSettings) -> int:
    """Read, measure what is not measured yet, write after every metric, print the values."""
    from lorry.evaluate.unlearning.measures import check_retain_logs
    from lorry.evaluate.unlearning.results import eval_file, refuse_foreign_suite
    from lorry.evaluate.unlearning.retain_logs import RetainLogs
    from lorry.evaluate.unlearning.suite import SuiteRequest
    from lorry.evaluate.unlearning.suites import SUITES as BY_NAME

    assert settings.suite is not None
    suite = BY_NAME[settings.suite]
    folder = suite_folder(settings)
    refuse_foreign_suite(folder, suite.title)
    path = settings.retain_logs_path
    names, notes = suite.choose(settings.metrics, logs=path is not None)
    for note in notes:
        print_note(f"note: {note}")
    request = SuiteRequest(
        local=settings.local,
        forget_split=settings.forget_split,
        holdout_split=settings.holdout_split,
        question_key=settings.question_key,
        corpus=settings.corpus,
    )
    sets = suite.load(suite.roles(names), request)
    logs = None if path is None else RetainLogs.read(Path(path))
    if logs is not None:
        check_retain_logs(names, logs, sets)
    for one in sets.values():
        print_note(
            f"{one.name}: {len(one.rows)} rows" + (f"; note: {one.note}" if one.note else "")
        )
    found = open_with_adapters(settings.model)
    sides: list[str | None] = [*found.adapters] or [None]
    # which adapters there are is known only now, and theirs are files that may be somebody's, too
    places = [folder if len(sides) == 1 else folder / str(adapter) for adapter in sides]
    for place in places:
        refuse_foreign_suite(place, suite.title)
    for adapter, place in zip(sides, places, strict=True):
        records = measure_side(settings, suite, found, adapter, names, sets, logs, place)
        share = "" if settings.weight == 1 else f" x {settings.weight:g}"
        title = settings.model.name + (f" ({adapter}{share})" if adapter else "")
        VisibleConsole(soft_wrap=True).print(suite_table(title, names, records))
        print_note(f"written to {place / eval_file(suite.title)}")
    return 0


def suite_folder(settings: EvalSettings) -> Path:
    """Where the two files go: output_dir, or a folder of the run. Raises ConfigError for a model
    that is neither.
    """
    if settings.output_dir is not None:
        return settings.output_dir
    model = Path(settings.model.adapter or settings.model.name)
    if (model / ADAPTER_CONFIG).is_file() or ownership.run_description_of(model):
        # another weight is another model, whose numbers do not take the place of the whole one's
        share = [] if settings.weight == 1 else [f"weight{settings.weight:g}"]
        return model.joinpath(SUITES, *share)
    raise ConfigError(
        f"suite={settings.suite} writes two files, and {model} is no run; give output_dir=FOLDER"
    )


def measure_side(
    settings: EvalSettings,
    suite: Suite,
    found: OpenedModel,
    adapter: str | None,
    names: Sequence[str],
    sets: Mapping[str, SuiteSet],
    logs: RetainLogs | None,
    folder: Path,
) -> dict[str, MetricRecord]:
    """{metric: its record} of one adapter, or of a model without any."""
    from lorry.adapters.mix import Mix
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.evaluate.unlearning.results import SuiteResults, digest_of
    from lorry.evaluate.unlearning.scores import SuiteModel
    from lorry.evaluate.unlearning.suite import measure_suite

    encoder = ExampleEncoder(
        found.tokenizer,
        max_length=found.model.context or 1 << 20,
        system=settings.data.system,
        embeddings=found.model.vocab_size,
    )
    asked = SuiteModel(
        found.model,
        encoder,
        dict(sets),
        Mix.constants({} if adapter is None else {adapter: settings.weight}),
        start=None if adapter is None else Mix.none(),
        max_new_tokens=settings.max_new_tokens,
        limit=settings.limit,
        batch_rows=settings.batch_size,
        moments=any(suite.metrics[name].moments for name in names),
    )
    model = asked.digest()
    rows = {name: {role: sets[role].digest for role in suite.roles_of(name)} for name in names}
    how = {
        name: {
            "generation": [
                [asked.max_new_tokens or sets[role].new_tokens for role in suite.roles_of(name)],
                asked.limit,
            ]
            if suite.flag(name, "generates")
            else None,
            "logs": logs.digest if logs is not None and suite.flag(name, "reads_logs") else None,
            "peer_masks": settings.peer_masks and name == "extraction_strength",
        }
        for name in names
    }
    digests = {
        name: digest_of({"metric": name, "model": model, "rows": rows[name], **how[name]})
        for name in names
    }
    store = SuiteResults(folder, suite.title, digests, model, rows)
    done = [name for name in names if store.kept(name) is not None]
    if done:
        print_note(f"{len(done)} of {len(names)} metrics were measured before: {', '.join(done)}")
    with VisibleConsole(stderr=True).status("evaluating") as status:
        return measure_suite(
            suite,
            names,
            asked,
            logs=logs,
            store=store,
            peer_floor=settings.peer_masks,
            tell=lambda name: status.update(f"measuring {name}"),
        )


def suite_table(title: str, names: Sequence[str], records: Mapping[str, MetricRecord]) -> Table:
    """A row per metric."""
    made = Table(
        title=Text(make_visible(title)), title_justify="left", header_style="dim", box=SIMPLE_HEAD
    )
    made.add_column("metric")
    made.add_column("value", justify="right")
    for name in names:
        made.add_row(Text(name), Text(format_number(records[name]["agg_value"])))
    return made
