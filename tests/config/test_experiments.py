"""Experiments by name, and command lines of open-unlearning: what they stand for, what is typed
goes first, and what is wrong is one error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorry import cli, config
from lorry.config import EvalSettings, RunConfig, UnlearnRunConfig, parse_settings
from lorry.config.guide import format_help
from lorry.config.parsing.experiments import SHIPPED_EXPERIMENTS, VERB_OF_KIND, experiment_names
from lorry.config.parsing.open_unlearning import verb_of_launcher
from lorry.errors import ConfigError
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.tinyrun import quick  # noqa: F401
from tests.support.tofuworld import write_tofu

SCHEMAS = {"finetune": RunConfig, "unlearn": UnlearnRunConfig, "eval": EvalSettings}
NAMES = [name for kind in VERB_OF_KIND for name in experiment_names(kind)]
# learning rate, epochs, warm-up in epochs, batch, accumulation: as published
PUBLISHED = {
    "finetune/tofu/lora": (2e-4, 3, 0.1, 4, 4),
    "finetune/muse/lora": (2e-4, 3, 0.1, 4, 4),
    "finetune/tofu/default": (1e-5, 5, 1, 8, 4),
    "unlearn/tofu/lora": (1e-4, 5, 0.1, 4, 4),
    "unlearn/muse/lora": (1e-4, 5, 0.1, 4, 4),
    "unlearn/wmdp/lora": (1e-4, 5, 0.1, 4, 4),
    "unlearn/tofu/default": (1e-5, 10, 1, 8, 4),
    "unlearn/tofu/idk": (1e-5, 10, 1, 8, 4),
    "unlearn/muse/default": (1e-5, 10, 0, 4, 8),
    "unlearn/muse/scalability": (1e-5, 10, 0, 4, 8),
    "unlearn/muse/sustainabilty": (1e-5, 10, 0, 4, 8),
}
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parsed(name: str, *words: str, notes: list[str] | None = None) -> Any:
    schema = SCHEMAS[name.partition("/")[0]]
    said = [] if notes is None else notes
    return parse_settings(schema, [f"experiment={name}", *words], said.append)


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_a_whole_description_that_reads_back(name: str) -> None:
    run = parsed(name)
    assert config.build_settings(type(run), run.model_dump(), print) == run


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_are_the_published_ones(name: str) -> None:
    run = parsed(name)
    train = run.train
    assert PUBLISHED[name] == (
        train.learning_rate,
        train.num_train_epochs,
        train.warmup_epochs,
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
    )
    assert (train.seed, train.max_grad_norm, train.warmup_ratio) == (0, 1, 0)
    if not name.endswith("lora"):
        assert run.lora is None
        return
    assert (run.lora.r, run.lora.lora_alpha, run.lora.lora_dropout) == (128, 128, 0.05)
    assert set(run.lora.target_modules) - {"lm_head"} == set(ADAPTED)


@pytest.mark.parametrize("method", ["NPO", "IHL"])
def test_tuned_ones_have_the_numbers_of_the_study(method: str) -> None:
    """Those of the best run of benchmarks/results/tofu-small-cpu.json, which their comment quotes."""
    path = Path(__file__).resolve().parents[2] / "benchmarks/results/tofu-small-cpu.json"
    study = json.loads(path.read_text())
    run, name = parsed(f"unlearn/tofu/lora_tuned_{method}"), f"{method}-1e-3"
    values, start = study["values"][name], study["values"]["start"]
    assert name in study["settings"]["only"]
    assert (run.unlearn.method, run.train.learning_rate) == (method, 1e-3)
    assert run.train.num_train_epochs == int(study["settings"]["epochs"])
    scaled = (run.lora.r, run.lora.lora_alpha)
    assert (*scaled, run.train.per_device_train_batch_size) == (64, 128, 8)
    text = (SHIPPED_EXPERIMENTS / f"unlearn/tofu/lora_tuned_{method}.yaml").read_text()
    # as told there: two digits of forget quality and three of utility
    quality = f"{values['forget_quality']:.2g}".removeprefix("0")
    assert f" to {quality}," in text
    assert f"{values['model_utility']:.3f}".removeprefix("0") in text
    assert f"{start['model_utility']:.3f}".removeprefix("0") in text
    assert f"stayed {values['retain_Q_A_Prob']:.3f}".replace(" 0", " ") in text


def test_wmdp_is_rmu_for_eighty_steps() -> None:
    run = parsed("unlearn/wmdp/default")
    own = run.unlearn
    assert (own.method, own.layer, own.steering_coeff, own.retain_loss) == ("RMU", 7, 2, "EMBED")
    assert (run.train.max_steps, run.train.learning_rate) == (80, 5e-5)
    assert run.train.gradient_accumulation_steps == 16
    for asked in (run, parsed("unlearn/wmdp/lora")):
        assert (asked.suite.name, asked.train.eval_on_start) == ("wmdp", True)
    assert parsed("unlearn/wmdp/lora", "suite=null").suite.name is None


def test_what_is_typed_goes_before_the_file_and_a_file_of_ones_own_between_them(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("experiment: unlearn/tofu/lora\nlora: {r: 8}\ntrain: {learning_rate: 3e-3}\n")
    run = parse_settings(UnlearnRunConfig, [str(mine), "r=4"], print)
    assert run.lora is not None
    assert (run.lora.r, run.lora.lora_dropout, run.train.learning_rate) == (4, 0.05, 3e-3)
    with_adapter = parsed("unlearn/tofu/default", "r=16")
    assert with_adapter.lora.r == 16
    assert parsed("unlearn/tofu/lora", "lora=null").lora is None


def test_parameters_stand_in_the_rows_and_models() -> None:
    run = parsed("unlearn/muse/lora", "data_split=Books", "forget_split=x")
    assert (run.model.name, run.unlearn.forget, run.unlearn.retain) == (
        "muse-bench/MUSE-Books_target",
        "muse:Books/raw/x",
        "muse:Books/raw/retain1",
    )
    assert run.data.path == run.unlearn.forget
    notes = list[str]()
    assert parsed("finetune/tofu/lora", "forget_split=forget05", notes=notes) == parsed(
        "finetune/tofu/lora"
    )
    assert any("forget_split changes nothing" in note for note in notes)
    assert parsed("finetune/tofu/lora", "data_split=retain90").data.path == "tofu:retain90"


def test_from_python_it_is_one_more_setting() -> None:
    run = config.build_settings(
        UnlearnRunConfig, {"experiment": "unlearn/tofu/lora", "forget_split": "forget05"}, print
    )
    assert run == parsed("unlearn/tofu/lora", "forget_split=forget05")


@pytest.mark.parametrize(
    ("name", "hub", "adapted"),
    [
        ("Qwen2.5-3B-Instruct-lora", "Qwen/Qwen2.5-3B-Instruct", True),
        ("Llama-2-7b-hf-lora", "meta-llama/Llama-2-7b-hf", True),
        ("Llama-2-7b-chat-hf-lora", "meta-llama/Llama-2-7b-chat-hf", True),
        ("Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", False),
    ],
)
def test_a_model_by_the_name_of_a_configuration(
    name: str, hub: str, adapted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    notes = list[str]()
    run = parse_settings(RunConfig, [f"model={name}", "data=x.jsonl"], notes.append)
    assert run.lora is not None
    assert run.model.name == hub
    assert run.lora.r == (128 if adapted else 16)
    assert any(f"model={name} is read as model={hub}" in note for note in notes)
    # what is typed beside it goes first
    smaller = parse_settings(RunConfig, [f"model={name}", "data=x.jsonl", "r=8"], print)
    assert smaller.lora is not None
    assert smaller.lora.r == 8
    # a folder of that name is the model that is meant
    (tmp_path / name).mkdir()
    assert parse_settings(RunConfig, [f"model={name}", "data=x.jsonl"], print).model.name == name


def test_a_configuration_beside_its_weights_gives_the_weights() -> None:
    weights = "open-unlearning/tofu_Llama-3.2-1B-Instruct_full"
    words = [
        "model=Llama-3.2-1B-Instruct",
        f"model.model_args.pretrained_model_name_or_path={weights}",
    ]
    for order in (words, words[::-1]):
        notes = list[str]()
        assert parsed("unlearn/tofu/default", *order, notes=notes).model.name == weights
        assert any("names no weights" in note for note in notes)
        assert parsed("eval/tofu/default", *order).model.name == weights


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        (["python", "src/train.py", "--config-name=train", "experiment=x"], "sft"),
        (["python3", "src/train.py", "--config-name", "unlearn.yaml"], "unlearn"),
        (["CUDA_VISIBLE_DEVICES=0", "python", "src/eval.py", "experiment=x"], "eval"),
        (["accelerate", "launch", "--num_processes", "2", "src/train.py", "-cn", "unlearn"], "unlearn"),
    ],
)  # fmt: skip
def test_a_pasted_command_names_the_verb(words: list[str], verb: str) -> None:
    assert verb_of_launcher(words) == [verb, *words]
    notes = list[str]()
    rest = {"sft": "data=x", "unlearn": "forget=x", "eval": "data=x"}[verb]
    given = [word for word in words if word != "experiment=x"]
    schema = next(getattr(config, one.schema) for one in cli.VERBS if one.name == verb)
    method = ["method=GradAscent"] if verb == "unlearn" else []
    assert parse_settings(schema, [*given, rest, *method], notes.append) == parse_settings(
        schema, [rest, *method], print
    )
    assert notes


def test_other_words_are_no_launcher() -> None:
    for words in (["sft", "data=src/train.py"], ["report", "src/train.py"], ["python", "x.py"]):
        assert verb_of_launcher(words) == words


@pytest.mark.parametrize(
    ("schema", "words", "wrong"),
    [
        (UnlearnRunConfig, "experiment=unlearn/tofu/lra", r"did you mean 'unlearn/tofu/lora'"),
        (UnlearnRunConfig, "experiment=../../etc/passwd", "no experiment"),
        (UnlearnRunConfig, "experiment=finetune/tofu/lora", "an experiment of `lorry sft`"),
        (RunConfig, "experiment=eval/tofu/default", "an experiment of `lorry eval`"),
        (RunConfig, "--config-name=unlearn data=x", "what `lorry unlearn` does"),
        (RunConfig, "--config-name=mine data=x", "settings of another are given as CONFIG.yaml"),
        (RunConfig, "data=x --config-name", "settings of another"),
        (UnlearnRunConfig, "experiment=unlearn/tofu/lora forget_split=forget05 forget=x", "keep one"),
        (UnlearnRunConfig, "experiment=unlearn/tofu/lora retain_split=a unlearn.retain=x", "keep one"),
        (RunConfig, "experiment=finetune/tofu/lora data_split=retain90 data=x", "keep one"),
        (RunConfig, "experiment=finetune/tofu/lora data/datasets@data.train=TOFU_QA_retain", "unexpected word"),
        (RunConfig, "experiment=finetune/tofu/lora data.train.MINE.args.hf_args.name=x", "unknown setting"),
        (RunConfig, "forget_split=forget05 data=x", "forget=tofu:forget10"),
        (RunConfig, "data=x forget=y", "a setting of lorry unlearn"),
        (RunConfig, "data=x trainer=NPO", "a setting of lorry unlearn"),
        (UnlearnRunConfig, "experiment=unlearn/tofu/lora trainer=NPOO", "did you mean 'NPO'"),
        (UnlearnRunConfig, "forget=a retain=b method=npoo", "did you mean 'NPO'"),
        (UnlearnRunConfig, "experiment=unlearn/tofu/lora forget_split=a/../b", "is a name"),
        (config.PlanSettings, "experiment=eval/tofu/default", "an experiment of `lorry eval`"),
        (UnlearnRunConfig, "experiment=unlearn/tofu/lora trainer.args.lrr=1", "unknown setting 'lrr'"),
        (UnlearnRunConfig, "experiment=unlearn/tofu/lora trainer=NPO method=RMU", "keep one"),
        (UnlearnRunConfig, "experiment=unlearn/tofu/lora data_split=News", "experiments"),
        (config.ChatSettings, "experiment=unlearn/tofu/lora", "unknown setting 'experiment'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(schema: type[Any], words: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        parse_settings(schema, words.split(), print)


def test_experiments_ask_the_suite_of_their_benchmark() -> None:
    """As published: of the rows that are forgotten, before the first step and after every epoch."""
    run = parsed("unlearn/tofu/lora", "forget_split=forget05", "retain_logs_path=x.json")
    assert (run.suite.name, run.suite.forget_split) == ("tofu", "forget05")
    assert run.suite.retain_logs_path == "x.json"
    assert (run.train.eval_on_start, run.train.eval_strategy) == (True, "epoch")
    assert parsed("unlearn/muse/lora", "data_split=Books").suite.corpus == "Books"
    assert parsed("unlearn/tofu/lora", "suite=null").suite.name is None


def test_the_rows_of_the_suite_follow_the_rows_of_the_run() -> None:
    forget = ["forget=tofu:forget01", "retain=x", "suite=tofu"]
    assert parse_settings(UnlearnRunConfig, forget, print).suite.forget_split == "forget01"
    given = parse_settings(UnlearnRunConfig, [*forget, "forget_split=forget10"], print)
    assert given.suite.forget_split == "forget10"
    again = config.build_settings(UnlearnRunConfig, given.model_dump(), print)
    assert again == given
    oracle = parse_settings(RunConfig, ["data=tofu:retain95", "suite=tofu"], print)
    assert (oracle.suite.forget_split, oracle.train.eval_strategy) == ("forget05", "epoch")


@pytest.mark.parametrize(
    ("rows", "split"),
    [
        ("[tofu:forget05]", "forget05"),
        ("[tofu:retain99]", "forget01"),
        ("[tofu:full, more.jsonl]", "forget10"),
    ],
)
def test_a_suite_asks_about_the_rows_of_a_list(rows: str, split: str) -> None:
    run = parse_settings(RunConfig, [f"data={rows}", "suite=tofu"], print)
    assert run.suite.forget_split == split


@pytest.mark.parametrize("rows", ["[tofu:forget01, tofu:forget05]", "[tofu:retain90, more.jsonl]"])
def test_a_suite_that_may_ask_about_several_rows_needs_a_split(rows: str) -> None:
    words = [f"data={rows}", "suite=tofu"]
    with pytest.raises(ConfigError, match="give forget_split"):
        parse_settings(RunConfig, words, print)
    run = parse_settings(RunConfig, [*words, "forget_split=forget01"], print)
    assert run.suite.forget_split == "forget01"


def test_a_suite_asks_every_job_about_one_split(tmp_path: Path) -> None:
    """A job of other rows would be measured on those of another."""
    subjects = "subjects=[{name: a, forget: tofu:forget01}, {name: b, forget: tofu:forget05}]"
    words = ["model=m", "retain=tofu:retain95", "method=NPO", subjects, "suite=tofu"]
    with pytest.raises(
        ConfigError, match=r"job 'b': suite=tofu evaluates every job on forget01.*forget05"
    ):
        parse_settings(UnlearnRunConfig, words, print)
    run = parse_settings(UnlearnRunConfig, [*words, "forget_split=forget05"], print)
    assert (run.suite.forget_split, len(run.jobs)) == ("forget05", 2)
    file = tmp_path / "run.yaml"
    file.write_text(config.dump_settings(run))
    assert parse_settings(UnlearnRunConfig, [str(file)], print) == run


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_loss", False),
        ("eval_forget_nll", False),
        ("eval_x_perplexity", False),
        # terms of a loss: what distillation has beside its NLL, and a router's run of each domain
        ("eval_distill", False),
        ("nll_people", False),
        ("eval_z", False),
        ("eval_forget_probability", True),
        ("eval_bool_q_accuracy", True),
        ("forget_quality", True),
    ],
)
def test_more_of_a_metric_is_better_unless_it_is_a_loss(metric: str, greater: bool) -> None:
    words = ["data=x", f"metric_for_best_model={metric}"]
    assert parse_settings(RunConfig, words, print).train.greater_is_better is greater
    other = parse_settings(RunConfig, [*words, f"greater_is_better={not greater}"], print)
    assert other.train.greater_is_better is not greater


def test_their_regular_expression_is_the_number_of_the_layer() -> None:
    regex = r"trainer.method_args.module_regex=model\.layers\.5"
    assert parsed("unlearn/wmdp/default", regex).unlearn.layer == 5
    with pytest.raises(ConfigError, match="give layer=N"):
        parsed("unlearn/wmdp/default", "trainer.method_args.module_regex=.*")


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tofu(tmp_path_factory.mktemp("tofu"))
    rows = tinyrun.rows(16)
    (folder / "forget05.json").write_text(json.dumps(rows[:6]))
    (folder / "retain90.json").write_text(json.dumps(rows[6:]))
    # two numbers that no other model would give
    scores = {str(at): {"score": 0.1 * at} for at in range(3)}
    logs = {"forget_truth_ratio": {"agg_value": 0.1, "value_by_index": scores}}
    (folder / "logs.json").write_text(json.dumps(logs))
    return folder


def test_the_command_of_the_users_runs(tofu: Path, tmp_path: Path) -> None:
    """Pasted behind `lorry`, on a small model: adapters in the head as well."""
    model = tinyrun.model_directory(tmp_path / "model", num_hidden_layers=2)
    command = (
        f"python src/train.py --config-name=unlearn @experiment=unlearn/tofu/lora model={model} trainer=NPO "
        f"forget_split=forget05 retain_split=retain90 retain_logs_path={tofu / 'logs.json'} task_name=X "
        f"metrics=[forget_quality] "
        f"trainer.args.learning_rate=1e-3 trainer.args.gradient_accumulation_steps=1 device_map=auto "
        f"local.tofu={tofu} r=2 num_train_epochs=1 dtype=float32 threads=1 output_dir={tmp_path / 'run'}"
    )
    assert cli.main(command.split()) == 0
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    asked = [record for record in records if "eval_forget_quality" in record]
    assert [record["step"] for record in asked] == [0, 2]  # before the first, and every epoch
    losses = [record for record in records if "loss" in record]
    assert len(losses) == 2  # 6 rows, 4 a step
    # the policy is the start: (2 / 0.1) ln 2
    assert losses[0]["loss_forget"] == pytest.approx(20 * 0.6931471805599453, rel=1e-5)
    receipt = json.loads((tmp_path / "run/receipt.json").read_text())
    assert "error" not in receipt
    saved = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert "lm_head" in saved["target_modules"]


def test_wmdp_runs_and_trains_what_it_says(tmp_path: Path) -> None:
    model = tinyrun.model_directory(tmp_path / "model", num_hidden_layers=8)
    for name, first in (("cyber-forget-corpus", 0), ("cyber-retain-corpus", 8)):
        texts = [{"text": row["answer"]} for row in tinyrun.rows(8, start=first)]
        tinyrun.write_rows(tmp_path / f"{name}.jsonl", texts)
    question = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
    for subject in ("bio", "chem", "cyber"):
        tinyrun.write_rows(tmp_path / f"wmdp-{subject}.jsonl", [question])

    def trained(name: str, *words: str) -> dict[str, Tensor]:
        out = tmp_path / name.rpartition("/")[2]
        run = parsed(
            name, f"model={model}", f"local.wmdp={tmp_path}", "max_steps=1", "dtype=float32",
            f"output_dir={out}", "eval_on_start=false", *words,
        )  # fmt: skip
        train_run(run, [])
        asked = json.loads((out / "evals/LMEval_SUMMARY.json").read_text())
        assert set(asked) == {"wmdp_bio", "wmdp_chem", "wmdp_cyber"}
        (file,) = out.glob("*model.safetensors")
        return load_file(file)

    before, after = load_file(model / "model.safetensors"), trained("unlearn/wmdp/default")
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {f"model.layers.{n}.mlp.down_proj.weight" for n in (5, 6, 7)}
    names = trained("unlearn/wmdp/lora", "r=2")
    assert {name.split("layers.")[1].split(".")[0] for name in names} == {str(n) for n in range(8)}


def test_plan_takes_the_experiments_of_the_verbs_it_plans() -> None:
    """By the experiment alone: no other word says that the run would unlearn."""
    words = ["experiment=unlearn/tofu/lora", "forget_split=forget05"]
    planned = parse_settings(config.PlanSettings, words, print)
    run = parse_settings(UnlearnRunConfig, words, print)
    assert isinstance(planned, UnlearnRunConfig)
    assert planned.unlearn == run.unlearn
    assert planned.lora == run.lora
    plain = parse_settings(config.PlanSettings, ["experiment=finetune/tofu/lora"], print)
    assert not isinstance(plain, UnlearnRunConfig)
    page = format_help(config.PlanSettings, "lorry plan", "")
    assert "unlearn/tofu/lora" in page
    assert "finetune/tofu/lora" in page
