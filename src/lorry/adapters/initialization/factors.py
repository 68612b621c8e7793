"""The first A and B of a linear by the formula of each initialisation.

W [O,I] fp32 the base's matrix, r the rank, s the adapter's scale. Where the base is to begin as it is
(`Initialization.takes_off`), s B A is what is taken off it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.adapters.initialization.recording import InputMoments
from lorry.adapters.seeds import derive_seed

LORA_GA_GAMMA = 16  # stable scaling of LoRA-GA, PEFT's default
LORA_GA_NITER = 4
CORDA_DAMPING = 0.01  # of the mean of the diagonal, added to it before inverting
CORDA_INVERSE_ERROR = 0.05  # |C C^-1 - 1|, Frobenius: above it the damping is doubled

Factors = tuple[Tensor, Tensor]


def scaled_factors(left: Tensor, values: Tensor, right: Tensor, scale: float) -> Factors:
    """A and B with s B A = left diag(values) right, each with half of the values: left [O,r], values
    [r] >= 0, right [r,I]."""
    root = (values / scale).sqrt()
    return root[:, None] * right, left * root


def pissa(weight: Tensor, rank: int, scale: float) -> Factors:
    """The r largest singular values (arXiv 2404.02948)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return scaled_factors(u[:, :rank], s[:rank], vh[:rank], scale)


def pissa_niter(weight: Tensor, rank: int, scale: float, niter: int, seed: int) -> Factors:
    """The same, by a randomised SVD with so many power iterations."""
    u, s, v = seeded_svd(weight, rank, niter, seed)
    return scaled_factors(u, s, v.t(), scale)


def milora(weight: Tensor, rank: int, scale: float) -> Factors:
    """The r smallest singular values (arXiv 2406.09044)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return scaled_factors(u[:, -rank:], s[-rank:], vh[-rank:], scale)


def mica(weight: Tensor, rank: int) -> Factors:
    """B: the left singular vectors of the r smallest values, A zero (arXiv 2604.01694)."""
    u, _, _ = torch.linalg.svd(weight, full_matrices=False)
    return weight.new_zeros(rank, weight.shape[1]), u[:, -rank:]


def olora(weight: Tensor, rank: int) -> Factors:
    """The first columns and rows of Q R = W (arXiv 2406.01775); s multiplies them as it is."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def corda(weight: Tensor, moments: InputMoments, rank: int, scale: float) -> Factors:
    """The r largest singular values of W C, brought back by C^-1 on the right, for the inputs' second
    moments C (arXiv 2406.05223, instruction-previewed)."""
    matrix = moments.second.double() / moments.calls
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    damping = CORDA_DAMPING
    while True:
        damped = matrix + eye * matrix.diagonal().mean() * damping
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < CORDA_INVERSE_ERROR:
            break
        damping *= 2
    u, s, vh = torch.linalg.svd((weight.double() @ damped).float(), full_matrices=False)
    right = (vh[:rank].double() @ inverse).float()
    return scaled_factors(u[:, :rank], s[:rank], right, scale)


def lora_ga(gradient: Tensor, rank: int, seed: int) -> Factors:
    """A: the first r right singular vectors of the loss's gradient [O,I]; B: the next r left ones with
    their values, at the stable scale (arXiv 2407.05000)."""
    width = min(4 * rank, *gradient.shape)
    u, s, v = seeded_svd(gradient, width, LORA_GA_NITER, seed)
    b = u[:, rank : 2 * rank] * s[rank : 2 * rank]
    return v[:, :rank].t(), b * (gradient.shape[0] ** 0.25 / LORA_GA_GAMMA**0.5)


def loftq(weight: Tensor, packed: Tensor, rank: int, scale: float) -> Factors:
    """The best s B A for what packing has rounded off, W - Q (arXiv 2310.08659, one iteration)."""
    return pissa(weight - packed, rank, scale)


def orthogonal(outputs: int, inputs: int, rank: int, seed: int) -> Factors:
    """Random matrices over two halves of an orthogonal one: B A is zero up to rounding."""
    draw = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=draw))
    a = torch.randn(inputs, rank // 2, generator=draw) @ q[0::2]
    b = torch.randn(rank // 2, outputs, generator=draw).t() @ q[1::2]
    return a.t() / 10, b / 10


def seeded_svd(matrix: Tensor, width: int, niter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.svd_lowrank`, whose random start is this seed's and nobody else's."""
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, width, niter=niter)
    return u, s, v


def module_seed(seed: int, module: str) -> int:
    """Of what an initialisation draws at a module."""
    return derive_seed("initialization", seed, module)
