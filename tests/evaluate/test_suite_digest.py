"""The digest by which a suite's records are known again: of all that decides what a model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.router import RoutingRule, TokenRouter
from lorry.adapters.routing.gate_vectors import attach_gate_vectors
from lorry.adapters.routing.linear_router import ArrowRouter
from lorry.adapters.routing.sequence import ClassifierRouter, PromptRule, PrototypeRouter
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
        """Gates that no directory of a mixture knows: nothing says what they are made of."""

        adapters, halves = ("a", "b"), ("mlp",)

    with pytest.raises(ContractError, match="no digest of a OtherRouter"):
        digest(Mix((), cast(Any, OtherRouter())))


@pytest.mark.parametrize("kind", ["prototype", "classifier", "arrow", "phatgoose"])
def test_routers_of_every_kind(kind: str, tmp_path: Path) -> None:
    """All but the token router's ended in "a suite knows no digest of a PrototypeRouter". Rule,
    values, a LoRA of the router's own and an expert each decide; how a router was trained does not."""
    model = tiny.decoder(tiny.fresh("llama"), tmp_path)
    for name in ("a", "b", "own"):
        attach(model, LoraSpec(r=2, target_modules=["up_proj"]), name)
    width = model.geometry.width
    means = torch.randn(2, width, generator=torch.manual_seed(0))
    bias = torch.zeros(2)

    def router(top_k: int, own: str | None = None, training: Any = None) -> Any:
        if kind == "arrow":
            return ArrowRouter(get_bank(model), ["a", "b"], top_k=top_k)
        if kind == "phatgoose":
            get_bank(model).routers.clear()
            vectors = attach_gate_vectors(model, ["a", "b"], top_k=top_k, temperature=1.0)
            vectors.values[:width] = means[0]
            return vectors
        rule = PromptRule(0, "mean", top_k)
        if kind == "prototype":
            return PrototypeRouter(["a", "b"], rule, means)
        return ClassifierRouter(
            ["a", "b"], rule, {"0.weight": means, "0.bias": bias}, training, own
        )

    def digest(made: Any) -> str:
        return SuiteModel(model, cast(Any, Encoder()), {}, made.mix()).digest()

    seen = [digest(router(1)), digest(router(2))]
    assert digest(router(1)) == seen[0]
    if kind != "arrow":
        means[0, 0] += 1.0
        seen.append(digest(router(1)))
    adapters = ["b"]
    if kind == "classifier":
        assert digest(router(1, training={"test": 1})) == seen[-1]
        seen.append(digest(router(1, "own")))
        adapters.append("own")
    for name in adapters:
        get_bank(model)[name].values[0] += 1.0
        seen.append(digest(router(1, "own" if name == "own" else None)))
    assert len(set(seen)) == len(seen)
