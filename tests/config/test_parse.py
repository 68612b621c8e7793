"""Names and values from the command line, YAML, JSON and Python: which setting is meant, what wins,
what is refused.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.config import (
    ChatSettings,
    DistillRunConfig,
    DoctorSettings,
    EvalSettings,
    ExportSettings,
    MergeSettings,
    ReportSettings,
    RunConfig,
    build_settings,
    parse_settings,
)
from lorry.config.parsing.aliases import (
    ALIAS_READERS,
    ALIAS_RENAMES,
    HOMONYMS,
    IGNORED_ALIASES,
    UNSUPPORTED_ALIASES,
)
from lorry.config.parsing.names import schema_names
from lorry.errors import ConfigError


def run(*argv: str) -> RunConfig:
    return parse_settings(RunConfig, ["data=people.jsonl", *argv], print)


def value(dotted: str, *argv: str) -> Any:
    found: Any = run(*argv)
    for part in dotted.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("argv", "dotted", "expected"),
    [
        (["r=8"], "lora.r", 8),
        (["lora.r=8"], "lora.r", 8),
        (["lora=8"], "lora.r", 8),
        (["lora={r: 8}"], "lora.r", 8),
        (["--r", "8"], "lora.r", 8),
        (["--r=8"], "lora.r", 8),
        (["--lora.r=8"], "lora.r", 8),
        (["r=8", "r=16"], "lora.r", 16),
        (["lora=null"], "lora", None),
        (["learning_rate=1e-3"], "train.learning_rate", 1e-3),
        (["learning-rate=1e-3"], "train.learning_rate", 1e-3),
        (["--learning-rate", "1E-3"], "train.learning_rate", 1e-3),
        (["max_steps=1e3"], "train.max_steps", 1000),
        (["--max_steps", "-1"], "train.max_steps", -1),
        (["model=org/name"], "model.name", "org/name"),
        (["model.name=org/name"], "model.name", "org/name"),
        (["model=12"], "model.name", "12"),
        (["run_name=1e3"], "train.run_name", "1e3"),
        (["run_name=no"], "train.run_name", "no"),
        (["run_name=null"], "train.run_name", None),
        (["run_name='null'"], "train.run_name", "null"),
        (["system=Be nice: always # really"], "data.system", "Be nice: always # really"),
        (["system=[INST] a=b"], "data.system", "[INST] a=b"),
        (["system=&a b"], "data.system", "&a b"),
        (["system="], "data.system", None),
        (["--system", "a=b"], "data.system", "a=b"),
        (["packing=yes"], "data.packing", True),
        (["--packing"], "data.packing", True),
        (["--packing", "r=8"], "data.packing", True),
        (["--packing", "false"], "data.packing", False),
        (["--no-shuffle"], "data.shuffle", False),
        (["eval_strategy=no"], "train.eval_strategy", "no"),
        (["save_strategy=no"], "train.save_strategy", "no"),
        (["target_modules=[q_proj, v_proj]"], "lora.target_modules", ["q_proj", "v_proj"]),
        (["target_modules=q_proj,v_proj"], "lora.target_modules", ["q_proj", "v_proj"]),
        (
            ["--target_modules", "q_proj", "v_proj", "r=2"],
            "lora.target_modules",
            ["q_proj", "v_proj"],
        ),
        (["--target_modules", "all-linear"], "lora.target_modules", "all-linear"),
        (["target_modules=.*\\.(q|v)_proj"], "lora.target_modules", ".*\\.(q|v)_proj"),
        (["layers_to_transform=0,2"], "lora.layers_to_transform", [0, 2]),
        (["layers_to_transform=3"], "lora.layers_to_transform", 3),
        (["init_lora_weights=gaussian"], "lora.init_lora_weights", "gaussian"),
        (["--init_lora_weights", "gaussian"], "lora.init_lora_weights", "gaussian"),
        (["init_lora_weights=false"], "lora.init_lora_weights", False),
        (["rank_pattern={q_proj: 4}"], "lora.rank_pattern", {"q_proj": 4}),
        (["report_to=wandb,tensorboard"], "train.report_to", ["wandb", "tensorboard"]),
        (["report_to=none"], "train.report_to", []),
        (["resume_from_checkpoint=true"], "train.resume_from_checkpoint", "auto"),
        (["save_total_limit=null"], "train.save_total_limit", None),
        (["output_dir=runs/2024"], "output_dir", Path("runs/2024")),
        (["output_dir=2024"], "output_dir", Path("2024")),
        (["test_size=0.1"], "data.test_size", 0.1),
        (["test_size=10"], "data.test_size", 10),
    ],
)
def test_command_line(argv: list[str], dotted: str, expected: Any) -> None:
    found = value(dotted, *argv)
    assert found == expected
    assert type(found) is type(expected)


def test_several_files() -> None:
    assert parse_settings(RunConfig, ["data=[a.jsonl, b.jsonl]"], print).data.path == [
        "a.jsonl",
        "b.jsonl",
    ]
    assert parse_settings(
        RunConfig, ["--data", "a.jsonl", "b.jsonl", "--r", "4"], print
    ).data.path == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["lerning_rate=1"],
            "lerning_rate=1: unknown setting 'lerning_rate' (did you mean 'learning_rate'?)",
        ),
        (["lora.lora_alfa=1"], "did you mean 'lora.lora_alpha'?"),
        (["lora.learning_rate=1"], "did you mean 'train.learning_rate'?"),
        (["modle=x"], "did you mean 'model'?"),
        (["cutof_len=3"], "did you mean 'cutoff_len'?"),
        (["--lerning-rate", "3"], "--lerning-rate: unknown setting"),
        (["--name", "x"], "'name' is ambiguous"),
        (["bf16=maybe"], "bf16=maybe: model.dtype: got 'maybe'"),
        (
            ["train_on_inputs=maybe"],
            "data.completion_only_loss: got 'maybe'; give true or false or null",
        ),
        (["zzz=1"], "zzz=1: unknown setting 'zzz'"),
        (
            ["name=x"],
            "'name' is ambiguous; write one of: model.name, data.name, suite.name, backend.name",
        ),
        (["train=5"], "'train' is a group; set one of its settings, such as train.learning_rate"),
        (["use_dora=maybe"], "use_dora: got 'maybe'"),
        (
            ["lora.megatron_config=[a]"],
            "lora.megatron_config=['a'] is not supported yet",
        ),
        (["optim=adafactor"], "optim=adafactor is not supported yet"),
        (
            ["backend=megatron", "backend.pipeline_parallel=2"],
            "backend.pipeline_parallel=2 is not supported yet; nearest: tensor_parallel=N",
        ),
        (["deepspeed=z3.json"], "deepspeed=z3.json is not supported yet; nearest: backend=fsdp"),
        (["r", "=", "8"], "r: unexpected word; settings are key=value without spaces"),
        (["-r", "8"], "-r: not an option"),
        (["--r"], "--r: a value is missing"),
        (["--r", "--packing"], "--r: a value is missing"),
        (["r=abc"], "lora.r: got 'abc'; give a whole number above 0"),
        (["target_modules=[]"], "target_modules=[]: is empty; name a module"),
        (["lora_r=abc"], "lora_r=abc: lora.r: got 'abc'"),  # by another name
        (["r=!!python/object:os.system x"], "lora.r: got '!!python/object:os.system x'"),
        (["r=" + "9" * 5000], "lora.r: got '999"),
        (
            ["seed=99999999999999999999999"],
            "train.seed: got 99999999999999999999999; the largest whole number is",
        ),
        (["max_length=0x" + "f" * 5000], "data.max_length: got '0xfffff"),
        (["rank_pattern={q_proj: 1" + "0" * 30 + "}"], "lora.rank_pattern: got "),
        (
            ["lora_alpha=1e300"],
            "lora.lora_alpha: got 1e+300; give a number above 0 and at most 2147483648",
        ),
        (["alpha_pattern={q_proj: 1e300}"], "lora.alpha_pattern: got 1e+300"),
        (["r=5000000000"], "lora.r: got 5000000000"),
        (
            ["num_train_epochs=1e300"],
            "train.num_train_epochs: got 1e+300; give a number above 0 and at most 100000",
        ),
        (["learning_rate=1e999"], "train.learning_rate: got '1e999'; give a number above 0"),
        (["memory_budget=" + "9" * 5000], "is not an amount of memory"),
        (["memory_budget=" + "9" * 400 + "GiB"], "is not an amount of memory"),
        (["task=dpo"], "task: got 'dpo'; give sft"),
    ],
)
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(*argv)
    assert message in str(caught.value)


def test_a_word_that_is_not_supported_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        run("optim=adafactor")
    assert str(caught.value) == "optim=adafactor is not supported yet"


@pytest.mark.parametrize(
    ("argv", "dotted", "expected", "note"),
    [
        (["cutoff_len=64"], "data.max_length", 64, "cutoff_len is read as data.max_length"),
        (["sequence_len=64"], "data.max_length", 64, "sequence_len is read as data.max_length"),
        (["max_seq_length=64"], "data.max_length", 64, "max_seq_length is read as data.max_length"),
        (["lora_r=4"], "lora.r", 4, "lora_r is read as lora.r"),
        (["lora.rank=4"], "lora.r", 4, "lora.rank is read as lora.r"),
        (["--lora-r", "4"], "lora.r", 4, "lora_r is read as lora.r"),
        (["alpha=4"], "lora.lora_alpha", 4, "alpha is read as lora.lora_alpha"),
        (["lr=1e-3"], "train.learning_rate", 1e-3, "lr is read as train.learning_rate"),
        (["micro_batch_size=2"], "train.per_device_train_batch_size", 2, None),
        (["batch_size=2"], "train.per_device_train_batch_size", 2, None),
        (["num_epochs=2"], "train.num_train_epochs", 2.0, None),
        (["gradient_accumulation=2"], "train.gradient_accumulation_steps", 2, None),
        (["model_name_or_path=x"], "model.name", "x", None),
        (["base_model=x"], "model.name", "x", None),
        (
            ["--lora_target_modules", "q_proj", "v_proj"],
            "lora.target_modules",
            ["q_proj", "v_proj"],
            None,
        ),
        (
            ["lora_target_linear=true"],
            "lora.target_modules",
            "all-linear",
            "lora_target_linear=true is read as",
        ),
        (
            ["lora_target_linear=false"],
            "lora.target_modules",
            "auto",
            "lora_target_linear=false changes nothing",
        ),
        (["lora_target=all"], "lora.target_modules", "all-linear", None),
        (["warmup=0.1"], "train.warmup_ratio", 0.1, "warmup=0.1 is read as train.warmup_ratio=0.1"),
        (["warmup=10"], "train.warmup_steps", 10, "warmup=10 is read as train.warmup_steps=10"),
        (["bf16=true"], "model.dtype", "bfloat16", "bf16=true is read as model.dtype=bfloat16"),
        (["--bf16"], "model.dtype", "bfloat16", None),
        (["--bf16", "false"], "model.dtype", "auto", "bf16=false changes nothing"),
        (["train_on_inputs=false"], "data.completion_only_loss", True, None),
        (["val_set_size=0.1"], "data.test_size", 0.1, None),
        (["val_set_size=0"], "data.test_size", None, None),
        (["peft_use_dora=true"], "lora.use_dora", True, "peft_use_dora is read as"),
        (["optim=adamw_torch"], "lora.r", 16, "optim=adamw_torch changes nothing"),
        (["task_type=CAUSAL_LM"], "lora.r", 16, None),
    ],
)
def test_peers_names(argv: list[str], dotted: str, expected: Any, note: str | None) -> None:
    notes: list[str] = []
    found: Any = parse_settings(RunConfig, ["data=people.jsonl", *argv], notes.append)
    for part in dotted.split("."):
        found = getattr(found, part)
    assert found == expected
    assert len(notes) == 1
    assert note is None or notes[0].startswith(note)


def test_peers_data_names() -> None:
    for word in ("dataset", "dataset_name", "train_file"):
        notes: list[str] = []
        assert parse_settings(RunConfig, [f"{word}=f.jsonl"], notes.append).data.path == "f.jsonl"
        assert notes == [f"{word} is read as data.path"]


@pytest.mark.parametrize(
    "given", ["lora_bias=none", "lora.lora_bias=none", "lora_bias=false", "lora_bias=null"]
)
def test_lora_bias_that_asks_for_no_bias(given: str) -> None:
    lora = run(given).lora
    assert lora is not None
    assert lora.bias == "none"


@pytest.mark.parametrize("given", ["lora_bias=true", "lora.lora_bias=true"])
def test_pefts_lora_bias_is_not_bias(given: str) -> None:
    """PEFT: `lora_bias` (a switch) trains a bias beside lora_B; `bias` (a word) trains those of the
    base.
    """
    lora = run(given).lora
    assert lora is not None
    assert (lora.lora_B_bias, lora.bias) == (True, "none")
    lora = run("lora_bias=lora_only").lora
    assert lora is not None
    assert lora.bias == "lora_only"


@pytest.mark.parametrize(
    ("given", "setting", "value"),
    [
        ("modules_to_save=lm_head,embed_tokens", "modules_to_save", ["lm_head", "embed_tokens"]),
        ("additional_target=lm_head, norm", "modules_to_save", ["lm_head", "norm"]),
        ("lora_modules_to_save=[lm_head]", "modules_to_save", ["lm_head"]),
        ("trainable_token_indices=[5,6]", "trainable_token_indices", [5, 6]),
        (
            "peft_trainable_token_indices={lm_head: [5]}",
            "trainable_token_indices",
            {"lm_head": [5]},
        ),
        ("peft_ensure_weight_tying=true", "ensure_weight_tying", True),
        ("layers_pattern=layers", "layers_pattern", "layers"),
        ("bias=all", "bias", "all"),
    ],
)
def test_what_trains_beside_the_low_rank_terms(given: str, setting: str, value: Any) -> None:
    assert getattr(run(given).lora, setting) == value


def test_every_alias_leads_to_a_setting_and_hides_none() -> None:
    names = schema_names(RunConfig)
    assert [
        t
        for t in ALIAS_RENAMES.values()
        if t not in names.fields
        and t not in schema_names(DistillRunConfig).fields
        and t not in schema_names(MergeSettings).fields
        and t not in schema_names(ExportSettings).fields
    ] == []
    words = [*ALIAS_RENAMES, *ALIAS_READERS, *IGNORED_ALIASES, *UNSUPPORTED_ALIASES]
    assert [word for word in words if word in names.leaves or word in names.groups] == []
    assert len(set(words)) == len(words), "a word is in two tables"
    assert [word for word in HOMONYMS if word not in names.leaves] == [], (
        "what is no name of ours belongs to NOTED"
    )


@pytest.mark.parametrize(
    "argv",
    [["cutoff_len=8", "max_length=9"], ["max_length=9", "cutoff_len=8"], ["lr=1", "--learning_rate", "2"], ["r=1", "lora.r=2"],
     ["lora_r=1", "rank=2"], ["bf16=true", "dtype=float32"]],
)  # fmt: skip
def test_two_names_for_one_setting(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"both set [a-z_.]+; keep one"):
        run(*argv)


@pytest.mark.parametrize(
    "setting", ["lora_alpha=16", "lora.lora_alpha=16", "r=8", "rank_pattern.q_proj=3"]
)
def test_a_group_that_is_not_there_has_no_settings(setting: str, tmp_path: Path) -> None:
    refused = re.escape(setting) + r": [a-z_.]+ sets something of lora, and lora=null"
    for argv in (["lora=null", setting], [setting, "lora=null"]):
        with pytest.raises(ConfigError, match=refused):
            run(*argv)
    file = tmp_path / "c.yaml"
    file.write_text("lora_alpha: 16\nlora: null\n")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(file))}:1: lora_alpha sets"):
        run(str(file))
    # what comes later decides, and says what it takes the place of
    file.write_text("lora: null\n")
    notes: list[str] = []
    given = [str(file), "data=d.jsonl", setting]
    assert parse_settings(RunConfig, given, notes.append).lora is not None
    assert f"{setting} takes the place of lora=null ({file}:1)" in notes[0]
    file.write_text("lora_alpha: 16\n")
    assert run(str(file), "lora=null").lora is None


def test_command_line_over_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: a.jsonl\ncutoff_len: 7\nlora:\n  r: 4\n  alpha: 9\ntrain: {seed: 3}\n")
    notes: list[str] = []
    r = parse_settings(RunConfig, [str(file), "max_length=9", "lora.r=5"], notes.append)
    assert r.lora is not None
    assert (r.data.path, r.data.max_length, r.lora.r, r.lora.lora_alpha, r.train.seed) == (
        "a.jsonl",
        9,
        5,
        9,
        3,
    )
    assert notes == [
        "cutoff_len is read as data.max_length",
        "lora.alpha is read as lora.lora_alpha",
    ]
    assert parse_settings(RunConfig, ["--config", str(file)], print).data.path == "a.jsonl"
    with pytest.raises(ConfigError, match="two run descriptions"):
        parse_settings(RunConfig, ["--config", str(file), str(file)], print)
    assert parse_settings(RunConfig, [str(file), "lora=null"], print).lora is None


@given(st.permutations(["r=1", "r=2", "r=3"]), st.integers(0, 3))
def test_the_last_of_equal_names_wins(order: list[str], cut: int) -> None:
    argv = order[:cut]
    lora = run(*argv).lora
    assert lora is not None
    assert lora.r == (int(argv[-1][2:]) if argv else 16)


def _one_edit(word: str, at: int, kind: str) -> str:
    at %= len(word)
    return {
        "drop": word[:at] + word[at + 1 :],
        "double": word[: at + 1] + word[at:],
        "swap": word[:at] + "x" + word[at + 1 :],
    }[kind]


@given(
    st.sampled_from([leaf for leaf in schema_names(RunConfig).leaves if len(leaf) > 5]),
    st.integers(0, 40),
    st.sampled_from(["drop", "double", "swap"]),
)
def test_a_slip_of_one_letter_gets_a_suggestion(leaf: str, at: int, kind: str) -> None:
    names = schema_names(RunConfig)
    slip = _one_edit(leaf, at, kind)
    if names.candidates(slip) or slip in {
        **ALIAS_RENAMES,
        **ALIAS_READERS,
        **IGNORED_ALIASES,
        **UNSUPPORTED_ALIASES,
    }:
        return
    with pytest.raises(ConfigError, match="unknown setting") as caught:
        run(f"{slip}=1")
    suggested = str(caught.value).rpartition("did you mean ")[2].strip("'?)")
    assert suggested in names.leaves or suggested in names.fields or suggested in names.groups
    assert abs(len(suggested.rpartition(".")[2]) - len(slip)) <= 3


def test_a_slip_at_the_first_letter_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting.*l2_regularization"):
        run("2_regularization=1")
    file = tmp_path / "8=r.yaml"
    file.write_text("lora: {r: 8}\n")
    with contextlib.chdir(tmp_path):
        described = run(file.name)
    assert described.lora is not None
    assert described.lora.r == 8


@settings(max_examples=300)
@given(
    st.sampled_from(
        [
            *schema_names(RunConfig).fields,
            *schema_names(RunConfig).groups,
            *ALIAS_RENAMES,
            *ALIAS_READERS,
            *UNSUPPORTED_ALIASES,
        ]
    ),
    st.one_of(
        st.text(max_size=20),
        st.text("[]{}:,-&*!|>'\"%@`#~ \n\t0123456789eE.", max_size=12),
        st.just("1" * 400),
    ),
    st.sampled_from(["{}={}", "--{}={}"]),
)
def test_any_text_is_taken_or_refused_in_words(key: str, text: str, form: str) -> None:
    with contextlib.suppress(ConfigError):
        run(form.format(key, text))


@given(st.lists(st.text("-=.abr{} ", max_size=6), max_size=5))
def test_any_arguments_are_taken_or_refused_in_words(argv: list[str]) -> None:
    for schema in (RunConfig, EvalSettings, ReportSettings):
        with contextlib.suppress(ConfigError):
            parse_settings(schema, argv, print)


def test_bare_words_go_to_the_main_setting() -> None:
    evaluation = parse_settings(
        EvalSettings, ["runs/a", "data=f.jsonl", "dtype=float32", "limit=5"], print
    )
    assert (
        evaluation.model.name,
        evaluation.data.path,
        evaluation.model.dtype,
        evaluation.limit,
    ) == (
        "runs/a",
        "f.jsonl",
        "float32",
        5,
    )
    assert parse_settings(ReportSettings, ["runs/a", "runs/b"], print).runs == ["runs/a", "runs/b"]
    assert parse_settings(ReportSettings, ["runs=runs/a"], print).runs == ["runs/a"]
    assert parse_settings(ChatSettings, ["runs/a", "adapters=x,y"], print).adapters == ["x", "y"]
    assert parse_settings(DoctorSettings, [], print).run is None
    assert (
        parse_settings(
            MergeSettings, ["runs/a", "--output_dir", "m", "torch_dtype=bf16"], print
        ).dtype
        == "bfloat16"
    )
    with pytest.raises(ConfigError, match=r"runs/b: unexpected word after 'runs/a'"):
        parse_settings(DoctorSettings, ["runs/a", "runs/b"], print)
    with pytest.raises(ConfigError, match=r"^--foo: unknown setting 'foo'"):
        parse_settings(MergeSettings, ["--foo", "3", "runs/a"], print)
    with pytest.raises(ConfigError, match=r"^run is missing; give run=\.\.\.$"):
        parse_settings(MergeSettings, [], print)
    assert (
        parse_settings(EvalSettings, ["--bf16", "runs/a", "data=f"], print).model.name == "runs/a"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"seed": 10**30},
            r"train\.seed: got 10{30}; the largest whole number is 9223372036854775807",
        ),
        (
            {"max_length": 1 << 20_000},
            r"data\.max_length: got a whole number of 20001 bits; the largest whole number is",
        ),
        ({"rank_pattern": {"q_proj": 10**30}}, r"lora\.rank_pattern: got 10{11}"),
        ({"learning_rate": float("inf")}, r"train\.learning_rate: got inf; give a number above 0"),
    ],
)
def test_python_numbers_have_a_bound(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_settings(RunConfig, {"data": "f", **settings}, print)


def test_python_values() -> None:
    base = run("r=4", "eval=held.jsonl")
    notes: list[str] = []
    r = build_settings(
        RunConfig,
        {
            "data": {"path": Path("f.jsonl"), "n": 5},
            "lora": base.lora,
            "lr": 1e-3,
            "output_dir": Path("o"),
        },
        notes.append,
    )
    assert r.lora is not None
    assert (r.data.path, r.data.n, r.lora.r, r.train.learning_rate, r.output_dir) == (
        "f.jsonl",
        5,
        4,
        1e-3,
        Path("o"),
    )
    assert notes == ["lr is read as train.learning_rate"]
    with pytest.raises(ConfigError, match="unknown setting 'epoch'"):
        build_settings(RunConfig, {"data": "f", "epoch": 3}, print)


@pytest.mark.parametrize("word", ["r=abc", "lora.r=abc", "--r abc", "target_modules=[]"])
def test_an_error_names_its_setting_once(word: str) -> None:
    """What was typed is the setting itself; it stood before its own name, `r=abc: lora.r: ...`."""
    with pytest.raises(ConfigError) as caught:
        run(*word.split())
    name = word.lstrip("-").replace("=", " ").split()[0].rpartition(".")[2]
    assert len(re.findall(rf"\b{name}\b", str(caught.value))) == 1
