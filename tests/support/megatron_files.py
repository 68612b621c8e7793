"""What two processes run of the files of `lorry.integrations.megatron`, of initial values, dropout and
traffic (`tests/integrations/megatron/test_megatron_files.py`). megatron-core has to be installed.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m tests.support.megatron_files FOLDER

FOLDER holds `model` and the PEFT adapters `canonical` and `fused`. Writes adapters beside them, and what
else was found into FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import nn

from lorry.adapters.spec import LoraSpec
from lorry.errors import LorryError
from tests.support.cuda_shim import cuda_on_cpu
from tests.support.megatron_gradients import (
    Case,
    batch,
    build,
    forward_step,
    loaded,
    parallel,
    read_config,
    run_schedule,
    wrap,
)

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # isort: skip
from megatron.core.tensor_parallel import mappings  # isort: skip
from lorry.integrations.megatron import (  # isort: skip
    attach_lora,
    files,
    load_distributed,
    load_hf_weights,
    load_lora,
    merged_named_parameters,
    save_hf_weights,
    save_lora,
    set_dropout_step,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-sp-te": {"tp": 2, "sp": True, "te": True},
    "pp2": {"pp": 2},
    "dp2": {},
}
RANK = 3
RATE, STEPS = 1e-2, 3
SPEC = LoraSpec(r=3, lora_alpha=6, rank_pattern={"linear_fc1": 2})


def case_of(folder: Path, adapter: str, layout: str, **settings: Any) -> Case:
    mode = "fused" if adapter.startswith("fused") else "canonical"
    where = {"dtype": "float32", "mode": mode, **LAYOUTS[layout], **settings}
    return Case(str(folder / "model"), str(folder / adapter), **where)


def error_of(function: Callable[[], Any]) -> list[str]:
    try:
        function()
    except LorryError as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def round_trips(folder: Path) -> None:
    """Each layout reads what the one before it wrote; the first what PEFT did."""
    for kind in ("canonical", "fused"):
        before = kind
        for layout in LAYOUTS:
            case = case_of(folder, before, layout, mode=kind)
            with parallel(case):
                save_lora(loaded(case), folder / f"{kind}-{layout}")
            before = f"{kind}-{layout}"


def merged(folder: Path) -> None:
    """Each rank's part of the merged weights, in both precisions, into MERGED-RANK.safetensors."""
    for kind in ("canonical", "fused"):
        for dtype in ("float32", "bfloat16"):
            case = case_of(folder, kind, "tp2", dtype=dtype)
            with parallel(case):
                (chunk,) = loaded(case)
                before = {n: p.detach().clone() for n, p in chunk.named_parameters()}
                parts = {n: p.clone() for n, p in merged_named_parameters(chunk)}
                assert all(torch.equal(p, before[n]) for n, p in chunk.named_parameters())
                name = f"merged-{kind}-{dtype}-{torch.distributed.get_rank()}.safetensors"
                save_file(parts, folder / name)


def exports(folder: Path) -> dict[str, list[str]]:
    """Whole models as Hugging Face directories: the base, and merged; and one where another one is."""
    for layout in ("tp2-sp-te", "pp2"):
        for kind in ("canonical", "fused"):
            case = case_of(folder, kind, layout)
            with parallel(case):
                chunks = loaded(case)
                save_hf_weights(chunks, folder / f"merged-{kind}-{layout}")
                if kind == "canonical":
                    save_hf_weights(chunks, folder / f"base-{layout}", merged=False)
    taken = folder / "model"
    with parallel(case):
        return {"taken": error_of(lambda: save_hf_weights(chunks, taken))}


def initial(folder: Path) -> None:
    """New adapters at every layout."""
    for layout in LAYOUTS:
        case = case_of(folder, "canonical", layout)
        with parallel(case):
            chunks = build(case)
            load_hf_weights(chunks, case.model)
            attach_lora(chunks, SPEC, seed=7)
            save_lora(chunks, folder / f"new-{layout}")


