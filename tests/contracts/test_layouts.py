"""One run on several processes is the run on one, or it stops.

A pair of processes is started once and makes every training and every fault of
`tests/support/layouts.py`, four make some of the trainings; one process makes the same trainings here,
and PEFT one of them, which knows nothing of Lorry.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorry.adapters.attach import get_bank
from lorry.backends.distributed.communicator import ONE_PROCESS
from lorry.config import DistillRunConfig, RunConfig, UnlearnRunConfig, parse_settings
from lorry.models.loading.sources import resolve_model
from lorry.train.session import train_run
from tests.support import layouts, tinyrun
from tests.support.layouts import ALPHA, ONE, RATE, STEPS, TARGETS, backend_for, uneven
from tests.support.processes import started, wait_until
from tests.support.ranks import run_ranks
from tests.support.seam import CONFIG, tiny_llama
from tests.support.shared_data import find_stories
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[2]
# of a whole pair: far above what it takes, far below the suite's limit
pytestmark = pytest.mark.timeout(600)


class Pair(NamedTuple):
    """What two processes came to: tensors and faults by rank, their output, the run directory."""

    tensors: list[dict[str, Tensor]]
    faults: list[dict[str, Any]]
    printed: list[tuple[str, str]]
    folder: Path


EVALUATED: dict[str, Any] = {
    "lora_dropout": 0.1,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "test_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
}
# of a model that two ranks share
SHARED = {**EVALUATED, "max_steps": 2, "load_best_model_at_end": True}
# of a run that one layout begins and another one ends
HALVES = {**EVALUATED, "max_steps": 2, "eval_steps": 1, "save_steps": 1, "warmup_ratio": 0}
FIRST_HALF = Path("checkpoints") / "step-00000001"
# longer than it takes to see the third step and kill a process, on any machine
LONG = {**EVALUATED, "max_steps": 150, "save_steps": 1, "eval_strategy": "no"}
del LONG["eval_steps"]


JOBS = "[{name: a, r: 3}, {name: b, learning_rate: 0.02}]"


def described(folder: Path, out: Path, **settings: Any) -> RunConfig:
    return tinyrun.described(folder / "model", folder / "data.jsonl", out, **settings)


def words_of(folder: Path, out: Path, **settings: Any) -> list[str]:
    """The same as words of the command line."""
    paths = {"model": folder / "model", "data": folder / "data.jsonl", "output_dir": out}
    given = {**paths, **tinyrun.DEFAULTS, **settings}
    return [f"{name}={value}" for name, value in given.items()]


# of base weights that train
BASE_RUN: dict[str, Any] = {
    **EVALUATED,
    "lora": "null",
    "learning_rate": 1e-3,
    "load_best_model_at_end": True,
}
del BASE_RUN["lora_dropout"]


def base_runs(out: Path) -> dict[str, dict[str, Any]]:
    """The whole run, one that goes on from its checkpoint, and one from a checkpoint of one process;
    through transformers' own code; a part of the weights."""
    step = "checkpoints/step-00000002"
    return {
        "": BASE_RUN,
        " resumed": {**BASE_RUN, "resume_from_checkpoint": out / "fsdp-base" / step},
        " from one": {**BASE_RUN, "resume_from_checkpoint": out / "one-base" / step},
        " foreign": {**BASE_RUN, "model": out / "foreign"},
        " part": {**BASE_RUN, "trainable": "mlp", "dtype": "bfloat16"},
    }


