"""Verbs on two processes: what one says alone both say together, rank 0 alone shows and writes it.

What one process says is compared with transformers, PEFT and plain loops by the tests of each verb.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorry.evaluate.unlearning import attacks
from tests.support.ranked import FAULT, SHORT_JAILBREAK, Ended, run_ranked
from tests.support.tofuworld import read_json, write_tofu
from tests.support.verbworld import PEOPLE, World, lorry, write_rows
from tests.verbs.test_attack_verb import learnt_rows
from tests.verbs.test_eval_sets import ROWS, SAID
from tests.verbs.test_muse_wmdp import write_wmdp

# of the pair with all its commands: far above what it takes
pytestmark = pytest.mark.timeout(600)
COMMON = "dtype=float32 threads=1"
SHORT = "max_length=96 learning_rate=1e-2 save_strategy=no train.seed=3"


@pytest.fixture(scope="module")
def world(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """With a run of its own: what is measured is kept in the run, which others look into."""
    run = tmp_path_factory.mktemp("own") / "people"
    return replace(world, run=Path(shutil.copytree(world.run, run)))


def commands(world: World, data: Path, out: Path) -> dict[str, list[str]]:
    """Command lines that write below ``out``."""
    run, base, rows = world.run, world.base, world.rows
    bool_q, common_gen = f"local.bool_q={data}/bq.jsonl", f"local.common_gen={data}/cg.jsonl"
    tofu = f"local.tofu={data}/tofu"
    train = f"per_device_train_batch_size=4 max_steps=4 {SHORT} {COMMON}"
    # without a space, by which the lines below are cut
    experts = json.dumps(
        [{"name": n, "data": f"{data}/{n}.jsonl"} for n in ("one", "two")], separators=(",", ":")
    )
    lines = {
        "file": f"eval {run} data={rows} max_new_tokens=12 output_dir={out}/file.json {COMMON}",
        # sampled: an answer draws by its row, whoever answers it
        "sets": f"eval {run} tasks=[bool_q,common_gen] {bool_q} {common_gen} temperature=1 seed=3 "
        f"max_new_tokens=12 output_dir={out}/sets.json {COMMON}",
        "suite": f"eval {run} suite=tofu forget_split=forget05 {tofu} max_new_tokens=12 {COMMON} "
        f"metrics=[model_utility,extraction_strength,mia_gradnorm] output_dir={out}/suite",
        "wmdp": f"eval {base} suite=wmdp local.wmdp={data}/wmdp metrics=[wmdp_bio] "
        f"output_dir={out}/wmdp {COMMON}",
        "relearn": f"attack {run} relearn forget={data}/forget.jsonl relearn_share=0.5 r=2 "
        f"relearn_steps=[0,2] output_dir={out}/relearn {COMMON}",
        "quantize": f"attack {run} quantize forget={data}/forget.jsonl output_dir={out}/quantize "
        f"{COMMON}",
        "rephrase": f"attack {run} rephrase forget={data}/forget.jsonl max_new_tokens=4 "
        f"output_dir={out}/rephrase {COMMON}",
        "sweep": f"sweep model={base} data={rows} eval={rows} sweep.r=[2,4] jobs_per_pass=1 "
        f"eval_steps=2 output_dir={out}/sweep {train}",
        "moe": f"moe model={base} experts={experts} router.train.max_steps=2 r=2 "
        f"target_modules=[gate_proj,up_proj,down_proj] output_dir={out}/moe {train}",
        "dora": f"sft model={base} data={rows} use_dora=true r=2 output_dir={out}/dora {train}",
        "asked": f"sft model={base} data={rows} eval_tasks=[bool_q] data.{bool_q} suite=tofu "
        f"suite.forget_split=forget05 data.{tofu} suite.metrics=[extraction_strength] r=2 "
        f"eval_strategy=steps eval_steps=2 output_dir={out}/asked {train}",
    }
    return {name: line.split() for name, line in lines.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tofu(folder / "tofu")
    write_wmdp(folder / "wmdp")
    write_rows(folder / "bq.jsonl", ROWS)
    write_rows(folder / "cg.jsonl", SAID)
    write_rows(folder / "forget.jsonl", learnt_rows())
    write_rows(folder / "one.jsonl", PEOPLE[:2])
    write_rows(folder / "two.jsonl", PEOPLE[2:])
    return folder


@pytest.fixture(scope="module")
def pair(world: World, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    folder = tmp_path_factory.mktemp("pair")
    several = ("backend=ddp", "keep_total=true")
    # first of all: the processes do not know each other yet
    made: dict[str, list[Any]] = {"wrong word": ["eval", world.run, f"dat={world.rows}"]}
    made |= {
        name: [*words, *(several if words[0] in ("sweep", "moe", "sft") else several[:1])]
        for name, words in commands(world, data, folder).items()
    }
    # the base cut over the two
    made |= {
        f"fsdp {name}": [*words, "backend=fsdp", *(several[1:] if name in ("moe", "dora") else ())]
        for name, words in commands(world, data, folder / "fsdp").items()
        if name in ("file", "sets", "suite", "moe", "dora", "quantize", "relearn", "rephrase")
    }
    # every matrix shared by the two
    made |= {
        f"tensor {name}": [*words, "backend=ddp", "tensor_parallel=2"]
        for name, words in commands(world, data, folder / "tensor").items()
        if name in ("moe", "quantize", "relearn", "rephrase")
    }
    # what is there is not measured, or trained, again
    made |= {"suite again": made["suite"], "moe again": made["moe"]}
    made["nothing"] = ["eval", world.run, "data=/nowhere.jsonl", "backend=ddp"]
    for fault in ("fewer rows to ask", "another adapter"):
        made[fault] = [f"{FAULT}{fault}", *made["file"]]
    made["doctor"] = ["doctor"]
    return run_ranked(folder, made), folder


def same(got: Any, true: Any, where: str = "") -> None:
    """Equal in every name and word, and in numbers but for rounding."""
    if isinstance(true, Mapping):
        assert list(got) == list(true), where
        for name in true:
            same(got[name], true[name], f"{where}.{name}")
    elif isinstance(true, list):
        assert len(got) == len(true), where
        for at, (mine, theirs) in enumerate(zip(got, true, strict=True)):
            same(mine, theirs, f"{where}[{at}]")
    elif isinstance(true, float):
        assert got == pytest.approx(true, rel=1e-5, abs=1e-6), where
    else:
        assert got == true, where


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("file", "file.json"),
        ("sets", "sets.json"),
        ("suite", "suite/TOFU_EVAL.json"),
        ("wmdp", "wmdp/LMEval_EVAL.json"),
        ("quantize", "quantize/attacks.json"),
        ("fsdp file", "file.json"),
        ("fsdp sets", "sets.json"),
        ("fsdp suite", "suite/TOFU_EVAL.json"),
        ("rephrase", "rephrase/attacks.json"),
        ("fsdp rephrase", "rephrase/attacks.json"),
        ("tensor rephrase", "rephrase/attacks.json"),
    ],
)
def test_two_processes_ask_as_one_does(
    pair: tuple[Ended, Path],
    world: World,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    file: str,
) -> None:
    monkeypatch.setattr(attacks, "JAILBREAK", SHORT_JAILBREAK)
    ended, folder = pair
    assert ended.codes[name] == [0, 0]
    layout, _, command = name.rpartition(" ")
    assert lorry(*commands(world, data, tmp_path)[command]) == 0
    made = folder / layout
    same(read_json(made / file), read_json(tmp_path / file))
    (shown, _), silent = ended.printed[name]
    assert shown
    assert silent == ("", "")


def test_relearning_is_that_of_one(
    pair: tuple[Ended, Path], world: World, data: Path, tmp_path: Path
) -> None:
    """A step divides its sum otherwise, so that its digits differ sooner than those of a pass."""
    ended, folder = pair
    assert lorry(*commands(world, data, tmp_path)["relearn"]) == 0
    alone = read_json(tmp_path / "relearn" / "attacks.json")["relearn"]["curves"]["run"]
    for layout in ("", "fsdp ", "tensor "):
        assert ended.codes[f"{layout}relearn"] == [0, 0]
        file = folder / layout.strip() / "relearn" / "attacks.json"
        curve = read_json(file)["relearn"]["curves"]["run"]
        assert [point["step"] for point in curve] == [0, 2]
        for mine, one in zip(curve, alone, strict=True):
            for metric, value in one.items():
                assert mine[metric] == pytest.approx(value, rel=1e-3, abs=1e-4), (layout, metric)


def test_a_sweep_of_two_is_that_of_one(
    pair: tuple[Ended, Path], world: World, data: Path, tmp_path: Path
) -> None:
    ended, folder = pair
    assert ended.codes["sweep"] == [0, 0]
    assert lorry(*commands(world, data, tmp_path)["sweep"]) == 0
    ranked, alone = (read_json(path / "sweep" / "sweep.json") for path in (folder, tmp_path))
    assert [job["name"] for job in ranked["jobs"]] == [job["name"] for job in alone["jobs"]]
    for mine, one in zip(ranked["jobs"], alone["jobs"], strict=True):
        assert mine["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert ended.printed["sweep"][0][0].splitlines()[-1] == ranked["jobs"][0]["path"]
    assert ended.printed["sweep"][1] == ("", "")


def test_a_mixture_of_two_is_that_of_one(
    pair: tuple[Ended, Path], world: World, data: Path, tmp_path: Path
) -> None:
    """Experts, router and their files, the base whole, cut and shared; a second time nothing is left to
    do."""
    ended, folder = pair
    assert ended.codes["moe"] == ended.codes["fsdp moe"] == ended.codes["tensor moe"] == [0, 0]
    assert lorry(*commands(world, data, tmp_path)["moe"]) == 0
    for file in ("one/adapter_model.safetensors", "router/router.safetensors"):
        alone = load_file(tmp_path / "moe" / file)
        for made in (folder, folder / "fsdp", folder / "tensor"):
            mine = load_file(made / "moe" / file)
            assert mine.keys() == alone.keys()
            for tensor, value in alone.items():
                error = (mine[tensor] - value).norm() / value.norm().clamp(min=1e-6)
                assert float(error) < 1e-3, (made, file, tensor)
    assert ended.codes["moe again"] == [0, 0]
    told = " ".join(ended.printed["moe again"][0][1].split())
    assert told.count("has finished, and nothing it was made of has changed") == 2


def test_what_begins_from_the_base_is_read_back_by_one_process(
    pair: tuple[Ended, Path], world: World, data: Path, tmp_path: Path
) -> None:
    """DoRA's magnitudes begin as norms of weights, of which a process has a part: a run ends with its
    adapter read back all the same, and it is that of one process."""
    ended, folder = pair
    assert ended.codes["dora"] == ended.codes["fsdp dora"] == [0, 0]
    assert lorry(*commands(world, data, tmp_path)["dora"]) == 0
    alone = load_file(tmp_path / "dora" / "adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in alone)
    for made in (folder, folder / "fsdp"):
        mine = load_file(made / "dora" / "adapter_model.safetensors")
        assert mine.keys() == alone.keys()
        for tensor, value in alone.items():
            error = (mine[tensor] - value).norm() / value.norm().clamp(min=1e-6)
            assert float(error) < 1e-3, (made, tensor)


def test_a_run_asks_its_sets_and_suite_together(
    pair: tuple[Ended, Path], world: World, data: Path, tmp_path: Path
) -> None:
    ended, folder = pair
    assert ended.codes["asked"] == [0, 0]
    assert lorry(*commands(world, data, tmp_path)["asked"]) == 0
    evaluations = [
        [
            json.loads(line)
            for line in (path / "asked" / "metrics.jsonl").read_text().splitlines()
            if "eval_" in line
        ]
        for path in (folder, tmp_path)
    ]
    assert len(evaluations[1]) == 2
    assert {"eval_bool_q_accuracy", "eval_extraction_strength"} < evaluations[1][0].keys()
    for mine, alone in zip(*evaluations, strict=True):
        for name, value in alone.items():
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert (folder / "asked" / "evals" / "TOFU_EVAL.json").is_file()


def test_what_is_there_is_not_measured_again(pair: tuple[Ended, Path]) -> None:
    """Rank 0's files say so to both."""
    ended, _ = pair
    assert ended.codes["suite again"] == [0, 0]
    assert "metrics were measured before" in ended.printed["suite again"][0][1]


