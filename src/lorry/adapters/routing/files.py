"""The files of a mixture's router, in the folder `router` beside the experts': router.json says how
tokens get their experts, router.safetensors holds what was trained.

A classifier that reads prompts through a LoRA of its own has it beside them, in the folder `prompt_adapter`.

An expert is named with the digest of its files, so that one that has changed is refused by name (and so
is that LoRA), and
router.safetensors with a digest of its bytes and of the order of the experts (`weights_digest`): its
columns are theirs, and a file of another mixture has the same shapes. Nothing here is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Level, Mix, MixtureRouter
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.peft.config import read_adapter_json
from lorry.adapters.peft.files import load_adapter
from lorry.adapters.peft.start_files import adapter_digest
from lorry.adapters.router import ROUTER_NAME, RouterParameters, RoutingRule, attach_router
from lorry.adapters.routing.gate_vectors import attach_gate_vectors
from lorry.adapters.routing.linear_router import SPECTRAL_ROUTERS, attach_spectral_router
from lorry.adapters.routing.sequence import (
    ClassifierRouter,
    PromptRule,
    PrototypeRouter,
    attach_sequence_router,
    classifier_shapes,
)
from lorry.disk.integrity import read_content
from lorry.errors import ConfigError, ModelError
from lorry.notes import NoteCallback, ignore_note
from lorry.runs.layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ROUTER,
    ROUTER_ADAPTER,
    ROUTER_FILE,
    ROUTER_WEIGHTS,
)

CONSTANT_KINDS = ("uniform", "fixed")


class ExpertRecord(BaseModel):
    """An expert as a router knows it: its name, and the digest of its files (`adapter_digest`)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    sha256: str


class RouterRecord(BaseModel):
    """router.json. ``experts``: in the order of the gates' columns; ``gates``: of the constant
    kinds; ``layer``, ``pooling``, ``width``: the state that a router of the sequence reads, and its
    length; ``hidden``: widths of a classifier; ``training``: how it was made, for a person;
    ``weights_sha256``: `weights_digest`, where there are weights and Lorry wrote it already;
    ``adapter_sha256``: `adapter_digest` of the LoRA that a classifier has of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str
    level: Level
    base_digest: str
    experts: list[ExpertRecord]
    input: str = "mlp"
    top_k: int = 2
    normalize: bool = True
    temperature: float = 1.0
    straight_through: bool = False
    gates: dict[str, float] | None = None
    layer: int | None = None
    pooling: str = "mean"
    width: int | None = None
    hidden: list[int] = []
    training: dict[str, Any] | None = None
    weights_sha256: str | None = None
    adapter_sha256: str | None = None


def router_files(
    model: nn.Module,
    folders: Mapping[str, Path],
    gates: Mapping[str, float] | None = None,
    adapter: Path | None = None,
) -> dict[str, bytes]:
    """{name in the folder `router`: content} of the model's router, or of constant ``gates`` of its
    experts; ``folders``: where each expert's files lie, in the order of the columns; ``adapter``:
    where those of the router's own LoRA do."""
    experts = [{"name": n, "sha256": adapter_digest(f)} for n, f in folders.items()]
    record: dict[str, Any] = {
        "level": "delta",
        "base_digest": base_digest(model),
        "experts": experts,
    }
    if gates is not None:
        alike = len(set(gates.values())) == 1 and len(gates) == len(folders)
        record |= {"kind": "uniform" if alike else "fixed", "gates": dict(gates)}
        return {ROUTER_FILE: _json(record)}
    router = get_bank(model).routers[ROUTER_NAME]
    record |= {"kind": router.router_kind, **router.settings()}
    if adapter is not None:
        record["adapter_sha256"] = adapter_digest(adapter)
    tensors = {n: v.detach().cpu().contiguous() for n, v in router.tensors().items()}
    if not tensors:
        return {ROUTER_FILE: _json(record)}
    content = save(tensors, {"format": "pt"})
    record["weights_sha256"] = weights_digest(list(folders), content)
    return {ROUTER_WEIGHTS: content, ROUTER_FILE: _json(record)}


