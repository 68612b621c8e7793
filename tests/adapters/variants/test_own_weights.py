"""Whole modules, rows and biases that an adapter has in the base's place: PEFT's files both ways, and the
gradients of one step, against PEFT over transformers; in attached models, behind Lorry's face and in its
own decoder. All in float32 but where a test says so."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.adapter import AdapterOrigin
from lorry.adapters.attach import attach, detach, get_bank, lora_parameters
from lorry.adapters.merge import merge, merged_tensors, separates_tied_head, unmerge
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.peft.tensors import PEFT_PREFIX
from lorry.adapters.spec import LoraSpec
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.data.batch import TokenizedExample, collate
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.families import find_family
from lorry.generation.engine import generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel
from lorry.models.scoring.score import (
    HiddenState,
    PromptState,
    TokenScore,
    evaluate_wants,
    log_prob,
)

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}
EMBED = {"gpt2": "wte", "gpt_neox": "embed_in"}
NORM = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}
KINDS = ("qwen2", "qwen3", "gpt2", "gpt_neox")
# in PEFT's words; {e} and {n} are a family's embedding and last norm
CASES: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["{e}"]},
    "both, untied": {"modules_to_save": ["{e}", "lm_head"]},
    "both, tied": {"modules_to_save": ["{e}", "lm_head"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["{n}"]},
    "whole MLPs": {"modules_to_save": ["mlp"]},
    "rows": {"trainable_token_indices": [9, 3, 5]},
    "rows of the embedding": {"trainable_token_indices": {"{e}": [3, 5]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": [3, 5]}},
    "other rows of each": {"trainable_token_indices": {"{e}": [5, 9], "lm_head": [7, 3]}},
    "all biases": {"bias": "all"},
    "targets' biases": {"bias": "lora_only"},
}


# a tied Llama has every case, and each of them one more family
GRID = [
    (kind, case)
    for n, case in enumerate(CASES)
    for kind in ("llama-tied", KINDS[(n + n // 4) % len(KINDS)])
]


def settings_of(kind: str, name: str) -> dict[str, Any]:
    """PEFT's settings of a case for one family."""

    def words(value: Any) -> Any:
        if isinstance(value, dict):
            return {words(k): words(v) for k, v in value.items()}
        if isinstance(value, list):
            return [words(v) for v in value]
        if not isinstance(value, str):
            return value
        embed, norm = EMBED.get(kind, "embed_tokens"), NORM.get(kind, "norm")
        return value.replace("{e}", embed).replace("{n}", norm)

    case = words(CASES[name])
    return {"r": 2, "lora_alpha": 4, "target_modules": [LINEAR.get(kind, "q_proj")], **case}


def native(model: Any) -> Decoder:
    """Lorry's decoder with the weights of a transformers model."""
    config = model.config.to_dict()
    family = find_family(config["model_type"])
    assert family is not None
    own = Decoder(family, config)
    state = {name.replace("embed_out", "lm_head"): t for name, t in model.state_dict().items()}
    own.load_state_dict({n: t for n, t in state.items() if n in own.state_dict()})
    if own.geometry.tied:
        own.tie()
    return own.eval()


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "attached": lambda model: model,
    "behind our face": HfModel,
    "our decoder": native,
}


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def shaken(model: nn.Module) -> None:
    """Every parameter that trains somewhere near where it is."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=draw) * 0.2)


@torch.no_grad()
def shake_adapter(model: nn.Module, name: str = "default") -> None:
    """The same of all that an adapter of ours has."""
    adapter = get_bank(model)[name]
    draw = torch.Generator().manual_seed(1)
    adapter.values.add_(torch.randn(adapter.values.shape, generator=draw) * 0.2)
    adapter.touch()


def stored(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours by PEFT's names."""
    names = {name: f"{name}.weight" if name[-6:-1] == "lora_" else name for name in gradients}
    return {f"{PEFT_PREFIX}{names[name]}": grad for name, grad in gradients.items()}


