"""The way of a policy from slime's trainer to its engines, and the proof that it arrived.

    --lora-sync merged     engines get W + s B A as the weights of a plain model: out of place, one
                           bucket beside the base, by whichever updater slime was told to use
    --lora-sync adapter    engines get the base once, then a PEFT directory per version, which they
                           load under a name of its own

Exactly one of the two reaches an engine. Of each version (`--lora-check-every`) what was sent is
compared with what was trained and with what the engines hold; a difference stops the run, by the name
of a tensor, before anything is sampled.

    names = install_sync(args)        # in slime's --custom-megatron-init-path, before there is a model
"""

from typing import Any

__all__ = ["install_sync"]


def install_sync(args: Any) -> list[str]:
    """Put the sync, the checkpoints and the backups of adapters in the place of slime's, in this
    process; models without adapters (critics) pass as before. Returns the dotted names of what was
    rebound. Raises ConfigError for arguments that cannot work, or another slime."""
    # needs Megatron, which whoever only reads flags has not
    from lorry.integrations.slime.sync.install import rebind

    return rebind(args)
