"""adapter_model.safetensors: which tensor is which part of which layer, read completely or refused,
always as a ModelError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.shares import is_sharded, local_rows, local_share
from lorry.adapters.layers.wrapping import wrap_module
from lorry.adapters.parameters.experts import ExpertMatrices
from lorry.adapters.parameters.weights import ForeignWeight
from lorry.adapters.peft.config import match_peft_targets
from lorry.adapters.peft.parameters import NEW_HOLDER, OLD_HOLDER, match_peft_parameters
from lorry.adapters.peft.tensor_file import TensorFile
from lorry.adapters.spec import LoraSpec
from lorry.adapters.targets.candidates import find_adaptable, head_and_embedding
from lorry.adapters.targets.selection import match_unfused_names
from lorry.adapters.tensor_parallel.slices import DimensionSlice
from lorry.adapters.variants.parameters import FurtherStart
from lorry.adapters.variants.starts import Ends
from lorry.disk.safetensors_names import check_names
from lorry.errors import ModelError, suggest_nearest
from lorry.families import ModelFamily, find_family
from lorry.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

PEFT_PREFIX = "base_model.model."
LORA_TENSOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))"
)
# of a module that trains whole, as a PEFT model has it: its copy, and the base's own
WHOLE_TENSOR = re.compile(
    r"(?P<module>.+?)\.(?P<which>modules_to_save|original_module)\.(?P<leaf>.+)"
)
# PEFT wraps an adapted layer, whose base weight is then called base_layer.weight
BASE_TENSOR = re.compile(r"(?P<module>.+?)(?P<inner>\.base_layer)?\.(?P<leaf>weight|bias)")


def list_adaptable_layers(model: nn.Module) -> dict[str, AdaptableLayer]:
    """{path: layer} of every place an adapter can sit; layers of a foreign model as the bank would
    see them.
    """
    layers = {
        p: m if isinstance(m, AdaptableLayer) else wrap_module(m, p)
        for p, m in find_adaptable(model).items()
    }
    return {p: layer for p, layer in layers.items() if layer is not None}


def sort_lora_tensors(
    file: TensorFile,
    where: str,
    layers: Mapping[str, AdaptableLayer],
    rename: Callable[[str], str],
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """({module: {"A": key, "B": key}}, {name: key} of all others) of the file. An adapter may have a
    few besides its A's and B's (`read_further_values`).
    """
    parts: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for key in file.keys():  # noqa: SIM118 (not a mapping)
        body = key.removeprefix(PEFT_PREFIX) if key.startswith(PEFT_PREFIX) else ""
        if match := LORA_TENSOR.fullmatch(body):
            module, side = rename(match["module"]), match["linear"] or match["embedding"]
            if module not in layers:
                raise ModelError(
                    f"{where}: {key} belongs to a layer that this model does not "
                    f"have{suggest_nearest(module, layers)}"
                )
            if isinstance(layers[module], BankEmbedding) != bool(match["embedding"]):
                raise ModelError(
                    f"{where}: {key} does not fit {module}, which is a {type(layers[module]).__name__[4:].lower()}"
                )
            # a legacy and a current name can both map to this module
            if side in parts.setdefault(module, {}):
                raise ModelError(
                    f"{where}: {key} and {parts[module][side]} are the same matrix of {module}"
                )
            parts[module][side] = key
        else:
            others[body] = key
    for sides in parts.values():
        if len(sides) < 2:
            side = next(iter(sides))
            missing = "AB".replace(side, "")
            raise ModelError(
                f"{where}: {sides[side]} has no lora_{missing} with it; the file is incomplete"
            )
    return parts, others


def tied_as_stored(model: nn.Module, spec: LoraSpec, others: Collection[str]) -> LoraSpec:
    """The spec without `ensure_weight_tying` where the file has one side of a tied head and embedding alone:
    PEFT ties what is called embed_tokens or lm_head, and leaves others (GPT-2's) untied all the same."""
    ends = head_and_embedding(model)
    if spec.ensure_weight_tying and spec.modules_to_save:
        both = all(f"{path}.weight" in others for path in ends)
        return replace(spec, ensure_weight_tying=both)
    return spec


def name_tied_targets(
    model: nn.Module,
    spec: LoraSpec,
    file: TensorFile,
    where: str,
    parts: Mapping[str, Mapping[str, str]],
) -> LoraSpec:
    """The spec with both sides of a tied head and embedding among its targets where `ensure_weight_tying` gave
    both the same low-rank terms, one's A the other's B transposed: PEFT names the embedding alone then. They
    are terms of their own from here on. Raises ModelError where the two differ."""
    ends = Ends.of(model)
    head, embed = ends.head, ends.embed
    if not (spec.ensure_weight_tying and ends.tied) or head not in parts or embed not in parts:
        return spec
    assert head is not None
    assert embed is not None
    for side, other in ("AB", "BA"):
        ours, theirs = parts[head][side], parts[embed][other]
        if not torch.equal(file.get_tensor(ours), file.get_tensor(theirs).T):
            raise ModelError(
                f"{where}: {ours} is {theirs} transposed by its settings (ensure_weight_tying), and the file "
                "has two different ones"
            )
    wanted = spec.target_modules
    if isinstance(wanted, str):
        both = f"(?:{wanted})|{re.escape(head)}|{re.escape(embed)}"
        return replace(spec, target_modules=both, ensure_weight_tying=False)
    return replace(spec, target_modules=(*wanted, head, embed), ensure_weight_tying=False)


def read_further_values(
    model: nn.Module,
    file: TensorFile,
    where: str,
    layers: Mapping[str, AdaptableLayer],
    rename: Callable[[str], str],
    further: Mapping[str, FurtherStart],
    others: Mapping[str, str],
) -> dict[str, Tensor]:
    """{canonical name: values in fp32} of what an adapter has beside its A's and B's (``further``), from
    the file's ``others``. Base tensors that PEFT adds are compared with the model's and left out."""
    ends, values = head_and_embedding(model), dict[str, Tensor]()
    canonical = {other: name for name, start in further.items() for other in (name, *start.also)}

    def find(body: str) -> str | None:
        return canonical.get(body) or canonical.get(_renamed(body, rename))

    for body, key in others.items():
        # with bias=all PEFT writes a whole module's bias three times: by its name, the copy that trains,
        # and the base's
        whole = WHOLE_TENSOR.fullmatch(body)
        name = find(body) if whole is None else _name_of_whole(whole, find)
        if whole is not None and name is not None and whole["which"] == "original_module":
            _compare_replaced(model, further[name], file, key, where)
        elif name is not None:
            read = _read_values(file, where, key, further[name].whole_shape, name)
            if name in values and not torch.equal(values[name], read):
                raise ModelError(
                    f"{where}: {key} is one weight with {name} by its settings, and the file has two "
                    "different ones"
                )
            values[name] = read
        elif (match := BASE_TENSOR.fullmatch(body)) and (
            match["inner"] or rename(match["module"]) in ends
        ):
            layer = layers.get(rename(match["module"]))
            _check_base_tensor(model, layer, match["leaf"], file, key, where)
        else:
            raise ModelError(
                f"{where}: {key} is not part of an adapter of these settings; a file with "
                "unknown tensors is not read"
            )
    if missing := [name for name in further if name not in values]:
        raise ModelError(f"{where}: {missing[0]} is missing; the file is incomplete")
    return values


def _renamed(body: str, rename: Callable[[str], str]) -> str:
    """A tensor's name with its module's in this model (`legacy_name_mapper`)."""
    module, _, leaf = body.rpartition(".")
    return f"{rename(module)}.{leaf}"


def _name_of_whole(whole: re.Match[str], find: Callable[[str], str | None]) -> str | None:
    """The canonical name of a parameter that a `WHOLE_TENSOR` is; inside a module the adapter's name may
    still stand before it."""
    leaf: str = whole["leaf"]
    names = (find(f"{whole['module']}.{end}") for end in (leaf, leaf.partition(".")[2]))
    return next((name for name in names if name is not None), None)


def _read_values(
    file: TensorFile, where: str, key: str, wanted: Sequence[int], needs: str
) -> Tensor:
    """A tensor of the file in fp32, its shape checked before a byte is read: a wrong file may claim more
    than there is memory."""
    shape = list(file.get_slice(key).get_shape())
    if shape != list(wanted):
        raise ModelError(f"{where}: {key} is {shape}; {needs} needs {list(wanted)}")
    value = file.get_tensor(key)
    if not value.is_floating_point() or not bool(torch.isfinite(value.float()).all()):
        raise ModelError(f"{where}: {key} holds values that are not finite ({value.dtype})")
    return value.float()


def _compare_replaced(
    model: nn.Module, start: FurtherStart, file: TensorFile, key: str, where: str
) -> None:
    """Raise ModelError unless a tensor of the file is the base's weight that a parameter takes the place of."""
    assert start.replaces is not None
    path, leaf = start.replaces.sites[0]
    held = model.get_submodule(path).get_parameter(leaf)
    # what it begins as, unless other ranks would have to be asked for it
    base = held if is_sharded(held) and held.is_floating_point() else start.make_values(None)
    _compare_with_base(model, base, file, key, where, start.cut)


def _check_base_tensor(
    model: nn.Module,
    layer: AdaptableLayer | None,
    leaf: str,
    file: TensorFile,
    key: str,
    where: str,
) -> None:
    """PEFT's save_embedding_layers stores base weights too: fine if they are this base's, in
    either's precision.
    """
    base = (
        None
        if layer is None
        else layer.unmerged_weight
        if leaf == "weight" and layer.unmerged_weight is not None
        else getattr(layer, leaf, None)
    )
    cut = None if layer is None or layer.slices is None else layer.stored_slice()
    shape = list(file.get_slice(key).get_shape())
    if cut is not None and leaf != "weight":
        raise ModelError(f"{where}: {key} cannot be compared with a base that ranks share")
    has_shape = None if base is None else list(base.shape)
    if has_shape is not None and cut is not None:
        has_shape[cut[0]] = cut[1].whole
    if base is None or shape != has_shape:
        has = "no tensor of that name" if base is None else str(has_shape)
        raise ModelError(
            f"{where}: {key} is {shape}, the base model has {has}; the adapter "
            "belongs to another base model or a resized vocabulary"
        )
    _compare_with_base(model, base, file, key, where, cut)


def _compare_with_base(
    model: nn.Module,
    base: Tensor,
    file: TensorFile,
    key: str,
    where: str,
    cut: tuple[int, DimensionSlice] | None = None,
) -> None:
    """Raise ModelError unless a tensor of the file is the base's, or its part that this rank has."""
    # equal in either precision: PEFT saves the base in its dtype, which may be wider or narrower
    stored, expected = file.get_tensor(key), local_share(base).cpu()
    stored = stored if cut is None else cut[1].cut(stored, cut[0])
    stored = stored[local_rows(model, base)]
    if not (
        torch.equal(stored.to(expected.dtype), expected)
        or torch.equal(stored, expected.to(stored.dtype))
    ):
        raise ModelError(
            f"{where}: {key} differs from the weight of the base model; the adapter "
            "belongs to another base model"
        )


def check_modules(model: nn.Module, spec: LoraSpec, present: set[str], where: str) -> None:
    """The layers the config names and those the file holds must be the same ones."""
    layers = list_adaptable_layers(model)
    head, _ = head_and_embedding(model)
    # a pattern means no router, as where an adapter is made
    unasked = (
        (ExpertMatrices, ForeignWeight) if isinstance(spec.target_modules, str) else ExpertMatrices
    )
    candidates = [p for p, m in layers.items() if not isinstance(m, unasked)]
    outside = (BankEmbedding, ForeignWeight)
    inner = [p for p in candidates if not isinstance(layers[p], outside) and p != head]
    for name in spec.target_parameters or ():
        if not match_peft_parameters(replace(spec, target_parameters=(name,)), layers):
            raise ModelError(
                f"{where}: target_parameters names {name!r}, and this model has no parameter of that "
                "name that an adapter can sit on; the adapter belongs to another model"
            )
    # PEFT leaves what the config names and the file lacks at its initial values
    named = match_peft_targets(spec, candidates, inner) | match_peft_parameters(spec, layers)
    experts = _unfused_targets(spec, layers, named)
    if missing := sorted((named | experts) - present):
        # files of PEFT before 0.21 over models of transformers 5, which had none of those linears
        hint = "; if it was trained without the experts, take their names out of target_modules"
        raise ModelError(
            f"{where}: names {missing[0]} as a target ({len(missing)} such), but {ADAPTER_WEIGHTS} has no "
            f"tensors for it{hint if missing[0] in experts else ''}"
        )
    named |= experts
    if extra := sorted(present - named):
        raise ModelError(
            f"{where}: does not name {extra[0]} as a target ({len(extra)} such), but {ADAPTER_WEIGHTS} has tensors for it"
        )
    if not present:
        raise ModelError(
            f"{where}: its target_modules name no layer of this model; the adapter "
            "belongs to another model"
        )


def _unfused_targets(
    spec: LoraSpec, layers: Mapping[str, AdaptableLayer], named: Collection[str]
) -> set[str]:
    """The fused experts that a list of targets means by what their linears were called. A name that linears
    of this model have too (a shared expert's, ``named``) means those alone to PEFT, where it does not turn it
    into target_parameters."""
    if isinstance(spec.target_modules, str):
        return set()
    leaves = {path.rpartition(".")[2] for path in named}
    unfused = match_unfused_names(spec.target_modules, layers)
    return {path for name, paths in unfused.items() if name not in leaves for path in paths}


def read_lora_values(
    file: TensorFile,
    where: str,
    spec: LoraSpec,
    layers: Mapping[str, AdaptableLayer],
    parts: Mapping[str, Mapping[str, str]],
) -> dict[str, Tensor]:
    """{`MODULE.lora_A`: [R,I], `MODULE.lora_B`: [O,R]} in fp32, shapes checked before a byte is
    read.
    """
    values = {}
    for module, sides in parts.items():
        (out, into), rank = layers[module].whole_features(), spec.rank(module)
        rows = rank * layers[module].num_experts
        for side, wanted in (("A", [rows, into]), ("B", [out, rows])):
            needs = f"rank {rank} on this model's {module}"
            values[f"{module}.lora_{side}"] = _read_values(file, where, sides[side], wanted, needs)
    return values


@contextmanager
def open_adapter_weights(folder: Path) -> Iterator[safe_open]:
    """The weights file; what is wrong inside it is a ModelError too."""
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file() and (folder / "adapter_model.bin").exists():
        raise ModelError(
            f"{folder / 'adapter_model.bin'} is a pickle, which can run code and is "
            "never opened; if you trust it, convert it once with PEFT: "
            f"PeftModel.from_pretrained(base, {str(folder)!r}).save_pretrained(...)"
        )
    if not file.is_file():
        raise ModelError(
            f"{file} is missing; an adapter directory holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        )
    try:
        # safetensors' own reader keeps the last of two tensors with one name
        check_names(file)
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as e:
        raise ModelError(
            f"{file}: not a complete safetensors file ({e}); copy or save it again"
        ) from e


def family_of(model: nn.Module) -> ModelFamily | None:
    """The family whose names a model's modules have, by its config where it does not say."""
    own: ModelFamily | None = getattr(model, "family", None)
    config = getattr(model, "config", None)
    kind = (
        config.get("model_type")
        if isinstance(config, Mapping)
        else getattr(config, "model_type", None)
    )
    return own or find_family(str(kind))


def legacy_name_mapper(
    model: nn.Module, layers: Mapping[str, AdaptableLayer]
) -> Callable[[str], str]:
    """Checkpoints and models of other releases spell some modules otherwise (GPT-NeoX's head was
    `embed_out`): the name in this model.
    """
    family = family_of(model)
    spellings = {} if family is None else family.on_disk
    names = {old: current for current, old in spellings.items() if old not in layers}
    # the model may be of a transformers that still has the old name, and the adapter newer
    names |= {current: old for current, old in spellings.items() if old in layers}

    def rename(path: str) -> str:
        renamed = path.replace(OLD_HOLDER, NEW_HOLDER)
        return renamed if renamed in layers else names.get(path, path)

    return rename
