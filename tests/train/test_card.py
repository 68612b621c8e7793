"""The card of a run: read back by the hub's own library and by a Markdown parser, whatever the
names in it are.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from lorry.data.catalog import shipped_catalog
from lorry.errors import DataError
from lorry.runs.read import ContractRecord, EvaluationRecord, MetricChange, RunRecord, read_run
from lorry.runs.series import MetricsLog
from lorry.train.card.card import is_edited_card, render_card, render_run_card
from lorry.train.card.markdown import clean_line

HOSTILE = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="`|*_[]()<>#~!$\\&-: \n\r\t'\"{}%@\u2028\u202e\x00\x1b\udc80", max_size=30),
    st.sampled_from(
        [
            "---",
            "\n---\n",
            "a\n---\nlicense: mit\n---\n",
            "<script>alert(1)</script>",
            "```\n# no\n```",
            "| a | b |",
            "\\|",
            "`\\`",
            "![x](http://e.vil)",
            "[x](javascript:1)",
            "<!-- x",
            "--> y",
            "null",
            "no",
            "1e3",
            "&lt;",
            "!!python/object:os.system x",
        ]
    ),
)


def facts(
    name: str = "people",
    source: str = "org/rows",
    metric: str = "exact_match",
    detail: str = "fine",
    **over: Any,
) -> RunRecord:
    config = {
        "model": {"name": "org/base"},
        "lora": {"r": 8, "target_modules": [detail]},
        "output_dir": "runs/x",
        "data": {"path": source},
        "train": {"learning_rate": 1e-3, "lr_scheduler_type": detail},
    }
    receipt = {
        "base": {"kind": "hub", "name": "org/base", "revision": detail, "sha256": "b" * 64},
        "data": {
            "source": source,
            "rows": 3,
            "sequences": 3,
            "tokens": 30,
            "supervised": 9,
            "left_out": {detail: 2},
        },
    }
    fields: dict[str, Any] = {
        "path": Path("runs/x"),
        "name": name,
        "log": MetricsLog(
            [{"step": 1, "loss": 2.5, "tokens": 10, "supervised_tokens": 4, "seconds": 1.0}]
        ),
        "config": config,
        "config_text": "",
        "receipt": receipt,
        "contracts": (ContractRecord(1, name, "held", detail),),
        "samples": (),
        "evaluation": (EvaluationRecord(source, {metric: MetricChange(0.25, 0.5, (0.4, 0.6))}),),
    }
    return RunRecord(**{**fields, **over})


def made(given: RunRecord, **more: Any) -> str:
    return render_card(given, **{"licences": {}, "sets": {}, **more})


def parsed(text: str) -> tuple[dict[str, Any], list[Token]]:
    """(front matter, tokens of the Markdown after it), by the hub's rule of where one ends and the
    other begins.
    """
    found = re.match(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))", text)
    assert found is not None
    return yaml.safe_load(found[2]), MarkdownIt("commonmark").enable("table").parse(
        text[found.end() :]
    )


def said(tokens: list[Token]) -> list[str]:
    """The texts of headings, cells and paragraphs as a reader sees them. No image, link or HTML may
    be among them.
    """
    inner = [t.children or [] for t in tokens if t.type == "inline"]
    assert {child.type for one in inner for child in one} <= {"text", "code_inline", "text_special"}
    return ["".join(child.content for child in one) for one in inner]


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_no_name_breaks_out_of_its_place(name: str, source: str, metric: str, detail: str) -> None:
    text = made(facts(name, source or "x", metric, detail))
    text.encode()  # half a character can be written nowhere
    meta, tokens = parsed(text)
    plain = parsed(made(facts(source="x", detail="fine")))
    # the front matter has its fields and no others, and says the names
    assert meta.keys() - {"datasets"} == plain[0].keys() - {"datasets"}
    assert meta["base_model"] == "org/base"
    result = meta["model-index"][0]["results"][0]
    assert result["metrics"][0]["name"] == clean_line(metric)
    assert result["metrics"][0]["value"] == 0.5
    # the text has the structure that harmless names give
    optional = {"lora.target_modules", "lr_scheduler_type", "revision"} if not detail else set()
    assert [t.type for t in tokens if t.type.startswith(("heading", "fence", "html", "table"))] == [
        t.type for t in plain[1] if t.type.startswith(("heading", "fence", "html", "table"))
    ]
    texts = said(tokens)
    assert texts[0] == (clean_line(name) or "–")
    assert sum(t.type == "tr_open" for t in tokens) + len(optional) >= sum(
        t.type == "tr_open" for t in plain[1]
    )
    assert any(t == (clean_line(metric.replace("_", " ")) or "–") for t in texts)
    if detail:
        assert clean_line(detail) in texts or not clean_line(detail)


@given(HOSTILE)
def test_the_code_shown_is_python_that_names_the_place(name: str) -> None:
    fences = [t.content for t in parsed(made(facts(), at=name or "x"))[1] if t.type == "fence"]
    loads = [line for line in fences[0].splitlines() if "lorry.load" in line]
    spoken: list[str] = []
    exec(
        loads[0],
        {"lorry": type("lorry", (), {"load": staticmethod(lambda p: (spoken.append(p), None))})},
    )
    assert spoken == [clean_line(name or "x")]


def test_numbers_are_those_of_the_files() -> None:
    """By hand: losses 4, 2, 3; 30 tokens of which 12 learnt; 1.75 s; the best of two evaluations is
    the first.
    """
    records = [
        {
            "step": 1,
            "loss": 4.0,
            "tokens": 10,
            "supervised_tokens": 4,
            "seconds": 0.5,
            "peak_memory_bytes": 2**30,
        },
        {
            "step": 2,
            "loss": 2.0,
            "tokens": 10,
            "supervised_tokens": 4,
            "seconds": 0.5,
            "peak_memory_bytes": 3 * 2**29,
        },
        {"step": 2, "eval_loss": 1.25, "eval_accuracy": 0.5},
        {
            "step": 3,
            "loss": 3.0,
            "tokens": 10,
            "supervised_tokens": 4,
            "seconds": 0.75,
            "peak_memory_bytes": 2**30,
        },
        {"step": 3, "eval_loss": 1.5, "eval_accuracy": 0.75},
    ]
    receipt = {**(facts().receipt or {}), "trainable_parameters": 1234567}
    rows = {
        r[0]: r[1:]
        for r in re.findall(
            r"^\| ([^|]+) \| ([^|]+) \|$",
            made(facts(log=MetricsLog(records), receipt=receipt)),
            re.M,
        )
    }
    assert rows["trainable parameters"] == ("1,234,567",)
    want = {"steps": "3", "last loss": "3.0", "tokens read": "30", "of which supervised": "12"}
    assert {k: rows[k][0] for k in want} == want
    assert not {"time in steps", "peak memory"} & rows.keys()  # those of a resumed run are others
    assert (rows["loss"], rows["accuracy"]) == (("1.5",), ("0.75",))
    best = {**facts().config, "train": {"load_best_model_at_end": True}}
    text = made(facts(log=MetricsLog(records), config=best))
    assert "| loss | 1.25 |" in text
    assert "| adapter of step | 2 (the best evaluated) |" in text
    assert "| exact match | 0.25 | 0.5 | 0.4 to 0.6 |" in text
    results = ModelCard(text).data.eval_results
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in results[-1:]] == [
        ("org/rows", "exact_match", 0.5)
    ]


def test_several_adapters_each_have_their_figures() -> None:
    config = {
        **facts().config,
        "jobs": [
            {"name": "a", "lora": {"r": 2}},
            {"name": "b", "data": {"path": "/home/me/b.jsonl"}},
        ],
    }
    both = {"a": {"loss": 1.0}, "b": {"loss": 3.0}}
    records = [
        {"step": 1, "loss": 2.0, "adapters": both},
        {"step": 2, "loss": 0.5, "adapters": {"a": {"loss": 0.5}}},
    ]
    data = {n: {"source": f"/home/me/{n}.jsonl", "rows": 4, "sha256": n * 64} for n in "ab"}
    text = made(facts(config=config, log=MetricsLog(records), receipt={"data": data}))
    for row in (
        "| a: rank | 2 |",
        "| b: rank | 8 |",
        "| a: steps | 2 |",
        "| b: steps | 1 |",
        "| b: last loss | 3.0 |",
    ):
        assert row in text
    assert "2 LoRA adapters, trained in one pass" in text
    assert 'lorry.load("people")' in text
    there = made(
        facts(config=config, log=MetricsLog(records), receipt={"data": data}), at="me/people"
    )
    assert 'lorry.load(snapshot_download("me/people"))' in there
    assert 'PeftModel.from_pretrained(base, "me/people", subfolder="a")' in there
    assert "/home" not in text
    assert f"| `b` | `b.jsonl` | 4 | – | – | – | `{'b' * 64}` |" in text


def test_what_is_not_known_is_not_said() -> None:
    local = {
        "kind": "directory",
        "name": "/models/base",
        "path": "/models/base",
        "sha256": "b" * 64,
    }
    config = {
        **facts().config,
        "model": {"name": "/models/base"},
        "data": {"path": "/home/me/rows.jsonl", "eval": "/home/me/e.csv"},
    }
    told = (ContractRecord(8, "rows", "held", "/home/me/rows.jsonl: 3 rows"),)
    text = made(
        facts(
            config=config, receipt={"base": local}, evaluation=(), log=MetricsLog(), contracts=told
        )
    )
    meta = parsed(text)[0]
    assert meta == {
        "library_name": "peft",
        "tags": ["lorry", "lora", "sft"],
        "pipeline_tag": "text-generation",
    }
    assert "/home" not in text
    assert "/models" not in text
    assert "- held: rows (rows.jsonl: 3 rows)" in text


def test_a_folder_here_is_no_data_set_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it one when the card is made again elsewhere, where the folder is not."""
    (tmp_path / "my" / "rows").mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.yaml").write_text(
        json.dumps({**facts().config, "data": {"path": ["my/rows", "org/rows", "my/rows.jsonl"]}})
    )
    monkeypatch.chdir(tmp_path)
    (run / "README.md").write_text(render_run_card(run))
    monkeypatch.chdir(run)
    (run / "evaluation.json").write_text(json.dumps([{"name": "org/rows", "metrics": {"f1": 0.5}}]))
    again = render_run_card(run, at="me/run")
    assert parsed(again)[0]["datasets"] == ["org/rows"]
    assert not is_edited_card(again)
    assert is_edited_card(again.replace("## Use", "## Usage"))
    assert is_edited_card(again + "more")


