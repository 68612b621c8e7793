"""A push of an adapter to rollout engines: published, loaded, proved, and the last one let go.

sync = AdapterSync(VersionPublisher("rollout"), [engine], GreedyProbe(prompts, score))
report = sync.push(adapter_files(model), stepped=True)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorry.errors import ConfigError, ContractError
from lorry.integrations.rollout.engine import LoraReceiver, RolloutEngine
from lorry.integrations.rollout.proofs import GreedyProbe, LogProbGap, check_held, check_moved
from lorry.integrations.rollout.versions import AdapterVersion, VersionPublisher


@dataclass(frozen=True)
class SyncReport:
    """What one push did. ``seconds``: writing and loading, without the probe; ``bytes``: sent to
    each engine; ``gaps``: {engine's label: what the probe measured} of those that were asked."""

    version: AdapterVersion
    seconds: float
    bytes: int
    gaps: Mapping[str, LogProbGap] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.version.name}: {self.bytes} bytes in {self.seconds:.2f} s, digests equal"
        for label, gap in self.gaps.items():
            share = (
                ""
                if gap.share is None
                else f", share {gap.share:.2f} +- {gap.share_error or 0:.2f}"
            )
            text += (
                f"; {label}: log-probabilities {gap.mean:.3g} on average, {gap.largest:.3g} at most "
                f"from the trainer's over {gap.tokens} tokens{share}"
            )
        return text


class AdapterSync:
    """The versions of one policy on their way to ``receivers``. ``probe``: what each that answers
    prompts is asked; None: digests only. After an error the engines hold what they held, and
    perhaps the refused version, and ``current`` is the last proved one: stop, or push again."""

    def __init__(
        self,
        publisher: VersionPublisher,
        receivers: Sequence[LoraReceiver],
        probe: GreedyProbe | None = None,
    ) -> None:
        if not receivers:
            raise ConfigError("there is no engine to send adapters to; name at least one")
        self.publisher, self.receivers, self.probe = publisher, receivers, probe
        self.current: AdapterVersion | None = None

    def push(self, files: Mapping[str, bytes], *, stepped: bool) -> SyncReport:
        """Publish an adapter's files as the next version and have every engine hold it.
        ``stepped``: an optimizer step with a gradient was made since the last push. Raises
        ContractError, which names the tensor or the prompt, EngineError and DiskError.
        """
        began = time.perf_counter()
        version = self.publisher.publish(files)
        check_moved(version, self.current, stepped=stepped)
        for receiver in self.receivers:
            receiver.load_lora_adapter(version)
            check_held(receiver, version)
        seconds = time.perf_counter() - began
        gaps = dict[str, LogProbGap]()
        if self.probe is not None and self.probe.due(version.number):
            for receiver in self.receivers:
                if isinstance(receiver, RolloutEngine):
                    gaps[receiver.label] = self.probe.check(receiver, version.name)
        if self.current is not None:
            for receiver in self.receivers:
                receiver.unload_lora_adapter(self.current.name)
        self.current = version
        return SyncReport(version, seconds, version.bytes, gaps)

    def check_rollouts(self, adapter: str) -> None:
        """Refuse rollouts that were sampled from another version than the current one. Raises
        ContractError."""
        expected = None if self.current is None else self.current.name
        if adapter != expected:
            raise ContractError(
                f"rollouts were sampled from {adapter}, and the policy is {expected or 'not sent yet'}"
            )
