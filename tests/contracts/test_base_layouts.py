"""Base weights that train on several processes are those of one, as `test_layouts.py` has it of adapters;
transformers and torch's AdamW train some of them, which know nothing of Lorry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorry.backends.distributed.communicator import ONE_PROCESS
from lorry.config import RunConfig, parse_settings
from lorry.train.session import train_run
from tests.support import layouts, tinyrun
from tests.support.base_layouts import (
    BASE_RATE,
    BASE_RUN,
    FLOATS,
    base_runs,
    base_trainings,
    base_words,
    is_of_few,
)
from tests.support.layout_equality import (
    BOUNDS,
    check_fault,
    compare_training,
    plain_loop,
    relative,
)
from tests.support.layout_ranks import Ranks, start_ranks
from tests.support.layout_runs import write_files
from tests.support.layouts import backend_for
from tests.support.seam import CONFIG, tiny_llama
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

# of a whole pair: far above what it takes, far below the suite's limit
pytestmark = pytest.mark.timeout(600)

# of weights that are the base's own, masters in fp32, cut over the ranks
BASE_BOUNDS = {
    f"base {family} {dtype} all": bounds
    for family in layouts.MODELS
    for dtype, bounds in {
        torch.float32: BOUNDS["float32"],
        torch.float64: BOUNDS["float64"],
        # a rounding of the sum in another place is one of 2^-8
        torch.bfloat16: (5e-3, 2e-3),
    }.items()
}
BASE_BOUNDS |= {
    f"base {name}": BOUNDS["float32"] for name in ("few", "sam", "gru", "llama torch.float32 part")
}
# of four
FEW_BOUNDS = {"base few": BASE_BOUNDS["base few"]} | {
    name: BASE_BOUNDS[name]
    for family in layouts.MODELS
    for dtype in FLOATS
    if is_of_few(family, dtype)
    for name in [f"base {family} {dtype} all"]
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Ranks:  # noqa: F811 - the fixture
    folder = tmp_path_factory.mktemp("base")
    write_files(folder)
    layouts.write_models(folder)
    # no family of ours
    tinyrun.model_directory(folder / "foreign", "olmo", num_hidden_layers=2)
    train_run(base_described(folder, folder / "one-base"), [])
    commands = {
        f"fsdp base{name}": ["sft", *base_words(folder, folder / place, **settings)]
        for name, settings in base_runs(folder).items()
        for place in [f"fsdp-base{name}".replace(" ", "-")]
    }
    return start_ranks(folder, "base", "base faults", commands=commands)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("four")
    layouts.write_models(folder)
    return start_ranks(folder, "base", ranks=4)


@pytest.fixture(scope="module")
def alone(pair: Ranks) -> Mapping[str, Tensor]:
    start = partial(layouts.read_backend_for, ONE_PROCESS, None, pair.folder)
    return base_trainings(pair.folder, start)


def base_described(folder: Path, out: Path, **settings: Any) -> RunConfig:
    """`BASE_RUN` of one process."""
    return parse_settings(RunConfig, base_words(folder, out, **{**BASE_RUN, **settings}), print)


@pytest.fixture(scope="module")
def base_ended(pair: Ranks) -> Path:
    """The folder of `base_runs`, all of which ended well on both ranks."""
    for name in base_runs(pair.folder):
        assert [ended[f"fsdp base{name}"] for ended in pair.ended] == [0, 0], pair.printed[0][1]
        run = pair.folder / f"fsdp-base{name}".replace(" ", "-")
        contracts = json.loads((run / "contracts.json").read_text())
        assert [contract["status"] for contract in contracts] == ["held"] * 8
    return pair.folder


def model_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


@pytest.mark.parametrize("training", BASE_BOUNDS)
def test_base_weights_that_train_are_cut_over_two_processes(
    pair: Ranks, alone: Mapping[str, Tensor], training: str
) -> None:
    compare_training(pair.tensors, alone, "fsdp", training, BASE_BOUNDS[training])


def test_a_rank_holds_its_share_of_what_trains(
    pair: Ranks, four: Ranks, alone: Mapping[str, Tensor]
) -> None:
    """Sixteen bytes for each of its values (master, gradient, two moments) beside the weights."""
    for ranks, count, made in ((pair.tensors, 2, BASE_BOUNDS), (four.tensors, 4, FEW_BOUNDS)):
        for training in (name for name in made if "torch" in name):
            values = alone[f"{training}/values/base"].numel()
            for mine in ranks:
                held = float(mine[f"fsdp/base share {training.removeprefix('base ')}/training"])
                # every tensor begins at a multiple of 64 bytes and has a row more where it is odd
                assert held < 16 * values / count + 8192, training
    model = "base share llama torch.float64 all/model"
    assert float(pair.tensors[0][f"fsdp/{model}"]) < 0.52 * float(alone[model])


def test_base_weights_of_two_processes_are_those_of_transformers(pair: Ranks) -> None:
    """All of the tied model in float64, by torch.optim.AdamW over transformers' own parameters."""
    settings = {k: v for k, v in CONFIG.items() if k != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager")).double()
    model.load_state_dict(tiny_llama().state_dict(), strict=False)
    model.tie_weights()
    theirs = dict(model.named_parameters())
    losses, norms = plain_loop(model, list(theirs.values()), BASE_RATE)
    start = backend_for(ONE_PROCESS, "all").owners["base"]
    mine = {
        key: pair.tensors[0][f"fsdp/base llama torch.float64 all/{key}"]
        for key in ("losses", "norms", "values/base")
    }
    # transformers' norms and rotary angles are fp32 in any dtype, hence not 1e-9
    assert abs(float(mine["losses"][0, 0]) - losses[0]) < 1e-7 * losses[0]
    assert relative(mine["norms"][:1, 0], torch.tensor(norms[:1])) < 1e-6
    assert relative(mine["losses"][:, 0], torch.tensor(losses).double()) < 1e-6
    # whole tensors, in the buffer's order: matrices first
    names = start.targets()
    assert sorted(names) == sorted(theirs)
    true = torch.cat([theirs[name].detach().flatten() for name in names])
    assert relative(mine["values/base"], true) < 1e-6


def test_a_run_of_base_weights_is_the_run_of_one(base_ended: Path) -> None:
    """Evaluations, checkpoints, the best one put back, and the model's files, which transformers opens."""
    one, two = base_ended / "one-base", base_ended / "fsdp-base"
    for mine, single in zip(tinyrun.lines(two), tinyrun.lines(one), strict=True):
        for name in single.keys() - {"seconds", "peak_memory_bytes"}:
            assert mine[name] == pytest.approx(single[name], rel=1e-4, abs=1e-6), name
    weights = [model_of(two), model_of(one)]
    assert weights[0].keys() == weights[1].keys()
    assert max(relative(weights[0][name], weights[1][name]) for name in weights[1]) < 1e-3
    assert {path.name for path in two.iterdir()} - {"report.html", "report.png"} == {
        path.name for path in one.iterdir()
    }
    opened = AutoModelForCausalLM.from_pretrained(two).state_dict()
    assert all(torch.equal(opened[name], weight) for name, weight in weights[0].items())
    facts = [json.loads((path / "receipt.json").read_text()) for path in (two, one)]
    for name in ("trainable_parameters", "total_parameters", "saved_bytes", "base"):
        assert facts[0][name] == facts[1][name], name


def test_base_weights_go_on_from_any_layout(base_ended: Path) -> None:
    """From two processes to two bit for bit; from one to two and from two to one to rounding, with a
    note; a checkpoint holds whole tensors."""
    two, one = base_ended / "fsdp-base", base_ended / "one-base"
    resumed, from_one = base_ended / "fsdp-base-resumed", base_ended / "fsdp-base-from-one"
    assert all(torch.equal(model_of(resumed)[name], w) for name, w in model_of(two).items())
    for name, weight in model_of(one).items():
        assert relative(model_of(from_one)[name], weight) < 1e-3
    last, middle = (two / "checkpoints" / f"step-0000000{step}" for step in (4, 2))
    states = [
        load_file(run / "checkpoints" / last.name / "state.safetensors") for run in (two, one)
    ]
    assert {n: t.shape for n, t in states[0].items()} == {n: t.shape for n, t in states[1].items()}
    heard = tinyrun.Heard()
    for step, start in {"again": last, "middle": middle}.items():
        on = base_described(base_ended, base_ended / f"one-on-{step}", resume_from_checkpoint=start)
        train_run(on, listeners=[heard])
    assert any(note.startswith("not bitwise: backend.name") for note in heard.notes)
    # nothing was left to train: what was read is what is written
    again, on = (model_of(base_ended / f"one-on-{step}") for step in ("again", "middle"))
    for name, weight in model_of(two).items():
        assert torch.equal(again[name], weight)
        assert relative(on[name], weight) < 1e-3


def test_a_foreign_model_and_a_part_of_the_weights_train(base_ended: Path) -> None:
    """Of transformers' class the files are written tensor by tensor, too; what does not train stays to
    the bit."""
    run = base_ended / "fsdp-base-foreign"
    opened = AutoModelForCausalLM.from_pretrained(run)
    one = train_run(
        base_described(base_ended, base_ended / "one-foreign", model=base_ended / "foreign")
    )
    assert (
        type(opened).__name__
        == json.loads((one.path / "config.json").read_text())["architectures"][0]
    )
    states = (opened.state_dict(), AutoModelForCausalLM.from_pretrained(one.path).state_dict())
    assert all(relative(states[0][name], weight) < 1e-3 for name, weight in states[1].items())
    before = AutoModelForCausalLM.from_pretrained(base_ended / "model", dtype=torch.bfloat16)
    moved = {
        name
        for name, weight in model_of(base_ended / "fsdp-base-part").items()
        if not torch.equal(weight, before.state_dict()[name])
    }
    assert moved
    assert all(".mlp." in name for name in moved)


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
@pytest.mark.parametrize("training", FEW_BOUNDS)
def test_four_processes_are_one(
    four: Ranks, alone: Mapping[str, Tensor], layout: str, training: str
) -> None:
    """Cut over four, and over two twice with layers kept between forward and backward."""
    compare_training(four.tensors, alone, layout, training, FEW_BOUNDS[training])


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("late gradient", "ContractError", ["_proj.weight came behind the backward pass"]),
        ("infinite gradient", "NonFiniteError", ["the gradient of model.norm.weight"]),
        ("infinite value", "NonFiniteError", ["adam_m/base/", "infinite or NaN (1 of"]),
    ],
)
def test_a_fault_of_one_rank_ends_every_rank(
    pair: Ranks, fault: str, kind: str, words: list[str]
) -> None:
    check_fault(pair.ended, fault, kind, words)
