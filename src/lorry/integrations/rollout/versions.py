"""One directory per version of a policy, written whole or not at all, with a receipt: a PEFT adapter,
or a whole model that it is merged into.

    publisher = VersionPublisher("rollout", keep=2)
    version = publisher.publish(adapter_files(model))       # rollout/lora_v000001/

    publisher = ModelPublisher("rollout")
    version = publisher.publish(lambda folder: save_merged(model, folder))   # rollout/model_v000001/

A name is used once. Engines key their caches of prompts by an adapter's name and directory: other
values under the same would be answered with keys and values of the old ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lorry.disk import durable
from lorry.disk.documents import read_json_document
from lorry.disk.integrity import read_content
from lorry.errors import ConfigError, ModelError
from lorry.integrations.rollout.digests import TensorFacts, read_tensor_facts
from lorry.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

VERSION_RECEIPT = "lora_version.json"
_NAME = re.compile(r"(lora|model)_v(\d{6,})")


@dataclass(frozen=True)
class Version:
    """One version of a policy on the disk. ``number``: from 1, never used twice; ``path``: its
    directory, absolute; ``tensors``: what its files hold; ``bytes``: of all its files that an engine
    reads."""

    number: int
    path: Path
    tensors: Mapping[str, TensorFacts] = field(repr=False)
    bytes: int

    @property
    def name(self) -> str:
        """What engines call it: the directory's name."""
        return self.path.name


class AdapterVersion(Version):
    """An adapter, over a base that the engine has."""


class ModelVersion(Version):
    """A whole model, in the place of the one that the engine has."""


def version_name(number: int, kind: str = "lora") -> str:
    """`lora_v000001` for 1. ``kind``: "lora" or "model"."""
    return f"{kind}_v{number:06d}"


def is_version(name: str, kind: str = "lora") -> bool:
    """Whether a name is one that `version_name` writes."""
    match = _NAME.fullmatch(name)
    return match is not None and match[1] == kind


def list_versions(directory: Path, kind: str = "lora") -> list[int]:
    """The numbers of the versions in a directory, the oldest first; none where there is no
    directory."""
    if not directory.is_dir():
        return []
    names = (_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(name[2]) for name in names if name and name[1] == kind)


class _Publisher:
    """``directory``, made if absent, and what of its versions is kept."""

    kind = ""

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
        return list_versions(self.directory, self.kind)

    def _next(self) -> tuple[int, Path]:
        number = max(self.numbers(), default=0) + 1
        return number, self._path(number)

    def _path(self, number: int) -> Path:
        return self.directory / version_name(number, self.kind)

    def _remove_old(self) -> None:
        for old in self.numbers()[: -self.keep]:
            durable.remove_directory(self._path(old))


class VersionPublisher(_Publisher):
    """Writes adapters into ``directory`` (made if absent) and removes old ones: the newest ``keep``
    stay. An engine may read a version again whenever its cache has dropped it, and one that is being
    replaced is still asked, so ``keep`` is at least 2. A directory with versions in it is gone on
    with. One publisher per directory at a time. Raises ConfigError and DiskError.
    """

    kind = "lora"

    def publish(self, files: Mapping[str, bytes]) -> AdapterVersion:
        """Write the next version from an adapter's files ({name: content},
        `lorry.adapters.peft.files.adapter_files`), then remove what is too old. Raises ModelError for
        files that are no adapter's, and DiskError.
        """
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if name not in files:
                raise ModelError(f"an adapter to publish has no {name}; pass all of its files")
        number, path = self._next()
        tensors = read_tensor_facts(files[ADAPTER_WEIGHTS], str(path / ADAPTER_WEIGHTS))
        if not tensors:
            raise ModelError(f"{path / ADAPTER_WEIGHTS} would hold no tensor; pass a whole adapter")
        version = AdapterVersion(number, path, tensors, sum(map(len, files.values())))
        durable.write_directory(path, {**files, VERSION_RECEIPT: _encode(version)})
        self._remove_old()
        return version


class ModelPublisher(_Publisher):
    """The same for whole models, into which an adapter is merged."""

    kind = "model"

    def publish(self, write: Callable[[Path], None]) -> ModelVersion:
        """Have ``write`` fill the next version's folder, then remove what is too old. Raises
        ModelError for a folder without weights, DiskError, and what ``write`` raises."""
        number, path = self._next()
        with durable.build_directory(path) as folder:
            write(folder)
            tensors = model_tensor_facts(folder)
            size = sum(file.stat().st_size for file in folder.iterdir())
            version = ModelVersion(number, path, tensors, size)
            (folder / VERSION_RECEIPT).write_bytes(_encode(version))
        self._remove_old()
        return version


def model_tensor_facts(folder: Path) -> dict[str, TensorFacts]:
    """{tensor: facts} of all weight files of a model's directory. Raises ModelError where it has
    none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors; write a whole model into it")
    return {
        name: facts
        for file in files
        for name, facts in read_tensor_facts(read_content(file), str(file)).items()
    }


def read_version(path: str | Path) -> Version:
    """The version in a directory, by its receipt. Raises ModelError for one that is damaged or was
    not written by a publisher."""
    folder = Path(path).absolute()
    where, name = folder / VERSION_RECEIPT, _NAME.fullmatch(folder.name)
    try:
        receipt = read_json_document(where, error=ModelError)
    except FileNotFoundError:
        raise ModelError(f"{folder} is no version of a policy: {where.name} is missing") from None
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
        number, size = int(receipt["version"]), int(receipt["bytes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{where} is not a receipt as a publisher writes it ({error!r})") from None
    if name is None or int(name[2]) != number:
        raise ModelError(f"{where} is of version {number}, unlike its directory's name")
    kind = ModelVersion if name[1] == ModelPublisher.kind else AdapterVersion
    return kind(number, folder, tensors, size)


def _encode(version: Version) -> bytes:
    receipt = {
        "version": version.number,
        "bytes": version.bytes,
        "tensors": {name: asdict(facts) for name, facts in sorted(version.tensors.items())},
    }
    return (json.dumps(receipt) + "\n").encode()