def checkpoints(folder: Path) -> dict[str, Any]:
    """Megatron's distributed checkpoints, saved at TP 2 and loaded at PP 2."""
    found: dict[str, Any] = {}
    rank = torch.distributed.get_rank()

    def save(name: str, chunks: list[nn.Module]) -> Path:
        place = folder / name
        if rank == 0:
            place.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(entries(chunks), str(place))
        return place

    def entries(chunks: list[nn.Module]) -> dict[str, Any]:
        (chunk,) = chunks
        state: dict[str, Any] = {"model": chunk.sharded_state_dict()}  # type: ignore[operator]
        return state

    def load(chunks: list[nn.Module], place: Path, notes: list[str]) -> None:
        state = load_distributed(chunks, entries(chunks), place, add_note=notes.append)
        chunks[0].load_state_dict(state["model"])

    for kind in ("canonical", "fused"):
        case = case_of(folder, kind, "tp2")
        with parallel(case):
            place = save(f"checkpoint-{kind}", loaded(case))
        case = case_of(folder, kind, "pp2")
        with parallel(case):
            chunks = build(case)
            load_hf_weights(chunks, case.model)
            attach_lora(chunks, ADAPTER_SPECS[kind], mode=case.mode)  # type: ignore[arg-type]
            load(chunks, place, [])
            save_lora(chunks, folder / f"from-checkpoint-{kind}")
    case = case_of(folder, "canonical", "tp2")
    with parallel(case):
        base = build(case)
        load_hf_weights(base, case.model)
        place = save("checkpoint-base", base)
        chunks, notes = build(case), list[str]()
        attach_lora(chunks, SPEC)
        load(chunks, place, notes)
        found["base, once"] = notes
        found["base, twice"] = error_of(lambda: load(chunks, place, []))
        other = build(case)
        attach_lora(other, LoraSpec(r=3, target_modules=("q_proj",)))
        some = save("checkpoint-some", other)
        found["some lacking"] = error_of(lambda: load(chunks, some, []))
    return found


# the adapters that PEFT wrote, as a new model is given them
ADAPTER_SPECS = {
    "canonical": LoraSpec(
        r=3,
        lora_alpha=6,
        rank_pattern={"down_proj": 2, "k_proj": 1},
        alpha_pattern={"v_proj": 5},
    ),
    "fused": LoraSpec(r=3, lora_alpha=6, use_rslora=True),
}


def faults(folder: Path) -> dict[str, Any]:
    """What one rank, or every rank, finds wrong."""
    found: dict[str, Any] = {}
    rank = torch.distributed.get_rank()
    case = case_of(folder, "canonical", "tp2")
    with parallel(case):
        chunks = loaded(case)
        linear = files.get_adapter(chunks[0]).linears[0, "mlp.linear_fc2"]
        weight: Any = linear.lora_B
        value = weight.data.clone()
        if rank == 1:
            weight.data[0, 0] += 1
        found["drifted"] = error_of(lambda: save_lora(chunks, folder / "drifted"))
        weight.data[0, 0] = float("nan")
        found["not finite"] = error_of(lambda: save_lora(chunks, folder / "not-finite"))
        weight.data = value
        with mock.patch.object(files, "_join", lambda name, shards: shards[0]):
            save_lora(chunks, folder / "one-of-two")
        found["one of two"] = error_of(lambda: load_lora(chunks, folder / "one-of-two"))
        found["another base"] = error_of(lambda: _load_over_other(case))
    return found


def _load_over_other(case: Case) -> None:
    chunks = build(case)
    load_hf_weights(chunks, case.model)
    with torch.no_grad():
        chunks[0].get_parameter("decoder.layers.1.mlp.linear_fc2.weight").mul_(2)
    # as save_lora wrote it, with the digest of its base
    load_lora(chunks, Path(case.adapter).parent / "canonical-tp2")


