"""A linear that keeps its base weight under its own name, and groups of linears with one input.

`BankLinear` is the only linear of Lorry's own decoder and takes the place of `nn.Linear` or
`Conv1D` in any other model. What `LinearGroup` multiplies is one node of autograd (`adapters/product.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.copies import compute_copies
from lorry.adapters.layers.frozen_linear import CastLinear, DenseLinear, FrozenLinear
from lorry.adapters.layers.shares import whole_weight
from lorry.adapters.layers.slot import AdapterSlot, touch_slots
from lorry.adapters.layers.stacks import StackedAdapters
from lorry.adapters.mix import AdapterContext, LinearRouter, MixTerm
from lorry.adapters.product import Linears, LowRankFunction, PartParams, TermParams
from lorry.adapters.tensor_parallel.slices import DimensionSlice, LayerSlices, gather_inputs
from lorry.adapters.variants.magnitude import MatrixProduct
from lorry.adapters.variants.own_weights import OwnTensor, under, with_own_rows
from lorry.errors import ConfigError, ContractError


class BankLinear(AdaptableLayer):
    """y = W x + b + the bank's terms. weight [out, in], or [in, out] when ``transposed`` (GPT-2's
    Conv1D).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        transposed: bool = False,
        path: str = "",
    ) -> None:
        super().__init__(path)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.transposed = transposed
        # on its own it is a group of one; decoder layers make groups of the linears with one input
        self.group = LinearGroup([self])
        self.product: FrozenLinear | None = None

    def use_product(self, product: FrozenLinear) -> None:
        """Compute with ``product`` in place of weight and bias, which nothing reads from then on
        and which no longer train. Raises ContractError on a merged layer or another shape."""
        if self.unmerged_weight is not None:
            raise ContractError(
                f"{self.path} is merged; call unmerge(model) before changing its product"
            )
        if product.shape != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            raise ContractError(
                f"{self.path} is {expected} features (out, in), its new product {product.shape}"
            )
        # nothing reads them from now on: an optimizer that held them would decay unused weights
        for param in self.parameters(recurse=False):
            param.requires_grad_(False)
        self.product = product

    def base_product(self) -> FrozenLinear:
        """The base product, as it is now (a merge or a device may have changed it)."""
        if self.product is not None:
            return self.product
        return DenseLinear(self.weight, self.added_bias(), self.transposed)

    def base_matrix(self) -> Tensor:
        """[O,I] fp32: the matrix that the base product multiplies, opened where it is packed; of a
        sharded one all ranks ask together. Raises ConfigError where the product has none."""
        if self.product is None:
            weight = whole_weight(self.weight)
            return (weight.t() if self.transposed else weight).float()
        opened = getattr(self.product, "open", None)
        if opened is None:
            raise ConfigError(f"{self.path} has a custom product, of which no matrix is known")
        matrix: Tensor = opened(torch.float32)
        return matrix

    def matrix(self) -> Tensor:
        """As `AdaptableLayer.matrix`. Raises ConfigError where another layer multiplies it."""
        return self._matrix_product().matrix()

    def check_matrix(self) -> None:
        """As `AdaptableLayer.check_matrix`."""
        self._matrix_product()

    def _matrix_product(self) -> MatrixProduct:
        product = self.base_product()
        if not isinstance(product, MatrixProduct):
            raise ConfigError(
                f"{self.path}: use_dora needs the base's matrix, and the product of this linear does not "
                "show it; train a plain LoRA (use_dora=false)"
            )
        return product

    def added_bias(self) -> Tensor | None:
        """The bias that this process adds: of a sum over ranks one of them alone."""
        cut = self.slices
        is_sum = cut is not None and cut.columns is not None
        return None if is_sum and cut is not None and cut.ranks.rank else self.bias

    def stored_slice(self) -> tuple[int, DimensionSlice]:
        slices = self.slices
        assert slices is not None
        dim, part = (0, slices.rows) if slices.rows is not None else (1, slices.columns)
        assert part is not None
        return (1 - dim if self.transposed else dim), part

    def trainable_base_tensors(self) -> list[Tensor]:
        """What of the base product trains, in the order of `FrozenLinear.parameter_gradients`."""
        own = (self.weight, self.added_bias())
        tensors = own if self.product is None else self.product.parameters()
        return [t for t in tensors if t is not None and t.requires_grad]

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.weight.dtype if self.product is None else self.product.dtype

    @property
    def in_features(self) -> int:
        return self.base_product().shape[1]

    @property
    def out_features(self) -> int:
        return self.base_product().shape[0]

    def forward(
        self, x: Tensor, call: AdapterContext | None = None, site: str | None = None
    ) -> Tensor:
        """x [..., in] -> [..., out]. ``site`` names the input for dropout; layers that share an
        input pass the same one.
        """
        call = self.resolve(call)
        if (own := under(self, call)) is not self:
            return with_own_rows(own, x, own.forward(x, call, site))
        # without a term plain torch, which also fuses the bias and serves double backward
        if self.product is None and self.slices is None and not self.terms(call):
            return F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)
        rows, dtype = x.reshape(-1, x.shape[-1]), None
        if torch.is_autocast_enabled(x.device.type) and self.dtype != torch.float64:
            # as autocast does with every linear; our own backward runs outside of it
            dtype = torch.get_autocast_dtype(x.device.type)
            rows = rows.to(dtype)
        call = self._with_own_gates(call, rows)
        (y,) = self.group.forward(rows, call, site or self.path, dtype)
        if y.requires_grad and any(slot.magnitude is not None for slot, *_ in self.terms(call)):
            # backward reads it, and a model of somebody else's may change it in place (`x += residual`)
            y = y.clone()
        return y.view(*x.shape[:-1], -1) if x.dim() != 2 else y

    def use_own_weights(self, whole: Mapping[str, OwnTensor]) -> None:
        """Of a twin (`variants.own_weights.under`): compute with an adapter's weights."""
        self.group = LinearGroup([self])
        if "weight" in whole:
            self.product = None
        elif self.product is not None and "bias" in whole:
            held_by: Callable[[BankLinear], FrozenLinear] | None = getattr(
                self.product, "held_by", None
            )
            if held_by is None:
                raise ContractError(f"{self.path} has a custom product, which reads no other bias")
            self.product = held_by(self)

    def _with_own_gates(self, call: AdapterContext, x: Tensor) -> AdapterContext:
        """The call with the gates that a router of the linears makes of x [T,in], what this one
        reads; any other call as it is."""
        router = call.router
        routed = any(t.route is not None and t.adapter in self.slots for t in call.mix.terms)
        if not routed or not isinstance(router, LinearRouter):
            return call
        gates = router.linear_gates([self.path], gather_inputs(x, self.slices))
        return replace(call, mix=call.mix.with_token_gates(gates))

    def delta(self, slot: AdapterSlot) -> Tensor:
        """s B A in fp32, in the layout of the stored weight."""
        a, b = slot.factors()
        product = (b @ a).mul_(slot.scale)
        return product.t() if self.transposed else product


