"""A run on Megatron-core's layers, of two processes that share a model or have different rows, is the run
of one on ours, and PEFT's on transformers'.

A pair of processes is started once and makes everything of `tests/support/megatron_layouts.py`, with the
shim of `tests/support/cuda_shim.py` in place of a GPU; one process makes the same trainings here, without
Megatron, and PEFT those of each family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

from lorry import cli
from lorry.adapters.attach import get_bank
from lorry.train.session import train_run
from tests.support import megatron_layouts as layouts
from tests.support import tinyrun
from tests.support.layouts import ALPHA, RATE, STEPS, WIDE, uneven
from tests.support.ranks import run_ranks
from tests.support.shared_data import find_stories
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

# of a whole pair: far above what it takes, far below the suite's limit
pytestmark = pytest.mark.timeout(600)

RUN: dict[str, Any] = {
    "lora_dropout": 0.1,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "test_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
}
# by dtype, how far the first loss, the norms and the values may differ, relatively
BOUNDS = {"float32": (1e-5, 1e-5, 1e-3), "float64": (1e-9, 1e-6, 1e-6)}


class Pair(NamedTuple):
    """What two processes came to: tensors and endings by rank, what each said, the folder."""

    tensors: list[dict[str, Tensor]]
    endings: list[dict[str, Any]]
    printed: list[tuple[str, str]]
    folder: Path


def words(verb: str, folder: str, **settings: Any) -> list[str]:
    given = {
        "model": "FOLDER/qwen2",
        "data": "FOLDER/data.jsonl",
        "output_dir": f"FOLDER/{folder}-LAYOUT",
        **tinyrun.DEFAULTS,
        "backend": "megatron",
        **settings,
    }
    return [verb, *(f"{name}={value}" for name, value in given.items())]


COMMANDS = {
    "run": words("sft", "run", **RUN, keep_total="true"),
    "eval": [
        "eval",
        "FOLDER/run-LAYOUT",
        "data=FOLDER/data.jsonl",
        "device=cpu",
        "backend=megatron",
        "output_dir=FOLDER/eval-LAYOUT",
    ],
    "gpt2": words("sft", "none", model="FOLDER/gpt2", max_steps=1),
    "one KV head": words("sft", "none", model="FOLDER/odd", max_steps=1),
    "whole": [word for word in words("sft", "none", lora="null") if not word.startswith("r=")],
    "unlearn": [
        word.replace("data=", "forget=") for word in words("unlearn", "none", method="GradAscent")
    ],
}
REFUSED = {
    "gpt2": "backend=megatron runs models of the families llama, qwen2, qwen3, and not this one (of "
    "the family gpt2)",
    "whole": "lora=null trains the base, which backend=megatron keeps frozen",
    "unlearn": "backend=megatron is for lorry sft and eval, not for unlearn",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("megatron")
    layouts.write_models(folder, find_stories())
    tinyrun.model_directory(folder / "gpt2", "gpt2")
    tinyrun.model_directory(folder / "odd")
    tinyrun.write_rows(folder / "data.jsonl", tinyrun.rows(16))
    (folder / "commands.json").write_text(json.dumps(COMMANDS))
    printed = run_ranks("tests.support.megatron_layouts", folder)
    return Pair(
        [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)],
        [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)],
        printed,
        folder,
    )


@pytest.fixture(scope="module")
def alone(pair: Pair, quick: None) -> Mapping[str, Tensor]:  # noqa: F811 - the fixture
    return layouts.trainings(pair.folder, partial(layouts.start, None, pair.folder))


def relative(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30))


def compare(mine: Mapping[str, Tensor], true: Mapping[str, Tensor], dtype: str) -> None:
    loss, norm, values = BOUNDS[dtype]
    assert relative(mine["losses"][0], true["losses"][0]) < loss
    assert relative(mine["norms"], true["norms"]) < norm
    for name in true.keys() - {"losses", "norms"}:
        assert relative(mine[name], true[name]) < values, name


def of_training(tensors: Mapping[str, Tensor], training: str) -> dict[str, Tensor]:
    start = f"{training}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


TRAININGS = {
    **{f"{family} {dtype}": dtype for family in layouts.FAMILIES for dtype in BOUNDS},
    "two adapters with dropout": "float32",
    "recompute": "float32",
    "ends": "float32",
}


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("training", TRAININGS)
def test_two_processes_on_megatrons_layers_are_one_on_ours(
    pair: Pair, alone: Mapping[str, Tensor], layout: str, training: str
) -> None:
    """Uneven micro-batches, biases of q, k and v, norms of q and k, a tied head, two adapters of other
    rank and depth with dropout and rows of the base alone, layers that are run again, adapters on
    embedding and head."""
    ranks = [of_training(each, f"{layout}/{training}") for each in pair.tensors]
    for mine in ranks:
        compare(mine, of_training(alone, training), TRAININGS[training])
        assert all(torch.equal(mine[name], ranks[0][name]) for name in mine)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_real_model_is_that_of_one_process(
    pair: Pair,
    alone: Mapping[str, Tensor],
    dtype: str,
    stories: Path,  # skips without it
) -> None:
    """stories260K, five layers whose heads share keys and values."""
    training = f"{layouts.STORIES} {dtype}"
    for layout in layouts.LAYOUTS:
        for each in pair.tensors:
            compare(of_training(each, f"{layout}/{training}"), of_training(alone, training), dtype)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_scores_and_answers_are_those_of_one(
    pair: Pair, alone: Mapping[str, Tensor], layout: str
) -> None:
    scores = [name for name in alone if name.startswith("scores")]
    answers = [name for name in alone if name.startswith("answers/")]
    assert (len(scores), [alone[name].numel() for name in answers]) == (12, [3, 6, 1])
    for mine in pair.tensors:
        for name in scores:
            torch.testing.assert_close(mine[f"{layout}/{name}"], alone[name], rtol=1e-5, atol=1e-5)
        assert all(torch.equal(mine[f"{layout}/{name}"], alone[name]) for name in answers)


# --- transformers and PEFT


def norm_in_its_dtype(self: Any, hidden: Tensor) -> Tensor:
    """RMSNorm without the rounding to float32 that transformers' has."""
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", norm_in_its_dtype)


