"""Base weights that train: some or all of a model's own parameters as one more owner of a flat fp32
buffer, beside the adapters.

    make_weights_trainable(model, "mlp")      all, all-but-router, mlp, attention, names, or a regex; the rest is frozen
    get_base_weights(model).values         the fp32 masters; AdamW, one norm and one clip work on this one tensor

Matrices come first in the buffer, norms and biases behind them: weight decay, which HF's Trainer
keeps away from those, is one range. Every tensor begins at a multiple of 64 bytes. In an fp32 base
the parameters are views of the buffer, without a copy; in a bf16 base they are the masters rounded,
made again after every step, and a gradient is added to the fp32 one as soon as backward has made
it, and freed. A tensor with two names (a tied head) is there once and gets the gradients of both.

Of a model whose weights are cut over the ranks of a run the buffer has this rank's share of each
(`ShardedBaseWeights`); what makes the passes adds up the gradients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lorry.adapters.attach import freeze_base, get_bank
from lorry.adapters.flat_buffer import BLOCK, euclidean_norm
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.shares import WeightShares, local_share, shares_of
from lorry.adapters.mix import Mix
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.spec import LoraSpec
from lorry.adapters.targets.candidates import find_linears
from lorry.adapters.targets.selection import select_modules
from lorry.adapters.tensor_parallel.whole import WholeOnEachRank
from lorry.errors import ConfigError
from lorry.families import ModelFamily

# 64 bytes: a cache line and the widest vector register
ALIGN_VALUES = 16  # fp32 values in 64 bytes
# wide enough for a gradient; of float64 the masters are the rounded values
TRAINABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
WEIGHTS_ATTRIBUTE = "lorry_weights"
ALL_BUT_ROUTER = "all-but-router"
# of transformers' classes of mixtures: W_r of a layer, and the gate of a shared expert
ROUTER_WEIGHT = re.compile(r"\.(mlp|block_sparse_moe)\.(gate|shared_expert_gate)\.weight$")
# in models that no family describes: the parts of a path that say what a linear belongs to
HALF_PATTERNS = {
    "mlp": re.compile(
        r"(^|[._])(mlp|ffn|feed_forward|moe|experts?|fc\d|fc_(in|out)|w[123io]|(up|down|gate)_proj)([._]|$)"
    ),
    "attention": re.compile(r"(^|[._])(attn|attention)([._]|$)"),
}


@dataclass
class BaseWeights(WholeOnEachRank):
    """The base weights that a run trains. values, grads: [P] fp32; ``split``: where norms and
    biases start; ``params``: {name in the model: its parameter}, in the buffer's order;
    ``shapes``: what the buffer has of each; ``start_digest``: the base's digest before training.
    """

    name: str
    # matrices before norms and biases, so insertion order is the buffer's order
    params: dict[str, nn.Parameter] = field(repr=False)
    values: Tensor = field(repr=False)
    grads: Tensor = field(repr=False)
    split: int = field(repr=False)
    starts: list[int] = field(repr=False)
    shapes: list[torch.Size] = field(repr=False)
    start_digest: str = field(repr=False)

    def num_parameters(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.params.values())

    def split_like(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut any [P] tensor (values, moments) into views by the parameters' names."""
        # by starts, not by sizes: gaps of alignment lie between the tensors and stay zero
        parts = zip(self.params, self.starts, self.shapes, strict=True)
        return {name: flat[at : at + shape.numel()].view(shape) for name, at, shape in parts}

    def parameter_views(self, flat: Tensor) -> list[tuple[tuple[str, nn.Parameter], Tensor]]:
        """((name, parameter), its view of a [P] tensor)."""
        return list(zip(self.params.items(), self.split_like(flat).values(), strict=True))

    @property
    def kind(self) -> str:
        """Of its tensors in a checkpoint."""
        return "weights"

    @property
    def label(self) -> str:
        """For messages."""
        return "a base weight"

    def mix(self) -> Mix:
        """Its sequences have g = 0."""
        return Mix.none()

    @property
    def drops(self) -> bool:
        """The base's own dropout is off."""
        return False

    def ranges(self) -> list[tuple[slice, bool, bool]]:
        """The matrices, then norms and biases, which do not decay (as HF's Trainer has it)."""
        halves = [
            (slice(0, self.split), False, True),
            (slice(self.split, self.values.numel()), False, False),
        ]
        return [half for half in halves if half[0].start < half[0].stop]

    def targets(self) -> list[str]:
        """The tensors that train."""
        return list(self.params)

    def masters(self) -> dict[str, Tensor]:
        """Each parameter itself where it is a view of ``values``, else that view."""
        return {
            # found by memory: in an fp32 base the contract must see the parameter's own storage
            n: p.data if p.dtype == torch.float32 else view
            for (n, p), view in self.parameter_views(self.values)
        }

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """All of its parameters are the model's own."""
        return self.params

    def wanting_gradients(self) -> set[str]:
        """None besides those that the model itself lists."""
        return set()

    def bind_grads(self) -> None:
        """Let autograd accumulate into ``grads``: at once where the base is fp32, else by way of
        the hooks.
        """
        for (_, param), view in self.parameter_views(self.grads):
            param.grad = view if param.dtype == torch.float32 else None

    def held_still(self) -> AbstractContextManager[None]:
        """Nothing: it computes with the parameters themselves."""
        return nullcontext()

    @torch.no_grad()
    def touch(self) -> None:
        """Say that ``values`` was written: the parameters that are not views of it are made again,
        rounded once.
        """
        for (_, param), view in self.parameter_views(self.values):
            if param.dtype != torch.float32:
                param.copy_(view)

    def zero_grad_names(self) -> list[str]:
        """The tensors whose gradient is exactly zero."""
        return [
            name
            for name, view in self.split_like(self.grads).items()
            if not _any_nonzero(view.reshape(-1))
        ]

    def norm(self) -> float:
        """Euclidean norm of the whole gradient (inf or nan if any entry is)."""
        return euclidean_norm(self.grads)


