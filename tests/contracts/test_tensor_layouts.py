"""Ranks that share a model train it as one process does, alone and beside ranks with other rows: the
trainings of `tests/support/layouts.py`, which are PEFT's by `test_layouts.py`, on threads; PEFT itself
on a real model's weights.

`tests/models/test_tensor_parallel.py` has the model's own share of this, `test_layouts.py` whole commands
in processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.quantization.linear import quantization_facts
from lorry.adapters.spec import LoraSpec
from lorry.backends.distributed.ddp import DataParallelBackend
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.backends.protocol import GradientRule, Task
from lorry.config.schema.backend import TrainBackendConfig
from lorry.config.schema.model import ModelConfig
from lorry.data.batch import TokenizedExample
from lorry.errors import ConfigError, ContractError
from lorry.models.loading.load import load_model
from lorry.models.loading.open import open_model
from lorry.models.scoring.score import FinalHidden, TokenScore, log_prob
from lorry.notes import ignore_note
from lorry.tasks.unlearn.gradients import GradientRectified, SharpnessAware
from lorry.train.checks import ContractChecks
from lorry.train.finish import contract_targets
from lorry.train.setup.base import open_base
from tests.support import tiny, tinyrun
from tests.support.layouts import (
    ALPHA,
    ONE,
    RATE,
    STEPS,
    TWO,
    forget_and_retain,
    mixed,
    steps_of,
    trained,
    uneven,
)
from tests.support.seam import Fixed, Npo
from tests.support.shared_data import find_stories
from tests.support.threads import Meeting, ThreadCommunicator, ThreadRanks, on_mesh
from tests.support.tiny import one_thread  # noqa: F401 - a fixture

STORIES = find_stories()
ALL = {"default": LoraSpec(r=3, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.1)}


@pytest.fixture(autouse=True)
def no_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tests of their own."""
    monkeypatch.setenv("LORRY_PROOFS", "0")


@cache
def folder_of(name: str, root: Path, **sizes: int) -> Path:
    """A directory of a tiny model whose vocabulary and heads two and four ranks can share."""
    more = {"num_key_value_heads": 4} if "num_key_value_heads" in tiny.VARIANTS[name] else {}
    inner = tiny.fresh(name, vocab_size=64, **more, **sizes)
    return tiny.directory(inner, root / "-".join([*name.split(), *map(str, sizes.values())]))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def backend_of(
    folder: Path,
    specs: Mapping[str, LoraSpec],
    dtype: torch.dtype,
    communicator: ThreadCommunicator | None = None,
    ranks: ThreadRanks | None = None,
    gradient: GradientRule | None = None,
    kind: type[DataParallelBackend] = DataParallelBackend,
    quantize: str | None = None,
) -> LocalBackend:
    model = load_model(
        folder, dtype=dtype, device="cpu", ranks=ranks, quantize=quantize, add_note=ignore_note
    ).model
    for name, spec in specs.items():
        attach(model, spec, name)
    settings = OptimSettings()
    if communicator is None:
        return LocalBackend(model, list(specs), settings, gradient=gradient)
    return kind(model, list(specs), settings, gradient=gradient, communicator=communicator)


class Training(NamedTuple):
    """What a training came to on a rank: losses, norms, and the state that a checkpoint has."""

    losses: Tensor
    norms: Tensor
    state: dict[str, Tensor]


def training(backend: LocalBackend, task: Task) -> Training:
    made = trained(backend, task)
    state = {name: value.clone() for name, value in backend.state().items()}
    return Training(made["losses"], made["norms"], state)


def relative(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30))


def task_of(kind: str, specs: Mapping[str, LoraSpec]) -> Task:
    task: Task = (
        Npo(steps_of(forget_and_retain))
        if kind == "npo"
        else Fixed(steps_of(mixed if kind == "mixed" else uneven), list(specs))
    )
    return task


CASES = [
    # family, data ranks, tensor ranks, dtype, rows
    ("llama", 1, 2, torch.float64, "uneven"),
    ("llama", 1, 2, torch.float32, "uneven"),
    ("llama", 1, 4, torch.float64, "mixed"),
    ("llama", 2, 2, torch.float32, "mixed"),
    ("llama", 2, 2, torch.float64, "npo"),
    ("gpt2", 1, 2, torch.float64, "uneven"),
    ("gpt2", 2, 2, torch.float32, "uneven"),
    ("gpt_neox parallel", 1, 2, torch.float64, "uneven"),
    ("gpt_neox parallel", 1, 4, torch.float32, "uneven"),
]


