"""What a config.json says of weights that are packed: in which part of it that stands, and under which
of the names that tools give it. What can be read of it: models/packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PACKING_KEYS = ("quantization_config", "compression_config")


def find_packing(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of packed weights; {} where that is no object, None where it says nothing."""
    # one level down: multimodal configs keep the text model in a part
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in PACKING_KEYS:
            if stated := part.get(key):
                return stated if isinstance(stated, dict) else {}
    return None


def stated_bits(stated: Mapping[str, Any], default: int | None = None) -> Any:
    """Bits of a code, as files of GPTQ and AWQ state them; ``default`` where nothing is stated."""
    return stated.get("bits", stated.get("w_bit", default))


def stated_group(stated: Mapping[str, Any]) -> Any:
    """Inputs that share a scale, -1 for all, as files of GPTQ and AWQ state them; 128 where nothing is."""
    return stated.get("group_size", stated.get("q_group_size", 128))
