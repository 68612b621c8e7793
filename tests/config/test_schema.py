"""The settings themselves: defaults, limits, values worked out from others, and settings that
exclude each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lorry.adapters.spec import lora_spec_of
from lorry.config import EvalSettings, ExportSettings, MergeSettings, RunConfig, build_settings
from lorry.config.parsing.parse import parse_settings
from lorry.errors import ConfigError


def run(**settings: Any) -> RunConfig:
    return build_settings(RunConfig, {"data": "people.jsonl", **settings}, print)


def test_defaults_are_the_documented_ones() -> None:
    r = run()
    assert (r.model.name, r.model.dtype, r.model.device, r.model.native) == (
        "smollm2-135m-instruct",
        "auto",
        "auto",
        True,
    )
    assert r.lora is not None
    assert (r.lora.r, r.lora.lora_alpha, r.lora.target_modules, r.lora.adapter_name) == (
        16,
        32,
        "auto",
        "default",
    )
    assert (r.train.learning_rate, r.train.num_train_epochs, r.train.max_steps) == (2e-4, 3.0, -1)
    assert (r.train.warmup_ratio, r.train.eval_strategy, r.train.report_to) == (0.03, "no", [])
    assert (r.data.max_length, r.data.packing, r.data.completion_only_loss) == (1024, False, None)
    assert r.output_dir == Path("runs/people-smollm2-135m-instruct")


def test_descriptions_are_frozen() -> None:
    with pytest.raises(ValidationError):
        run().train.seed = 1


def test_every_setting_has_a_line_of_help() -> None:
    from lorry.config.parsing.names import schema_names

    for schema in (RunConfig, EvalSettings, ExportSettings, MergeSettings):
        assert [
            name for name, field in schema_names(schema).fields.items() if not field.description
        ] == []


@pytest.mark.parametrize(
    ("given", "alpha"),
    [({}, 32), ({"r": 8}, 32), ({"r": 64, "lora_alpha": None}, 32), ({"r": 8, "lora_alpha": 5}, 5),
     ({"lora_alpha": 0.5}, 0.5), ({"variant": "adalora", "init_r": 12}, 32)],
)  # fmt: skip
def test_alpha_is_the_same_for_every_rank_unless_given(given: dict[str, Any], alpha: float) -> None:
    lora = run(**given).lora
    assert lora is not None
    assert lora.lora_alpha == alpha


@pytest.mark.parametrize(
    ("given", "scale"),
    [({}, 2), ({"use_rslora": True}, 8), ({"lora_alpha": 64}, 1), ({"memory_budget": "2GiB"}, 2),
     ({"r": 64, "rank_by": "data"}, 2), ({"r": 8, "rank_by": "data"}, 2),
     ({"r": 8, "rank_by": "data", "lora_alpha": 32}, 4)],
)  # fmt: skip
def test_ranks_that_rows_choose_have_the_scale_of_the_default_rank(
    given: dict[str, Any], scale: float
) -> None:
    """Whatever the bound: with r=auto the largest that is tried here, 64, else r."""
    lora = run(**{"r": "auto", **given}).lora
    assert lora is not None
    assert lora_spec_of(lora).scale("m") == pytest.approx(scale)


def test_no_adapter() -> None:
    assert run(lora=None).lora is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (["q_proj"], ["q_proj"]),
        ("all-linear", "all-linear"),
        ("auto", "auto"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_target_modules(given: Any, expected: Any) -> None:
    lora = run(target_modules=given).lora
    assert lora is not None
    assert lora.target_modules == expected


@pytest.mark.parametrize(
    ("given", "strategy"),
    [
        ({}, "no"),
        ({"eval": "held.jsonl"}, "epoch"),
        ({"test_size": 0.1}, "epoch"),
        ({"eval_split": "test", "eval_steps": 10}, "steps"),
        ({"eval": "held.jsonl", "eval_strategy": "no"}, "no"),
    ],
)
def test_evaluation_follows_the_data(given: dict[str, Any], strategy: str) -> None:
    assert run(**given).train.eval_strategy == strategy


@pytest.mark.parametrize(
    ("given", "ratio"),
    [
        ({}, 0.03),
        ({"warmup_steps": 5}, 0.0),
        ({"warmup_ratio": 0.2}, 0.2),
        ({"warmup_ratio": 0}, 0.0),
        ({"lr_scheduler_type": "constant"}, 0.0),
    ],
)
def test_the_default_warmup_gives_way(given: dict[str, Any], ratio: float) -> None:
    assert run(**given).train.warmup_ratio == ratio


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, "auto"),
        (False, None),
        (None, None),
        ("auto", "auto"),
        ("runs/a", "runs/a"),
        ("true", "auto"),
    ],
)
def test_resume(given: Any, expected: str | None) -> None:
    assert run(resume_from_checkpoint=given).train.resume_from_checkpoint == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [("none", []), (None, []), ("wandb", ["wandb"]), ("wandb,trackio", ["wandb", "trackio"])],
)
def test_report_to(given: Any, expected: list[str]) -> None:
    assert run(report_to=given).train.report_to == expected


@pytest.mark.parametrize("word", ["bf16", "bfloat16", "torch.bfloat16"])
def test_dtype_words(word: str) -> None:
    assert run(dtype=word).model.dtype == "bfloat16"
    assert build_settings(MergeSettings, {"run": "r", "dtype": word}, print).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"data": "dir/some people.jsonl", "model": "org/Base-1B"}, "some-people-Base-1B"),
        ({"data": ["a.jsonl", "b.jsonl"], "model": "/m/x.gguf"}, "a-x"),
        ({"run_name": "try 1"}, "try-1"),
        ({"data": "../..", "model": "..", "run_name": "../../etc"}, "etc"),
    ],
)
def test_default_output_directory_stays_under_runs(given: dict[str, Any], name: str) -> None:
    assert run(**given).output_dir == Path("runs") / name


def test_settings_beside_a_run() -> None:
    assert build_settings(MergeSettings, {"run": "runs/a/"}, print).output_dir == Path(
        "runs/a-merged"
    )
    assert build_settings(
        ExportSettings, {"run": "runs/a", "to": "peft"}, print
    ).output_dir == Path("runs/a-peft")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    r = run(output_dir="~/out", model="~/m")
    assert (r.output_dir, r.model.name) == (Path("/home/me/out"), "/home/me/m")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "train.warmup_steps and train.warmup_ratio"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "constant has no warmup"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "constant has no warmup"),
        ({"load_best_model_at_end": True}, "train.load_best_model_at_end needs evaluation"),
        ({"early_stopping_patience": 2}, "train.early_stopping_patience needs evaluation"),
        (
            {"early_stopping_patience": 2, "eval": "e", "eval_strategy": "no"},
            "train.early_stopping_patience needs evaluation",
        ),
        ({"eval_strategy": "epoch"}, "there is no evaluation set"),
        ({"eval_steps": 5}, "there is no evaluation set"),
        ({"eval": "e", "eval_strategy": "steps"}, "needs train.eval_steps"),
        (
            {"eval": "e", "eval_strategy": "epoch", "eval_steps": 5},
            "needs train.eval_strategy=steps",
        ),
        ({"eval": "e", "test_size": 5}, "keep one"),
        ({"test_size": 1.0}, "got 1.0; give a share between 0 and 1"),
        ({"test_size": 0}, "got 0; give a share"),
        ({"r": 0}, "lora.r: got 0; give a whole number above 0"),
        ({"r": True}, "lora.r: got true; give a whole number above 0"),
        ({"r": 2.5}, "lora.r: got 2.5; give a whole number"),
        ({"lora_alpha": -1}, "lora.lora_alpha: got -1; give a number above 0"),
        (
            {"lora_dropout": 1.0},
            "lora.lora_dropout: got 1.0; give a number of at least 0 and below 1",
        ),
        ({"learning_rate": float("nan")}, "train.learning_rate: got nan"),
        ({"learning_rate": float("inf")}, "train.learning_rate: got inf"),
        ({"max_steps": 0}, "train.max_steps: got 0; give at least 1, or -1"),
        ({"max_steps": -2}, "train.max_steps: got -2"),
        ({"adapter_name": "a/b"}, "lora.adapter_name: 'a/b' is not a name"),
        ({"adapter_name": ".."}, "lora.adapter_name: '..' is not a name"),
        ({"adapter_name": "x" * 65}, "is not a name"),
        ({"bias": "some"}, "lora.bias: got 'some'; give one of none, all, lora_only"),
        ({"modules_to_save": []}, "is empty"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
        (
            {"init_lora_weights": "xavier"},
            "lora.init_lora_weights: got 'xavier'; give true or false or one of gaussian, pissa, olora, milora, eva",
        ),
        (
            {"backend": "megatron", "tensor_parallel": 2, "sequence_parallel": True},
            "sequence_parallel=true needs backend=ddp or fsdp",
        ),
        ({"backend": "megatron", "pipeline_parallel": 2}, "pipeline_parallel"),
        (
            {"backend": "megatron", "lora": None},
            "lora=null trains the base, which backend=megatron",
        ),
        ({"backend": "ddp", "replicas": 2}, "replicas needs backend=fsdp"),
        ({"shard_optimizer": True}, "shard_optimizer=true needs backend=ddp or fsdp"),
        ({"backend": "ddp", "reshard_after_forward": False}, "reshard_after_forward needs"),
        ({"backend": "sngle"}, "did you mean 'single'?"),
        ({"target_modules": "*bad"}, "is not a regular expression"),
        ({"target_modules": []}, "lora.target_modules: is empty; name a module"),
        (
            {"rank_pattern": {"q_proj": 0}},
            "lora.rank_pattern: got 0; give a map of name: a whole number above 0",
        ),
        ({"device": "gpu"}, "model.device: got 'gpu'; give auto, cpu, cuda, cuda:N or mps"),
        ({"data": []}, "data.path: is empty; give a file"),
        ({"data": ""}, "data.path: must not be empty"),
        ({"model": "a\0b"}, "NUL"),
        ({"model": None}, "model: got null; give settings of this group, such as model.name"),
        ({"report_to": "mlflow"}, "train.report_to: got 'mlflow'"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'?"),
    ],
)
def test_refused_in_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_every_wrong_setting_gets_its_line() -> None:
    with pytest.raises(ConfigError) as caught:
        run(r=0, seed=-1, dtype="int4")
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()] == [
        "model.dtype",
        "lora.r",
        "train.seed",
    ]


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^data\.path is missing; give data=\.\.\.$"):
        build_settings(RunConfig, {"r": 8}, print)
    with pytest.raises(ConfigError, match=r"^to is missing; give to=hf, dense, .* or hf-moe$"):
        build_settings(ExportSettings, {"run": "runs/a"}, print)


@pytest.mark.parametrize("name", ["megatron", "ddp"])
@pytest.mark.parametrize(
    "setting", ["lora.new_tokens=[<a>]", "lora.variant=adalora", "lora.bias=all"]
)
def test_a_refusal_names_all_that_stands_in_the_way(name: str, setting: str) -> None:
    """Following the advice met the next refusal: `backend=ddp` with `tensor_parallel` left as it was."""
    words = ["data=people.jsonl", f"backend={name}", "backend.tensor_parallel=2", setting]
    cut = "adalora" in setting
    if name == "ddp" and not cut:
        parse_settings(RunConfig, words, print)
        return
    with pytest.raises(ConfigError) as refused:
        parse_settings(RunConfig, words, print)
    if name == "megatron":
        assert "ddp or fsdp" in str(refused.value)
    assert ("leave backend.tensor_parallel out" in str(refused.value)) == cut
    advised = [w for w in words if not (cut and "tensor_parallel" in w)]
    parse_settings(RunConfig, [w.replace("megatron", "ddp") for w in advised], print)


@pytest.mark.parametrize("setting", ["use_dora=true", "lora_bias=true", "variant=adalora"])
def test_vectors_beside_the_factors_are_not_megatrons(setting: str) -> None:
    """Said before anything is loaded: another library multiplies there."""
    with pytest.raises(ConfigError, match=r"under backend=megatron .*give backend=ddp or fsdp"):
        parse_settings(RunConfig, ["data=people.jsonl", "backend=megatron", setting], print)
