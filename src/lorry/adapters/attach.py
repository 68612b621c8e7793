"""Attach adapters to a model: put bank layers in the place of the targets (targets/), freeze the base;
and take them off again.

Works on Lorry's own decoder (whose layers are bank layers from birth) and on any torch model (its
linears are replaced by layers that share the same parameters, so the base's state-dict names do not
change).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.bank import AdapterBank
from lorry.adapters.initialization.initialize import (
    OriginalWeight,
    initialize_adapter,
    require_sources,
)
from lorry.adapters.initialization.recording import RunModel
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.wrapping import wrap_module
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix
from lorry.adapters.parameters.experts import (
    ExpertMatrices,
    check_experts,
    expert_layers,
    install_experts,
)
from lorry.adapters.parameters.weights import (
    ForeignWeight,
    foreign_weight_of,
)
from lorry.adapters.spec import LoraSpec, refuse_at_parameters
from lorry.adapters.targets.candidates import find_adaptable, find_linears
from lorry.adapters.targets.selection import select_modules
from lorry.adapters.variants.alora import watch_tokens
from lorry.adapters.variants.own_weights import SITE, has_own_weights
from lorry.adapters.variants.registry import further_starts
from lorry.adapters.variants.starts import Ends
from lorry.errors import ConfigError, describe_value, suggest_nearest

# what shards or replicates a model, by class name: to ask for the classes would import them all
FSDP1, FSDP2 = "FullyShardedDataParallel", "FSDPModule"
DATA_PARALLEL = ("DistributedDataParallel", FSDP1, "DeepSpeedEngine")


def get_bank(model: nn.Module, *, create: bool = False) -> AdapterBank:
    """The model's bank. Raises ConfigError when it has none and ``create`` is False, or is no model."""
    require_model(model)
    bank: AdapterBank | None = model.__dict__.get("lorry_bank")
    if bank is None:
        if not create:
            raise ConfigError(
                "this model has no adapters; call lorry.attach(model, lorry.LoraSpec(...)) first"
            )
        bank = AdapterBank()
        model.__dict__["lorry_bank"] = bank
    return bank


def require_model(model: object) -> None:
    """Raises ConfigError for what is no torch module: a person's mistake at a public function."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str | os.PathLike):
        remedy = f"open it first: model, tokenizer = lorry.load({os.fspath(model)!r})"
    elif isinstance(model, tuple) and any(isinstance(each, nn.Module) for each in model):
        remedy = "lorry.load gives two: model, tokenizer = lorry.load(...)"
    else:
        remedy = "give the torch model, as lorry.load or transformers open it"
    raise ConfigError(f"expected a torch model, got {describe_value(model)}; {remedy}")


def _require_spec(spec: object) -> None:
    """Raises ConfigError for what is no LoraSpec: PEFT's configuration, a map of its fields, a name."""
    if isinstance(spec, LoraSpec):
        return
    if isinstance(spec, Mapping):
        remedy = "write lorry.LoraSpec(**settings)"
    elif hasattr(spec, "peft_type"):
        remedy = "lorry.LoraSpec has PEFT's names: lorry.LoraSpec(r=..., lora_alpha=..., target_modules=...)"
    else:
        remedy = "the adapter's name comes third: lorry.attach(model, lorry.LoraSpec(r=16), 'name')"
    raise ConfigError(f"spec is {describe_value(spec)}, which is no lorry.LoraSpec; {remedy}")


def default_context(model: nn.Module) -> AdapterContext:
    """What a plain `model(x)` uses: the ambient call if one is set, else the bank's active mix,
    without dropout.
    """
    bank: AdapterBank | None = model.__dict__.get("lorry_bank")
    return AMBIENT_CONTEXT.get() or AdapterContext(Mix.none() if bank is None else bank.active)


