"""`backend=megatron`: the layers of Megatron-core's GPTModel, everything else as under `backend=ddp`.

Adapters, losses, gradients, optimizer and checkpoints are ours, and neither Megatron's
DistributedDataParallel nor its optimizer has a part in it: the backend is `DataParallelBackend`, over a
model that was read with `converter_of`. What of a pass is another is in `lorry.models.megatron`.
"""

from __future__ import annotations

import warnings

from lorry.backends.distributed.communicator import Communicator
from lorry.config.schema.backend import SharedBackendConfig
from lorry.config.schema.model import ModelConfig
from lorry.errors import ConfigError
from lorry.models.converter import ModelConverter
from lorry.models.loading.load import pick_device
from lorry.notes import NoteCallback


def converter_of(
    backend: SharedBackendConfig,
    model: ModelConfig,
    communicator: Communicator,
    add_note: NoteCallback,
) -> ModelConverter | None:
    """What puts Megatron's layers into the models of a command; None under another backend. Every rank
    calls it: Megatron's groups are made. Raises ConfigError where Megatron is not there, cannot run, or
    is of another version on another rank."""
    if backend.name != "megatron":
        return None
    try:
        with warnings.catch_warnings():
            # of apex and Transformer Engine, whose kernels are not used here
            warnings.simplefilter("ignore")
            # an extra of the package, and seconds to import
            from lorry.models.megatron.groups import check_version, join_groups, use_device
            from lorry.models.megatron.model import MegatronConverter
    except ImportError as e:
        raise ConfigError(
            f"backend=megatron: megatron-core is not installed ({e}); run: pip install 'lorry[megatron]'"
        ) from e
    use_device(pick_device(model.device))
    # before the groups, for which a rank that has no Megatron, or no GPU, would be waited for
    versions = communicator.exchange("megatron-core", check_version(add_note))
    if odd := next((rank for rank, each in enumerate(versions) if each != versions[0]), None):
        raise ConfigError(
            f"rank {odd} has megatron-core {versions[odd]}, rank 0 {versions[0]}: install one version on "
            "every machine"
        )
    join_groups(backend.tensor_parallel, backend.timeout)
    return MegatronConverter()