def test_doctor_names_every_rank(pair: tuple[Ended, Path]) -> None:
    """Of a job under a launcher; rank 0 tells."""
    ended, _ = pair
    assert ended.codes["doctor"] == [0, 0]
    (shown, _), silent = ended.printed["doctor"]
    told = {
        name.strip(): value.strip() for name, value in re.findall(r"│ ([^│]*)│ ([^│]*)│", shown)
    }
    assert told["mesh"] == "2 data x 1 tensor"
    here = f"{platform.node()}, cpu, "
    assert told["rank 0"].startswith(here)
    assert told["rank 1"].startswith(here)
    assert told["over"] == "gloo"
    assert silent == ("", "")


def test_how_many_made_a_run_is_written_down(
    pair: tuple[Ended, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = pair
    run = folder / "asked"
    capsys.readouterr()
    assert lorry("doctor", run) == 0
    assert "ddp, 2 processes, mesh 2 data x 1 tensor, cpu" in capsys.readouterr().out
    assert read_json(run / "receipt.json")["environment"]["processes"] == 2
    assert "processes: 2" in (run / "run.yaml").read_text()
    assert "2 (backend=ddp)" in (run / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("nothing", 3, "/nowhere.jsonl"),
        ("wrong word", 2, "unknown setting 'dat'"),
        ("fsdp quantize", 2, "with backend=fsdp every process has a part"),
        ("tensor quantize", 2, "with backend.tensor_parallel=2 every process has a part"),
        ("fewer rows to ask", 2, "rank 1 has another set of rows to ask than rank 0"),
        ("another adapter", 2, "rank 1 has another adapter than rank 0"),
    ],
)
def test_an_error_of_all_is_told_once(
    pair: tuple[Ended, Path], name: str, code: int, told: str
) -> None:
    ended, _ = pair
    assert ended.codes[name] == [code, code]
    (_, messages), silent = ended.printed[name]
    assert messages.count("error:") == 1
    assert told in messages
    assert silent == ("", "")