@pytest.mark.parametrize(("name", "data", "tensor", "dtype", "kind"), CASES)
def test_ranks_that_share_a_model_are_one_process(
    root: Path, name: str, data: int, tensor: int, dtype: torch.dtype, kind: str
) -> None:
    """Five steps with dropout, of uneven micro-batches, of two adapters of other rank and depth with rows
    of the base, of a method with a reference: losses, norms, adapters and moments."""
    specs = TWO if kind == "mixed" else ALL
    folder = folder_of(name, root)
    one = training(backend_of(folder, specs, dtype), task_of(kind, specs))
    several = on_mesh(
        data,
        tensor,
        lambda communicator, ranks: training(
            backend_of(folder, specs, dtype, communicator, ranks), task_of(kind, specs)
        ),
    )
    loss, values = (1e-9, 1e-6) if dtype == torch.float64 else (1e-5, 1e-3)
    for rank in several:
        assert relative(rank.losses[0], one.losses[0]) < loss
        assert relative(rank.norms[0], one.norms[0]) < max(1e-6, loss)
        for adapter in specs:
            mine, theirs = (
                torch.cat(
                    [v.flatten() for k, v in t.state.items() if k.startswith(f"adapter/{adapter}/")]
                )
                for t in (rank, one)
            )
            assert relative(mine, theirs) < values
        assert {k: v.shape for k, v in rank.state.items()} == {
            k: v.shape for k, v in one.state.items()
        }
        # what a checkpoint has is the same bits on every rank
        floats = [k for k, v in rank.state.items() if v.is_floating_point()]
        assert all(torch.equal(rank.state[k], several[0].state[k]) for k in floats)


@pytest.mark.parametrize(
    ("name", "quantize", "tensor"),
    [
        ("llama", "nf4", 2),
        ("llama", "int8", 4),
        ("gpt2", "nf4", 2),
        ("gpt_neox parallel", "int8", 2),
    ],
)
def test_packed_matrices_are_shared(root: Path, name: str, quantize: str, tensor: int) -> None:
    """In float64: each rank opens its part to the values that one process opens, and an adapter's files
    say that it is the same base. Each side of a matrix holds whole blocks of 64 values per rank."""
    sizes = {"n_embd": 128} if name == "gpt2" else {"hidden_size": 128, "intermediate_size": 256}
    folder = folder_of(name, root, **sizes)
    opened = partial(backend_of, folder, ALL, torch.float64, quantize=quantize)

    def work(
        communicator: ThreadCommunicator | None, ranks: ThreadRanks | None
    ) -> tuple[Training, str, object]:
        backend = opened(communicator, ranks)
        facts = base_digest(backend.model), quantization_facts(backend.model)
        return training(backend, task_of("uneven", ALL)), *facts

    one, *facts = work(None, None)
    for rank, *mine in on_mesh(1, tensor, work):
        assert mine == facts
        assert relative(rank.losses[0], one.losses[0]) < 1e-9
        assert relative(rank.norms[0], one.norms[0]) < 1e-6
        names = [key for key in one.state if key.startswith("adapter/default/")]
        got, true = (torch.cat([t.state[key].flatten() for key in names]) for t in (rank, one))
        assert relative(got, true) < 1e-6


def test_a_gradient_rule_sees_the_whole_gradient(root: Path) -> None:
    """Its dots and norms are over all ranks: GRU, which projects, and SAM, which steps by a norm."""
    folder = folder_of("llama", root)
    for make in (GradientRectified, lambda: SharpnessAware({"default": 0.05})):
        one = training(backend_of(folder, ONE, torch.float64, gradient=make()), task_of("npo", ONE))
        several = on_mesh(
            1,
            2,
            lambda communicator, ranks, make=make: training(
                backend_of(folder, ONE, torch.float64, communicator, ranks, make()),
                task_of("npo", ONE),
            ),
        )
        for rank in several:
            assert relative(rank.norms, one.norms) < 1e-6
            assert relative(rank.losses, one.losses) < 1e-6


