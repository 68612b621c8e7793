"""Give a Megatron-core model its adapters: which of its linears, with which initial values; and refuse,
by name, what would not train or would be computed wrongly.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lorry.adapters.attach import freeze_base
from lorry.adapters.initialization.random_values import init_adapter
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.spec import LoraSpec
from lorry.adapters.targets.candidates import find_linears
from lorry.adapters.targets.selection import select_modules
from lorry.errors import ConfigError
from lorry.integrations.arguments import SELECTIONS, argument, spec_from_arguments
from lorry.integrations.megatron.linear import (
    NORMED_INSIDE,
    DropoutClock,
    LoraParallelLinear,
    LoraTerm,
    LoraTerms,
    add_terms,
    check_linear,
    tensor_group,
)
from lorry.models.megatron.groups import check_version
from lorry.models.megatron.layout import (
    BY_NAME,
    FAMILY,
    LINEARS,
    MegatronLinear,
    hugging_face_tree,
    projection,
    row_order,
    short_name,
    whole_sizes,
)

Mode = Literal["canonical", "fused"]
MODES: tuple[Mode, ...] = ("canonical", "fused")
Model = TypeVar("Model", bound="nn.Module | Sequence[nn.Module]")

# by name, as their packages may be absent
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "TorchFullyShardedDataParallel")
HALF = "Float16Module"
# of a TransformerConfig: (field, the values that are fine, why others are not)
CONFIG_LIMITS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("num_moe_experts", (None,), "experts have no adapters"),
    ("multi_latent_attention", (False,), "the projections of MLA have no adapters"),
    ("mtp_num_layers", (None, 0), "the layers of multi-token prediction have no adapters"),
    ("gated_linear_unit", (True,), "the MLP has to be Llama's: gate, up and down"),
    ("attention_output_gate", (False,), "linear_qkv holds a gate that no adapter knows"),
    ("use_transformer_engine_op_fuser", (False,), "it computes past the linears' forward"),
    ("delay_wgrad_compute", (False,), "weight gradients would be taken from frozen weights"),
    ("defer_embedding_wgrad_compute", (False,), "it needs the gradient of a frozen embedding"),
    ("tp_comm_overlap", (False,), "it was never run with adapters"),
    ("cuda_graph_impl", ("none", None), "it was never run with adapters"),
    ("cpu_offloading", (False,), "it was never run with adapters"),
)
# names of layers that are there and take no adapter
REFUSED_TARGETS = {
    "output_layer": "the output head",
    "lm_head": "the output head",
    "embedding": "the embedding",
    "word_embeddings": "the embedding",
    "embed_tokens": "the embedding",
    "embed": "the embedding",
    "experts": "experts",
    "shared_experts": "experts",
    "router": "a router of experts",
}


@dataclass
class MegatronAdapter:
    """The adapter of one chunk of a model. ``paths``: every projection it is on, in the whole model;
    ``linears``: those of this chunk that have terms, by (layer, path in it); ``is_new``: nothing was
    loaded since it was made."""

    spec: LoraSpec
    mode: Mode
    seed: int
    paths: tuple[str, ...]
    clock: DropoutClock
    linears: dict[tuple[int, str], LoraParallelLinear] = field(default_factory=dict, repr=False)
    is_new: bool = True


def apply_lora_to_megatron_model(model: Model, args: Any) -> Model:
    """Add adapters to a Megatron-core GPTModel as `args` say, and freeze everything else. ``model``: a
    chunk, or the list of a pipeline rank's chunks; it is changed in place and returned.

    ``args``: a namespace with the flags of `add_lora_arguments`, or a LoraSpec. Call it where the
    model is built: before DistributedDataParallel and the optimizer, which take the parameters they
    find. Raises ConfigError.
    """
    mode: Mode = getattr(args, "lora_mode", MODES[0])
    return attach_lora(
        model, spec_from_arguments(args), mode=mode, seed=argument(args, "lora_seed")
    )


def attach_lora(model: Model, spec: LoraSpec, *, mode: Mode = "canonical", seed: int = 0) -> Model:
    """`apply_lora_to_megatron_model` from a LoraSpec. ``mode``: canonical, an A for each projection of
    Hugging Face's names; or fused, one A for a fused matrix. Raises ConfigError."""
    if mode not in MODES:
        raise ConfigError(f"lora_mode is {mode!r}; it is one of {', '.join(MODES)}")
    check_version(lambda text: warnings.warn(text, stacklevel=4))
    for wrapped in [model] if isinstance(model, nn.Module) else model:
        _refuse_late(wrapped)
    chunks = list_chunks(model)
    refuse_optimizers(chunks)
    for chunk in chunks:
        _check_config(chunk, spec)
    config = chunks[0].config
    spec = _with_projections(spec)
    tree = hugging_face_tree(config)
    paths = tuple(select_modules(tree, find_linears(tree), spec))
    _check_ranks(spec, paths, whole_sizes(config))
    _check_fused(spec, mode, paths)
    for chunk in chunks:
        for layer, place, linear, _ in _targets(chunk, paths):
            check_linear(linear, place, f"layer {layer}'s {place.path}")
            row_order(config, place, tensor_group(linear).size())
    # nothing is changed before everything was checked
    for chunk in chunks:
        _attach_chunk(chunk, MegatronAdapter(spec, mode, seed, paths, DropoutClock(seed)))
    return model


