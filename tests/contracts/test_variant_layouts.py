"""AdaLoRA, one half alone, adapters that tokens invoke and weights in the base's place on two processes are what
they are on one: scores and masks are made of summed gradients, a frozen half is each process's own copy, gates
are the tokens', and whole weights and rows train as A and B do, beside a base that may be cut."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorry.backends.distributed.communicator import ONE_PROCESS
from tests.support import layouts
from tests.support.layout_equality import BOUNDS, compare_training
from tests.support.ranks import run_ranks
from tests.support.tinyrun import quick  # noqa: F401 - a fixture
from tests.support.variant_ranks import (
    LAYOUTS,
    OWN_WEIGHTS,
    grown,
    loader,
    read,
    trainings,
    write_theirs,
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:  # noqa: F811 - the fixture
    out = tmp_path_factory.mktemp("variants")
    layouts.write_models(out)
    write_theirs(out)
    run_ranks("tests.support.variant_ranks", out)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_are_one(folder: Path, layout: str) -> None:
    alone = trainings(partial(layouts.read_backend_for, ONE_PROCESS, None, folder))
    ranks = [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]
    others = () if layout == "tensor" else ("adalora", "half", "alora")
    for training in (*OWN_WEIGHTS, *others):
        compare_training(ranks, alone, layout, training, BOUNDS["float64"])


@pytest.mark.parametrize("name", ["grown", "grown on tensor ranks"])
def test_an_embedding_that_is_cut_grows_like_a_whole_one(folder: Path, name: str) -> None:
    """float64; every process has the rows where it looks for them."""
    alone = grown(loader(folder, ONE_PROCESS))
    for rank in range(2):
        mine = load_file(folder / f"rank-{rank}.safetensors")
        for tensor, true in alone.items():
            torch.testing.assert_close(mine[f"{name}/{tensor}"], true, rtol=1e-12, atol=1e-12)


def test_a_base_that_is_cut_is_compared_with_a_file_row_by_row(folder: Path) -> None:
    """float32; a bias of another base is found by the process that has it, without a word to the other."""
    alone = read(folder, loader(folder, ONE_PROCESS))
    ranks = [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]
    for mine in ranks:
        torch.testing.assert_close(mine["read/logits"], alone["logits"], rtol=1e-5, atol=1e-5)
    assert bool(alone["refused"])
    assert [bool(mine["read/refused"]) for mine in ranks] == [False, True]
