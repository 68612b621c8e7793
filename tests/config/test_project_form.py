"""The JSON of the project RMoE, key by key: docs/experts.md says what each is read as, and that is
what is tested here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorry.config import MoeRunConfig, dump_settings, parse_settings
from lorry.config.moe.project import ProjectConfig, translate_project
from lorry.config.parsing.files import read_description_file
from lorry.errors import ConfigError
from lorry.notes import ignore_note

PAGE = Path(__file__).resolve().parents[2] / "docs" / "experts.md"
ROW = re.compile(r"\| `([^`]+)` \| (?:`([^`]*)`)? ?\| (.*) \|")
READ_AS = re.compile(r"`([\w.]+) = ([^`]+)`")


def table() -> list[tuple[str, str, str]]:
    """(key, example, what it is read as) of each row of the page's table."""
    section = PAGE.read_text().partition("## JSON of RMoE")[2].partition("\n## ")[0]
    return [(m[1], m[2] or "", m[3]) for line in section.splitlines() if (m := ROW.fullmatch(line))]


def described(key: str, value: Any) -> dict[str, Any]:
    """A file with one key set; what it needs beside that to mean something."""
    values: dict[str, Any] = {"method": "rmoe"}
    if key == "merge.router_trainable" or key.startswith("full_finetune."):
        values["full_finetune"] = {"enabled": True}
    part, *inner = values, *key.split(".")
    for name in inner[:-1]:
        part = part.setdefault(name, {})
    part[inner[-1]] = value
    return values


def parse(path: Path, values: dict[str, Any], *words: str) -> MoeRunConfig:
    path.write_text(json.dumps(values))
    return parse_settings(MoeRunConfig, [str(path), *words], ignore_note)