@pytest.mark.parametrize(
    ("licences", "license"),
    [
        ({}, None),
        ({"org/rows": "mit"}, None),  # the base is unknown
        ({"org/rows": "mit", "org/base": "apache-2.0"}, None),  # two of them
        ({"org/rows": "MIT", "org/base": "mit"}, "mit"),
        ({"org/rows": "my own", "org/base": "my own"}, None),  # the hub would refuse it
    ],
)
def test_a_licence_only_where_all_of_it_is_known(
    licences: dict[str, str], license: str | None
) -> None:
    text = made(facts(), licences=licences)
    assert parsed(text)[0].get("license") == license
    assert all(f"| `{name}` | {value} |" in text for name, value in licences.items())


def test_named_sets_bring_hub_ids_and_licences(tmp_path: Path) -> None:
    """In any spelling, suites spelt out; what a set says of itself stands in the catalogue, here by
    hand.
    """
    mixed = {
        "mix": ["BoolQ", "math", "xsum"],
        "local": {"xsum.train": "/home/me/x.jsonl", "svamp": "s.json"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps({**facts().config, "data": mixed}))
    text = render_run_card(tmp_path)
    # a file may hold anything
    assert parsed(text)[0]["datasets"] == [
        "google/boolq",
        "openai/gsm8k",
    ]
    assert "on `bool_q`, `gsm8k`, `svamp`, `xsum`." in text
    for row in (
        "| `bool_q` | CC-BY-SA-3.0 |",
        "| `gsm8k` | MIT |",
        "| `xsum` | not stated; the articles are the BBC's |",
    ):
        assert row in text
    assert "license" not in parsed(text)[0]
    (tmp_path / "run.yaml").write_text(
        json.dumps({**facts().config, "data": {"path": "google/boolq"}})
    )
    assert "| `google/boolq` | CC-BY-SA-3.0 |" in render_run_card(tmp_path)


def test_a_teacher_is_part_of_what_it_was_made_of() -> None:
    """Its licence counts, and so does not knowing it; the terms of the loss, each with its factor,
    are no metrics.
    """
    distil = {
        "teacher": "org/large",
        "teacher_adapter": "/home/me/runs/tutor",
        "loss": "kl",
        "alpha": 0.5,
    }
    measured = {
        "step": 1,
        "eval_loss": 3.0,
        "eval_nll": 1.0,
        "eval_distill": 2.0,
        "eval_perplexity": 7.389,
    }
    given = facts(
        config={**facts().config, "task": "distill", "distill": distil}, log=MetricsLog([measured])
    )
    known = {"org/rows": "mit", "org/base": "mit"}
    text = made(given, licences=known)
    assert "distilled from `org/large`, `tutor`." in text
    assert "/home/me" not in text
    assert "license" not in parsed(text)[0]
    text = made(given, licences={**known, "org/large": "mit", "/home/me/runs/tutor": "mit"})
    assert parsed(text)[0]["license"] == "mit"
    assert "| `tutor` | mit |" in text
    results = parsed(text)[0]["model-index"][0]["results"]
    assert [m["name"] for m in results[0]["metrics"]] == ["loss", "perplexity"]


def table_of(tokens: list[Token], head: str) -> list[list[str]]:
    """The cells of the table whose first heading this is, row by row."""
    rows, cells = list[list[str]](), list[str]()
    for token in tokens:
        if token.type == "tr_open":
            cells = []
        elif token.type == "inline":
            cells.append("".join(child.content for child in token.children or []))
        elif token.type == "tr_close":
            rows.append(cells)
            cells = []  # of what follows the table
    start = next(at for at, row in enumerate(rows) if row and row[0] == head)
    return [row for row in rows[start:] if len(row) == len(rows[start])]


def counted(source: str, rows: int) -> dict[str, Any]:
    return {
        "source": source, "rows": rows, "sequences": rows, "tokens": 9 * rows, "supervised": 4 * rows,
        "sha256": "c" * 64, "left_out": {"too long": rows - 1},
    }  # fmt: skip


@pytest.mark.parametrize("several", [False, True])
def test_every_row_set_has_its_role(several: bool) -> None:
    """What an unlearning run read: a split of a benchmark, a file to keep, refusals, and none of it
    under another's name."""
    given = facts()
    unlearn = {
        "method": "DPO", "forget": "tofu:forget05", "retain": "/home/me/keep.jsonl", "idk": "/home/me/no.txt",
    }  # fmt: skip
    sets = {
        **counted("tofu:forget05", 3),
        "retain": counted("/home/me/keep.jsonl", 5),
        "forget alternates": counted("tofu:forget05", 6),
    }
    config = {
        **given.config,
        "task": "unlearn",
        "unlearn": unlearn,
        "data": {"path": "tofu:forget05"},
    }
    jobs = [{"name": "a"}, {"name": "b", "unlearn": {"forget": "b.jsonl"}}]
    if several:
        config |= {"jobs": jobs}
    data = {"a": sets, "b": {**sets, **counted("b.jsonl", 2)}} if several else sets
    run = replace(given, config=config, receipt={**(given.receipt or {}), "data": data})
    front, tokens = parsed(made(run))
    assert front["datasets"] == ["locuslab/TOFU"]
    forgotten = "tofu:forget05, b.jsonl" if several else "tofu:forget05"
    assert said(tokens)[1].endswith(f" to forget {forgotten} and keep keep.jsonl (DPO).")
    table = table_of(tokens, "adapter" if several else "role")
    own = [row[several:] for row in table[1:]]
    first = [
        ["forget", "tofu:forget05", "3", "3", "27", "12", "c" * 64],
        ["retain", "keep.jsonl", "5", "5", "45", "20", "c" * 64],
        ["idk", "no.txt", "–", "6", "54", "24", "c" * 64],
    ]
    assert own[:3] == first
    if several:
        assert own[3:] == [["forget", "b.jsonl", "2", "2", "18", "8", "c" * 64], *first[1:]]
    assert ["unlearn.method", "DPO"] in table_of(tokens, "setting")
    assert any("left out of retain: 4 rows (too long)" in text for text in said(tokens))
    assert not any("/home/me" in text for text in said(tokens))


def test_rows_that_lie_in_a_folder_are_not_the_hubs() -> None:
    given = facts()
    config = {
        **given.config,
        "data": {"path": "tofu:forget05", "local": {"tofu": "/home/me/tofu"}},
        "unlearn": {"method": "NPO", "forget": "tofu:forget05", "retain": None},
    }
    front, tokens = parsed(made(replace(given, config=config)))
    assert "datasets" not in front
    assert [row[0] for row in table_of(tokens, "role")[1:]] == ["forget"]


def test_base_weights_that_were_trained() -> None:
    text = made(facts(config={**facts().config, "lora": None, "trainable": "mlp"}))
    meta = parsed(text)[0]
    assert (meta["library_name"], meta["tags"]) == ("transformers", ["lorry", "sft"])
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert "LoRA" not in text


def test_a_packed_base_is_said_where_peft_would_open_another() -> None:
    """By the receipt, or by the settings where no receipt is."""
    model = {"name": "org/base", "quantize": "nf4"}
    packed = {"base": {"kind": "hub", "name": "org/base", "quantize": "nf4"}}
    for record in (facts(receipt=packed), facts(config={**facts().config, "model": model})):
        text = made(record)
        assert "| packed in | `nf4` |" in text
        assert text.index("PeftModel.from_pretrained") < text.index("over a base packed in `nf4`")
    assert "packed" not in made(facts())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "receipt.json").write_text("{")
    with pytest.raises(DataError, match=r"receipt.json:1: not JSON"):
        render_run_card(tmp_path)
    (tmp_path / "receipt.json").write_text("[]")
    with pytest.raises(DataError, match=r"receipt.json: expected a JSON object, got list"):
        render_run_card(tmp_path)