def peft_training(folder: Path, family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The training of fp32 masters by transformers, PEFT and torch.optim in one process, each row by
    itself."""
    inner = AutoModelForCausalLM.from_pretrained(folder / family, dtype=dtype)
    ours = get_bank(layouts.start(None, folder, family, WIDE).model)["default"]
    targets = sorted({name.split(".")[-1] for name in ours.slots})
    config = LoraConfig(r=3, lora_alpha=ALPHA, target_modules=targets)
    wrapped = get_peft_model(inner, config, autocast_adapter_dtype=False)
    copies = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p
        for name, p in wrapped.named_parameters()
        if p.requires_grad
    }
    assert copies.keys() == ours.tensors().keys()
    # masters are float32 in any dtype of the base, as their moments are
    masters = {name: torch.nn.Parameter(v.clone()) for name, v in ours.tensors().items()}
    adamw = torch.optim.AdamW(masters.values(), lr=RATE, weight_decay=0.0)
    losses, norms = list[float](), list[float]()
    for step in range(STEPS):
        for name, copy in copies.items():
            copy.data.copy_(masters[name])
            copy.grad = None
        rows = [row for batch in uneven(step) for row in batch]
        total, weight = torch.zeros((), dtype=dtype), sum(sum(r.weights) for r in rows)
        for row in rows:
            tokens = torch.tensor(row.tokens)
            logp = wrapped(tokens[None]).logits[0].log_softmax(-1)
            picked = logp[:-1].gather(1, tokens[1:, None])[:, 0]
            total = total - (picked * torch.tensor(row.weights[1:])).sum() / weight
        total.backward()
        for name, copy in copies.items():
            assert copy.grad is not None
            masters[name].grad = copy.grad.float()
        losses.append(total.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)))
        adamw.step()
    values = torch.cat([masters[name].detach().flatten() for name in ours.tensors()])
    return {
        "losses": torch.tensor(losses, dtype=torch.float64)[:, None],
        "norms": torch.tensor(norms, dtype=torch.float64)[:, None],
        "values/default": values,
    }


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", layouts.FAMILIES)
def test_two_processes_are_peft_in_one(pair: Pair, exact: None, family: str, dtype: str) -> None:
    truth = peft_training(pair.folder, family, getattr(torch, dtype))
    for layout in layouts.LAYOUTS:
        compare(of_training(pair.tensors[0], f"{layout}/{family} {dtype}"), truth, dtype)


# --- what is left out on purpose


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        # a rank of two has one KV group of the two, in which thirds are the same
        ("thirds", ["data 2"]),
        ("up before gate", ["tensor 2", "data 2"]),
        ("sum of cut rows", ["tensor 2"]),
        ("sum of cut columns", ["tensor 2"]),
        ("added up twice", ["tensor 2"]),
        ("terms left out", ["tensor 2", "data 2"]),
    ],
)
def test_layers_that_compute_otherwise_are_found_before_a_model_is_read(
    pair: Pair, fault: str, seen: list[str]
) -> None:
    for layout in layouts.LAYOUTS:
        for ended in pair.endings:
            told = ended[layout][fault]
            if layout in seen:
                assert "layers of this backend do not train a small copy" in told
            else:
                assert told == ""


# --- whole commands


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_run_is_the_run_of_one_device(pair: Pair, layout: str, tmp_path: Path) -> None:
    """With dropout, evaluations, checkpoints and samples; one device without Megatron goes on from its
    checkpoint."""
    assert [ended[f"run {layout}"] for ended in pair.endings] == [0, 0]
    run = pair.folder / f"run-{layout.replace(' ', '-')}"
    here = partial(tinyrun.described, pair.folder / "qwen2", pair.folder / "data.jsonl")
    one = train_run(here(tmp_path / "one", **RUN), [])
    for two, single in zip(tinyrun.lines(run), tinyrun.lines(one.path), strict=True):
        for name in single.keys() - {"seconds", "peak_memory_bytes"}:
            assert two[name] == pytest.approx(single[name], rel=1e-4, abs=1e-6), name
    weights = [load_file(path / "adapter_model.safetensors") for path in (run, one.path)]
    assert max(relative(weights[0][name], weights[1][name]) for name in weights[1]) < 1e-3
    beside = {"report.html", "report.png", "evaluation.json"}  # of commands, not of `train_run`
    names = [{path.name for path in each.iterdir()} for each in (run, one.path)]
    assert names[0] - beside == names[1]
    config, samples = (
        [json.loads((path / name).read_text()) for path in (run, one.path)]
        for name in ("adapter_config.json", "samples.json")
    )
    assert config[0] == config[1]
    for two_of, one_of in zip(*samples, strict=True):
        for side in ("before", "after"):
            # shorter here: see `quick`. A character may be cut in two at its end
            answers = [each[side] for each in (two_of, one_of)]
            if answers[1] is None:  # not asked
                assert answers[0] is None
            else:
                assert answers[0].startswith(answers[1].rstrip("\ufffd"))
    facts = [json.loads((path / "receipt.json").read_text()) for path in (run, one.path)]
    for name in ("trainable_parameters", "total_parameters", "base"):
        assert facts[0][name] == facts[1][name], name
    contracts = json.loads((run / "contracts.json").read_text())
    assert [contract["status"] for contract in contracts] == ["held"] * 8
    newest = str(run / "checkpoints" / "step-00000004")
    again = train_run(here(tmp_path / "on", **RUN, resume_from_checkpoint=newest), [])
    resumed = load_file(again.path / "adapter_model.safetensors")
    # the state of all steps was read: nothing is left to train
    assert all(torch.equal(resumed[name], weights[0][name]) for name in resumed)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_an_evaluation_is_that_of_one_device(pair: Pair, layout: str, tmp_path: Path) -> None:
    """Scores and generated answers of the run, before and after."""
    assert [ended[f"eval {layout}"] for ended in pair.endings] == [0, 0]
    place = layout.replace(" ", "-")
    run, data = pair.folder / f"run-{place}", pair.folder / "data.jsonl"
    assert cli.main(["eval", str(run), f"data={data}", "device=cpu", f"output_dir={tmp_path}"]) == 0
    two, one = (
        json.loads((folder / "results.json").read_text())["sides"]
        for folder in (pair.folder / f"eval-{place}", tmp_path)
    )
    assert list(two) == list(one) == ["base", run.name]
    for side in one:
        mine, true = two[side]["metrics"], one[side]["metrics"]
        assert mine.keys() == true.keys() >= {"loss", "rouge_l"}
        assert mine == pytest.approx(true, rel=1e-4), side


@pytest.mark.parametrize("command", REFUSED)
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_what_cannot_run_is_refused_by_name(pair: Pair, layout: str, command: str) -> None:
    assert [ended[f"{command} {layout}"] for ended in pair.endings] == [2, 2]
    assert pair.printed[0][1].count(REFUSED[command]) == len(layouts.LAYOUTS)
    assert not (pair.folder / "none-tensor-2").exists()


def test_sizes_that_do_not_divide_are_refused(pair: Pair) -> None:
    for ended in pair.endings:
        assert ended["one KV head tensor 2"] == 2
        assert ended["one KV head data 2"] == 0
    assert "tensor_parallel=2 does not divide 1 KV heads" in pair.printed[0][1]
