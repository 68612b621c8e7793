"""`router.train_experts`: experts that train with their router, against plain autograd and AdamW in
float64 on transformers; what of contract 3 is theirs."""

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
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import get_bank
from lorry.adapters.router import ROUTER_NAME, TokenRouter
from lorry.config import RouterRunConfig, parse_settings
from lorry.data.batch import Batch
from lorry.errors import ConfigError, ContractError
from lorry.models.loading.open import OpenedModel
from lorry.notes import ignore_note
from lorry.train.engine import TrainingEngine
from lorry.train.finish import contract_targets
from lorry.train.session import train_run
from lorry.train.setup.adapters import attach_jobs
from lorry.train.setup.base import open_base
from lorry.train.setup.loop import build_engine
from lorry.train.setup.notebook import Notebook
from lorry.train.setup.rows import prepare_jobs
from tests.support.mixtures import NAMES, mixture_run
from tests.support.verbworld import model_directory

RULES: dict[str, dict[str, Any]] = {
    "top1-st": {"top_k": 1, "straight_through": True},
    "top2": {"top_k": 2},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and in `mix` three experts of random values with rows of their own; not to be changed."""
    folder = tmp_path_factory.mktemp("experts")
    mixture_run(folder / "mix", model_directory(folder / "base"))
    return folder


def described(world: Path, output: Path, *settings: str, **router: Any) -> RouterRunConfig:
    """The training of a router and of the experts in `mix`."""
    words = [
        str(world / "mix" / "run.yaml"),
        f"output_dir={output}",
        "model.dtype=float32",
        "backend.threads=1",
        *(f"router.{k}={json.dumps(v)}" for k, v in {"train_experts": True, **router}.items()),
        *settings,
    ]
    return parse_settings(RouterRunConfig, words, ignore_note)


def made(run: RouterRunConfig) -> tuple[OpenedModel, TrainingEngine]:
    """The run before its first step."""
    notebook = Notebook()
    opened = open_base(run, ignore_note)
    jobs = prepare_jobs(run, attach_jobs(run, opened, ignore_note), opened, notebook)
    return opened, build_engine(run, opened, jobs, notebook)


class Twin:
    """transformers' model in float64, whose MLPs are written out with experts and gates."""

    def __init__(self, base: Path, opened: OpenedModel, run: RouterRunConfig) -> None:
        bank = get_bank(opened.model)
        router = bank.routers[ROUTER_NAME]
        assert isinstance(router, TokenRouter)
        self.theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        self.settings = run.router
        self.experts = {
            name: {n: t.detach().double().requires_grad_() for n, t in bank[name].tensors().items()}
            for name in NAMES
        }
        self.router = {n: t.detach().double().requires_grad_() for n, t in router.tensors().items()}
        self.logits: list[Tensor] = []
        for i, layer in enumerate(self.theirs.model.layers):
            layer.mlp.forward = partial(self.mlp, i, layer.mlp)

    def sets(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {ROUTER_NAME: self.router, **self.experts}

    def mlp(self, i: int, module: Any, x: Tensor) -> Tensor:
        z = x @ self.router[f"layers.{i}.mlp.weight"].t()
        p = z.softmax(-1)
        value, chosen = p.topk(self.settings.top_k, -1)
        if self.settings.straight_through:
            value = 1 + value - value.detach()
        else:
            value = value / value.sum(-1, keepdim=True)
        gates = torch.zeros_like(p).scatter(-1, chosen, value)
        self.logits.append(z)

        def linear(name: str, y: Tensor, g: Tensor) -> Tensor:
            path, out = f"model.layers.{i}.mlp.{name}", F.linear(y, getattr(module, name).weight)
            for k, own in enumerate(self.experts.values()):
                if f"{path}.lora_A" in own:  # alpha is 2 r
                    low = y @ own[f"{path}.lora_A"].t() @ own[f"{path}.lora_B"].t()
                    out = out + g[..., k, None] * 2 * low
            return out

        def whole(g: Tensor) -> Tensor:
            inner = F.silu(linear("gate_proj", x, g)) * linear("up_proj", x, g)
            return linear("down_proj", inner, g)

        if self.settings.level == "delta":
            return whole(gates)
        one = torch.eye(len(NAMES), dtype=torch.float64)
        return sum(gates[..., k, None] * whole(one[k]) for k in range(len(NAMES)))

    def loss(self, batches: list[Batch]) -> Tensor:
        """Each domain's mean over its supervised tokens, over K; labels' mean over tokens, layers."""
        nll = {name: torch.zeros((), dtype=torch.float64) for name in NAMES}
        counts, labels, tokens = dict.fromkeys(NAMES, 0.0), torch.zeros(()).double(), 0
        for batch in batches:
            for (start, stop), role in zip(batch.segments, batch.role, strict=True):
                self.logits = []
                ids, weights = batch.tokens[start:stop], batch.weights[start:stop].double()
                scores = self.theirs(input_ids=ids[None]).logits[0].log_softmax(-1)
                picked = scores[:-1].gather(1, ids[1:, None])[:, 0]
                nll[role] = nll[role] - (weights[1:] * picked).sum()
                counts[role] += float(weights.sum())
                own = torch.full((len(ids),), NAMES.index(role))
                layers = [F.cross_entropy(z[0], own, reduction="sum") for z in self.logits]
                labels, tokens = labels + sum(layers) / len(layers), tokens + len(ids)
        domains = sum(nll[name] / counts[name] for name in NAMES) / len(NAMES)
        return domains + self.settings.label_loss * labels / tokens


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("level", ["delta", "expert"])
def test_gradients_are_those_of_autograd(
    level: str, rule: str, world: Path, tmp_path: Path
) -> None:
    """Router, and A and B of each expert, of a packed step in float32, with recompute too: within
    1e-5 of float64."""
    run = described(world, tmp_path / "out", level=level, **RULES[rule])
    opened, engine = made(run)
    twin = Twin(world / "base", opened, run)
    batches = engine.task.step_batches(0, engine.models)
    assert len(batches[0].role) == 6  # packed: two rows of each domain
    expected = twin.loss(batches)
    expected.backward()
    owners: Any = engine.backend.owners  # type: ignore[attr-defined]  # of LocalBackend
    assert list(owners) == [ROUTER_NAME, *NAMES]
    for recompute in (False, True):
        opened.model.gradient_checkpointing = recompute
        stats = engine.backend.forward_backward(batches, engine.task, 0)
        assert stats.loss[ROUTER_NAME] == pytest.approx(float(expected.detach()), rel=1e-6)
        for name, tensors in twin.sets().items():
            found = owners[name].split_like(owners[name].grads)
            for tensor, master in tensors.items():
                if master.grad is None or not master.grad.any():
                    assert not found[tensor].any()
                    continue
                difference = (found[tensor].double() - master.grad).norm() / master.grad.norm()
                assert float(difference) < 1e-5, (name, tensor, recompute)
        engine.backend.discard()


def test_a_run_is_that_of_plain_adamw(world: Path, tmp_path: Path) -> None:
    """Three steps, each set clipped by its own norm, experts at a rate of their own: what is written is
    what torch's AdamW makes in float64, and the files that the experts came from stay."""
    before = {n: (world / "mix" / n / "adapter_model.safetensors").read_bytes() for n in NAMES}
    run = described(
        world,
        tmp_path / "out",
        *("train.max_steps=3", "train.warmup_ratio=0", "train.max_grad_norm=0.05"),
        *("train.weight_decay=0.1", "train.learning_rate=2e-3"),
        experts_learning_rate=5e-4,
    )
    opened, engine = made(run)
    twin = Twin(world / "base", opened, run)
    start = {name: [t.detach().clone() for t in s.values()] for name, s in twin.sets().items()}
    optimizers = {
        name: torch.optim.AdamW(list(s.values()), weight_decay=0.1)
        for name, s in twin.sets().items()
    }
    for step in range(3):
        twin.loss(engine.task.step_batches(step, engine.models)).backward()
        for name, optimizer in optimizers.items():
            torch.nn.utils.clip_grad_norm_(list(twin.sets()[name].values()), 0.05)
            # linear to 0, without warm-up
            rate = (2e-3 if name == ROUTER_NAME else 5e-4) * (3 - step) / 3
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    result = train_run(run)
    assert {c["status"] for c in result.contracts} == {"held"}
    written = {ROUTER_NAME: load_file(run.output_dir / "router" / "router.safetensors")} | {
        name: {
            key.removeprefix("base_model.model.").removesuffix(".weight"): value
            for key, value in load_file(run.output_dir / name / "adapter_model.safetensors").items()
        }
        for name in NAMES
    }
    for name, tensors in twin.sets().items():
        for (tensor, master), old in zip(tensors.items(), start[name], strict=True):
            moved = (master.detach() - old).norm()
            error = (written[name][tensor].double() - master.detach()).norm()
            assert float(error / moved) < 1e-3, (name, tensor)
    for name, content in before.items():
        assert (world / "mix" / name / "adapter_model.safetensors").read_bytes() == content


def test_the_best_step_is_that_of_router_and_experts(world: Path, tmp_path: Path) -> None:
    """What a run goes back to are all that trained: each is what its checkpoint of that step holds."""
    values = described(world, tmp_path / "out", top_k=3).model_dump(mode="json")
    for expert in values["experts"]:
        expert["data"]["eval"] = expert["data"]["path"]
    values["train"] |= {"max_steps": 4, "learning_rate": 1e-2, "greater_is_better": True}
    values["train"] |= {"eval_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    run = RouterRunConfig.model_validate(values)
    result = train_run(run)
    assert result.outcome.best_step == 2  # of a loss that falls the larger one, as asked
    state = load_file(run.output_dir / "checkpoints" / "step-00000002" / "state.safetensors")
    bank = get_bank(result.model)
    for name in NAMES:
        for tensor, value in bank[name].tensors().items():
            assert torch.equal(value, state[f"adapter/{name}/{tensor}"])
    for tensor, value in bank.routers[ROUTER_NAME].tensors().items():
        assert torch.equal(value, state[f"router/{ROUTER_NAME}/{tensor}"])


def test_dropout_is_that_of_each_expert(world: Path, tmp_path: Path) -> None:
    """An expert trains with the dropout of its adapter; with a frozen one the router sees none."""
    file = world / "mix" / "one" / "adapter_config.json"
    config = json.loads(file.read_text())
    dropping = tmp_path / "one"
    dropping.mkdir()
    for path in file.parent.iterdir():
        (dropping / path.name).write_bytes(path.read_bytes())
    (dropping / file.name).write_text(json.dumps({**config, "lora_dropout": 0.5}))
    losses = {}
    for train in (True, False):
        run = described(world, tmp_path / "out", train_experts=train)
        experts = [e.model_copy(update={"adapter": str(dropping)}) for e in run.experts[:1]]
        run = run.model_copy(update={"experts": [*experts, *run.experts[1:]]})
        opened, engine = made(run)
        batches = engine.task.step_batches(0, engine.models)
        whole = float(Twin(world / "base", opened, run).loss(batches).detach())
        stats = engine.backend.forward_backward(batches, engine.task, 0)
        losses[train] = stats.loss[ROUTER_NAME] / whole
    assert losses[False] == pytest.approx(1, rel=1e-6)
    assert losses[True] != pytest.approx(1, rel=1e-4)


def begin(engine: TrainingEngine, opened: OpenedModel) -> None:
    engine.checks.begin(engine.backend, contract_targets(opened.model, [ROUTER_NAME, *NAMES]), [])


def test_3_an_expert_without_tokens_is_no_fault(world: Path, tmp_path: Path) -> None:
    """The second of three logits is never the largest: its expert is silent, which is told."""
    run = described(
        world,
        tmp_path / "out",
        *("train.max_steps=4", "train.learning_rate=1e-6", "train.warmup_ratio=0"),
        *("train.weight_decay=0", "train.save_strategy=no"),
        experts_learning_rate=1e-3,
        **RULES["top1-st"],
    )
    opened, engine = made(run)
    router = get_bank(opened.model).routers[ROUTER_NAME]
    v = torch.randn(opened.model.geometry.width, generator=torch.manual_seed(0))
    for weight in router.tensors().values():
        weight.copy_(torch.stack([v, 0 * v, -v]))
    begin(engine, opened)
    engine.run()
    detail = engine.checks.results[3].detail
    assert detail == (
        "2 tensors of the router and 9 matrices B of 3 adapters changed within 3 steps; each had a "
        "gradient; 6 modules got no supervised token in them"
    )
    state = engine.checks.state()
    assert (state["silent"]["one"], state["silent"]["three"]) == ([], [])
    assert state["silent"]["two"] == state["unreached"]["two"]


def test_3_an_expert_with_tokens_and_no_gradient_is_one(world: Path, tmp_path: Path) -> None:
    run = described(world, tmp_path / "out", "train.max_steps=4", "train.save_strategy=no")
    opened, engine = made(run)
    slot = get_bank(opened.model)["two"].slots["model.layers.1.mlp.up_proj"]
    for master in (slot.A, slot.B):
        master.register_hook(torch.zeros_like)
    begin(engine, opened)
    with pytest.raises(ContractError, match=r"no gradient reached model\.layers\.1\.mlp\.up_proj"):
        engine.run()


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ({"kind": "sequence"}, "train_experts is for router.kind=token; kind=sequence"),
        ({"kind": "prototype"}, "train_experts is for router.kind=token; kind=prototype"),
        ({"kind": "phatgoose"}, "train_experts is for router.kind=token; kind=phatgoose"),
        ({"kind": "uniform"}, "train_experts is for router.kind=token; kind=uniform"),
        (
            {"train_experts": False, "experts_learning_rate": 1e-3},
            "experts_learning_rate is for train_experts=true",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where_no_expert_can_train(world: Path, router: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        described(world, world / "out", **router)
