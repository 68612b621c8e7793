"""The starts of weights that an adapter has in the base's place: which parameters `modules_to_save`, `bias`
and `trainable_token_indices` name in a model, what they begin as, and where they are used.

Names are matched as PEFT matches them: a module of `modules_to_save` by the end of its path, character by
character (`norm` is every layer's `input_layernorm` too).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.shares import shares_of, whole_weight
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.slices import DimensionSlice, LayerSlices
from lorry.adapters.variants.own_weights import (
    OwnRows,
    OwnTensor,
    OwnWeights,
    has_own_weights,
    run_under,
    site_at,
)
from lorry.adapters.variants.parameters import FurtherStart, Replacement, whole_shape
from lorry.errors import ConfigError, suggest_nearest
from lorry.families import ModelFamily

if TYPE_CHECKING:
    from lorry.adapters.adapter import Adapter

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name; they replace rows all the same


def saved_modules(
    model: nn.Module, name: str, spec: LoraSpec, targets: Mapping[str, AdaptableLayer]
) -> dict[str, FurtherStart]:
    """Every parameter of the modules that `modules_to_save` names, under its name in the model."""
    starts = dict[str, FurtherStart]()
    ends = Ends.of(model)
    for path in match_saved_modules(model, spec.modules_to_save or (), ends):
        module = model.get_submodule(path)
        inside = [t for t in targets if t == path or t.startswith(f"{path}.")]
        if inside:
            raise ConfigError(
                f"modules_to_save names {path}, and target_modules {inside[0]}: a module trains whole or "
                "has a low-rank adapter; leave it out of one of the two (exclude_modules)"
            )
        packed = _packed_parts(module)
        params = {name: p for name, p in module.named_parameters() if name not in packed}
        if other := _second_path(model, path):
            raise ConfigError(
                f"modules_to_save names {path}, which is {other} too: one module in two places, of which PEFT "
                "would train one; leave it out"
            )
        if kept := _saved_buffers(module):
            raise ConfigError(
                f"modules_to_save names {path}, whose {kept[0]} is no parameter but changes while it "
                "trains; name the modules inside it"
            )
        if spec.ensure_weight_tying and ends.tied and path in (ends.head, ends.embed):
            # one tensor for both sides; PEFT writes it under both names
            assert ends.embed is not None
            assert ends.head is not None
            starts[f"{ends.embed}.weight"] = _own_start(
                model, name, ends.embed, "weight", also=((ends.head, "weight"),)
            )
            continue
        for param in params:
            holder, _, leaf = f"{path}.{param}".rpartition(".")
            starts[f"{holder}.{leaf}"] = _own_start(model, name, holder, leaf)
    return starts


def _second_path(model: nn.Module, path: str) -> str | None:
    """Where a module stands besides, if it does."""
    module = model.get_submodule(path)
    paths = model.named_modules(remove_duplicate=False)
    return next((other for other, each in paths if each is module and other != path), None)


def _packed_parts(module: nn.Module) -> set[str]:
    """The scales and the like that matrices in few bits are held with: whole, they are a weight alone."""
    return {
        f"{path}.{leaf}" if path else leaf
        for path, inner in module.named_modules()
        if isinstance(inner, BankLinear) and inner.product is not None
        for leaf, _ in inner.named_parameters(recurse=False)
        if leaf not in ("weight", "bias")
    }


def biases(
    model: nn.Module, name: str, spec: LoraSpec, targets: Mapping[str, AdaptableLayer]
) -> dict[str, FurtherStart]:
    """`bias`: of every module (``all``), or of the adapter's (``lora_only``): the parameters called `bias`, as
    PEFT 0.21 has it. PEFT's name of an adapted module's is that of the layer it wraps."""
    starts = dict[str, FurtherStart]()
    if spec.bias == "none":
        return starts
    saved = match_saved_modules(model, spec.modules_to_save or (), Ends.of(model))
    for param, _ in model.named_parameters():
        holder, _, leaf = param.rpartition(".")
        of_target = holder in targets
        wanted = leaf == "bias" and (spec.bias == "all" or of_target)
        if not wanted or any(holder == p or holder.startswith(f"{p}.") for p in saved):
            continue
        own = _own_start(model, name, holder, leaf)
        starts[f"{holder}.base_layer.{leaf}" if of_target else param] = own
    return starts


def token_rows(
    model: nn.Module, name: str, spec: LoraSpec, targets: Mapping[str, AdaptableLayer]
) -> dict[str, FurtherStart]:
    """`trainable_token_indices`: rows of the embedding, or of the modules of a map. Where head and embedding
    share a weight the head has the embedding's rows, unless a map names it with others."""
    asked = spec.trainable_token_indices
    if asked is None:
        return {}
    ends = Ends.of(model)
    if not isinstance(asked, Mapping):
        if ends.embed is None:
            raise ConfigError(
                "trainable_token_indices: this model does not say which module is its embedding; give a "
                "map, {MODULE: [token ids]}"
            )
        asked = {ends.embed: asked}
    sites = {_matrix_at(model, site, ends): tuple(ids) for site, ids in asked.items()}
    if len(sites) < len(asked):
        raise ConfigError("trainable_token_indices names a module twice")
    follows = False
    if ends.tied and ends.embed in sites:
        assert ends.head is not None
        follows = sites.get(ends.head, sites[ends.embed]) == sites[ends.embed]
        if not follows and spec.ensure_weight_tying:
            raise ConfigError(
                "ensure_weight_tying, but trainable_token_indices names other tokens for the head than for "
                "the embedding"
            )
    starts = dict[str, FurtherStart]()
    saved = match_saved_modules(model, spec.modules_to_save or (), ends)
    for path, ids in sites.items():
        if follows and path == ends.head:
            continue
        users = [path, ends.head] if follows and path == ends.embed and ends.head else [path]
        for user in users:
            if user in targets or any(user == p or user.startswith(f"{p}.") for p in saved):
                other = "target_modules" if user in targets else "modules_to_save"
                raise ConfigError(
                    f"trainable_token_indices and {other} both train {user}; leave it out of one of them"
                )
        starts[f"{path}.{TOKEN_ROWS}"] = _row_start(model, name, path, ids, users)
    return starts


