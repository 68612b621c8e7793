"""A proof, beside those of `models/proofs.py`: ranks that share a model, or that run another
implementation of its layers, train it as one device does with our decoder.

Nobody has the whole model to compare with, and each thing that can be wrong in silence (a bias that
every rank adds, dropout that counts a rank's own columns, initial values drawn by each for its part,
half a sum of gradients, rows of q and k in another order) leaves a run that looks healthy. So the ranks first train a twin, this config
with few, narrow layers and random weights, in its number format and on its device: once together, and
once each the whole one. Scores, initial values and gradients have to agree. It takes as long as a few
steps of so small a model, and is made in every run.

`LORRY_PROOFS=0` leaves it out, with a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.data.batch import TokenizedExample, collate
from lorry.errors import ContractError
from lorry.families import ModelFamily
from lorry.models.causal_lm import CausalLM
from lorry.models.converter import ModelConverter
from lorry.models.decoder.model import Decoder
from lorry.models.proofs import proofs_disabled, shrink_config
from lorry.models.scoring.score import TokenScore, evaluate_wants, log_prob
from lorry.notes import NoteCallback

# Relative error of scores and of a matrix's gradient. Sums in another order give 1e-7 (gradients are
# fp32), 3e-6 and 4e-2 in float64, float32 and bfloat16; each of the faults above gives 0.2 and more.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
HALF_PRECISION_TOLERANCE = 0.15
ROWS, ROW_TOKENS = 3, 12
# what most runs adapt; then the matrices of the vocabulary as well
INNER = LoraSpec(r=3, target_modules="all-linear", lora_dropout=0.25, init_lora_weights=False)
ENDS = LoraSpec(r=2, target_modules=("lm_head", "embed"), init_lora_weights=False)
MIXES = (Mix.one("inner"), Mix.constants({"inner": 1.0, "ends": -0.5}))


def prove_shared_layers(
    family: ModelFamily,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    ranks: TensorRanks | None,
    convert: ModelConverter | None,
    add_note: NoteCallback,
) -> None:
    """Train the twin; all ranks call this together. ``ranks``: those that share it, if several do;
    ``convert``: as in `load_model`. Raises ContractError on each where it differs on one of them."""
    if proofs_disabled(add_note):
        return
    small = shrink_config(family, config, 1 if ranks is None else ranks.size)
    state = _random_weights(family, small)
    whole = _twin(Decoder(family, small), state, dtype, device)
    shared = _twin(Decoder(family, small, ranks), state, dtype, device, convert)
    what, gap = max(
        (found for mix in MIXES for found in _differences(whole, shared, mix)),
        # NaN is the largest of all
        key=lambda found: math.inf if math.isnan(found[1]) else found[1],
    )
    # the others' too: all raise, or nobody
    own = torch.tensor([gap], dtype=torch.float64, device=device)
    gaps = [float(each) for each in ([own] if ranks is None else ranks.gather(own))]
    limit = TOLERANCES.get(dtype, HALF_PRECISION_TOLERANCE)
    # not `>`: written this way NaN fails as well
    if far := [rank for rank, each in enumerate(gaps) if not each <= limit]:
        where = f" ({what})" if ranks is None or ranks.rank in far else ""
        who, way_out = ("the layers of this backend", "give backend=ddp or fsdp")
        if convert is None and ranks is not None:
            who = f"{ranks.size} tensor-parallel ranks"
            way_out = "leave backend.tensor_parallel out"
        raise ContractError(
            f"{who} do not train a small copy of this model as one "
            f"process does: on tensor rank {far[0]} it differs by {gaps[far[0]]:.1e}, at most "
            f"{limit:g} would be rounding{where}; {way_out}"
        )


def _random_weights(family: ModelFamily, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The twin's whole weights, the same on every rank; wide enough that what is left out shows."""
    with torch.device("meta"):
        model = Decoder(family, config)
    draw = torch.Generator().manual_seed(0)
    return {
        # norms and biases around 1
        name: torch.randn(p.shape, generator=draw) * (0.3 if p.dim() == 1 else p.shape[-1] ** -0.5)
        + (1.0 if p.dim() == 1 else 0.0)
        for name, p in model.state_dict().items()
    }


def _twin(
    decoder: Decoder,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    convert: ModelConverter | None = None,
) -> CausalLM:
    """The model with its part of the weights, and two adapters."""
    cut = decoder.cut_tensors()
    own = {
        name: (cut[name][1].cut(whole, cut[name][0]) if name in cut else whole).to(device, dtype)
        for name, whole in state.items()
    }
    decoder.load_state_dict(own, strict=True, assign=True)
    if decoder.geometry.tied:
        decoder.tie()
    decoder.requires_grad_(False).eval()
    model = decoder if convert is None else convert(decoder)
    for name, spec in (("inner", INNER), ("ends", ENDS)):
        attach(model, spec, name)
    return model


def _differences(whole: CausalLM, shared: CausalLM, mix: Mix) -> Iterator[tuple[str, float]]:
    """(what, relative difference) of everything a step of the two under a mix comes to."""
    scores = [_step(model, mix) for model in (whole, shared)]
    yield "scores", _distance(scores[1], scores[0])
    for term in mix.terms:
        one, own = (get_bank(model)[term.adapter] for model in (whole, shared))
        truth, initial = one.split_like(one.grads), one.tensors()
        values, partial = own.tensors(), set(own.partial_sums())
        for name, grad in own.split_like(own.grads).items():
            expected = own.own_part(name, initial[name])
            yield f"the initial {name}", _distance(values[name], expected)
            total = shared.ranks.add_up(grad.clone()) if name in partial and shared.ranks else grad
            yield f"the gradient of {name}", _distance(total, own.own_part(name, truth[name]))
        for adapter in (one, own):
            adapter.grads.zero_()


def _step(model: CausalLM, mix: Mix) -> Tensor:
    """Scores [T] of a few random rows, whose sum has been differentiated."""
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(0, model.vocab_size, (ROWS, ROW_TOKENS), generator=draw)
    weights = [0.0, *[1.0] * (ROW_TOKENS - 1)]
    examples = [TokenizedExample(row, weights, key) for key, row in enumerate(rows.tolist())]
    batch = collate(examples).to(model.device)
    noise = DropoutNoise(0, 0, tuple(batch.key.tolist()), tuple(batch.starts.tolist()))
    want = {"log_prob": TokenScore(log_prob)}
    scores = evaluate_wants(model, batch, want, AdapterContext(mix, noise))["log_prob"]
    if scores.requires_grad:  # of layers that take no adapters gradients stay 0, which is told
        scores.sum().backward()
    return scores.detach()


def _distance(got: Tensor, expected: Tensor) -> float:
    """Relative, by Euclidean norms; 0 of two zeros."""
    difference = torch.linalg.vector_norm(got.double() - expected.double())
    size = torch.linalg.vector_norm(expected.double())
    return float(difference / size) if size else float(difference)