def measured_run(**names: float) -> RunRecord:
    """A run with one metric, exact_match, on each data set of a name."""
    sets = [
        EvaluationRecord(name.replace("__", "/"), {"exact_match": MetricChange(None, value)})
        for name, value in names.items()
    ]
    return facts(name="1e-4", evaluation=tuple(sets))


def test_results_keep_the_name_of_their_data_set(tmp_path: Path) -> None:
    """The library's index groups by type and configuration alone: before, rounds of one hub data
    set would have stood under the first one's name. Read back by the library.
    """
    values = {"anli_r1": 0.1, "anli_r2": 0.2, "gsm8k": 0.3, "__a__test.jsonl": 0.4}
    values |= {"__b__test.jsonl": 0.5, "truthful_qa_mc1": 0.6, "truthful_qa_mc2": 0.7}
    run = measured_run(**values)
    (tmp_path / "README.md").write_text(made(run, sets=shipped_catalog().sets))
    card = ModelCard.load(tmp_path / "README.md")
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "1e-4"  # a name, not a number
    shown = [key.replace("__", "/").rsplit("/", 1)[-1] for key in values]
    held, *rest = [(r.dataset_name, r.metric_value) for r in results]
    assert [held, *rest] == list(zip(shown, values.values(), strict=True))
    hubs = {r.dataset_name: r.dataset_type for r in results}
    assert (hubs["anli_r2"], hubs["gsm8k"]) == ("facebook/anli", "openai/gsm8k")
    assert len({r.unique_identifier for r in results}) == len(results)
    assert [r.dataset_config for r in results if r.dataset_name == "gsm8k"] == [None]


