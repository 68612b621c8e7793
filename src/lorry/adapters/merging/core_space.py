"""Core space: the small space that holds every adapter of a module, without loss.

    D_e = s_e B_e A_e = U M_e V,    U [out, n] orthonormal columns, V [m, in] orthonormal rows,
    M_e = U^T (s_e B_e A_e) V^T     [n, m], n and m at most the sum of the ranks

(arXiv 2509.17786, NeurIPS 2025.) Whatever becomes of the M_e, delta = U M V is an adapter again:
B = U M, A = V. Nothing of size [out, in] is ever made: bases come from the QR of the factors and
the SVD of what is then small. Everything here takes the dtype it is given; callers give float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LowRankMatrix(NamedTuple):
    """A product left [n, rank] @ right [rank, m], and the squared Frobenius norms of what it stands
    for and of what its rank left out.
    """

    left: Tensor
    right: Tensor
    energy: float
    lost: float


def core_bases(a_matrices: Sequence[Tensor], b_matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(U [out, n], V [m, in]): left singular vectors of the B's [out, r_e] side by side, right ones
    of the A's [r_e, in] below each other. Directions of singular value 0 are left out.
    """
    side_by_side = torch.cat(list(b_matrices), dim=1)
    return column_basis(side_by_side), column_basis(torch.cat(list(a_matrices)).mT).mT


def column_basis(matrix: Tensor) -> Tensor:
    """The left singular vectors [n, k] of a [n, c] matrix, largest first; k is its rank, or 1 for a
    matrix of zeros.
    """
    # QR first: c is a sum of ranks and n a width of the model, so the SVD is of [c, c] at most
    q, r = torch.linalg.qr(matrix)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ u[:, : max(_rank(s, max(matrix.shape)), 1)]


def _rank(singular_values: Tensor, size: int, dtype: torch.dtype | None = None) -> int:
    """How many are not 0 but for rounding, by `torch.linalg.matrix_rank`'s measure; ``dtype``: what
    rounded, where it is not theirs."""
    if not singular_values.numel():
        return 0
    floor = size * torch.finfo(dtype or singular_values.dtype).eps * singular_values[0]
    return int((singular_values > floor).sum())


def truncate(matrix: Tensor, rank: int | None) -> LowRankMatrix:
    """The best approximation of a [n, m] matrix by one of ``rank``, U S and V^T of its SVD; None:
    the matrix itself and the identity.
    """
    if rank is None:
        return LowRankMatrix(
            matrix,
            torch.eye(matrix.shape[1], dtype=matrix.dtype),
            float(matrix.double().square().sum()),
            0.0,
        )
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    squares = s.double().square()
    return LowRankMatrix(
        # as PEFT: a product with a diagonal matrix, not a scaling, whose rounding is another
        u[:, :rank] @ torch.diag(s[:rank]),
        vt[:rank],
        float(squares.sum()),
        float(squares[rank:].sum()),
    )


def merge_task_singular_vectors(
    cores: Sequence[Tensor], floors: Sequence[float] | None = None, share: int | None = None
) -> Tensor:
    """TSV-M (Gargiulo et al. 2024, arXiv 2412.00081) of K weighted cores [n, m]: the first 1/K of
    each one's singular triples side by side, U and V made orthonormal, U diag(S) V^T.

    floors [K]: what the rounding of a core's factors may come to; values up to it are no triples of
    the task. share: how many of each; None: 1/K of the core's. Cores of directions that are one but
    for rounding are larger than those of the very same, and the share must not hang on it.
    """
    share = share or max(min(cores[0].shape) // len(cores), 1)
    lefts, values, rights = [], [], []
    for core, floor in zip(cores, floors or [0.0] * len(cores), strict=True):
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        # triples of value 0 have arbitrary vectors, which would turn those of the other tasks
        count = min(share, _rank(s, max(core.shape)), int((s > floor).sum()))
        lefts.append(u[:, :count])
        values.append(s[:count])
        rights.append(vt[:count])
    if not sum(map(len, values)):
        return torch.zeros_like(cores[0])
    left, right = nearest_orthonormal(torch.cat(lefts, 1)), nearest_orthonormal(torch.cat(rights))
    return left @ torch.diag(torch.cat(values)) @ right


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """P Q^T of the SVD P S Q^T; directions of singular value 0 stay 0, since any completion of them
    would be arbitrary. The columns (or rows) are unit vectors made of float32 factors, whatever
    their dtype now: two that are one but for float32's rounding are one.
    """
    p, s, qt = torch.linalg.svd(matrix, full_matrices=False)
    count = _rank(s, max(matrix.shape), torch.float32)
    return p[:, :count] @ qt[:count]


def flatten_spectrum(core: Tensor, floor: float = 0.0) -> Tensor:
    """Iso-C (Marczak et al. 2025, arXiv 2502.04959): every singular value replaced by their mean.

    Values that are 0 but for rounding, or at most ``floor``, stay 0 and are not in the mean: their
    vectors are arbitrary, and the mean would make directions of them that no adapter has.
    """
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    count = min(_rank(s, max(core.shape)), int((s > floor).sum()))
    if not count:
        return torch.zeros_like(core)
    return s[:count].mean() * (u[:, :count] @ vt[:count])
