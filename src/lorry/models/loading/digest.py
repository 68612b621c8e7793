"""A fingerprint of the base's weights, to see that training left every bit of them alone.

Adapters are left out (they are no parameters of the model), a merged layer counts by the weight it
had before, a tied head once. Which base an adapter belongs to is another question, answered by
`adapters.peft.files.base_digest`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from lorry.adapters.layers import AdaptableLayer

PIECES = 2
PIECE = 1024


def sample_digest(
    model: nn.Module, *, whole: bool = False, trained: Collection[Tensor] = ()
) -> str:
    """Whether any base weight moved: SHA-256 over names, dtypes and the exact bits of two runs of
    1024 values per tensor, or with ``whole`` of every value; "" if there is none to look at.
    ``trained``: parameters that are meant to move. Compare only digests of one process and dtype;
    no change can hide from ``whole``.
    """
    total, moving, seen = hashlib.sha256(), {t.data_ptr() for t in trained}, False
    for name, tensor in base_tensors(model):
        if tensor.data_ptr() in moving:
            continue
        seen = True
        total.update(f"\n{name} {tensor.dtype}\n".encode())
        for piece in [tensor.reshape(-1)] if whole else sample_pieces(tensor):
            total.update(_as_bytes(piece))
    return total.hexdigest() if seen else ""


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of the base in order of name, a tied one once, merged
    layers by what they keep.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, prefix=path):
            kept = (
                module.unmerged_weight
                if isinstance(module, AdaptableLayer) and name.endswith(".weight")
                else None
            )
            found[name] = parameter.detach() if kept is None else kept.detach()
    seen: set[tuple[int, torch.Size]] = set()
    for name in sorted(found):
        tensor = found[name]
        place = (tensor.data_ptr(), tensor.shape)
        if place in seen:
            continue
        seen.add(place)
        yield name, tensor


def sample_pieces(tensor: Tensor) -> list[Tensor]:
    """PIECES evenly spaced runs of PIECE values, the first and the last among them; all of it when
    it is short.
    """
    flat = tensor.reshape(-1)
    last = flat.numel() - PIECE
    if flat.numel() <= PIECE * PIECES:
        return [flat]
    return [flat[s : s + PIECE] for s in (round(i * last / (PIECES - 1)) for i in range(PIECES))]


def _as_bytes(values: Tensor) -> memoryview:
    return values.contiguous().cpu().view(torch.uint8).numpy().data
