"""The first values of a token router (`router.init=hidden`): in every layer, the linear that least
squares finds between what the router reads in the base and whose row it is.

    W = s argmin sum over tokens of v (W x - y)^2 + ridge |W|^2

x [F] a token's normed input (with hidden layers, what they make of it), y [K] 1 at its expert less
1/K, v such that every expert's rows weigh the same. Up to its scale s that is linear discriminant
analysis with one covariance for all. (The mean inputs of experts' rows, which mergekit-moe's
gate mode `hidden` takes, lie in directions that all tokens share: docs/experts.md.) s is that of the
least cross-entropy on rows that W has not seen, so that a layer that tells nothing apart begins at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.adapters.mix import AdapterContext, Half, Level, Mix
from lorry.adapters.router import TokenRouter
from lorry.data.batch import Batch
from lorry.models.causal_lm import CausalLM, PackedInput

# of the mean of x^2: of the hundreds or thousands of directions some have hardly been seen
RIDGE = 1e-3
# W x of least squares is y at best, 0.5 apart for two experts: these are up to several nats
SCALES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
HELD_OUT = 4  # every so manieth row chooses the scale

Site = tuple[int, Half]


def split_rows_for_scale(count: int) -> tuple[list[int], list[int]]:
    """(numbers of the rows that W is fitted to, of those that choose its scale); of a single row the
    same."""
    held = [n for n in range(count) if n % HELD_OUT == HELD_OUT - 1] or [count - 1]
    return [n for n in range(count) if n not in held] or held, held


class InputRecorder:
    """A `LayerRouter` that gates nothing and adds up what ``read(layer, half, x)`` makes of the
    layers' normed inputs x [T,D]. ``tokens``: how many of a pass are real; a decoder may pad it.
    """

    adapters: Sequence[str] = ()
    level: Level = "delta"

    def __init__(self, halves: Sequence[Half], read: Callable[[int, Half, Tensor], Tensor]) -> None:
        self.halves, self.read, self.tokens, self.count = halves, read, 0, 0
        self.sums: dict[Site, Tensor] = {}

    def parameters(self, layer: int) -> list[Tensor]:
        """None."""
        return []

    def logits(self, layer: int, half: Half, x: Tensor) -> Tensor:
        """[T, 0], and x is read."""
        seen = self.read(layer, half, x[: self.tokens])
        before = self.sums.get((layer, half))
        self.sums[layer, half] = seen if before is None else before.add_(seen)
        return x.new_zeros(x.shape[0], 0)

    def gates(self, logits: Tensor) -> Tensor:
        """Nothing to gate."""
        return logits

    def run(self, model: CausalLM, batches: Sequence[Batch]) -> dict[Site, Tensor]:
        """The means over the batches' tokens of what is read in the base, by layer and half."""
        for batch in batches:
            packed = PackedInput(batch.tokens, batch.positions, batch.segments)
            self.tokens = batch.tokens.numel()
            self.count += self.tokens
            model.hidden(packed, AdapterContext(Mix((), self)))
        return {site: total.div_(self.count) for site, total in self.sums.items()}


@torch.no_grad()
def start_at_discriminants(
    model: CausalLM,
    router: TokenRouter,
    fitted: Mapping[str, Sequence[Batch]],
    held: Mapping[str, Sequence[Batch]],
) -> None:
    """Set the last matrix of each of the router's layers and halves to the discriminant of the
    experts' rows (module docstring). ``fitted``: the rows of each that W is fitted to; ``held``: those
    that choose its scale.

    Two passes of the base, over each of them; while it is at work it holds a matrix [F,F] in fp32 for
    each layer and half, a sixth of a layer's weights in bf16.
    """

    def moments(layer: int, half: Half, x: Tensor) -> Tensor:
        """[F+1,F]: x x^T summed over tokens, and below it x."""
        features = router.features(layer, half, x)
        return torch.cat([features.t() @ features, features.sum(0, keepdim=True)])

    seconds, means = dict[Site, Tensor](), {site: list[Tensor]() for site in router.weights}
    for name in router.adapters:
        for site, both in InputRecorder(router.halves, moments).run(model, fitted[name]).items():
            means[site].append(both[-1].double())
            second = both[:-1] / len(router.adapters)
            seconds[site] = seconds[site].add_(second) if site in seconds else second
    for site, weight in router.weights.items():
        # logits are W x over the temperature
        found = least_squares(seconds.pop(site), torch.stack(means[site]))
        weight.copy_(found * router.rule.temperature)
    costs = dict[Site, Tensor]()
    for own, name in enumerate(router.adapters):

        def cross_entropies(layer: int, half: Half, x: Tensor, own: int = own) -> Tensor:
            """[scales], summed over tokens."""
            z = router.logits(layer, half, x).double()
            rows = torch.full((z.shape[0],), own, device=z.device)
            return torch.stack([F.cross_entropy(s * z, rows, reduction="sum") for s in SCALES])

        found_costs = InputRecorder(router.halves, cross_entropies).run(model, held[name])
        for site, cost in found_costs.items():
            costs[site] = costs[site] + cost if site in costs else cost
    for site, weight in router.weights.items():
        weight.mul_(SCALES[int(costs[site].argmin())])


def least_squares(second: Tensor, means: Tensor) -> Tensor:
    """W [K,F] fp64 of the mean x x^T over all tokens [F,F], experts weighed equally, and each
    expert's mean x [K,F]."""
    s = second.double()
    # no less than the smallest number: hidden layers may make 0 of all inputs
    s.diagonal().add_((RIDGE * s.diagonal().mean()).clamp(min=torch.finfo(s.dtype).tiny))
    # mean of y x^T: an expert's tokens are 1/K of all
    cross = (means - means.mean(0)) / len(means)
    return torch.linalg.solve(s, cross.t()).t()
