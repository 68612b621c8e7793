"""The model that slime builds with the plugin's provider, what of it trains, and which policy each of slime's
passes runs: PEFT's on transformers, or the base alone.
"""

from __future__ import annotations

import importlib.metadata
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

from lorry.errors import ConfigError, ContractError
from lorry.integrations.megatron import get_lora_parameters, load_hf_weights, load_lora
from lorry.integrations.slime.arguments import add_lora_arguments
from tests.support.slime_runs import (
    HOOKS,
    INSTALL,
    IS_REAL,
    PROVIDER,
    REAL,
    add_paths,
    flags,
    parse,
    process_ends,
    training_process,
)

add_paths()

# the adapters of tests/support/megatron_models.py
LORA = [
    *("--use-lora", "--lora-r", "3", "--lora-alpha", "6", "--lora-target-modules", "all-linear"),
    *("--lora-rank-pattern", '{"down_proj": 2, "k_proj": 1}'),
    *("--lora-alpha-pattern", '{"v_proj": 5}'),
]
TOKENS = torch.randint(0, 27, (3, 8), generator=torch.Generator().manual_seed(1))
FAMILIES = ("llama", "qwen2", "qwen3")
only_double = pytest.mark.skipif(IS_REAL, reason="slime's own forward needs a GPU")


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    with training_process():
        yield


def arguments(model: Path, *words: Any) -> Namespace:
    return parse(*flags(model), *LORA, *words, add_custom_arguments=add_lora_arguments)


def build(args: Namespace, role: str = "actor") -> tuple[list[Any], Any]:
    """(chunks, optimizer) as slime has them before it loads weights."""
    from slime.backends.megatron_utils.initialize import init
    from slime.backends.megatron_utils.model import setup_model_and_optimizer

    init(args)
    model, optimizer, _ = setup_model_and_optimizer(args, role)
    model[0].role = role
    return model, optimizer


def loaded(models: Path, family: str, *words: Any) -> tuple[Namespace, list[Any], Any]:
    """A training process whose base and adapter are those of a family's files."""
    args = arguments(models / family, *PROVIDER, *INSTALL, *words)
    model, optimizer = build(args)
    load_hf_weights(model, models / family)
    load_lora(model, models / f"{family}-canonical")
    optimizer.reload_model_params()
    return args, model, optimizer


def scores(args: Namespace, model: list[Any], prefix: str = "") -> Tensor:
    from slime.backends.megatron_utils.model import forward_only

    return forward_only(args, model, TOKENS, store_prefix=prefix)[f"{prefix}log_probs"]


def expected(models: Path, family: str, adapter: bool) -> Tensor:
    """[rows, length - 1] in float32, by PEFT and transformers."""
    model = AutoModelForCausalLM.from_pretrained(models / family, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, models / f"{family}-canonical")
    with torch.no_grad():
        logits = model(TOKENS).logits
    return logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None]).squeeze(2)


def step(args: Namespace, model: list[Any], optimizer: Any) -> None:
    from slime.backends.megatron_utils.model import train_one_step

    data = {"tokens": TOKENS, "advantages": torch.ones(3, 7)}
    train_one_step(args, 0, 0, data, model, optimizer, None)


