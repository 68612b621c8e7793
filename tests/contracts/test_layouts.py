"""One run on several processes is the run on one, or it stops.

A pair of processes is started once and makes every training of `tests/support/layouts.py` and every
fault of `layout_faults.py`, four make some of the trainings; one process makes the same trainings here,
and PEFT one of them, which knows nothing of Lorry. `test_base_layouts.py` has base weights that train,
`test_layout_runs.py` whole commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorry.adapters.attach import get_bank
from lorry.backends.distributed.communicator import ONE_PROCESS
from lorry.models.loading.sources import resolve_model
from lorry.train.session import train_run
from tests.support import layouts, tinyrun
from tests.support.layout_equality import (
    BOUNDS,
    check_fault,
    compare_training,
    plain_loop,
    relative,
)
from tests.support.layout_ranks import Ranks, start_ranks
from tests.support.layout_runs import FIRST_HALF, HALVES, described, going_on, words_of, write_files
from tests.support.layouts import ALPHA, ONE, RATE, TARGETS, backend_for
from tests.support.seam import CONFIG, tiny_llama
from tests.support.shared_data import find_stories
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

# of a whole pair: far above what it takes, far below the suite's limit
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Ranks:  # noqa: F811 - the fixture
    folder = tmp_path_factory.mktemp("layouts")
    write_files(folder)
    layouts.write_models(folder, find_stories())
    train_run(described(folder, folder / "single", **HALVES), [])
    shared = folder / "shared"
    commands = {
        "fsdp from single": going_on(folder, folder, "fsdp-from-single", "single"),
        "fsdp shared": ["sft", *words_of(folder, folder / "fsdp-shared", **HALVES, model=shared)],
        "tensor from fsdp": [
            *going_on(folder, folder, "tensor-from-fsdp", "fsdp-shared", model=shared),
            "tensor_parallel=2",
        ],
    }
    return start_ranks(folder, "adapters", "faults", commands=commands)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, pair: Ranks) -> Ranks:
    folder = tmp_path_factory.mktemp("four")
    layouts.write_models(folder)
    words = going_on(pair.folder, folder, "run", "fsdp-shared", model=pair.folder / "shared")
    return start_ranks(folder, "adapters", ranks=4, commands={"fsdp from two": words})


@pytest.fixture(scope="module")
def alone(pair: Ranks, quick: None) -> Mapping[str, Tensor]:  # noqa: F811 - the fixture
    start = partial(layouts.read_backend_for, ONE_PROCESS, None, pair.folder)
    made = layouts.trainings(start) | layouts.family_trainings(pair.folder, start)
    return made | layouts.packed_trainings(start)


FAMILY_BOUNDS = {
    f"{family} {dtype}": BOUNDS[str(dtype).removeprefix("torch.")]
    for family in (*layouts.MODELS[1:], layouts.FOREIGN)
    for dtype in (torch.float32, torch.float64)
}


# of four: float32 of each family is what two have
FOUR_BOUNDS = {
    **{training: BOUNDS[training] for training in ("float32", "float64", "mixed")},
    **{name: bounds for name, bounds in FAMILY_BOUNDS.items() if "float64" in name},
}


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("training", BOUNDS)
def test_two_processes_are_one(
    pair: Ranks, alone: Mapping[str, Tensor], layout: str, training: str
) -> None:
    """Uneven micro-batches, adapters of other rank and depth with dropout, rows of the base alone, rows
    that teach nothing, a step with one row, a reference model, a gradient rule, a router of experts."""
    compare_training(pair.tensors, alone, layout, training, BOUNDS[training])


@pytest.mark.parametrize("training", FAMILY_BOUNDS)
def test_every_family_is_cut_over_two_processes(
    pair: Ranks, alone: Mapping[str, Tensor], training: str
) -> None:
    compare_training(pair.tensors, alone, "fsdp", training, FAMILY_BOUNDS[training])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_real_model_is_cut_over_two_processes(
    pair: Ranks,
    alone: Mapping[str, Tensor],
    dtype: str,
    stories: Path,  # skips without it
) -> None:
    """stories260K, five layers whose heads share keys and values."""
    compare_training(pair.tensors, alone, "fsdp", f"stories260K torch.{dtype}", BOUNDS[dtype])


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize(("family", "quantize", "dtype"), layouts.PACKED)
def test_a_packed_base_is_one_on_two_processes(
    pair: Ranks,
    alone: Mapping[str, Tensor],
    layout: str,
    family: str,
    quantize: str,
    dtype: torch.dtype,
) -> None:
    """nf4 and int8, whole on each and cut; an adapter's files say that it is the base of one process."""
    training = f"{family} {quantize} {dtype}"
    share = 0.5 if layout == "fsdp" else 1.0
    for mine in pair.tensors:
        assert torch.equal(
            mine[f"{layout}/held {training}/digests"], alone[f"held {training}/digests"]
        )
        held = float(mine[f"{layout}/held {training}/bytes"] / alone[f"held {training}/bytes"])
        # of odd sizes a rank has one more; of matrices this small that is seen
        assert held == pytest.approx(share, rel=0.04)
    bounds = BOUNDS[str(dtype).removeprefix("torch.")]
    compare_training(pair.tensors, alone, layout, training, bounds)


