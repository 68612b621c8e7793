"""Adapter files from strangers, broken on purpose or by accident: read as valid or refused with a
ModelError, nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lorry.adapters.attach import get_bank
from lorry.adapters.peft.config import parse_peft_config, read_adapter_json
from lorry.adapters.peft.files import load_adapter
from lorry.adapters.spec import LoraSpec
from lorry.errors import ModelError
from lorry.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["LORA", "q_proj", "(", ".*"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = sorted(peft.LoraConfig(target_modules=["q_proj"]).to_dict())


def spec_in(folder: Path) -> LoraSpec:
    """What an adapter directory's config says."""
    return parse_peft_config(
        read_adapter_json(folder / ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG)
    )


@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), JSON, max_size=4))
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_config_is_read_or_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    good = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**good, **changes}))
    try:
        spec = spec_in(tmp_path)
    except ModelError:
        return  # any other exception fails the test
    else:
        assert spec.rank("a.q_proj") >= 1
        assert isinstance(spec.scale("a.q_proj"), float)


@given(content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_bytes_as_config(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        spec_in(tmp_path)


HOSTILE = {
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000,
    "long number": b'{"r": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"r": 1, "r": 2}',
    "utf-16": b"\xff\xfe{}",
    "list": b"[]",
    "huge": b" " * (17 * 2**20),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        spec_in(tmp_path)


@pytest.fixture(scope="module")
def target(tiny: Any) -> nn.Module:
    return tiny("llama")


@given(data=st.data())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_damage_to_the_weights_file(
    data: st.DataObject, saved: Path, target: nn.Module, tmp_path: Path
) -> None:
    """Cut, overwritten or lengthened, in the header mostly: read as valid, or refused; never
    another exception.
    """
    content = bytearray((saved / ADAPTER_WEIGHTS).read_bytes())
    kind = data.draw(st.sampled_from(["cut", "overwrite", "append", "header length"]))
    if kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "overwrite":
        at = data.draw(st.integers(0, 600))
        patch = data.draw(st.binary(min_size=1, max_size=12))
        content[at : at + len(patch)] = patch
    elif kind == "append":
        content += data.draw(st.binary(min_size=1, max_size=20))
    else:
        content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    broken = tmp_path / "broken"
    broken.mkdir(exist_ok=True)
    (broken / ADAPTER_CONFIG).write_bytes((saved / ADAPTER_CONFIG).read_bytes())
    (broken / ADAPTER_WEIGHTS).write_bytes(content)
    names = set(get_bank(target, create=True).names())
    try:
        load_adapter(target, broken, f"a{len(names)}")
    except ModelError:  # any other exception fails the test
        assert set(get_bank(target).names()) == names
