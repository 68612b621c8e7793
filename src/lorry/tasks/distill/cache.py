"""What a teacher said of every supervised token, on disk: written in one pass before training, read
ever after without it.

    DIR/DATA-TEACHER-kK-vV/     teacher.safetensors   names, edges of the sequences; place, ids, logp, rest of their tokens
                                teacher.json          which data, which teacher, how many of its logits, how many tokens
                                manifest.json         SHA-256 of both

A sequence is found by its content (`align.sequence_digest`), so epochs, packing and order do not
matter; a token takes 6 k + 52 bytes (`models/scoring/truncated.py`), at any temperature from 0.5 to
8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorry.backends.protocol import ScoringBackend
from lorry.data.batch import Batch
from lorry.disk import documents, durable, integrity, manifest
from lorry.errors import ConfigError, ModelError
from lorry.models.scoring.divergence import top_k_divergence
from lorry.models.scoring.truncated import TruncatedDistribution, check_temperature
from lorry.tasks.distill.align import sequence_digests
from lorry.tasks.distill.task import (
    TEACHER_IDS,
    TEACHER_LOG_PROBS,
    TOP_K_CHUNK,
    DistillObjective,
    TeacherHead,
    TeacherReader,
    attach_top_k,
)

CACHE_TENSORS_FILE, CACHE_FACTS_FILE, CACHE_FORMAT = (
    "teacher.safetensors",
    "teacher.json",
    "lorry-teacher/1",
)


def teacher_cache_facts(
    batches: Iterable[Batch], teacher: str, k: int, columns: int | None
) -> dict[str, Any]:
    """What a cache of these sequences by this teacher (its digest) says of itself. ``columns``: how
    many of its logits count, as the student has it; None: all."""
    total = hashlib.sha256(
        # sorted, each once: neither order nor repetition changes what a teacher says
        b"".join(sorted({name for batch in batches for name in sequence_digests(batch)}))
    )
    return {
        "format": CACHE_FORMAT,
        "data": total.hexdigest(),
        "teacher": teacher,
        "k": k,
        "columns": columns,
    }


def teacher_cache_folder(cache: Path, facts: Mapping[str, Any]) -> Path:
    """Where it lies."""
    return (
        cache
        / f"{facts['data'][:12]}-{facts['teacher'][:12]}-k{facts['k']}-v{facts['columns'] or 'all'}"
    )


def write_teacher_cache(
    folder: Path,
    batches: Iterable[Batch],
    reader: TeacherReader,
    scorer: ScoringBackend,
    head: TeacherHead,
    facts: Mapping[str, Any],
) -> None:
    """Ask the teacher once of every sequence; all or nothing is written. ``head`` at temperature 1.
    Raises DiskError.
    """
    seen, edges, parts = dict[bytes, None](), [0], list[tuple[Tensor, TruncatedDistribution]]()
    for batch in batches:
        at, hidden = reader.read(batch, scorer)
        # [t]: the sequence of each place that the teacher speaks of
        whose = batch.sequence_of[at]
        for s, name in enumerate(sequence_digests(batch)):
            of_sequence = whose == s
            if name in seen or not of_sequence.any():
                continue  # known, or not taught
            seen[name] = None
            edges.append(edges[-1] + int(of_sequence.sum()))
            parts += [
                # places from the sequence's start, since packing moves it; logits of a chunk at a
                # time, [256, V]
                (places - batch.starts[s], TruncatedDistribution.of(head(rows), facts["k"]))
                for places, rows in zip(
                    at[of_sequence].split(TOP_K_CHUNK),
                    hidden[of_sequence].split(TOP_K_CHUNK),
                    strict=True,
                )
            ]
    if not parts:
        raise ConfigError(
            "the teacher can score none of the sequences, so its cache would be empty"
        )
    tensors = {
        "names": torch.tensor([list(name) for name in seen], dtype=torch.uint8),
        "edges": torch.tensor(edges),
        "place": torch.cat([places for places, _ in parts]).to(torch.int32),
        "ids": torch.cat([top.ids for _, top in parts]),
        "logp": torch.cat([top.logp for _, top in parts]),
        "rest": torch.cat([top.rest for _, top in parts]),
    }
    durable.make_directory(folder.parent)
    # built under a temporary name, renamed when whole: a kill leaves no half cache to be read
    with durable.build_directory(folder) as work:
        save_file(tensors, work / CACHE_TENSORS_FILE)
        written_facts = {
            **facts,
            "sequences": len(seen),
            "tokens": edges[-1],
            "bytes": (work / CACHE_TENSORS_FILE).stat().st_size,
        }
        (work / CACHE_FACTS_FILE).write_text(json.dumps(written_facts, indent=1) + "\n")
        entries = {
            name: manifest.ManifestEntry(
                bytes=(work / name).stat().st_size, sha256=integrity.file_digest(work / name)
            )
            for name in (CACHE_TENSORS_FILE, CACHE_FACTS_FILE)
        }
        (work / manifest.MANIFEST_NAME).write_bytes(manifest.encode_manifest(entries))


class CachedTeacher:
    """A teacher read from disk; verified when opened. Raises ModelError for a damaged cache,
    ConfigError for another's.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], aim: DistillObjective) -> None:
        check_temperature(aim.temperature)
        try:
            integrity.verify_directory(folder)
        except ModelError as error:
            raise ModelError(
                f"{error}; move {folder} away, and the next run writes a new one"
            ) from error
        self.facts = documents.read_object(folder / CACHE_FACTS_FILE, error=ModelError)
        # the folder's name has twelve digits of each; here all of them are compared
        for key, expected in facts.items():
            if self.facts.get(key) != expected:
                raise ConfigError(
                    f"{folder} was written with another {key} "
                    f"({str(self.facts.get(key))[:12]}, here it is "
                    f"{str(expected)[:12]}); give another distill.cache, or remove "
                    "this one to have it written anew"
                )
        self.temperature, self.fn = (
            aim.temperature,
            top_k_divergence(aim.loss, TEACHER_IDS, TEACHER_LOG_PROBS, aim.beta),
        )
        # opened, not loaded: a batch reads the slices of its sequences
        self.file = safe_open(folder / CACHE_TENSORS_FILE, framework="pt")
        self.edges: list[int] = self.file.get_tensor("edges").tolist()
        self.known = {
            bytes(name): n for n, name in enumerate(self.file.get_tensor("names").numpy())
        }

    def attach(self, batches: Sequence[Batch], models: Mapping[str, ScoringBackend]) -> list[Batch]:
        """The batches with what the teacher said of their tokens."""
        return [self._attached(batch) for batch in batches]

    def _attached(self, batch: Batch) -> Batch:
        slices = {name: self.file.get_slice(name) for name in ("place", "ids", "logp", "rest")}
        at, parts = [torch.zeros(0, dtype=torch.int64)], list[dict[str, Tensor]]()
        for start, name in zip(batch.starts.tolist(), sequence_digests(batch), strict=False):
            if (n := self.known.get(name)) is not None:
                parts.append(
                    {key: part[self.edges[n] : self.edges[n + 1]] for key, part in slices.items()}
                )
                at.append(parts[-1]["place"].long() + start)
        # the extras all the same: the loss reads them of every batch
        if not parts:
            k = slices["ids"].get_shape()[1]
            return attach_top_k(
                batch, at[0], torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k)
            )
        ids, logp, rest = (
            torch.cat([part[key] for part in parts]) for key in ("ids", "logp", "rest")
        )
        return attach_top_k(
            batch,
            torch.cat(at),
            ids.long(),
            TruncatedDistribution(ids, logp, rest).log_probs(self.temperature),
        )
