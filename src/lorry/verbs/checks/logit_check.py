"""What a verb wrote, opened again by who will read it, and its logits against those of the model in
memory: `merge` and `export` claim nothing before that.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.schema.model import ModelConfig
from lorry.errors import ContractError, ModelError
from lorry.verbs.checks import probe
from lorry.verbs.open_model import base_side, open_with_adapters, print_note

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorry.models.loading.open import OpenedModel


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
    def of(opened: OpenedModel, weights: Mapping[str, float]) -> LogitsBeforeMerge:
        """As the opened model computes them with ``weights`` {adapter: g}, in its own number
        format."""
        from lorry.adapters.attach import get_bank
        from lorry.adapters.mix import Mix
        from lorry.models.loading.reopen import compute_fp32_logits

        rows, rows_words = probe.probe_rows(opened)
        get_bank(opened.model).activate(Mix.none())
        base = compute_fp32_logits(opened.model, rows)
        get_bank(opened.model).activate(Mix.constants(weights))
        exact = compute_fp32_logits(opened.model, rows)
        side = base_side(opened)
        return LogitsBeforeMerge(rows, rows_words, base, exact, opened.model.dtype, side)

    def rounded(
        self, opened: OpenedModel, weights: dict[str, float], torch_dtype: torch.dtype
    ) -> Tensor:
        """Logits of the model in memory, merged and with every value rounded to ``torch_dtype``:
        what the files must give. The exact ones will not do, since rounding may lose nearly all of
        a small delta, and a lost module no more. ``opened`` is changed."""
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
            f"reloaded by {library}: largest logit difference {difference:.1e} (bound {bound:.1e}, "
            f"stored in {stored})",
            (
                f"against the adapter on the {self.side}: largest logit difference "
                f"{drift:.1e}, while the adapter changes logits by "
                f"{adapter_effect:.1e}, on {self.rows_words}"
            ),
        ]
        if computed != "float32":
            lines.append(
                f"note: computed in {computed}, so its own rounding is included; "
                "float32 does not fit into memory"
            )
        elif lost_share > WARN_ERROR_RATIO:
            lines.append(
                f"warning: rounding to {stored} changed logits by {drift:.2g}, "
                f"{lost_share:.0%} of the adapter's effect; "
                f"{'merge with dtype=float32, or ' if stored != 'float32' else ''}use "
                f"the adapter on the {self.side} unmerged"
            )
        return lines


def load_adapted_model(folder: Path, base: str, dtype: torch.dtype) -> tuple[Any, str]:
    """(the base with the adapter of ``folder``, who opened it): PEFT on transformers, or Lorry
    where PEFT is not installed.

    Raises ContractError when it cannot be opened.
    """
    from safetensors import SafetensorError

    from lorry.adapters.peft.files import saved_new_tokens
    from lorry.adapters.quantization.linear import round_base_linears
    from lorry.adapters.quantization.packed import QUANTIZATIONS
    from lorry.adapters.variants.new_tokens import grow_vocabulary
    from lorry.models.loading.describe import has_packed_matrices, model_file_errors
    from lorry.models.loading.load import trained_quantization
    from lorry.models.loading.reopen import reopen_model

    try:
        # an extra of the package; the export is opened again all the same
        alone = {
            "peft is not installed": importlib.util.find_spec("peft") is None,
            # whose classes need the library of the format
            "the base's files hold packed matrices": has_packed_matrices(Path(base)),
        }
        if why := next((reason for reason, holds in alone.items() if holds), None):
            print_note(f"note: {why}, so Lorry itself read the export back")
            dtype_name = str(dtype).removeprefix("torch.")
            return open_with_adapters(
                ModelConfig.model_validate(
                    {"name": base, "adapter": str(folder), "dtype": dtype_name}
                )
            ).model, "lorry"
        from peft import PeftModel

        with warnings.catch_warnings(), model_file_errors(f"{folder}: PEFT cannot load it"):
            # the two libraries' own affair
            warnings.simplefilter("ignore", (FutureWarning, UserWarning))
            plain = reopen_model(Path(base), dtype)
            if (new := saved_new_tokens(folder)) is not None:
                grow_vocabulary(plain, new)  # as a reader does by the tokenizer's length
            if (held := trained_quantization(folder)) in QUANTIZATIONS:
                # the base that the adapter was trained over, in classes that PEFT knows
                round_base_linears(plain, QUANTIZATIONS[str(held)])
            return PeftModel.from_pretrained(plain, str(folder)).eval(), "peft"
    except (ModelError, SafetensorError) as error:
        raise ContractError(
            f"the export cannot be opened again and was removed: {error}"
        ) from error
