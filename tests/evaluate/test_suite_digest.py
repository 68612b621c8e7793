"""The digest by which a suite's records are known again: of all that decides what a model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from lorry.adapters.attach import attach
from lorry.adapters.mix import Mix
from lorry.adapters.router import RoutingRule, TokenRouter
from lorry.adapters.spec import LoraSpec
from lorry.errors import ContractError
from lorry.evaluate.unlearning.scores import SuiteModel
from tests.support import tiny


class Encoder:
    """All that a digest asks of one."""

    def identity(self) -> str:
        return "words and template"


def test_a_router_decides_too(tmp_path: Path) -> None:
    """Its weights and its rule, and not the experts' alone."""
    model = tiny.decoder(tiny.fresh("llama"), tmp_path)
    for name in ("a", "b"):
        attach(model, LoraSpec(r=2), name)

    def digest(mix: Mix) -> str:
        return SuiteModel(model, cast(Any, Encoder()), {}, mix).digest()

    def router(**rule: Any) -> TokenRouter:
        return TokenRouter(
            ["a", "b"],
            RoutingRule(**rule),
            layers=model.geometry.layers,
            width=model.geometry.width,
        )

    one, softer = router(), router(temperature=2.0)
    seen = [digest(one.mix()), digest(softer.mix()), digest(Mix.constants({"a": 1.0, "b": 1.0}))]
    one.values[0] += 1.0
    seen.append(digest(one.mix()))
    assert len(set(seen)) == 4
    assert digest(router().mix()) == seen[0]

    class OtherRouter:
        adapters, halves = ("a", "b"), ("mlp",)

    with pytest.raises(ContractError, match="no digest of a OtherRouter"):
        digest(Mix((), cast(Any, OtherRouter())))
