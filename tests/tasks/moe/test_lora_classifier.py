"""A classifier of prompts that trains with a LoRA of the base, against the same of transformers and
PEFT: class logits and gradients. Float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lorry
from lorry.adapters.attach import get_bank
from lorry.adapters.routing.lora_classifier import LoraClassifier, attach_lora_classifier
from lorry.adapters.routing.sequence import PromptRule
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.config.schema.model import ModelConfig
from lorry.data.batch import Batch, TokenizedExample, collate
from lorry.errors import ConfigError
from lorry.evaluate.loss import evaluate_task
from lorry.models.causal_lm import CausalLM, prompt_gates
from lorry.models.loading.open import open_model
from lorry.tasks.moe.classifier import PromptClassTask
from tests.support import tinyrun

EXPERTS = ("one", "two", "three")
TARGETS = ["q_proj", "v_proj", "down_proj"]
# prompts with the expert each is of; the answers' first token, which nothing reads, is 9
PROMPTS = [([5, 9, 3], 0), ([7, 1, 8, 2, 6], 1), ([4, 4], 2), ([3, 8, 1, 250], 0), ([6, 2, 5], 2)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyrun.model_directory(tmp_path_factory.mktemp("base") / "model", num_hidden_layers=3)


class Rows:
    """The stream of a task: every prompt in one step, of two micro-batches."""

    def batches(self, step: int) -> list[Batch]:
        examples = [
            TokenizedExample([*p, 9], [0.0] * len(p) + [1.0], key=n, role=EXPERTS[k])
            for n, (p, k) in enumerate(PROMPTS)
        ]
        return [collate(examples[:2]), collate(examples[2:])]


def classifier(
    base: Path, rule: PromptRule, hidden: list[int], native: bool = True, **spec: Any
) -> tuple[CausalLM, LoraClassifier]:
    """Over three experts of random values, the adapter's B and all else random, too."""
    opened = open_model(
        ModelConfig(name=str(base), dtype="float32", native=native), lambda note: None
    )
    model, generator = opened.model, torch.Generator().manual_seed(5)
    for name in EXPERTS:
        adapter = lorry.attach(model, lorry.LoraSpec(r=2, target_modules=TARGETS), name)
        adapter.values.copy_(torch.randn(adapter.values.shape, generator=generator))
    router = attach_lora_classifier(
        model,
        EXPERTS,
        rule,
        lorry.LoraSpec(**{"r": 3, "lora_alpha": 5.0, "target_modules": TARGETS, **spec}),
        tinyrun.WIDTH,
        hidden=hidden,
    )
    router.start(0.3 + torch.randn(6, tinyrun.WIDTH, generator=generator), seed=2)
    with torch.no_grad():
        router.values.copy_(0.2 * torch.randn(router.values.shape, generator=generator))
    router.touch()
    return model, router


def task_of(router: LoraClassifier) -> PromptClassTask:
    rows: Any = Rows()
    return PromptClassTask(rows, rows.batches(0), 1, ["router"], router=router)


def twin_of(base: Path, router: LoraClassifier) -> Any:
    """PEFT's model of the base with the same adapter."""
    layers = sorted({int(m.split(".")[2]) for m in router.adapter.slots})
    settings = peft.LoraConfig(
        r=3, lora_alpha=5.0, target_modules=TARGETS, layers_to_transform=layers
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base).float(), settings)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in router.adapter.tensors().items():
            module, _, side = name.rpartition(".")
            own[f"base_model.model.{module}.{side}.default.weight"].copy_(value)
    return model


def twin_logits(model: Any, router: LoraClassifier, head: dict[str, Tensor]) -> Tensor:
    """[S,K] by plain torch, a prompt at a time."""
    states = []
    for tokens, _ in PROMPTS:
        out = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        # transformers' last entry is behind the final norm, those before it layers' inputs
        hidden = out[-1 if router.layer is None else router.layer + 1][0]
        states.append(hidden[-1] if router.pooling == "last" else hidden.mean(0))
    x = (torch.stack(states) - router.mean) / router.deviation
    last = len(head) // 2 - 1
    for n in range(last + 1):
        x = x @ head[f"{n}.weight"].T + head[f"{n}.bias"]
        x = x.relu() if n < last else x
    return x


def near(mine: Tensor, theirs: Tensor, what: str) -> None:
    worst, largest = float((mine - theirs).abs().max()), float(theirs.abs().max())
    assert largest > 0
    assert worst <= 1e-5 * largest, f"{what}: {worst} of {largest}"


@pytest.mark.parametrize(
    ("layer", "pooling", "hidden", "native", "recompute"),
    [
        (1, "last", [], True, False),
        (None, "mean", [6], True, True),
        (1, "mean", [6], False, False),
        (None, "last", [], False, True),
    ],
)
def test_equal_to_peft(
    base: Path, layer: int | None, pooling: str, hidden: list[int], native: bool, recompute: bool
) -> None:
    """Loss, logits, gradients of the adapter and of the classifier; gates of what answers."""
    model, router = classifier(base, PromptRule(layer, pooling, top_k=2), hidden, native)
    model.gradient_checkpointing = recompute
    task = task_of(router)
    backend = LocalBackend(model, ["router"], OptimSettings())
    stats = backend.forward_backward(task.step_batches(0, {}), task, 0)
    mine = {name: grad.clone() for name, grad in router.split_like(router.grads).items()}

    twin = twin_of(base, router)
    head = {
        name: router.params[f"classifier_{name}"].detach().clone().requires_grad_()
        for name in router.head_names
    }
    logits = twin_logits(twin, router, head)
    labels = torch.tensor([k for _, k in PROMPTS])
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = torch.stack([nll[labels == k].mean() for k in range(3)]).mean()
    loss.backward()
    assert stats.loss["router"] == pytest.approx(loss.item(), rel=1e-5)
    for name in router.head_names:
        near(mine[f"classifier_{name}"], head[name].grad, name)  # type: ignore[arg-type]
    own = dict(twin.named_parameters())
    assert len(router.adapter.slots) == len(TARGETS) * (3 if layer is None else layer + 1)
    for name in router.adapter.tensors():
        module, _, side = name.rpartition(".")
        near(mine[name], own[f"base_model.model.{module}.{side}.default.weight"].grad, name)

    evaluated = evaluate_task(backend, task)
    assert evaluated["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    # of words nothing was predicted
    assert "eval_perplexity" not in evaluated
    with torch.no_grad():
        found = prompt_gates(model, [tokens for tokens, _ in PROMPTS], router)
    best = logits.detach().softmax(-1).topk(2, -1)
    chosen = torch.zeros(len(PROMPTS), 3).scatter(
        -1, best.indices, best.values / best.values.sum(-1, keepdim=True)
    )
    near(found, chosen, "gates")
    # the adapter is not in the experts' answers
    assert [term.adapter for term in router.mix().terms] == list(EXPERTS)


def test_what_it_cannot_be(base: Path) -> None:
    """A layer that is not run, and an expert of the router's name."""
    with pytest.raises(ConfigError, match="names layer 2, and the output of layer 1 is read"):
        classifier(base, PromptRule(1), [], layers_to_transform=[0, 2])
    model, router = classifier(base, PromptRule(0), [], layers_to_transform=0)
    assert {path.split(".")[2] for path in router.adapter.slots} == {"0"}
    assert get_bank(model).routers["router"] is router
    with pytest.raises(ConfigError, match="cannot be called 'router'"):
        attach_lora_classifier(model, EXPERTS, PromptRule(0), lorry.LoraSpec(), tinyrun.WIDTH)
