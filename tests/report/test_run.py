"""Reading run directories and boiling them down: each file optional, each mistake named with its
place.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorry.errors import DataError
from lorry.runs.read import MetricChange, read_readable_runs, read_run
from lorry.runs.summary import describe_run_subject, final_figures, flatten_config, run_differences
from tests.support.runs import dump, full, metrics


def test_a_full_run_is_read(tmp_path: Path) -> None:
    run = read_run(full(tmp_path / "r", text="T"))
    assert run.name == "r"
    assert [(c.id, c.status) for c in run.contracts] == [
        (1, "held"),
        (2, "held"),
        (3, "not_checked"),
    ]
    assert [(t.text, t.weight) for t in run.samples[1].tokens or ()] == [
        ("user T", 0.0),
        ("answer T", 1.0),
        ("half", 0.5),
    ]
    assert run.evaluation[0].metrics == {
        "exact_match": MetricChange(0.0, 0.8125),
        "m T": MetricChange(None, 2.5),
    }
    assert run.receipt["adapter"] == ["T", 1, None]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("contracts.json", '[{"id": 1,\n "name": }]', r"contracts\.json:2: not JSON"),
        ("contracts.json", '{"id": 1}', "expected a list, got dict"),
        (
            "contracts.json",
            '[{"id": 1, "name": "n", "status": "fine"}]',
            "item 1: status 'fine' is none of held, failed",
        ),
        (
            "contracts.json",
            '[{"id": "one", "name": "n", "status": "held"}]',
            "item 1: 'id' is 'one'",
        ),
        ("samples.json", '[{"group": "g", "prompt": "p"}, 3]', "item 2 is not an object"),
        ("samples.json", '[{"group": "g"}]', "item 1: 'prompt' is 'None'"),
        ("samples.json", '[{"prompt": "p", "after": 5}]', "item 1: 'after' is '5'"),
        ("samples.json", '[{"prompt": "p", "tokens": ["a"]}]', "item 1: a token is an object"),
        (
            "samples.json",
            '[{"prompt": "p", "tokens": [{"text": "a", "weight": "1"}]}]',
            "item 1: 'weight' is '1'",
        ),
        (
            "evaluation.json",
            '[{"name": "e", "metrics": {"m": {"after": "high"}}}]',
            "metric 'm' holds 'high'",
        ),
        ("receipt.json", "[" * 100_000, "not JSON"),
        ("run.yaml", "lora:\n  r: [1\n", r"run\.yaml:\d: not YAML"),
        ("run.yaml", "- a list", "settings have to be a mapping of names"),
        ("run.yaml", "a: !!python/object/apply:os.getcwd []", r"run\.yaml:1: the tag"),
        ("metrics.jsonl", '{"step": 1\n{"step": 2}\n', r"metrics\.jsonl:1: not JSON"),
    ],
)
def test_a_mistake_is_named_with_its_place(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_run(tmp_path)
    assert str(tmp_path / file) in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_run(tmp_path)


def test_what_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has none of metrics\.jsonl, run\.yaml"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="at least one run"):
        read_readable_runs([])[0]
    full(tmp_path / "r")
    with pytest.raises(DataError, match="given twice"):
        read_readable_runs([tmp_path / "r", tmp_path / "r"])[0]


def test_figures_by_hand(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 0.5, "loss": 4.0, "tokens": 100, "seconds": 2, "peak_memory_bytes": 1073741824}\n'
        '{"step": 1, "eval_loss": 3.0}\n'
        '{"step": 2, "epoch": 1.0, "loss": 2.0, "tokens": 300, "supervised_tokens": 90, "seconds": 2}\n'
        '{"step": 2, "eval_loss": 3.5}\n'
    )
    shown = {f.name: (f.text, f.note) for f in final_figures(read_run(tmp_path))}
    assert shown == {
        "train loss": ("3", "mean over 2 steps"),
        "last loss": ("2", "of step 2, from 4 at step 1"),
        "evaluation loss": ("3.5", "at step 2, lowest 3 at step 1"),
        "throughput": ("100 tokens/s", "over 2 steps"),
        "peak memory": ("1.00 GiB", ""),
        "training time": ("4.0 s", "steps only, without loading and evaluation"),
        "steps": ("2", "epoch 1, 400 tokens, 90 supervised"),
    }


def test_a_peak_of_loading_is_none_of_training(tmp_path: Path) -> None:
    full(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 4.0, "peak_memory_bytes": 1073741824}\n'
        '{"step": 2, "loss": 3.0, "peak_memory_bytes": 1073741824}\n'
    )

    def peak(**memory: int) -> tuple[str, str]:
        (tmp_path / "receipt.json").write_text(json.dumps(memory))
        figures = final_figures(read_run(tmp_path))
        return next((f.text, f.note) for f in figures if f.name == "peak memory")

    assert peak() == peak(loading_peak_bytes=2**29, trained_bytes=2**30) == ("1.00 GiB", "")
    text, note = peak(loading_peak_bytes=2**30, trained_bytes=2**29)
    assert text == "1.00 GiB"
    # what took it is not known: loading, a conversion, or a start that read rows
    assert note == "before the first step; 512.00 MiB after the last step"


def test_no_figure_is_invented(tmp_path: Path) -> None:
    metrics(tmp_path, 0)
    assert final_figures(read_run(tmp_path)) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n')
    assert [(f.name, f.text) for f in final_figures(read_run(tmp_path))] == [
        ("train loss", "1.5"),
        ("steps", "3"),
    ]
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 3, "loss": 1.5, "tokens": 5, "seconds": 0, "peak_memory_bytes": "NaN"}\n'
    )
    assert [f.name for f in final_figures(read_run(tmp_path))] == ["train loss", "steps"]


def test_about_says_what_the_settings_say(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {name: gpt2}\nlora: {r: 8, lora_alpha: 16, target_modules: auto}\ndata: {path: [a.jsonl, b.jsonl]}\n"
        "resolved: {target_modules: [c_attn]}\n"
    )
    assert describe_run_subject(read_run(tmp_path)) == {
        "model": "gpt2",
        "data": "a.jsonl, b.jsonl",
        "adapter": "rank 8, alpha 16, on c_attn",
    }
    (tmp_path / "run.yaml").write_text("model: gpt2\nlora: null\n")
    assert describe_run_subject(read_run(tmp_path)) == {
        "model": "gpt2",
        "adapter": "none: all of the base model were trained",
    }


def test_differences_are_differences(tmp_path: Path) -> None:
    for name, text in (
        ("a", "lora: {r: 8, bias: none}\nseed: 1\noutput_dir: a"),
        ("b", "lora: {r: 16, bias: none}\noutput_dir: b"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(text)
    assert run_differences(read_readable_runs([tmp_path / "a", tmp_path / "b"])[0]) == [
        ("lora.r", ["8", "16"]),
        ("seed", ["1", "–"]),
    ]
    assert flatten_config({"a": {"b": {"c": 1}, "d": {}}, "e": None}) == {
        "a.b.c": 1,
        "a.d": {},
        "e": None,
    }


def test_scalar_metrics_count_as_after(tmp_path: Path) -> None:
    dump(tmp_path / "evaluation.json", [{"name": "e", "metrics": {"loss": 2.0}}])
    assert read_run(tmp_path).evaluation[0].metrics == {"loss": MetricChange(None, 2.0)}


def test_intervals_are_read(tmp_path: Path) -> None:
    metrics = {
        "f1": {"before": 0.1, "after": 0.5, "interval": [0.4, 0.6]},
        "em": {"after": 1.0, "interval": [None, None]},
    }
    dump(tmp_path / "evaluation.json", [{"name": "e", "metrics": metrics}])
    assert read_run(tmp_path).evaluation[0].metrics == {
        "f1": MetricChange(0.1, 0.5, (0.4, 0.6)),
        "em": MetricChange(None, 1.0),
    }
    for wrong in ([0.4], "0.4 to 0.6", [0.4, "0.6"]):
        dump(tmp_path / "evaluation.json", [{"name": "e", "metrics": {"f1": {"interval": wrong}}}])
        with pytest.raises(DataError, match=r"evaluation\.json: item 1.*'f1'"):
            read_run(tmp_path)


def test_settings_of_a_job_go_before_those_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "lora: {r: 8, lora_alpha: 16}\ntrain: null\n"
        "jobs: [{name: a, lora: {r: 2}}, {name: b, lora: null}]\n"
    )
    run = read_run(tmp_path)
    assert run.job_names == ["a", "b"]
    assert run.settings_group("lora", "a") == {"r": 2, "lora_alpha": 16}
    assert (
        run.settings_group("lora", "b") == run.settings_group("lora") == {"r": 8, "lora_alpha": 16}
    )
    assert run.settings_group("train", "a") == {}
    (tmp_path / "run.yaml").write_text("lora: {r: 8}\njobs: [{name: a, lora: {r: 2}}]\n")
    alone = read_run(tmp_path)
    assert (alone.job_names, alone.jobs, alone.settings_group("lora")) == ([None], [], {"r": 2})
    for wrong in ("lora: 8", "jobs: 3", "jobs: [3]", "jobs: [{lora: {r: 2}}]"):
        (tmp_path / "run.yaml").write_text(f"{wrong}\n")
        with pytest.raises(DataError, match=r"run\.yaml: .*(mapping)"):
            read_run(tmp_path).settings_group("lora")
