"""New tokens: a tokenizer and a model's embedding grow, and only the new rows train, as an adapter's own
(`trainable_token_indices`).

The base gets a row for each too, its start, so that it can be run on the tokens without the adapter; which
tokens, and what of the base each start is made of, is written beside an adapter's files, and the base grows
alike when these are read. PEFT has the same model after `resize_token_embeddings(len(tokenizer))`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.shares import local_rows, local_share, shares_of, whole_weight
from lorry.adapters.tensor_parallel.slices import DimensionSlice
from lorry.adapters.variants.starts import TOKEN_ROWS, Ends
from lorry.errors import ConfigError, ModelError

NewTokenInit = Literal["subtokens", "mean"]
GROWN = "lorry_new_tokens"  # of a model's dictionary: what it grew by, and how many rows it had


@dataclass(frozen=True)
class NewTokens:
    """``pieces``: {id of a new token: the tokens that its text was before}; ``init``: what its rows begin as,
    the mean of those of the pieces (subtokens), or of all rows of the base (mean)."""

    pieces: Mapping[int, tuple[int, ...]]
    init: NewTokenInit

    @property
    def ids(self) -> list[int]:
        """Of the new tokens."""
        return list(self.pieces)

    def facts(self) -> dict[str, Any]:
        """What lorry_adapter.json keeps."""
        return {"pieces": [[i, list(own)] for i, own in self.pieces.items()], "init": self.init}

    @staticmethod
    def of(facts: object, where: str) -> NewTokens:
        """`facts` backwards. Raises ModelError."""
        pieces = facts.get("pieces") if isinstance(facts, Mapping) else None
        init: Any = facts.get("init") if isinstance(facts, Mapping) else None
        whole = lambda n: isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31  # noqa: E731
        if (
            init not in get_args(NewTokenInit)
            or not isinstance(pieces, list)
            or not pieces
            or not all(
                isinstance(entry, list)
                and len(entry) == 2
                and whole(entry[0])
                and isinstance(entry[1], list)
                and all(whole(piece) for piece in entry[1])
                for entry in pieces
            )
        ):
            raise ModelError(
                f"{where}: new_tokens is not what Lorry writes; save the adapter again"
            )
        return NewTokens({i: tuple(own) for i, own in pieces}, init)

    @torch.no_grad()
    def starts(self, weight: Tensor) -> Tensor:
        """[n, D] fp32: what the rows of the new tokens begin as in a table [V, D] of the base, V rows
        without them."""
        table = weight.detach()
        if self.init == "mean":
            # in float64: a sum of all rows
            return table.mean(0, dtype=torch.float64).float().expand(len(self.pieces), -1)
        return torch.stack([table[list(own)].float().mean(0) for own in self.pieces.values()])


def grown_with(model: nn.Module) -> NewTokens | None:
    """The new tokens that a model's embedding has been given."""
    grown: tuple[NewTokens, int] | None = model.__dict__.get(GROWN)
    return None if grown is None else grown[0]


@torch.no_grad()
def grow_vocabulary(model: nn.Module, new: NewTokens) -> None:
    """Give a model that has no adapter yet a row for each new token, in the embedding and in the head; where
    its weights are cut over ranks all of them call this. Raises ConfigError where its layout does not allow
    it, ModelError for tokens that it does not have."""
    if (before := grown_with(model)) is not None:
        if before != new:
            raise ConfigError(
                "this model's embedding has grown by other new tokens already; load the model again"
            )
        return
    ends = Ends.of(model)
    if ends.embed is None:
        raise ConfigError("new_tokens: this model does not say which module is its embedding")
    rows = _row_count(model, ends.embed)
    if odd := [p for own in new.pieces.values() for p in own if p >= rows]:
        raise ModelError(
            f"new tokens are made of token {odd[0]}, and this model has {rows} rows; it is another base"
        )
    # a row between would be of no token, and a wrong file may ask for more than there is memory
    missing = sorted(token for token in new.pieces if token >= rows)
    if missing != list(range(rows, rows + len(missing))):
        raise ModelError(
            f"new tokens have the ids {missing[0]} to {missing[-1]}, and this model has {rows} rows; they do not "
            "follow one another behind these: it is another base, or the file is damaged"
        )
    needed = max(new.pieces) + 1
    bank = model.__dict__.get("lorry_bank")
    if needed > rows and bank is not None and (bank.adapters or bank.base_adapters):
        raise ConfigError(
            "new_tokens: this model has an adapter already, and its embedding does not grow under it; load "
            "the one with new tokens first, or what lorry merge makes of it"
        )
    paths = [path for path in (ends.embed, ends.head) if path is not None]
    starts = {path: new.starts(_table(model, path)) for path in paths}
    if needed > rows:
        _resize(model, needed)
        for path, values in starts.items():
            grown = model.get_parameter(f"{path}.weight")
            here, share = local_rows(model, grown), local_share(grown)
            # of ranks that share the vocabulary this one has rows from its part's first on
            part = _part(model, path)
            first = here.start + (0 if part is None else part.offset)
            for token, row in zip(new.pieces, values, strict=True):
                if token >= rows and first <= token < first + len(share):
                    share[token - first] = row.to(share.dtype)
    model.__dict__[GROWN] = (new, rows)


