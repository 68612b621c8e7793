"""Routers of a whole sequence: gates made of its prompt's hidden state in the base, the same in every
layer and for every token (docs/experts.md).

    prototype  score_e = cos(h - c, m_e - c), m_e the mean state of some prompts of expert e, c = mean of m
    sequence   scores = a linear or an MLP of h, trained to say whose prompt it is

    p = softmax(scores / temperature), g = the top_k of p, divided by their sum

Nothing of them needs a gradient through the model, so that top_k=1 with gates of 1 is what one adapter
chosen per sequence is, here without a straight-through estimate. S sequences, D width, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.router import ROUTER_NAME, RoutingRule
from lorry.errors import ConfigError

POOLINGS = ("mean", "last")
# of the largest squared norm of the means: below it their differences are rounding of fp32 states
SMALLEST_DIFFERENCE = 1e-10


@dataclass(frozen=True)
class PromptRule:
    """What is read of a prompt and how scores become gates. ``layer``: whose output (0-based; None:
    after the final norm); ``pooling``: mean over the prompt's tokens, or last; ``top_k``,
    ``normalize``, ``temperature``: as of `RoutingRule`.
    """

    layer: int | None = None
    pooling: str = "mean"
    top_k: int = 1
    normalize: bool = True
    temperature: float = 1.0

    def check(self, experts: int, layers: int | None) -> None:
        """Raises ConfigError for what a model of so many ``layers`` (None: it names none) and so many
        experts cannot follow.
        """
        if self.pooling not in POOLINGS:
            raise ConfigError(f"router.pooling={self.pooling}: give {' or '.join(POOLINGS)}")
        if not 1 <= self.top_k <= experts:
            raise ConfigError(
                f"router.top_k={self.top_k}: a sequence may have 1 to {experts} of {experts} experts"
            )
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"router.temperature={self.temperature:g}: give a number above 0")
        if self.layer is not None and not 0 <= self.layer < (layers or 0):
            known = f"0 to {layers - 1}" if layers else "none that could be named"
            raise ConfigError(
                f"router.layer={self.layer}: this model's layers are {known}; leave it out for the state after the "
                "final norm"
            )

    def gates(self, scores: Tensor) -> Tensor:
        """[S,K] -> [S,K] fp32, 0 for the experts that a sequence does not have."""
        rule = RoutingRule(top_k=self.top_k, normalize=self.normalize)
        return rule.gates(scores.float() / self.temperature)


class PrototypeRouter:
    """A `SequenceRouter` and `MixtureRouter` by nearness. ``means`` [K,D] fp32: the mean state of some
    prompts of each expert; raw, so that an expert more or less leaves the others' as they are.
    """

    router_kind = "prototype"

    def __init__(self, adapters: Sequence[str], rule: PromptRule, means: Tensor) -> None:
        self.adapters: Sequence[str] = tuple(adapters)
        self.rule, self.means = rule, means
        self.layer, self.pooling, self.state_mix = rule.layer, rule.pooling, Mix.none()

    def scores(self, states: Tensor) -> Tensor:
        """states [S,D] -> cosines [S,K], of what is left without the mean over experts: all prompts
        share most of their state (a template, the language)."""
        centre = self.means.mean(0)
        return F.cosine_similarity(
            (states - centre)[:, None], (self.means - centre)[None], dim=-1, eps=1e-12
        )

    def gates(self, states: Tensor) -> Tensor:
        """[S,D] -> [S,K]."""
        return self.rule.gates(self.scores(states))

    def settings(self) -> Mapping[str, Any]:
        """The rule, and the width of the states."""
        return {**asdict(self.rule), "width": self.means.shape[1]}

    def tensors(self) -> Mapping[str, Tensor]:
        """The means."""
        return {"prototypes": self.means}

    def mix(self) -> Mix:
        """Every expert, gated by the router."""
        return Mix.by_prompt(self)

    def refuse_equal_means(self) -> None:
        """Raise ConfigError for two experts whose prompts nothing tells apart."""
        size = float(self.means.square().sum(1).max())
        for k, mean in enumerate(self.means):
            near = (self.means[:k] - mean).square().sum(1) <= SMALLEST_DIFFERENCE * size
            if bool(near.any()):
                other = self.adapters[int(near.nonzero()[0])]
                raise ConfigError(
                    f"experts {other!r} and {self.adapters[k]!r} have prompts of the same mean hidden state; nothing "
                    "tells them apart. Give each its own data"
                )


class ClassifierRouter:
    """A `SequenceRouter` and `MixtureRouter` that was trained: linears with ReLU between. ``weights``:
    [out, in] and [out] of each, fp32, by the names of `classifier_shapes`; ``training``: the record of
    how it was made, plain values that router.json keeps; ``adapter``: the bank's adapter, trained
    with it, that the base reads prompts with (None: the base alone).
    """

    router_kind = "sequence"

    def __init__(
        self,
        adapters: Sequence[str],
        rule: PromptRule,
        weights: Mapping[str, Tensor],
        training: Mapping[str, Any] | None = None,
        adapter: str | None = None,
    ) -> None:
        self.adapters: Sequence[str] = tuple(adapters)
        self.rule, self.weights, self.training = rule, dict(weights), training
        self.layer, self.pooling = rule.layer, rule.pooling
        self.state_mix = Mix.none() if adapter is None else Mix.one(adapter)

    def scores(self, states: Tensor) -> Tensor:
        """states [S,D] -> logits [S,K]."""
        return classify(self.weights, states)

    def gates(self, states: Tensor) -> Tensor:
        """[S,D] -> [S,K]."""
        return self.rule.gates(self.scores(states))

    def settings(self) -> Mapping[str, Any]:
        """The rule and the widths."""
        return classifier_settings(self.rule, self.weights, self.training)

    def tensors(self) -> Mapping[str, Tensor]:
        """The linears' values."""
        return self.weights

    def mix(self) -> Mix:
        """Every expert, gated by the router."""
        return Mix.by_prompt(self)


