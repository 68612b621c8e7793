"""What one of two processes trains for `tests/contracts/test_variant_layouts.py`: AdaLoRA, one half alone, an
adapter that tokens invoke and one with weights in the base's place, over a base that each process has, or
that is cut over them; and what it reads and grows of one that is cut.

    RANK=0 WORLD_SIZE=2 ... python -m tests.support.variant_ranks OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import detach
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.peft.files import load_adapter
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.new_tokens import NewTokens, grow_vocabulary
from lorry.backends.distributed.communicator import Communicator, open_communicator
from lorry.backends.distributed.fsdp import sharder_of
from lorry.backends.distributed.tensor_ranks import tensor_ranks
from lorry.backends.local import LocalBackend
from lorry.config.adapter.adalora import AdaLoraSettings
from lorry.config.schema.backend import TrainBackendConfig
from lorry.data.batch import TokenizedExample
from lorry.errors import ModelError
from lorry.models.decoder.model import Decoder
from lorry.models.loading.load import load_model
from lorry.notes import ignore_note
from tests.support import tinyrun
from tests.support.layouts import ALPHA, TARGETS, flat, sharded, steps_of, trained, uneven
from tests.support.seam import Fixed

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {},
    "tensor": {"name": "ddp", "tensor_parallel": 2},
}
RANKED = LoraSpec(
    r=4, lora_alpha=ALPHA, target_modules=TARGETS, adalora=AdaLoraSettings(target_r=2)
)
HALF = LoraSpec(r=3, lora_alpha=ALPHA, target_modules=TARGETS, train=("B",))
# whole norms in the base's place, and rows of an embedding and of the head that it is tied to
OWN = LoraSpec(
    r=3,
    lora_alpha=ALPHA,
    target_modules=TARGETS,
    modules_to_save=("norm",),
    trainable_token_indices={"embed_tokens": (5, 6, 9), "lm_head": (6, 3)},
)
# with biases, of which some are cut, some of one process's sum; whole matrices, and both ends
WHOLE = LoraSpec(
    r=3,
    lora_alpha=ALPHA,
    target_modules=["query_key_value"],
    modules_to_save=("dense_h_to_4h", "dense_4h_to_h", "embed_in", "lm_head"),
    bias="all",
)
CALLED = LoraSpec(r=3, lora_alpha=ALPHA, target_modules=TARGETS, alora_invocation_tokens=(5, 6))


def calling(step: int) -> list[list[TokenizedExample]]:
    """`uneven` rows of which all but one call the adapter, at their second token."""
    return [
        [
            row
            if (step + i) % 7 == 0
            else replace(row, tokens=[row.tokens[0], 5, 6, *row.tokens[3:]])
            for i, row in enumerate(rows)
        ]
        for rows in uneven(step)
    ]


OWN_WEIGHTS = ("own", "whole")


def trainings(
    start: Callable[..., LocalBackend], names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Every training by name; ``names``: of those alone."""
    each = {
        "adalora": (RANKED, uneven, "llama"),
        "half": (HALF, uneven, "llama"),
        "alora": (CALLED, calling, "llama"),
        "own": (OWN, calling, "llama"),
        "whole": (WHOLE, uneven, "gpt_neox"),
    }
    return flat(
        {
            name: trained(
                start({"default": spec}, torch.float64, family=family), Fixed(steps_of(rows))
            )
            for name, (spec, rows, family) in each.items()
            if names is None or name in names
        }
    )


def write_theirs(out: Path) -> None:
    """A model with biases, and an adapter of PEFT's in which a whole module's lie three times, once as the
    base has them; and one of another base, by the last of these."""
    base = tinyrun.model_directory(out / "qwen2", "qwen2")
    asked = peft.LoraConfig(
        r=2,
        bias="all",
        target_modules=["q_proj"],
        modules_to_save=["k_proj"],
        task_type="CAUSAL_LM",
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.get_peft_model(model, asked)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in (p for p in theirs.parameters() if p.requires_grad):
            param.add_(torch.randn(param.shape, generator=draw) * 0.2)
    for name in ("theirs", "others"):
        theirs.save_pretrained(out / name)
    file = out / "others" / "adapter_model.safetensors"
    tensors = load_file(file)
    (last,) = (n for n in tensors if n.endswith("k_proj.original_module.bias"))
    tensors[last][-1] += 1
    save_file(tensors, file)


def grown(load: Callable[..., Decoder]) -> dict[str, Tensor]:
    """Embedding, head and logits of models that were given three tokens: a tied one as it was read, and one
    that has run, whose head is its own. float64."""
    tensors = dict[str, Tensor]()
    for family, init, has_run in (("llama", "subtokens", False), ("gpt_neox", "mean", True)):
        model = load(family, torch.float64)
        rows = model.vocab_size
        if has_run:
            model(torch.tensor([3, 9]))
        pieces = {rows: (3, 5), rows + 1: (7,), rows + 2: (rows - 1, 2, 4)}
        grow_vocabulary(model, NewTokens(pieces, init))  # type: ignore[arg-type]
        ends = {"embedding": model.family.embed, "head": model.family.head}
        for end, path in ends.items():
            table = model.get_submodule(path)
            assert isinstance(table, AdaptableLayer)
            tensors[f"{family}/{end}"] = table.whole_table().contiguous().clone()
        tensors[f"{family}/logits"] = model(torch.tensor([rows, 3, rows + 2, 9])).logits.detach()
    return tensors


def read(out: Path, load: Callable[..., Decoder]) -> dict[str, Tensor]:
    """Logits under `write_theirs`' adapter, and whether this process refuses the one of another base."""
    model = load("qwen2", torch.float32)
    load_adapter(model, out / "theirs", "theirs", trainable=False)
    with torch.no_grad():
        logits = model(torch.tensor([3, 9, 27])).logits
    detach(model, "theirs")
    said = ""
    try:
        load_adapter(model, out / "others", "others", trainable=False)
    except ModelError as error:
        said = str(error)
    refused = "differs from the weight of the base model" in said
    return {"logits": logits, "refused": torch.tensor(refused)}


def loader(out: Path, communicator: Communicator, layout: str = "fsdp") -> Callable[..., Decoder]:
    """Reads a model of ``out``, cut over the processes where there are several."""
    backend = TrainBackendConfig(**{"name": "fsdp", **LAYOUTS[layout]})
    shard = sharder_of(backend, communicator, "cpu")

    def load(family: str, dtype: torch.dtype) -> Decoder:
        read = load_model(
            out / family,
            dtype=dtype,
            device="cpu",
            ranks=tensor_ranks(communicator),
            shard=shard,
            add_note=ignore_note,
        )
        assert isinstance(read.model, Decoder)
        return read.model

    return load


def main(out: Path) -> None:
    torch.set_num_threads(1)
    communicator = open_communicator(TrainBackendConfig(name="ddp", timeout=300.0))
    tensors = {
        f"{layout}/{name}": tensor
        for layout, settings in LAYOUTS.items()
        for name, tensor in trainings(
            sharded(out, **settings)[1], OWN_WEIGHTS if layout == "tensor" else None
        ).items()
    }
    load = loader(out, sharded(out)[0])
    tensors |= flat({"grown": grown(load), "read": read(out, load)})
    shared = loader(out, sharded(out, **LAYOUTS["tensor"])[0], "tensor")
    tensors |= flat({"grown on tensor ranks": grown(shared)})
    save_file(tensors, out / f"rank-{communicator.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
