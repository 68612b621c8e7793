"""slime's rollout engines: actors of Ray, each in front of an SGLang server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorry.errors import ContractError
from lorry.integrations.rollout.engine import EngineError
from lorry.integrations.rollout.servers import SglangServer
from lorry.integrations.rollout.versions import is_version
from lorry.integrations.slime.provider import import_part


def ask(engines: Sequence[Any], method: str, *given: Any, **more: Any) -> list[Any]:
    """What each engine answers to a method of slime's."""
    ray = import_part("ray")
    return list(ray.get([getattr(engine, method).remote(*given, **more) for engine in engines]))


def find_server(engine: Any) -> SglangServer | None:
    """The server behind an engine; None where the engine does not say where that is."""
    if not hasattr(engine, "get_server_host"):
        return None
    (host,), (port,) = ask([engine], "get_server_host"), ask([engine], "get_server_port")
    return SglangServer(f"http://{host}:{port}")


def server_of(engine: Any) -> SglangServer:
    """The same. Raises ContractError where the engine does not say."""
    server = find_server(engine)
    if server is None:
        raise ContractError(
            "an engine does not say where its server is (get_server_host), so no adapter can be "
            "loaded there; use --lora-sync merged"
        )
    return server


def refuse_adapters(engine: Any, label: str) -> None:
    """Raises ContractError where an engine that is sent merged weights holds a version of the adapter
    too: requests that name it would get it twice."""
    server = find_server(engine)
    for name in () if server is None else server.list_lora_adapters():
        if is_version(name):
            raise ContractError(
                f"{label} holds the adapter {name} over weights into which one is merged; start it anew, "
                "or use --lora-sync adapter"
            )


def held_row(engine: Any, name: str, args: Any) -> Tensor | None:
    """The first row [1, in], fp32, that an engine has of a weight by Hugging Face's name; None where
    it cannot be asked: SGLang gives rows of some families' models, whole where one device has them."""
    server = find_server(engine)
    if server is None or getattr(args, "rollout_num_gpus_per_engine", 1) != 1:
        return None
    try:
        rows = server.weights_by_name(name, 1)
    except EngineError:
        return None
    return torch.tensor(rows, dtype=torch.float32)
