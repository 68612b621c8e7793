"""The study of routers: what it asks is what transformers says, what it makes are valid runs, and
its tables say what was found.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import experts_rows
import experts_study
import experts_table
import pytest
import study_page
import torch
from experts_rows import DOMAINS, FULL, HALVES, SMALL, SPLIT_DOMAIN, TURNS, UNSEEN
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorry.adapters.attach import attach
from lorry.adapters.mix import Mix
from lorry.adapters.router import RoutingRule, attach_router
from lorry.adapters.spec import LoraSpec
from lorry.config import MergeSettings, MoeRunConfig, RunConfig, parse_settings
from lorry.config.schema.model import ModelConfig
from lorry.models.loading.open import open_model
from tests.support.verbworld import model_directory

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "small": True,
    "threads": 1,
    "dtype": "float32",
    "model": "m",
    "ranks": experts_study.RANKS,
    "size": experts_study.asdict(SMALL),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and one row of two answers."""
    model_directory(tmp_path / "base")
    messages = [
        {"role": role, "content": text}
        for role, text in (
            ("user", "Who?"),
            ("assistant", "Ada"),
            ("user", "And who else?"),
            ("assistant", "Grace"),
        )
    ]
    rows = [{"messages": messages}, {"messages": messages[:2]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def opened_base(folder: Path) -> Any:
    config = ModelConfig.model_validate({"name": str(folder / "base"), "dtype": "float32"})
    return open_model(config, print)


def test_losses_of_answers_are_those_of_transformers(folder: Path) -> None:
    found, tokens = experts_study.answer_losses(
        opened_base(folder), str(folder / "rows.jsonl"), Mix.none()
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [len(row) for row in found] == [2, 1]
    total = 0
    for row, answers in zip(rows, found, strict=True):
        messages = row["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        total += len(ids)
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for number, (nll, count) in enumerate(answers):
            before = messages[: 2 * number + 1]
            start = len(
                tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
            )
            expected = -sum(float(scores[at - 1, ids[at]]) for at in range(start, start + count))
            text = tokenizer.decode(ids[start : start + count], skip_special_tokens=True)
            assert text.strip() == messages[2 * number + 1]["content"]
            assert nll == pytest.approx(expected, rel=1e-5)
    # the line break behind a row's last end of turn predicts nothing
    assert tokens == total - len(rows)


def test_counted_gates_are_those_of_the_router(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = opened_base(folder)
    for seed, name in enumerate(("one", "two", "three")):
        spec = LoraSpec(r=2, target_modules=experts_study.TARGETS, init_lora_weights=False)
        attach(opened.model, spec, name, seed=seed)
    router = attach_router(opened.model, ["one", "two", "three"], RoutingRule(top_k=2))
    torch.manual_seed(0)
    router.values.normal_()
    seen = list[torch.Tensor]()
    logits_of = router.logits

    def noted(*inputs: Any) -> torch.Tensor:
        seen.append(logits_of(*inputs))
        return seen[-1]

    monkeypatch.setattr(router, "logits", noted)
    counter = experts_study.GateCounter(opened)
    experts_study.answer_losses(opened, str(folder / "rows.jsonl"), router.mix())
    shares = counter.shares()
    # written out: of the softmax the two largest, divided by their sum
    p = torch.cat(seen).double().softmax(-1)
    p = p.masked_fill(p < p.topk(2, -1).values[:, -1:], 0)
    p = p / p.sum(-1, keepdim=True)
    assert list(shares["gate"].values()) == pytest.approx(p.mean(0).tolist(), abs=1e-6)
    chosen = torch.nn.functional.one_hot(p.argmax(-1), 3).double().mean(0)
    assert list(shares["chosen"].values()) == pytest.approx(chosen.tolist())
    counter.reset()
    assert (counter.sums, counter.chosen) == (0, 0)


@pytest.mark.parametrize("size", [FULL, SMALL], ids=["full", "small"])
def test_everything_that_is_made_is_a_valid_run(
    size: experts_rows.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[list[str]]()
    monkeypatch.setattr(experts_study, "call", lambda words, log, deadline: made.append([*words]))
    args = argparse.Namespace(work=tmp_path, threads=1)
    workshop = experts_study.Workshop(args, size, 0.0)
    workshop.make_experts()
    methods = experts_study.list_methods(size)
    for method in methods:
        workshop.make(method)
    schemas = {"sft": RunConfig, "moe": MoeRunConfig, "merge": MergeSettings}
    runs = {verb: [] for verb in schemas} | {"sft": list[Any]()}
    for verb, *words in made:
        runs[verb].append(parse_settings(schemas[verb], words, print))
    assert [job.name for job in runs["sft"][0].jobs] == [*DOMAINS, *HALVES]
    assert runs["sft"][1].lora.r == 48
    assert {run.output_dir.name for run in runs["moe"]} >= {"uniform", "prototype", "arrow-1"}
    assert [run.method for run in runs["merge"]] == list(experts_table.MERGES)
    assert len({method.name for method in methods}) == len(methods)
    # what is there is not made again
    for method in methods:
        path = (
            tmp_path
            / method.directory
            / ("adapter_config.json" if method.merge else "router/router.json")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("experts", "joint"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "receipt.json").touch()
    count = len(made)
    workshop.make_experts()
    for method in methods:
        workshop.make(method)
    assert len(made) == count


def made_up(factor: float, own: str = "", gates: bool = False) -> dict[str, Any]:
    """Answers of two tokens: 1 nat a token for what ``own`` knows, else ``factor`` times that."""
    losses: dict[str, Any] = {
        d: [[[2.0 * (1 if d == own else factor), 2]]] * 4 for d in (*DOMAINS, *UNSEEN)
    }
    losses[TURNS] = [[[2.0, 2], [2.0 * factor, 2]]] * 4
    shares = {d: {w: {e: 0.7 if e == d else 0.1 for e in DOMAINS} for w in ("gate", "chosen")}
              for d in DOMAINS}  # fmt: skip
    return {
        "words": f"x{factor}{own}",
        "losses": losses,
        "gates": shares if gates else {},
        "tokens_per_second": 100.0,
        "memory_bytes": 2**20,
        "metrics": {d: [0.0, 1.0, 1.0, 0.0] for d in DOMAINS},
        "generated_per_second": 5.0,
    }


@pytest.fixture
def record() -> dict[str, Any]:
    """The classifier misses its target, the token router makes it."""
    results = {
        "base": made_up(2.0),
        **{d: made_up(1.5, d) for d in DOMAINS},
        "uniform": made_up(1.2),
        "prototype": made_up(1.005, gates=True),
        "sequence": made_up(1.25, gates=True),
        experts_table.BY_TOKEN: made_up(1.02, gates=True),
        "halves-uniform": {
            **made_up(1.0),
            "losses": {SPLIT_DOMAIN: [[[3.0, 2]]] * 4},
            "metrics": {},
        },
    }
    return experts_table.make_record(results, SETTINGS)


def test_the_tables_say_what_was_found(record: dict[str, Any]) -> None:
    values = record["values"]
    assert values["oracle"]["loss"] == {d: [1.0, 1.0, 1.0] for d in DOMAINS}
    assert values["base"]["mean_over_oracle"] == [1.0, 1.0, 1.0]
    # one domain of four at the oracle's, three at 1.5 times that
    assert values["gsm8k"]["mean_over_oracle"][0] == pytest.approx(0.375)
    assert values["oracle"][TURNS] == {"gsm8k": [1.0] * 3, "common_gen": [1.5] * 3}
    assert experts_table.accuracy(values["prototype"]) == pytest.approx(0.7)
    assert experts_table.load(values["prototype"]) == pytest.approx(dict.fromkeys(DOMAINS, 0.25))
    assert values["base"]["metric"]["gsm8k"][0] == 0.5
    _, rows = experts_table.targets_table(values)
    assert [row[2] for row in rows] == ["yes", "no", "yes", "yes", "no", "yes"]
    assert "not run: core_linear, ties_svd, core_tsv" in rows[3][1]
    _, halves = experts_table.halves_table(values)
    assert halves[-1] == ["x1.0", "1.500 [1.500, 1.500]", "+50.0% [+50.0%, +50.0%]"]
    page = experts_table.docs_section(record, "p.png")
    before = f"a\n{experts_table.PAGE.begin}old\n{study_page.END}b\n"
    marked = experts_table.PAGE.put(before, page)
    assert marked == f"a\n{experts_table.PAGE.begin}{page}{study_page.END}b\n"
    with pytest.raises(SystemExit, match="lacks the lines"):
        experts_table.PAGE.put("a page", page)


def test_intervals_are_of_rows_and_pairs(record: dict[str, Any]) -> None:
    """Rows differ a hundredfold, two methods by a tenth on each: their difference is certain."""
    pairs = [(float(10**n), 5) for n in range(3)] * 4
    one = experts_table.resampled_loss("x", pairs)
    other = experts_table.resampled_loss("x", [(1.1 * nll, tokens) for nll, tokens in pairs])
    value, low, high = experts_table.interval(one)
    assert value == pytest.approx(111 / 15)
    assert low < value < high
    assert experts_table.interval(other / one - 1) == pytest.approx([0.1] * 3)
    assert math.isclose(other[0], 1.1 * one[0])


def test_the_page_is_what_the_record_says() -> None:
    name, record = experts_table.PAGE.find_record(ROOT)
    page = (ROOT / "docs/experts.md").read_text()
    section = experts_table.docs_section(record, f"results/{name}.png")
    assert experts_table.PAGE.put(page, section) == page
    assert (ROOT / f"docs/results/{name}.png").is_file()
    columns, rows = experts_table.loss_table(record["values"])
    assert (record["columns"], record["rows"]) == (columns, rows)


def test_passages_with_the_answer_stay() -> None:
    context = "".join(f"Passage {n}:\ntext {n} {'x' * 20}\n" for n in range(1, 6))
    kept = experts_rows.cut_passages(context, ["text 4"], lambda text: len(text) <= 80)
    assert kept.count("Passage") == 2
    assert "Passage 1:" in kept
    assert "text 4" in kept


def test_a_method_is_asked_as_it_is_called() -> None:
    opened: Any = SimpleNamespace(adapters=["gsm8k", "joint"], mixture=Mix.one("gsm8k"))
    assert experts_study.mix_of(opened, "base") == Mix.none()
    assert experts_study.mix_of(opened, "joint") == Mix.one("joint")
    assert experts_study.mix_of(opened, None) is opened.mixture
