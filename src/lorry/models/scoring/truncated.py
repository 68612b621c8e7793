"""What is kept of a teacher's distribution: its k likeliest tokens and, at any temperature, the
probability of all others.

    kept = Truncated.of(logits, k=64)           # 6 k + 48 bytes a token when stored
    kept.log_probs(temperature=2.0)             # [t,k] fp32

softmax(z / tau) of the k tokens needs the sum over the others of p^(1/tau). Its logarithm is a
smooth function of s = 1/tau (a cumulant generating function), so its values at a few Chebyshev
nodes give it anywhere between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.errors import ConfigError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.5, 8.0  # temperatures
NODE_COUNT = 12
ZERO_LOG_PROB = -200.0  # the logarithm of a probability that is nothing


def _temperature_nodes() -> list[float]:
    """1/temperature: the Chebyshev nodes of the range."""
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    return [
        (low + high) / 2 + (high - low) / 2 * math.cos(math.pi * (2 * i + 1) / (2 * NODE_COUNT))
        for i in range(NODE_COUNT)
    ]


@dataclass(frozen=True)
class TruncatedDistribution:
    """ids [t,k] int32, likeliest first; logp [t,k] their log-probabilities at temperature 1, fp16;
    rest [t,NODES] fp32, the logarithm of the sum over all other tokens of p^s at each node."""

    ids: Tensor
    logp: Tensor
    rest: Tensor

    @staticmethod
    def of(logits: Tensor, k: int) -> TruncatedDistribution:
        """From logits [t,V] at temperature 1; at most V - 1 tokens are kept."""
        logp = logits.float().log_softmax(1)
        near, ids = logp.topk(min(k, logp.shape[1] - 1), 1)
        logp = logp.scatter(1, ids, -torch.inf)
        rest = torch.stack([(logp * s).logsumexp(1) for s in _temperature_nodes()], 1).clamp(
            min=ZERO_LOG_PROB
        )
        return TruncatedDistribution(ids.to(torch.int32), near.half(), rest)

    def log_probs(self, temperature: float) -> Tensor:
        """[t,k] fp32: log softmax(z / temperature) of the tokens kept. Raises ConfigError for a
        temperature out of range.
        """
        check_temperature(temperature)
        s, nodes = 1 / temperature, _temperature_nodes()
        weights = [math.prod((s - b) / (a - b) for b in nodes if b != a) for a in nodes]
        rest = self.rest @ torch.tensor(weights, dtype=torch.float32)
        near = self.logp.float() * s
        return near - torch.cat([near, rest[:, None]], 1).logsumexp(1, keepdim=True)


def check_temperature(temperature: float) -> None:
    """Raises ConfigError unless what is stored answers for the temperature."""
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ConfigError(
            f"distill.temperature={temperature} with a cache: a cache supports "
            f"{MIN_TEMPERATURE} to {MAX_TEMPERATURE}; leave out distill.cache"
        )
