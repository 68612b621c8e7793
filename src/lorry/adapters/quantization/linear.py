"""The product of a linear whose matrix is held in few bits, and how a layer comes to have one.

    quantize_linears(model, QUANTIZATIONS["nf4"])     # a model that lies in memory whole
    hold_packed(layer, pack(weight, quantization), torch.bfloat16)   # one layer, while it is read

A matrix is opened where it is multiplied, into one buffer per shape that all linears of the model write
one after the other, so that whole it exists once. The layer's parameters are what it is packed in:
`weight` the codes, `weight_scales` and so on beside it, so that digests, devices and state dicts see all
that the base is. Nothing of it trains.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.shares import whole_weight
from lorry.adapters.layers.wrapping import wrap_module
from lorry.adapters.quantization.packed import (
    PackedDigest,
    PackedMatrix,
    Quantization,
    pack,
)
from lorry.adapters.targets.candidates import find_linears, head_and_embedding
from lorry.errors import ContractError
from lorry.kernels import matmul

_KNOWN_DIGEST = "lorry_packed_digest"


def parameter_name(part: str) -> str:
    """The parameter of a layer that holds a tensor of a packed matrix."""
    return "weight" if part == "codes" else f"weight_{part}"


class OpenBuffers(threading.local):
    """One matrix per shape, dtype and device, of each thread: what is opened into it is multiplied at
    once, before the next one is."""

    def __init__(self) -> None:
        self.buffers = dict[tuple[object, ...], Tensor]()

    def get(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """[O,I], of any values."""
        key = (shape, dtype, device)
        buffer = self.buffers.get(key)
        if buffer is None:
            # no inference tensor: the next to write it may be a step of training
            with torch.inference_mode(False):
                buffer = self.buffers[key] = torch.empty(shape, dtype=dtype, device=device)
        return buffer

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenBuffers:
        return OpenBuffers()


class QuantizedLinear:
    """A `FrozenLinear` over what its layer holds: y [T,O] of x [T,I] in ``dtype``."""

    def __init__(
        self, layer: BankLinear, packed: PackedMatrix, dtype: torch.dtype, buffers: OpenBuffers
    ) -> None:
        self.layer, self.dtype, self.buffers = layer, dtype, buffers
        self.quantization, self.shape = packed.quantization, packed.shape
        # the tensors themselves are the layer's, which may move them
        tensors, settings = packed.fields()
        self.parts = {part: parameter_name(part) for part in tensors}
        self.matrix_of: Callable[..., PackedMatrix] = partial(type(packed), **settings)

    def held_by(self, layer: BankLinear) -> QuantizedLinear:
        """The same matrix with the bias of another layer that holds it, a twin."""
        twin = copy(self)
        twin.layer = layer
        return twin

    @property
    def requires_grad(self) -> bool:
        """Whether the bias does: what is packed cannot train."""
        bias = self.layer.added_bias()
        return bias is not None and bias.requires_grad

    @property
    def packed(self) -> PackedMatrix:
        """The matrix, as the layer holds it now; of a sharded one all ranks ask together, unless a pass has
        it whole. Raises ContractError where something cast its scales."""
        # not `get_parameter`, which takes longer than the product of one row with a small matrix
        parameters: Mapping[str, nn.Parameter] = self.layer._parameters  # type: ignore[assignment]
        held = {part: parameters[name].detach() for part, name in self.parts.items()}
        # by its class, which is asked faster than for a method that it lacks
        if type(held["codes"]) is not Tensor:
            held = {part: whole_weight(tensor) for part, tensor in held.items()}
        for tensor in held.values():
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ContractError(
                    f"{self.layer.path}: the scales of a quantized matrix were cast to {tensor.dtype}; "
                    "load the model in the dtype it should compute in, and move it between devices alone"
                )
        return self.matrix_of(**held)

    def parameters(self) -> Sequence[Tensor]:
        """The bias, which an adapter may have of its own."""
        bias = self.layer.added_bias()
        return [] if bias is None else [bias]

    def open(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O,I] it computes with, a new tensor."""
        return self.packed.open(dtype)

    def matrix(self) -> Tensor:
        """[O,I] in its dtype, until the next product of this thread."""
        return self._weight()

    def forward(self, x: Tensor) -> Tensor:
        bias = self.layer.added_bias()
        if (y := self.packed.multiply(x, bias)) is not None:
            return y
        weight = self._weight().t()
        return matmul.mm(x, weight) if bias is None else matmul.addmm(bias, x, weight)

    def backward(self, g: Tensor, into: Tensor | None) -> Tensor:
        weight = self._weight()
        return matmul.mm(g, weight) if into is None else matmul.addmm_(into, g, weight)

    def parameter_gradients(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """That of the bias, if it wants one."""
        return [g.sum(0)] if self.requires_grad else []

    def _weight(self) -> Tensor:
        """The matrix [O,I], until the next product of this thread."""
        device = self.layer.weight.device
        return self.packed.open(self.dtype, self.buffers.get(self.shape, self.dtype, device))


def hold_packed(
    layer: BankLinear, packed: PackedMatrix, dtype: torch.dtype, buffers: OpenBuffers
) -> None:
    """Give a layer a packed matrix [O,I] in place of its weight, whatever the layout that had; it
    computes in ``dtype``. Of a layer that ranks share it is this rank's part."""
    layer.use_product(QuantizedLinear(layer, packed, dtype, buffers))
    for part, tensor in packed.tensors().items():
        setattr(layer, parameter_name(part), nn.Parameter(tensor, requires_grad=False))


@torch.no_grad()
def quantize_linears(model: nn.Module, quantization: Quantization, dtype: torch.dtype) -> None:
    """Pack the matrix of every linear of a frozen model but its output head, one after the other, and
    let go of the wide one; everything else is cast to ``dtype``, in which the model computes from then on.
    Linears that are not Lorry's yet become so."""
    head, _ = head_and_embedding(model)
    buffers = OpenBuffers()
    for path, found in find_linears(model).items():
        layer = found if isinstance(found, AdaptableLayer) else wrap_module(found, path)
        if path == head or not isinstance(layer, BankLinear):
            continue
        weight = layer.weight.detach()
        hold_packed(
            layer,
            pack(weight.t() if layer.transposed else weight, quantization),
            dtype,
            buffers,
        )
        if layer is not found:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
    packed = {
        id(product.layer.get_parameter(name))
        for product in quantized_linears(model).values()
        for name in product.parts.values()
    }
    for parameter in model.parameters():
        if id(parameter) not in packed and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def round_base_linears(model: nn.Module, quantization: Quantization) -> None:
    """Give every linear but the output head the values that packing would leave of its weight, in its own
    dtype and class: what another library computes with a packed base."""
    head, _ = head_and_embedding(model)
    for path, found in find_linears(model).items():
        layer = found if isinstance(found, AdaptableLayer) else wrap_module(found, path)
        if path != head and isinstance(layer, BankLinear):
            weight = layer.weight.t() if layer.transposed else layer.weight
            values = pack(weight, quantization).open(weight.dtype)
            layer.weight.copy_(values.t() if layer.transposed else values)


@torch.no_grad()
def open_linears(model: nn.Module) -> None:
    """Give every packed linear its matrix whole again, as it computes with it: a dense base, onto which
    an adapter that was trained over the packed one can be merged."""
    for product in quantized_linears(model).values():
        layer = product.layer
        weight = product.open(product.dtype)
        layer.product = None
        for name in product.parts.values():
            delattr(layer, name)
        weight = weight.t().contiguous() if layer.transposed else weight
        layer.weight = nn.Parameter(weight, requires_grad=False)


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """{path: product} of the linears whose matrix is packed."""
    return {
        path: module.product
        for path, module in model.named_modules()
        if isinstance(module, BankLinear) and isinstance(module.product, QuantizedLinear)
    }


def quantization_of(model: nn.Module) -> Quantization | None:
    """How the base's matrices are packed; None where they are not."""
    return next((p.quantization for p in quantized_linears(model).values()), None)


def quantization_facts(model: nn.Module) -> Mapping[str, str | int | bool] | None:
    """What an adapter's files say of the matrices it was trained over: format, and SHA-256 of all that is
    packed; None where they are not."""
    linears = quantized_linears(model)
    if not linears:
        return None
    digest: str | None = model.__dict__.get(_KNOWN_DIGEST)
    if digest is None:
        sums = PackedDigest()
        for path in sorted(linears):
            sums.add(path, linears[path].packed)
        digest = sums.hexdigest()
    return {**next(iter(linears.values())).quantization.facts(), "sha256": digest}


def remember_packed_digest(model: nn.Module, digest: PackedDigest) -> None:
    """Keep the digest of a frozen base, which was taken while it was read: a rank may hold parts alone."""
    model.__dict__[_KNOWN_DIGEST] = digest.hexdigest()
