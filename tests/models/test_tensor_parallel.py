"""Ranks that share the decoder compute what one device does: against transformers and PEFT in one
process, float64 formulas, and the decoder alone. The ranks are threads (`tests/support/threads.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.dropout import DropoutNoise, SeededDropout
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.router import RoutingRule, TokenRouter
from lorry.adapters.routing.gate_vectors import attach_gate_vectors
from lorry.adapters.routing.linear_router import SPECTRAL_ROUTERS, attach_spectral_router
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.tensor_parallel.slices import DimensionSlice, GatherColumns, LayerSlices
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.errors import ConfigError, ModelError
from lorry.families import find_family
from lorry.generation.engine import generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import parameter_count
from lorry.models.decoder.model import Decoder
from lorry.models.loading import tensor_files
from lorry.models.loading.load import load_model
from lorry.models.scoring import score, vocab
from lorry.models.scoring.score import TokenScore, evaluate_wants, log_prob
from tests.support import tiny
from tests.support.threads import ThreadRanks, on_ranks
from tests.support.tiny import one_thread  # noqa: F401 - a fixture

WORDS = 33  # which neither 2 nor 4 ranks divide
R = 3


@pytest.fixture(autouse=True)
def no_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tests of their own."""
    monkeypatch.setenv("LORRY_PROOFS", "0")


def model_of(name: str, **changes: Any) -> Any:
    """transformers' model of a variant, with heads that 2 and 4 ranks can share."""
    more = {"num_key_value_heads": 4} if "num_key_value_heads" in tiny.VARIANTS[name] else {}
    return tiny.fresh(name, vocab_size=WORDS, **more, **changes)


def decoder_of(inner: Any, ranks: TensorRanks | None, dtype: torch.dtype) -> Decoder:
    """Our decoder with its weights, or this rank's part of them."""
    config = inner.config.to_dict()
    family = find_family(config["model_type"])
    assert family is not None
    model = Decoder(family, config, ranks)
    cut, state = model.cut_tensors(), inner.state_dict()
    own = {
        name: (cut[name][1].cut(state[name], cut[name][0]) if name in cut else state[name])
        .to(dtype)
        .clone()
        for name in model.state_dict()
    }
    model.load_state_dict(own, assign=True)
    if model.geometry.tied:
        model.tie()
    return model.requires_grad_(False).eval()


def rows(n: int = 5) -> Batch:
    draw = torch.Generator().manual_seed(5)
    examples = list[TokenizedExample]()
    for i in range(n):
        # not 0, which is llama's padding: PEFT trains no column for it
        tokens = torch.randint(1, WORDS, (6 + i,), generator=draw).tolist()
        weights = [0.0, *torch.rand(len(tokens) - 1, generator=draw).tolist()]
        examples.append(TokenizedExample(tokens, weights, key=i, adapter=(0, 1, -1, 0, 1)[i]))
    return collate(examples)


def joined(parts: list[dict[str, Tensor]], cuts: list[Any]) -> dict[str, Tensor]:
    """Whole tensors from every rank's: sides that each has whole are those of the first."""
    return {
        name: value if cut is None else cut[1].join([part[name] for part in parts], cut[0])
        for (name, value), cut in zip(parts[0].items(), cuts, strict=True)
    }


def relative(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30))


class Step(NamedTuple):
    """Of one rank, or one device: scores, and by adapter and tensor gradients and initial values (of
    ranks: whole, their parts joined or added up)."""

    scores: Tensor
    grads: dict[str, Tensor]
    values: dict[str, Tensor]


def step_of(model: Decoder, mix: Mix, *, drop: bool = True, stop: Tensor | None = None) -> Step:
    batch = rows()
    noise = DropoutNoise(0, 3, tuple(batch.key.tolist()), tuple(batch.starts.tolist()))
    call = AdapterContext(mix, noise if drop else None)
    want = {"log_prob": TokenScore(log_prob)}
    scores = evaluate_wants(model, batch, want, call)["log_prob"]
    (-(scores * batch.weights).sum()).backward()
    grads, values = dict[str, Tensor](), dict[str, Tensor]()
    for name, adapter in get_bank(model).adapters.items():
        if model.ranks is not None:
            views = adapter.split_like(adapter.grads)
            for tensor in adapter.partial_sums():
                model.ranks.add_up(views[tensor])
        grads |= {f"{name}/{t}": g for t, g in adapter.whole_tensors(adapter.grads).items()}
        values |= {f"{name}/{t}": v.clone() for t, v in adapter.whole_factors().items()}
    return Step(scores.detach(), grads, values)


