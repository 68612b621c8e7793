"""Experts of one base as a Mixtral, Qwen2-MoE or Qwen3-MoE directory, opened again by transformers
and compared with the mixture said plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.schema.model import ModelConfig
from lorry.config.settings import ExpertSource, ExportSettings
from lorry.errors import ConfigError, DataError, ModelError
from lorry.runs.layout import MERGED, RUN_FILE
from lorry.verbs.checks import probe
from lorry.verbs.checks.domain_loss import row_prompts
from lorry.verbs.open_model import open_to_write, print_note

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorry.models.decoder.model import Decoder
    from lorry.models.loading.open import OpenedModel
    from lorry.models.moe.gates import ExpertPrompts
    from lorry.models.moe.whole import WholeExpert

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
    from lorry.models.moe.gates import gates_from_prompts

    base = str(settings.base_model)
    sources = [_source_of(expert.source_model, base) for expert in settings.experts]
    unique = list(dict.fromkeys(source for source in sources if isinstance(source, str)))
    opened = open_to_write(
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
    experts: dict[str, Mapping[str, float] | WholeExpert] = {}
    for number, source in enumerate(sources):
        title = "base"
        expert: Mapping[str, float] | WholeExpert = {}
        if isinstance(source, str):
            title, expert = names[source], {names[source]: 1.0}
        elif source is not None:
            title, expert = _title_of(source), _open_whole(opened, source)
        # one source may be two experts, with other prompts
        experts[title if title not in experts else f"{title}-{number}"] = expert
    model, top_k = expect_decoder(opened), settings.experts_per_token or DEFAULT_TOP_K
    gate_mode = settings.gate_mode or DEFAULT_GATE_MODE
    # before a prompt is read: what the class cannot hold
    describe_moe(model.config, experts=len(experts), top_k=top_k, normalize=True)
    prompts = [
        _prompts_of(opened, source, expert, gate_mode)
        for source, expert in zip(sources, settings.experts, strict=True)
    ]
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


def _source_of(source: str, base: str) -> str | Path | None:
    """The adapter directory that ``source`` names ("base+adapter" or "adapter"), the directory of a
    whole model as a Path, None for the base itself. Raises ConfigError for another base, ModelError
    for a place where nothing is.
    """
    from lorry.models.loading.sources import resolve_model
    from lorry.notes import ignore_note

    named, plus, adapter = source.partition("+")
    # a folder's own name may hold a plus
    if plus and not Path(source).exists():
        if named != base:
            raise ConfigError(
                f"source_model={source}: the base model is {base}; the experts of a "
                "mixture share one"
            )
        return adapter
    if source == base:
        return None
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        return source  # an adapter's folder, or nothing: who opens it says which
    location = resolve_model(source, add_note=ignore_note)
    return source if location.adapter is not None else location.directory


def _title_of(folder: Path) -> str:
    """What messages call a whole model: of `experts/maths/merged`, maths."""
    place = folder.resolve()
    return place.parent.name if place.name == MERGED else place.name


def _open_whole(opened: OpenedModel, folder: Path) -> WholeExpert:
    """A whole model as an expert of the opened base. Raises ModelError for another shape, tokenizer or
    chat template."""
    from lorry.models.loading.tokenizer import load_tokenizer
    from lorry.models.moe.whole import WholeExpert
    from lorry.notes import ignore_note

    expert = WholeExpert.open(folder, expect_decoder(opened))
    its, own = load_tokenizer(folder, add_note=ignore_note), opened.tokenizer
    if its is not None and its.get_vocab() != own.get_vocab():
        raise ModelError(f"{folder}: not an expert of this base: its tokenizer has other tokens")
    if its is not None and its.chat_template != own.chat_template:
        raise ModelError(f"{folder}: not an expert of this base: its chat template is another")
    return expert


def _prompts_of(
    opened: OpenedModel, source: str | Path | None, expert: ExpertSource, gate_mode: str
) -> ExpertPrompts:
    """The prompts given; without any, where the expert is a run of one model, those of some of its
    training rows. Raises ConfigError."""
    from lorry.models.moe.gates import ExpertPrompts

    given = ExpertPrompts(expert.positive_prompts, expert.negative_prompts)
    if given.positive or source is None or gate_mode in RANDOM_GATES:
        return given
    folder = Path(source)
    if not (folder / RUN_FILE).is_file():
        return given
    try:
        rows = list(row_prompts(opened, folder).values())
    except DataError as error:
        raise ConfigError(f"{error}; give positive_prompts=[TEXT, ...]") from None
    if len(rows) != 1:  # of several jobs nothing says whose rows are meant
        return given
    print_note(
        f"note: gates of {source} are made of the prompts of {len(rows[0])} of its training rows"
    )
    return ExpertPrompts(rows[0], expert.negative_prompts)


def export_moe(
    opened: OpenedModel,
    output: Path,
    experts: Mapping[str, Mapping[str, float] | WholeExpert],
    routers: Sequence[Tensor],
    *,
    top_k: int,
    normalize: bool = True,
    attention: str = "refuse",
    dtype: str = "float32",
    measure: Callable[[Any], list[str]] | None = None,
) -> None:
    """Write the mixture of ``experts`` {name: {adapter: g}, or a whole model} of the opened base to
    ``output``. routers: [E, d] of each layer, over the normed input of its MLP.

    attention: what becomes of changes outside the MLPs, which these classes cannot route: "refuse"
    them, "average" them into the shared weights, or "drop" them. measure: what else to tell of the
    model opened again by transformers, in float32. ``opened`` is of no use afterwards.
    Raises ConfigError, ModelError for what the class cannot hold, ContractError if what was written
    is another mixture when it is opened again.
    """
    import torch

    from lorry.disk import durable
    from lorry.models.loading.reopen import (
        compare_logits,
        compute_fp32_logits,
        free_model_memory,
        reopen_model,
    )
    from lorry.models.moe.checkpoint import describe_moe, moe_tensors, save_moe

    model = expect_decoder(opened)
    twin = describe_moe(model.config, experts=len(experts), top_k=top_k, normalize=normalize)
    weights = MixtureWeights.of(opened, experts, attention)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    rows, rows_words = probe.probe_rows(opened)
    expected = plain_logits(opened, weights, routers, rows, top_k=top_k, dtype=torch_dtype)
    with durable.build_directory(output) as folder:
        save_moe(
            model,
            folder,
            twin,
            moe_tensors(model, twin, weights.shared, weights.expert, routers),
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


@dataclass(frozen=True)
class MixtureWeights:
    """The weights of a mixture of ``experts`` over the base ``model``, each made when it is asked
    for. ``mix``: {adapter: g} folded into what all experts share; ``changes``: {name: the whole models
    whose mean change of it is added there}."""

    model: Decoder
    experts: Sequence[Mapping[str, float] | WholeExpert]
    mix: Mapping[str, float]
    changes: Mapping[str, Sequence[WholeExpert]]

    @classmethod
    def of(
        cls,
        opened: OpenedModel,
        experts: Mapping[str, Mapping[str, float] | WholeExpert],
        attention: str,
    ) -> MixtureWeights:
        """Those of an opened base and its experts. Raises what `shared_mix` and `shared_changes`
        raise."""
        model, mix = expect_decoder(opened), shared_mix(opened, experts, attention)
        changes = shared_changes(model, experts, attention)
        return cls(model, list(experts.values()), mix, changes)

    def shared(self, name: str) -> Tensor:
        """A tensor that all experts share, by its name in the state dict."""
        from lorry.adapters.merge import fold_tensor

        tensor = fold_tensor(self.model, name, self.mix)
        if name not in self.changes:
            return tensor
        base = fold_tensor(self.model, name, {})
        moved = sum(whole.tensor(name) - base for whole in self.changes[name])
        return tensor + moved / len(self.experts)

    def expert(self, number: int, path: str) -> Tensor:
        """The weight of an expert's linear at a module path of the dense model."""
        from lorry.adapters.merge import fold_tensor

        source = self.experts[number]
        if isinstance(source, Mapping):
            return fold_tensor(self.model, f"{path}.weight", source)
        return source.tensor(f"{path}.weight")


