"""The proof that engines answered with the policy, where the trainer has no memory while weights are sent
(`--offload-train`, which `--colocate` sets): engines cannot be asked then, but a rollout's answers come with
their log-probabilities, and these are compared with the trainer's before a step is made on them.

slime hands a rollout to `--rollout-data-postprocess-path`, which has no model, and then calls
`before_train_step`, which has one: the first keeps a few rows on slime's namespace, the other looks at them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lorry.errors import ContractError
from lorry.generation.request import Completion
from lorry.integrations.rollout.proofs import GreedyProbe
from lorry.integrations.slime.arguments import lora_argument
from lorry.integrations.slime.sync.ranks import say

# few and short: their logits lie on the GPU together, whole rows of the vocabulary
MOST_ROWS, MOST_TOKENS = 4, 128
KEPT = "lorry_rollout"


class RolloutRow(NamedTuple):
    """An answer's beginning with what its engine said of each token."""

    prompt: list[int]
    answer: list[int]
    logprobs: list[float]


def compare_rollout(
    args: Any, rollout_id: int | None = None, rollout_data: Mapping[str, Any] | None = None
) -> None:
    """slime's hook before a rollout is trained on. Raises ContractError where slime hands over no data,
    or data without log-probabilities."""
    every: int = lora_argument(args, "lora_check_every")
    if not every or (rollout_id or 0) % every:
        return
    if not rollout_data or not rollout_data.get("rollout_log_probs"):
        raise ContractError(
            "this slime hands --rollout-data-postprocess-path no rollout_log_probs, with which the "
            "engines' answers would be compared; leave the flag out"
        )
    setattr(args, KEPT, _pick_rows(rollout_data))


def _pick_rows(data: Mapping[str, Any]) -> list[RolloutRow]:
    """The rows with the shortest prompts, of those whose log-probabilities are whole (with context
    parallelism a rank has a part)."""
    tokens, values = data["tokens"], data["rollout_log_probs"]
    lengths = [int(length) for length in data["response_lengths"]]
    prompts = [len(ids) - length for ids, length in zip(tokens, lengths, strict=True)]
    whole = [n for n, start in enumerate(prompts) if start > 0 and 0 < lengths[n] == len(values[n])]
    rows = []
    for n in sorted(whole, key=prompts.__getitem__)[:MOST_ROWS]:
        start, stop = prompts[n], prompts[n] + min(lengths[n], MOST_TOKENS)
        # one transfer each: they lie on the GPU
        ids = torch.as_tensor(tokens[n][:stop]).tolist()
        said = torch.as_tensor(values[n][: stop - start]).tolist()
        rows.append(RolloutRow(ids[:start], ids[start:], said))
    return rows


def check_kept_rollout(args: Any, model: Sequence[Any], rollout_id: int) -> None:
    """Compare what was kept of a rollout with the trainer's log-probabilities; nothing where none was.
    Every rank calls it. Raises ContractError."""
    from lorry.integrations.megatron.files import on_every_rank
    from lorry.integrations.slime.sync.scores import answer_log_probs

    rows: list[RolloutRow] | None = args.__dict__.pop(KEPT, None)
    if rows is None:
        return
    label = f"rollout {rollout_id}"
    if not rows:
        on_every_rank(model, lambda: None)
        say(f"{label}: no row has all of its log-probabilities on one rank; nothing was compared")
        return
    prompts, answers = [row.prompt for row in rows], [row.answer for row in rows]
    # as engines give them: of the distribution that was sampled from
    heat = float(getattr(args, "rollout_temperature", 1.0))
    policy, base = (
        answer_log_probs(model, prompts, answers, args.vocab_size, base=base, temperature=heat)
        for base in (False, True)
    )
    # sampled tokens may be rare ones, of which two kernels differ by more: only the mean is bounded
    probe = GreedyProbe(prompts, lambda *_: policy, lambda *_: base, bound=math.inf)
    said = [Completion(row.answer, "stop", row.logprobs) for row in rows]
    gap = on_every_rank(model, lambda: probe.compare(said, label, "the policy"))
    say(
        f"{label}: engines' log-probabilities of {gap.tokens} tokens are {gap.mean:.3g} nats from the "
        f"trainer's on average (bound {probe.mean_bound:g})"
    )