def base_words(folder: Path, out: Path, **settings: Any) -> list[str]:
    """`words_of`, without an adapter's."""
    return [word for word in words_of(folder, out, **settings) if not word.startswith("r=")]


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    """Command lines of every verb that several processes can run, and one that is refused."""
    short = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "warmup_ratio": 0,
        "save_strategy": "no",
    }

    def words(verb: str, name: str, **settings: Any) -> list[str]:
        return [verb, *words_of(folder, out / name, **{**short, **settings})]

    forget = [w for w in words("unlearn", "unlearn", method="NPO") if not w.startswith("data=")]
    return {
        "run": ["sft", *words_of(folder, out / "run", **EVALUATED)],
        "continued": [
            word
            for word in words("sft", "continued", model=out / "continued")
            if not word.startswith("r=")  # that of its adapter
        ],
        "refused": words("sft", "refused", adapter="/nowhere"),
        "jobs": words("sft", "jobs", jobs=JOBS),
        "distill": words("distill", "distill", teacher=folder / "model"),
        "tensor": [
            "sft",
            *words_of(folder, out / "tensor", **SHARED, model=folder / "shared"),
            "tensor_parallel=2",
            "sequence_parallel=true",
        ],
        "tensor refused": [*words("sft", "tensor-refused"), "tensor_parallel=2"],
        # every process trains the whole base
        "whole": [w for w in words("sft", "whole", lora="null") if not w.startswith("r=")],
        **{
            f"fsdp base{name}": ["sft", *base_words(folder, out / place, **settings)]
            for name, settings in base_runs(out).items()
            for place in [f"fsdp-base{name}".replace(" ", "-")]
        },
        # the same as "run", to the bit
        "moments": ["sft", *words_of(folder, out / "moments", **EVALUATED, shard_optimizer=True)],
        "fsdp run": ["sft", *words_of(folder, out / "fsdp-run", **EVALUATED)],
        "fsdp from single": going_on(folder, out, "fsdp-from-single", "single"),
        "fsdp shared": [
            "sft",
            *words_of(folder, out / "fsdp-shared", **HALVES, model=folder / "shared"),
        ],
        "tensor from fsdp": [
            *going_on(folder, out, "tensor-from-fsdp", "fsdp-shared", model=folder / "shared"),
            "tensor_parallel=2",
        ],
        "fsdp jobs": words("sft", "fsdp-jobs", jobs=JOBS),
        # of a model of its own
        "fsdp distill": words("distill", "fsdp-distill", teacher=folder / "teacher"),
        "fsdp unlearn": [
            *[w for w in words("unlearn", "fsdp-unlearn", method="NPO") if w[:5] != "data="],
            f"forget={folder / 'data.jsonl'}",
            f"retain={folder / 'retain.jsonl'}",
        ],
        "unlearn": [
            *forget,
            f"forget={folder / 'data.jsonl'}",
            f"retain={folder / 'retain.jsonl'}",
        ],
    }


def going_on(folder: Path, out: Path, name: str, begun: str, **settings: Any) -> list[str]:
    """The command line that ends what another run has half done."""
    at = {"resume_from_checkpoint": folder / begun / FIRST_HALF}
    return ["sft", *words_of(folder, out / name, **HALVES, **settings, **at)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Pair:  # noqa: F811 - the fixture
    folder = tmp_path_factory.mktemp("layouts")
    tinyrun.model_directory(folder / "model")
    tinyrun.model_directory(folder / "shared", num_key_value_heads=2)
    tinyrun.write_rows(folder / "data.jsonl", tinyrun.rows(16))
    tinyrun.write_rows(folder / "retain.jsonl", tinyrun.rows(16, start=16))
    tinyrun.model_directory(folder / "teacher", num_hidden_layers=2)
    layouts.write_models(folder, find_stories())
    # no family of ours
    tinyrun.model_directory(folder / "foreign", "olmo", num_hidden_layers=2)
    train_run(base_described(folder, folder / "one-base"), [])
    train_run(described(folder, folder / "single", **HALVES), [])
    (folder / "commands.json").write_text(json.dumps(commands(folder, folder)))
    printed = run_ranks("tests.support.layouts", folder)
    return Pair(
        [load_file(folder / f"2-rank-{rank}.safetensors") for rank in (0, 1)],
        [json.loads((folder / f"2-rank-{rank}.json").read_text()) for rank in (0, 1)],
        printed,
        folder,
    )


class Four(NamedTuple):
    """What four processes came to: tensors by rank, and the run that they went on with."""

    tensors: list[dict[str, Tensor]]
    ended: list[dict[str, Any]]
    printed: str
    run: Path


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Four:
    folder = tmp_path_factory.mktemp("four")
    layouts.write_models(folder)
    words = going_on(pair.folder, folder, "run", "fsdp-shared", model=pair.folder / "shared")
    (folder / "commands.json").write_text(json.dumps({"fsdp from two": words}))
    printed = run_ranks("tests.support.layouts", folder, ranks=4)
    return Four(
        [load_file(folder / f"4-rank-{rank}.safetensors") for rank in range(4)],
        [json.loads((folder / f"4-rank-{rank}.json").read_text()) for rank in range(4)],
        printed[0][1],
        folder / "run",
    )


@pytest.fixture(scope="module")
def alone(pair: Pair, quick: None) -> Mapping[str, Tensor]:  # noqa: F811 - the fixture
    start = partial(layouts.read_backend_for, ONE_PROCESS, None, pair.folder)
    return (
        layouts.trainings(start)
        | layouts.family_trainings(pair.folder, start)
        | layouts.base_trainings(pair.folder, start)
    )


def relative(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30))