def attach(
    model: nn.Module,
    spec: LoraSpec | None = None,
    name: str = "default",
    *,
    seed: int = 0,
    modules: Iterable[str] | None = None,
    trainable: bool = True,
    run_model: RunModel | None = None,
    original: OriginalWeight | None = None,
    initialize: bool = True,
    from_file: bool = False,
) -> Adapter:
    """Give the model one more adapter and freeze everything else. ``modules`` (full paths)
    overrides the spec's targets; ``trainable=False``: it is frozen too, and never has memory for
    gradients.

    ``run_model``: for an initialisation from rows (eva, corda, lora_ga), what runs the model on some
    of yours, for lora_ga with the loss's ``backward()``; ``original``: for loftq, from a layer's path to its weight
    [out, in] before it was packed; ``initialize=False`` leaves such a start to a later `initialize_adapter`;
    ``from_file``: all values of the adapter are about to be written. Of a base that is cut over ranks one alone can
    attach it then: nothing of the base is asked for.

    A plain ``model(x)`` then uses it (g = 1). Raises ConfigError if a target matches nothing
    (naming what exists), if the name is taken, if the model is merged, if something that shards
    or replicates it has it already, or if it cannot be initialised so; nothing is attached then.
    """
    require_model(model)
    _refuse_wrapped(model)
    spec = LoraSpec() if spec is None else spec
    _require_spec(spec)
    if initialize:
        require_sources(spec, run_model, original)
    candidates = find_adaptable(model)
    chosen = list(modules) if modules is not None else select_modules(model, candidates, spec)
    # of a file it says no more than that its matrices are each other's, which they are
    if modules is None and spec.ensure_weight_tying:
        _refuse_tied_terms(model, chosen)
    if missing := [m for m in chosen if m not in candidates]:
        raise ConfigError(
            f"no linear or embedding layer named {missing[0]!r} in this model{suggest_nearest(missing[0], candidates)}"
        )
    bank = get_bank(model, create=True)
    if bank.before_merge is not None:
        raise ConfigError(
            "this model is merged; call unmerge(model) before attaching another adapter"
        )
    bank.refuse_name(name)
    at_parameters = [
        m for p in chosen if isinstance(m := candidates[p], ExpertMatrices | ForeignWeight)
    ]
    for layer in at_parameters:
        refuse_at_parameters(spec, layer.path)
    check_experts(m for m in at_parameters if isinstance(m, ExpertMatrices))
    freeze_base(model)
    targets = {path: _ensure_bank_layer(model, path, candidates[path]) for path in chosen}
    _leave_fast_path(model)
    if trainable:
        _refuse_half(spec, targets)
    further = further_starts(model, name, spec, targets)
    _refuse_two_forwards(model, {start.module for start in further.values()})
    adapter = bank.add(
        name, spec, targets, seed=seed, trainable=trainable, further=further, from_file=from_file
    )
    if spec.alora_invocation_tokens:
        watch_tokens(model, bank)
    if not initialize:
        return adapter
    try:
        return initialize_adapter(bank, name, seed=seed, run_model=run_model, original=original)
    except BaseException:
        detach(model, name)
        raise


def _leave_fast_path(model: nn.Module) -> None:
    """Let torch's encoder layers call the layers inside them. While nothing trains they compute with these
    layers' parameters themselves, past every adapter, unless their activation is none that they know."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def _refuse_two_forwards(model: nn.Module, owned: Collection[str]) -> None:
    """Raises ConfigError where a module with adapters at its parameters also has weights of an
    adapter's own, or is to get some (``owned``: paths): either takes the place of its forward."""
    for path, module in model.named_modules():
        layers = [*expert_layers(module).values(), foreign_weight_of(module)]
        if any(layer is not None for layer in layers) and (
            path in owned or has_own_weights(module)
        ):
            raise ConfigError(
                f"{path} has adapters at its parameters, and modules_to_save or bias give it weights of "
                "an adapter's own; leave one of the two out"
            )


def _refuse_half(spec: LoraSpec, targets: Mapping[str, AdaptableLayer]) -> None:
    """Raises ConfigError for a layer of which one half cannot train alone."""
    if len(spec.train) == 2:
        return
    for path, layer in targets.items():
        if layer.slices is not None:
            raise ConfigError(
                f"train={spec.train[0]} is for layers that a process has whole; leave "
                "backend.tensor_parallel out, or train both halves"
            )
        if isinstance(layer, BankEmbedding):
            raise ConfigError(
                f"train={spec.train[0]} is for linear layers, and {path} is an embedding, whose A begins "
                "at zero; leave it out of target_modules, or train both halves"
            )


