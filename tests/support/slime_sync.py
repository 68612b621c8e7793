"""What two processes run of `lorry.integrations.slime.sync` on the double of slime
(`tests/integrations/slime/test_slime_sync.py`). megatron-core has to be installed.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m tests.support.slime_sync FOLDER

FOLDER holds models and PEFT adapters (`tests/support/megatron_models.py`). Writes what engines held
into FOLDER/sent/NAME.safetensors, and what else was found into FOLDER/RANK.json.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorry.errors import LorryError
from tests.support import slime_runs as runs
from tests.support.rollout_server import RolloutServer
from tests.support.slime_engine import StandInEngine

runs.add_paths()

from lorry.integrations.megatron import get_lora_parameters, load_lora  # noqa: E402
from lorry.integrations.megatron.files import gather_lora  # noqa: E402
from lorry.integrations.slime.generate import adapter_name  # noqa: E402
from lorry.integrations.slime.limits import GENERATE  # noqa: E402
from lorry.integrations.slime.sync import updates, weights  # noqa: E402

WAYS: dict[str, tuple[str, ...]] = {
    "tensor": ("--colocate",),
    "distributed": (),
    "disk": ("--update-weight-transport", "disk", "--update-weight-disk-dir"),
}
UPDATES = "slime.backends.megatron_utils.update_weight"
BUCKET = 13_000  # bytes: a matrix or two


class ServedEngine(StandInEngine):
    """An engine with a server in front, which answers from the weights and adapters that it was sent,
    by transformers and PEFT."""

    def __init__(self, model: Path) -> None:
        super().__init__()
        self.server = WeightServer(model, self)

    def _get_server_host(self) -> str:
        return "127.0.0.1"

    def _get_server_port(self) -> int:
        port: int = self.server.server.server_address[1]
        return port


class WeightServer(RolloutServer):
    """The server: its base is what the engine holds."""

    def __init__(self, model: Path, engine: StandInEngine, **options: Any) -> None:
        super().__init__(model, **options)
        self.engine = engine

    def base(self) -> Any:
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.model))
        model.load_state_dict(self.engine.weights, strict=False)
        return model.eval()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/get_weights_by_name":
            rows = self.engine.weights[body["name"]][: body["truncate_size"]]
            return 200, rows.float().tolist()
        return super().answer(path, body)

    def policy(self, name: str | None) -> Any:
        from peft import PeftModel

        if name is None:
            return self.base()
        return PeftModel.from_pretrained(self.base(), self.held[name]).eval()


def arguments(
    folder: Path, model: str, way: str, *words: Any, tp: int = 2, pp: int = 1, **lora: Any
) -> Namespace:
    given = [*runs.flags(folder / model, tp, pp), *runs.PROVIDER, *runs.INSTALL, *WAYS[way]]
    given += [folder / "disk"] if way == "disk" else []
    args = runs.parse(*given, *words)
    args.debug_train_only, args.update_weight_buffer_size = False, BUCKET
    settings = {"use_lora": True, "lora_r": 3, "lora_alpha": 6.0, **lora}
    vars(args).update(settings)
    return args


@contextmanager
def actor_of(args: Namespace, engine: StandInEngine | None = None, **options: Any) -> Iterator[Any]:
    with runs.training_process():
        actor = runs.start_actor(args, **options)
        if engine is not None:
            sends = dist.get_rank() == 0 or args.pipeline_model_parallel_size > 1
            actor.connect([engine] if sends else [])
        yield actor


def keep(folder: Path, name: str, engine: StandInEngine) -> None:
    """What an engine was sent by this rank; each stage of a pipeline sends its own."""
    if engine.weights:
        save_file(
            {n: t.contiguous() for n, t in engine.weights.items()},
            folder / "sent" / f"{name}.{dist.get_rank()}.safetensors",
        )


def same(model: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[n]) for n, p in parameters(model).items())


def parameters(model: Any) -> dict[str, nn.Parameter]:
    return {f"{i}.{n}": p for i, chunk in enumerate(model) for n, p in chunk.named_parameters()}


CASES: dict[str, dict[str, Any]] = {
    "llama-tp2-tensor": {"model": "llama", "way": "tensor"},
    "llama-tp2-distributed": {"model": "llama", "way": "distributed"},
    "llama-tp2-disk": {"model": "llama", "way": "disk"},
    "llama-pp2-tensor": {"model": "llama", "way": "tensor", "tp": 1, "pp": 2},
    "llama-pp2-distributed": {"model": "llama", "way": "distributed", "tp": 1, "pp": 2},
    "qwen2-tp2-disk": {"model": "qwen2", "way": "disk"},
    "qwen3-tp2-tensor": {"model": "qwen3", "way": "tensor"},
}


def sends(folder: Path) -> dict[str, Any]:
    """A PEFT adapter by each of slime's ways, and then none."""
    found: dict[str, Any] = {}
    for name, given in CASES.items():
        start = folder / f"{given['model']}-canonical"
        engine = StandInEngine()
        args = arguments(folder, lora_adapter_path=str(start), **given)
        with actor_of(args, engine) as actor, counted_peak() as peak:
            before = {n: p.detach().clone() for n, p in parameters(actor.model).items()}
            actor.update_weights()
            keep(folder, name, engine)
            found[name] = {
                "untouched": same(actor.model, before),
                "peak": peak(),
                "files": sorted(p.name for p in (folder / "disk").glob("*")),
            }
            if given["way"] == "tensor":
                args.save_hf = str(folder / f"saved-{name}")
                args.save = str(folder / f"run-{name}")
                actor.save_model(7)
            # as new: the base goes out again, bit for bit
            for parameter in get_lora_parameters(actor.model):
                parameter.data.zero_()
            actor.weights_backuper.backup("actor")
            actor.update_weights()
            keep(folder, f"{name}-base", engine)
        print(name, time.process_time(), file=sys.stderr, flush=True)
    return found


