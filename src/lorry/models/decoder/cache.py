"""The key/value cache of rows being generated, and attention of their newest tokens over it.

Whoever generates (`generation/engine.py`) holds one row per running request: rows come (`add_rows`),
are given a prompt (`fill`), get a token each (`extend`) and go (`keep`). B rows, T tokens, H heads,
G key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.kernels import decode as kernel

# Positions a cache takes beyond the tokens it must hold, at least, whenever it grows: without them a
# row would be copied for every token.
SPARE_TOKENS = 64


class KVCache:
    """Keys and values of B sequences being generated, per layer [B, G, held room, D]; lengths [B]
    int64 counts each row's tokens.

    ``room`` is the longest a row may become. Memory is taken as rows grow, by half again each time
    (so that copies stay proportional to the tokens), never for the worst case at once. Every row is
    live when it is decoded: a finished one is written over by a new prompt, or dropped by ``keep``.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        room: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = torch.empty((layers, rows, heads, 0, width), dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.room = room
        # max(lengths), kept here so that a step need not wait for the device to tell
        self.longest = 0
        # all lengths are equal: no mask is needed, and a GPU may take its fastest kernel
        self.even = False
        # [B,1,1,longest] 0 or -inf: what this step's rows may not attend to; made once a step, for
        # all layers
        self.unseen: Tensor | None = None

    def add_rows(self, count: int, room: int) -> None:
        """Put ``count`` empty rows behind the others; from now on a row may become ``room`` long,
        or what it might before. A prompt has to be filled into each before the next `extend`.
        """
        self.room = max(self.room, room)
        if count:
            self.lengths = F.pad(self.lengths, (0, count))
            # the pads are those of the last dimension first: width, room, heads, rows
            more = (0, 0, 0, 0, 0, 0, 0, count)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)

    def fill(self, rows: Tensor, positions: Tensor) -> None:
        """Prompts are about to be written: tokens of ``rows`` [T] at ``positions`` [T]. Whatever
        those rows held from their first position on is forgotten.
        """
        self.lengths = self.lengths.index_fill(0, rows, 0).scatter_reduce(
            0, rows, positions + 1, "amax"
        )
        self._measure()
        self._reserve(self.longest)

    def row(self, row: int, length: int) -> Tensor:
        """[layers, 2, G, length, D]: keys and values of a row's first tokens, no copy where there need be
        none."""
        return torch.stack([x[:, row, :, :length] for x in (self.keys, self.values)], dim=1)

    def restore(self, row: int, prefix: Tensor, length: int) -> None:
        """Give a row the keys and values ``prefix``, as `row` told them, of its first tokens: a prompt of
        ``length`` tokens goes on behind them (`fill`)."""
        self._reserve(length)
        for x, part in zip((self.keys, self.values), prefix.unbind(1), strict=True):
            x[:, row, :, : prefix.shape[3]] = part

    def extend(self) -> None:
        """Every row is about to get one more token."""
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        self._reserve(self.longest)
        if self.even:
            self.unseen = None
            return
        # shorter rows hold another's leftovers, or nothing that was ever written, behind their end
        beyond = torch.arange(self.longest, device=self.lengths.device) >= self.lengths[:, None]
        mask = self.keys.new_zeros(beyond.shape).masked_fill(beyond, float("-inf"))
        self.unseen = mask[:, None, None]

    def write(self, layer: int, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [T,G,D] of tokens at (row, position), after ``fill`` or ``extend`` made room
        for them.
        """
        self.keys[layer][rows, :, positions] = k
        self.values[layer][rows, :, positions] = v

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these: finished sequences leave."""
        self.lengths = self.lengths[rows]
        self._measure()
        # cut to the longest that is left: what a long row needed goes with it
        self.keys, self.values = (
            x[..., : self.longest, :].index_select(1, rows) for x in (self.keys, self.values)
        )

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q [B,H,D], the newest token of each row -> [B,H,D]. The row's own key must have been
        written.

        The query heads that share a key head are laid along the query axis, so the cache is read in
        place, never repeated.
        """
        k, v = (x[layer, :, :, : self.longest] for x in (self.keys, self.values))
        # q as [B, G, H / G, D]: G groups of query heads, each a short sequence of "queries"
        o = F.scaled_dot_product_attention(
            q.view(q.shape[0], k.shape[1], -1, q.shape[2]), k, v, attn_mask=self.unseen
        )
        return o.reshape(q.shape)

    def attend_rows(self, layer: int, q: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """q [T,H,D] of tokens of ``rows`` [T], adjoining where they are of one, at ``positions`` [T] ->
        [T,H,D]: each attends to what its row holds up to itself.
        """
        kept, counts = torch.unique_consecutive(rows, return_counts=True)
        parts = list[Tensor]()
        for row, own, at in zip(
            kept.tolist(), q.split(counts.tolist()), positions.split(counts.tolist()), strict=True
        ):
            k, v = (x[layer, row, :, : int(at[-1]) + 1] for x in (self.keys, self.values))
            # [t, 1, keys]: of the query heads that share a key head each sees the same
            seen = (torch.arange(k.shape[1], device=q.device) <= at[:, None])[:, None]
            (tokens, heads, width), groups = own.shape, k.shape[0]
            folded = own.view(tokens, groups, -1, width).transpose(0, 1)
            shared = heads // groups
            o = F.scaled_dot_product_attention(
                folded.reshape(groups, -1, width),
                k,
                v,
                attn_mask=seen.expand(-1, shared, -1).reshape(tokens * shared, -1),
            )
            parts.append(o.view(groups, tokens, shared, width).transpose(0, 1).reshape(own.shape))
        return torch.cat(parts)

    def _measure(self) -> None:
        shortest, self.longest = (int(n) for n in torch.aminmax(self.lengths))
        self.even = shortest == self.longest

    def _reserve(self, length: int) -> None:
        """Own at least ``length`` positions; the old ones are copied. Raises ValueError beyond
        ``room``.
        """
        held = self.keys.shape[3]
        self._check(length)
        if length > held:
            size = min(self.room, max(length + SPARE_TOKENS, held + held // 2))
            # zeros, not whatever memory holds: 0 * NaN behind a row's end would still be NaN
            self.keys, self.values = (
                F.pad(x, (0, 0, 0, size - held)) for x in (self.keys, self.values)
            )

    def _check(self, length: int) -> None:
        if length > self.room:
            raise ValueError(f"a row of {length} tokens does not fit a cache for {self.room}")


class RowKVCache(KVCache):
    """The same for the CPU kernels: every row has memory of its own, as much as it needs. Nothing
    is padded to the longest row, and when a row comes or leaves nothing is copied.

    table [B,2] int64: the address of each row's memory [layers, 2, G, held, D] (keys, values), and
    how many positions it holds. Kernels read addresses, so ``memory`` and ``table`` change together.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, room: int, width: int, dtype: torch.dtype
    ) -> None:
        # no rows there: the keys and values of the other kind of cache stay empty
        super().__init__(layers, 0, heads, room, width, dtype, torch.device("cpu"))
        self.groups = heads
        # shared by all rows that hold nothing yet; the first prompt gives each memory of its own
        self.vacant = torch.empty((layers, 2, heads, 0, width), dtype=dtype)
        self.memory = list[Tensor]()
        self.table = torch.zeros((0, 2), dtype=torch.int64)
        self.add_rows(rows, room)

    def add_rows(self, count: int, room: int) -> None:
        self.room = max(self.room, room)
        self.memory += [self.vacant] * count
        self.lengths = F.pad(self.lengths, (0, count))
        self.table = F.pad(self.table, (0, 0, 0, count))

    def fill(self, rows: Tensor, positions: Tensor) -> None:
        self.lengths = self.lengths.index_fill(0, rows, 0).scatter_reduce(
            0, rows, positions + 1, "amax"
        )
        first = torch.zeros_like(self.lengths).scatter_reduce(
            0, rows, positions, "amin", include_self=False
        )
        for row in rows.unique().tolist():
            self._reserve_row(row, int(self.lengths[row]), used=int(first[row]))

    def row(self, row: int, length: int) -> Tensor:
        return self.memory[row][:, :, :, :length]

    def restore(self, row: int, prefix: Tensor, length: int) -> None:
        self._reserve_row(row, length, used=0)
        self.memory[row][:, :, :, : prefix.shape[3]] = prefix

    def extend(self) -> None:
        self.lengths = self.lengths + 1
        # only rows that are full: most steps find none
        for row in torch.nonzero(self.lengths > self.table[:, 1])[:, 0].tolist():
            length = int(self.lengths[row])
            self._reserve_row(row, length, used=length - 1)

    def write(self, layer: int, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        kernel.store_kv(k, v, self.table, rows, positions, layer)

    def keep(self, rows: Tensor) -> None:
        self.lengths, self.table = self.lengths[rows], self.table[rows]
        self.memory = [self.memory[row] for row in rows.tolist()]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        return kernel.attend_to_cache(q, self.table, self.lengths, layer, self.groups)

    def attend_rows(self, layer: int, q: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        # to the kernel each token is a row of its own, whose memory is that of its sequence
        return kernel.attend_to_cache(q, self.table[rows], positions + 1, layer, self.groups)

    def _reserve_row(self, row: int, length: int, used: int) -> None:
        """Memory for ``length`` tokens and some to come, of which the first ``used`` are there
        already.
        """
        self._check(length)
        layers, two, groups, held, width = self.memory[row].shape
        # A new prompt (nothing kept) gets fresh memory of its own size, even where the last one's
        # would do: one long request would leave its memory to every short one after it.
        if held < length or used == 0:
            size = min(self.room, max(length + SPARE_TOKENS, held + held // 2 if used else 0))
            fresh = self.memory[row].new_empty(layers, two, groups, size, width)
            fresh[:, :, :, :used] = self.memory[row][:, :, :, :used]
            self.memory[row] = fresh
            self.table[row] = torch.tensor([fresh.data_ptr(), size])
