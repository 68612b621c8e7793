"""One PEFT directory per version of an adapter, written whole or not at all, with a receipt.

    publisher = VersionPublisher("rollout", keep=2)
    version = publisher.publish(adapter_files(model))       # rollout/lora_v000001/

A name is used once. Engines key their caches of prompts by an adapter's name: other values under the
same name would be answered with keys and values of the old ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lorry.disk import durable
from lorry.disk.documents import read_json_document
from lorry.errors import ConfigError, ModelError
from lorry.integrations.rollout.digests import TensorFacts, read_tensor_facts
from lorry.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

VERSION_RECEIPT = "lora_version.json"
_NAME = re.compile(r"lora_v(\d{6,})")


@dataclass(frozen=True)
class AdapterVersion:
    """One version of a policy's adapter on the disk. ``number``: from 1, never used twice;
    ``path``: its directory, absolute; ``tensors``: what its file holds; ``bytes``: of all its files
    that an engine reads."""

    number: int
    path: Path
    tensors: Mapping[str, TensorFacts]
    bytes: int

    @property
    def name(self) -> str:
        """What engines call it: the directory's name."""
        return version_name(self.number)


def version_name(number: int) -> str:
    """`lora_v000001` for 1."""
    return f"lora_v{number:06d}"


class VersionPublisher:
    """Writes versions into ``directory`` (made if absent) and removes old ones: the newest ``keep``
    stay. An engine may read a version again whenever its cache has dropped it, and one that is being
    replaced is still asked, so ``keep`` is at least 2. A directory with versions in it is gone on
    with. One publisher per directory at a time. Raises ConfigError and DiskError.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2) -> None:
        if keep < 2:
            raise ConfigError(
                f"keep is {keep}; it must be at least 2: an engine still answers from the last "
                "version while the next one is loaded"
            )
        # engines are other processes, which may stand in another folder
        self.directory = Path(directory).absolute()
        self.keep = keep
        durable.make_directory(self.directory)
        durable.recover_writes(self.directory)

    def numbers(self) -> list[int]:
        """The versions that lie there, the oldest first."""
        names = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def publish(self, files: Mapping[str, bytes]) -> AdapterVersion:
        """Write the next version from an adapter's files ({name: content},
        `lorry.adapters.peft.files.adapter_files`), then remove what is too old. Raises ModelError for
        files that are no adapter's, and DiskError.
        """
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if name not in files:
                raise ModelError(f"an adapter to publish has no {name}; pass all of its files")
        number = max(self.numbers(), default=0) + 1
        path = self.directory / version_name(number)
        tensors = read_tensor_facts(files[ADAPTER_WEIGHTS], str(path / ADAPTER_WEIGHTS))
        if not tensors:
            raise ModelError(f"{path / ADAPTER_WEIGHTS} would hold no tensor; pass a whole adapter")
        version = AdapterVersion(number, path, tensors, sum(map(len, files.values())))
        durable.write_directory(path, {**files, VERSION_RECEIPT: _encode(version)})
        for old in self.numbers()[: -self.keep]:
            durable.remove_directory(self.directory / version_name(old))
        return version


def read_version(path: str | Path) -> AdapterVersion:
    """The version in a directory, by its receipt. Raises ModelError for one that is damaged or was
    not written by `VersionPublisher`."""
    folder = Path(path).absolute()
    where, name = folder / VERSION_RECEIPT, _NAME.fullmatch(folder.name)
    try:
        receipt = read_json_document(where, error=ModelError)
    except FileNotFoundError:
        raise ModelError(f"{folder} is no version of an adapter: {where.name} is missing") from None
    try:
        tensors = {
            tensor: TensorFacts(
                str(facts["sha256"]),
                str(facts["dtype"]),
                tuple(facts["shape"]),
                bool(facts["zero"]),
            )
            for tensor, facts in receipt["tensors"].items()
        }
        version = AdapterVersion(int(receipt["version"]), folder, tensors, int(receipt["bytes"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{where} is not a receipt as a publisher writes it ({error!r})") from None
    if name is None or int(name[1]) != version.number:
        raise ModelError(f"{where} is of version {version.number}, unlike its directory's name")
    return version


def _encode(version: AdapterVersion) -> bytes:
    receipt = {
        "version": version.number,
        "bytes": version.bytes,
        "tensors": {name: asdict(facts) for name, facts in sorted(version.tensors.items())},
    }
    return (json.dumps(receipt) + "\n").encode()
