"""`lorry merge RUN`: fold an adapter into its base's weights and write a plain Hugging Face model.
Of several adapters it makes one (`merge_adapters.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.merge import MergeSettings
from lorry.config.schema import ModelConfig
from lorry.disk.integrity import file_digest
from lorry.verbs import probe
from lorry.verbs.open_model import base_side, open_with_adapters, print_note, resolve_adapter_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorry.models.loading.open import OpenedModel

MERGE_RECORD_FILE = "lorry_merge.json"


def main(settings: MergeSettings) -> int:
    """Merge, write, say how much rounding cost and where the model is."""
    from lorry.models.loading.open import stored_dtype

    if settings.several:
        # imported only here: it takes what this module has
        from lorry.verbs.merge_adapters import merge_several

        return merge_several(settings)
    stored = stored_dtype(settings.run)
    opened = open_with_adapters(
        ModelConfig.model_validate(
            {"name": settings.run, "dtype": probe.logits_dtype_name(settings.run, stored)}
        )
    )
    dtype = stored if settings.dtype == "auto" else settings.dtype
    write_merged(
        opened,
        resolve_adapter_name(opened, settings.adapter, settings.run),
        settings.output_dir,
        dtype,
        settings.weight,
    )
    print(settings.output_dir)
    return 0


def write_merged(
    opened: OpenedModel, name: str, output: Path, dtype: str, weight: float = 1.0
) -> None:
    """Stream base + ``weight`` times the adapter, what it was trained over included, into
    ``output``, one tensor at a time, in fp32 and rounded once to
    ``dtype``; open it again with transformers and compare logits on a few rows before it gets its
    name. ``opened`` is of no use afterwards.

    The base's place and digests are recorded beside it, so that `lorry unmerge` can give it back. Tells what rounding cost as
    |stored - exact| / |delta| of the weights, and in logits against what the adapter moves them. Raises ConfigError for a place
    that is taken, ModelError if a merged weight is not finite, ContractError if the model opened again is another one.
    """
    import torch

    from lorry.adapters.merge import MergeReport, MergeRow, merged_tensors, separates_tied_head
    from lorry.disk import durable
    from lorry.models.loading.reopen import free_model_memory, reopen_model
    from lorry.models.loading.store import save_model

    torch_dtype: torch.dtype = getattr(torch, dtype)
    weights, rows = {name: weight}, list[MergeRow]()
    untied = separates_tied_head(opened.model, weights)
    before = LogitsBeforeMerge.of(opened, name, weight)
    with durable.build_directory(output) as folder:
        save_model(
            opened.model,
            folder,
            tensors=merged_tensors(opened.model, weights, dtype=torch_dtype, rows=rows),
            # an adapter on a tied head changes the head only, so the two can no longer be one
            # tensor
            config_overrides={"tie_word_embeddings": False} if untied else {},
            tokenizer=opened.tokenizer,
            generation_config=opened.source["generation_config"] or None,
            dtype=torch_dtype,
        )
        # in the folder that is being built, so that a model and its record appear together
        (folder / MERGE_RECORD_FILE).write_text(
            json.dumps(merge_record(opened, name, weight), indent=1) + "\n", encoding="utf-8"
        )
        # after everything is written, for it changes the model in memory
        rounded = before.rounded(opened, weights, torch_dtype)
        free_model_memory(opened.model)
        lines = before.compare(reopen_model(folder, before.dtype), dtype, rounded=rounded)
    # rows are complete only now: `merged_tensors` fills them while the file is written
    report = MergeReport(tuple(rows), torch_dtype, untied)
    whose = "the adapter's effect" if before.side == "base" else "the effect of adapter and start"
    print_note(
        f"merged {len(rows)} modules into {dtype}; rounding changed {report.ratio:.2%} of {whose}"
    )
    for line in lines:
        print_note(line)
    if untied:
        print_note(
            "note: head and embedding shared a weight and no longer do; config.json says tie_word_embeddings=false"
        )
    if report.warning:
        print_note(f"warning: {report.warning}{' (dtype=float32)' if dtype != 'float32' else ''}")


@dataclass(frozen=True)
class LogitsBeforeMerge:
    """Logits on a few rows ([1, t] each) before anything is written: of the base alone and with the
    adapter beside it. ``side``: what the former is called.
    """

    rows: list[Tensor]
    rows_words: str
    base: Tensor
    exact: Tensor
    dtype: torch.dtype
    side: str

    @staticmethod
    def of(opened: OpenedModel, name: str, weight: float = 1.0) -> LogitsBeforeMerge:
        """As the opened model computes them, in its own number format."""
        from lorry.adapters.attach import get_bank
        from lorry.adapters.mix import Mix
        from lorry.models.loading.reopen import compute_fp32_logits

        rows, rows_words = probe.probe_rows(opened)
        get_bank(opened.model).activate(Mix.none())
        base = compute_fp32_logits(opened.model, rows)
        get_bank(opened.model).activate(Mix.constants({name: weight}))
        exact = compute_fp32_logits(opened.model, rows)
        side = base_side(opened)
        return LogitsBeforeMerge(rows, rows_words, base, exact, opened.model.dtype, side)

    def rounded(
        self, opened: OpenedModel, weights: dict[str, float], torch_dtype: torch.dtype
    ) -> Tensor:
        """Logits of the model in memory, merged and with every value rounded to ``kind``: what the
        files must give. The exact ones will not do, since rounding may lose nearly all of a small
        delta, and a lost module no more. ``opened`` is changed."""
        import torch

        from lorry.adapters.merge import merge
        from lorry.models.loading.reopen import compute_fp32_logits

        merge(opened.model, weights)
        with torch.no_grad():
            for tensor in opened.model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(torch_dtype))
        return compute_fp32_logits(opened.model, self.rows)

    def compare(
        self, model: Any, stored: str, library: str = "hf", *, rounded: Tensor | None = None
    ) -> list[str]:
        """What to tell of a model opened again whose weights were stored in ``stored``. Raises
        ContractError if it is not the model in memory (``rounded``, else the exact one), to the
        rounding of the number format that both are computed in."""
        from lorry.adapters.merge import WARN_ERROR_RATIO
        from lorry.models.loading.reopen import LOGIT_BOUNDS, compare_logits, compute_fp32_logits

        computed, reloaded = (
            str(self.dtype).removeprefix("torch."),
            compute_fp32_logits(model, self.rows),
        )
        # to what the files must give; the exact logits come below, for what rounding cost
        difference, bound = compare_logits(
            self.exact if rounded is None else rounded, reloaded, LOGIT_BOUNDS[computed], stored
        )
        drift, adapter_effect = (
            float((self.exact - other).abs().max()) for other in (reloaded, self.base)
        )
        # where the adapter moves nothing, nothing of it can be lost
        lost_share = drift / adapter_effect if adapter_effect else 0.0
        lines = [
            f"reloaded by {library}: largest logit difference {difference:.1e} (bound {bound:.1e}, stored in {stored})",
            f"from the adapter beside the {self.side}: largest logit difference {drift:.1e}, where the adapter moves "
            f"logits by {adapter_effect:.1e}, on {self.rows_words}",
        ]
        if computed != "float32":
            lines.append(
                f"note: computed in {computed}, whose own rounding is part of that; float32 does not fit into memory"
            )
        elif lost_share > WARN_ERROR_RATIO:
            lines.append(
                f"warning: rounding to {stored} moved logits by {drift:.2g}, {lost_share:.0%} of what the adapter moves them; "
                f"{'merge with dtype=float32, or ' if stored != 'float32' else ''}keep the adapter beside the {self.side}"
            )
        return lines


def merge_record(opened: OpenedModel, name: str, weight: float = 1.0) -> dict[str, Any]:
    """What a merge was made of: the base's directory, what it was opened as, the SHA-256 of its
    weight files, the adapter and its weight, and what that was trained over.
    """
    from lorry.adapters.attach import get_bank

    base = Path(opened.source["path"])
    # of the base as it is now: unmerge must be able to tell that nobody changed it since
    digests = {file.name: file_digest(file) for file in weight_files(base)}
    model_path = Path(opened.source["name"])
    # absolute: unmerge may be called from another folder
    opened_as = str(model_path.resolve()) if model_path.exists() else opened.source["name"]
    record = {"base": str(base), "opened_as": opened_as, "base_weights": digests, "adapter": name}
    start = get_bank(opened.model).start
    over = {} if start is None else {"start": {"path": start.path, "sha256": start.sha256}}
    return {**record, "weight": weight, **over}


def weight_files(folder: Path) -> Iterator[Path]:
    """The files that hold a model's tensors."""
    yield from sorted(folder.glob("*.safetensors"))