def test_scores_and_answers_of_ranks(root: Path) -> None:
    folder, batches = folder_of("gpt2", root), Fixed(steps_of(uneven)).step_batches(0, {})
    wants = {"logprob": TokenScore(log_prob), "hidden": FinalHidden()}
    one = backend_of(folder, ALL, torch.float64).score(batches, wants)
    several = on_mesh(
        2,
        2,
        lambda communicator, ranks: backend_of(
            folder, ALL, torch.float64, communicator, ranks
        ).score(batches, wants),
    )
    for rank in several:
        for mine, theirs in zip(rank, one, strict=True):
            assert all(relative(mine[key], value) < 1e-9 for key, value in theirs.items())


# --- checkpoints


def test_a_checkpoint_is_that_of_one_process(root: Path) -> None:
    """Two steps on two ranks, two on one process, one on four: as five on one."""
    folder, task = folder_of("gpt_neox parallel", root), Fixed(steps_of(uneven))

    def go_on(backend: LocalBackend, state: dict[str, Tensor], steps: range) -> dict[str, Tensor]:
        if state:
            backend.load_state(state)
        for step in steps:
            backend.forward_backward(task.step_batches(step, {}), task, step)
            backend.step({"default": RATE})
        return {name: value.clone() for name, value in backend.state().items()}

    def on(tensor: int, state: dict[str, Tensor], steps: range) -> dict[str, Tensor]:
        return on_mesh(
            1,
            tensor,
            lambda communicator, ranks: go_on(
                backend_of(folder, ALL, torch.float64, communicator, ranks), state, steps
            ),
        )[-1]

    whole = go_on(backend_of(folder, ALL, torch.float64), {}, range(STEPS))
    state = on(2, {}, range(1))
    state = go_on(backend_of(folder, ALL, torch.float64), state, range(1, STEPS - 1))
    state = on(4, state, range(STEPS - 1, STEPS))
    for name, value in whole.items():
        if value.is_floating_point():
            assert relative(state[name], value) < 1e-5, name


# --- what cannot be shared


