"""The modules that a spec names: by names, by a pattern, or by where text passes through."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import nn

from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.parameters.experts import ExpertMatrices
from lorry.adapters.parameters.weights import ForeignWeight
from lorry.adapters.spec import LAYER_NUMBER, LoraSpec
from lorry.adapters.targets.candidates import (
    find_unadaptable,
    head_and_embedding,
    is_adaptable_linear,
)
from lorry.errors import ConfigError, suggest_nearest
from lorry.families import ModelFamily

# what transformers before 5 called the linears of each expert, by the tensor that holds them now
UNFUSED_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


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
            else text_layers(model, inner, candidates)
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
                    or suggest_nearest(name, leaf_names(candidates))
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
            tensors = [t for t, p in parameters.items() if not is_adaptable_linear(candidates[p])]
            known = ", ".join(dict.fromkeys(".".join(t.rsplit(".", 2)[-2:]) for t in tensors))
            raise ConfigError(
                f"target_parameters names {name!r}, which matches no parameter that an adapter can sit "
                f"on{_tensor_named(model, name) or suggest_nearest(name, parameters)}; besides the "
                f"weights of linears this model has {known or 'none'}"
            )
        chosen += hits
    return chosen


def text_layers(
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
                    f"{field} names {key!r}, which matches no chosen layer{suggest_nearest(key, leaf_names(dict.fromkeys(paths)))}"
                )
    return paths


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _full_match(pattern: str, path: str, field: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as e:
        raise ConfigError(f"{field}={pattern!r} is not a valid regular expression: {e}") from e


def leaf_names(candidates: Iterable[str]) -> list[str]:
    """The last parts of paths, each once."""
    return list(dict.fromkeys(p.rsplit(".", 1)[-1] for p in candidates))


def _describe_known_layers(candidates: Iterable[str]) -> str:
    return f"the layers here end in {', '.join(leaf_names(candidates))}"
