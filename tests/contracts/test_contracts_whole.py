"""The contracts of a run that trains the base's own weights (`lora: null`), each broken on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorry.adapters.base_weights import get_base_weights
from lorry.backends.local import LocalBackend
from lorry.backends.optim import ParameterSetOptimizer
from lorry.config import RunConfig, build_settings
from lorry.errors import ConfigError, ContractError, LorryError, NonFiniteError
from lorry.models.loading.open import OpenedModel
from lorry.train import full
from lorry.train.checks import CONTRACT_NAMES, ContractChecks
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import TrainResult, train_run
from lorry.train.setup import adapters
from tests.support import tinyrun
from tests.support.breaking import MODULES, Broken, Start, after, silent_attention
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

QUERY, DOWN = (f"{module}.weight" for module in MODULES)


@pytest.fixture
def start(models: Callable[[str], Path], tmp_path: Path) -> Start:
    """Five steps of two kinds of linears in ``tmp_path/run``."""
    data = tinyrun.write_rows(tmp_path / "data.jsonl", tinyrun.rows(12))

    def go(base: Path | str = "llama", listeners: Any = (), **settings: Any) -> TrainResult:
        model = models(base) if isinstance(base, str) else base
        given: dict[str, Any] = {
            "model": {"name": str(model)},
            "data": {"path": str(data)},
            "output_dir": str(tmp_path / "run"),
        }
        own = {k: v for k, v in tinyrun.DEFAULTS.items() if k != "r"} | {
            "max_steps": 5,
            "save_steps": 2,
            "learning_rate": 1e-3,
        }
        trained = {"lora": None, "trainable": ["q_proj", "down_proj"]}
        return train_run(
            build_settings(RunConfig, {**given, **own, **trained, **settings}, print), [], listeners
        )

    return go


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_run_keeps_all_of_them(start: Start, dtype: str) -> None:
    contracts = start(test_size=2, packing=True, dtype=dtype).contracts
    assert [(c["id"], c["name"], c["status"]) for c in contracts] == [
        (n, CONTRACT_NAMES[n], "held") for n in range(1, 9)
    ]
    details = [c["detail"] for c in contracts]
    assert details[0] == "2 modules: down_proj, q_proj"
    assert details[1].startswith("2 tensors; digest of a sample of the frozen weights ")
    assert details[2] == "2 tensors of the base changed within 3 steps; each had a gradient"
    assert (
        details[4]
        == "7088 values of the whole model and the scores of a batch equal bit for bit after reading back"
    )


def test_1_a_name_that_matches_nothing(start: Start, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainable names 'q_prj'.*did you mean 'q_proj'") as e:
        start(trainable=["q_prj"])
    assert e.value.exit_code == 2
    assert not (tmp_path / "run").exists()


# --- 2


def tampered(patch: pytest.MonkeyPatch, change: Callable[[OpenedModel], object]) -> None:
    after(patch, adapters, "enable_base_training", lambda name, opened, *_: change(opened))


def test_2_a_frozen_weight_left_trainable(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    tampered(
        monkeypatch,
        lambda opened: opened.model.get_parameter("model.norm.weight").requires_grad_(True),
    )
    broken(2, r"model\.norm\.weight is trainable but no optimizer holds it")


def test_2_a_weight_that_trains_switched_off(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(monkeypatch, lambda opened: opened.model.get_parameter(DOWN).requires_grad_(False))
    broken(
        2,
        r"base/model\.layers\.0\.mlp\.down_proj\.weight is optimized but not trainable \(1 tensors\)",
    )


def test_2_a_copy_that_no_optimizer_holds(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model computes with one tensor, the optimizer updates another."""

    def copy(opened: OpenedModel) -> None:
        param = opened.model.get_parameter(DOWN)
        param.data = param.data.clone()

    tampered(monkeypatch, copy)
    broken(
        2,
        r"base/model\.layers\.0\.mlp\.down_proj\.weight is trainable but no optimizer holds it \(1 tensors\)",
    )