def test_base_weights_do_not_train_on_ranks_that_share_them(tmp_path: Path) -> None:
    """Told before the model is read."""
    run = tinyrun.described(tmp_path / "nowhere", tmp_path / "rows", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"lora=null with backend\.tensor_parallel=2"):
        open_base(run.model_copy(update={"lora": None}), print, ThreadRanks(0, 2, Meeting(2)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "ddp", "sequence_parallel": True}, "needs tensor_parallel above 1"),
        ({"name": "single", "tensor_parallel": 2}, "tensor_parallel=2 needs backend=ddp"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainBackendConfig.model_validate(settings)


# --- what goes wrong on one rank


class KeepsItsPart(DataParallelBackend):
    """The sides that every rank has are not added up."""

    def _add_up_partial_sums(self, *given: Any) -> None:
        return


class OtherSide(DataParallelBackend):
    """Tensor rank 1 has another B of a row-parallel linear."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        if self.communicator.rank == 1:
            tensors = self.owners["default"].split_like(self.owners["default"].values)
            next(t for n, t in tensors.items() if n.endswith("dense.lora_B"))[0, 0] += 1e-3


@pytest.mark.parametrize(
    ("kind", "number", "words"),
    [
        (KeepsItsPart, 3, "after step 1 rank 1 holds another adapter/default/gpt_neox"),
        (OtherSide, 2, "before the first step rank 1 holds another adapter/default/gpt_neox"),
    ],
)
def test_a_side_that_differs_between_ranks_is_found(
    root: Path, kind: type[DataParallelBackend], number: int, words: str
) -> None:
    """By the contract that compares what trains, before the first step and after it."""
    folder, task = folder_of("gpt_neox parallel", root), Fixed(steps_of(uneven))

    def work(communicator: ThreadCommunicator, ranks: ThreadRanks | None) -> None:
        checks = ContractChecks()
        backend = backend_of(folder, ALL, torch.float32, communicator, ranks, kind=kind)
        checks.begin(backend, contract_targets(backend.model, ["default"]))
        checks.equal_on_all_ranks(backend, 2, "before the first step")
        backend.forward_backward(task.step_batches(0, {}), task, 0)
        backend.step({"default": RATE})
        checks.equal_on_all_ranks(backend, 3, "after step 1")

    with pytest.raises(ContractError) as raised:
        on_mesh(1, 2, work)
    assert raised.value.contract == number
    assert words in str(raised.value)


# --- real weights, against PEFT in one process


def stories(n: int, vocab: int) -> list[TokenizedExample]:
    draw = torch.Generator().manual_seed(n)
    rows = torch.randint(3, vocab, (n, 24), generator=draw).tolist()
    return [TokenizedExample(row, [0.0, *[1.0] * 23], key=i) for i, row in enumerate(rows)]


def peft_training(folder: Path, start: LocalBackend, rows: list[TokenizedExample]) -> list[float]:
    """Losses of the same steps by transformers, PEFT and torch.optim in float32."""
    inner = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = get_bank(start.model)["default"]
    spec = adapter.spec
    config = LoraConfig(r=spec.r, lora_alpha=spec.lora_alpha, target_modules=list(PROJECTIONS))
    wrapped = get_peft_model(inner, config)
    params = dict[str, nn.Parameter]()
    for key, p in wrapped.named_parameters():
        if p.requires_grad:
            name = key.removeprefix("base_model.model.").replace(".default.weight", "")
            params[name] = p
            p.data.copy_(adapter.tensors()[name])
    adamw, losses = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.0), list[float]()
    for _ in range(3):
        tokens = torch.tensor([list(row.tokens) for row in rows])
        logp = wrapped(tokens).logits[:, :-1].log_softmax(-1)
        loss = -logp.gather(2, tokens[:, 1:, None]).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        adamw.step()
        adamw.zero_grad()
    return losses


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN = {"default": LoraSpec(r=4, lora_alpha=8, target_modules=PROJECTIONS)}


def three_steps(backend: LocalBackend, rows: list[TokenizedExample]) -> list[float]:
    task = Fixed([[rows]] * 3)
    losses = list[float]()
    for step in range(3):
        stats = backend.forward_backward(task.step_batches(step, {}), task, step)
        backend.step({"default": 1e-3})
        losses.append(stats.loss["default"])
    return losses


@pytest.mark.skipif(STORIES is None, reason="shared data not found (set LORRY_DATA)")
@pytest.mark.parametrize("size", [2, 4])
def test_stories_on_ranks_are_those_of_peft(size: int) -> None:
    """stories260K (8 heads, 4 KV heads, an MLP of 172, 512 tokens), three steps."""
    assert STORIES is not None
    rows = stories(4, 512)
    truth = peft_training(STORIES, backend_of(STORIES, PLAIN, torch.float32), rows)
    several = on_mesh(
        1,
        size,
        lambda communicator, ranks: three_steps(
            backend_of(STORIES, PLAIN, torch.float32, communicator, ranks), rows
        ),
    )
    for losses in several:
        assert losses == pytest.approx(truth, rel=1e-5)


@pytest.mark.slow
def test_smollm2_on_three_ranks_is_that_of_peft() -> None:
    """The embedded model, 9 heads and 3 KV heads, three steps in float32: losses, and what of the base a
    rank holds."""
    config = ModelConfig(name="smollm2-135m-instruct", dtype="float32", device="cpu")
    opened = open_model(config, ignore_note)
    folder, rows = Path(opened.source["path"]), stories(2, 4096)
    attach(opened.model, PLAIN["default"])
    start = LocalBackend(opened.model, ["default"], OptimSettings())
    truth = peft_training(folder, start, rows)
    whole = sum(p.nbytes for p in opened.model.parameters())

    def work(communicator: ThreadCommunicator, ranks: ThreadRanks | None) -> tuple[Any, float]:
        backend = backend_of(folder, PLAIN, torch.float32, communicator, ranks)
        held = sum(p.untyped_storage().nbytes() for p in backend.model.parameters())
        return three_steps(backend, rows), held / whole

    for losses, share in on_mesh(1, 3, work):
        assert losses == pytest.approx(truth, rel=1e-5)
        assert share < 0.36