@pytest.mark.parametrize(("kind", "name"), GRID)
def test_files_logits_and_gradients_are_pefts(
    kind: str, name: str, tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    settings = settings_of(kind, name)
    theirs = peft.get_peft_model(
        tiny(kind), peft.LoraConfig(task_type="CAUSAL_LM", **deepcopy(settings))
    )
    shaken(theirs.eval())
    theirs.save_pretrained(tmp_path / "theirs")
    loss = loss_of(theirs, ids)
    loss.backward()
    wanted = {n: torch.zeros_like(t) for n, t in theirs.state_dict().items()}
    wanted |= {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    gradients = peft.get_peft_model_state_dict(theirs, state_dict=wanted)
    for way, wrap in WAYS.items():
        model = wrap(tiny(kind))
        adapter = load_adapter(model, tmp_path / "theirs")
        own = loss_of(model, ids)
        own.backward()
        torch.testing.assert_close(own, loss, rtol=1e-5, atol=1e-6, msg=way)
        ours = stored(adapter.split_like(adapter.grads))
        # of a tied pair PEFT names one side, or both
        assert set(ours) <= set(gradients), way
        assert len(ours) > 2 or "bias" in settings, way
        for tensor, grad in ours.items():
            torch.testing.assert_close(
                grad, gradients[tensor], rtol=1e-4, atol=1e-6, msg=f"{way} {tensor}"
            )
        # the base is as it was, for whoever runs without the adapter
        assert not any(p.requires_grad for p in model.parameters())
        save_adapter(model, tmp_path / "ours", base_name="some/base")
        back = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "ours").eval()
        torch.testing.assert_close(loss_of(back, ids), loss, rtol=1e-5, atol=1e-6)
        get_bank(model).activate(Mix.none())
        bare = WAYS[way](tiny(kind))
        assert torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits), way
        detach(model)
        assert torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits), way


# Llama has no biases
@pytest.mark.parametrize(("kind", "name"), [*GRID[:20:2], *GRID[21::2]])
def test_merged_it_is_the_same_model(kind: str, name: str, tiny: Any, ids: Tensor) -> None:
    """In place, streamed and loaded as a model; and taken out again, bit for bit."""
    for way in ("attached", "our decoder"):
        model = WAYS[way](tiny(kind))
        attach(model, LoraSpec(**settings_of(kind, name)))
        shake_adapter(model)
        params = dict(model.named_parameters())
        before = model(input_ids=ids).logits
        untied = separates_tied_head(model)
        streamed = dict(merged_tensors(model))
        report = merge(model)
        after = model(input_ids=ids).logits
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5, msg=way)
        assert report.untied == untied
        assert all(row.delta > 0 for row in report.rows)
        twin = tiny(kind, **({"tie_word_embeddings": False} if untied else {}))
        missing, unknown = twin.load_state_dict(streamed, strict=False)
        assert not unknown
        assert set(missing) <= ({"lm_head.weight"} if not untied else set())
        twin.tie_weights()
        torch.testing.assert_close(twin(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
        get_bank(model).activate(Mix.one("default"))
        with pytest.raises(ContractError, match="is merged; call unmerge"):
            model(input_ids=ids)
        get_bank(model).activate(Mix.none())
        unmerge(model)
        assert all(p is params[n] for n, p in model.named_parameters()), way
        assert torch.equal(model(input_ids=ids).logits, before), way


def examples(adapters: list[int]) -> Any:
    """A batch of sequences of 7 to 10 tokens, numbered by adapter (-1: the base)."""
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 60, (7 + n,), generator=draw).tolist() for n in range(len(adapters))]
    return collate(
        [
            TokenizedExample(row, [0.0] * 3 + [1.0] * (len(row) - 3), adapter=adapter, key=n)
            for n, (row, adapter) in enumerate(zip(rows, adapters, strict=True))
        ]
    )