def weights_digest(experts: Sequence[str], content: bytes) -> str:
    """SHA-256 of the experts' names in the order of the columns, and of router.safetensors."""
    return hashlib.sha256(json.dumps(list(experts)).encode() + b"\n" + content).hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_router_record(folder: Path) -> RouterRecord:
    """router.json of a mixture's directory. Raises ModelError for what no mixture has there."""
    file = folder / ROUTER / ROUTER_FILE
    try:
        return RouterRecord.model_validate(read_adapter_json(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(
            f"{file}: {where} is not valid in a router file ({first['msg']})"
        ) from None


def verify_weights(folder: Path, record: RouterRecord) -> None:
    """Raise ModelError where router.safetensors of the mixture in ``folder`` is not the one that its
    router.json was written with, or its columns are of the experts in another order."""
    if record.weights_sha256 is None:
        return
    file = folder / ROUTER / ROUTER_WEIGHTS
    if weights_digest([expert.name for expert in record.experts], read_content(file)) != (
        record.weights_sha256
    ):
        raise ModelError(
            f"{file}: not the weights that {ROUTER_FILE} was written with for "
            f"{', '.join(expert.name for expert in record.experts)} in this order; restore both files, or train "
            "the mixture again"
        )


def verify_router_adapter(folder: Path, record: RouterRecord) -> Path | None:
    """The folder of the LoRA that the router of the mixture in ``folder`` reads prompts with, if it
    has one. Raises ModelError where it is missing or not the one that router.json was written with."""
    place = folder / ROUTER / ROUTER_ADAPTER
    if record.adapter_sha256 is None:
        if place.exists():
            raise ModelError(
                f"{place}: {folder / ROUTER / ROUTER_FILE} knows no adapter of the router; move it away, or train the "
                "mixture again"
            )
        return None
    if not ((place / ADAPTER_CONFIG).is_file() and (place / ADAPTER_WEIGHTS).is_file()):
        raise ModelError(
            f"{place} is missing, or not whole: the adapter that the router reads prompts with; restore its files, "
            "or train the mixture again"
        )
    if (digest := adapter_digest(place)) != record.adapter_sha256:
        raise ModelError(
            f"{place}: not the adapter that the router was trained with (digest is {digest[:16]}..., expected "
            f"{record.adapter_sha256[:16]}...); restore its files, or train the mixture again"
        )
    return place


def verify_experts(folder: Path, record: RouterRecord, experts: Mapping[str, Path]) -> None:
    """Raise ModelError for an expert of the mixture in ``folder`` that is missing (unless the router
    is made of the experts alone, `SPECTRAL_ROUTERS`, and nothing of its folder is left), or whose
    files are not those that the router was made for. ``experts``: where each one's files lie."""
    missing = [expert.name for expert in record.experts if expert.name not in experts]
    left = {path.name for path in folder.iterdir() if path.is_dir()}
    if missing and (record.kind not in SPECTRAL_ROUTERS or left.intersection(missing)):
        missing.sort(key=lambda name: name not in left)
        raise ModelError(
            f"{folder / ROUTER / ROUTER_FILE}: expert {missing[0]!r} is missing in "
            f"{folder}; restore its folder"
        )
    for expert in record.experts:
        if expert.name in missing:
            continue
        if (digest := adapter_digest(experts[expert.name])) != expert.sha256:
            raise ModelError(
                f"{experts[expert.name]}: not the expert {expert.name!r} that the "
                f"router was trained for (digest is {digest[:16]}..., expected "
                f"{expert.sha256[:16]}...); restore its files, or train the mixture "
                "again"
            )


def load_router(
    model: nn.Module,
    folder: Path,
    experts: Mapping[str, Path],
    add_note: NoteCallback = ignore_note,
    *,
    adapter_name: str = ROUTER_NAME,
) -> Mix:
    """The mix of the mixture in ``folder``: its router attached to the model, whose adapters its
    experts are (``experts``: {name: where its files lie}). Raises ModelError for experts that are
    missing, others or changed, and for a router of another base or shape, or with NaN. One that is
    made of the experts alone (`SPECTRAL_ROUTERS`) does with those that are there, and notes it.
    ``adapter_name``: what the bank is to call the LoRA that a router has of its own.
    """
    file, record = folder / ROUTER / ROUTER_FILE, read_router_record(folder)
    names = [expert.name for expert in record.experts]
    if len(set(names)) != len(names) or len(names) < 2:
        raise ModelError(
            f"{file}: experts has to name two or more different adapters; got {', '.join(names)}"
        )
    verify_experts(folder, record, experts)
    if record.base_digest != base_digest(model):
        raise ModelError(f"{file}: the mixture was trained on other base weights than this model's")
    constant = record.kind in CONSTANT_KINDS and record.level == "delta"
    if (record.kind not in MAKERS and not constant) or (
        record.level == "expert" and record.kind != "token"
    ):
        raise ModelError(
            f"{file}: a router of kind {record.kind!r} at level {record.level!r}; known are "
            f"{', '.join((*MAKERS, *CONSTANT_KINDS))} at delta, token at expert"
        )
    missing = [name for name in names if name not in experts]
    extra = [name for name in experts if name not in names]
    if record.kind in SPECTRAL_ROUTERS and (missing or extra):
        names = [name for name in names if name in experts] + extra
        add_note(
            f"{folder}: the router routes among {', '.join(names)}; "
            + "; ".join(
                f"{', '.join(some)} {what}"
                for some, what in ((missing, "has gone"), (extra, "has come"))
                if some
            )
            + f" since {ROUTER_FILE} was written"
        )
    elif extra:
        raise ModelError(
            f"{folder / extra[0]} is an adapter that the router does not know; its experts are {', '.join(names)}"
        )
    if constant:
        return _constant_mix(file, record)
    own = verify_router_adapter(folder, record)
    if own is not None and record.kind != ClassifierRouter.router_kind:
        raise ModelError(f"{file}: a router of kind {record.kind!r} has no adapter of its own")
    try:
        router = MAKERS[record.kind](model, names, record)
        if own is not None:
            # with the same forward pass as everybody's adapters: Mix.one of its name
            load_adapter(model, own, adapter_name, trainable=False)
            cast(ClassifierRouter, router).state_mix = Mix.one(adapter_name)
    except ConfigError as error:
        raise ModelError(f"{file}: {error}") from None
    if wanted := router.tensors():
        _read_weights(folder / ROUTER / ROUTER_WEIGHTS, wanted)
        verify_weights(folder, record)
    return router.mix()


def _make_token_router(
    model: nn.Module, experts: Sequence[str], record: RouterRecord
) -> MixtureRouter:
    rule = RoutingRule(
        record.input,
        record.top_k,
        record.normalize,
        record.temperature,
        record.straight_through,
        record.level,
    )
    return _frozen(attach_router(model, experts, rule, record.hidden))


def _make_gate_vectors(
    model: nn.Module, experts: Sequence[str], record: RouterRecord
) -> MixtureRouter:
    return _frozen(
        attach_gate_vectors(model, experts, top_k=record.top_k, temperature=record.temperature)
    )


def _frozen(router: RouterParameters) -> RouterParameters:
    router.grads = router.grads.new_empty(0)  # as large as its values, and nothing would fill it
    for param in router.params.values():
        param.requires_grad_(False)
        param.grad = None  # a view that would keep the memory alive
    return router


def _make_prototype_router(
    model: nn.Module, experts: Sequence[str], record: RouterRecord
) -> MixtureRouter:
    shape = (len(experts), _state_width(model, record))
    router = PrototypeRouter(experts, _prompt_rule(record), _empty(model, shape))
    attach_sequence_router(model, router)
    return router


def _make_classifier_router(
    model: nn.Module, experts: Sequence[str], record: RouterRecord
) -> MixtureRouter:
    if any(width < 1 for width in record.hidden):
        raise ConfigError(f"hidden={record.hidden}: widths are 1 or more")
    shapes = classifier_shapes(_state_width(model, record), record.hidden, len(experts))
    weights = {name: _empty(model, shape) for name, shape in shapes.items()}
    router = ClassifierRouter(experts, _prompt_rule(record), weights, record.training)
    attach_sequence_router(model, router)
    return router


def _prompt_rule(record: RouterRecord) -> PromptRule:
    if record.straight_through or record.input != "mlp":
        raise ConfigError(f"a router of kind {record.kind!r} has no input and no straight_through")
    return PromptRule(
        record.layer, record.pooling, record.top_k, record.normalize, record.temperature
    )


def _state_width(model: nn.Module, record: RouterRecord) -> int:
    """Length of the states that the router reads, as its file has it and the model can have it."""
    own = getattr(getattr(model, "geometry", None), "width", record.width)
    if record.width is None or record.width < 1 or record.width != own:
        raise ConfigError(f"width={record.width}: this model's hidden states have {own}")
    return record.width


def _empty(model: nn.Module, shape: Sequence[int]) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float32, device=next(model.parameters()).device)


def _make_spectral_router(
    model: nn.Module, experts: Sequence[str], record: RouterRecord
) -> MixtureRouter:
    return attach_spectral_router(
        model, record.kind, experts, top_k=record.top_k, temperature=record.temperature
    )


# kind -> what attaches its router, values still to be read, to a model with these experts
# (`AdapterBank.routers`). Raises ConfigError.
MAKERS: dict[str, Callable[[nn.Module, Sequence[str], RouterRecord], MixtureRouter]] = {
    "token": _make_token_router,
    "prototype": _make_prototype_router,
    "sequence": _make_classifier_router,
    "arrow": _make_spectral_router,
    "spectr": _make_spectral_router,
    "phatgoose": _make_gate_vectors,
}


def _constant_mix(file: Path, record: RouterRecord) -> Mix:
    gates, names = record.gates or {}, [expert.name for expert in record.experts]
    if not any(gates.values()):
        # without a term the mix is the base, which nobody asked for
        raise ModelError(
            f"{file}: gates has no number but 0; a router of kind {record.kind!r} needs one for each "
            f"of {', '.join(names)}"
        )
    for name, gate in gates.items():
        if name not in names or not math.isfinite(gate):
            raise ModelError(
                f"{file}: gates has {name!r}: {gate}; give a number for each of {', '.join(names)}"
            )
    return Mix.constants(gates)


@torch.no_grad()
def _read_weights(file: Path, wanted: Mapping[str, Tensor]) -> None:
    if not file.exists() and (pickles := sorted(file.parent.glob("*.pt"))):
        raise ModelError(
            f"{file} is missing; {pickles[0].name} beside it is a pickle, which can run code and is "
            "never opened: make the mixture again (lorry moe)"
        )
    try:
        tensors = load(read_content(file))
    except SafetensorError as error:
        raise ModelError(f"{file}: damaged ({error})") from None
    if odd := sorted(set(tensors) ^ set(wanted)):
        raise ModelError(
            f"{file}: {odd[0]} is {'missing' if odd[0] in wanted else 'not a tensor of this router'} "
            f"({len(odd)} such tensors)"
        )
    for name, view in wanted.items():
        tensor = tensors[name]
        if tensor.shape != view.shape or tensor.dtype != torch.float32:
            raise ModelError(
                f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}; this model "
                f"and these experts need float32 {tuple(view.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{file}: {name} holds NaN or infinity")
        view.copy_(tensor)