def base_described(folder: Path, out: Path, **settings: Any) -> RunConfig:
    """`BASE_RUN` of one process."""
    return parse_settings(RunConfig, base_words(folder, out, **{**BASE_RUN, **settings}), print)


# --- equality


# by training, how far the first loss and the values may differ, relatively
BOUNDS = {
    "float32": (1e-5, 1e-3),
    # masters are fp32: no tighter bound of an adapter is true
    "float64": (1e-9, 1e-6),
    "mixed": (1e-5, 1e-3),
    "unsupervised": (1e-5, 1e-3),
    "few": (1e-5, 1e-3),
    "npo": (1e-5, 1e-3),
    "router": (1e-5, 1e-3),
    "gradient rule": (1e-5, 1e-3),
}
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
FAMILY_BOUNDS = {
    f"{family} {dtype}": BOUNDS[str(dtype).removeprefix("torch.")]
    for family in (*layouts.MODELS[1:], layouts.FOREIGN)
    for dtype in (torch.float32, torch.float64)
}


def compare_training(
    ranks: Sequence[Mapping[str, Tensor]],
    alone: Mapping[str, Tensor],
    layout: str,
    training: str,
    bounds: tuple[float, float],
) -> None:
    """Each rank's training is that of one process, and the ranks hold the same bits."""
    names = [name for name in alone if name.startswith(f"{training}/")]
    for mine in ranks:
        first = (mine[f"{layout}/{training}/losses"][0], alone[f"{training}/losses"][0])
        torch.testing.assert_close(*first, rtol=bounds[0], atol=bounds[0])
        norms = (mine[f"{layout}/{training}/norms"], alone[f"{training}/norms"])
        assert relative(*norms) < max(1e-6, bounds[0])
        for name in names:
            if "/values/" in name:
                assert relative(mine[f"{layout}/{name}"], alone[name]) < bounds[1], name
    for mine in ranks:
        keys = [f"{layout}/{name}" for name in names]
        assert all(torch.equal(mine[key], ranks[0][key]) for key in keys)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("training", BOUNDS)
def test_two_processes_are_one(
    pair: Pair, alone: Mapping[str, Tensor], layout: str, training: str
) -> None:
    """Uneven micro-batches, adapters of other rank and depth with dropout, rows of the base alone, rows
    that teach nothing, a step with one row, a reference model, a gradient rule, a router of experts."""
    compare_training(pair.tensors, alone, layout, training, BOUNDS[training])


@pytest.mark.parametrize("training", FAMILY_BOUNDS)
def test_every_family_is_cut_over_two_processes(
    pair: Pair, alone: Mapping[str, Tensor], training: str
) -> None:
    compare_training(pair.tensors, alone, "fsdp", training, FAMILY_BOUNDS[training])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_real_model_is_cut_over_two_processes(
    pair: Pair,
    alone: Mapping[str, Tensor],
    dtype: str,
    stories: Path,  # skips without it
) -> None:
    """stories260K, five layers whose heads share keys and values."""
    compare_training(pair.tensors, alone, "fsdp", f"stories260K torch.{dtype}", BOUNDS[dtype])


@pytest.mark.parametrize("training", BASE_BOUNDS)
def test_base_weights_that_train_are_cut_over_two_processes(
    pair: Pair, alone: Mapping[str, Tensor], training: str
) -> None:
    compare_training(pair.tensors, alone, "fsdp", training, BASE_BOUNDS[training])


