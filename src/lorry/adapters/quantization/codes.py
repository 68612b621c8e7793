"""The values that few bits can stand for: NF4 and FP4 of a weight, eight bits of a scale.

Each is a table of fp32 values, the largest 1, and a number is stored as the place of the nearest one
after division by the largest absolute value of its block. The tables are bitsandbytes', whose
checkpoints hold them beside the codes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# NF4: quantiles of a normal distribution, scaled to [-1, 1], one of them 0 (Dettmers et al. 2023,
# arXiv 2305.14314, appendix E)
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# FP4: a sign bit before eight magnitudes in twelfths, in the order of their bits (1 sign, 2 exponent,
# 1 mantissa, the smallest one not that of the format)
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_LEVELS = tuple(sign * m / 12.0 for sign in (1.0, -1.0) for m in FP4_TWELFTHS)

LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}


@cache
def dynamic_levels() -> tuple[float, ...]:
    """The 256 values of an eight-bit scale, ascending: signed dynamic tree quantisation (Dettmers 2016,
    arXiv 1511.04561). Seven powers of ten from 1e-6 to 1, each with twice the fractions of the one
    below: the middles between evenly spaced bounds from 0.1 to 1; and 0 and 1 themselves."""
    values = [0.0, 1.0]
    for power in range(7):
        bounds = torch.linspace(0.1, 1, 2**power + 1)
        middles = (bounds[:-1] + bounds[1:]) / 2
        values += [
            sign * value for sign in (1, -1) for value in (10.0 ** (power - 6) * middles).tolist()
        ]
    # a table of fp32: two values of the list may differ by less than that can hold
    return tuple(torch.tensor(sorted(values)).tolist())


@cache
def dynamic_table(device: torch.device) -> Tensor:
    """`dynamic_levels`, fp32 [256]."""
    return torch.tensor(dynamic_levels(), device=device)


@cache
def level_table(name: str, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit format, fp32."""
    return torch.tensor(LEVELS[name], device=device)


def nearest_code(shares: Tensor, levels: tuple[float, ...]) -> Tensor:
    """uint8, the place in ``levels`` of the value nearest to each of ``shares`` (fp32); of two equally
    near ones that which is smaller."""
    values, order = torch.tensor(levels, device=shares.device).sort(stable=True)
    places = torch.bucketize(shares, (values[1:] + values[:-1]) / 2)
    return order.to(torch.uint8)[places]