@pytest.mark.parametrize("way", ["behind our face", "our decoder"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sequences_of_several_owners_are_run_apart(way: str, dropout: float, tiny: Any) -> None:
    """One batch of two adapters with norms, rows and heads of their own, a plain one and the base: scores
    and gradients are those of each sequence by itself."""
    specs = [
        LoraSpec(r=2, lora_dropout=dropout, modules_to_save=("norm",)),
        LoraSpec(r=2, lora_dropout=dropout, trainable_token_indices=(9, 30, 4)),
        LoraSpec(r=2, lora_dropout=dropout, modules_to_save=("lm_head",)),
        LoraSpec(r=2, lora_dropout=dropout),
    ]
    model = WAYS[way](tiny("llama-tied"))
    for n, spec in enumerate(specs):
        attach(model, spec, f"a{n}")
        shake_adapter(model, f"a{n}")
    backend = LocalBackend(model, [f"a{n}" for n in range(4)], OptimSettings())
    batch = examples([0, 1, -1, 2, 3, 1, 0])
    wants = {"s": TokenScore(log_prob), "h": HiddenState(1), "p": PromptState(None, "mean")}

    def run(part: Any) -> dict[str, Tensor]:
        call = AdapterContext(
            backend.batch_mix(part, backend.trained), backend._noise(part, backend.trained, 0)
        )
        return evaluate_wants(model, part, wants, call)

    def gradients(losses: list[Tensor]) -> dict[str, Tensor]:
        for owner in backend.owners.values():
            owner.grads.zero_()
        sum(losses).backward()
        return {name: owner.grads.clone() for name, owner in backend.owners.items()}

    together = run(batch)
    alone = [run(select(batch, [s])) for s in range(len(batch))]
    for name in wants:
        expected = torch.cat([got[name] for got in alone])
        torch.testing.assert_close(together[name], expected, rtol=1e-5, atol=1e-5)
    ours = gradients([together["s"].sum()])
    for name, wanted in gradients([got["s"].sum() for got in alone]).items():
        # of the whole: single entries are sums that cancel
        assert (ours[name] - wanted).norm() <= 1e-5 * wanted.norm(), name
        assert bool(wanted.any()), name


def select(batch: Any, sequences: list[int]) -> Any:
    """Some sequences of a batch, by its examples."""
    return collate(
        [
            TokenizedExample(
                batch.tokens[slice(*batch.segments[s])].tolist(),
                batch.weights[slice(*batch.segments[s])].tolist(),
                adapter=int(batch.adapter[s]),
                key=int(batch.key[s]),
            )
            for s in sequences
        ]
    )


@pytest.mark.parametrize("way", ["behind our face", "our decoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_each_alone(way: str, dtype: torch.dtype, tiny: Any) -> None:
    """Requests of several owners in one engine, greedy; bfloat16 takes the decode kernels where there are."""
    model = WAYS[way](tiny("llama-tied").to(dtype))
    attach(model, LoraSpec(r=2, modules_to_save=("norm", "lm_head")), "whole")
    attach(model, LoraSpec(r=2, trainable_token_indices=tuple(range(10, 50))), "rows")
    for name in ("whole", "rows"):
        shake_adapter(model, name)
    prompts, params = [[5, 9, 30], [7, 8], [12, 40, 3, 5]], SamplingParams(max_new_tokens=6)
    names: list[str | None] = ["whole", "rows", None]
    wanted = [
        generate_completions(model, [prompt], params, adapters=[name])[0].tokens
        for name in names
        for prompt in prompts
    ]
    several = [(name, prompt) for name in names for prompt in prompts]
    several = several[::2] + several[1::2]
    got = generate_completions(
        model, [p for _, p in several], params, adapters=[n for n, _ in several], batch_rows=4
    )
    place = {
        (name, tuple(p)): n for n, (name, p) in enumerate((n, p) for n in names for p in prompts)
    }
    for (name, prompt), one in zip(several, got, strict=True):
        assert one.tokens == wanted[place[name, tuple(prompt)]], (name, prompt)
    assert len({tuple(tokens) for tokens in wanted}) > 6, "the adapters must matter"


def test_bfloat16_steps_move_masters_and_what_passes_read(tiny: Any) -> None:
    """A base in bfloat16 on our decoder: fp32 masters, copies made anew after a step; gradients within
    bfloat16's rounding of float32's."""
    settings = {
        "r": 2,
        "lora_alpha": 4,
        "modules_to_save": ("norm", "lm_head"),
        "trainable_token_indices": {"embed_tokens": (9, 30, 4)},
    }
    grads = {}
    batch = examples([0, 0, 0])
    for dtype in (torch.float32, torch.bfloat16):
        model = native(tiny("llama").bfloat16().to(dtype))
        adapter = attach(model, LoraSpec(**settings))
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.05)
        scores = []
        for step in range(3):
            optimizer.zero_grad(set_to_none=False)
            got = evaluate_wants(
                model, batch, {"s": TokenScore(log_prob)}, AdapterContext(Mix.one("default"))
            )
            loss = -got["s"].sum() / int(batch.weights.sum())
            loss.backward()
            scores.append(float(loss))
            if step == 0:
                grads[dtype] = {n: g.clone() for n, g in adapter.split_like(adapter.grads).items()}
            optimizer.step()
        assert scores[0] > scores[1] > scores[2], "a stale copy would not move"
        assert adapter.values.dtype == torch.float32
    for name, grad in grads[torch.float32].items():
        if name.endswith("lora_A"):
            continue  # 0: B is
        difference = (grads[torch.bfloat16][name] - grad).norm() / grad.norm()
        assert difference < 0.05, (name, float(difference))


def test_what_has_no_meaning_is_refused(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    model = native(tiny("llama-tied"))
    attach(model, LoraSpec(r=2, modules_to_save=("norm",)), "one")
    attach(model, LoraSpec(r=2, modules_to_save=("norm",)), "two")
    with pytest.raises(ContractError, match="'one', 'two' have weights of their own here"):
        model(input_ids=ids)
    with pytest.raises(ConfigError, match=r"norm\.weight beside .* train over model=DIR"):
        get_bank(model).move_to_base("one", AdapterOrigin("somewhere", "0" * 64))
    get_bank(model).activate(Mix.constants({"one": 0.5}))
    with pytest.raises(ContractError, match=r"no meaning at g = 0\.5"):
        model(input_ids=ids)
    with pytest.raises(ConfigError, match=r"has no weight but 1 \(asked: 0\.5\)"):
        merge(model, {"one": 0.5})
    with pytest.raises(ConfigError, match="both have model"):
        merge(model, {"one": 1.0, "two": 1.0})
    for spec, message in [
        ({"modules_to_save": ("norms",)}, "'norms', which matches no module"),
        ({"modules_to_save": ("lm_head",), "target_modules": ("lm_head",)}, "trains whole or"),
        ({"modules_to_save": ("mlp",), "target_modules": "all-linear"}, "trains whole or"),
        ({"trainable_token_indices": (64,)}, "64 rows, 0 to 63"),
        ({"trainable_token_indices": (3,), "target_modules": ("embed_tokens",)}, "both train"),
        ({"trainable_token_indices": (3,), "modules_to_save": ("embed_tokens",)}, "both train"),
        ({"trainable_token_indices": {"norm": (3,)}}, "takes an embedding or a head"),
        (
            {"target_modules": ("q_proj", "embed_tokens"), "ensure_weight_tying": True},
            "model.embed_tokens and lm_head are apart here",
        ),
        ({"target_modules": ("lm_head",), "ensure_weight_tying": True}, "are apart here"),
        (
            {
                "trainable_token_indices": {"embed_tokens": (3,), "lm_head": (4,)},
                "ensure_weight_tying": True,
            },
            "other tokens for the head",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            attach(native(tiny("llama-tied")), LoraSpec(**spec))
    for spec, message in [
        ({"trainable_token_indices": (3, 3)}, "names token 3 twice"),
        ({"trainable_token_indices": (-1,)}, "has -1"),
        ({"trainable_token_indices": ()}, "must be a list of token ids"),
        ({"modules_to_save": "norm"}, "must be a list of names"),
        ({"bias": "some"}, "none, all or lora_only"),
        ({"layers_pattern": "layers"}, "give layers_to_transform"),
        ({"bias": "all", "alora_invocation_tokens": (5, 6)}, "bias does not go with alora"),
    ]:
        with pytest.raises(ConfigError, match=message):
            LoraSpec(**spec)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["k_proj", "norm"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["self_attn"], "target_modules": ["up_proj"]},
    ],
    ids=["linears", "blocks"],
)
def test_biases_of_whole_modules_beside_all_others(
    settings: dict[str, Any], tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    """PEFT writes those of whole modules three times, once as the base has them."""
    asked = peft.LoraConfig(r=2, bias="all", task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(tiny("qwen2"), asked).eval()
    shaken(theirs)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    copies = [name for name in tensors if ".modules_to_save." in name]
    base = [name for name in tensors if ".original_module." in name]
    assert copies
    assert len(base) == len(copies)
    model = tiny("qwen2")
    adapter = load_adapter(model, tmp_path)
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
        assert (tiny("qwen2")(input_ids=ids).logits - wanted).abs().max() > 1e-2
    assert all(".bias" not in name or "original" not in name for name in adapter.tensors())
    # and back: what Lorry writes is each once
    save_adapter(model, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(tiny("qwen2"), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    for name, message in ((copies[0], "two different ones"), (base[0], "differs from the weight")):
        save_file({**tensors, name: tensors[name] + 1}, file)
        with pytest.raises(ModelError, match=message):
            load_adapter(tiny("qwen2"), tmp_path)


def test_layers_pattern_says_which_number_is_a_layers(tiny: Any) -> None:
    """As PEFT selects them, which is the judge."""
    settings = {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    }
    model = tiny("llama")
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    adapter = attach(model, LoraSpec(**settings))
    assert [f"base_model.model.{path}" for path in adapter.slots] == [
        name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    ]
    with pytest.raises(ConfigError, match="names layer 1"):
        attach(model, LoraSpec(**{**settings, "layers_pattern": "blocks"}), "other")