def look_up(tree: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    return tree


@pytest.mark.parametrize(("key", "example", "read_as"), table())
def test_what_the_page_says_of_a_key(key: str, example: str, read_as: str, tmp_path: Path) -> None:
    file = tmp_path / "rmoe.json"
    if key.startswith("--"):
        run = parse(file, {"method": "rmoe"}, *f"{key} {example}".split())
    else:
        values = described(key, json.loads(example))
        if read_as.startswith("refused"):
            with pytest.raises(ConfigError) as refused:
                parse(file, values)
            # by its own name, or its group's where two keys disagree
            assert key in str(refused.value) or key.rpartition(".")[0] in str(refused.value)
            assert str(file) in str(refused.value)
            return
        run = parse(file, values)
    settings = READ_AS.findall(read_as)
    assert settings or key == "method"
    for dotted, value in settings:
        assert look_up(run.model_dump(mode="json"), dotted) == json.loads(value), dotted


def test_every_key_stands_in_the_table() -> None:
    keys = {key for key, *_ in table()}
    known = set[str]()

    def walk(prefix: str, kind: Any) -> None:
        for name, field in kind.model_fields.items():
            inner = field.annotation
            if hasattr(inner, "model_fields"):
                walk(f"{prefix}{name}.", inner)
            else:
                known.add(f"{prefix}{name}")

    walk("", ProjectConfig)
    assert known - keys == set()
    assert {k for k in keys if not k.startswith("--")} - known == set()


def test_defaults_are_those_of_its_code(tmp_path: Path) -> None:
    """Of a file that says its method alone; numbers from its source, not ours."""
    run = parse(tmp_path / "rmoe.json", {"method": "rmoe"})
    assert run.model.name == "Qwen/Qwen2-0.5B"
    assert run.job_names == ["truthfulqa", "longbench"]
    assert (run.lora and (run.lora.r, run.lora.lora_alpha, run.lora.lora_dropout)) == (8, 16, 0.05)
    train = run.train
    assert (train.num_train_epochs, train.per_device_train_batch_size) == (3, 1)
    assert (train.gradient_accumulation_steps, train.learning_rate) == (4, 5e-5)
    assert (train.weight_decay, train.l2_regularization, train.max_grad_norm) == (0.01, 0, 1)
    assert (train.seed, train.early_stopping_patience, train.warmup_ratio) == (42, 2, 0)
    assert (run.data.max_length, run.data.test_size) == (512, 0.2)
    router = run.router
    assert (router.kind, router.top_k, router.hidden) == ("sequence", 1, [512, 256])
    assert (router.train_split, router.val_split, router.test_split) == (0.7, 0.15, 0.15)
    assert router.train == {
        "num_train_epochs": 10,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 32,
        "weight_decay": 0.01,
    }
    assert [stage.to for stage in run.export] == ["hf-moe", "gguf"]
    assert run.export[1].outtype == "q4_0"
    # it loads and stores float32
    assert (run.merge_dtype, run.export[0].dtype) == ("float32", "float32")
    assert not run.finetune


def test_the_documents_example_and_its_way_back(tmp_path: Path) -> None:
    """The JSON of the requirement, with its comments; what was resolved reads back the same."""
    file = tmp_path / "train_rmoe_lora.json"
    file.write_text("""{
  "method": "rmoe",
  "expert_training": {
    "learning_rate": 1e-4,
    "lora": {
      "enabled": true,
      "r": 16,        // Higher rank = more parameters, better fit
      "alpha": 32,     // Typically 2x the rank
      "dropout": 0.05,
      "target_modules": null
    }
  }
}""")
    notes: list[str] = []
    run = parse_settings(MoeRunConfig, [str(file), "data.local.truthfulqa=t.csv"], notes.append)
    assert run.lora is not None
    assert (run.lora.r, run.lora.lora_alpha) == (16, 32)
    assert run.data.local == {"truthfulqa": "t.csv"}
    assert any("BLEURT is not to be had" in note for note in notes)
    again = tmp_path / "run.yaml"
    again.write_text(dump_settings(run))
    assert parse_settings(MoeRunConfig, [str(again)], ignore_note) == run


def test_where_a_workspace_is(tmp_path: Path) -> None:
    file = tmp_path / "rmoe.json"
    file.write_text('{"method": "rmoe"}')
    notes: list[str] = []

    def output(environment: dict[str, str]) -> str:
        found = translate_project(read_description_file(file), file, notes.append, environment)
        return str(found.values["output_dir"])

    given = {"WORK_DIR": "/data", "WORKSPACE_TIMESTAMP": "20260101_000000", "LLAMA_CPP_DIR": "/x"}
    assert output(given) == "/data/workspace/20260101_000000"
    assert any("LLAMA_CPP_DIR changes nothing" in note for note in notes)
    assert re.fullmatch(r"workspace/\d{8}_\d{6}", output({}))
    with pytest.raises(ConfigError, match="WORKSPACE_TIMESTAMP"):
        output({"WORKSPACE_TIMESTAMP": "../elsewhere"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"method": "rmoe",\n"sed": 1}', "rmoe.json:2: unknown setting 'sed'"),
        ('{"method": "rmoe",\n"gating": {"hidden_dim": [1]}}', "did you mean 'hidden_dims'"),
        (
            '{"method": "rmoe",\n"expert_training": {\n"lora": {"rank": 1}}}',
            "rmoe.json:3: expert_training.lora.rank: no key",
        ),
        (
            '{"method": "rmoe",\n"seed": 1, "train": {"seed": 2}}',
            "seed and train.seed set the same",
        ),
        ('{"method": "rmoe",\n"seed": "x"}', "rmoe.json:2: seed: "),
        (
            '{"method": "rmoe", "datasets": ["a.jsonl", "b.jsonl"], "experts": []}',
            "datasets and jobs set the same",
        ),
        (
            '{"method": "rmoe",\n"merge": {"routing_mode": "sparse_top1"}, "gating": {},\n'
            '"router": {"top_k": 2}}',
            "gating and router.top_k set the same",
        ),
        ('{"method": "rmoe", "datasets": ["a/x.json", "b/x.json"]}', "would be called 'x'"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "rmoe.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        parse_settings(MoeRunConfig, [str(file)], ignore_note)
    assert words in str(refused.value)


def test_ours_go_before_what_only_a_default_of_theirs_says(tmp_path: Path) -> None:
    """An adapter that is there is an expert, as the table says of shared_expert_path."""
    experts = [{"name": "a", "data": "a.jsonl"}, {"name": "s", "adapter": "dir", "data": "b.jsonl"}]
    values = {"method": "rmoe", "experts": experts, "data": {"test_size": 0.5}}
    run = parse(tmp_path / "rmoe.json", values)
    assert run.job_names == ["a", "s"]
    assert run.data.test_size == 0.5
    hub = parse(tmp_path / "hub.json", {"method": "rmoe", "datasets": ["me/rows", "gsm8k"]})
    assert [job.name for job in hub.jobs] == ["rows", "gsm8k"]
    assert hub.data.path == "me/rows"