def plain_logits(
    opened: OpenedModel,
    weights: MixtureWeights,
    routers: Sequence[Tensor],
    rows: Sequence[Tensor],
    *,
    top_k: int,
    dtype: torch.dtype,
) -> Tensor:
    """[T, V], the fp32 logits of ``rows`` in transformers' dense model with the mixture said plainly in place
    of its MLPs, of weights rounded to ``dtype`` as they are stored."""
    import torch

    from lorry.models.loading.reopen import compute_fp32_logits, reopen_model
    from lorry.models.moe.plain import plain_mixture

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).float()

    plain = reopen_model(Path(opened.source["path"]), torch.float32)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".mlp." not in name:
                parameter.copy_(rounded(weights.shared(name)))
    plain_mixture(
        plain,
        [rounded(router) for router in routers],
        lambda number, path: rounded(weights.expert(number, path)),
        top_k=top_k,
    )
    return compute_fp32_logits(plain, rows)


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


def shared_changes(
    model: Decoder, experts: Mapping[str, Mapping[str, float] | WholeExpert], attention: str
) -> dict[str, list[WholeExpert]]:
    """{name of a tensor that all experts share: the whole models that change it, to be averaged}.
    Raises ConfigError where there are some and ``attention`` is "refuse"."""
    from lorry.adapters.merge import fold_tensor

    if attention == "drop":
        return {}
    # a tied head is the embedding under another name
    tied = f"{model.family.head}.weight" if model.geometry.tied else None
    outside = [name for name in model.state_dict() if ".mlp." not in name and name != tied]
    moved: dict[str, list[WholeExpert]] = {}
    for title, expert in experts.items():
        if isinstance(expert, Mapping):
            continue
        for name in expert.changes_outside(outside, lambda n: fold_tensor(model, n, {})):
            if attention == "refuse":
                raise ConfigError(
                    f"expert {title!r} changes {name}, and this class of model routes MLPs only; attention=average puts "
                    "the mean of what the experts change outside of them into the shared weights, attention=drop "
                    "leaves it out"
                )
            moved.setdefault(name, []).append(expert)
    return moved


def shared_mix(
    opened: OpenedModel, experts: Mapping[str, Mapping[str, float] | WholeExpert], attention: str
) -> dict[str, float]:
    """{adapter: g} of what all experts share: nothing, or the mean of the adapters' attention.

    Raises ConfigError for adapters whose deltas the class cannot route.
    """
    from lorry.adapters.attach import get_bank

    model, bank = expect_decoder(opened), get_bank(opened.model, create=True)
    mixes = [expert for expert in experts.values() if isinstance(expert, Mapping)]
    used = {name: bank[name] for mix in mixes for name in mix}
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
    for mix in mixes:
        for name, gate in mix.items():
            shared[name] = shared.get(name, 0.0) + gate / len(experts)
    return shared