def test_2_a_tensor_that_would_not_be_saved(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    after(
        monkeypatch, LocalBackend, "state", lambda state, self: state.pop(f"weights/base/{QUERY}")
    )
    broken(2, r"base/model\.layers\.0\.self_attn\.q_proj\.weight is trained but would not be saved")


class Meddler(tinyrun.Heard):
    """Does something to the run after step 2."""

    def __init__(self, deed: Callable[[], object]) -> None:
        super().__init__()
        self.deed = deed

    def step(self, record: StepRecord) -> None:
        if record["step"] == 2:
            self.deed()


def test_2_a_frozen_weight_that_changes(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[OpenedModel] = []
    tampered(monkeypatch, held.append)

    def nudge() -> None:
        with torch.no_grad():
            held[0].model.get_parameter("model.embed_tokens.weight")[3, 1] += 1e-3

    broken(
        2,
        "a weight of the base model or of a frozen adapter changed during training",
        listeners=[Meddler(nudge)],
    )


# --- 3


def test_3_a_weight_without_a_gradient(
    broken: Broken, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Behind an output projection of zeros that does not train."""
    base = silent_attention(models("llama"), tmp_path)
    broken(
        3,
        r"no gradient reached model\.layers\.0\.self_attn\.q_proj\.weight \(1 tensors\)",
        base=base,
    )


def test_3_a_weight_that_does_not_move(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[OpenedModel] = []
    tampered(monkeypatch, held.append)
    began: list[torch.Tensor] = []

    def hold(result: None, self: ParameterSetOptimizer, *args: Any) -> None:
        weights = get_base_weights(held[0].model)
        assert weights is not None
        view = weights.split_like(weights.values)[DOWN]
        view.copy_(began[0])

    tampered(
        monkeypatch, lambda opened: began.append(opened.model.get_parameter(DOWN).detach().clone())
    )
    after(monkeypatch, ParameterSetOptimizer, "step", hold)
    broken(
        3,
        r"weights/base/model\.layers\.0\.mlp\.down_proj\.weight did not change in 3 steps \(1 tensors\)",
    )


# --- 5


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t[DOWN].view(-1)[0].mul_(1.01),
            r"down_proj\.weight read back is not the tensor that was trained \(1 tensors\)",
        ),
        (lambda t: t.pop(DOWN), r"1 missing \(model\.layers\.0\.mlp\.down_proj\.weight\)"),
    ],
)
def test_5_a_file_that_is_not_the_model(
    broken: Broken,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: Any,
    message: str,
    dtype: str,
) -> None:
    """The run's directory does not become a model."""
    after(
        monkeypatch,
        full,
        "save_model",
        lambda result, model, folder, **options: damage(folder, change),
    )
    broken(5, message, dtype=dtype)
    # how it ended, for `lorry runs`
    left = {p.name for p in (tmp_path / "run").iterdir()} - {"process.json"}
    assert left == {"checkpoints", "contracts.json", "metrics.jsonl", "run.yaml"}


def test_5_other_logits_than_those_of_the_trained_model(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters that agree do not show what the config says."""

    def other(result: None, model: Any, folder: Path, **options: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))

    after(monkeypatch, full, "save_model", other)
    broken(5, "the model read back gives other logits")


# --- 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_7_a_gradient_that_is_not_finite(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str
) -> None:
    """Names the tensor, before any update."""
    locals_: list[LocalBackend] = []
    values: list[torch.Tensor] = []

    def spoil(stats: Any, self: LocalBackend, batches: Any, task: Any, step: int) -> None:
        if step == 2:
            owner = self.owners["base"]
            locals_.append(self)
            values.append(owner.values.clone())
            owner.split_like(owner.grads)[DOWN][0, 0] = float("nan")

    after(monkeypatch, LocalBackend, "forward_backward", spoil)
    with pytest.raises(
        NonFiniteError,
        match=r"step 3: the gradient of .*down_proj\.weight \(a base weight\) is not finite in 1 ten",
    ):
        start(dtype=dtype)
    assert torch.equal(locals_[0].owners["base"].values, values[0])
    contracts = json.loads((tmp_path / "run" / "contracts.json").read_text())
    assert [c["id"] for c in contracts if c["status"] == "failed"] == [7]


def test_6_a_damaged_checkpoint_is_refused(start: Start, tmp_path: Path) -> None:
    start()
    state = tmp_path / "run" / "checkpoints" / "step-00000004" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(LorryError, match=r"state\.safetensors"):
        start(resume_from_checkpoint=str(state.parent))


def test_3_copies_of_a_share_that_differ() -> None:
    """Of weights that are cut over ranks those with the same share hold the same bits (HSDP)."""
    frames = [{f"weights/base/w (share {rank % 2})": f"{rank % 2}"} for rank in range(4)]
    communicator = SimpleNamespace(size=4, exchange=lambda what, mine: frames)
    backend: Any = SimpleNamespace(communicator=communicator, held=dict)
    ContractChecks().equal_on_all_ranks(backend, 3, "after step 1")
    frames[3] = {"weights/base/w (share 1)": "another"}
    with pytest.raises(ContractError, match=r"rank 3 holds another .*\(share 1\) than rank 1"):
        ContractChecks().equal_on_all_ranks(backend, 3, "after step 1")
    frames[3] = {}
    with pytest.raises(ContractError, match="rank 3 holds another number of tensors"):
        ContractChecks().equal_on_all_ranks(backend, 3, "after step 1")