def masked(folder: Path) -> dict[str, float]:
    """The loss of a pass with dropout by layout and step."""
    found = {}
    for layout, at in [("tp2", 4), ("tp2-sp-te", 4), ("pp2", 4), ("tp2", 5)]:
        case = replace(case_of(folder, "canonical", layout), dtype="float64")
        with parallel(case):
            chunks = build(case)
            load_hf_weights(chunks, case.model)
            attach_lora(chunks, replace(ADAPTER_SPECS["canonical"], lora_dropout=0.4), seed=3)
            load_lora(chunks, case.adapter)
            set_dropout_step(chunks, at)
            losses = run_schedule(wrap([chunk.double().train() for chunk in chunks]), case)
            # of the last stage
            total = torch.tensor([sum(losses)], dtype=torch.float64)
            torch.distributed.all_reduce(total, torch.distributed.ReduceOp.MAX)
            found[f"{layout} {at}"] = float(total)
    return found


def trained(folder: Path) -> dict[str, bool]:
    """Steps of Megatron's own optimizer; whether the base is as it was to the last bit."""
    found = {}
    for layout in ("tp2", "pp2"):
        case = case_of(folder, "canonical", layout)
        with parallel(case):
            chunks = loaded(case)
            before = {n: p.detach().clone() for n, p in chunks[0].named_parameters()}
            wrapped = list(wrap(chunks))
            settings = OptimizerConfig(
                optimizer="adam", lr=RATE, weight_decay=0.0, clip_grad=0.0, bf16=False
            )
            optimizer = get_megatron_optimizer(settings, wrapped)
            for _ in range(STEPS):
                for chunk in wrapped:
                    chunk.zero_grad_buffer()
                optimizer.zero_grad()
                run_schedule(wrapped, case)
                optimizer.step()
            save_lora(wrapped, folder / f"trained-{layout}")
            found[layout] = all(
                torch.equal(p, before[n]) == (".lora_" not in n)
                for n, p in chunks[0].named_parameters()
            )
    return found


@contextmanager
def counting(sent: list[float]) -> Iterator[None]:
    """Collect the elements that this rank sends to the other one, as a ring would: of an all-reduce of n
    elements n, of a gather or a scatter of n in all n / 2."""

    def counted(real: Callable[..., Any], share: float, whole: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append(args[whole].numel() * share)
            return real(*args, **kwargs)

        return call

    gather, scatter = mappings.dist_all_gather_func, mappings.dist_reduce_scatter_func
    reduce = torch.distributed.all_reduce
    with (
        mock.patch("torch.distributed.all_reduce", counted(reduce, 1.0, 0)),
        mock.patch.object(mappings, "dist_all_gather_func", counted(gather, 0.5, 0)),
        mock.patch.object(mappings, "dist_reduce_scatter_func", counted(scatter, 0.5, 1)),
    ):
        yield


def traffic(folder: Path) -> dict[str, list[float]]:
    """[elements sent by the base's own collectives, and with adapters] in one pass of all rows."""
    found = {}
    for layout in ("tp2", "tp2-sp-te"):
        for kind in ("canonical", "fused"):
            case = case_of(folder, kind, layout)
            with parallel(case):
                found[f"{layout} {kind}"] = [
                    _sent(case, adapted=False),
                    _sent(case, adapted=True),
                ]
    return found


def _sent(case: Case, *, adapted: bool) -> float:
    (chunk,) = build(case)
    chunk.requires_grad_(False)
    if adapted:
        attach_lora(chunk, LoraSpec(r=RANK), mode=case.mode)  # type: ignore[arg-type]
    # gradients go all the way down in both, as they do below adapters of the first layer
    chunk.get_submodule("embedding").register_forward_hook(lambda m, i, o: o.requires_grad_())
    sent: list[float] = []
    with counting(sent):
        vocab = read_config(case.model)["vocab_size"]
        output, loss = forward_step(iter([batch(vocab)]), chunk, vocab)
        loss(output)[0].backward()
    return sum(sent)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    with cuda_on_cpu():
        round_trips(folder)
        initial(folder)
        merged(folder)
        found = {
            **faults(folder),
            **exports(folder),
            "dropout": masked(folder),
            "traffic": traffic(folder),
            "trained": trained(folder),
            **checkpoints(folder),
        }
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
