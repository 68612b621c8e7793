"""What an export of a mixture costs where it computes something else: the loss on a few rows of
every expert's domain, of the run and of what was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config import parse_settings
from lorry.config.data import DataConfig
from lorry.config.jobs import runs_by_adapter
from lorry.config.moe import RouterRunConfig
from lorry.config.schema.run import RunConfig
from lorry.config.schema.train import TrainConfig
from lorry.disk import documents
from lorry.errors import ConfigError
from lorry.notes import ignore_note
from lorry.runs.layout import RUN_FILE

if TYPE_CHECKING:
    from lorry.adapters.mix import Mix
    from lorry.data.batch import Batch
    from lorry.models.loading.open import OpenedModel

DOMAIN_ROWS = 16  # of each expert: enough to see a difference, seconds on a CPU


@dataclass(frozen=True)
class DomainLoss:
    """Mean losses per supervised token under the run's mix and of the base: ``batches`` by expert,
    and what these are ("held-out rows").
    """

    batches: Mapping[str, list[Batch]]
    what: str
    run: Mapping[str, float]
    base: Mapping[str, float]

    @staticmethod
    def of(opened: OpenedModel, folder: Path, mix: Mix) -> DomainLoss:
        """As the opened model has them. Raises DataError, ConfigError where the rows cannot be read
        any more."""
        from lorry.adapters.mix import Mix
        from lorry.evaluate.loss import mean_nll
        from lorry.generation.scorer import ModelScorer

        batches, held = read_domain_rows(opened, folder)
        scorer = ModelScorer(opened.model)

        def losses(mix: Mix) -> dict[str, float]:
            sums = {name: mean_nll(scorer, some, mix) for name, some in batches.items()}
            return {name: nll / tokens for name, (nll, tokens) in sums.items()}

        what = "held-out rows" if held else "training rows"
        return DomainLoss(batches, what, losses(mix), losses(Mix.none()))

    def compare(self, model: Any) -> list[str]:
        """A line for each domain of what transformers' ``model`` has there."""
        lines = []
        for name, batches in self.batches.items():
            exported, run, base = hf_loss(model, batches), self.run[name], self.base[name]
            # a loss of 0 has no share, and NaN is none
            share = f" ({exported / run - 1:+.2%})" if run > 0 else ""
            lines.append(
                f"loss of {name} on {len(batches)} {self.what}: the run {run:.4f}, exported "
                f"{exported:.4f}{share}, base {base:.4f}"
            )
        return lines


def hf_loss(model: Any, batches: list[Batch]) -> float:
    """Mean negative log-likelihood per supervised token under a model of transformers."""
    import torch

    nll = tokens = 0.0
    with torch.no_grad():
        for batch in batches:
            for start, stop in batch.segments:
                ids, weights = batch.tokens[start:stop], batch.weights[start:stop]
                scores = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
                target_scores = scores.gather(1, ids[1:, None])[:, 0].double()
                nll -= float((target_scores * weights[1:].double()).sum())
                tokens += float(weights[1:].double().sum())
    return nll / tokens


def read_domain_rows(
    opened: OpenedModel, folder: Path, *, training: bool = False
) -> tuple[dict[str, list[Batch]], bool]:
    """({expert: a few rows of its data, one a batch}, whether they were held out): as run.yaml
    describes them; ``training``: training rows in any case. Raises ConfigError where there is no
    such description, DataError where its files are gone.
    """
    import numpy as np

    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.data.prepare import prepare_data

    described = expert_data_settings(folder)
    held = not training and all(data.evaluates for data, _ in described.values())
    batches = {}
    for name, (data, train) in described.items():
        changes: dict[str, Any] = {"on_bad_row": "skip", "streaming": False, "packing": False}
        # where all rows decide which are held out, all are read
        if not data.mix and data.test_size is None:
            changes["n"] = min(data.n or DOMAIN_ROWS, DOMAIN_ROWS)
        changes["eval_n"] = min(data.eval_n or DOMAIN_ROWS, DOMAIN_ROWS)
        if not held:
            changes |= {"eval": None, "eval_split": None}
        prepared = prepare_data(
            data.model_copy(update=changes),
            train.model_copy(update={"per_device_eval_batch_size": 1}),
            opened.tokenizer,
            quarantine=folder,
            make=partial(ExampleEncoder, embeddings=opened.model.vocab_size),
        )
        if held:
            batches[name] = prepared.evaluation[:DOMAIN_ROWS]
            continue
        assert prepared.tokens is not None  # nothing is streamed here
        few = prepared.tokens.select(np.arange(min(DOMAIN_ROWS, len(prepared.tokens))))
        batches[name] = few.eval_batches(1)
    return batches, held


def row_prompts(
    opened: OpenedModel, folder: Path, names: Sequence[str] | None = None
) -> dict[str, list[list[int]]]:
    """{expert: token ids of the prompts of a few of its training rows} of these experts, or of all
    that the run has. Raises ConfigError, DataError where the rows are not there."""
    rows, _ = read_domain_rows(opened, folder, training=True)
    names = list(rows) if names is None else names
    if missing := [name for name in names if not rows.get(name)]:
        raise ConfigError(f"{folder}: no rows of expert {missing[0]!r} are described there")
    return {name: [batch_prompt(batch) for batch in rows[name]] for name in names}


def batch_prompt(batch: Batch) -> list[int]:
    """The token ids before the first one that is learnt, of a batch of one row; of plain text,
    where the second is learnt, all of them."""
    ids: list[int] = batch.tokens.tolist()
    start = int(batch.rows[0])
    return ids[:start] if start > 1 else ids


def expert_data_settings(folder: Path) -> dict[str, tuple[DataConfig, TrainConfig]]:
    """{expert: its data, and the training whose seed drew what is held out}: of a mixture, or of
    the run that trained the experts, by its own run.yaml alone (a run beside it may be of other
    experts). Raises ConfigError where that is missing or an expert has no rows.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        raise ConfigError(f"{file} is missing, and with it which rows are whose")
    described = documents.read_yaml(file, error=ConfigError)
    if not (isinstance(described, dict) and "experts" in described):
        alone = runs_by_adapter(parse_settings(RunConfig, [str(file)], ignore_note))
        return {name: (run.data, run.train) for name, run in alone.items()}
    run = parse_settings(RouterRunConfig, [str(file)], ignore_note)
    if bare := [e.name for e in run.experts if not (e.data.path or e.data.mix)]:
        raise ConfigError(
            f"{file}: expert {bare[0]!r} has no data, so which rows are its is not known"
        )
    return {expert.name: (expert.data, run.train) for expert in run.experts}