def rows_read_by_tokens(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """{path of an embedding: ids [n] of its rows that train} of an adapter: rows that only their own
    tokens reach, as no head has them too."""
    return {
        one.module: one.replaces.ids
        for one in adapter.further.values()
        if one.replaces is not None
        and one.replaces.ids is not None
        and all(
            isinstance(model.get_submodule(path), (nn.Embedding, BankEmbedding))
            for path, _ in one.replaces.sites
        )
    }


@dataclass(frozen=True)
class Ends:
    """Paths of a model's head and embedding, None where it does not say; ``tied``: whether they share a
    weight."""

    head: str | None
    embed: str | None
    tied: bool

    @staticmethod
    def of(model: nn.Module) -> Ends:
        """From the family, or transformers' accessors."""
        family: ModelFamily | None = getattr(model, "family", None)
        if family is not None:
            ours = [model.get_parameter(f"{p}.weight") for p in (family.head, family.embed)]
            return Ends(family.head, family.embed, ours[0] is ours[1])
        sides = [getattr(model, f"get_{s}_embeddings", lambda: None)() for s in ("output", "input")]
        paths = {id(m): p for p, m in model.named_modules()}
        head, embed = (None if side is None else paths.get(id(side)) for side in sides)
        weights: list[object] = [getattr(side, "weight", None) for side in sides]
        tied = head is not None and embed is not None and weights[0] is weights[1]
        return Ends(head, embed, tied)


def match_saved_modules(model: nn.Module, names: Sequence[str], ends: Ends) -> list[str]:
    """The outermost modules whose path ends in one of the names. Raises ConfigError for a name that
    matches none, or none with parameters."""
    chosen = list[str]()
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        actual = {"lm_head": ends.head, "embed": ends.embed}.get(name, name) or name
        hits = [path for path in paths if path.endswith(actual)]
        if not hits:
            leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            raise ConfigError(
                f"modules_to_save names {name!r}, which matches no module{suggest_nearest(name, leaves)}; "
                f"the modules here end in {', '.join(leaves)}"
            )
        if not any(True for hit in hits for _ in model.get_submodule(hit).parameters()):
            raise ConfigError(f"modules_to_save names {name!r}, which has no parameters")
        chosen += hits
    outer = set(chosen)
    return [
        path
        for path in paths
        if path in outer and not any(path.startswith(f"{other}.") for other in outer)
    ]


def _saved_buffers(module: nn.Module) -> list[str]:
    """Names of what a module's state dict has besides parameters. It is not asked for one: FSDP2 lets go of
    gathered weights then, on a process that asks alone."""
    return [
        f"{path}.{name}" if path else name
        for path, inner in module.named_modules()
        for name, buffer in inner.named_buffers(recurse=False)
        if buffer is not None and name not in inner._non_persistent_buffers_set
    ]


def _matrix_at(model: nn.Module, name: str, ends: Ends) -> str:
    """The embedding or head that a map of `trainable_token_indices` names."""
    actual = {"lm_head": ends.head, "embed": ends.embed}.get(name, name) or name
    hits = [path for path, _ in model.named_modules() if path and path.endswith(actual)]
    kinds = (nn.Embedding, nn.Linear, BankEmbedding, BankLinear)
    fitting = [path for path in hits if isinstance(model.get_submodule(path), kinds)]
    if len(fitting) != 1:
        found = f"matches {len(fitting)} of them" if fitting else "matches none"
        known = ", ".join(p for p in (ends.embed, ends.head) if p is not None)
        raise ConfigError(
            f"trainable_token_indices names {name!r}; it takes an embedding or a head, and that {found} "
            f"({known or 'the model does not say which it has'})"
        )
    return fitting[0]


def _own_start(
    model: nn.Module,
    adapter: str,
    path: str,
    leaf: str,
    *,
    also: tuple[tuple[str, str], ...] = (),
) -> FurtherStart:
    """A parameter of the module at ``path``, used there and ``also`` at others; it begins as the base's."""
    module = model.get_submodule(path)
    _refuse_layout(model, module, f"{path}.{leaf}")
    shape, own = _shape(module, leaf), OwnTensor()
    cut, is_partial = _cut(model, path, leaf)
    sites = ((path, leaf), *also)

    def use(param: nn.Parameter, slot: AdapterSlot | None) -> None:
        own.param = param
        for at, name in sites:
            _own_at(model, at, adapter).whole[name] = own

    return FurtherStart(
        shape,
        lambda _: _base_values(module, leaf),
        path,
        use,
        # as transformers' Trainer: norms and biases do not decay
        decays=len(shape) > 1,
        cut=cut,
        partial=is_partial,
        touch=own.touch,
        forget=lambda: _forget(model, adapter, [at for at, _ in sites]),
        replaces=Replacement(sites),
        also=tuple(f"{at}.{name}" for at, name in also),
    )


def _row_start(
    model: nn.Module, adapter: str, path: str, ids: tuple[int, ...], users: Sequence[str]
) -> FurtherStart:
    """Rows of the weight of the module at ``path``, used at ``users``."""
    module = model.get_submodule(path)
    _refuse_layout(model, module, f"{path}.weight")
    if isinstance(module, BankLinear) and (module.transposed or module.product is not None):
        raise ConfigError(f"trainable_token_indices: {path} is no plain matrix of token rows")
    cut, _ = _cut(model, path, "weight")
    count, width = whole_shape(_shape(module, "weight"), cut)
    for token in ids:
        if token >= count:
            raise ConfigError(
                f"trainable_token_indices names token {token}; {path} has {count} rows, 0 to {count - 1}"
            )
    rows = OwnRows(torch.tensor(ids), OwnTensor())

    def use(param: nn.Parameter, slot: AdapterSlot | None) -> None:
        rows.tensor.param = param
        for user in users:
            _own_at(model, user, adapter).rows = rows

    return FurtherStart(
        (len(ids), width),
        lambda _: _base_rows(module, rows.ids, cut),
        path,
        use,
        touch=rows.tensor.touch,
        forget=lambda: _forget(model, adapter, users),
        replaces=Replacement(tuple((user, "weight") for user in users), rows.ids),
    )


def _refuse_layout(model: nn.Module, module: nn.Module, what: str) -> None:
    """Raises ConfigError for a model whose weights are cut in a way that this process cannot join."""
    slices: LayerSlices | None = getattr(module, "slices", None)
    shared = slices is not None and slices.sums_ranks
    # our own FSDP2 walks through the layers, whoever's weights they multiply with; another's hooks do not
    foreign = shares_of(model) is None and any(
        hasattr(p, "to_local") for p in module.parameters(recurse=False)
    )
    holders: tuple[nn.Module, ...] = getattr(module, "holders", ())
    if shared or foreign or holders:
        raise ConfigError(
            f"{what}: weights that train in the base's place (modules_to_save, trainable_token_indices, "
            "bias) need the base whole in every process; use backend=single, ddp or fsdp"
        )


def _cut(model: nn.Module, path: str, leaf: str) -> tuple[tuple[int, DimensionSlice] | None, bool]:
    """How tensor-parallel ranks share a parameter of the module at ``path``: along which dimension it is cut,
    None where each has it whole, and whether of that each makes a part of the gradient."""
    family: ModelFamily | None = getattr(model, "family", None)
    if getattr(model, "ranks", None) is None or family is None:
        return None, False
    module = model.get_submodule(path)
    slices: LayerSlices | None = getattr(module, "slices", None)
    if slices is None:
        # each rank norms its own heads; all else that is whole reads what all of them have
        of_heads = (family.norms.q, family.norms.k)
        return None, any(norm is not None and path.endswith(f".{norm}") for norm in of_heads)
    if leaf == "weight":
        assert isinstance(module, AdaptableLayer)
        return module.stored_slice(), False
    # behind a sum over ranks one of them adds it
    return (None, True) if slices.rows is None else ((0, slices.rows), False)


def _shape(module: nn.Module, leaf: str) -> tuple[int, ...]:
    if leaf == "weight" and isinstance(module, BankLinear) and module.product is not None:
        outputs, inputs = module.product.shape
        return (inputs, outputs) if module.transposed else (outputs, inputs)
    return tuple(module.get_parameter(leaf).shape)


@torch.no_grad()
def _base_values(module: nn.Module, leaf: str) -> Tensor:
    """What the base has there; where it is cut over ranks (FSDP2) all of them ask together."""
    if leaf == "weight" and isinstance(module, BankLinear) and module.product is not None:
        opened: Callable[[torch.dtype], Tensor] | None = getattr(module.product, "open", None)
        if opened is None:
            raise ConfigError(f"{module.path} has a custom product, and cannot train whole")
        whole = opened(torch.float32)
        return whole.t() if module.transposed else whole
    return whole_weight(module.get_parameter(leaf))


def _base_rows(module: nn.Module, ids: Tensor, cut: tuple[int, DimensionSlice] | None) -> Tensor:
    """[n, D]: rows of the base's matrix there; of one that tensor-parallel ranks share all of them ask
    together."""
    weight = _base_values(module, "weight")
    if cut is None:
        return weight[ids]
    at, here = cut[1].local(ids)
    # a sum with zeros keeps every value
    rows = weight[at] * here[:, None].to(weight)
    assert isinstance(module, AdaptableLayer)
    assert module.slices is not None
    return module.slices.ranks.add_up(rows)


def _own_at(model: nn.Module, path: str, adapter: str) -> OwnWeights:
    """What an adapter has in place of the weights of the module at a path, which asks for it from now on."""
    module = model.get_submodule(path)
    site = site_at(module, path)
    bank = model.__dict__["lorry_bank"]
    if isinstance(module, AdaptableLayer):
        # it is told which mix a plain model(x) uses
        bank.modules.setdefault(path, module)
    elif getattr(model, "family", None) is None and "forward" not in module.__dict__:
        # Lorry's decoder asks by itself; a partial, so that a deep copy asks its own bank
        module.__dict__["forward"] = partial(run_under, module, partial(_active_call, bank))
    if (reader := _reader_of(model, path)) is not None:
        _own_at(model, reader, adapter)
    return site.adapters.setdefault(adapter, OwnWeights())


def _reader_of(model: nn.Module, path: str) -> str | None:
    """The module that reads another one's parameters and never calls it: torch's attention its out_proj."""
    parent, _, leaf = path.rpartition(".")
    return (
        parent if leaf and isinstance(model.get_submodule(parent), nn.MultiheadAttention) else None
    )


def _active_call(bank: object) -> AdapterContext:
    """The call around a foreign model, or what the bank made active."""
    active: Mix = bank.active  # type: ignore[attr-defined]  # AdapterBank, which stands on this module
    return AMBIENT_CONTEXT.get() or AdapterContext(active)


def _forget(model: nn.Module, adapter: str, paths: Sequence[str]) -> None:
    """Take an adapter's weights away from these modules."""
    readers = {reader for path in paths if (reader := _reader_of(model, path)) is not None}
    for path in (*paths, *readers):
        module = model.get_submodule(path)
        site_at(module, path).adapters.pop(adapter, None)
        forward = module.__dict__.get("forward")
        if not has_own_weights(module) and getattr(forward, "func", None) is run_under:
            del module.__dict__["forward"]