class LinearGroup:
    """Linears that read the same input, and the stacked compute copies of their adapters in the
    base's dtype.

    The copies are remade after every backward pass and whenever a master's version has moved: an
    optimizer of the user's own that updates the masters, even one that no version counter sees
    (fused AdamW, `p.data.add_`), can never train a stale copy. Whoever else writes the memory under
    the masters calls `Adapter.touch`. In the masters' own dtype products read them as they lie, and a
    write that a version counter sees between forward and backward is refused, as torch does.
    """

    def __init__(self, linears: Sequence[BankLinear]) -> None:
        self.linears = linears

    def trainable_base_tensors(self) -> list[Tensor]:
        """What of the base products trains."""
        return [t for linear in self.linears for t in linear.trainable_base_tensors()]

    def base_products(self, dtype: torch.dtype | None = None) -> list[FrozenLinear]:
        """The base products, as they are now; in another dtype than their own where one is given."""
        products = [linear.base_product() for linear in self.linears]
        if dtype is None:
            return products
        return [p if p.dtype == dtype else CastLinear(p, dtype) for p in products]

    @property
    def slices(self) -> LayerSlices | None:
        """How they are cut over ranks: as alike as their input is."""
        return self.linears[0].slices

    def forward(
        self, x: Tensor, call: AdapterContext, site: str, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """x [T,I] -> y [T,O] of each linear, one node of autograd. ``dtype``: of x and y, where that
        is not the base's own (autocast)."""
        stacks, terms = self.stacks(call, site, dtype=dtype)
        linears = Linears(self.base_products(dtype), stacks, self.slices)
        base = self.trainable_base_tensors()
        return list(LowRankFunction.apply(x, linears, *TermParams.flat(terms), *base))

    def stacks(
        self,
        call: AdapterContext,
        site: str,
        *,
        routed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> tuple[list[StackedAdapters], list[TermParams[Tensor | None]]]:
        """What the call's terms need here, and their masters and gates. ``routed``: whether the
        call's router may be asked here; ``dtype``: of the compute copies, the base's own where
        None. Raises ContractError for a term of its elsewhere."""
        dtype = dtype or self.linears[0].dtype
        stacks, terms = list[StackedAdapters](), list[TermParams[Tensor | None]]()
        for linear in self.linears:
            # all of them before any product: half a group computed would be memory for nothing
            linear.terms(call)  # refuses a merged layer
        # a merged layer's weight holds the terms of the base already
        of_base = [
            t
            for linear in self.linears
            if linear.unmerged_weight is None
            for t in linear.base_terms
        ]
        for term in dict.fromkeys(of_base):
            self._add_stack([term], call, site, dtype, stacks, terms)
        for alike in self._alike(call, routed=routed):
            self._add_stack(alike, call, site, dtype, stacks, terms)
        return stacks, terms

    def _alike(self, call: AdapterContext, *, routed: bool) -> list[list[MixTerm]]:
        """The call's terms that have a slot here; together those that one product computes: of the
        same tokens and dropout rate, and with gates from the same place."""
        groups: dict[object, list[MixTerm]] = {}
        for term in call.mix.terms:
            slot = next(
                (m.slots[term.adapter] for m in self.linears if term.adapter in m.slots), None
            )
            if slot is None:
                continue
            per_token = isinstance(term.gate, Tensor)
            if term.route is not None and call.router is None:
                # without its gate the term would count in full
                raise ContractError(
                    f"{self.linears[0].path}: the adapter {term.adapter!r} is an "
                    "expert of a router, but the mix has no router (one of the "
                    "prompt makes its gates before the layers run: "
                    "`with_prompt_gates`)"
                )
            if term.route is not None and (not routed or per_token):
                raise self._unroutable(term)
            # one adapter has one dropout rate, so its first slot speaks for the group
            rate = slot.dropout if call.noise is not None else 0.0
            rows = None if term.rows is None else (term.rows.start, term.rows.stop)
            # a DoRA scales what it is added to: by itself
            alone = slot.magnitude is not None and term.adapter
            key = (rows, rate, per_token, term.route is not None, alone)
            groups.setdefault(key, []).append(term)
        return list(groups.values())

    def _add_stack(
        self,
        group: Sequence[MixTerm],
        call: AdapterContext,
        site: str,
        dtype: torch.dtype,
        stacks: list[StackedAdapters],
        terms: list[TermParams[Tensor | None]],
    ) -> None:
        """Put what these terms (`_alike`) need here behind the others."""
        slots = [
            (i, k, linear.slots[term.adapter])
            for i, linear in enumerate(self.linears)
            for k, term in enumerate(group)
            if term.adapter in linear.slots
        ]
        first = group[0]
        routed, gates = (
            first.route is not None,
            [t.gate for t in group if isinstance(t.gate, Tensor)],
        )
        # a constant g goes into the scale (no work per token); a tensor stays a gate with a gradient
        constants = [1.0 if isinstance(t.gate, Tensor) else t.gate for t in group]
        # which of the gates is a slot's
        columns = None
        if routed:
            assert call.router is not None
            # a router of the linears has a block of columns for each of them
            step = len(call.router.adapters) if isinstance(call.router, LinearRouter) else 0
            columns = [i * step + (group[k].route or 0) for i, k, _ in slots]
        elif gates:
            columns = [k for _, k, _ in slots]
        rate = slots[0][2].dropout if call.noise is not None else 0.0
        columns_here = None if self.slices is None else self.slices.columns
        dropout = (
            call.noise.at(site, rate, columns_here) if call.noise is not None and rate else None
        )
        tokens, term_rows = slice(None) if first.rows is None else first.rows, None
        if (
            # gates are [rows] of the term, which widened rows would no longer match
            columns is None
            and first.rows is not None
            and dtype == torch.bfloat16
            and slots[0][2].A.device.type == "cpu"
        ):
            # only oneDNN's bf16 products are compiled per shape; elsewhere wider rows would be
            # waste
            tokens, term_rows = align_rows(first.rows)
        masters = [slot for _, _, slot in slots]
        # a DoRA has a magnitude at each, any other adapter a bias or nothing
        scaled = masters[0].magnitude is not None
        own = [(j, s.magnitude if scaled else s.bias) for j, s in enumerate(masters)]
        vectors = [(j, vector) for j, vector in own if vector is not None]
        if scaled:
            for i, _, _ in slots:
                self.linears[i].refuse_mixed_magnitude(call, first)
            # biases may: a magnitude leaves them as they are
            if any(t.dim() > 1 for t in self.trainable_base_tensors()):
                raise ContractError(
                    f"{self.linears[0].path}: base weights do not train beside a DoRA adapter"
                )
        stacks.append(
            StackedAdapters(
                tokens,
                len(slots),
                partial(compute_copies, self.linears, slots, dtype, constants, columns),
                dropout,
                partial(touch_slots, masters),
                term_rows,
                routed,
                [j for j, _ in vectors],
                scaled,
            )
        )
        terms.append(
            TermParams(
                tuple(PartParams(slot.lora_A, slot.B) for slot in masters),
                torch.stack(gates, 1) if gates else None,
                tuple(vector for _, vector in vectors),
            )
        )

    def _unroutable(self, term: MixTerm) -> ContractError:
        where = f"{self.linears[0].path}: the adapter {term.adapter!r} has gates of a layer router"
        if isinstance(term.gate, Tensor):
            return ContractError(f"{where} and a gate of its own; give the term a number")
        return ContractError(
            f"{where}, but this linear is not in a decoder layer; remove it from target_modules"
        )


def align_rows(rows: slice) -> tuple[slice, slice]:
    """Some rows, widened to multiples of 64, and where they lie among those: oneDNN compiles a
    product anew for every shape it meets, and the shares of several adapters in a batch would have
    ever new ones.
    """
    # 64: coarse enough for few distinct shapes, and at most 126 rows of waste a term
    start = rows.start // 64 * 64
    return slice(start, -(-rows.stop // 64) * 64), slice(rows.start - start, rows.stop - start)
