"""Who builds the model: slime's own provider, or a custom one, which is told neither the arguments nor the
role; and what freezes parameters by their names right after.
"""

from __future__ import annotations

import inspect
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import import_module
from megatron.training.arguments import core_transformer_config_from_args
from torch import Tensor

from slime.utils.misc import load_function


class LinearForLastLayer(torch.nn.Linear):
    """A critic's head: one value a token."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, weight: Any = None, runtime_gather_output: Any = None
    ) -> tuple[Tensor, None]:
        return super().forward(hidden).float(), None


def get_model_provider_func(args: Namespace, role: str = "actor") -> Callable[..., Any]:
    return wrap_model_provider_with_freeze(_get_model_provider_func(args, role), args)


def _get_model_provider_func(args: Namespace, role: str) -> Callable[..., Any]:
    def own(
        pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
    ) -> Any:
        return _build(args, pre_process, post_process, vp_stage)

    def provider(
        pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
    ) -> Any:
        build = own
        if args.custom_model_provider_path:
            build = load_function(args.custom_model_provider_path)
        where: dict[str, Any] = {"pre_process": pre_process, "post_process": post_process}
        if "vp_stage" in inspect.signature(build).parameters:
            where["vp_stage"] = vp_stage
        model = build(**where)
        if post_process and role == "critic":
            model.output_layer = LinearForLastLayer(model.config.hidden_size, 1)
        return model

    return provider


def _build(args: Namespace, pre_process: bool, post_process: bool, vp_stage: int | None) -> Any:
    config = core_transformer_config_from_args(args)
    if args.spec is not None:
        spec = import_module(args.spec)
        if callable(spec):
            spec = spec(args, config, vp_stage)
    else:
        spec = get_gpt_layer_local_spec(
            normalization=args.normalization, qk_layernorm=args.qk_layernorm
        )
    model = GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
    )
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight") and not name.endswith("layer_norm_weight"):
            torch.nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        # marks that Megatron sets where it draws values; by rows of each half, as Transformer Engine's
        kinds = VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear
        if isinstance(module, kinds) and module.weight is not None:  # a tied head has none
            dim = int(isinstance(module, RowParallelLinear))
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)
    return model


def wrap_model_provider_with_freeze(
    original_provider: Callable[..., Any], args: Namespace
) -> Callable[..., Any]:
    def wrapped_provider(
        pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
    ) -> Any:
        model = original_provider(
            pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        freeze_model_params(model, args)
        return model

    return wrapped_provider


def freeze_model_params(model: Any, args: Namespace) -> None:
    for name, parameter in model.named_parameters():
        if args.only_train_params_name_list:
            parameter.requires_grad = any(
                re.search(pattern, name) for pattern in args.only_train_params_name_list
            )
        if any(re.search(pattern, name) for pattern in args.freeze_params_name_list or ()):
            parameter.requires_grad = False