def test_the_front_matter_survives_the_librarys_reader_and_update(tmp_path: Path) -> None:
    text = made(facts(), licences={"org/rows": "mit", "org/base": "mit"})
    path = tmp_path / "README.md"
    path.write_text(text)
    card = ModelCard.load(path)
    assert list(card.data.to_dict()) == [
        "base_model",
        "datasets",
        "library_name",
        "license",
        "pipeline_tag",
        "tags",
        "model-index",
    ]
    assert str(card).split("---\n", 2)[2] == text.split("---\n", 2)[2]
    assert yaml.safe_load(str(card).split("---\n")[1]) == yaml.safe_load(text.split("---\n")[1])
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_name) == ("text-generation", "org/rows")
    card.data.license = "apache-2.0"
    card.save(path)  # what metadata_update does after its download
    assert ModelCard.load(path).data.license == "apache-2.0"
    assert is_edited_card(path.read_text())


def test_a_file_that_no_run_wrote_is_named_and_not_passed_over(tmp_path: Path) -> None:
    """Before: an entry of another type was left out of the card without a word."""
    for file, content in (
        ("contracts.json", "[3]"),
        ("evaluation.json", '[{"name": "e", "metrics": 5}]'),
        ("evaluation.json", '[{"name": "e", "metrics": {"f1": {"after": "high"}}}]'),
        ("run.yaml", "lora: 5"),
        ("run.yaml", "jobs: 5"),
        ("run.yaml", "train: {load_best_model_at_end: true, learning_rate: high}"),
    ):
        path = tmp_path / file
        path.write_text(content)
        with pytest.raises(DataError, match=re.escape(str(path))):
            render_run_card(tmp_path)
        path.unlink()


def test_jobs_beyond_what_a_report_draws_have_their_figures(tmp_path: Path) -> None:
    names = [f"job{i}" for i in range(1000)]
    line = {"step": 1, "loss": 1.0, "adapters": {name: {"loss": 0.5} for name in names}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "run.yaml").write_text(
        json.dumps({**facts().config, "jobs": [{"name": name} for name in names]})
    )
    assert "| job999: last loss | 0.5 |" in render_card(read_run(tmp_path), licences={}, sets={})
