"""A pass over packed sequences that runs a prefix which several of them share once: a question for
all of its answers.

Everything but attention works token by token, so it runs over the tree's tokens; attention reads
every sequence whole, with the code that always does (`models/decoder/attention.py`). Values are those
of the plain pass but for the rounding of differently shaped products: about 1e-6 in float32, and in
bfloat16 what any other batch changes, too. So it is for scores that are read as numbers. Where bits
are compared (contract 4) and where anything trains the plain pass runs. T distinct tokens, F tokens of
all sequences.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorry.adapters.mix import AdapterContext, Mix
from lorry.data.stream.pack import split_by_tokens
from lorry.data.stream.prefixes import lay_out_tree, split_by_tree_tokens
from lorry.models.causal_lm import CausalLM, HiddenStates, PackedInput


def hidden_sharing_prefixes(
    model: CausalLM,
    packed: PackedInput,
    call: AdapterContext,
    *,
    output_layers: Collection[int] = (),
    stop: int | None = None,
) -> HiddenStates:
    """As `CausalLM.hidden`, [F, ...]. The plain pass where gradients or dropout are wanted, and where
    `can_share` says no.
    """
    plain = call.noise is None and not torch.is_grad_enabled()
    if plain and can_share(model, call.mix):
        tree = share_prefixes(packed)
        if tree.places is not None:
            states = model.hidden(tree, call, output_layers=output_layers, stop=stop)
            return _expand(states, tree.places)
    return model.hidden(packed, call, output_layers=output_layers, stop=stop)


def can_share(model: CausalLM, mix: Mix) -> bool:
    """Whether the model runs trees, and equal tokens behind equal tokens are treated alike: not under
    a mix by sequence, gates by token, or a router, which may read more than they do.
    """
    routed = mix.router is not None or mix.sequence_router is not None
    return (
        model.shares_prefixes
        and not routed
        and all(term.rows is None and not isinstance(term.gate, Tensor) for term in mix.terms)
    )


def split_into_passes(
    model: CausalLM, mix: Mix, sequences: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[list[int]]:
    """Numbers of the sequences in groups for one pass each, of at most ``max_tokens`` tokens that are
    run (a longer sequence by itself): those that begin alike together where they share prefixes,
    else long ones first, so that groups are even.
    """
    if can_share(model, mix):
        return split_by_tree_tokens(sequences, max_tokens)
    lengths = [len(sequence) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lambda number: -lengths[number])
    return split_by_tokens(order, lengths, max_tokens)


def share_prefixes(packed: PackedInput) -> PackedInput:
    """The same sequences with every shared token once; as it is where none begin alike."""
    tokens = packed.tokens.tolist()
    tree = lay_out_tree([tokens[start:stop] for start, stop in packed.segments])
    if len(tree.tokens) == len(tokens):
        return packed
    device = packed.tokens.device
    return replace(
        packed,
        tokens=torch.tensor(tree.tokens, device=device),
        positions=torch.tensor(tree.positions, device=device),
        places=torch.tensor(tree.places, device=device),
    )


def _expand(states: HiddenStates, places: Tensor) -> HiddenStates:
    last = None if states.last is None else states.last.index_select(0, places)
    outputs = {n: x.index_select(0, places) for n, x in states.layer_outputs.items()}
    return HiddenStates(last, outputs)
