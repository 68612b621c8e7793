"""Experts of one base as a Mixtral, Qwen2-MoE or Qwen3-MoE directory, opened again by transformers
and compared with the mixture said plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.schema import ModelConfig
from lorry.config.settings import ExportSettings
from lorry.errors import ConfigError, ModelError
from lorry.verbs.checks import probe
from lorry.verbs.open_model import open_with_adapters, print_note

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorry.models.decoder.model import Decoder
    from lorry.models.loading.open import OpenedModel

# of the largest logit, in fp32: the noise of two ways to add up the same experts
EXACT_SHARE = 1e-5
# mergekit-moe's
DEFAULT_TOP_K, DEFAULT_GATE_MODE = 2, "hidden"
RANDOM_GATES = ("random", "uniform_random")


def export_experts(settings: ExportSettings) -> None:
    """The mixture that ``settings`` describe, its router made from prompts. Raises what
    `export_moe` raises, and ConfigError for an expert that is no adapter of the base.
    """
    from lorry.models.loading.open import stored_dtype
    from lorry.models.moe.checkpoint import describe_moe
    from lorry.models.moe.gates import ExpertPrompts, gates_from_prompts

    base = str(settings.base_model)
    folders = [_adapter_of(expert.source_model, base) for expert in settings.experts]
    unique = list(dict.fromkeys(folder for folder in folders if folder is not None))
    opened = open_with_adapters(
        ModelConfig.model_validate({"name": base, "dtype": "float32"}), adapters=unique
    )
    if opened.source.get("adapter"):
        raise ConfigError(f"base_model={base} is a run; name the model that it was trained on")
    if len(opened.adapters) != len(unique):
        raise ConfigError(
            "an expert's source_model holds several adapters; name the folder of "
            f"one ({', '.join(unique)})"
        )
    names = dict(zip(unique, opened.adapters, strict=True))
    experts: dict[str, dict[str, float]] = {}
    for number, folder in enumerate(folders):
        title = "base" if folder is None else names[folder]
        # one adapter may be two experts, with other prompts
        title = title if title not in experts else f"{title}-{number}"
        experts[title] = {} if folder is None else {names[folder]: 1.0}
    model, top_k = expect_decoder(opened), settings.experts_per_token or DEFAULT_TOP_K
    gate_mode = settings.gate_mode or DEFAULT_GATE_MODE
    # before a prompt is read: what the class cannot hold
    describe_moe(model.config, experts=len(experts), top_k=top_k, normalize=True)
    prompts = [ExpertPrompts(e.positive_prompts, e.negative_prompts) for e in settings.experts]
    routers = gates_from_prompts(model, opened.tokenizer, prompts, gate_mode, seed=settings.seed)
    export_moe(
        opened,
        settings.output_dir,
        experts,
        routers,
        top_k=top_k,
        attention=settings.attention,
        dtype=stored_dtype(base) if settings.dtype == "auto" else settings.dtype,
    )
    print_note(untrained_note(gate_mode))


def untrained_note(gate_mode: str) -> str:
    """What to tell of gates that nothing trained."""
    if gate_mode in RANDOM_GATES:
        return f"note: the router is random (gate_mode={gate_mode}); it routes nothing until it is trained"
    return (
        f"note: the router is made of prompts (gate_mode={gate_mode}), not trained; the layer reads "
        "another vector, the normed input of its MLP"
    )


def _adapter_of(source: str, base: str) -> str | None:
    """The adapter directory that ``source`` names ("base+adapter" or "adapter"), None for the base
    itself. Raises ConfigError for another base.
    """
    named, plus, adapter = source.partition("+")
    # a folder's own name may hold a plus
    if plus and not Path(source).exists():
        if named != base:
            raise ConfigError(
                f"source_model={source}: the base model is {base}; the experts of a "
                "mixture share one"
            )
        return adapter
    return None if source == base else source


def export_moe(
    opened: OpenedModel,
    output: Path,
    experts: Mapping[str, Mapping[str, float]],
    routers: Sequence[Tensor],
    *,
    top_k: int,
    normalize: bool = True,
    attention: str = "refuse",
    dtype: str = "float32",
    measure: Callable[[Any], list[str]] | None = None,
) -> None:
    """Write the mixture of ``experts`` {name: {adapter: g}} of the opened base to ``output``.
    routers: [E, d] of each layer, over the normed input of its MLP.

    attention: what becomes of deltas outside the MLPs, which these classes cannot route: "refuse"
    them, "average" them into the shared weights, or "drop" them. measure: what else to tell of the
    model opened again by transformers, in float32. ``opened`` is of no use afterwards.
    Raises ConfigError, ModelError for what the class cannot hold, ContractError if what was written
    is another mixture when it is opened again.
    """
    import torch

    from lorry.adapters.merge import fold_tensor
    from lorry.disk import durable
    from lorry.models.loading.reopen import (
        compare_logits,
        compute_fp32_logits,
        free_model_memory,
        reopen_model,
    )
    from lorry.models.moe.checkpoint import describe_moe, moe_tensors, save_moe
    from lorry.models.moe.plain import plain_mixture

    model = expect_decoder(opened)
    twin = describe_moe(model.config, experts=len(experts), top_k=top_k, normalize=normalize)
    shared = shared_mix(opened, experts, attention)
    mixes = list(experts.values())

    def dense_weight(name: str) -> Tensor:
        return fold_tensor(model, name, shared)

    def expert_weight(expert: int, path: str) -> Tensor:
        return fold_tensor(model, f"{path}.weight", mixes[expert])

    torch_dtype: torch.dtype = getattr(torch, dtype)
    rows, rows_words = probe.probe_rows(opened)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(torch_dtype).float()

    plain = reopen_model(Path(opened.source["path"]), torch.float32)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".mlp." not in name:
                parameter.copy_(rounded(dense_weight(name)))
    plain_mixture(
        plain,
        [rounded(router) for router in routers],
        lambda expert, path: rounded(expert_weight(expert, path)),
        top_k=top_k,
    )
    expected = compute_fp32_logits(plain, rows)
    del plain
    with durable.build_directory(output) as folder:
        save_moe(
            model,
            folder,
            twin,
            moe_tensors(model, twin, dense_weight, expert_weight, routers),
            dtype=torch_dtype,
            tokenizer=opened.tokenizer,
            generation_config=opened.source["generation_config"] or None,
        )
        free_model_memory(model)
        # always in fp32, whatever is stored: in bf16 the chosen experts flip
        again = reopen_model(folder, torch.float32)
        difference, bound = compare_logits(
            expected, compute_fp32_logits(again, rows), EXACT_SHARE, dtype
        )
        lines = [] if measure is None else measure(again)
        if dtype != "float32":
            chosen = chosen_experts(again, rows, top_k)
            # two models at once need not fit
            free_model_memory(again)
            same = chosen_experts(reopen_model(folder, torch_dtype), rows, top_k) == chosen
            lines.append(
                f"computed in {dtype}, {float(same.all(-1).double().mean()):.1%} of tokens go to the same experts as in "
                "float32, over all layers"
            )
    print_note(
        f"{twin.names.architecture} of {len(experts)} experts "
        f"({', '.join(experts)}), {top_k} per token, stored in {dtype}"
    )
    print_note(
        f"reloaded by transformers: largest logit difference to the plain mixture {difference:.1e} "
        f"(bound {bound:.1e}), on {rows_words}"
    )
    for line in lines:
        print_note(line)


def chosen_experts(model: Any, rows: Sequence[Tensor], top_k: int) -> Tensor:
    """[T, layers, top_k] int64, ascending: whom a token of ``rows`` ([1, t] each) goes to in a stock
    class."""
    import torch

    choices = []
    with torch.no_grad():
        for ids in rows:
            logits = model(input_ids=ids, output_router_logits=True).router_logits
            # [T, E] of each layer; the softmax over them changes no order
            layers = [scores.float().topk(top_k, -1).indices for scores in logits]
            choices.append(torch.stack(layers, 1))
    return torch.cat(choices).sort(-1).values


def expect_decoder(opened: OpenedModel) -> Decoder:
    """The opened model as Lorry's own decoder. Raises ModelError for one that it does not compute."""
    from lorry.models.decoder.model import Decoder

    if not isinstance(opened.model, Decoder):
        kind = opened.model.config.get("model_type")
        raise ModelError(
            f"a mixture of experts of this {kind} model cannot be written: Lorry's "
            "own decoder does not support all of its config, and the class of the "
            "mixture may not either"
        )
    return opened.model


