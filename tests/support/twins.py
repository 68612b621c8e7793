"""Twins of transformers' models in Lorry's own decoder."""

from __future__ import annotations

from typing import Any

from lorry.families import find_family
from lorry.models.decoder.model import Decoder


def native(theirs: Any) -> Decoder:
    """Our decoder with the weights of a transformers model, float32."""
    family = find_family(theirs.config.model_type)
    assert family is not None
    model = Decoder(family, theirs.config.to_dict())
    model.load_state_dict({family.current_name(n): t for n, t in theirs.state_dict().items()})
    if model.geometry.tied:
        model.tie()
    return model.eval()
