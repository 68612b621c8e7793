"""Which policy a pass of slime's runs: the base alone for the reference and for teachers, the adapter for
everything else. What `--custom-megatron-before-log-prob-hook-path` and
`--custom-megatron-before-train-step-hook-path` name.

slime scores the reference by loading its weights over the actor's. A checkpoint of a base has no adapters, so those
that are there would stay: after a resume, KL from the reference would be KL from the trained policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorry.errors import ConfigError
from lorry.integrations.slime.sync.rollouts import check_kept_rollout

# of the scores' names, whether they are the adapter's
PASSES = {"": True, "ref_": False, "teacher_": False}
# steps of a rollout before two rollouts' step numbers would meet
MOST_STEPS = 1 << 20


def before_log_prob(args: Any, model: Sequence[Any], store_prefix: str) -> None:
    """slime's hook before every scoring pass. ``store_prefix``: "ref_" and "teacher_" run without the
    adapter, "" with it; ConfigError for a pass that slime had not when this was written."""
    from lorry.integrations.megatron.attach import set_lora_enabled

    if _is_critic(model):
        return
    if store_prefix not in PASSES:
        raise ConfigError(
            f"slime scores {store_prefix!r}, of which this plugin does not know whether it is with the "
            f"adapter or without; it knows {', '.join(map(repr, PASSES))}"
        )
    set_lora_enabled(model, PASSES[store_prefix])


def before_train_step(
    args: Any,
    rollout_id: int,
    step_id: int,
    model: Sequence[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
) -> None:
    """slime's hook before every training step: the adapter is on, and its dropout knows the step. What
    `compare_rollout` kept is compared before the first. Raises ContractError."""
    from lorry.integrations.megatron.attach import set_dropout_step, set_lora_enabled

    if not _is_critic(model):
        set_lora_enabled(model, True)
        check_kept_rollout(args, model, rollout_id)
        set_dropout_step(model, rollout_id * MOST_STEPS + step_id)


def _is_critic(model: Sequence[Any]) -> bool:
    """slime writes the role on the first chunk; a critic has no adapter."""
    return getattr(model[0], "role", "actor") == "critic"
