"""What stands between the matrix products of a layer: norms, rotary positions, activations; forward
and backward.

Each has one face and two implementations: a C++ kernel (bfloat16 and float32 on the CPU) or plain torch of the
same maths. Nothing is kept for backward but the inputs: these are cheap to do again. T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorry.kernels import call_kernel, kernel_for, load_library

aten = torch.ops.aten


def supports_pointwise_kernels(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: contiguous bfloat16 or float32 on the CPU, all alike,
    and a library to call.
    """
    # what the kernels are compiled for; every other dtype takes the plain torch beside the call
    dtype = tensors[0].dtype
    return (
        dtype in (torch.bfloat16, torch.float32)
        and all(t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        and load_library() is not None
    )


def promote_to_fp32(x: Tensor) -> Tensor:
    """At least fp32: sums of a bf16 model are fp32, those of a float64 model stay float64."""
    return x if x.dtype == torch.float64 else x.float()


SPARE_BYTES = 256  # see `empty_scratch_like`


def empty_scratch_like(x: Tensor) -> Tensor:
    """An uninitialised tensor like x for what is soon freed, in storage that is SPARE_BYTES larger.

    glibc serves an aligned request of n bytes only from a free block of n + 96 or more: the block
    that a passing tensor leaves would fit no lasting one of the same size behind it, and each layer
    would leave such gaps (SmolLM2-135M, 512 tokens, float32: 1133 where it was 1186 to 1200 MiB).
    """
    return x.new_empty(x.numel() + SPARE_BYTES // x.element_size()).resize_(x.shape)


class DecoderNorm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm over the last dimension, in fp32, with the
    family's epsilon. Frozen.
    """

    def __init__(self, kind: str, width: int, eps: float) -> None:
        super().__init__()
        # empty: always overwritten from a checkpoint
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer" else None
        self.eps = float(eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], with gradients for x and, where they train, weight and bias."""
        params = [self.weight] if self.bias is None else [self.weight, self.bias]
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params)):
            return NormFunction.apply(x, self, self.weight, self.bias)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """`forward` without a graph."""
        if self.bias is not None:
            return F.layer_norm(x, (self.weight.numel(),), self.weight, self.bias, self.eps)
        if supports_pointwise_kernels(x, self.weight):
            y = empty_scratch_like(x)
            call_kernel(
                kernel_for("rms_forward", x),
                x,
                None,
                self.weight,
                y,
                x.numel() // x.shape[-1],
                x.shape[-1],
                self.eps,
            )
            return y
        x_fp32 = promote_to_fp32(x)
        buffer = empty_scratch_like(x_fp32)  # one buffer for the squares and for what comes of them
        torch.mul(x_fp32, x_fp32, out=buffer)
        rstd = torch.rsqrt(buffer.mean(-1, keepdim=True) + self.eps)
        torch.mul(x_fp32, rstd, out=buffer)
        # rounded before the weight multiplies, as transformers' RMSNorm does
        buffer = buffer.to(x.dtype)
        return (
            buffer.mul_(self.weight) if buffer.dtype == self.weight.dtype else self.weight * buffer
        )

    def add_and_normalise(self, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        """(x + more, its norm); x is overwritten with the sum."""
        if self.bias is None and supports_pointwise_kernels(x, more, self.weight):
            y = empty_scratch_like(x)
            call_kernel(
                kernel_for("rms_forward", x),
                x,
                more,
                self.weight,
                y,
                x.numel() // x.shape[-1],
                x.shape[-1],
                self.eps,
            )
            return x, y
        # in place: x is the attention's output, which nobody reads again
        x += more
        return x, self.compute(x)

    def backward(self, dy: Tensor, x: Tensor, residual_grad: Tensor | None = None) -> Tensor:
        """The gradient of the norm's input x, plus ``residual_grad``: what reaches x by other
        paths.
        """
        if self.bias is None and supports_pointwise_kernels(dy, x, self.weight):
            dx = torch.empty_like(x)
            call_kernel(
                kernel_for("rms_backward", x),
                dy,
                x,
                self.weight,
                residual_grad,
                dx,
                x.numel() // x.shape[-1],
                x.shape[-1],
                self.eps,
            )
            return dx
        xhat, rstd = self._standardise(x)
        weighted = promote_to_fp32(dy) * promote_to_fp32(self.weight)
        # d/dx of x * rstd: what changes the row's length alone has no gradient
        dx = weighted - xhat * (weighted * xhat).mean(-1, keepdim=True)
        # layer norm also subtracts the mean, so a shift of the row has none either
        dx = rstd * (dx if self.bias is None else dx - weighted.mean(-1, keepdim=True))
        return (dx if residual_grad is None else dx + residual_grad).to(x.dtype)

    def parameter_gradients(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and bias, for training that is not low-rank."""
        dy_fp32 = promote_to_fp32(dy).reshape(-1, dy.shape[-1])
        xhat = self._standardise(x)[0].reshape(-1, x.shape[-1])
        weight = (dy_fp32 * xhat).sum(0).to(self.weight.dtype)
        return weight, None if self.bias is None else dy_fp32.sum(0).to(self.bias.dtype)

    def _standardise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_fp32 = promote_to_fp32(x)
        if self.bias is not None:
            # a bias marks a layer norm; RMS norm does not centre
            x_fp32 = x_fp32 - x_fp32.mean(-1, keepdim=True)
        rstd = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + self.eps)
        return x_fp32 * rstd, rstd


class NormFunction(torch.autograd.Function):
    """`apply(x, norm, weight, bias)`: a norm by itself, such as the last one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: DecoderNorm, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return norm.compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dy = grads[0].contiguous()
        param_grads = (
            ctx.norm.parameter_gradients(dy, x) if any(ctx.needs_input_grad[2:]) else (None, None)
        )
        return (ctx.norm.backward(dy, x) if ctx.needs_input_grad[0] else None), None, *param_grads


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotary positions on the first 2*[..., dim/2] dimensions of x [T,h,D], half-split layout, in
    fp32 (Su et al. 2021).

    ``inverse`` turns the other way, which is also the gradient. x may be overwritten.
    """
    # half-split: dimension i pairs with i + dim/2, as in Llama; not with i + 1
    half = cos.shape[-1]
    if supports_pointwise_kernels(x):
        call_kernel(
            kernel_for("rotate_rows", x), x, cos, sin, *x.shape, half, -1.0 if inverse else 1.0
        )
        return x
    rotated, rest = promote_to_fp32(x[..., : 2 * half]), x[..., 2 * half :]
    a, b = rotated[..., :half], rotated[..., half:]
    c, s = cos[:, None], -sin[:, None] if inverse else sin[:, None]
    out = torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)
    return torch.cat([out, rest], -1) if rest.shape[-1] else out


@dataclass(frozen=True)
class ActivationFunction:
    """forward(g) and backward(dy, g), elementwise."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


SILU = ActivationFunction(F.silu, aten.silu_backward)
TANH_GELU = ActivationFunction(
    lambda x: F.gelu(x, approximate="tanh"),
    lambda dy, x: aten.gelu_backward(dy, x, approximate="tanh"),
)
ACTIVATIONS = {
    "silu": SILU,
    "swish": SILU,
    "relu": ActivationFunction(F.relu, lambda dy, x: aten.threshold_backward(dy, x, 0)),
    "gelu": ActivationFunction(F.gelu, aten.gelu_backward),
    "gelu_new": TANH_GELU,
    "gelu_pytorch_tanh": TANH_GELU,
    # one formula under three names in transformers
    "gelu_fast": TANH_GELU,
}


def gated_activation(act: ActivationFunction, g: Tensor, u: Tensor | None) -> Tensor:
    """act(g) * u, or act(g) in a plain MLP."""
    if u is None:
        return act.forward(g)
    if act is SILU and supports_pointwise_kernels(g, u):
        h = torch.empty_like(g)
        call_kernel(kernel_for("silu_gate", g), g, u, h, g.numel())
        return h
    return act.forward(g) * u


def gated_activation_backward(
    act: ActivationFunction, dh: Tensor, g: Tensor, u: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """([dg, du] or [dg], and h again) from the gradient dh of h = act(g) * u, which may be
    overwritten.
    """
    if u is None:
        return [act.backward(dh, g)], act.forward(g)
    if act is SILU and supports_pointwise_kernels(dh, g, u):
        du, h = torch.empty_like(u), torch.empty_like(u)
        call_kernel(kernel_for("silu_gate_backward", g), dh, g, u, du, h, g.numel())
        # the kernel wrote dg over dh
        return [dh, du], h
    a = act.forward(g)
    return [act.backward(dh * u, g), dh * a], a * u