def shared_mix(
    opened: OpenedModel, experts: Mapping[str, Mapping[str, float]], attention: str
) -> dict[str, float]:
    """{adapter: g} of what all experts share: nothing, or the mean of the experts' attention.

    Raises ConfigError for adapters whose deltas the class cannot route.
    """
    from lorry.adapters.attach import get_bank

    model, bank = expect_decoder(opened), get_bank(opened.model, create=True)
    used = {name: bank[name] for mix in experts.values() for name in mix}
    ends = {model.family.embed, model.family.head}
    outside = dict[str, str]()
    for name, adapter in used.items():
        for path in adapter.slots:
            if path in ends:
                raise ConfigError(
                    f"adapter {name!r} is on {path}, which all experts of a mixture "
                    "share; train the adapter without that target"
                )
            if ".mlp." not in path:
                outside.setdefault(name, path)
    if not outside or attention == "drop":
        return {}
    if attention == "refuse":
        name, path = next(iter(outside.items()))
        raise ConfigError(
            f"adapter {name!r} changes {path}, and this class of model routes MLPs "
            "only; attention=average puts the mean of the experts' attention into "
            "the shared weights, attention=drop leaves it out"
        )
    shared: dict[str, float] = {}
    for mix in experts.values():
        for name, gate in mix.items():
            shared[name] = shared.get(name, 0.0) + gate / len(experts)
    return shared
