"""The begin of a training process: what `--custom-megatron-init-path` names. There is no model yet."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

import torch.distributed as dist

from lorry.integrations.slime.arguments import check_arguments, complete_arguments
from lorry.integrations.slime.provider import INSTALLED, rebind_provider
from lorry.integrations.slime.rebinding import Rebinding
from lorry.integrations.slime.sync import install_sync

TESTED_VERSION, TESTED_COMMIT = "0.3.1", "624b824"


def install(args: Any) -> None:
    """Check the command line, and put in place what keeps adapters out of slime's converters and gets
    them to the rollout engines. Says in one line what of slime is bound anew. Raises ConfigError."""
    check_arguments(args)
    complete_arguments(args)
    say_untested_version()
    rebinding = Rebinding()
    rebind_provider(rebinding)
    rebound = [*rebinding.names, *install_sync(args)]
    setattr(args, INSTALLED, True)
    if dist.get_rank() == 0:
        print(f"lorry: LoRA in slime; bound anew: {', '.join(rebound)}", flush=True)


def say_untested_version() -> None:
    """A warning that names what was tested, where slime is another version or does not say."""
    try:
        found = f"slime {importlib.metadata.version('slime')}"
    except importlib.metadata.PackageNotFoundError:
        found = "slime of an unknown version"
    if found != f"slime {TESTED_VERSION}":
        warnings.warn(
            f"{found} was never run with this plugin; {TESTED_VERSION} (commit {TESTED_COMMIT}) was",
            stacklevel=3,
        )
