"""DoRA on two processes is DoRA on one: magnitudes are cut with the rows of W, and the norms of a matrix that
is cut by columns are summed over ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorry.backends.distributed.communicator import ONE_PROCESS
from tests.support import layouts
from tests.support.dora_ranks import LAYOUTS, trainings
from tests.support.layout_equality import BOUNDS, compare_training
from tests.support.ranks import run_ranks
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

pytestmark = pytest.mark.timeout(600)
TRAININGS = {"float32": "float32", "float64": "float64", "mixed": "mixed", "gpt_neox": "float64"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:  # noqa: F811 - the fixture
    out = tmp_path_factory.mktemp("dora")
    layouts.write_models(out)
    run_ranks("tests.support.dora_ranks", out)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_are_one(folder: Path, layout: str) -> None:
    alone = trainings(partial(layouts.read_backend_for, ONE_PROCESS, None, folder))
    ranks = [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]
    for training, bounds in TRAININGS.items():
        compare_training(ranks, alone, layout, training, BOUNDS[bounds])