def test_a_rank_holds_its_share_of_the_base(pair: Ranks, alone: Mapping[str, Tensor]) -> None:
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
    ranks = start_ranks(tmp_path, "real model", ranks=size).tensors
    compare_training(ranks, alone, layout, wide, BOUNDS["float64"])
    compare_training(ranks, alone, layout, narrow, BOUNDS["float32"])
    for norms in (ranks[0][f"{layout}/{narrow}/norms"], alone[f"{narrow}/norms"]):
        assert relative(norms, alone[f"{wide}/norms"]) < 1e-5


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
@pytest.mark.parametrize("training", FOUR_BOUNDS)
def test_four_processes_are_one(
    four: Ranks, alone: Mapping[str, Tensor], layout: str, training: str
) -> None:
    """The base cut over four, and over two twice with its layers kept between forward and backward."""
    compare_training(four.tensors, alone, layout, training, FOUR_BOUNDS[training])


@pytest.mark.parametrize("training", [t for t in FOUR_BOUNDS if layouts.FOREIGN not in t])
def test_a_base_that_ranks_share_is_cut_over_the_others(
    four: Ranks, alone: Mapping[str, Tensor], training: str
) -> None:
    """Two tensor ranks, each with a half of its part of the base; also where one has a row of the
    vocabulary more than the other."""
    compare_training(four.tensors, alone, "fsdp x tensor", training, FOUR_BOUNDS[training])


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["adapters", "base"])
def test_moments_that_ranks_share_change_no_bit(
    pair: Ranks, four: Ranks, layout: str, name: str
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


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_scores_are_those_of_one_process(
    pair: Ranks, alone: Mapping[str, Tensor], layout: str
) -> None:
    names = [name for name in alone if name.startswith("scores")]
    assert len(names) == 12
    for name in names:
        for mine in pair.tensors:
            got = mine[f"{layout}/{name}"]
            torch.testing.assert_close(got, alone[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_answers_are_those_of_one_process(
    pair: Ranks, alone: Mapping[str, Tensor], layout: str
) -> None:
    names = [name for name in alone if name.startswith("answers/")]
    assert [alone[name].numel() for name in names] == [3, 6, 1]
    for mine in pair.tensors:
        assert all(torch.equal(mine[f"{layout}/{name}"], alone[name]) for name in names)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_processes_are_peft_in_one(pair: Ranks, layout: str) -> None:
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
        ("fsdp one more pass", "ContractError", ["come apart", "a pass through sharded weights"]),
        ("fsdp own backward", "ContractError", ["outside a pass"]),
        ("fsdp other share", "ContractError", ["contract 2", "a weight of the base model"]),
    ],
)
def test_a_fault_of_one_rank_ends_every_rank(
    pair: Ranks, fault: str, kind: str, words: list[str]
) -> None:
    """With the same kind of error, which names the rank; nobody waits for ever."""
    check_fault(pair.ended, fault, kind, words)


def test_an_error_of_ours_is_told_where_it_is(pair: Ranks) -> None:
    """A bug is no message for people: the rank that has it keeps its traceback, the others name it."""
    for fault in ("bug", "fsdp broken layer"):  # the second in the middle of a pass
        assert pair.ended[1][fault][0] == "TypeError"
        assert pair.ended[1][fault][2] == "False"
        assert pair.ended[0][fault][0] == "LorryError"
        assert pair.ended[0][fault][1].startswith("rank 1: TypeError")


def test_ranks_go_on_after_a_fault(pair: Ranks) -> None:
    """The last training of the pair, behind all faults, has none; rank 0 alone wrote checkpoints."""
    assert [ended["nothing"] for ended in pair.ended] == [["", "", ""]] * 2
    assert tinyrun.saved(pair.folder / "nothing") == [2, 3]
    assert not (pair.folder / "nothing-of-rank-1" / "checkpoints").exists()
    # of the signal at rank 1: the step it came in is saved
    assert tinyrun.saved(pair.folder / "signal") == [1, 2]


def test_a_run_goes_on_in_another_layout(pair: Ranks, four: Ranks, tmp_path: Path) -> None:
    """From one process to a base cut over two; from that to two that share the model, to four, and
    back to one: each is the run that nobody stopped, and says that it is not bitwise."""
    shared = partial(tinyrun.described, pair.folder / "shared", pair.folder / "data.jsonl")
    whole = train_run(shared(tmp_path / "whole", **HALVES), []).path
    heard, half = tinyrun.Heard(), str(pair.folder / "fsdp-shared" / FIRST_HALF)
    again = shared(tmp_path / "again", **HALVES, resume_from_checkpoint=half)
    back = train_run(again, listeners=[heard]).path
    for name in ("fsdp from single", "fsdp shared", "tensor from fsdp"):
        assert [ended[name] for ended in pair.ended] == [0, 0], name
    assert [ended["fsdp from two"] for ended in four.ended] == [0] * 4
    for run, one in (
        (pair.folder / "fsdp-from-single", pair.folder / "single"),
        (pair.folder / "tensor-from-fsdp", whole),
        (four.folder / "run", whole),
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
    assert "not bitwise: backend.processes" in four.printed[0][1]
    assert any(note.startswith("not bitwise: backend.name") for note in heard.notes)