def test_a_rank_holds_its_share_of_what_trains(
    pair: Pair, four: Four, alone: Mapping[str, Tensor]
) -> None:
    """Sixteen bytes for each of its values (master, gradient, two moments) beside the weights."""
    for ranks, count in ((pair.tensors, 2), (four.tensors, 4)):
        for training in (name for name in BASE_BOUNDS if "torch" in name):
            values = alone[f"{training}/values/base"].numel()
            for mine in ranks:
                held = float(mine[f"fsdp/base share {training.removeprefix('base ')}/training"])
                # every tensor begins at a multiple of 64 bytes and has a row more where it is odd
                assert held < 16 * values / count + 8192, training
    model = "base share llama torch.float64 all/model"
    assert float(pair.tensors[0][f"fsdp/{model}"]) < 0.52 * float(alone[model])


def test_a_rank_holds_its_share_of_the_base(pair: Pair, alone: Mapping[str, Tensor]) -> None:
    """Half of it, a little more where a dimension is odd; behind passes as before them."""
    whole = float(alone["share/bytes"])
    for mine in pair.tensors:
        assert float(mine["ddp/share/bytes"]) == whole
        assert 0.48 * whole < float(mine["fsdp/share/bytes"]) < 0.52 * whole


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layout", "size"), [("fsdp", 2), ("tensor", 3)])
def test_smollm2_is_one_on_several_processes(tmp_path: Path, layout: str, size: int) -> None:
    """Thirty layers of a real model, in float64 and float32, read share by share from what a GGUF file
    was converted to: cut over two processes, or shared by three. Float64 is also what float32 is held
    to, on one process as on several."""
    directory = resolve_model("smollm2-135m-instruct", add_note=print).directory
    (tmp_path / layouts.SMOLLM2).symlink_to(directory)
    start = partial(layouts.read_backend_for, ONE_PROCESS, None, tmp_path)
    alone = layouts.family_trainings(tmp_path, start)
    narrow, wide = (f"{layouts.SMOLLM2} torch.{dtype}" for dtype in ("float32", "float64"))
    run_ranks("tests.support.layouts", tmp_path, ranks=size)
    ranks = [load_file(tmp_path / f"{size}-rank-{rank}.safetensors") for rank in range(size)]
    compare_training(ranks, alone, layout, wide, BOUNDS["float64"])
    compare_training(ranks, alone, layout, narrow, BOUNDS["float32"])
    for norms in (ranks[0][f"{layout}/{narrow}/norms"], alone[f"{narrow}/norms"]):
        assert relative(norms, alone[f"{wide}/norms"]) < 1e-5


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
@pytest.mark.parametrize("training", ["float32", "float64", "mixed", *FAMILY_BOUNDS, *BASE_BOUNDS])
def test_four_processes_are_one(
    four: Four, alone: Mapping[str, Tensor], layout: str, training: str
) -> None:
    """The base cut over four, and over two twice with its layers kept between forward and backward."""
    bounds = {**BOUNDS, **FAMILY_BOUNDS, **BASE_BOUNDS}
    compare_training(four.tensors, alone, layout, training, bounds[training])


@pytest.mark.parametrize(
    "training",
    ["float32", "float64", "mixed", *(t for t in FAMILY_BOUNDS if layouts.FOREIGN not in t)],
)
def test_a_base_that_ranks_share_is_cut_over_the_others(
    four: Four, alone: Mapping[str, Tensor], training: str
) -> None:
    """Two tensor ranks, each with a half of its part of the base; also where one has a row of the
    vocabulary more than the other."""
    bounds = {**BOUNDS, **FAMILY_BOUNDS}[training]
    compare_training(four.tensors, alone, "fsdp x tensor", training, bounds)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["adapters", "base"])
def test_moments_that_ranks_share_change_no_bit(
    pair: Pair, four: Four, layout: str, name: str
) -> None:
    """Of two adapters with dropout, and of base weights; of weights that fsdp cuts they are cut
    already."""
    for ranks in (pair.tensors, four.tensors) if layout == "fsdp" else (pair.tensors,):
        for mine in ranks:
            key = f"{layout}/moments/{name}"
            assert mine[f"{key}/same"].all()
            assert mine[f"{key}/optimized"]
            whole, cut = (float(mine[f"{key}/{kind} bytes"]) for kind in ("whole", "cut"))
            share = 1.0 if (layout, name) == ("fsdp", "base") else 1 / len(ranks)
            # of each range a vector more, of four bytes a value and two moments
            assert cut <= whole * share + 2 * 2 * 2 * 64
            assert cut > 0