def fused(folder: Path) -> None:
    """One A for a fused matrix."""
    engine = StandInEngine()
    args = arguments(folder, "llama", "tensor", lora_mode="fused", lora_use_rslora=True)
    with actor_of(args, engine) as actor:
        load_lora(actor.model, folder / "llama-fused")
        actor.weights_backuper.backup("actor")
        actor.update_weights()
        keep(folder, "llama-fused", engine)


def half(folder: Path) -> None:
    """A base in bfloat16 under float32 adapters."""
    engine = StandInEngine()
    start = str(folder / "llama-canonical")
    args = arguments(folder, "llama", "distributed", lora_adapter_path=start)
    with actor_of(args, engine) as actor:
        for chunk in actor.model:
            chunk.bfloat16()
        actor.update_weights()
        keep(folder, "llama-bfloat16", engine)


@contextmanager
def counted_peak() -> Iterator[Callable[[], int]]:
    """The most bytes of merged weights that were alive at once."""
    alive: dict[int, int] = {}
    most = [0]
    merge = weights.merged_weight

    def counted(*given: Any) -> Tensor:
        tensor = merge(*given)
        alive[id(tensor)] = tensor.nbytes
        most[0] = max(most[0], sum(alive.values()))
        weakref.finalize(tensor, alive.pop, id(tensor))
        return tensor

    with mock.patch.object(weights, "merged_weight", counted):
        yield lambda: most[0]


def error_of(function: Callable[[], Any]) -> list[str]:
    """[class, message] of what it raised on this rank."""
    try:
        function()
    except LorryError as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def faults(folder: Path) -> dict[str, list[str]]:
    """Merged weights on their way, each time with something wrong; and right before and after."""
    engine = ServedEngine(folder / "llama-mha")
    args = arguments(
        folder, "llama-mha", "tensor", lora_adapter_path=str(folder / "llama-mha-canonical")
    )
    found: dict[str, list[str]] = {}
    real = weights.MergedWeights.of
    with engine.server, actor_of(args, engine) as actor:

        def sent(name: str, *patches: Any) -> None:
            with ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(patch)
                found[name] = error_of(actor.update_weights)

        def merging(of: Callable[..., Tensor]) -> Any:
            return mock.patch.object(weights.MergedWeights, "of", of)

        sent("right")
        sent("never", merging(lambda self, name, weight: weight))
        sent("twice", merging(lambda self, name, w: real(self, name, real(self, name, w))))
        mine = dist.get_rank() == 1
        sent("shard", merging(lambda self, name, w: w if mine else real(self, name, w)))
        sent(
            "swapped", mock.patch.object(weights, "merged_weight", swapping(weights.merged_weight))
        )
        # imported anew by every actor's process
        iterators = importlib.import_module(f"{UPDATES}.hf_weight_iterator_direct")
        doubled = doubling(iterators.convert_to_hf)
        sent("again", mock.patch.object(iterators, "convert_to_hf", doubled))
        old = dict(engine.weights)
        for parameter in get_lora_parameters(actor.model):
            parameter.data.mul_(1.5)
        actor.weights_backuper.backup("actor")
        sent("stale", mock.patch.object(StandInEngine, "_receive"))

        def lie(self: StandInEngine, tensors: Any, version: str) -> None:
            self.weights, self.weight_version = old, version

        sent("lying", mock.patch.object(StandInEngine, "_receive", lie))
        base = AutoModelForCausalLM.from_pretrained(folder / "llama-mha").eval()
        engine.server.held["lora_v000001"] = str(folder / "llama-mha-canonical")
        sent("adapter too")
        engine.server.held.clear()
        sent("base answers", mock.patch.object(engine.server, "policy", return_value=base))
        sent("right again")
        found |= steps(actor)
        found |= other_ways(folder, actor, engine, sent)
    return found


