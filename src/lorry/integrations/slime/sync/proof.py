"""The proof of each version: that it is a new one, that what was sent is what was trained, that the
engines hold it, and that they answer with it. Every rank calls every method; what one of them finds is
raised on all, so that nobody waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorry.errors import ContractError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.megatron.attach import get_adapter, list_chunks
from lorry.integrations.megatron.files import lora_files, on_every_rank
from lorry.integrations.rollout.digests import read_tensor_facts
from lorry.integrations.rollout.proofs import GreedyProbe, check_moved, check_same_tensors
from lorry.integrations.rollout.versions import AdapterVersion, model_tensor_facts
from lorry.integrations.slime.arguments import lora_argument
from lorry.integrations.slime.checkpoints import BASE_IS_FILE
from lorry.integrations.slime.sync.base_file import BaseFile
from lorry.integrations.slime.sync.engines import (
    ask,
    find_server,
    held_row,
    refuse_adapters,
)
from lorry.integrations.slime.sync.ranks import from_first, is_first, say
from lorry.integrations.slime.sync.scores import answer_log_probs, fixed_prompts
from lorry.integrations.slime.sync.sent import SentWeights
from lorry.runs.layout import ADAPTER_WEIGHTS

ANSWER_TOKENS = 16


class VersionProof:
    """The proofs of one training process's versions. ``sent``: what the version that is being sent was
    seen to be; None while nobody looks."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.sent: SentWeights | None = None
        self._previous: AdapterVersion | None = None

    def due(self, number: int) -> bool:
        """Whether a version of this number is proved (`--lora-check-every`)."""
        every: int = lora_argument(self.args, "lora_check_every")
        return every > 0 and number % every == 0

    def check_moved(
        self, model: Any, number: int, whole: Mapping[str, Tensor], *, stepped: bool
    ) -> None:
        """``whole``: the adapter's matrices as they are about to be merged. Raises ContractError where
        a step was made and they are zero, or the last version's."""
        where = f"merged version {number}"
        content = lora_files(model, whole)[ADAPTER_WEIGHTS]
        version = AdapterVersion(
            number, Path(where), read_tensor_facts(content, where), len(content)
        )
        on_every_rank(model, lambda: check_moved(version, self._previous, stepped=stepped))
        self._previous = version

    @contextmanager
    def looking(self, model: Any, whole: Mapping[str, Tensor]) -> Iterator[SentWeights]:
        """Look at what goes out while the block runs. ``whole``: the adapter that has to be in it, empty
        where none may be."""
        chunk = list_chunks(model)[0]
        adapter = get_adapter(chunk)
        base = None
        if chunk.__dict__.get(BASE_IS_FILE):
            base = BaseFile.open(self.args.hf_checkpoint)
        adapted = frozenset(f"{path}.weight" for path in adapter.paths)
        self.sent = SentWeights(base, adapter.spec, whole, adapted)
        try:
            yield self.sent
        finally:
            self.sent = None

    def check_sent(self, updater: Any, sent: SentWeights, folder: Path | None) -> None:
        """Compare what was sent with what it has to be, and with what engines hold. ``folder``: of the
        files that they read. Raises ContractError, which names a tensor."""
        model, version = updater.model, f"version {updater.weight_version}"
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (sent.digests, sent.bytes))
        digests = {name: digest for each, _ in every for name, digest in each.items()}
        sent.note_missing(digests)
        on_every_rank(model, lambda: sent.check(version))

        def hold() -> None:
            if not is_first():
                return
            files = ""
            if folder is not None:
                read = {name: facts.sha256 for name, facts in model_tensor_facts(folder).items()}
                check_same_tensors(digests, read, f"{folder}, {version}")
                files = "the files that engines read have their SHA-256; "
            held = files + self._check_engines(updater, sent)
            are = "" if sent.base is None else ", each of them W + s B A of the files"
            size = sum(size for _, size in every)
            say(f"{version}: {len(digests)} tensors, {size} bytes sent{are}; {held}")

        on_every_rank(model, hold)

    def check_answers(self, updater: Any, adapter: str | None) -> None:
        """Compare greedy answers' log-probabilities, by every engine that can be asked and by the
        trainer. ``adapter``: the name that engines know it by, None: merged. Raises ContractError, which
        names the prompt."""
        args, model = self.args, updater.model
        if getattr(args, "offload_train", False):
            return  # the model's memory is given up meanwhile: `rollouts.compare_rollout`
        servers = []
        if is_first():
            found = map(find_server, updater.rollout_engines)
            servers = [server for server in found if server is not None]
        for number in range(from_first(len(servers))):
            prompts = fixed_prompts(args.hf_checkpoint, args.vocab_size)

            def answer(number: int = number, prompts: Any = prompts) -> list[Completion]:
                if not is_first():
                    return []
                params = SamplingParams(max_new_tokens=ANSWER_TOKENS, logprobs=True)
                return servers[number].generate(prompts, params, adapter=adapter)

            answers = from_first(on_every_rank(model, answer))
            tokens = [each.tokens for each in answers]
            policy = answer_log_probs(model, prompts, tokens, args.vocab_size)
            base = answer_log_probs(model, prompts, tokens, args.vocab_size, base=True)
            self._compare(updater, number, answers, (prompts, policy, base), adapter)

    def _compare(
        self, updater: Any, number: int, answers: Any, scored: Any, adapter: str | None
    ) -> None:
        prompts, policy, base = scored
        probe = GreedyProbe(prompts, lambda *_: policy, lambda *_: base)
        label = f"engine {number}, version {updater.weight_version}"
        gap = on_every_rank(
            updater.model, lambda: probe.compare(answers, label, adapter or "merged")
        )
        say(
            f"{label}: log-probabilities of {gap.tokens} tokens are {gap.mean:.3g} nats from the trainer's "
            f"on average (bound {probe.mean_bound:g}), {gap.largest:.3g} at most (bound {probe.bound:g})"
        )

    def _check_engines(self, updater: Any, sent: SentWeights) -> str:
        """Ask every engine for its version, and for rows of its weights where they can be had."""
        asked, version = 0, updater.weight_version
        for number, engine in enumerate(updater.rollout_engines):
            (told,) = ask([engine], "get_weight_version")
            if told is not None and str(told) != str(version):
                raise ContractError(
                    f"engine {number} holds version {told}, and version {version} was sent"
                )
            if sent.adapter:
                refuse_adapters(engine, f"engine {number}")
            for name, row in sent.rows.items():
                held = held_row(engine, name, self.args)
                if held is None:
                    break
                if not torch.equal(held.to(row.dtype), row):
                    raise ContractError(
                        f"engine {number}: {name} is not what was sent as version {version}"
                    )
            else:
                asked += 1
        total = len(updater.rollout_engines)
        return (
            f"{total} engines hold this version, of {asked} of them rows of weights were compared"
        )