def classifier_shapes(
    width: int, hidden: Sequence[int], experts: int
) -> dict[str, tuple[int, ...]]:
    """{tensor: its shape} of a classifier, from the input up: `0.weight` [out, in], `0.bias` [out]."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (inputs, outputs) in enumerate(pairwise([width, *hidden, experts])):
        shapes |= {f"{number}.weight": (outputs, inputs), f"{number}.bias": (outputs,)}
    return shapes


def classifier_settings(
    rule: PromptRule, weights: Mapping[str, Tensor], training: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What router.json says of a classifier besides its experts: the rule, the widths of its input
    and between input and scores, and how it was made."""
    hidden = [len(weights[f"{n}.bias"]) for n in range(len(weights) // 2 - 1)]
    settings = {**asdict(rule), "hidden": hidden, "width": weights["0.weight"].shape[1]}
    return settings if training is None else {**settings, "training": dict(training)}


def classify(weights: Mapping[str, Tensor], states: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
    """states [S,D] -> logits [S,K]; ``masks``: of dropout, what multiplies each hidden layer."""
    x = states
    for number in range(len(weights) // 2):
        if number > 0:
            x = x.relu() * masks[number - 1] if masks else x.relu()
        x = F.linear(x, weights[f"{number}.weight"], weights[f"{number}.bias"])
    return x


def attach_sequence_router(model: nn.Module, router: PrototypeRouter | ClassifierRouter) -> None:
    """Make it the model's router. Raises ConfigError for an expert that is not attached, or is called
    as the router is, and for a rule that this model or these experts cannot follow."""
    bank = get_bank(model)
    # an attached adapter of that name is the router's own
    if ROUTER_NAME in router.adapters:
        raise ConfigError(f"an expert cannot be called {ROUTER_NAME!r}: that is the router's name")
    for name in router.adapters:
        bank[name]
    router.rule.check(len(router.adapters), layer_count(model))
    bank.routers[ROUTER_NAME] = router


def layer_count(model: nn.Module) -> int | None:
    """Layers whose output a model can give; None where it cannot say."""
    geometry: Any = getattr(model, "geometry", None)
    if geometry is not None:
        return int(geometry.layers)
    layers: Any = getattr(model, "layers", None)
    return len(layers) if isinstance(layers, (list, nn.ModuleList)) and len(layers) else None
