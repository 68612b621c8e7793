"""slime's generation with the adapter named in every request: an engine that holds the base and adapters
answers with the base where a request names none.

    --custom-generate-function-path lorry.integrations.slime.generate.generate

A function of your own adds `"lora_path": adapter_name(args)` to what it posts.
"""

from __future__ import annotations

from typing import Any

from lorry.errors import ContractError
from lorry.integrations.rollout.versions import list_versions, version_name
from lorry.integrations.slime.limits import versions_directory
from lorry.integrations.slime.provider import import_part
from lorry.integrations.slime.rebinding import Rebinding


def adapter_name(args: Any) -> str:
    """The newest version that the trainer has published, which engines hold by the time they are
    asked. Raises ContractError where there is none."""
    directory = versions_directory(args)
    numbers = list_versions(directory)
    if not numbers:
        raise ContractError(
            f"{directory} holds no version of an adapter: rollouts would come from the base"
        )
    return version_name(numbers[-1])


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """slime's `generate` of one sample, by the policy's newest version."""
    rollout = import_part("slime.rollout.sglang_rollout")

    def naming(original: Any) -> Any:
        async def post(url: str, payload: dict[str, Any], *given: Any, **more: Any) -> Any:
            return await original(url, {**payload, "lora_path": adapter_name(args)}, *given, **more)

        return post

    # its generation posts through this name; a second time changes nothing
    Rebinding().put(rollout, "post", naming)
    return await rollout.generate(args, sample, sampling_params)