def test_a_run_whose_ranks_share_the_moments_is_the_same_run(pair: Pair) -> None:
    assert [ended["moments"] for ended in pair.faults] == [0, 0]
    run, moments = pair.folder / "run", pair.folder / "moments"
    for file in ("adapter_model.safetensors", "checkpoints/step-00000004/state.safetensors"):
        assert (moments / file).read_bytes() == (run / file).read_bytes()
    contracts = json.loads((moments / "contracts.json").read_text())
    assert [contract["status"] for contract in contracts] == ["held"] * 8


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_scores_are_those_of_one_process(
    pair: Pair, alone: Mapping[str, Tensor], layout: str
) -> None:
    names = [name for name in alone if name.startswith("scores")]
    assert len(names) == 12
    for name in names:
        for mine in pair.tensors:
            got = mine[f"{layout}/{name}"]
            torch.testing.assert_close(got, alone[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_answers_are_those_of_one_process(
    pair: Pair, alone: Mapping[str, Tensor], layout: str
) -> None:
    names = [name for name in alone if name.startswith("answers/")]
    assert [alone[name].numel() for name in names] == [3, 6, 1]
    for mine in pair.tensors:
        assert all(torch.equal(mine[f"{layout}/{name}"], alone[name]) for name in names)


def plain_loop(
    model: nn.Module, params: Sequence[Tensor], rate: float
) -> tuple[list[float], list[float]]:
    """Losses and norms of `uneven` rows by a model of transformers and torch.optim, each row by itself."""
    adamw = torch.optim.AdamW(params, lr=rate, weight_decay=0.0)
    losses, norms = list[float](), list[float]()
    for step in range(STEPS):
        rows = [row for batch in uneven(step) for row in batch]
        total, weight = torch.zeros((), dtype=torch.float64), sum(sum(r.weights) for r in rows)
        for row in rows:
            tokens = torch.tensor(row.tokens)
            logp = model(tokens[None]).logits[0].log_softmax(-1)
            picked = logp[:-1].gather(1, tokens[1:, None])[:, 0]
            total = total - (picked * torch.tensor(row.weights[1:])).sum() / weight
        total.backward()
        losses.append(total.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, 1.0)))
        adamw.step()
        adamw.zero_grad()
    return losses, norms


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_processes_are_peft_in_one(pair: Pair, layout: str) -> None:
    """The float64 training by transformers, PEFT and torch.optim, each row by itself."""
    settings = {k: v for k, v in CONFIG.items() if k != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager")).double()
    model.load_state_dict(tiny_llama().state_dict(), strict=False)
    model.tie_weights()
    config = LoraConfig(r=3, lora_alpha=ALPHA, target_modules=TARGETS)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    start = backend_for(ONE_PROCESS, ONE)
    ours = get_bank(start.model)["default"]
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p
        for name, p in wrapped.named_parameters()
        if p.requires_grad
    }
    assert theirs.keys() == ours.tensors().keys()
    for name, value in ours.tensors().items():
        theirs[name].data.copy_(value)
    losses, norms = plain_loop(wrapped, list(theirs.values()), RATE)
    mine = pair.tensors[0]
    # transformers' norms and rotary angles are fp32 in any dtype, hence not 1e-9
    assert abs(float(mine[f"{layout}/float64/losses"][0, 0]) - losses[0]) < 1e-7 * losses[0]
    assert relative(mine[f"{layout}/float64/norms"][:1, 0], torch.tensor(norms[:1])) < 1e-6
    assert relative(mine[f"{layout}/float64/losses"][:, 0], torch.tensor(losses).double()) < 1e-6
    views = ours.split_like(mine[f"{layout}/float64/values/default"])
    got = torch.cat([views[name].flatten().double() for name in theirs])
    true = torch.cat([p.detach().flatten() for p in theirs.values()])
    # Adam divides by the root of its second moment, which doubles rounding where that is small
    assert relative(got, true) < 1e-5