def get_lora_parameters(model: nn.Module | Sequence[nn.Module]) -> list[nn.Parameter]:
    """Every parameter of the adapters on this rank, fp32, A before B, layer by layer."""
    return [
        parameter
        for chunk in list_chunks(model)
        for linear in get_adapter(chunk).linears.values()
        for _, parameter in linear.lora_parameters()
    ]


@contextmanager
def disable_lora(model: nn.Module | Sequence[nn.Module]) -> Iterator[None]:
    """The base model alone while the block runs, the reference of a policy; under torch.no_grad()
    only."""
    linears = [m for chunk in list_chunks(model) for m in get_adapter(chunk).linears.values()]
    # as they were: the end of an inner block is not that of an outer one
    before = [linear.lora.enabled for linear in linears]
    for linear in linears:
        linear.lora.enabled = False
    try:
        yield
    finally:
        for linear, enabled in zip(linears, before, strict=True):
            linear.lora.enabled = enabled


def set_lora_enabled(model: nn.Module | Sequence[nn.Module], enabled: bool) -> None:
    """Run the model with its adapters, or as its base alone, until told otherwise; for a training whose
    passes are not blocks of ours. `disable_lora` is the block."""
    for chunk in list_chunks(model):
        for linear in get_adapter(chunk).linears.values():
            linear.lora.enabled = enabled


def set_dropout_step(model: nn.Module | Sequence[nn.Module], step: int) -> None:
    """Say which optimizer step begins: masks are named by it, so that a run that is continued draws
    those it would have drawn."""
    for chunk in list_chunks(model):
        get_adapter(chunk).clock.set_step(step)


