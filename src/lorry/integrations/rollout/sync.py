"""A push of a policy to rollout engines: published, loaded, proved, and the last version let go.

sync = AdapterSync(VersionPublisher("rollout"), [engine], GreedyProbe(prompts, score))
report = sync.push(adapter_files(model), stepped=True)

sync = MergedSync(ModelPublisher("rollout"), [engine], GreedyProbe(prompts, score))
report = sync.push(lambda folder: save_merged(model, folder), stepped=True)
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorry.errors import ConfigError, ContractError
from lorry.integrations.rollout.engine import LoraReceiver, ModelReceiver, PromptAnswerer
from lorry.integrations.rollout.proofs import (
    GreedyProbe,
    LogProbGap,
    check_held,
    check_moved,
    check_same_tensors,
)
from lorry.integrations.rollout.versions import (
    AdapterVersion,
    ModelPublisher,
    ModelVersion,
    Version,
    VersionPublisher,
    model_tensor_facts,
)


@dataclass(frozen=True)
class SyncReport:
    """What one push did. ``seconds``: writing and loading, without the probe; ``bytes``: sent to
    each engine; ``gaps``: {engine's label: what the probe measured} of those that were asked;
    ``unasked``: labels of those that answer no prompts, where a probe was due."""

    version: Version
    seconds: float
    bytes: int
    gaps: Mapping[str, LogProbGap] = field(default_factory=dict)
    unasked: Sequence[str] = ()

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
        return text + "".join(f"; {label}: not asked" for label in self.unasked)


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
        gaps, unasked = ask_engines(self.probe, self.receivers, version, adapter=version.name)
        if self.current is not None:
            for receiver in self.receivers:
                receiver.unload_lora_adapter(self.current.name)
        self.current = version
        return SyncReport(version, seconds, version.bytes, gaps, unasked)

    def check_rollouts(self, adapter: str) -> None:
        """Refuse rollouts that were sampled from another version than the current one. Raises
        ContractError."""
        expected = None if self.current is None else self.current.name
        if adapter != expected:
            raise ContractError(
                f"rollouts were sampled from {adapter}, and the policy is {expected or 'not sent yet'}"
            )


class MergedSync:
    """Whole models on their way to ``receivers``, in the place of their base: adapters are merged into
    them, so an engine that also holds an adapter is refused. ``probe`` and errors as `AdapterSync`.
    Weights in bfloat16 lose what of a small adapter is below their rounding; the share says how much
    is left."""

    def __init__(
        self,
        publisher: ModelPublisher,
        receivers: Sequence[ModelReceiver],
        probe: GreedyProbe | None = None,
    ) -> None:
        if not receivers:
            raise ConfigError("there is no engine to send models to; name at least one")
        self.publisher, self.receivers, self.probe = publisher, receivers, probe
        self.current: ModelVersion | None = None

    def push(self, write: Callable[[Path], None], *, stepped: bool) -> SyncReport:
        """Have ``write`` fill the next version's folder with a merged model, and every engine take
        it. ``stepped`` and errors as `AdapterSync.push`."""
        began = time.perf_counter()
        for receiver in self.receivers:
            if held := receiver.list_lora_adapters():
                raise ContractError(
                    f"{receiver.label}: holds the adapter {next(iter(held))}, which would count twice "
                    "over weights into which it is merged; unload it first"
                )
        version = self.publisher.publish(write)
        check_moved(version, self.current, stepped=stepped)
        sent = {name: facts.sha256 for name, facts in version.tensors.items()}
        for receiver in self.receivers:
            receiver.load_model(version)
            read = model_tensor_facts(version.path)
            held_digests = {name: facts.sha256 for name, facts in read.items()}
            check_same_tensors(sent, held_digests, f"{receiver.label}, {version.name}")
        seconds = time.perf_counter() - began
        gaps, unasked = ask_engines(self.probe, self.receivers, version, adapter=None)
        self.current = version
        return SyncReport(version, seconds, version.bytes, gaps, unasked)


def ask_engines(
    probe: GreedyProbe | None,
    receivers: Sequence[LoraReceiver | ModelReceiver],
    version: Version,
    *,
    adapter: str | None,
) -> tuple[dict[str, LogProbGap], list[str]]:
    """({label: what the probe found} of the receivers that answer prompts, the labels of the others),
    where a version is due. A warning says of the others what is not proved of them. Raises what
    `GreedyProbe.check` raises."""
    if probe is None or not probe.due(version.number):
        return {}, []
    gaps, unasked = dict[str, LogProbGap](), list[str]()
    for receiver in receivers:
        if isinstance(receiver, PromptAnswerer):
            gaps[receiver.label] = probe.check(receiver, adapter)
        else:
            unasked.append(receiver.label)
            # without the version: Python shows the same text once
            warnings.warn(
                f"{receiver.label}: answers no prompts (it has no `generate`), so that it computes with "
                "what it holds is not proved: its log-probabilities are compared with nobody's; give it "
                "a `generate`, or leave the probe out where digests are enough",
                stacklevel=3,
            )
    return gaps, unasked
