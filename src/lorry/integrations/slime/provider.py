"""slime's model with adapters in it: what `--custom-model-provider-path` names."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import wraps
from typing import Any

from lorry.errors import ConfigError
from lorry.integrations.arguments import argument
from lorry.integrations.slime.arguments import INSTALL, PLUGIN, PROVIDER, lora_argument
from lorry.integrations.slime.rebinding import Rebinding

MODEL_PROVIDER = "slime.backends.megatron_utils.model_provider"
MODEL = "slime.backends.megatron_utils.model"
# set by `install` on the process' arguments, the one thing that it and a provider share
INSTALLED = "lorry_is_installed"


def model_provider(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
) -> Any:
    """The GPTModel that slime itself would build (its spec, all its arguments), with the adapters that the
    flags describe, everything else frozen. slime calls it, before DistributedDataParallel. Raises
    ConfigError."""
    importlib.import_module("lorry.integrations.megatron")  # says what to install
    args = import_part("megatron.training.global_vars").get_args()
    if not getattr(args, INSTALLED, False):
        raise ConfigError(
            f"{PLUGIN}.model_provider is set, but --{INSTALL.replace('_', '-')} {PLUGIN}.install did not "
            "run: adapters would not reach the rollout engines; add it"
        )
    build = import_part(MODEL_PROVIDER).get_model_provider_func(_without_provider(args))
    model = build(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
    return _add_adapters(model, args)


def _add_adapters(model: Any, args: Any) -> Any:
    """New adapters by the flags, or those of `--lora-adapter-path`, to be filled when the base is
    loaded: a file's ranks, scales and targets are its own."""
    from lorry.integrations.megatron import apply_lora_to_megatron_model, attach_lora
    from lorry.integrations.megatron.files import read_lora

    path = lora_argument(args, "lora_adapter_path")
    if path is None:
        return apply_lora_to_megatron_model(model, args)
    spec, mode, _ = read_lora(model, path)
    return attach_lora(model, spec, mode=mode, seed=argument(args, "lora_seed"))


def rebind_provider(rebinding: Rebinding) -> None:
    """Let slime build a critic without the provider and without freezing, as it would if there were no
    LoRA: a provider is not told whose model it builds. Raises ConfigError."""

    def replace(own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def get_model_provider_func(args: Any, role: str = "actor") -> Any:
            if role != "critic":
                return own(args, role)
            # this process' own, by which slime freezes names once the model is built
            args.only_train_params_name_list = None
            return own(_without_provider(args), role)

        return get_model_provider_func

    rebinding.put(import_part(MODEL), "get_model_provider_func", replace)


def import_part(name: str) -> Any:
    """A module of slime's or of the Megatron-LM repository. Raises ConfigError if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConfigError(
            f"{name} cannot be imported ({e}): this plugin runs inside slime, from its repository, with "
            "Megatron-LM on PYTHONPATH; docs/slime.md says how it is started"
        ) from e


def _without_provider(args: Any) -> Any:
    """The arguments with which slime builds the model itself."""
    own = copy.copy(args)
    setattr(own, PROVIDER, None)
    return own
