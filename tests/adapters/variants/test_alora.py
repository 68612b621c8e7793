"""Adapters that tokens invoke, against PEFT's aLoRA in fp32: logits, gradients, files, generation; the base's
keys and values before the invocation; refused where one weight or no tokens would have to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lorry.adapters.adapter import AdapterOrigin
from lorry.adapters.attach import attach, get_bank, lora_parameters
from lorry.adapters.merge import concatenate, merge
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.peft.config import parse_peft_config
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.alora import find_invocation, with_invocations
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.generation.engine import generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import PackedInput
from lorry.models.hf.model import HfModel
from tests.support.seam import tiny_llama

CALL = (7, 9)
TARGETS = ("q_proj", "v_proj", "down_proj")
# invoked twice, once, never
ROWS = [[3, 7, 9, 4, 7, 9, 5, 6], [7, 9, 1, 2, 3, 4, 5, 6], [9, 7, 3, 7, 4, 9, 5, 7]]
STARTS = [4, 0, None]


def spec(**settings: Any) -> LoraSpec:
    """Rank 3 at three linears, invoked by two tokens."""
    return LoraSpec(
        r=3, lora_alpha=6, target_modules=TARGETS, alora_invocation_tokens=CALL, **settings
    )


@pytest.fixture
def pair(tiny: Any, shake: Any) -> tuple[Any, Any]:
    """(a model with our adapter, the same with PEFT's), the same values."""
    model = tiny("llama")
    adapter = attach(model, spec())
    shake(lora_parameters(model))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
        alora_invocation_tokens=list(CALL),
    )
    other = peft.get_peft_model(tiny("llama"), config)
    for name, param in other.named_parameters():
        if ".lora_" in name:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            param.data.copy_(adapter.tensors()[key])
    return model, other


def test_the_last_occurrence_counts() -> None:
    assert [find_invocation(row, CALL) for row in ROWS] == STARTS
    assert find_invocation([7], CALL) is None
    assert find_invocation([1, 7, 9], CALL) == 1


def test_logits_and_gradients_are_pefts(pair: tuple[Any, Any], tiny: Any, logits: Any) -> None:
    model, other = pair
    ids = torch.tensor(ROWS)
    mine, its = model(input_ids=ids).logits, other(input_ids=ids).logits
    torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
    # and not what either extreme would be
    base = logits(tiny("llama"), ids)
    torch.testing.assert_close(mine[0, :4], base[0, :4], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mine[2], base[2], atol=1e-6, rtol=1e-6)
    assert float((mine[0, 4:] - base[0, 4:]).detach().abs().max()) > 1e-2
    for each in (mine, its):
        each.square().mean().backward()
    adapter = get_bank(model)["default"]
    theirs = {
        n.removeprefix("base_model.model.").removesuffix(".default.weight"): p.grad
        for n, p in other.named_parameters()
        if ".lora_" in n
    }
    for name, grad in adapter.split_like(adapter.grads).items():
        assert bool(grad.any())
        torch.testing.assert_close(grad, theirs[name], atol=1e-5, rtol=1e-4)


def test_a_step_whose_rows_invoke_nothing_has_a_gradient_of_zero(
    pair: tuple[Any, Any],
) -> None:
    """As in PEFT; a loop over batches would stop at the first such one."""
    for each in pair:
        each.zero_grad()
        each(input_ids=torch.tensor([[1, 2, 3, 4]])).logits.square().mean().backward()
    assert not get_bank(pair[0])["default"].grads.any()
    gradients = [p.grad for n, p in pair[1].named_parameters() if ".lora_" in n]
    assert not any(bool(g.any()) for g in gradients if g is not None)


def test_files_both_ways(pair: tuple[Any, Any], tiny: Any, logits: Any, tmp_path: Path) -> None:
    model, other = pair
    ids = torch.tensor(ROWS)
    save_adapter(model, tmp_path / "ours")
    other.save_pretrained(str(tmp_path / "theirs"))
    again = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "ours"))
    plain = tiny("llama")
    adapter = load_adapter(plain, tmp_path / "theirs")
    assert adapter.spec.alora_invocation_tokens == CALL
    expected = logits(other, ids)
    for each in (again, plain):
        torch.testing.assert_close(logits(each, ids), expected, atol=1e-5, rtol=1e-5)


def test_generation_is_pefts_and_the_prefix_is_the_bases(pair: tuple[Any, Any], tiny: Any) -> None:
    _, other = pair
    wrapped = HfModel(tiny("llama"))
    values = get_bank(pair[0])["default"].values
    attach(wrapped, spec()).values.copy_(values)
    get_bank(wrapped)["default"].touch()
    params = SamplingParams(max_new_tokens=6, temperature=0.0)
    for row in (*ROWS, [7, 9, 5], [1, 2, 3, 7, 9]):
        (ours,) = generate_completions(wrapped, [row], params, adapters="default")
        theirs = other.generate(
            input_ids=torch.tensor([row]), max_new_tokens=6, do_sample=False, eos_token_id=None,
            pad_token_id=0, attention_mask=torch.ones(1, len(row), dtype=torch.long),
        )[0, len(row) :].tolist()  # fmt: skip
        assert ours.tokens == theirs, row
    # all of them in one batch, and beside the base
    together = generate_completions(
        wrapped, [*ROWS, ROWS[0]], params, adapters=["default", "default", "default", None]
    )
    alone = [generate_completions(wrapped, [r], params, adapters="default")[0] for r in ROWS]
    assert [c.tokens for c in together[:3]] == [c.tokens for c in alone]
    base = generate_completions(HfModel(tiny("llama")), [ROWS[0]], params)[0]
    assert together[3].tokens == base.tokens


