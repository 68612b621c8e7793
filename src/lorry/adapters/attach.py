"""Attach adapters to a model: find the targets, put bank layers in their place, freeze the base;
and take them off again.

Works on Lorry's own decoder (whose layers are bank layers from birth) and on any torch model (its
linears are replaced by layers that share the same parameters, so the base's state-dict names do not
change).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

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
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.wrapping import is_linear_or_embedding, wrap_module
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix
from lorry.adapters.parameters.experts import (
    ExpertMatrices,
    check_experts,
    expert_layers,
    find_expert_layers,
    install_experts,
)
from lorry.adapters.parameters.weights import (
    ForeignWeight,
    find_foreign_weight,
    foreign_weight_of,
)
from lorry.adapters.spec import LAYER_NUMBER, LoraSpec, refuse_at_parameters
from lorry.adapters.variants.alora import watch_tokens
from lorry.adapters.variants.own_weights import SITE, has_own_weights
from lorry.adapters.variants.registry import further_starts
from lorry.errors import ConfigError, suggest_nearest
from lorry.families import ModelFamily

# what shards or replicates a model, by class name: to ask for the classes would import them all
DATA_PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
FSDP2 = "FSDPModule"
# what transformers before 5 called the linears of each expert, by the tensor that holds them now
UNFUSED_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


def get_bank(model: nn.Module, *, create: bool = False) -> AdapterBank:
    """The model's bank. Raises ConfigError when it has none and ``create`` is False."""
    bank: AdapterBank | None = model.__dict__.get("lorry_bank")
    if bank is None:
        if not create:
            raise ConfigError(
                "this model has no adapters; call lorry.attach(model, lorry.LoraSpec(...)) first"
            )
        bank = AdapterBank()
        model.__dict__["lorry_bank"] = bank
    return bank


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
    _refuse_wrapped(model)
    spec = spec or LoraSpec()
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
    """Raises ConfigError for terms at both sides of a tied head: they would train apart."""
    head, embed = head_and_embedding(model)
    if head in chosen and embed in chosen:
        raise ConfigError(
            f"ensure_weight_tying with {head} and {embed} both among target_modules: the two have low-rank "
            "terms of their own here; target one of them, or name them in modules_to_save"
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


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear and embedding an adapter can sit on: {path: module}."""
    return {p: m for p, m in model.named_modules() if p and _is_linear(m)}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, BankLinear | BankEmbedding) or is_linear_or_embedding(module)


def _holders(model: nn.Module) -> set[int]:
    """The ids of another library's layers that hold the base weight of a bank layer: no places of their
    own."""
    return {
        id(holder)
        for module in model.modules()
        if isinstance(module, AdaptableLayer)
        for holder in module.holders
    }


def find_adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """`find_linears` and, as bank layers, what other modules multiply with: fused experts by the path
    of the tensor, and the weight of a router by the path of its module. In model order."""
    found, holders = dict[str, nn.Module](), _holders(model)
    for path, module in model.named_modules():
        if not path or id(module) in holders:
            continue
        if _is_linear(module):
            found[path] = module
        elif (weight := find_foreign_weight(module, path)) is not None:
            found[path] = weight
        else:
            found.update(find_expert_layers(module, path))
    return found


def head_and_embedding(model: nn.Module) -> tuple[str | None, str | None]:
    """Paths of the output head and the input embedding, from the family or from transformers'
    accessors.
    """
    family: ModelFamily | None = getattr(model, "family", None)
    if family is not None:
        return family.head, family.embed
    paths = {id(m): p for p, m in model.named_modules()}
    matrices = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("output", "input")
    ]
    head, embed = (paths.get(id(m)) if m is not None else None for m in matrices)
    return head, embed


def select_modules(model: nn.Module, candidates: dict[str, nn.Module], spec: LoraSpec) -> list[str]:
    """Paths of the modules a spec names, in model order. Raises ConfigError for a name, pattern or
    layer that matches nothing.
    """
    head, embed = head_and_embedding(model)
    # never by "all-linear": a router's choice of experts is the base's unless somebody names it
    unasked: tuple[type[nn.Module], ...] = (nn.Embedding, BankEmbedding, ForeignWeight)
    if spec.target_parameters is not None:
        unasked += (ExpertMatrices,)
    inner = [p for p, m in candidates.items() if not isinstance(m, unasked) and p != head]
    wanted = spec.target_modules
    if isinstance(wanted, str) and wanted in ("auto", "all-linear"):
        family: ModelFamily | None = getattr(model, "family", None)
        chosen = (
            inner
            if wanted == "all-linear" or family is not None
            else _text_layers(model, inner, candidates)
        )
    elif isinstance(wanted, str):
        # nor by a pattern, which may mean everything of a layer
        chosen = [
            p
            for p, m in candidates.items()
            if not isinstance(m, ForeignWeight) and _full_match(wanted, p, "target_modules")
        ]
        if not chosen:
            raise ConfigError(
                f"target_modules={wanted!r} (a regular expression over whole paths) matches no layer; {_describe_known_layers(candidates)}"
            )
    else:
        chosen = []
        unfused = match_unfused_names(wanted, candidates)
        for name in wanted:
            actual = {"lm_head": head, "embed": embed}.get(name, name) or name
            hits = [p for p in candidates if _ends_with(p, actual)]
            hits += unfused.get(name, [])
            if not hits:
                hint = (
                    "; write target_modules=all-linear without a list"
                    if name == "all-linear"
                    else _half_of_experts(name, candidates)
                    or _tensor_named(model, actual)
                    or suggest_nearest(name, _leaf_names(candidates))
                )
                raise ConfigError(
                    f"target_modules names {name!r}, which matches no layer{hint}; {_describe_known_layers(candidates)}"
                )
            chosen += [h for h in hits if h not in chosen]
    chosen += _select_parameters(model, candidates, spec.target_parameters or ())
    chosen = [p for p in candidates if p in set(chosen)]
    return _filter_modules(chosen, spec, candidates)


def match_unfused_names(
    names: Collection[str], candidates: Mapping[str, nn.Module]
) -> dict[str, list[str]]:
    """{name: paths of the fused experts it stands for} of names that linears of single experts had
    (transformers before 5). Gate and up, which are one tensor now, count where both are named."""
    matched = dict[str, list[str]]()
    for path, layer in candidates.items():
        if not isinstance(layer, ExpertMatrices):
            continue
        for spelling in UNFUSED_NAMES.get(layer.leaf, ()):
            if set(spelling) <= set(names):
                for name in spelling:
                    matched.setdefault(name, []).append(path)
    return matched


def _select_parameters(
    model: nn.Module, candidates: Mapping[str, nn.Module], names: Collection[str]
) -> list[str]:
    """Paths of what `target_parameters` names. Raises ConfigError for a name that matches nothing."""
    parameters = {
        p if isinstance(m, ExpertMatrices) else f"{p}.weight": p
        for p, m in candidates.items()
        if not isinstance(m, nn.Embedding | BankEmbedding)
    }
    chosen = []
    for name in names:
        hits = [p for tensor, p in parameters.items() if _ends_with(tensor, name)]
        if not hits:
            tensors = [t for t, p in parameters.items() if not _is_linear(candidates[p])]
            known = ", ".join(dict.fromkeys(".".join(t.rsplit(".", 2)[-2:]) for t in tensors))
            raise ConfigError(
                f"target_parameters names {name!r}, which matches no parameter that an adapter can sit "
                f"on{_tensor_named(model, name) or suggest_nearest(name, parameters)}; besides the "
                f"weights of linears this model has {known or 'none'}"
            )
        chosen += hits
    return chosen


def _text_layers(
    model: nn.Module, inner: list[str], candidates: Mapping[str, nn.Module]
) -> list[str]:
    """The numbered layers of a foreign model, those of them that text reaches where the model can
    say.
    """
    numbered = [p for p in inner if LAYER_NUMBER.search(p)]
    reached: Callable[[Collection[str]], set[str]] | None = getattr(model, "reached", None)
    if reached is None:
        return numbered
    # a tensor of experts is no module: it is reached with the one that holds it
    callers = {
        p: p.rpartition(".")[0] if isinstance(candidates[p], ExpertMatrices) else p
        for p in numbered
    }
    alive = reached(set(callers.values()))
    return [p for p in numbered if callers[p] in alive]


def find_unadaptable(model: nn.Module) -> tuple[list[str], list[str]]:
    """(tensors that hold all experts of a layer at once, other matrices and larger tensors outside
    linear and embedding layers: convolutions, mixing weights): no adapter can sit on them."""
    adaptable = {
        path if isinstance(layer, ExpertMatrices) else f"{path}.weight"
        for path, layer in find_adaptable(model).items()
    }
    experts: list[str] = []
    others: list[str] = []
    holders = _holders(model)
    for path, module in model.named_modules():
        if (
            id(module) in holders
            or isinstance(module, (AdaptableLayer, nn.Embedding))
            or wrap_module(module, path) is not None
        ):
            continue
        names = [
            name
            for name, parameter in module.named_parameters(recurse=False, prefix=path)
            # the biases of fused experts are a matrix, and as little a target as any bias
            if parameter.dim() >= 2 and name not in adaptable and not name.endswith("bias")
        ]
        fused = "expert" in f"{path}.{type(module).__name__}".lower()
        (experts if fused else others).extend(names)
    return experts, others


@dataclass(frozen=True)
class SkippedModule:
    """What an adapter does not sit on although one could think so, and why."""

    what: str
    why: str


def list_skipped_modules(model: nn.Module, adapter: Adapter) -> list[SkippedModule]:
    """What `auto` and `all-linear` pass over, and experts always: "all linear layers" of a mixture
    of experts may be its attention alone."""
    experts, others = find_unadaptable(model)
    left_out, routers = list[str](), list[str]()
    for path, layer in find_adaptable(model).items():
        if isinstance(layer, ExpertMatrices) and path not in adapter.slots:
            left_out.append(path)
        elif isinstance(layer, ForeignWeight) and path not in adapter.slots:
            routers.append(f"{path}.weight")
    skipped = []
    on = f"the adapter is on {', '.join(_leaf_names(adapter.slots))}"
    if experts:
        skipped.append(
            SkippedModule(
                _describe_experts(model, experts),
                f"their module has a form that no adapter can sit on; {on}",
            )
        )
    if left_out:
        skipped.append(
            SkippedModule(_describe_experts(model, left_out), f"the targets do not name them; {on}")
        )
    if adapter.spec.target_modules not in ("auto", "all-linear"):
        return skipped
    if routers:
        skipped.append(
            SkippedModule(
                f"{len(routers)} weights such as {routers[0]}",
                "no linear layer: a router and its like are adapted where they are named",
            )
        )
    if others:
        skipped.append(
            SkippedModule(
                f"{len(others)} tensors such as {others[0]}", "they are not linear layers"
            )
        )
    if adapter.spec.target_modules == "auto" and getattr(model, "reached", None) is not None:
        head, _ = head_and_embedding(model)
        linears = find_linears(model)
        numbered = [p for p in linears if LAYER_NUMBER.search(p) and p != head]
        numbered = [
            p
            for p in numbered
            if not isinstance(model.get_submodule(p), (nn.Embedding, BankEmbedding))
        ]
        if unread := [p for p in numbered if p not in set(_text_layers(model, numbered, linears))]:
            skipped.append(
                SkippedModule(
                    f"{len(unread)} linear layers such as {unread[0]}",
                    (
                        "text gives them no gradient: they are not called, or their "
                        "output is not used"
                    ),
                )
            )
    return skipped


def _describe_experts(model: nn.Module, names: Sequence[str]) -> str:
    total = sum(p.numel() for p in model.parameters())
    share = sum(model.get_parameter(n).numel() for n in names) / total
    return f"experts ({len(names)} tensors such as {names[0]}, {share:.0%} of the base model's weights)"


def _half_of_experts(name: str, candidates: Mapping[str, nn.Module]) -> str:
    """A hint where a name is one of several that fused experts hold in one tensor."""
    for path, layer in candidates.items():
        if isinstance(layer, ExpertMatrices):
            for spelling in UNFUSED_NAMES.get(layer.leaf, ()):
                if name in spelling:
                    return f" by itself; {path} holds {' and '.join(spelling)} of all experts: name both"
    return ""


def _tensor_named(model: nn.Module, name: str) -> str:
    """A hint where a name is that of a tensor, but of none that an adapter can sit on."""
    experts, others = find_unadaptable(model)
    hits = [
        n for n in (*experts, *others) if _ends_with(n, name) or _ends_with(n, f"{name}.weight")
    ]
    if not hits:
        return ""
    what = "holds all experts of a layer" if hits[0] in experts else "is not a linear layer"
    return f"; {hits[0]} {what}, and adapters on it are not supported yet"


def _filter_modules(
    chosen: list[str], spec: LoraSpec, candidates: dict[str, nn.Module]
) -> list[str]:
    """Apply exclude_modules and layers_to_transform, and insist that every pattern of the spec
    still matches something.
    """
    excluded = spec.exclude_modules
    if isinstance(excluded, str):
        gone = [p for p in chosen if _full_match(excluded, p, "exclude_modules")]
    else:
        # a tensor of experts also by the module that holds it: `experts` leaves all of them out
        names = {
            p: (p, p.rpartition(".")[0]) if isinstance(candidates[p], ExpertMatrices) else (p,)
            for p in chosen
        }
        gone = [
            p for p in chosen if any(_ends_with(n, e) for n in names[p] for e in excluded or ())
        ]
    if excluded and not gone:
        raise ConfigError(
            f"exclude_modules={excluded!r} matches none of the chosen layers; {_describe_known_layers(dict.fromkeys(chosen))}"
        )
    paths = [p for p in chosen if p not in gone]
    if spec.layers_to_transform is not None:
        number = {p: n for p in paths if (n := spec.layer_number(p)) is not None}
        if absent := sorted(set(spec.layers_to_transform) - set(number.values())):
            have = sorted(set(number.values()))
            raise ConfigError(
                f"layers_to_transform names layer {absent[0]}; the chosen layers "
                f"are numbered {have[:1]} to {have[-1:]}"
            )
        paths = [p for p in paths if number.get(p) in spec.layers_to_transform]
    if not paths:
        raise ConfigError(
            f"target_modules and exclude_modules leave no layer; {_describe_known_layers(candidates)}"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(spec, field):
            if not any(re.match(rf"(.*\.)?({key})$", p) for p in paths):
                raise ConfigError(
                    f"{field} names {key!r}, which matches no chosen layer{suggest_nearest(key, _leaf_names(dict.fromkeys(paths)))}"
                )
    return paths


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _full_match(pattern: str, path: str, field: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as e:
        raise ConfigError(f"{field}={pattern!r} is not a valid regular expression: {e}") from e


def _leaf_names(candidates: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(p.rsplit(".", 1)[-1] for p in candidates))


def _describe_known_layers(candidates: Iterable[str]) -> str:
    return f"the layers here end in {', '.join(_leaf_names(candidates))}"


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