def _refuse_tied_terms(model: nn.Module, chosen: Collection[str]) -> None:
    """Raises ConfigError for low-rank terms at a side of a tied head and embedding: PEFT, which reads the
    setting too, gives the other side the same ones, and here each side has its own or none."""
    ends = Ends.of(model)
    if ends.tied and (adapted := [end for end in (ends.head, ends.embed) if end and end in chosen]):
        raise ConfigError(
            f"ensure_weight_tying with {' and '.join(adapted)} among target_modules: the low-rank terms of "
            f"{ends.embed} and {ends.head} are apart here; leave ensure_weight_tying out, or name both in "
            "modules_to_save"
        )


def find_wrapper(model: nn.Module, names: Collection[str]) -> str | None:
    """The first of these classes of torch.distributed or DeepSpeed that a module of the model is
    of; None where none is.
    """
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in names and kind.__module__.startswith(("torch.", "deepspeed.")):
                return kind.__name__
    return None


def _refuse_wrapped(model: nn.Module) -> None:
    """Raises ConfigError for a model that somebody's trainer has already: FSDP would not find the
    layers that are put in, and nobody would average the adapter's gradients.
    """
    # Lorry's own decoder has its bank layers before anything shards it
    ours = any(isinstance(module, AdaptableLayer) for module in model.modules())
    names = DATA_PARALLEL if ours else (*DATA_PARALLEL, FSDP2)
    if wrapper := find_wrapper(model, names):
        what = "fully_shard" if wrapper == FSDP2 else wrapper
        raise ConfigError(
            f"{what} has this model already; attach the adapter before it: load the model, "
            f"lorry.attach(model, ...), then {what}"
        )


def wrap_layers(model: nn.Module) -> None:
    """Put a bank layer in the place of every linear and embedding of a foreign model, for good:
    adapters come and go, the modules stay."""
    for path, module in find_linears(model).items():
        _ensure_bank_layer(model, path, module).replaced = ()


def detach(model: nn.Module, name: str = "default") -> None:
    """Remove an adapter; with the last one gone, foreign models get their own layers back.

    Raises ConfigError if there is no such adapter, or if the model is merged.
    """
    bank = get_bank(model)
    if bank.before_merge is not None:
        raise ConfigError("this model is merged; call unmerge(model) before detaching an adapter")
    bank.remove(name)
    attached = (*bank.base_adapters.values(), *bank.adapters.values())
    used = {path for adapter in attached for path in adapter.slots}
    unused = [p for p, m in bank.modules.items() if p not in used and not has_own_weights(m)]
    for path in unused:
        layer = bank.modules.pop(path)
        if isinstance(layer, ExpertMatrices | ForeignWeight):
            layer.release()
        for original in layer.replaced:
            _replace_module(model, path, original)


def freeze_base(model: nn.Module) -> None:
    """Switch gradients off for every parameter of the base; adapters are not parameters of the
    model and stay on.
    """
    for param in model.parameters():
        param.requires_grad_(False)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The fp32 masters of every adapter, for an optimizer of your own:
    `torch.optim.AdamW(lora_parameters(model), lr=1e-4)`.

    Those of frozen adapters (`requires_grad` off) are left out: weight decay would change them.
    """
    return [p for p in get_bank(model).parameters() if p.requires_grad]


def _ensure_bank_layer(model: nn.Module, path: str, module: nn.Module) -> AdaptableLayer:
    """The bank layer at a path, put there if the model still has its own."""
    if isinstance(module, ExpertMatrices):
        return install_experts(module)
    if isinstance(module, ForeignWeight):
        module.install()
    if isinstance(module, AdaptableLayer):
        return module
    layer = wrap_module(module, path)
    assert layer is not None, path
    layer.replaced = (module,)
    layer.train(module.training)
    if (site := module.__dict__.get(SITE)) is not None:
        # the very site: whichever of the two stands there, adapters with weights of their own have them
        layer.__dict__[SITE] = site
    _replace_module(model, path, layer)
    return layer


def _replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
