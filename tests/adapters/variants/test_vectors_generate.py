"""Generation with magnitudes and biases beside lora_B: token by token what the whole forward pass says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_dora import native
from test_dora_mixes import outputs, spread

from lorry.adapters.attach import attach
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.spec import LoraSpec
from lorry.generation.engine import generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.kernels import kernel_status, load_library
from lorry.models.decoder.decode import SmallBatchProducts


def adapted(tiny: Any, family: str) -> Any:
    model = native(tiny(family))
    attach(model, LoraSpec(r=2, use_dora=True), "dora")
    ends = ("embed", "lm_head")
    attach(model, LoraSpec(r=2, use_dora=True, target_modules=ends), "ends")
    attach(model, LoraSpec(r=2, lora_bias=True), "biased")
    spread(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_of_a_batch_are_the_forward_passs(family: str, tiny: Any) -> None:
    """fp32: an adapter a row, one with two, one with none."""
    model = adapted(tiny, family)
    prompts = [[5, 9, 2], [7, 7], [11, 3, 30, 4], [1, 2], [9]]
    mixes = [
        Mix.one("dora"),
        Mix.one("ends"),
        Mix.one("biased"),
        Mix.none(),
        Mix.constants({"dora": 1.0, "ends": 1.0}),  # on other modules
    ]
    params = [SamplingParams(max_new_tokens=4, temperature=0.0) for _ in prompts]
    made = generate_completions(model, prompts, params, adapters=mixes)
    for prompt, mix, answer in zip(prompts, mixes, made, strict=True):
        tokens = list(prompt)
        for token in answer.tokens:
            with torch.no_grad():
                assert int(outputs(model, [tokens], mix)[-1].argmax()) == token
            tokens.append(token)
        assert answer.tokens


@pytest.mark.skipif(load_library() is None, reason=f"kernels: {kernel_status().reason}")
@pytest.mark.parametrize("name", ["dora", "biased"])
def test_the_kernels_of_few_rows_have_them_too(name: str, tiny: Any) -> None:
    model = adapted(tiny, "llama")
    mix = Mix.per_sequence([name, None, name], [0, 2, 3, 5])
    for group in model.blocks[1].linears:
        x = torch.randn(5, group.linears[0].in_features)
        stacks, _ = group.stacks(AdapterContext(mix), "here")
        few = SmallBatchProducts.of(group, stacks)
        assert isinstance(few, SmallBatchProducts)
        with torch.no_grad():
            for got, layer in zip(few.forward(x), group.linears, strict=True):
                torch.testing.assert_close(got, layer(x, AdapterContext(mix)), rtol=0, atol=1e-5)
