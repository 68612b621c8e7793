"""Where a fused matrix of Megatron's has the rows of the projections, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

from transformers import LlamaConfig, LlamaForCausalLM

from lorry.adapters.targets.candidates import find_linears
from lorry.errors import ConfigError
from lorry.models.megatron.layout import LINEARS, RowOrder, hugging_face_tree, row_order

CONFIG: Any = SimpleNamespace(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=2,
    ffn_hidden_size=8,
)


def test_queries_keys_and_values_go_by_group() -> None:
    order = row_order(CONFIG, LINEARS[0], 1)
    q, k, v = torch.arange(12), torch.arange(100, 104), torch.arange(200, 204)
    fused = [0, 1, 2, 3, 4, 5, 100, 101, 200, 201, 6, 7, 8, 9, 10, 11, 102, 103, 202, 203]
    assert order.fuse([q, k, v]).tolist() == fused
    assert [part.tolist() for part in order.split(torch.tensor(fused))] == [
        q.tolist(),
        k.tolist(),
        v.tolist(),
    ]
    # the same of the last dimension of an output
    wide = order.fuse([part.expand(3, 5, -1) for part in (q, k, v)], -1)
    assert wide.shape == (3, 5, 20)
    assert wide[2, 4].tolist() == fused


def test_the_gate_goes_before_up_and_each_is_cut() -> None:
    assert row_order(CONFIG, LINEARS[2], 2) == RowOrder(1, (4, 4))


def test_ranks_do_not_share_a_kv_group() -> None:
    with pytest.raises(
        ConfigError, match=r"tensor_parallel of a run\) cuts a KV group .* divides 2"
    ):
        row_order(CONFIG, LINEARS[0], 4)


def test_the_names_are_transformers() -> None:
    config = LlamaConfig(
        hidden_size=12,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=2,
        vocab_size=5,
    )
    with torch.device("meta"):
        true = find_linears(LlamaForCausalLM(config))
    ours = find_linears(hugging_face_tree(CONFIG))
    assert set(true) - set(ours) == {"lm_head", "model.embed_tokens"}
    assert set(ours) <= set(true)
    for name, linear in ours.items():
        assert linear.get_parameter("weight").shape == true[name].get_parameter("weight").shape
