"""Everything that the sync puts in slime's place."""

from __future__ import annotations

from typing import Any

from lorry.integrations.slime.backups import install_backups
from lorry.integrations.slime.checkpoints import install_checkpoints
from lorry.integrations.slime.limits import check_sync
from lorry.integrations.slime.provider import import_part
from lorry.integrations.slime.rebinding import Rebinding, original_of
from lorry.integrations.slime.sync.updates import WeightSync
from lorry.integrations.slime.sync.weights import base_weights

# slime's three ways to send whole weights
UPDATERS = ("Tensor", "Distributed", "Disk")
NAMED = "named_params_and_buffers"
MEGATRON = "slime.backends.megatron_utils"


def rebind(args: Any) -> list[str]:
    """`install_sync`."""
    check_sync(args)
    rebinding = Rebinding()
    # before anything is rebound: what the actor imports by value has to name adapters too, as backups
    # and their restoring need them
    import_part(f"{MEGATRON}.actor")
    common = import_part(f"{MEGATRON}.update_weight.common")
    iterators = import_part(f"{MEGATRON}.update_weight.hf_weight_iterator_direct")
    sync = WeightSync(args, original_of(common, NAMED))
    # read by name when Hugging Face's weights are loaded, and saved
    rebinding.put(common, NAMED, base_weights)
    rebinding.put(iterators, NAMED, base_weights)
    rebinding.put(iterators.HfWeightIteratorDirect, "get_hf_weight_chunks", sync.merge_buckets)
    for kind in UPDATERS:
        module = import_part(f"{MEGATRON}.update_weight.update_weight_from_{kind.lower()}")
        updater = getattr(module, f"UpdateWeightFrom{kind}")
        if kind == "Distributed":
            rebinding.put(module, NAMED, sync.choose_weights)
            rebinding.put(updater, "_update_bucket_weights_from_distributed", sync.see_bucket)
        rebinding.put(updater, "update_weights", sync.update(kind))
        rebinding.put(updater, "connect_rollout_engines", sync.connect)
    install_backups(args, rebinding)
    install_checkpoints(args, rebinding)
    return rebinding.names