def list_chunks(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The GPTModels of a model, without what wraps them."""
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    return [_unwrap(chunk) for chunk in chunks]


def get_adapter(chunk: nn.Module) -> MegatronAdapter:
    """The adapter of a chunk, without what wraps it. Raises ConfigError."""
    adapter: MegatronAdapter | None = chunk.__dict__.get("lorry_adapter")
    if adapter is None:
        raise ConfigError(
            "this model has no adapters; call apply_lora_to_megatron_model(model, args) first"
        )
    return adapter


def refuse_optimizers(chunks: Sequence[nn.Module]) -> None:
    """Raises ConfigError if a torch optimizer already has parameters of these modules."""
    ours = {id(p) for chunk in chunks for p in chunk.parameters()}
    for candidate in gc.get_objects():
        # type(), as a proxy's isinstance may run code
        if not issubclass(type(candidate), torch.optim.Optimizer):
            continue
        groups = candidate.__dict__.get("param_groups") or ()
        if any(id(p) in ours for group in groups for p in group["params"]):
            raise ConfigError(
                f"a {type(candidate).__name__} already has this model's parameters; adapters would "
                "never train: apply LoRA before the optimizer is made"
            )


def _unwrap(chunk: nn.Module) -> nn.Module:
    while type(chunk).__name__ in (*WRAPPERS, HALF):
        chunk = chunk.get_submodule("module")
    return chunk


def _refuse_late(wrapped: nn.Module) -> None:
    """Raises ConfigError for a model in which adapters would get no gradient buffer, or that has some."""
    if "lorry_adapter" in _unwrap(wrapped).__dict__:
        raise ConfigError("this model has adapters already; a Megatron model has one")
    kinds = [type(module).__name__ for module in wrapped.modules()]
    wrapper = next((kind for kind in kinds if kind in WRAPPERS), None)
    # what DistributedDataParallel leaves on the parameters of its buffers, seen from inside it
    if wrapper is not None or any(hasattr(p, "main_grad") for p in wrapped.parameters()):
        raise ConfigError(
            f"this model is wrapped by {wrapper or WRAPPERS[0]}, whose gradient buffers are made: "
            "adapters would never train. Apply LoRA in the model provider, before get_model wraps it"
        )


def _check_config(chunk: nn.Module, spec: LoraSpec) -> None:
    config: Any = getattr(chunk, "config", None)
    if config is None or not hasattr(config, "num_query_groups"):
        raise ConfigError(
            f"{type(chunk).__name__} is no Megatron-core GPTModel: it has no TransformerConfig"
        )
    for name, allowed, why in CONFIG_LIMITS:
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} is not supported with LoRA: {why}")
    recompute = getattr(config, "recompute_granularity", None)
    modules = set(getattr(config, "recompute_modules", None) or ())
    # selective recompute of attention's core or of a norm runs none of our linears again
    if spec.lora_dropout and (recompute == "full" or (recompute and modules - RECOMPUTE_OUTSIDE)):
        raise ConfigError(
            f"lora_dropout={spec.lora_dropout} with recompute_granularity={recompute!r}: a recompute "
            "would draw the masks of another micro-batch; set lora_dropout=0 or recompute less"
        )
    if any(p.device.type == "meta" for p in chunk.parameters()):
        raise ConfigError("the model's weights are on the meta device; build it with memory first")


RECOMPUTE_OUTSIDE = {"core_attn", "layernorm"}


def _with_projections(spec: LoraSpec) -> LoraSpec:
    """The spec with Megatron's names written as the projections they fuse."""
    targets, excluded = spec.target_modules, spec.exclude_modules
    if not isinstance(targets, str):
        for name in targets:
            _check_target(name)
        targets = _translate(targets)
    elif targets not in SELECTIONS and (linear := BY_NAME.get(targets)):
        targets = linear.targets
    return replace(
        spec,
        target_modules=targets,
        exclude_modules=excluded
        if excluded is None or isinstance(excluded, str)
        else _translate(excluded),
        rank_pattern=_translate_keys(spec.rank_pattern),
        alpha_pattern=_translate_keys(spec.alpha_pattern),
    )


def _check_target(name: str) -> None:
    """Raises ConfigError for a name that is no linear of a layer."""
    for part in name.split("."):
        if what := REFUSED_TARGETS.get(part):
            raise ConfigError(
                f"lora_target_modules names {name!r} ({what}), which takes no adapter here; "
                f"{_known_names()}"
            )
    if name.rpartition(".")[2] not in {*BY_NAME, *FAMILY.targets}:
        raise ConfigError(
            f"lora_target_modules names {name!r}, which no layer has; {_known_names()}"
        )


def _known_names() -> str:
    fused = (f"{n} ({', '.join(linear.targets)})" for n, linear in BY_NAME.items())
    return f"choose from all-linear, {', '.join(fused)}"


def _translate(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        t for name in names for t in (BY_NAME[name].targets if name in BY_NAME else (name,))
    )


T = TypeVar("T")


def _translate_keys(patterns: Mapping[str, T]) -> dict[str, T]:
    return {t: value for name, value in patterns.items() for t in _translate([name])}


def _check_ranks(
    spec: LoraSpec, paths: Sequence[str], sizes: Mapping[str, tuple[int, int]]
) -> None:
    for path in paths:
        rank, (out, features) = spec.rank(path), sizes[projection(path)[1]]
        if rank > min(out, features):
            raise ConfigError(
                f"lora_r is {rank} at {path}, which is {out} x {features}: a rank above "
                f"{min(out, features)} adds nothing"
            )


def _check_fused(spec: LoraSpec, mode: Mode, paths: Sequence[str]) -> None:
    """A fused A stands for all projections of its matrix, which must then be alike."""
    if mode == "canonical":
        return
    on = set(paths)
    for layer in sorted({projection(path)[0] for path in paths}):
        for place in LINEARS:
            members = [FAMILY.path(target, layer) for target in place.targets]
            if (there := on & set(members)) and there != set(members):
                raise ConfigError(
                    f"lora_mode=fused adapts {place.name} as a whole, but of its projections only "
                    f"{', '.join(sorted(there))} are targets; use lora_mode=canonical"
                )
            if there and len({(spec.rank(m), spec.scale(m)) for m in members}) > 1:
                raise ConfigError(
                    f"lora_mode=fused has one rank and scale for {place.name} of layer {layer}; "
                    "rank_pattern or alpha_pattern tell its projections apart"
                )


def _attach_chunk(chunk: nn.Module, adapter: MegatronAdapter) -> None:
    freeze_base(chunk)
    config: Any = chunk.config
    for layer, place, linear, targets in _targets(chunk, adapter.paths):
        group = tensor_group(linear)
        terms = _terms(adapter, place, layer, targets)
        lora = LoraTerms(
            place,
            layer,
            terms,
            row_order(config, place, group.size()),
            sequence_parallel=bool(getattr(linear, "sequence_parallel", False)),
            normed_inside=type(linear).__name__ == NORMED_INSIDE,
            dropout=adapter.spec.lora_dropout,
            clock=adapter.clock,
            group=group,
        )
        values = [initial_values(adapter, layer, t, whole_sizes(config)) for t in terms]
        adapter.linears[layer, place.path] = add_terms(linear, lora, values)
    chunk.__dict__["lorry_adapter"] = adapter
    if adapter.spec.lora_dropout:
        chunk.register_forward_pre_hook(_count_micro_batch(adapter.clock))
    needs_graph = getattr(config, "recompute_granularity", None) is not None
    embedding = getattr(chunk, "embedding", None)
    if embedding is not None and (needs_graph or config.pipeline_model_parallel_size > 1):
        # recompute and pipeline stages pass gradients on only where an input wants one: below a
        # frozen embedding nothing does, and adapters would see none
        embedding.register_forward_hook(_want_gradient)


def _targets(
    chunk: nn.Module, paths: Sequence[str]
) -> Iterator[tuple[int, MegatronLinear, nn.Module, tuple[str, ...]]]:
    """(layer, place, linear, its projections that are targets) of a chunk."""
    on = set(paths)
    for layer, place, linear in list_linears(chunk):
        if targets := tuple(t for t in place.targets if FAMILY.path(t, layer) in on):
            yield layer, place, linear, targets


def list_linears(chunk: nn.Module) -> Iterator[tuple[int, MegatronLinear, nn.Module]]:
    """(number of the layer in the whole model, place, linear) of every layer in a chunk."""
    layers: Any = chunk.get_submodule("decoder.layers")
    for layer in layers:
        # Megatron counts from 1, over all stages
        number = int(layer.layer_number) - 1
        for place in LINEARS:
            try:
                yield number, place, layer.get_submodule(place.path)
            except AttributeError as e:
                raise ConfigError(f"layer {number} has no {place.path} ({e})") from e


def _terms(
    adapter: MegatronAdapter, place: MegatronLinear, layer: int, targets: tuple[str, ...]
) -> tuple[LoraTerm, ...]:
    spec = adapter.spec

    def term(targets: tuple[str, ...], suffix: str) -> LoraTerm:
        path = FAMILY.path(targets[0], layer)
        return LoraTerm(targets, spec.rank(path), spec.scale(path), suffix)

    if adapter.mode == "fused" or len(place.targets) == 1:
        return (term(targets, ""),)
    return tuple(term((target,), f"_{short_name(target)}") for target in targets)


def initial_values(
    adapter: MegatronAdapter,
    layer: int,
    term: LoraTerm,
    sizes: Mapping[str, tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Whole A [r, in] and B [out, r] from (seed, Hugging Face path): the bank's, so that tensor and
    pipeline parallel sizes do not matter. A fused A is that of its first projection."""
    features = sizes[term.targets[0]][1]
    out = sum(sizes[target][0] for target in term.targets)
    slot = AdapterSlot(
        FAMILY.path(term.targets[0], layer),
        nn.Parameter(torch.zeros(term.rank, features)),
        nn.Parameter(torch.zeros(out, term.rank)),
        term.scale,
        0.0,
    )
    init_adapter(slot, adapter.spec, adapter.seed, embedding=False)
    return slot.A.detach(), slot.B.detach()


def _count_micro_batch(clock: DropoutClock) -> Callable[[nn.Module, Any], None]:
    def count(module: nn.Module, inputs: Any) -> None:
        if module.training:
            clock.micro_batch += 1

    return count


def _want_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