def test_base_weights_of_two_processes_are_those_of_transformers(pair: Pair) -> None:
    """All of the tied model in float64, by torch.optim.AdamW over transformers' own parameters."""
    settings = {k: v for k, v in CONFIG.items() if k != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager")).double()
    model.load_state_dict(tiny_llama().state_dict(), strict=False)
    model.tie_weights()
    theirs = dict(model.named_parameters())
    losses, norms = plain_loop(model, list(theirs.values()), layouts.BASE_RATE)
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


# --- what goes wrong on one rank


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (
            "a gradient not added up",
            "ContractError",
            ["contract 3", "after step 1", "rank 1 holds"],
        ),
        ("totals of one rank", "ContractError", ["totals of the whole step", "rank 1"]),
        ("one more micro-batch", "ContractError", ["come apart", "one more pass"]),
        ("another adapter", "ContractError", ["contract 2", "before the first step", "lora_A"]),
        ("another base", "ConfigError", ["another base", "rank 1"]),
        ("not finite", "NonFiniteError", ["rank 1: step 1", "not finite"]),
        ("full disk", "DiskError", ["No space left on device"]),
        ("log not synced", "DiskError", ["Input/output error"]),
        ("signal", "RunInterruptedError", ["SIGTERM arrived; step 2 of 4"]),
        ("fsdp late gradient", "ContractError", ["_proj.weight came behind the backward pass"]),
        ("fsdp infinite gradient", "NonFiniteError", ["the gradient of model.norm.weight"]),
        ("fsdp infinite value", "NonFiniteError", ["adam_m/base/", "infinite or NaN (1 of"]),
        ("fsdp one more pass", "ContractError", ["come apart", "a pass through sharded weights"]),
        ("fsdp own backward", "ContractError", ["outside a pass"]),
        ("fsdp other share", "ContractError", ["contract 2", "a weight of the base model"]),
    ],
)
def test_a_fault_of_one_rank_ends_every_rank(
    pair: Pair, fault: str, kind: str, words: list[str]
) -> None:
    """With the same kind of error, which names the rank; nobody waits for ever."""
    for rank, ended in enumerate(pair.faults):
        assert ended[fault][0] == kind, (rank, ended[fault])
        assert ended[fault][2] == "True", (rank, ended[fault])
    assert all(word in pair.faults[0][fault][1] for word in words), pair.faults[0][fault]


def test_an_error_of_ours_is_told_where_it_is(pair: Pair) -> None:
    """A bug is no message for people: the rank that has it keeps its traceback, the others name it."""
    for fault in ("bug", "fsdp broken layer"):  # the second in the middle of a pass
        assert pair.faults[1][fault][0] == "TypeError"
        assert pair.faults[1][fault][2] == "False"
        assert pair.faults[0][fault][0] == "LorryError"
        assert pair.faults[0][fault][1].startswith("rank 1: TypeError")


def test_ranks_go_on_after_a_fault(pair: Pair) -> None:
    """The last training of the pair, behind all faults, has none; rank 0 alone wrote checkpoints."""
    assert [ended["nothing"] for ended in pair.faults] == [["", "", ""]] * 2
    assert tinyrun.saved(pair.folder / "nothing") == [2, 3]
    assert not (pair.folder / "nothing-of-rank-1" / "checkpoints").exists()
    # of the signal at rank 1: the step it came in is saved
    assert tinyrun.saved(pair.folder / "signal") == [1, 2]


# --- a whole run


@pytest.mark.parametrize("name", ["run", "fsdp run"])
def test_a_run_of_two_is_the_run_of_one(pair: Pair, name: str, tmp_path: Path) -> None:
    """The command in two processes, as torchrun starts it: the files of one device; rank 1 says
    nothing, also where both are refused."""
    assert [ended[name] for ended in pair.faults] == [0, 0]
    assert [ended["refused"] for ended in pair.faults] == [4, 4]
    (out, messages), silent = pair.printed
    run = pair.folder / name.replace(" ", "-")
    assert str(run) in out.splitlines()
    assert "2 processes: 4 rows in a micro-batch of all of them, 4 in a step" in messages
    # of the two that are refused
    assert messages.count("error:") == 2
    assert silent == ("", "")
    one = train_run(described(pair.folder, tmp_path / "one", **EVALUATED), [])
    for two, single in zip(tinyrun.lines(run), tinyrun.lines(one.path), strict=True):
        for name in single.keys() - {"seconds", "peak_memory_bytes"}:
            assert two[name] == pytest.approx(single[name], rel=1e-4, abs=1e-6), name
    weights = [load_file(path / "adapter_model.safetensors") for path in (run, one.path)]
    assert max(relative(weights[0][name], weights[1][name]) for name in weights[1]) < 1e-3
    assert {path.name for path in run.iterdir()} - {"report.html", "report.png"} == {
        path.name for path in one.path.iterdir()
    }
    contracts = json.loads((run / "contracts.json").read_text())
    assert [contract["status"] for contract in contracts] == ["held"] * 8


