"""What stands in the place of slime's updaters' methods: each sends what it always did, with adapters in
the weights, or the base alone and then an adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorry.integrations.megatron.attach import list_chunks
from lorry.integrations.megatron.files import gather_lora, lora_files, on_every_rank
from lorry.integrations.rollout.sync import AdapterSync
from lorry.integrations.rollout.versions import VersionPublisher, is_version
from lorry.integrations.slime.arguments import lora_argument
from lorry.integrations.slime.checkpoints import BASE_DIGEST, STEPS
from lorry.integrations.slime.limits import versions_directory
from lorry.integrations.slime.sync.engines import ask, server_of
from lorry.integrations.slime.sync.proof import VersionProof
from lorry.integrations.slime.sync.ranks import is_first, say
from lorry.integrations.slime.sync.weights import (
    MergedWeights,
    NamedWeights,
    base_weights,
    has_adapters,
    merged_weights,
)


class WeightSync:
    """The sync of one training process. ``named``: slime's `named_params_and_buffers`; ``merging``:
    whether what is converted now has adapters in it."""

    def __init__(self, args: Any, named: NamedWeights) -> None:
        self.args, self.named = args, named
        self.proof = VersionProof(args)
        self.merging = True
        self._by_adapter = lora_argument(args, "lora_sync") == "adapter"
        self._base_held = False
        self._push: AdapterSync | None = None
        self._steps_sent = 0

    def merge_buckets(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`HfWeightIteratorDirect.get_hf_weight_chunks`, by which colocated engines, the disk and
        --save-hf are served: weights are merged one by one as it asks for them."""

        def get_hf_weight_chunks(
            iterator: Any, weights: Mapping[str, Tensor], *given: Any, **more: Any
        ) -> Iterator[Any]:
            if self.merging and has_adapters(iterator.model):
                weights = MergedWeights(self.named, iterator.args, iterator.model, weights)
            for bucket in original(iterator, weights, *given, **more):
                # every rank has the whole tensors; one of them looks
                if self.proof.sent is not None and is_first():
                    self.proof.sent.add(bucket)
                yield bucket

        return get_hf_weight_chunks

    def choose_weights(self, original: NamedWeights) -> NamedWeights:
        """`named_params_and_buffers`, as the distributed updater reads it."""
        base, merged = base_weights(original), merged_weights(original)

        def named_params_and_buffers(*given: Any, **more: Any) -> Any:
            return (merged if self.merging else base)(*given, **more)

        return named_params_and_buffers

    def see_bucket(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A bucket of the distributed updater, on the ranks that send."""

        def _update_bucket_weights_from_distributed(
            updater: Any, bucket: Any, *given: Any, **more: Any
        ) -> Any:
            if self.proof.sent is not None:
                self.proof.sent.add(bucket)
            return original(updater, bucket, *given, **more)

        return _update_bucket_weights_from_distributed

    def connect(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`connect_rollout_engines`: a new engine holds nothing of ours."""

        def connect_rollout_engines(updater: Any, *given: Any, **more: Any) -> Any:
            self._base_held, self._push = False, None
            return original(updater, *given, **more)

        return connect_rollout_engines

    def update(self, kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """`update_weights` of the updater of a kind: Tensor, Distributed or Disk."""

        def replace(original: Callable[..., Any]) -> Callable[..., Any]:
            def update_weights(updater: Any, *given: Any, **more: Any) -> None:
                if has_adapters(updater.model):
                    self._update(updater, kind, original)
                else:
                    original(updater, *given, **more)

            return update_weights

        return replace

    def _update(self, updater: Any, kind: str, original: Callable[..., Any]) -> None:
        model, number = updater.model, updater.weight_version + 1
        whole = self._gather(updater, kind)
        steps = list_chunks(model)[0].__dict__.get(STEPS, 0)
        stepped, self._steps_sent = steps > self._steps_sent, steps
        if self._by_adapter:
            if self._base_held:
                updater.weight_version = number
            else:
                self._send_weights(updater, kind, original, {})
                self._base_held = True
            on_every_rank(model, lambda: self._load(updater, whole, stepped))
        else:
            if self.proof.due(number):
                self.proof.check_moved(model, number, whole, stepped=stepped)
            self._send_weights(updater, kind, original, whole)
        if self.proof.due(number):
            held = None if self._push is None else self._push.current
            self.proof.check_answers(updater, None if held is None else held.name)

    def _gather(self, updater: Any, kind: str) -> dict[str, Tensor]:
        """The whole adapter as it is sent: slime's copies of it where slime sends those."""
        if kind != "Tensor":
            return gather_lora(updater.model)
        copies = updater.weights_getter()
        names = {id(tensor): name for name, tensor in self.named(self.args, updater.model)}

        def value(parameter: nn.Parameter) -> Tensor:
            copy: Tensor = copies[names[id(parameter)]]
            return copy

        return gather_lora(updater.model, value)

    def _send_weights(
        self,
        updater: Any,
        kind: str,
        original: Callable[..., Any],
        whole: Mapping[str, Tensor],
    ) -> None:
        """A version by slime's own updater, with the adapter in it (``whole``: its matrices), or the
        base alone (empty)."""
        self.merging = bool(whole)
        try:
            if not self.proof.due(updater.weight_version + 1):
                original(updater)
                return
            with self.proof.looking(updater.model, whole) as sent, self._kept_files(kind, updater):
                original(updater)
                self.proof.check_sent(updater, sent, self._files(kind, updater))
        finally:
            self.merging = True

    def _load(self, updater: Any, whole: Mapping[str, Tensor], stepped: bool) -> None:
        """Publish a version of the adapter and have the engines load it, on the rank that talks to
        them."""
        digest = list_chunks(updater.model)[0].__dict__.get(BASE_DIGEST)
        files = lora_files(
            updater.model, whole, base_name=str(self.args.hf_checkpoint), base_digest=digest
        )
        if not is_first():
            return
        engines = list(updater.rollout_engines)
        if self._push is None:
            publisher = VersionPublisher(versions_directory(self.args))
            self._push = AdapterSync(publisher, [server_of(engine) for engine in engines])
        ask(engines, "pause_generation")
        ask(engines, "flush_cache")
        try:
            report = self._push.push(files, stepped=stepped)
            self._unload_others(report.version.name)
        finally:
            ask(engines, "continue_generation")
        say(str(report))

    def _unload_others(self, name: str) -> None:
        """Let go of versions that engines took before one of them was started again."""
        assert self._push is not None
        for engine in self._push.receivers:
            for held in engine.list_lora_adapters():
                if is_version(held) and held != name:
                    engine.unload_lora_adapter(held)

    def _files(self, kind: str, updater: Any) -> Path | None:
        """The directory of the disk updater's version."""
        if kind != "Disk":
            return None
        return Path(self.args.update_weight_disk_dir) / f"weight_v{updater.weight_version:06d}"

    @contextmanager
    def _kept_files(self, kind: str, updater: Any) -> Iterator[None]:
        """slime removes files that engines have read; not before they were looked at."""
        if kind != "Disk":
            yield
            return
        before = self.args.update_weight_disk_keep_files
        self.args.update_weight_disk_keep_files = True
        try:
            yield
        finally:
            self.args.update_weight_disk_keep_files = before
        folder = self._files(kind, updater)
        if not before and is_first() and folder is not None:
            shutil.rmtree(folder)