def _part(model: nn.Module, path: str) -> DimensionSlice | None:
    """The rows of an embedding's or a head's table that this one of tensor-parallel ranks has."""
    layer = model.get_submodule(path)
    if not isinstance(layer, AdaptableLayer) or layer.slices is None:
        return None
    return layer.stored_slice()[1]


def _row_count(model: nn.Module, path: str) -> int:
    """Of the whole table."""
    part = _part(model, path)
    return model.get_parameter(f"{path}.weight").shape[0] if part is None else part.whole


def _table(model: nn.Module, path: str) -> Tensor:
    """[V, D]: all of the weight of an embedding or a head; where ranks share it all of them ask together."""
    layer = model.get_submodule(path)
    if isinstance(layer, AdaptableLayer):
        return layer.whole_table()
    return whole_weight(model.get_parameter(f"{path}.weight"))


def shrink_vocabulary(model: nn.Module) -> None:
    """Take back what `grow_vocabulary` gave a model: nothing is left of it. One that is cut over ranks keeps
    it: they call this together or not at all, and an error of one ends them all."""
    if shares_of(model) is not None or getattr(model, "ranks", None) is not None:
        return
    new, rows = model.__dict__.pop(GROWN)
    if max(new.pieces) >= rows:
        _resize(model, rows)


def _resize(model: nn.Module, rows: int) -> None:
    """Give embedding and head as many rows. Raises ConfigError for a model that cannot."""
    resize = getattr(model, "resize_vocabulary", None) or getattr(
        model, "resize_token_embeddings", None
    )
    if resize is None:
        raise ConfigError(
            f"{type(model).__name__} has no way to give its embedding more rows; give it a method "
            "resize_token_embeddings(rows), as transformers' models have"
        )
    resize(rows)


@torch.no_grad()
def begin_rows(model: nn.Module, adapter: Adapter, new: NewTokens) -> None:
    """Let an adapter's rows of the new tokens begin as they should also where the base had room for them."""
    count = min(new.pieces)
    for name, one in adapter.further.items():
        if not name.endswith(TOKEN_ROWS) or one.replaces is None or one.replaces.ids is None:
            continue
        place = {token: row for row, token in enumerate(one.replaces.ids.tolist())}
        table = _table(model, one.module)[:count]
        for token, values in zip(new.pieces, new.starts(table), strict=True):
            if token in place:
                one.param[place[token]] = values
    adapter.touch()


def token_settings(
    model: nn.Module, ids: Sequence[int], asked: object
) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """`trainable_token_indices` with the new tokens: of a tied pair a list, else a map of both sides; with
    those that are ``asked`` for besides."""
    ends = Ends.of(model)
    assert ends.embed is not None
    if isinstance(asked, Mapping):
        sites = {name: tuple(own) for name, own in asked.items()}
    else:
        sites = {ends.embed: tuple(asked or ())}  # type: ignore[arg-type]  # a list, by the schema
    if ends.head is None or (ends.tied and not isinstance(asked, Mapping)):
        return tuple(dict.fromkeys((*sites[ends.embed], *ids)))
    for end in (ends.embed, ends.head):
        own = next((name for name in sites if end.endswith(name)), end)
        sites[own] = tuple(dict.fromkeys((*sites.get(own, ()), *ids)))
    return sites


def add_to_tokenizer(tokenizer: Any, tokens: Sequence[str], init: NewTokenInit) -> NewTokens:
    """Let a tokenizer know new tokens. Raises ConfigError for one that it has, or that is no text."""
    known = tokenizer.get_vocab()
    for n, token in enumerate(tokens):
        if not isinstance(token, str) or not token.strip():
            raise ConfigError(f"new_tokens has {token!r:.80}; a token is a text that is not empty")
        if token in known:
            raise ConfigError(
                f"new_tokens names {token!r}, which the tokenizer has (id {known[token]}); leave it out, or train "
                f"its row: trainable_token_indices=[{known[token]}]"
            )
        if token in tokens[:n]:
            raise ConfigError(f"new_tokens names {token!r} twice")
    pieces = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in tokens]
    if init == "subtokens" and (
        empty := [t for t, own in zip(tokens, pieces, strict=True) if not own]
    ):
        raise ConfigError(
            f"new_tokens names {empty[0]!r}, which the tokenizer makes no tokens of; use new_token_init=mean"
        )
    tokenizer.add_tokens(list(tokens))
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if len(set(ids)) < len(tokens) or set(ids) & set(known.values()):
        raise ConfigError("new_tokens: the tokenizer did not take them as tokens of their own")
    return NewTokens(dict(zip(ids, pieces, strict=True)), init)
