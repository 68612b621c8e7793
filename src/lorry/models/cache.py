"""The key/value cache of rows being generated, and attention of their newest tokens over it.

B rows, T tokens, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SPARE = 64  # positions a cache takes beyond the tokens it must hold, at least, whenever it grows


class Cache:
    """Keys and values of B sequences being generated, per layer [B, G, held room, D]; lengths [B] int64 counts each row's tokens.

    ``room`` is the longest a row may become. Memory is taken as rows grow, by half again each time, never for the worst case at
    once. Every row is live: a finished one is written over by a new prompt, or dropped by ``keep``.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, room: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.empty((layers, rows, heads, 0, width), dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.room = room
        self.longest = 0  # max(lengths), known without asking the device
        self.even = False  # all lengths are equal: no mask is needed, and a GPU may take its fastest kernel
        self.unseen: Tensor | None = None  # [B,1,1,longest] 0 or -inf: what this step's rows may not attend to

    def fill(self, rows: Tensor, positions: Tensor) -> None:
        """Prompts are about to be written: tokens of ``rows`` [T] at ``positions`` [T]. Whatever those rows held is forgotten."""
        self.lengths = self.lengths.index_fill(0, rows, 0).scatter_reduce(0, rows, positions + 1, "amax")
        self._measure()
        self._hold(self.longest)

    def extend(self) -> None:
        """Every row is about to get one more token."""
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        self._hold(self.longest)
        if self.even:
            self.unseen = None
            return
        hidden = torch.arange(self.longest, device=self.lengths.device) >= self.lengths[:, None]
        self.unseen = self.keys.new_zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None, None]

    def write(self, layer: int, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [T,G,D] of tokens at (row, position), after ``fill`` or ``extend`` made room for them."""
        self.keys[layer][rows, :, positions] = k
        self.values[layer][rows, :, positions] = v

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these: finished sequences leave."""
        self.lengths = self.lengths[rows]
        self._measure()
        self.keys, self.values = (x[..., : self.longest, :].index_select(1, rows) for x in (self.keys, self.values))

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q [B,H,D], the newest token of each row -> [B,H,D]. The row's own key must have been written.

        The query heads that share a key head are laid along the query axis, so the cache is read in place, never repeated.
        """
        k, v = (x[layer, :, :, : self.longest] for x in (self.keys, self.values))
        o = F.scaled_dot_product_attention(q.view(q.shape[0], k.shape[1], -1, q.shape[2]), k, v, attn_mask=self.unseen)
        return o.reshape(q.shape)

    def _measure(self) -> None:
        shortest, self.longest = (int(n) for n in torch.aminmax(self.lengths))
        self.even = shortest == self.longest

    def _hold(self, length: int) -> None:
        """Own at least ``length`` positions; the old ones are copied. Raises ValueError beyond ``room``."""
        held = self.keys.shape[3]
        if length > self.room:
            raise ValueError(f"a row of {length} tokens does not fit a cache for {self.room}")
        if length > held:
            size = min(self.room, max(length + SPARE, held + held // 2))
            self.keys, self.values = (F.pad(x, (0, 0, 0, size - held)) for x in (self.keys, self.values))