def test_in_our_decoder_packed_is_alone_and_before_it_all_is_the_base(shake: Any) -> None:
    model = tiny_llama()
    attach(model, spec(), "a")
    attach(model, LoraSpec(r=2, target_modules=TARGETS), "b")
    shake(lora_parameters(model))
    packed = PackedInput.of(ROWS)
    bank = get_bank(model)

    def states(mix: Mix, rows: list[list[int]]) -> Tensor:
        inputs = PackedInput.of(rows)
        call = AdapterContext(with_invocations(bank, mix, inputs.tokens, inputs.segments))
        last = model.hidden(inputs, call).last
        assert last is not None
        return last.detach()

    whole = states(Mix.one("a"), ROWS)
    alone = torch.cat([states(Mix.one("a"), [row]) for row in ROWS])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)
    base = states(Mix.none(), ROWS)
    for (first, stop), start in zip(packed.segments, STARTS, strict=True):
        until = stop if start is None else first + start
        torch.testing.assert_close(whole[first:until], base[first:until], atol=1e-6, rtol=1e-6)
        assert start is None or not torch.allclose(whole[until:stop], base[until:stop], atol=1e-3)
    # beside another adapter's sequences
    mixed = states(Mix.per_sequence(["a", "b", "a"], [0, 8, 16, 24]), ROWS)
    torch.testing.assert_close(mixed[:8], whole[:8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[8:16], states(Mix.one("b"), [ROWS[1]]), atol=1e-5, rtol=1e-5)
    # answers come as when every token is read again
    params = SamplingParams(max_new_tokens=4, temperature=0.0)
    answers = generate_completions(model, ROWS, params, adapters="a")
    for row, answer in zip(ROWS, answers, strict=True):
        if find_invocation(row + answer.tokens, CALL) == find_invocation(row, CALL):
            bank.activate(Mix.one("a"))
            again = model(torch.tensor(row + answer.tokens)).logits[0]
            likeliest = again.argmax(-1)[len(row) - 1 : -1].tolist()
            assert answer.tokens == likeliest


def test_it_is_never_applied_where_nobody_looked(tiny: Any, shake: Any) -> None:
    model = tiny("llama")
    attach(model, spec())
    shake(lora_parameters(model))
    with pytest.raises(ContractError, match="has not looked for them"):
        model.model.layers[0].self_attn.q_proj(torch.zeros(1, 32))
    with pytest.raises(ConfigError, match="given input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    ids = torch.tensor([[1, 2]])
    cache = model(input_ids=torch.tensor([[7, 9]]), use_cache=True).past_key_values
    with pytest.raises(ConfigError, match=r"use lorry\.generate"):
        model(input_ids=ids, past_key_values=cache)


def test_what_knows_one_weight_alone_refuses_it(tiny: Any) -> None:
    model = tiny("llama")
    attach(model, spec())
    for refused in (lambda: merge(model), lambda: concatenate(model, "x", {"default": 1.0})):
        with pytest.raises(ConfigError, match="counts from its invocation tokens on"):
            refused()
    # what to do instead is not to merge it, which cannot be done
    with pytest.raises(ConfigError, match=r"no other can be trained on top of it$"):
        get_bank(model).move_to_base("default", AdapterOrigin("here", "0"))
    with pytest.raises(ConfigError, match="must be a list of token ids"):
        LoraSpec(alora_invocation_tokens=())
    with pytest.raises(ConfigError, match="use_dora does not go with alora_invocation_tokens"):
        spec(use_dora=True)


def test_a_base_that_was_changed_for_all_tokens_is_refused() -> None:
    """PEFT takes the product off everywhere, before the invocation too."""
    tokens: dict[str, Any] = {"alora_invocation_tokens": [5]}
    LoraSpec(init_lora_weights="pissa", **tokens)
    with pytest.raises(ConfigError, match="keep_residual does not go with alora_invocation_tokens"):
        LoraSpec(init_lora_weights="pissa", keep_residual=True, **tokens)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "target_modules": ["q_proj"],
        "init_lora_weights": "pissa",
    }
    assert parse_peft_config(config, "x", convert_init=True).init_lora_weights == "pissa"
    with pytest.raises(ModelError, match="such a file is not read"):
        parse_peft_config({**config, **tokens}, "x", convert_init=True)


def test_a_class_that_computes_anew_is_refused_in_generation(tiny: Any) -> None:
    model = HfModel(tiny("llama"))
    attach(model, spec())
    model.recompute_reason = "it keeps none"
    with pytest.raises(ConfigError, match="needs a key/value cache"):
        generate_completions(model, [[1, 2]], SamplingParams(max_new_tokens=1), adapters="default")