@dataclass
class ShardedBaseWeights(BaseWeights):
    """Base weights of which each rank has some rows: masters, gradients and moments are of those. The
    compute share is the masters rounded, made again after every step."""

    shares: WeightShares = field(repr=False, kw_only=True)

    @property
    def shard(self) -> int:
        """See `ParameterSet.shard`."""
        return self.shares.shard

    def masters(self) -> dict[str, Tensor]:
        """The views of ``values``."""
        return self.split_like(self.values)

    def bind_grads(self) -> None:
        """A pass adds to ``grads`` by itself (`WeightShares.add_gradients_to`)."""

    @torch.no_grad()
    def touch(self) -> None:
        """Make the compute share again."""
        for (_, param), view in self.parameter_views(self.values):
            local_share(param).copy_(view)

    def zero_grad_names(self) -> list[str]:
        """The tensors whose gradient is exactly zero in every share."""
        views = self.split_like(self.grads).values()
        moved = torch.tensor([_any_nonzero(view.reshape(-1)) for view in views])
        counts = self.shares.add_up("gradients that are zero", moved.to(self.grads.device).float())
        return [name for name, count in zip(self.params, counts.tolist(), strict=True) if not count]

    def norm(self) -> float:
        """Of the gradient of all shares."""
        return math.sqrt(self._sum("norm of the gradient", super().norm() ** 2))

    def dot(self, a: Tensor, b: Tensor) -> float:
        """Of all shares."""
        return self._sum("inner product", super().dot(a, b))

    def _sum(self, what: str, value: float) -> float:
        own = torch.tensor([value], dtype=torch.float64, device=self.values.device)
        return float(self.shares.add_up(what, own))

    def whole_tensors(self, flat: Tensor) -> Mapping[str, Tensor]:
        """Made one by one, when they are read (`WeightShares.whole_tensors`)."""
        views = self.parameter_views(flat)
        return self.shares.whole_tensors({name: (param, view) for (name, param), view in views})

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows."""
        return whole[self.shares.local_rows(self.params[name])]


def _any_nonzero(flat: Tensor) -> bool:
    # nearly every gradient is nonzero early: the whole tensor is read only where its start is zero
    return bool(flat[:BLOCK].any()) or bool(flat.any())


def get_base_weights(model: nn.Module) -> BaseWeights | None:
    """The base weights of a model that train, if any do."""
    base_weights: BaseWeights | None = model.__dict__.get(WEIGHTS_ATTRIBUTE)
    return base_weights


def make_weights_trainable(
    model: nn.Module, trainable: str | Sequence[str] = "all", name: str = "base"
) -> BaseWeights:
    """Switch the gradients of some base weights on, and of all others off; afterwards
    `get_base_weights` finds them.

    ``trainable``: see `select_parameters`. Raises ConfigError where that matches nothing, the model
    has adapters or such weights already, or is in a format too narrow to train in.
    """
    bank = get_bank(model, create=True)
    if bank.names() or get_base_weights(model) is not None:
        what = f"the adapter {bank.names()[0]!r}" if bank.names() else "base weights that train"
        raise ConfigError(
            f"this model has {what} already, and full fine-tuning allows no adapter "
            "beside it; merge or detach it first"
        )
    shares = shares_of(model)
    if shares is not None:
        # what an earlier pass has gathered is not what trains
        shares.release()
    names = select_parameters(model, trainable)
    parameters = dict(model.named_parameters())
    # a linear with a product of its own never reads its parameters, and they would train on nothing
    products = {
        p
        for m in model.modules()
        if isinstance(m, BankLinear) and m.product
        for p in m.parameters(recurse=False)
    }
    if unread := [n for n in names if parameters[n] in products]:
        raise ConfigError(
            f"{unread[0]} cannot train: its linear has a custom product, which does "
            "not read this weight"
        )
    # fp16 overflows in gradients, and quantised bytes have none
    if untrainable := [n for n in names if parameters[n].dtype not in TRAINABLE_DTYPES]:
        dtype = str(parameters[untrainable[0]].dtype).removeprefix("torch.")
        raise ConfigError(
            f"{untrainable[0]} is {dtype}, a dtype in which base weights cannot "
            "train; load the model with dtype=bfloat16 or float32"
        )
    freeze_base(model)
    params = {
        # sorted by dimension, stable: the model's order holds inside each half
        n: parameters[n]
        for n in (
            *(n for n in names if parameters[n].dim() > 1),
            *(n for n in names if parameters[n].dim() < 2),
        )
    }
    starts, shapes, end = list[int](), list[torch.Size](), 0
    for p in params.values():
        starts.append(end)
        shapes.append(local_share(p).shape)
        # rounded up to the next multiple
        end += -(-shapes[-1].numel() // ALIGN_VALUES) * ALIGN_VALUES
    # where the first vector starts; without any, the end
    split = next((at for at, p in zip(starts, params.values(), strict=True) if p.dim() < 2), end)
    # a rank may have no row of any; the optimizer wants a range
    room = max(end, ALIGN_VALUES)
    values = torch.zeros(room, dtype=torch.float32, device=next(iter(params.values())).device)
    facts = (name, params, values, torch.zeros_like(values), split, starts, shapes)
    base_weights = (
        BaseWeights(*facts, base_digest(model))
        if shares is None
        else ShardedBaseWeights(*facts, base_digest(model), shares=shares)
    )
    grads = base_weights.split_like(base_weights.grads)
    for (path, param), view in base_weights.parameter_views(values):
        view.copy_(local_share(param))
        param.requires_grad_(True)
        if shares is not None:
            continue  # its gradients come with the passes
        if param.dtype == torch.float32:
            # fp32: the parameter moves into the buffer, no second copy of the model exists
            param.data = view
        else:
            # bf16: emptied as soon as it is complete, so at most one bf16 gradient is alive at a
            # time
            param.register_post_accumulate_grad_hook(partial(_collect_gradient, grads[path]))
    if shares is not None:
        shares.add_gradients_to({params[path]: view for path, view in grads.items()})
    base_weights.bind_grads()
    # a base in float64 computes with what the masters hold
    base_weights.touch()
    model.__dict__[WEIGHTS_ATTRIBUTE] = base_weights
    return base_weights


@torch.no_grad()
def _collect_gradient(into: Tensor, param: Tensor) -> None:
    """Take a gradient that backward has just made, and free it."""
    assert param.grad is not None
    into.add_(param.grad)
    param.grad = None


def select_parameters(model: nn.Module, trainable: str | Sequence[str]) -> list[str]:
    """Names of the parameters that are to train, in the model's order, tied ones once.

    all: every parameter (the row of a padding token among them, which transformers' own embedding
    leaves out where it is read). all-but-router: all but the routers of a mixture of experts. mlp,
    attention: weights and biases of the linears of every layer's half. Anything else is read as
    `target_modules` is: a list of module names (lm_head and embed among them) or a regular
    expression over whole paths; a module trains with its bias. Raises
    ConfigError where nothing matches, naming what exists.
    """
    names = [name for name, _ in model.named_parameters()]
    if trainable == "all":
        return names
    if trainable == ALL_BUT_ROUTER:
        others = [name for name in names if not ROUTER_WEIGHT.search(name)]
        if len(others) == len(names):
            raise ConfigError(f"trainable={ALL_BUT_ROUTER}: this model has no router; give all")
        return others
    modules = set(
        _half_paths(model, trainable)
        if isinstance(trainable, str) and trainable in HALF_PATTERNS
        else _select_by_name(model, trainable)
    )
    # by identity: a tied head matches whichever of its names was given
    wanted = {
        id(p) for path in modules for p in model.get_submodule(path).parameters(recurse=False)
    }
    return [name for name, p in model.named_parameters() if id(p) in wanted]


def _half_paths(model: nn.Module, half: str) -> list[str]:
    """The linears of a half of every layer: by the family's targets; where there is no family, by
    the paths of whatever holds a matrix (fused experts and their router are an MLP's)."""
    family: ModelFamily | None = getattr(model, "family", None)
    if family is not None:
        roles = family.roles
        targets = (
            [*roles.qkv, *roles.attn_out]
            if half == "attention"
            else [*roles.mlp_in, *roles.mlp_out]
        )
        layers: int = model.geometry.layers  # type: ignore[assignment,union-attr]  # a model with a family has a geometry
        return [family.path(target, i) for i in range(layers) for target in targets]
    matrices = {
        p: m
        for p, m in model.named_modules()
        if any(w.dim() > 1 for w in m.parameters(recurse=False))
    }
    inner = [
        path
        for path, module in matrices.items()
        if not isinstance(module, (nn.Embedding, BankEmbedding))
    ]
    # a path with words of both halves counts as attention's, so that no linear is in both
    other = HALF_PATTERNS["attention" if half == "mlp" else "mlp"]
    paths = [
        path
        for path in inner
        if HALF_PATTERNS[half].search(path) and (half == "attention" or not other.search(path))
    ]
    if not paths:
        kinds = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in inner))
        raise ConfigError(
            f"trainable={half}: no layer is recognised as such by its name; give a "
            f"list of names. The layer names end in {kinds}"
        )
    return paths


def _select_by_name(model: nn.Module, trainable: str | Sequence[str]) -> list[str]:
    if isinstance(trainable, str) and re.fullmatch(r"\w+", trainable) and trainable != "auto":
        # a single word as a regular expression would have to match a whole path and never does
        trainable = (trainable,)  # a name, not a pattern
    wanted = trainable if isinstance(trainable, str) else tuple(trainable)
    try:
        return select_modules(model, find_linears(model), LoraSpec(target_modules=wanted))
    except ConfigError as e:
        raise ConfigError(
            f"{str(e).replace('target_modules', 'trainable')}; or trainable=all, mlp or attention"
        ) from e
