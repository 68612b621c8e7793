"""`lorry plan`: what it prints, what it finds in a budget, what it refuses; and `lorry sft` taking
its answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorry.plan import machine, rates
from lorry.plan.constants import STEP_EFFICIENCIES
from tests.support.verbworld import TRAIN, World, lorry

MEASURED = rates.RateMeasurement(
    rate=1e12, at="2026-01-01T10:00:00+00:00", repeats=40, load=0.5, waited=0.0
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own in which a rate was measured for every format, so that no test measures
    one.
    """
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    for precision in ("bfloat16", "float32"):
        rates.keep_matrix_rate(machine.machine_identity("cpu", precision, None), MEASURED)
    return tmp_path / "home"


def plan(*argv: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The plan as JSON."""
    assert lorry("plan", *argv, "format=json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert lorry("plan", "smollm2-135m", "dtype=bfloat16", "device=cpu", "max_length=512") == 0
    out = capsys.readouterr().out
    assert (
        "smollm2-135m (135M parameters) on cpu: r=16, 8 rows, recompute none, bfloat16, up to 512 tokens a row"
        in out
    )
    for component in (
        "libraries",
        "base weights",
        "vocabulary",
        "adapter",
        "optimizer",
        "workspace",
        "activations",
        "peak",
    ):
        assert component in out
    assert (
        f"at {100 * STEP_EFFICIENCIES[machine.attention_kernel()]['fused']:.0f}% of 1.00 TFLOP/s, measured here, "
        "the best of 40 products on 2026-01-01 10:00 UTC, load 0.5)" in out
    )
    assert out.rstrip().splitlines()[-1].startswith("needs ")


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan("smollm2-135m", "dtype=bfloat16", "device=cpu", capsys=capsys)
    assert made["total"] == sum(made["memory"].values())
    assert (made["fits"], made["budget"], made["tried"]) == (None, None, [])
    assert made["adapter_parameters"] == 4_884_480
    speed = made["speed"]
    assert speed["tokens_per_second"] == pytest.approx(
        1e12 * speed["efficiency"] / made["flops_per_token"]["step"]
    )
    assert speed["seconds_per_step"] == pytest.approx(8 * 1024 / speed["tokens_per_second"])


def test_a_run_corrects_a_rate_of_a_busy_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """58 tokens/s where 700 is true: measured once while others had the cores, and kept for ever."""
    words = ("smollm2-135m", "dtype=bfloat16", "device=cpu", "threads=3")
    here, measured = machine.machine_identity("cpu", "bfloat16", 3), list[rates.RateMeasurement]()

    def measure(device: str, precision: str, threads: int | None) -> rates.RateMeasurement:
        assert (device, precision, threads) == ("cpu", "bfloat16", 3)
        return measured[-1]

    monkeypatch.setattr("lorry.train.resources.rate.measure_matrix_rate", measure)
    measured.append(replace(MEASURED, rate=1.15e11, waited=0.8))
    first = plan(*words, capsys=capsys)
    # 58 at the 35% that a step reaches on matrix tiles
    share = first["speed"]["efficiency"] / 0.35
    assert first["speed"]["tokens_per_second"] == pytest.approx(58 * share, rel=0.02)
    assert (
        "the machine was busy: 80% of the time went to other programs" in first["speed"]["source"]
    )
    measured.append(replace(MEASURED, rate=1.0e12, waited=0.8, at="2026-01-02T10:00:00+00:00"))
    # measured again, since it was busy
    assert plan(*words, capsys=capsys)["speed"]["rate"] == 1.0e12
    measured.append(replace(MEASURED, rate=0.5e12, waited=0.8, at="2026-01-03T10:00:00+00:00"))
    # a busy machine only looks slower
    assert plan(*words, capsys=capsys)["speed"]["rate"] == 1.0e12
    made = first["flops_per_token"]["step"]
    steps = rates.RunRate(
        rate=700 * made,
        at="2026-01-04T10:00:00+00:00",
        repeats=98,
        load=1.0,
        waited=0.0,
        model="smollm2-135m",
        parameters=first["parameters"],
        tokens=1024,
        path="fused",
    )
    rates.keep_run_rate(here, steps)
    last = plan(*words, capsys=capsys)
    assert last["speed"]["tokens_per_second"] == pytest.approx(700)
    assert last["speed"]["measured"]["repeats"] == 98
    assert lorry("plan", *words) == 0
    said = capsys.readouterr().out
    assert "about 700 tokens/s" in said
    assert (
        "measured here in 98 steps of a run of smollm2-135m on 2026-01-04 10:00 UTC, load 1.0)"
        in said
    )


def test_a_rate_that_a_run_contradicts_is_measured_anew(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for models whose own steps nobody has seen: here one far larger."""
    here = machine.machine_identity("cpu", "bfloat16", None)
    rates.keep_matrix_rate(here, replace(MEASURED, rate=1e11))
    run = rates.RunRate(
        rate=5e11,
        at="2026-01-04T10:00:00+00:00",
        repeats=98,
        load=9.0,
        waited=0.5,
        model="m",
        parameters=10**8,
        tokens=1024,
        path="fused",
    )
    rates.keep_run_rate(here, run)
    anew = replace(MEASURED, rate=1.5e12, at="2026-01-05T10:00:00+00:00")
    monkeypatch.setattr("lorry.train.resources.rate.measure_matrix_rate", lambda *a: anew)
    assert (
        plan("llama-3-8b", "device=cpu", "dtype=bfloat16", capsys=capsys)["speed"]["rate"] == 1.5e12
    )
    monkeypatch.setattr(
        "lorry.train.resources.rate.measure_matrix_rate", lambda *a: pytest.fail("measured again")
    )
    assert (
        plan("llama-3-8b", "device=cpu", "dtype=bfloat16", capsys=capsys)["speed"]["rate"] == 1.5e12
    )


def test_a_budget_finds_the_rank(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("smollm2-135m", "dtype=bfloat16", "device=cpu", "r=auto")
    large, small = (plan(*words, f"memory_budget={b}", capsys=capsys) for b in ("3GiB", "1100MiB"))
    assert large["choice"]["rank"] > small["choice"]["rank"] >= 1
    for made in (large, small):
        assert made["fits"]
        assert made["choice"]["rows"] * made["choice"]["accumulation"] == 8
        assert [t["passes_the_budget_at"] is None for t in made["tried"]] == [False] * (
            len(made["tried"]) - 1
        ) + [True]
    assert lorry("plan", *words, "memory_budget=3GiB") == 0
    out = capsys.readouterr().out
    assert "exceeds the budget at" in out
    assert "fits memory_budget=3GiB" in out


def test_a_budget_finds_the_format(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("llama-3-8b", "dtype=bfloat16", "device=cpu", "r=8", "quantize=auto")
    with monkeypatch.context() as patch:
        # what gaps the heap is planned to have hangs on it
        patch.setattr(machine, "attention_kernel", lambda: "vectors")
        found = {
            budget: plan(*words, f"memory_budget={budget}", capsys=capsys)["choice"]["precision"]
            for budget in ("40GiB", "16GiB", "11GiB")
        }
    assert found == {"40GiB": "bfloat16", "16GiB": "int8", "11GiB": "nf4"}
    assert lorry("plan", *words) == 2
    assert "quantize=auto needs a memory budget to choose by" in capsys.readouterr().err
    # a run takes the first, which fits, and writes down what it took
    words = ("quantize=auto", "memory_budget=2GiB", "save_strategy=no")
    assert sft(world, tmp_path / "run", *words, *TRAIN[1:]) == 0
    resolved = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert resolved["model"]["quantize"] is None
    assert "r=16, 4 rows, recompute none, float32" in capsys.readouterr().err
    assert lorry("eval", f"model={world.base}", "quantize=auto", f"data={world.rows}") == 2
    assert "chosen by a run's memory_budget" in capsys.readouterr().err


def test_many_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "model=llama-3-70b",
        "backend=fsdp",
        "processes=8",
        "max_length=4096",
        "per_device_train_batch_size=1",
    )
    assert lorry("plan", *words) == 0
    out = capsys.readouterr().out
    assert "on 8 GPUs (fsdp), each" in out
    assert "does not fit one h100" in out
    assert "would fit with r=16, 1 row, recompute full" in out
    assert "all-gather of 8" in out
    assert "in a checkpoint" in out
    made = plan(*words, "gradient_checkpointing=true", "gpu=h200", capsys=capsys)
    assert made["fits"]
    assert made["sent_per_step"] == sum(c["sent"] for c in made["collectives"])
    assert made["adapter_bytes"]["file"] == 4 * made["adapter_parameters"]


def test_processes_on_a_cpu_divide_its_cores(capsys: pytest.CaptureFixture[str]) -> None:
    """Two of them read twice the rows of one in twice the time; the base is halved by fsdp alone."""
    words = ("smollm2-135m", "device=cpu", "dtype=bfloat16", "max_length=512")
    one = plan(*words, capsys=capsys)
    ddp, fsdp = (
        plan(*words, f"backend={b}", "processes=2", capsys=capsys) for b in ("ddp", "fsdp")
    )
    for two in (ddp, fsdp):
        assert two["speed"]["tokens_per_second"] == pytest.approx(one["speed"]["tokens_per_second"])
        assert two["speed"]["seconds_per_step"] == pytest.approx(
            2 * one["speed"]["seconds_per_step"]
        )
        assert two["memory"]["communication"] > 0
    assert ddp["memory"]["base weights"] == one["memory"]["base weights"]
    whole = one["memory"]["base weights"] + one["memory"]["vocabulary"]
    assert fsdp["memory"]["base weights"] / whole == pytest.approx(0.5, abs=1e-3)
    total = plan(*words, "backend=ddp", "processes=2", "keep_total=true", capsys=capsys)
    assert total["choice"]["rows"] == one["choice"]["rows"] // 2
    assert total["speed"]["seconds_per_step"] == pytest.approx(one["speed"]["seconds_per_step"])
    few = ("per_device_train_batch_size=2", "gradient_accumulation_steps=6", "keep_total=true")
    shared = plan(*words, *few, "backend=ddp", "processes=4", capsys=capsys)
    assert (shared["choice"]["rows"], shared["choice"]["accumulation"]) == (1, 3)


def test_jobs_on_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("smollm2-135m", "device=cpu", "dtype=bfloat16", "max_length=512",
             "jobs=[{name: small, r: 8}, {name: large, r: 64}]")  # fmt: skip
    one = plan(*words, capsys=capsys)
    two = plan(*words, "backend=fsdp", "processes=2", capsys=capsys)
    assert two["memory"]["adapter"] == one["memory"]["adapter"]
    assert two["memory"]["base weights"] < one["memory"]["base weights"]
    gradients = next(c for c in two["collectives"] if c["what"] == "adapters' gradients")
    assert gradients["bytes"] == 4 * one["adapter_parameters"]


def test_what_a_run_does_not_take_yet_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("llama-3-8b", "backend=megatron", "processes=8", "tensor_parallel=2")
    for setting in ("pipeline_parallel=2", "sequence_parallel=true"):
        made = plan(*words, setting, capsys=capsys)
        assert not made["trainable"]
        told = f"backend.{setting.partition('=')[0]} is not built yet"
        assert any(told in note for note in made["notes"])
    assert plan(*words, capsys=capsys)["trainable"]
    ddp = plan("llama-3-8b", "backend=ddp", "processes=8", capsys=capsys)
    assert ddp["trainable"]
    assert any("which no run has checked" in note for note in ddp["notes"])


def test_a_packed_base_is_computed_with_in_the_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    """In float32 nothing but its matrices is smaller."""
    words = ("llama-3-8b", "dtype=float32", "device=cpu", "r=8")
    whole = plan(*words, capsys=capsys)["memory"]
    packed = plan(*words, "quantize=nf4", capsys=capsys)["memory"]
    rest = whole.keys() - {"base weights", "margin"}
    assert {name: packed[name] for name in rest} == {name: whole[name] for name in rest}
    assert packed["base weights"] < 0.14 * whole["base weights"]


def test_bfloat16_files_that_are_kept(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((world.base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    whole = plan(str(tmp_path), "dtype=float32", capsys=capsys)
    hint = "model.quantize=keep holds matrices as they are there"
    assert any(hint in note for note in whole["notes"])
    kept = plan(
        str(tmp_path),
        "dtype=float32",
        "quantize=keep",
        "backend=fsdp",
        "processes=2",
        capsys=capsys,
    )
    assert kept["choice"]["precision"] == "bfloat16"
    assert kept["trainable"]
    assert any("holds matrices in bfloat16, as the files have them" in n for n in kept["notes"])
    assert not any(hint in note for note in kept["notes"])
    alone = plan(str(tmp_path), "dtype=float32", "quantize=keep", capsys=capsys)
    assert 0.5 < alone["memory"]["base weights"] / whole["memory"]["base weights"] < 0.6


def test_quantised_and_experts_say_what_they_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan("mixtral-8x7b", "quantize=nf4", "gpu=h100", "max_length=512", capsys=capsys)
    assert made["memory"]["base weights"] / 46.4e9 == pytest.approx(0.516, rel=0.01)
    assert any("leaves stacked experts whole in a run" in note for note in made["notes"])
    assert not made["trainable"]
    assert plan("llama-3-8b", "quantize=nf4", capsys=capsys)["trainable"]
    shared = plan("llama-3-8b", "quantize=nf4", "backend=fsdp", "processes=8", capsys=capsys)
    assert shared["trainable"]
    assert not any("model.quantize" in note for note in shared["notes"])
    words = ("backend=megatron", "processes=2", "tensor_parallel=2")
    whole = plan("llama-3-8b", "quantize=nf4", *words, capsys=capsys)
    assert any("nf4 is refused with backend=megatron" in note for note in whole["notes"])
    assert not whole["trainable"]
    cut_mixture = ("mixtral-8x7b", "quantize=nf4", "backend=fsdp", "processes=8")
    foreign = plan(*cut_mixture, capsys=capsys)
    assert any("runs through transformers is cut" in note for note in foreign["notes"])
    kept = plan("llama-3-8b", "quantize=keep", "backend=fsdp", "processes=8", capsys=capsys)
    assert any("files store packed are cut" in note for note in kept["notes"])
    assert not kept["trainable"]
    assert any("adapters are on all 8 experts of a layer" in note for note in made["notes"])
    without = plan("mixtral-8x7b", "exclude_modules=[experts]", "max_length=512", capsys=capsys)
    assert any("no adapter is on them" in note for note in without["notes"])
    refused = "a run with backend=fsdp refuses such a model"
    assert not any(refused in note for note in made["notes"])
    cut = plan("mixtral-8x7b", "backend=fsdp", "processes=8", "max_length=512", capsys=capsys)
    assert any(refused in note for note in cut["notes"])


def test_the_description_of_a_run_can_be_planned(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan(world.run / "run.yaml", capsys=capsys)
    assert (made["choice"]["rank"], made["choice"]["rows"], made["setup"]["precision"]) == (
        8,
        4,
        "float32",
    )
    on = plan(world.run, "dtype=float32", capsys=capsys)
    assert on["choice"]["rank"] == 8
    assert any("is an adapter of rank 8" in note for note in on["notes"])


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (
            ["smollm2-135m", "memory_budget=200MiB"],
            2,
            "memory_budget=200MiB: nothing fits. The smallest choice",
        ),
        (["smollm2-135m", "r=auto", "rank_by=memory"], 2, "rank_by=memory needs a memory budget"),
        (
            ["smollm2-135m", "memory_budget=much"],
            2,
            "memory_budget: 'much' is not an amount of memory",
        ),
        (["smollm2-135m", "r=many"], 2, "lora.r: got 'many'; give a whole number above 0 or auto"),
        (["smollm2-135m", "target_modules=[q_prj]"], 2, "lora.target_modules names 'q_prj'"),
        (
            ["smollm2-135m", "lora=null", "backend=ddp", "processes=3", "tensor_parallel=3"],
            2,
            "lora=null with backend.tensor_parallel=3",
        ),
        (["smollm2-135m", "lora=null", "trainable=[q_prj]"], 2, "trainable=['q_prj'] matches no"),
        (
            ["smollm2-135m", "backend=horovod"],
            2,
            "backend.name: got 'horovod'; give one of single, ddp, fsdp, megatron",
        ),
        (
            ["smollm2-135m", "backend=megatron", "device=cpu"],
            2,
            "model.device=cpu and backend.name exclude each other",
        ),
        (["smollm2-135m", "processes=4"], 2, "backend.processes=4 needs backend=ddp"),
        (
            ["llama-3-8b", "backend=megatron", "processes=8", "tensor_parallel=3"],
            2,
            "not a multiple of tensor_parallel",
        ),
        (
            ["smollm2-135m", "backend=fsdp", "processes=2", "tensor_parallel=2"],
            2,
            "backend.tensor_parallel=2 does not divide 9 heads and 3 KV heads; 3 does",
        ),
        (
            ["smollm2-135m", "backend=ddp", "processes=9", "keep_total=true"],
            2,
            "is too few for 9 processes with backend.keep_total",
        ),
        (["smollm2-135m", "gpu=h1000"], 2, "did you mean 'h100'?"),
        (["smollm2-135m", "memry_budget=3GiB"], 2, "did you mean 'memory_budget'?"),
        (["./nowhere"], 4, "no model at './nowhere'"),
        (["llama-4-9b/"], 4, "known by name: gpt2"),
    ],
)
def test_errors(
    argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorry("plan", *argv) == code
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_a_plan_imports_no_torch() -> None:
    """Everything before a first measurement of the machine: the config, the formulas, the table."""
    program = (
        "import sys; from lorry import cli; code = cli.main(['plan', 'llama-3-8b', 'gpu=h100']); "
        "sys.exit(code or 10 * bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )


# --- sft takes the answer


def sft(world: World, folder: Path, *words: str) -> int:
    return lorry("sft", f"model={world.base}", f"data={world.rows}", f"output_dir={folder}", *words)


FEW = ("dtype=float32", "threads=1", "max_steps=2", "logging_steps=2", "max_length=64")


def test_sft_takes_the_rank_that_fits(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*FEW, "r=auto", "rank_by=memory", "memory_budget=2GiB")
    assert sft(world, tmp_path / "run", *words) == 0
    assert (
        "memory_budget=2GiB: r=16, 8 rows, recompute none, float32, predicted peak"
        in capsys.readouterr().err
    )
    resolved = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (resolved["lora"]["r"], resolved["lora"]["lora_alpha"], resolved["memory_budget"]) == (
        16,
        32,
        "2GiB",
    )
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"] == 16
    assert lorry("sft", tmp_path / "run" / "run.yaml", f"output_dir={tmp_path / 'again'}") == 0
    again = yaml.safe_load((tmp_path / "again" / "run.yaml").read_text())
    assert again["lora"] == resolved["lora"]


def test_smaller_micro_batches_are_the_same_steps(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a budget changes besides the rank changes nothing that is learnt. The budget is the
    smallest that the error names.
    """
    assert sft(world, tmp_path / "none", *FEW, "memory_budget=1MiB") == 2
    least = capsys.readouterr().err.split("give ")[1].split()[0]
    losses = {}
    for name, budget in (("free", ()), ("tight", (least,))):
        assert sft(world, tmp_path / name, *FEW, *budget) == 0
        lines = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    tight = yaml.safe_load((tmp_path / "tight" / "run.yaml").read_text())["train"]
    free = yaml.safe_load((tmp_path / "free" / "run.yaml").read_text())["train"]
    rows = [
        t["per_device_train_batch_size"] * t["gradient_accumulation_steps"] for t in (free, tight)
    ]
    assert rows == [8, 8]
    assert tight["per_device_train_batch_size"] < 8
    assert losses["tight"] == pytest.approx(losses["free"], rel=1e-4)


def test_a_budget_nothing_fits_stops_before_anything_is_written(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft(world, tmp_path / "run", "r=auto", "memory_budget=100MiB", *TRAIN[1:]) == 2
    err = capsys.readouterr().err
    assert "nothing fits. The smallest choice (r=1, 4 rows, recompute full, float32)" in err
    assert "of it libraries; give memory_budget=" in err
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_exists_keeps_its_rank(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"model={world.run}",
        f"data={world.rows}",
        f"output_dir={tmp_path / 'more'}",
        *FEW,
        "save_strategy=no",
    )
    assert lorry("sft", *words, "memory_budget=2GiB") == 0
    assert "memory_budget=2GiB: r=8" in capsys.readouterr().err
    assert lorry("sft", *words, "memory_budget=2GiB", "r=auto") == 2
    assert "already has an adapter" in capsys.readouterr().err


def test_a_budget_of_several_jobs_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        sft(
            world, tmp_path / "run", "memory_budget=2GiB", "jobs=[{name: a, r: 4}, {name: b, r: 8}]"
        )
        == 2
    )
    assert "memory_budget cannot be used with several jobs yet" in capsys.readouterr().err