def steps(actor: Any) -> dict[str, list[str]]:
    """After a step of the optimizer values have moved, and no B is zero."""
    found = {}
    parameters = get_lora_parameters(actor.model)
    before = [parameter.detach().clone() for parameter in parameters]

    def step() -> None:
        data = {"tokens": torch.arange(16).view(2, 8), "advantages": torch.ones(2, 7)}
        actor.train(0, data)

    step()
    found["stepped"] = error_of(actor.update_weights)
    trained = [parameter.detach().clone() for parameter in parameters]
    step()
    set_values(actor, trained)
    found["unmoved"] = error_of(actor.update_weights)
    step()
    set_values(actor, [torch.zeros_like(b) if n % 2 else b for n, b in enumerate(before)])
    found["zero"] = error_of(actor.update_weights)
    set_values(actor, before)
    found["no step"] = error_of(actor.update_weights)
    return found


def set_values(actor: Any, values: list[Tensor]) -> None:
    for parameter, value in zip(get_lora_parameters(actor.model), values, strict=True):
        parameter.data.copy_(value)
    actor.weights_backuper.backup("actor")


def other_ways(
    folder: Path, actor: Any, engine: StandInEngine, sent: Callable[..., None]
) -> dict[str, list[str]]:
    """Faults of the disk and of the distributed updater, by the same actor."""
    args = actor.args
    own = actor.weight_updater
    args.update_weight_disk_dir = str(folder / "disk")
    read = StandInEngine._update_weights_from_disk

    def spoil(self: StandInEngine, model_path: str, weight_version: str) -> None:
        file = sorted(Path(model_path).glob("*.safetensors"))[0]
        tensors = load_file(file)
        next(iter(tensors.values())).flatten()[0] += 1
        save_file(tensors, file)
        read(self, model_path, weight_version)

    real = weights.MergedWeights.of
    for kind, faults in (
        ("Disk", {"disk": mock.patch.object(StandInEngine, "_update_weights_from_disk", spoil)}),
        (
            "Distributed",
            {
                "distributed never": mock.patch.object(
                    weights.MergedWeights, "of", lambda self, name, weight: weight
                ),
                "distributed twice": mock.patch.object(
                    weights.MergedWeights,
                    "of",
                    lambda self, name, w: real(self, name, real(self, name, w)),
                ),
            },
        ),
    ):
        module = importlib.import_module(f"{UPDATES}.update_weight_from_{kind.lower()}")
        version = actor.weight_updater.weight_version
        actor.weight_updater = getattr(module, f"UpdateWeightFrom{kind}")(
            args,
            actor.model,
            own.weights_getter,
            model_name=own.model_name,
            quantization_config=None,
        )
        actor.weight_updater.weight_version = version
        actor.connect([engine] if dist.get_rank() == 0 else [])
        for name, patch in faults.items():
            sent(name, patch)
        sent(f"{kind} right")
    return {}


