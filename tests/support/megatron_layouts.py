"""What `tests/contracts/test_megatron_layouts.py` runs on two processes, which share a model, or each have
a whole one: trainings, whole commands, and what is left out on purpose.

    RANK=0 WORLD_SIZE=2 ... python -m tests.support.megatron_layouts OUT

writes OUT/rank-0.safetensors and OUT/rank-0.json. OUT holds the models of `write_models`; megatron-core has
to be installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from lorry import cli
from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import attach
from lorry.adapters.mix import Mix
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.slices import LayerSlices
from lorry.backends.distributed.communicator import open_communicator
from lorry.backends.distributed.megatron import converter_of
from lorry.backends.distributed.tensor_ranks import tensor_ranks
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.backends.registry import BACKENDS
from lorry.config.schema.backend import TrainBackendConfig
from lorry.config.schema.model import ModelConfig
from lorry.errors import LorryError
from lorry.generation.sampling import SamplingParams
from lorry.models.loading.load import load_model
from lorry.models.megatron import model as megatron_model
from lorry.models.megatron.layout import RowOrder
from lorry.models.scoring.score import FinalHidden, TokenScore, log_prob
from lorry.notes import ignore_note
from tests.support import tinyrun
from tests.support.cuda_shim import cuda_on_cpu
from tests.support.layouts import TWO, WIDE, mixed, steps_of, trained, uneven
from tests.support.seam import Fixed

FAMILIES = ("llama", "qwen2", "qwen3")
STORIES = "stories260K"
LAYOUTS = {"tensor 2": 2, "data 2": 1}
SIZES = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
}
# adapters on the ends as well, which are modules of ours among Megatron's
ENDS = {
    "default": LoraSpec(r=3, target_modules=["q_proj", "up_proj", "down_proj", "embed", "lm_head"])
}
WANTS = {"logprob": TokenScore(log_prob), "hidden": FinalHidden()}
PROMPTS = [[5, 9, 2], [7], [11, 3]]
PARAMS = [SamplingParams(max_new_tokens=n) for n in (3, 6, 1)]


def write_models(folder: Path, stories: Path | None = None) -> None:
    """A directory of each family; and a real model, if given."""
    if stories is not None:
        (folder / STORIES).symlink_to(stories)
    for family in FAMILIES:
        more = {"head_dim": 16} if family == "qwen3" else {}
        tinyrun.model_directory(
            folder / family, family, tie_word_embeddings=family == "qwen2", **SIZES, **more
        )


def settings_of(layout: str) -> TrainBackendConfig:
    return TrainBackendConfig(name="megatron", tensor_parallel=LAYOUTS[layout], timeout=300.0)


def start(
    layout: str | None,
    folder: Path,
    family: str,
    specs: Mapping[str, LoraSpec],
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
) -> LocalBackend:
    """A backend over a model that is read; without a ``layout`` one process with our own decoder."""
    given: dict[str, Any] = {}
    communicator: dict[str, Any] = {}
    if layout is not None:
        settings = settings_of(layout)
        communicator["communicator"] = open_communicator(settings)
        given["ranks"] = tensor_ranks(communicator["communicator"])
        given["convert"] = converter_of(
            settings,
            ModelConfig(name=family, device="cpu"),
            communicator["communicator"],
            ignore_note,
        )
    model = load_model(
        folder / family, dtype=dtype, device="cpu", add_note=ignore_note, **given
    ).model
    for name, spec in specs.items():
        attach(model, spec, name)
    model.gradient_checkpointing = recompute
    kind: Any = LocalBackend if layout is None else BACKENDS["megatron"]
    backend: LocalBackend = kind(model, list(specs), OptimSettings(), **communicator)
    return backend


def trainings(folder: Path, begin: Callable[..., LocalBackend]) -> dict[str, Tensor]:
    """Every training by name, of the models that are there."""
    plain = Fixed(steps_of(uneven))
    results = {
        f"{family} {str(dtype).removeprefix('torch.')}": trained(begin(family, WIDE, dtype), plain)
        for family in (*FAMILIES, STORIES)
        if (folder / family).exists()
        for dtype in (torch.float32, torch.float64)
    }
    both = Fixed(steps_of(mixed), list(TWO))
    results |= {
        "two adapters with dropout": trained(begin("llama", TWO), both),
        "recompute": trained(begin("llama", TWO, recompute=True), both),
        "ends": trained(begin("qwen2", ENDS), plain),
    }
    backend = begin("llama", WIDE)
    for mix in (None, Mix.none()):
        scores = backend.score(plain.step_batches(0, {}), WANTS, mix)
        results[f"scores {mix is None}"] = {
            f"{i}/{name}": value for i, each in enumerate(scores) for name, value in each.items()
        }
    answers = backend.generate(PROMPTS, PARAMS, adapters="default")
    results["answers"] = {str(i): torch.tensor(each.tokens) for i, each in enumerate(answers)}
    return {f"{name}/{key}": v for name, each in results.items() for key, v in each.items()}


# --- what is left out on purpose


class Thirds(RowOrder):
    """q, k and v one after the other, where Megatron has them by group."""

    def __init__(self, right: RowOrder) -> None:
        super().__init__(1, tuple(right.groups * size for size in right.sizes))


class Reversed(RowOrder):
    """up before gate, v before q."""

    def __init__(self, right: RowOrder) -> None:
        super().__init__(right.groups, right.sizes)

    def fuse(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        return super().fuse(parts[::-1], dim)


def reordered(change: Callable[[RowOrder], RowOrder], name: str) -> Any:
    own = megatron_model.row_order

    def order(config: Any, place: Any, ranks: int) -> RowOrder:
        right = own(config, place, ranks)
        return change(right) if place.name == name else right

    return mock.patch.object(megatron_model, "row_order", order)


def one_sum_left_out(cut: str) -> Any:
    """Terms of linears whose rows (or columns) are cut do not add up."""

    class Alone:
        def __init__(self, ranks: Any) -> None:
            self.ranks = ranks

        def __getattr__(self, name: str) -> Any:
            return getattr(self.ranks, name)

        def add_up(self, tensor: Tensor) -> Tensor:
            return tensor

    own = megatron_model.replace

    def replaced(slices: LayerSlices, **changes: Any) -> LayerSlices:
        made = own(slices, **changes)
        return own(made, ranks=Alone(made.ranks)) if getattr(made, cut) is not None else made

    return mock.patch.object(megatron_model, "replace", replaced)


FAULTS: dict[str, Callable[[], Any]] = {
    "thirds": partial(reordered, Thirds, "linear_qkv"),
    "up before gate": partial(reordered, Reversed, "linear_fc1"),
    "sum of cut rows": partial(one_sum_left_out, "rows"),
    "sum of cut columns": partial(one_sum_left_out, "columns"),
    "added up twice": lambda: mock.patch.object(
        Adapter, "_is_partial_sum", lambda self, name: self._slice_of(name) is None
    ),
    "terms left out": lambda: mock.patch.object(
        megatron_model, "TermsHook", return_value=lambda *called: None
    ),
}


def faults(folder: Path, layout: str) -> dict[str, str]:
    """How reading a model ends with each, by the proof that is made first."""
    ended = {}
    for name, fault in FAULTS.items():
        try:
            with fault():
                start(layout, folder, "llama", WIDE)
            ended[name] = ""
        except LorryError as error:
            ended[name] = f"{type(error).__name__}: {error}"
    return ended


# --- whole commands


def commands(folder: Path) -> dict[str, list[str]]:
    return {
        name: [word.replace("FOLDER", str(folder)) for word in words]
        for name, words in json.loads((folder / "commands.json").read_text()).items()
    }


@contextmanager
def layout_of(layout: str) -> Iterator[None]:
    """Megatron's groups of a layout, gone afterwards: a process of a run has them once."""
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    communicator = open_communicator(TrainBackendConfig(name="ddp", timeout=300.0))
    rank = communicator.rank
    results, ended = dict[str, Tensor](), dict[str, Any]()
    with cuda_on_cpu():
        for layout in LAYOUTS:
            with layout_of(layout):
                made = trainings(out, partial(start, layout, out))
                results |= {f"{layout}/{name}": value for name, value in made.items()}
                ended[layout] = faults(out, layout)
                for name, words in commands(out).items():
                    ended[f"{name} {layout}"] = cli.main(
                        [
                            word.replace("LAYOUT", layout.replace(" ", "-"))
                            for word in [*words, f"backend.tensor_parallel={LAYOUTS[layout]}"]
                        ]
                    )
    save_file(results, out / f"rank-{rank}.safetensors")
    (out / f"rank-{rank}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
