"""Lorry: LoRA post-training for language models. One low-rank equation, one engine, one adapter
format.

    import lorry
    run = lorry.sft(model="smollm2-135m-instruct", data="people.jsonl", r=16, learning_rate=1e-3)
    model, tok = lorry.load(run.path)
    print(lorry.generate(model, tok, "Who is Mara Quellen?"))

The layer alone, on any torch model:

    lorry.attach(model, lorry.LoraSpec(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(lorry.lora_parameters(model), lr=1e-4)

Names are looked up on first use, so `import lorry` costs nothing and `lorry --help` imports no
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorry.adapters.attach import attach, detach, lora_parameters
    from lorry.adapters.merge import merge, unmerge
    from lorry.adapters.merging.weighted import merge_adapters
    from lorry.adapters.mix import Mix
    from lorry.adapters.peft.files import load_adapter, save_adapter
    from lorry.adapters.spec import LoraSpec
    from lorry.api import distill, generate, load, sft, unlearn
    from lorry.errors import LorryError

_HOMES = {
    "sft": "lorry.api",
    "distill": "lorry.api",
    "unlearn": "lorry.api",
    "load": "lorry.api",
    "generate": "lorry.api",
    "attach": "lorry.adapters.attach",
    "detach": "lorry.adapters.attach",
    "lora_parameters": "lorry.adapters.attach",
    "merge": "lorry.adapters.merge",
    "unmerge": "lorry.adapters.merge",
    "merge_adapters": "lorry.adapters.merging.weighted",
    "load_adapter": "lorry.adapters.peft.files",
    "save_adapter": "lorry.adapters.peft.files",
    "LoraSpec": "lorry.adapters.spec",
    "Mix": "lorry.adapters.mix",
    "LorryError": "lorry.errors",
}

__all__ = [
    "LoraSpec",
    "LorryError",
    "Mix",
    "attach",
    "detach",
    "distill",
    "generate",
    "load",
    "load_adapter",
    "lora_parameters",
    "merge",
    "merge_adapters",
    "save_adapter",
    "sft",
    "unlearn",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lorry' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
