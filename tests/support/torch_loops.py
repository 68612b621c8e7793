"""What `tests/integrations/test_trainers.py` runs on one process and on two: adapters in training
loops of torch's own, and faults made on purpose on one rank.

    RANK=0 WORLD_SIZE=2 ... python -m tests.support.torch_loops OUT

writes OUT/rank-0.safetensors (gradients and values of each case) and OUT/rank-0.json (how each fault
ended); rank 0 also the adapters, OUT/CASE.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.spec import LoraSpec
from lorry.errors import LorryError
from lorry.integrations import trainers
from lorry.integrations.agreement import RANK_0_LOADS
from tests.support.tiny import GPT2, LLAMA

STEPS, ROWS, RANKS, LENGTH = 3, 4, 2, 12
RATE = 1e-2
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
LAYERS = {LlamaDecoderLayer, GPT2Block}


def base(family: str = "llama") -> nn.Module:
    """The same random weights in every process, float32."""
    torch.manual_seed(0)
    settings = {"llama": LLAMA, "gpt2": GPT2}[family]
    known = {k: v for k, v in settings.items() if k != "model_type"}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**known))
    return LlamaForCausalLM(LlamaConfig(**known))


def spec(family: str = "llama", **fields: Any) -> LoraSpec:
    """Both sides random, so that every matrix has a gradient."""
    given = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[family], **fields}
    return LoraSpec(**{"init_lora_weights": False, **given})


def rows(step: int) -> Tensor:
    """Token ids [ROWS, LENGTH] of a step, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(1, LLAMA["vocab_size"], (ROWS, LENGTH), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def named(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {f"{kind}/{name}": tensor.detach().clone() for name, tensor in tensors.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    adapter = get_bank(model)["default"]
    masters = adapter.masters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in masters.items()}


def trained(
    model: nn.Module, wrapped: nn.Module, rank: int, ranks: int, accumulate: int = 1
) -> dict[str, Tensor]:
    """The gradients of the first step and the values after the last; ``accumulate``: passes."""
    parameters = trainers.get_lora_parameters(wrapped)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    result = dict[str, Tensor]()
    for step in range(STEPS):
        parts = rows(step)[rank::ranks].chunk(accumulate)
        for i, part in enumerate(parts):
            waits = isinstance(wrapped, DistributedDataParallel) and i + 1 < len(parts)
            with wrapped.no_sync() if waits else nullcontext():
                (loss_of(wrapped, part) / len(parts)).backward()
        trainers.synchronise(wrapped)
        trainers.synchronise(wrapped)  # once more changes nothing
        if not step:
            result |= named(gradients(model), "gradient")
        optimizer.step()
        optimizer.zero_grad()
    return result | named(get_bank(model)["default"].tensors(), "value")


# --- wrappers


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in model.modules():
        if type(module) in LAYERS:
            fully_shard(module, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model


def flat(model: nn.Module, **settings: Any) -> nn.Module:
    policy = ModuleWrapPolicy(LAYERS)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **settings
    )


def accelerated(model: nn.Module) -> nn.Module:
    """By accelerate's FSDP plugin of version 2, which it does not choose by itself on a CPU."""
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    chosen = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    accelerator.state._shared_state.update(chosen)
    # it wants an optimizer whose parameters it can exchange; that of the adapters is another one
    wrapped, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    return wrapped


FSDP = trainers.apply_lora_to_fsdp_model
PARAMETERS = trainers.apply_lora_to_model
Apply = Callable[[nn.Module, Any], nn.Module]
# name: family, how the adapter is applied, the wrapper, passes a step
CASES: dict[str, tuple[str, Apply, Callable[[nn.Module], nn.Module], int]] = {
    "fsdp2": ("llama", FSDP, sharded, 1),
    "fsdp2 accumulating": ("llama", FSDP, partial(sharded, reshard_after_forward=False), 2),
    "fsdp2 gpt2": ("gpt2", FSDP, sharded, 1),
    "fsdp2 by accelerate": ("llama", FSDP, accelerated, 1),
    "fsdp1": ("llama", FSDP, flat, 1),
    "fsdp1 parameters": ("llama", FSDP, partial(flat, use_orig_params=True), 2),
    "ddp": ("llama", PARAMETERS, DistributedDataParallel, 1),
    "ddp accumulating": ("gpt2", PARAMETERS, DistributedDataParallel, 2),
    "no wrapper": ("llama", FSDP, lambda model: model, 1),
    "parameters, no wrapper": ("llama", PARAMETERS, lambda model: model, 2),
}


@contextmanager
def counted_sums() -> Iterator[list[int]]:
    """How many values each of our sums over ranks had; DDP's own are none of these."""
    sums, plain = list[int](), distributed.all_reduce

    def counted(tensor: Tensor, **settings: Any) -> Any:
        sums.append(tensor.numel())
        return plain(tensor, **settings)

    distributed.all_reduce = counted
    try:
        yield sums
    finally:
        distributed.all_reduce = plain


def case(name: str, rank: int, out: Path) -> dict[str, Tensor]:
    """Train, save, merge, and take the merge out again."""
    family, apply, wrap, accumulate = CASES[name]
    model = apply(base(family), spec(family))
    wrapped = wrap(model)
    with counted_sums() as sums:
        result = trained(model, wrapped, rank, RANKS, accumulate)
    result["sums"] = torch.tensor(sums)
    trainers.save_lora(wrapped, out / name)
    with torch.no_grad():
        ids = rows(99)
        result["logits"] = wrapped(ids).logits
        if not name.startswith("fsdp1"):
            trainers.merge_lora_weights(wrapped)
            result["merged"] = wrapped(ids).logits
            trainers.unmerge_lora_weights(wrapped)
            result["unmerged"] = wrapped(ids).logits
    return result


# --- faults


def steps(
    wrapped: nn.Module,
    rank: int,
    *,
    synchronise: bool = True,
    rates: tuple[float, ...] = (RATE, RATE),
    parameters: Any = None,
) -> nn.Module:
    """A few steps of a loop."""
    given = trainers.get_lora_parameters(wrapped) if parameters is None else parameters
    optimizer = torch.optim.AdamW(given, lr=RATE)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        loss_of(wrapped, rows(step)[rank::RANKS]).backward()
        if synchronise:
            trainers.synchronise(wrapped)
        optimizer.step()
        optimizer.zero_grad()
    return wrapped


def faults(rank: int, out: Path) -> dict[str, list[str]]:
    """{fault: [class of the error, its text]} as this rank has it."""

    def hidden(**fields: Any) -> nn.Module:
        return FSDP(base(), spec(**fields))

    def changed(model: nn.Module) -> nn.Module:
        if rank:
            with torch.no_grad():
                trainers.get_lora_parameters(model)[0][0, 0] += 1e-3
        return model

    def on_base(change: Callable[[nn.Module], Any], **given: Any) -> nn.Module:
        """A base that rank 1 has otherwise, or all where ``given``."""
        model = base()
        if rank:
            change(model)
        return FSDP(model, spec(), **given)

    def another_value(model: nn.Module, name: str = "model.layers.1.mlp.up_proj.weight") -> None:
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] += 1e-6

    def rank_0_loads() -> None:
        """As accelerate's launcher says it; rank 1 has memory that nobody has written yet."""
        with patch.dict(os.environ, dict.fromkeys(RANK_0_LOADS, "true")):
            on_base(another_value)

    def not_merged() -> None:
        model = hidden()
        if rank:
            with torch.no_grad():
                model.get_submodule("model.layers.1.mlp.down_proj").weight[0] = torch.inf
        trainers.merge_lora_weights(model)

    def cut_up(wrap: Callable[[nn.Module], nn.Module]) -> None:
        loss_of(wrap(PARAMETERS(base(), spec())), rows(0))

    made: dict[str, Callable[[], Any]] = {
        "no synchronise": lambda: steps(sharded(hidden()), rank, synchronise=False),
        "no synchronise, plain attach": lambda: steps(
            FSDP(plainly_attached(), None), rank, synchronise=False
        ),
        "plain attach and FSDP2": lambda: steps(sharded(plainly_attached()), rank),
        "plain attach and FSDP1": lambda: steps(flat(plainly_attached()), rank),
        "no wrapper": lambda: steps(PARAMETERS(base(), spec()), rank, synchronise=False),
        "warm-up": lambda: steps(hidden(), rank, synchronise=False, rates=(0.0, 0.0, RATE)),
        "another seed": lambda: steps(FSDP(base(), Namespace(use_lora=True, lora_seed=rank)), rank),
        "another alpha": lambda: steps(hidden(lora_alpha=6 + rank), rank),
        "another base": lambda: on_base(another_value),
        "another norm": lambda: on_base(lambda m: another_value(m, "model.norm.weight")),
        "another dtype": lambda: on_base(lambda m: m.to(torch.bfloat16)),
        "another buffer": lambda: on_base(lambda m: m.register_buffer("more", torch.ones(1))),
        "another base, given by rank 0": lambda: on_base(another_value, compare_base=False),
        "another base, not there yet": lambda: on_base(lambda m: m.to("meta")),
        "another base, read by rank 0": rank_0_loads,
        "another rank": lambda: steps(hidden(r=3 + rank), rank),
        "frozen parameters": lambda: steps_over_base(sharded(hidden()), rank),
        "no parameters": lambda: steps(hidden(), rank, parameters=[{"params": []}]),
        "cut up by fully_shard": lambda: cut_up(sharded),
        "cut up by FSDP1": lambda: cut_up(partial(flat, use_orig_params=True)),
        "attached after fully_shard": lambda: attach(sharded(base()), spec()),
        "applied after fully_shard": lambda: FSDP(sharded(base()), spec()),
        "attached after FSDP1": lambda: attach(flat(base()), spec()),
        "attached after DDP": lambda: attach(DistributedDataParallel(base()), spec()),
        "saved apart": lambda: trainers.save_lora(changed(hidden()), out / "apart"),
        "not saved": lambda: trainers.save_lora(hidden(), out / "a-file" / "adapter"),
        "merged apart": lambda: trainers.merge_lora_weights(changed(hidden())),
        "not finite": not_merged,
        "FSDP1 merged": lambda: trainers.merge_lora_weights(flat(hidden())),
        "nothing": lambda: steps(sharded(hidden()), rank),
    }
    (out / "a-file").touch()
    ended = dict[str, list[str]]()
    for name, make in made.items():
        try:
            make()
            ended[name] = ["", ""]
        except LorryError as error:
            ended[name] = [type(error).__name__, str(error)]
    return ended


def plainly_attached() -> nn.Module:
    model = base()
    attach(model, spec())
    return model


def steps_over_base(wrapped: nn.Module, rank: int) -> None:
    steps(wrapped, rank, parameters=wrapped.parameters())


def half(rank: int) -> dict[str, Tensor]:
    """Gradients where rank 1 has had no pass at all, averaged over a group of rank 0 and over one of
    both.
    """
    alone, both = distributed.new_group([0]), distributed.new_group([0, 1])
    model = FSDP(base(), spec())
    if not rank:
        loss_of(model, rows(0)).backward()
        trainers.synchronise(model, alone)
    else:
        for parameter in trainers.get_lora_parameters(model):
            parameter.grad = None
    own = named(gradients(model), "own")
    trainers.synchronise(model, both)
    return own | named(gradients(model), "gradient")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    results = {name: case(name, rank, out) for name in CASES} | {"half": half(rank)}
    flat_results = {f"{name}/{key}": v for name, each in results.items() for key, v in each.items()}
    save_file(flat_results, out / f"rank-{rank}.safetensors")
    (out / f"rank-{rank}.json").write_text(json.dumps(faults(rank, out)))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