def test_a_run_whose_ranks_share_the_model_is_the_run_of_one(pair: Pair, tmp_path: Path) -> None:
    """With dropout, evaluations, checkpoints and samples; one device goes on from its checkpoint, and
    sizes that do not divide are refused by rank 0 alone, with those that do."""
    assert [ended["tensor"] for ended in pair.faults] == [0, 0]
    assert [ended["tensor refused"] for ended in pair.faults] == [2, 2]
    refusal = "tensor_parallel=2 does not divide 1 KV heads; no size above 1 does"
    assert refusal in pair.printed[0][1]
    run = pair.folder / "tensor"
    described_here = partial(tinyrun.described, pair.folder / "shared", pair.folder / "data.jsonl")
    one = train_run(described_here(tmp_path / "one", **SHARED), [])
    for two, single in zip(tinyrun.lines(run), tinyrun.lines(one.path), strict=True):
        for name in single.keys() - {"seconds", "peak_memory_bytes"}:
            assert two[name] == pytest.approx(single[name], rel=1e-4, abs=1e-6), name
    weights = [load_file(path / "adapter_model.safetensors") for path in (run, one.path)]
    assert max(relative(weights[0][name], weights[1][name]) for name in weights[1]) < 1e-3
    facts = [json.loads((path / "receipt.json").read_text()) for path in (run, one.path)]
    for name in ("trainable_parameters", "total_parameters", "base"):
        assert facts[0][name] == facts[1][name], name
    contracts = json.loads((run / "contracts.json").read_text())
    assert [contract["status"] for contract in contracts] == ["held"] * 8
    newest = str(run / "checkpoints" / "step-00000002")
    heard = tinyrun.Heard()
    going_on = described_here(tmp_path / "on", **SHARED, resume_from_checkpoint=newest)
    again = train_run(going_on, listeners=[heard])
    assert any(note.startswith("not bitwise: backend.tensor_parallel") for note in heard.notes)
    resumed = load_file(again.path / "adapter_model.safetensors")
    # the state of both steps was read: nothing is left to train
    assert all(torch.equal(resumed[name], weights[0][name]) for name in resumed)


@pytest.fixture(scope="module")
def base_ended(pair: Pair) -> Path:
    """The folder of `base_runs`, all of which ended well on both ranks."""
    for name in base_runs(pair.folder):
        assert [ended[f"fsdp base{name}"] for ended in pair.faults] == [0, 0], pair.printed[0][1]
        run = pair.folder / f"fsdp-base{name}".replace(" ", "-")
        contracts = json.loads((run / "contracts.json").read_text())
        assert [contract["status"] for contract in contracts] == ["held"] * 8
    return pair.folder


def model_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


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


def test_a_run_goes_on_in_another_layout(pair: Pair, four: Four, tmp_path: Path) -> None:
    """From one process to a base cut over two; from that to two that share the model, to four, and
    back to one: each is the run that nobody stopped, and says that it is not bitwise."""
    shared = partial(tinyrun.described, pair.folder / "shared", pair.folder / "data.jsonl")
    whole = train_run(shared(tmp_path / "whole", **HALVES), []).path
    heard, half = tinyrun.Heard(), str(pair.folder / "fsdp-shared" / FIRST_HALF)
    again = shared(tmp_path / "again", **HALVES, resume_from_checkpoint=half)
    back = train_run(again, listeners=[heard]).path
    for name in ("fsdp from single", "fsdp shared", "tensor from fsdp"):
        assert [ended[name] for ended in pair.faults] == [0, 0], name
    assert [ended["fsdp from two"] for ended in four.ended] == [0] * 4
    for run, one in (
        (pair.folder / "fsdp-from-single", pair.folder / "single"),
        (pair.folder / "tensor-from-fsdp", whole),
        (four.run, whole),
        (back, whole),
    ):
        # in a directory of its own there is no line of the step before
        second = [line for line in tinyrun.lines(one) if line["step"] == 2]
        for resumed, single in zip(tinyrun.lines(run), second, strict=True):
            for key in single.keys() & {"loss", "grad_norm", "eval_loss"}:
                assert resumed[key] == pytest.approx(single[key], rel=1e-4), (run, key)
        got, true = (load_file(path / "adapter_model.safetensors") for path in (run, one))
        assert max(relative(got[name], true[name]) for name in true) < 1e-3, run
    assert 'not bitwise: backend.name "single" -> "fsdp"' in pair.printed[0][1]
    assert 'not bitwise: backend.name "fsdp" -> "ddp"' in pair.printed[0][1]
    assert "not bitwise: backend.processes" in four.printed
    assert any(note.startswith("not bitwise: backend.name") for note in heard.notes)


