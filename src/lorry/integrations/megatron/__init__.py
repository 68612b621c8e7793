"""LoRA on Megatron-core's linears (`pip install 'lorry[megatron]'`), inside a training that is
Megatron's own: its DistributedDataParallel, its optimizer, its pipeline schedule.

    model = GPTModel(...)                              # in the model provider
    load_hf_weights(model, "models/Qwen3-0.6B")        # or a Megatron checkpoint, later
    model = apply_lora_to_megatron_model(model, args)  # before DistributedDataParallel
    ...
    save_lora(model, "adapters/step-100")              # PEFT's files, at any layout

docs/megatron.md is the manual.
"""

from lorry.errors import ConfigError

try:
    # an extra of the package: importing this package is how one asks for it
    import megatron.core as _core  # noqa: F401
except ImportError as e:
    raise ConfigError(
        f"megatron-core is not installed ({e}); run: pip install 'lorry[megatron]'"
    ) from e

from lorry.integrations.megatron.arguments import add_lora_arguments
from lorry.integrations.megatron.attach import (
    apply_lora_to_megatron_model,
    attach_lora,
    disable_lora,
    get_lora_parameters,
    set_dropout_step,
)
from lorry.integrations.megatron.distributed import load_distributed
from lorry.integrations.megatron.export import save_hf_weights
from lorry.integrations.megatron.files import load_lora, save_lora
from lorry.integrations.megatron.hf_weights import load_hf_weights
from lorry.integrations.megatron.merge import merged_named_parameters
from lorry.integrations.megatron.optimizer import loraplus_overrides

__all__ = [
    "add_lora_arguments",
    "apply_lora_to_megatron_model",
    "attach_lora",
    "disable_lora",
    "get_lora_parameters",
    "load_distributed",
    "load_hf_weights",
    "load_lora",
    "loraplus_overrides",
    "merged_named_parameters",
    "save_hf_weights",
    "save_lora",
    "set_dropout_step",
]
