"""`lorry unlearn-alternates RUN forget=FILE alternates=OUT.json`: sample other answers to the rows to
forget, for `lorry unlearn method=AltPO alternates=OUT.json`.

The file is written once all are there, or not at all; one that is there already is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorry.config.unlearning.alternates import AlternatesSettings
from lorry.console import VisibleConsole
from lorry.errors import ConfigError
from lorry.formatting import format_count
from lorry.verbs.open_model import open_with_adapters, print_note, resolve_adapter_name

if TYPE_CHECKING:
    from lorry.tasks.unlearn.sampling import SampledAlternate


def main(settings: AlternatesSettings) -> int:
    """Read the rows, sample, write, say what to know of them. The last line of standard output is
    the file."""
    import torch

    from lorry.adapters.mix import Mix
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.data.reading.formats import format_named
    from lorry.data.reading.sources import open_source
    from lorry.generation.text import NO_TOKEN_LIMIT
    from lorry.tasks.unlearn.sampling import SamplingSettings, read_questions, sample_alternates

    path = Path(settings.alternates)
    _refuse_existing(path)
    source = open_source(
        settings.forget,
        name=settings.data.name,
        split=settings.data.split,
        on_bad_row=settings.data.on_bad_row,
        limit=settings.limit,
        local=settings.data.local,
    )
    rows = read_questions(source, format_named(settings.data.format))
    if settings.backend.threads:
        torch.set_num_threads(settings.backend.threads)
    opened = open_with_adapters(settings.model)
    # the start: a run's adapter is a part of it
    mix = Mix.none()
    if opened.adapters:
        mix = Mix.one(resolve_adapter_name(opened, None, settings.model.name))
    encoder = ExampleEncoder(
        opened.tokenizer,
        max_length=NO_TOKEN_LIMIT,
        system=settings.data.system,
        embeddings=opened.model.vocab_size,
    )
    wanted = SamplingSettings(
        n=settings.n,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        prompt=settings.prompt,
        prefill=settings.prefill,
        batch_rows=settings.batch_size,
    )
    if source.bad.total:
        print_note(f"note: {source.bad.summary()}")
    with VisibleConsole(stderr=True).status("sampling") as status:
        alternates = sample_alternates(opened.model, encoder, rows, wanted, mix, status.update)
    _refuse_existing(path)  # of somebody else, meanwhile
    _write_alternates(path, alternates)
    for note in describe_alternates(alternates):
        print_note(note)
    print(path)
    return 0


def describe_alternates(alternates: Sequence[SampledAlternate]) -> list[str]:
    """What to know of sampled alternates, a line each."""
    questions = len({alternate.where for alternate in alternates})
    lines = [f"{format_count(len(alternates), 'alternate')} of {format_count(questions, 'row')}"]
    if same := [alternate for alternate in alternates if alternate.is_the_answer]:
        lines.append(
            f"{len(same)} of them are the row's own answer and are of no use in "
            f"training (the first: {same[0].where}); sample again with another seed "
            "or a higher temperature, or remove them"
        )
    if cut := sum(alternate.cut for alternate in alternates):
        lines.append(f"{cut} of them are cut off at max_new_tokens")
    return lines


def _refuse_existing(path: Path) -> None:
    """Raise ConfigError for a name that is taken, also by a link to nothing."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"alternates={path} already exists; give another file")
    parents = [folder for folder in path.absolute().parents if folder.exists()]
    if not parents[0].is_dir():
        raise ConfigError(f"alternates={path}: {parents[0]} is not a folder")


def _write_alternates(path: Path, alternates: Sequence[SampledAlternate]) -> None:
    from lorry.disk import durable

    rows = [alternate.row() for alternate in alternates]
    if path.suffix.lower() == ".json":
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    durable.make_directory(path.parent)
    durable.write_files(path.parent, {path.name: text.encode()})