def test_a_run_that_goes_on_in_its_directory_is_read_by_every_rank(pair: Pair) -> None:
    """Before rank 0 moves the earlier one away, however late another rank reads it."""
    assert [ended["continued"] for ended in pair.faults] == [0, 0]
    assert (pair.folder / "continued" / "previous" / "1" / "adapter_model.safetensors").is_file()


def test_a_task_knows_nothing_of_ranks() -> None:
    words = (
        "communicator",
        "lorry.ranks",
        "backends.distributed",
        "WORLD_SIZE",
        "torch.distributed",
    )
    sources = sorted((ROOT / "src" / "lorry" / "tasks").rglob("*.py"))
    assert sources
    assert [(p.name, w) for p in sources for w in words if w in p.read_text()] == []


@pytest.mark.parametrize(
    "name", ["jobs", "distill", "unlearn", "whole", "fsdp jobs", "fsdp distill", "fsdp unlearn"]
)
def test_other_tasks_are_those_of_one(pair: Pair, name: str, tmp_path: Path) -> None:
    """A task knows nothing of ranks: several jobs, a teacher, a method with a reference."""
    assert [ended[name] for ended in pair.faults] == [0, 0]
    verb, *words = commands(pair.folder, tmp_path)[name]
    schema = {"sft": RunConfig, "distill": DistillRunConfig, "unlearn": UnlearnRunConfig}[verb]
    one = train_run(parse_settings(schema, words, print))
    runs = [
        tinyrun.lines(pair.folder / name.replace(" ", "-")),
        tinyrun.lines(one.path),
    ]
    assert len(runs[1]) >= 2
    for two, single in zip(*runs, strict=True):
        for key in single.keys() & {"loss", "grad_norm", "tokens", "loss_distill", "loss_forget"}:
            assert two[key] == pytest.approx(single[key], rel=1e-4), key


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job_and_one_device_goes_on(
    pair: Pair, backend: str, tmp_path: Path
) -> None:
    """Two workers that the command starts; rank 1 is killed. The other and the command end, the last
    checkpoint is whole, and one process finishes what two began."""
    out = tmp_path / "killed"
    words = words_of(pair.folder, out, **LONG)
    command = [sys.executable, "-m", "lorry", "sft", *words, f"backend={backend}", "processes=2"]
    with started(
        [*command, "keep_total=true"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        metrics = out / "metrics.jsonl"
        wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 2, child)
        workers = psutil.Process(child.pid).children()
        second = next(w for w in workers if w.environ().get("RANK") == "1")
        second.kill()
        messages = child.communicate()[1]
    assert child.returncode not in (0, None), messages
    assert "rank 1 was ended by SIGKILL" in messages
    assert not any(worker.is_running() for worker in workers)
    newest = tinyrun.saved(out)[-1]
    assert 2 <= newest < LONG["max_steps"]
    heard, once = tinyrun.Heard(), {**LONG, "save_strategy": "no"}
    going_on = described(pair.folder, out, resume_from_checkpoint="auto", **once)
    train_run(going_on, listeners=[heard])
    assert any(note.startswith("not bitwise: backend.name") for note in heard.notes)
    one = train_run(described(pair.folder, tmp_path / "one", **once), [])
    # later than that rounding has grown, as it does between any two layouts
    lines = [tinyrun.lines(run)[: newest + 3] for run in (out, one.path)]
    for resumed, single in zip(*lines, strict=True):
        assert resumed["step"] == single["step"]
        assert resumed["loss"] == pytest.approx(single["loss"], rel=1e-3)
        assert resumed["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-2)