def swapping(merge: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Merging with the delta of k where q's belongs, and q's where k's."""
    pair = {"lora_A_q": "lora_A_k", "lora_B_q": "lora_B_k"}
    other = {**pair, **{value: key for key, value in pair.items()}}

    def swapped(linear: Any, values: Any) -> Tensor:
        return merge(linear, {name: values[other.get(name, name)] for name in values})

    return swapped


def doubling(convert: Callable[..., Any]) -> Callable[..., Any]:
    """A converter that gives one tensor twice."""

    def doubled(args: Any, model: str, name: str, *given: Any) -> Any:
        tensors = convert(args, model, name, *given)
        return tensors * 2 if name.endswith("layers.1.mlp.linear_fc2.weight") else tensors

    return doubled


def by_adapter(folder: Path) -> dict[str, Any]:
    """The base once, then a directory per version."""
    found: dict[str, Any] = {}
    engine = ServedEngine(folder / "llama")
    args = arguments(
        folder,
        "llama",
        "distributed",
        lora_adapter_path=str(folder / "llama-canonical"),
        lora_sync="adapter",
        lora_sync_dir=str(folder / "versions"),
        sglang_enable_lora=True,
        custom_generate_function_path=GENERATE,
    )
    with engine.server, actor_of(args, engine) as actor:
        found["first"] = error_of(actor.update_weights)
        keep(folder, "adapter-base", engine)
        engine.calls.clear()
        data = {"tokens": torch.arange(16).view(2, 8), "advantages": torch.ones(2, 7)}
        actor.train(0, data)
        found["second"] = error_of(actor.update_weights)
        found["calls"] = list(engine.calls)
        found["held"] = sorted(engine.server.held)
        found["name"] = adapter_name(args)
        args.save_hf, args.save = str(folder / "saved-adapter"), str(folder / "run-adapter")
        actor.save_model(1)
        actor.train(1, data)
        engine.server.fault = "never"
        found["never"] = error_of(actor.update_weights)
        engine.server.fault = ""
        # an engine that was started again gets the base again, which must not have the adapter in it
        actor.connect([engine] if dist.get_rank() == 0 else [])
        always = property(lambda sync: True, lambda sync, value: None)
        with mock.patch.object(updates.WeightSync, "merging", always, create=True):
            found["merged too"] = error_of(actor.update_weights)
        actor.connect([engine] if dist.get_rank() == 0 else [])
        found["recovered"] = error_of(actor.update_weights)
        found["held again"] = sorted(engine.server.held)
    return found


def resumes(folder: Path) -> dict[str, Any]:
    """Checkpoints at another layout, of the base alone, and adapters that do not belong there."""
    found: dict[str, Any] = {}
    start = str(folder / "llama-canonical")
    run = folder / "run-llama-tp2-tensor"

    def start_at(
        load: Path, *, check: Callable[[Any], Any] = lambda actor: None, **more: Any
    ) -> Any:
        layout = {key: more.pop(key) for key in ("tp", "pp") if key in more}
        options = {key: more.pop(key) for key in ("with_ref",) if key in more}
        args = arguments(folder, "llama", "distributed", **layout, **more)
        args.load, args.ref_load, args.save = str(load), str(folder / "base"), None
        # slime's parser sets it for a run that does not go on
        args.finetune = more.get("finetune", False)
        with actor_of(args, StandInEngine(), **options) as actor:
            return check(actor)

    def save(name: str) -> Callable[[Any], None]:
        def run_it(actor: Any) -> None:
            actor.args.save = str(folder / name)
            actor.save_model(7)

        return run_it

    start_at(run, tp=1, pp=2, lora_adapter_path=start, check=save("run-pp2"))
    place = folder / "run-pp2" / "adapters" / "iter_0000007" / "adapter_model.safetensors"
    start_at(folder / "run-pp2", lora_adapter_path=start, check=save("run-tp2-again"))
    dist.barrier()
    if dist.get_rank() == 0:
        tensors = load_file(place)
        next(iter(tensors.values())).add_(1e-3)
        save_file(tensors, place)
    dist.barrier()
    found["replaced"] = error_of(lambda: start_at(folder / "run-pp2", lora_adapter_path=start))
    # slime without the plugin's flags, in a process where it was installed
    args = runs.parse(*runs.flags(folder / "llama", 2))
    args.save = str(folder / "base")
    with actor_of(args) as actor:
        actor.save_model(0)

    def zeros(actor: Any) -> bool:
        actor.update_weights()
        for engine in actor.weight_updater.rollout_engines:
            keep(folder, "from-base", engine)
        return not any(bool(p.any()) for p in get_lora_parameters(actor.model)[1::2])

    found["new over base"] = start_at(folder / "base", finetune=True, check=zeros)

    def whole(actor: Any) -> bool:
        # the reference was loaded over a model that has a trained adapter
        true = load_file(folder / "llama-canonical" / "adapter_model.safetensors")
        ours = gather_lora(actor.model)
        return all(
            torch.equal(ours[n.removeprefix("base_model.model.").removesuffix(".weight")], t)
            for n, t in true.items()
        )

    found["under reference"] = start_at(
        folder / "llama",
        with_ref=True,
        use_kl_loss=True,
        lora_adapter_path=start,
        check=whole,
        **dict(zip(HOOK_NAMES, runs.HOOKS[1::2], strict=True)),
    )
    other = folder / "other-base"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "llama-canonical", other)
        (other / "lorry_adapter.json").write_text(json.dumps({"base_digest": "0" * 64}))
        model = AutoModelForCausalLM.from_pretrained(folder / "llama")
        model.model.embed_tokens.weight.data.mul_(1.01)
        model.save_pretrained(folder / "llama-other")
    dist.barrier()
    found["other base"] = error_of(lambda: start_at(folder / "llama", lora_adapter_path=str(other)))
    found["other weights"] = start_at(
        folder / "llama-other",
        lora_adapter_path=start,
        check=lambda actor: error_of(actor.update_weights),
    )
    return found


HOOK_NAMES = tuple(name.removeprefix("--").replace("-", "_") for name in runs.HOOKS[::2])


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "sent").mkdir(exist_ok=True)
    # once: a store does not know one group of its name from another
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found: dict[str, Any] = {"sends": sends(folder)}
    fused(folder)
    half(folder)
    found["faults"] = faults(folder)
    found["adapter"] = by_adapter(folder)
    found["resumes"] = resumes(folder)
    dist.destroy_process_group()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
