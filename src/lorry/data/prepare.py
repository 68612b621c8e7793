"""From the data settings of a run to what it trains and evaluates on: sources opened, rows encoded,
order planned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.config.data import DataConfig
from lorry.config.schema.train import TrainConfig
from lorry.data.batch import Batch
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet
from lorry.data.reading.content import TextDocument
from lorry.data.reading.formats import RowFormat, format_named, read_examples
from lorry.data.reading.sources import DataSource, open_source
from lorry.data.stream.dataset import BatchStream, TrainStream
from lorry.data.stream.mixtures import mixture_shares, read_held_out, read_mix
from lorry.data.stream.report import DataReport
from lorry.data.stream.streaming import StreamingTokenSet, StreamingTrainStream
from lorry.errors import DataError
from lorry.formatting import format_count


class StreamReport(DataReport):
    """What became of the rows of a streamed source so far: nobody has counted those to come."""

    def __init__(self, source: DataSource) -> None:
        super().__init__(source.label, left_out=source.bad.counts, first_left_out=source.bad.first)

    def lines(self) -> list[str]:
        """For a person, one fact a line."""
        read = f"{self.source}: streamed, rows are read while training"
        return [
            read,
            *(
                f"left out so far: {format_count(n, 'row')} ({reason})"
                for reason, n in sorted(self.left_out.items())
            ),
        ]


@dataclass
class PreparedData:
    """What a run reads. ``ends``: ids of which one must be supervised in every sequence (empty for
    plain text); ``digest``: of the training tokens, or the name of a streamed source; ``tokens``:
    None when streamed."""

    stream: BatchStream
    evaluation: list[Batch]
    encoder: ExampleEncoder
    report: DataReport
    ends: Collection[int]
    digest: str
    tokens: TokenSet | None


@dataclass
class EncodedRows:
    """Encoded rows before anything is drawn from them in an order. ``tokens``: None for a streamed
    ``source``.
    """

    source: DataSource | None
    encoder: ExampleEncoder
    form: RowFormat | None
    ends: Collection[int]
    tokens: TokenSet | None
    held: list[Batch]


def prepare_data(
    data: DataConfig, train: TrainConfig, tokenizer: Any, *, quarantine: Path, known: dict[str, EncodedRows] | None = None,
    make: Callable[..., ExampleEncoder] = ExampleEncoder,
) -> PreparedData:  # fmt: skip
    """Open and encode training and evaluation rows. ``known``: what other jobs of the run have
    read, by its settings, which is shared; ``make``: what makes the encoder. Raises DataError,
    ConfigError, ModelError (an unusable template).
    """
    known = {} if known is None else known
    # who is held out, and templates, hang on seeds
    drawn = (
        _test_seed(data, train) if data.test_size is not None else None,
        train.seed if data.mix else None,
    )
    # equal settings read equal rows; whatever of the run decides which belongs into this key
    settings = f"{data.model_dump_json()} {train.per_device_eval_batch_size} {drawn}"
    rows = known.get(settings) or _read_rows(data, train, tokenizer, quarantine, make)
    shape: dict[str, Any] = {
        "seed": train.seed, "rows_per_batch": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps, "packing": data.packing,
        "max_tokens": train.per_device_train_batch_size * data.max_length, "shuffle": data.shuffle,
    }  # fmt: skip
    # a stream has a position, so jobs never share one
    if rows.tokens is None:
        assert rows.source is not None
        streamed = StreamingTrainStream(
            StreamingTokenSet(rows.source, rows.encoder, form=rows.form), **shape
        )
        label = rows.source.label
        return PreparedData(
            streamed,
            rows.held,
            rows.encoder,
            StreamReport(rows.source),
            rows.ends,
            label,
            None,
        )
    known[settings] = rows
    stream, tokens = TrainStream(rows.tokens, **shape), rows.tokens
    return PreparedData(
        stream,
        rows.held,
        rows.encoder,
        tokens.report,
        rows.ends,
        tokens.digest,
        tokens,
    )


def expect_rows(data: DataConfig) -> None:
    """Raise DataError where the rows of `data.path` are not there or none can be read; the first that
    can be is as far as this looks."""
    source = _open_data_source(
        data.model_copy(update={"on_bad_row": "skip"}),
        data.path or [],
        data.split,
        Path(),
        limit=data.n,
        streaming=data.streaming,
    )
    if not _first_rows(source, format_named(data.format, data.text_field)):
        raise DataError(f"{source.label}: no usable row")


def _test_seed(data: DataConfig, train: TrainConfig) -> int:
    """What draws the rows that are held out."""
    return train.seed if data.test_seed is None else data.test_seed


def _read_rows(
    data: DataConfig,
    train: TrainConfig,
    tokenizer: Any,
    quarantine: Path,
    make: Callable[..., ExampleEncoder],
) -> EncodedRows:
    # of plain text everything is learnt whatever this says
    only = True if data.completion_only_loss is None else data.completion_only_loss
    encoder = make(
        tokenizer, max_length=data.max_length, completion_only_loss=only, system=data.system
    )
    if data.mix:
        return _read_mix(data, train, encoder, quarantine)
    form = format_named(data.format, data.text_field)
    source = _open_data_source(
        data, data.path or [], data.split, quarantine, limit=data.n, streaming=data.streaming
    )
    # a piece of a document stops where it was cut, not where it ends
    ends = [] if _plain_text(source, form) else encoder.stop_tokens()
    tokens = None if data.streaming else TokenSet.build(source, encoder, form=form)
    held: list[Batch] = []
    # held out of what was encoded, so bad rows do not count towards the share
    if data.test_size is not None and tokens is not None:
        tokens, aside = tokens.held_out(data.test_size, _test_seed(data, train))
        held = aside.eval_batches(train.per_device_eval_batch_size)
    return EncodedRows(
        source,
        encoder,
        form,
        ends,
        tokens,
        held + _evaluation_batches(data, train, encoder, form, quarantine),
    )


def _read_mix(
    data: DataConfig, train: TrainConfig, encoder: ExampleEncoder, quarantine: Path
) -> EncodedRows:
    """The same of a mixture of named sets; of each one rows are held out, or its split for
    evaluation is read.
    """
    parts, size = (
        read_mix(data, encoder, seed=train.seed, quarantine=quarantine),
        train.per_device_eval_batch_size,
    )
    held = read_held_out(data, encoder, seed=train.seed, quarantine=quarantine)
    if data.test_size is not None:
        # of each set, so that a small one is not lost among the rest
        pairs = [part.held_out(data.test_size, _test_seed(data, train)) for part in parts]
        parts, held = [rest for rest, _ in pairs], [drawn for _, drawn in pairs]
    tokens = TokenSet.mixture(parts, mixture_shares(data))
    batches = [batch for part in held for batch in part.eval_batches(size)]
    if data.eval is not None:
        batches += _evaluation_batches(data, train, encoder, None, quarantine)
    return EncodedRows(None, encoder, None, encoder.stop_tokens(), tokens, batches)


def _evaluation_batches(
    data: DataConfig,
    train: TrainConfig,
    encoder: ExampleEncoder,
    form: RowFormat | None,
    quarantine: Path,
) -> list[Batch]:
    if not (data.eval or data.eval_split):
        return []
    source = _open_data_source(
        data,
        data.eval or data.path or [],
        data.eval_split or data.split,
        quarantine,
        limit=data.eval_n,
    )
    # another file may be in another format
    return TokenSet.build(source, encoder, form=form if data.eval is None else None).eval_batches(
        train.per_device_eval_batch_size
    )


def _open_data_source(
    data: DataConfig,
    path: str | list[str],
    split: str,
    quarantine: Path,
    *,
    limit: int | None = None,
    streaming: bool = False,
) -> DataSource:
    aside = quarantine if data.on_bad_row == "quarantine" else None
    return open_source(
        path,
        name=data.name,
        split=split,
        streaming=streaming,
        on_bad_row=data.on_bad_row,
        quarantine=aside,
        limit=limit,
        local=data.local,
    )


def _plain_text(source: DataSource, form: RowFormat | None) -> bool:
    """Whether the rows are documents (whose pieces need not end) and not answers."""
    return any(isinstance(example.content, TextDocument) for example in _first_rows(source, form))


def _first_rows(source: DataSource, form: RowFormat | None) -> list[Any]:
    for example in read_examples(source, form):
        return [example]
    return []