def close(got: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(got, wanted, atol=1e-5, rtol=0)


def test_this_file_ran_on_slimes_own_code() -> None:
    if not IS_REAL:
        pytest.skip("on the double of slime alone: LORRY_SLIME and LORRY_MEGATRON are not set")
    import megatron.training
    import slime.utils.arguments

    for module, name in (
        (slime.utils.arguments, "LORRY_SLIME"),
        (megatron.training, "LORRY_MEGATRON"),
    ):
        assert module.__file__
        assert Path(module.__file__).is_relative_to(str(REAL[name]))


def test_what_trains_is_what_has_gradient_buffers_and_an_optimizer(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {n for n, _ in build(arguments(models / "qwen2"))[0][0].named_parameters()}
    process_ends()
    args = arguments(models / "qwen2", *PROVIDER, *INSTALL)
    (chunk,), optimizer = build(args)
    adapters = {id(p) for p in get_lora_parameters([chunk])}
    names = dict(chunk.named_parameters())
    assert {n for n in names if ".lora_" not in n} == own
    assert {id(p) for n, p in names.items() if ".lora_" in n} == adapters
    assert {id(p) for p in names.values() if p.requires_grad} == adapters
    assert {id(p) for buffer in chunk.buffers for p in buffer.params} == adapters
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == adapters
    assert args.only_train_params_name_list == ["lora_"]
    (line,) = [t for t in capsys.readouterr().out.splitlines() if t.startswith("lorry: LoRA")]
    assert "bound anew: slime.backends.megatron_utils.model.get_model_provider_func" in line


def test_the_provider_without_install_is_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"--custom-megatron-init-path .* did not run"):
        build(arguments(models / "llama", *PROVIDER))


def test_install_without_the_provider_is_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match="--custom-model-provider-path is missing"):
        build(arguments(models / "llama", *INSTALL))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora-target-modules", "q_proy"], "names 'q_proy', which no layer has"),
        (["--lora-target-modules", "output_layer"], "the output head"),
        (["--lora-r", "33", "--lora-rank-pattern", "{}"], "lora_r is 33 at .*a rank above"),
    ],
)
def test_what_the_model_refuses_is_told_before_it_trains(
    models: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(arguments(models / "llama", *PROVIDER, *INSTALL, *words))


def test_a_critic_is_slimes_own_and_all_of_it_trains(models: Path) -> None:
    args = arguments(models / "llama", *PROVIDER, *INSTALL, "--advantage-estimator", "ppo")
    (chunk,), _ = build(args, role="critic")
    names = dict(chunk.named_parameters())
    assert [n for n in names if ".lora_" in n] == []
    assert all(p.requires_grad for p in names.values())
    assert names["module.output_layer.weight"].shape == (1, 32)


def test_an_untested_slime_is_told(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.4.0" if name == "slime" else own(name)
    )
    with pytest.warns(
        UserWarning, match=r"slime 0\.4\.0 was never run .* 0\.3\.1 \(commit 624b824"
    ):
        build(arguments(models / "llama", *PROVIDER, *INSTALL))


@only_double
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_base_and_the_policy_has_its_adapter(
    models: Path, family: str
) -> None:
    args, model, optimizer = loaded(models, family, "--use-kl-loss", *HOOKS)
    base, policy = (expected(models, family, adapter) for adapter in (False, True))
    assert not close(base, policy)
    assert close(scores(args, model), policy)
    assert close(scores(args, model, "ref_"), base)
    assert close(scores(args, model, "teacher_"), base)
    assert close(scores(args, model), policy)
    # slime may train right after another model's scores
    scores(args, model, "ref_")
    args.use_kl_loss = False  # of which there are no scores here
    step(args, model, optimizer)
    assert scores(args, model).mean() > policy.mean()
    assert close(scores(args, model, "ref_"), base)


@only_double
def test_without_the_hook_before_training_an_adapter_that_is_off_stops_it(models: Path) -> None:
    args, model, optimizer = loaded(models, "llama", *HOOKS[:2])
    scores(args, model, "ref_")
    with pytest.raises(ContractError, match="switched off for a pass with gradients"):
        step(args, model, optimizer)


@only_double
def test_a_pass_that_slime_had_not_is_refused(models: Path) -> None:
    args, model, _ = loaded(models, "llama", *HOOKS)
    with pytest.raises(ConfigError, match="slime scores 'rollout_'"):
        scores(args, model, "rollout_")


@only_double
def test_the_hooks_let_a_critic_be(models: Path) -> None:
    args = arguments(models / "llama", *PROVIDER, *INSTALL, *HOOKS)
    model, _ = build(args, role="critic")
    from lorry.integrations.slime import before_log_prob, before_train_step

    before_log_prob(args, model, "")
    before_train_step(args, 0, 0, model, None, None)


@only_double
def test_dropout_is_told_the_step_and_a_scoring_pass_has_none(models: Path) -> None:
    args, model, optimizer = loaded(models, "llama", *HOOKS, "--lora-dropout", "0.5")
    policy = expected(models, "llama", True)
    assert close(scores(args, model), policy)
    from lorry.integrations.megatron.attach import get_adapter, list_chunks
    from lorry.integrations.slime import before_train_step

    (chunk,) = list_chunks(model)
    clock = get_adapter(chunk).clock
    told = []
    for rollout_id, step_id in ((0, 0), (0, 1), (1, 0)):
        before_train_step(args, rollout_id, step_id, model, optimizer, None)
        told.append(clock.step)
    assert len(set(told)) == 3