# --- against transformers and PEFT

LLAMA_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {
    "llama": (*LLAMA_NAMES, "embed_tokens", "lm_head"),
    "llama biased": LLAMA_NAMES,
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox parallel": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}


@pytest.mark.parametrize(
    ("name", "size"),
    [("llama", 2), ("llama biased", 4), ("gpt2", 2), ("gpt_neox parallel", 2)],
)
def test_ranks_give_the_gradients_of_peft(name: str, size: int) -> None:
    """In float64: loss, and the gradient of every A and B, of a step with random A and B."""
    inner, batch = model_of(name), rows()
    spec = LoraSpec(r=R, lora_alpha=6, target_modules=TARGETS[name], init_lora_weights=False)

    def work(ranks: ThreadRanks | None) -> Step:
        model = decoder_of(inner, ranks, torch.float64)
        attach(model, spec)
        return step_of(model, Mix.one("default"), drop=False)

    one, *several = [work(None), *on_ranks(size, work)]
    config = LoraConfig(r=R, lora_alpha=6, target_modules=list(TARGETS[name]))
    wrapped = get_peft_model(inner.double(), config, autocast_adapter_dtype=False)
    theirs = dict[str, nn.Parameter]()
    for key, p in wrapped.named_parameters():
        if p.requires_grad:
            key = key.removeprefix("base_model.model.").replace(".default", "")
            key = key.replace("lora_embedding_", "lora_").removesuffix(".weight")
            theirs[f"default/{key}"] = p
            # a module's initial values are those of one device, however many share it
            p.data.copy_(one.values[f"default/{key}"])
    assert theirs.keys() == one.values.keys()
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in batch.segments:
        tokens, weights = batch.tokens[start:stop], batch.weights[start:stop].double()
        logp = wrapped(tokens[None]).logits[0].log_softmax(-1)
        total = total - (logp[:-1].gather(1, tokens[1:, None])[:, 0] * weights[1:]).sum()
    total.backward()
    for rank in several:
        loss = -(rank.scores * batch.weights).sum()
        # transformers' norms and rotary angles are fp32 in any dtype
        assert abs(float(loss - total)) < 1e-6 * float(total)
        for key, p in theirs.items():
            assert torch.equal(rank.values[key], one.values[key]), key
            assert p.grad is not None
            assert relative(rank.grads[key], p.grad) < 1e-5, key


# --- against the decoder alone

TWO = {
    "a": LoraSpec(r=R, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False),
    "b": LoraSpec(
        r=5, use_rslora=True, target_modules=("q_proj", "down_proj", "lm_head"),
        layers_to_transform=None, init_lora_weights="gaussian",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "recompute", "limit"),
    [(torch.float64, True, 1e-6), (torch.float32, False, 1e-4), (torch.bfloat16, False, 0.1)],
)
def test_rows_of_several_adapters(dtype: torch.dtype, recompute: bool, limit: float) -> None:
    """Of other rank, places, initialisation and dropout, and rows of the base alone; layers run again
    or not. Ranks hold the same bits of what each has whole."""
    inner, batch = model_of("llama"), rows()
    names = ["a" if k == 0 else "b" if k == 1 else None for k in batch.adapter.tolist()]
    mix = Mix.per_sequence(names, batch.starts.tolist())

    def work(ranks: ThreadRanks | None) -> Step:
        model = decoder_of(inner, ranks, dtype)
        model.gradient_checkpointing = recompute
        for name, spec in TWO.items():
            attach(model, spec, name)
        return step_of(model, mix)

    one, *several = [work(None), *on_ranks(2, work)]
    for rank in several:
        assert relative(rank.scores, one.scores) < min(limit, 1e-2)
        assert all(torch.equal(rank.values[key], value) for key, value in one.values.items())
        assert max(relative(rank.grads[key], g) for key, g in one.grads.items()) < limit
        assert all(torch.equal(g, several[0].grads[key]) for key, g in rank.grads.items())


@pytest.mark.parametrize("level", ["delta", "expert"])
def test_a_router_of_the_layers_trains_alike(level: str) -> None:
    """A gate's gradient is a sum over ranks at every linear; the router's own is whole on each."""
    inner = model_of("llama")

    def work(ranks: ThreadRanks | None) -> tuple[Tensor, Step]:
        model = decoder_of(inner, ranks, torch.float64)
        spec = LoraSpec(r=R, target_modules="all-linear", init_lora_weights=False)
        for seed, name in enumerate(("x", "y", "z")):
            attach(model, spec, name, seed=seed)
        rule = RoutingRule("both", top_k=2, level=level)  # type: ignore[arg-type]
        router = TokenRouter(["x", "y", "z"], rule, layers=2, width=32)
        draw = torch.Generator().manual_seed(2)
        router.values.copy_(torch.randn(router.values.shape, generator=draw) * 0.3)
        made = step_of(model, router.mix(), drop=False)
        return router.grads.clone(), made

    one, *several = [work(None), *on_ranks(2, work)]
    assert float(one[0].norm()) > 0.01
    for grads, step in several:
        assert relative(grads, one[0]) < 1e-6
        assert relative(step.scores, one[1].scores) < 1e-12
        assert max(relative(step.grads[k], g) for k, g in one[1].grads.items()) < 1e-6


@pytest.mark.parametrize(
    ("name", "recompute", "dora"),
    [
        ("llama", False, False),
        ("llama", True, False),
        ("gpt2", False, False),
        ("llama", False, True),
    ],
)
def test_ranks_divide_what_layers_keep(name: str, recompute: bool, dora: bool) -> None:
    """With `sequence_parallel` every number is the same to the bit, and each rank keeps its tokens' part
    of a layer's input and of the stream before the MLP (of DoRA what attention adds to it): [T,D] each, of 45
    tokens 23."""

    def work(ranks: ThreadRanks, divide: bool) -> tuple[Step, int, int]:
        model = decoder_of(model_of(name), ranks, torch.float32)
        model.gradient_checkpointing, model.sequence_parallel = recompute, divide
        attach(model, replace(TWO["a"], use_dora=dora))
        kept = list[Tensor]()

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made = step_of(model, Mix.one("default"))
        streams = [t for t in kept if t.dim() == 2 and t.shape[1] == 32]
        rows_kept = sum(t.untyped_storage().nbytes() // (4 * 32) for t in streams)
        gathered = [g for g in ranks.gathers if g.shape == (-(-tokens // 2), 32)]
        return made, rows_kept, len(gathered)

    tokens = rows().tokens.numel()
    whole, divided = (on_ranks(2, lambda r, d=d: work(r, d)) for d in (False, True))
    for (plain, rows_plain, none), (made, rows_made, gathers) in zip(whole, divided, strict=True):
        assert torch.equal(made.scores, plain.scores)
        assert all(torch.equal(made.grads[key], g) for key, g in plain.grads.items())
        # two layers: of each its input, and the stream before the MLP where it does not run again
        kept = 2 if recompute else 4
        assert rows_plain - rows_made == kept * (tokens - -(-tokens // 2))
        assert (none, gathers) == (0, kept)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox parallel"])
@pytest.mark.parametrize("kind", ["arrow", "spectr", "phatgoose", "sigmoid"])
def test_a_router_of_single_linears_reads_whole_inputs(name: str, kind: str) -> None:
    """Of which ranks have a part at a row-parallel linear: scores, and the gradients of experts and of
    the router's own vectors; also in the training of these, where each has its own sigmoid."""
    inner = model_of(name)

    def work(ranks: ThreadRanks | None) -> tuple[Tensor | None, Step]:
        model = decoder_of(inner, ranks, torch.float64)
        for seed, expert in enumerate(("x", "y", "z")):
            rank = R + seed  # a router pads what has fewer rows
            spec = LoraSpec(r=rank, target_modules="all-linear", init_lora_weights=False)
            attach(model, spec, expert, seed=seed)
        if kind in SPECTRAL_ROUTERS:
            router = attach_spectral_router(model, kind, ("x", "y", "z"))
            return None, step_of(model, router.mix(), drop=False)
        vectors = attach_gate_vectors(model, ("x", "y", "z"))
        draw = torch.Generator().manual_seed(2)
        vectors.values.copy_(torch.randn(vectors.values.shape, generator=draw) * 0.3)
        mix = vectors.mix() if kind == "phatgoose" else vectors.training_mix("y")
        made = step_of(model, mix, drop=False)
        return vectors.grads.clone(), made

    one, *several = [work(None), *on_ranks(2, work)]
    assert max(float(g.norm()) for g in one[1].grads.values()) > 1e-3
    for grads, step in several:
        assert relative(step.scores, one[1].scores) < 1e-9
        assert max(relative(step.grads[k], g) for k, g in one[1].grads.items()) < 1e-5
        if grads is not None and one[0] is not None:
            assert float(one[0].norm()) > 1e-3
            assert relative(grads, one[0]) < 1e-5


def test_a_sum_of_a_rank_is_made_four_times_a_layer() -> None:
    """[T,D] each: behind attention and the MLP forward, before the norms backward; none of the lowest
    layer's input, where nothing below trains. One for the embedding, one for d hidden."""

    def work(ranks: ThreadRanks) -> tuple[int, int]:
        model = decoder_of(model_of("llama"), ranks, torch.float32)
        attach(model, LoraSpec(r=R, target_modules="all-linear", init_lora_weights=False))
        step_of_sums(model)
        layers, tokens = 4 * 2 - 1, rows().tokens.numel()
        states = [s for s in ranks.sums if s.shape == (tokens, 32)]
        supervised = [s for s in ranks.sums if s.shape == (rows().rows.numel(), 32)]
        assert len(states) + len(supervised) == len(ranks.sums)
        assert len(supervised) == 1
        return len(states), 1 + layers

    counted, formula = on_ranks(2, work)[0]
    assert counted == formula


def step_of_sums(model: Decoder) -> None:
    batch = rows()
    want = {"log_prob": TokenScore(log_prob)}
    scores = evaluate_wants(model, batch, want, AdapterContext(Mix.one("default")))["log_prob"]
    scores.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_one_device(dtype: torch.dtype) -> None:
    """Greedy and sampled, with an adapter; the same on every rank. bfloat16 takes the kernels where
    they run, whose answers are those of ranks alike."""
    inner = model_of("llama", max_position_embeddings=128)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    sampling = [
        SamplingParams(max_new_tokens=8),
        SamplingParams(max_new_tokens=6, temperature=1.0, seed=3),
    ]

    def work(ranks: ThreadRanks | None) -> list[list[int]]:
        model = decoder_of(inner, ranks, dtype)
        attach(model, TWO["a"], "a")
        return [
            list(completion.tokens)
            for params in sampling
            for completion in generate_completions(model, prompts, params, adapters="a")
        ]

    one, *several = [work(None), *on_ranks(2, work)]
    assert several[0] == several[1]
    if dtype == torch.float32:
        assert several[0] == one


# --- scores of a shared vocabulary, against float64 over whole logits


class SharedHead:
    """A model that is nothing but its head, of which a rank has some rows."""

    def __init__(self, weight: Tensor, ranks: ThreadRanks) -> None:
        self.part = DimensionSlice(len(weight), ranks.size, ranks.rank)
        self.ranks = ranks
        own = nn.Parameter(self.part.cut(weight, 0), requires_grad=False)
        self.head = BankLinear(own, None, path="lm_head")
        self.head.slices = LayerSlices(ranks, rows=self.part)

    def logits(self, hidden: Tensor, call: AdapterContext) -> Tensor:
        whole: Tensor = GatherColumns.apply(self.head(hidden, call), self.part, self.ranks)
        return whole


def spread(logits: Tensor, rows: vocab.VocabRows) -> Tensor:
    """No statistic: any function of whole rows."""
    return logits.logsumexp(1) - logits.mean(1)


SCORES: dict[str, list[Any]] = {
    "one pass": [log_prob, vocab.correct],
    "two passes": [log_prob, vocab.entropy, vocab.min_k, vocab.label_smoothed(0.1)],
    "whole rows": [spread, vocab.soft_cross_entropy(lambda rows: rows.extra["q"])],
    "by chunks": [spread, vocab.log_prob, spread, spread],
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-11), (torch.bfloat16, 3e-2)])
def test_scores_of_a_shared_head(kind: str, dtype: torch.dtype, limit: float) -> None:
    """Values and their gradient with respect to the hidden state, on every rank whole."""
    draw, v, d = torch.Generator().manual_seed(1), 300, 16
    weight = torch.randn(v, d, generator=draw, dtype=torch.float64).to(dtype)
    hidden = torch.randn(40, d, generator=draw, dtype=torch.float64).to(dtype)
    tokens = torch.randint(0, v, (40,), generator=draw).tolist()
    batch = collate([TokenizedExample(tokens, [0.0, *[1.0] * 39], key=0)])
    q = torch.rand(40, v, generator=draw, dtype=torch.float64).softmax(1)
    fns = SCORES[kind]
    upstream = torch.rand(39, len(fns), generator=draw, dtype=torch.float64)
    batch = batch.with_extra(q=BatchExtra(q, "token"))

    def work(ranks: ThreadRanks) -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        model: Any = SharedHead(weight, ranks)
        table = score.score_supervised_tokens(model, leaf, batch, fns, AdapterContext())
        (table * upstream.to(table.dtype)).sum().backward()
        assert leaf.grad is not None
        return table.detach(), leaf.grad

    wide = hidden.double().clone().requires_grad_()
    logits = wide[batch.rows - 1] @ weight.double().t()
    at = vocab.VocabRows(batch.tokens[batch.rows], {"q": q[batch.rows]})
    truth = torch.stack([fn(logits, at) for fn in fns], 1)
    (truth * upstream).sum().backward()
    assert wide.grad is not None
    for table, grad in on_ranks(3, work):
        assert relative(table, truth.detach()) < limit
        assert relative(grad, wide.grad) < limit


def test_rows_that_are_not_finite_or_beyond_some_ranks() -> None:
    """NaN stays where it is; a rank whose logits are all -inf counts for nothing; of equal logits the
    first token is the likeliest, whichever rank has it."""
    weight = torch.zeros(6, 1, dtype=torch.float64)
    weight[:3, 0] = torch.tensor([-torch.inf, -torch.inf, -torch.inf])
    weight[3:, 0] = torch.tensor([1.0, 2.0, 2.0])
    batch = collate([TokenizedExample([0, 4, 5, 3], [0.0, 1.0, 1.0, 1.0], key=0)])
    hidden = torch.tensor([[1.0], [1.0], [torch.nan], [1.0]], dtype=torch.float64)

    def work(ranks: ThreadRanks) -> Tensor:
        model: Any = SharedHead(weight, ranks)
        fns = [log_prob, vocab.correct]
        with torch.no_grad():
            return score.score_supervised_tokens(model, hidden, batch, fns, AdapterContext())

    expected = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64).log_softmax(0)
    for table in on_ranks(2, work):
        torch.testing.assert_close(table[:2, 0], expected[1:], rtol=1e-12, atol=0)
        assert table[:2, 1].tolist() == [1.0, 0.0]
        assert table[2, 0].isnan()
        assert table[2, 1] == 0.0


# --- dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("whole", "ranks"), [(12, 2), (10, 2), (9, 3)])
def test_dropout_of_a_part_is_the_part_of_the_dropout(
    dtype: torch.dtype, whole: int, ranks: int
) -> None:
    """Kernel and plain torch, also where a part begins at an odd column or has an odd width."""
    noise = DropoutNoise(0, 1, (7, 9), (0, 3, 8))
    x = torch.ones(8, whole, dtype=dtype)
    full = noise.at("0.mlp.out", 0.5).apply(x, slice(None))
    assert 0 < int((full == 0).sum()) < full.numel()
    for rank in range(ranks):
        part = DimensionSlice(whole, ranks, rank)
        dropout = noise.at("0.mlp.out", 0.5, part)
        expected = part.cut(full, 1)
        assert torch.equal(dropout.apply(part.cut(x, 1).contiguous(), slice(None)), expected)
        picked = SeededDropout(dropout.seeds, dropout.starts, 0.5, torch.tensor([1, 6]), part)
        some = picked.apply(part.cut(x, 1)[[1, 6]], slice(None))
        assert torch.equal(some, expected[[1, 6]])


# --- files


def test_each_rank_reads_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As slices of the file, never a whole cut tensor; the base is known by the same digest, and
    counted whole."""
    for name in ("gpt2", "llama tied", "gpt_neox parallel"):
        inner, folder = model_of(name), tmp_path / name
        tiny.directory(inner, folder)
        truth = load_model(folder, dtype="float32", add_note=print).model
        original, read = tensor_files._read_part, list[int]()

        def counted(*given: Any, original: Any = original, read: list[int] = read) -> Tensor:
            read.append(1)
            part: Tensor = original(*given)
            return part

        monkeypatch.setattr(tensor_files, "_read_part", counted)

        def work(ranks: ThreadRanks, folder: Path = folder) -> tuple[Decoder, str, int]:
            model = load_model(folder, dtype="float32", ranks=ranks, add_note=print).model
            assert isinstance(model, Decoder)
            return model, base_digest(model), parameter_count(model)

        shared = on_ranks(2, work)
        monkeypatch.setattr(tensor_files, "_read_part", original)
        assert isinstance(truth, Decoder)
        for model, digest, count in shared:
            cut = model.cut_tensors()
            stored = load_file(folder / "model.safetensors")
            assert len(read) >= 2 * len(cut.keys() & stored.keys())
            # what lies in memory: no slice is a view of the whole tensor
            own = sum(p.untyped_storage().nbytes() // 4 for p in model.parameters())
            assert own < 0.6 * count
            assert (digest, count) == (base_digest(truth), parameter_count(truth))
            for key, value in model.state_dict().items():
                expected = truth.state_dict()[key]
                if key in cut:
                    expected = cut[key][1].cut(expected, cut[key][0])
                assert torch.equal(value, expected), key


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("llama", 3, ["does not divide", "4 heads", "2 and 4 do"]),
        ("gemma2", 2, ["only Lorry's own decoder"]),
    ],
)
def test_models_that_cannot_be_shared(
    tmp_path: Path, name: str, size: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a weight is read, on every rank."""
    inner = tiny.random_model(
        {**{**tiny.VARIANTS, **tiny.FOREIGN}[name], "vocab_size": 48, "num_key_value_heads": 4}
    )
    tiny.directory(inner, tmp_path)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as raised:
        on_ranks(size, lambda ranks: load_model(tmp_path, ranks=ranks, add_note=print))
    assert all(word in str(raised.value) for word in words), raised.value


def test_adapters_are_read_and_written_whole(tmp_path: Path) -> None:
    """What ranks write is the file of one device, byte by byte, and each takes its part of it."""
    inner = model_of("gpt2")
    spec = LoraSpec(r=R, target_modules="all-linear", init_lora_weights=False)
    one = decoder_of(inner, None, torch.float32)
    attach(one, spec)
    save_adapter(one, tmp_path / "one")

    def work(ranks: ThreadRanks) -> bytes:
        model = decoder_of(inner, ranks, torch.float32)
        adapter = load_adapter(model, tmp_path / "one", "default", other_base=True)
        for key, whole in get_bank(one)["default"].tensors().items():
            assert torch.equal(adapter.whole_factors()[key], whole)
        assert adapter.num_parameters() == get_bank(one)["default"].num_parameters()
        folder = tmp_path / f"rank-{ranks.rank}"
        save_adapter(model, folder)
        return (folder / "adapter_model.safetensors").read_bytes()

    expected = (tmp_path / "one" / "adapter_model.safetensors").read_bytes()
    assert on_ranks(2, work) == [expected, expected]


def test_an_adapter_of_another_size_is_refused_by_its_whole_shape(tmp_path: Path) -> None:
    inner = model_of("llama")
    one = decoder_of(inner, None, torch.float32)
    attach(one, LoraSpec(r=R, target_modules=["down_proj"]))
    save_adapter(one, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "lora_A" in key)
    # as wide as a rank's part
    save_file({**tensors, name: tensors[name][:, : tensors[name].shape[1] // 2].contiguous()}, file)

    def work(ranks: ThreadRanks) -> None:
        load_adapter(decoder_of(inner, ranks, torch.float32), tmp_path, other_base=True)

    with pytest.raises(ModelError, match=rf"is \[{R}, 24\].*needs \[{R}, 48\]"):
        on_ranks(2, work)
