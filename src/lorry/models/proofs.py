"""Proofs on random tokens, made whenever a model is loaded: what every use of a causal language
model takes for granted.

(a) No position sees a later one. Otherwise the answer is read while it is "predicted": every loss is a lie, and nothing shows it.
(b) Reading a prompt into a cache and going on token by token gives what reading the whole sequence gives.
(c) The native decoder gives transformers' own logits for this directory's config, also for fields that transformers reads with
    `getattr` and its config class does not list (`is_causal`). What differs never runs natively.

A model of transformers' is proven itself, (a) and (b), as it was loaded. The native decoder is
proven as a twin: this config with few, narrow layers and random weights, once in transformers'
class and once in ours, so the price does not grow with the model.

What held is kept under `$LORRY_HOME/proofs`, in a file named by everything it depends on (of a
model of transformers' its class, its settings and a sample of its weights, too) that holds why it
generates without a cache, if it does. It is not shown again while the file is there: the newest
`MAX_SAVED_PROOFS` are, by last use. What failed (a) or (c) is not kept.

(a) needs no tolerance: where the forward pass of unchanged tokens is not the same to the bit
(experts are computed in groups whose size depends on all tokens), the gradient decides, which is
zero exactly where nothing is seen.

`LORRY_PROOFS=0` leaves them out, with a note.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorry.adapters.mix import AdapterContext
from lorry.disk.home import lorry_home
from lorry.disk.kept import KeptAnswers
from lorry.errors import (
    ContractError,
    ModelError,
    OutOfMemoryError,
    RunInterruptedError,
    allocation_failure,
)
from lorry.families import ModelFamily
from lorry.models.causal_lm import CausalLM, PackedInput
from lorry.models.decoder.decode import DecodeRunner
from lorry.models.decoder.model import Decoder
from lorry.models.loading.describe import model_file_errors, silence_transformers
from lorry.models.loading.digest import sample_digest
from lorry.notes import NoteCallback

if TYPE_CHECKING:
    from lorry.models.hf.model import HfModel

PROOFS_VARIABLE = "LORRY_PROOFS"
PROOF_TOKENS = 16  # tokens of each sequence
# sequence i is changed from its token CUT_POSITIONS[i] on; odd and even, so that no block structure
# lines up
CUT_POSITIONS = (
    5,
    10,
    15,
)
DECODE_STEPS = 2  # tokens read one by one after the prompts
# what 8-bit products move by their neighbours (1e-3 seen); models that look ahead move by a tenth
# and more
QUANTISED_TOLERANCE = 3e-2
# Relative error of hidden states that were computed in another shape. A wrong position or a lost
# key gives a tenth and more; 30 layers give 1e-2 in bfloat16, 1e-3 in float16 (SmolLM2-135M).
ROUNDING_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
TWIN_TOLERANCE = 2e-5  # of the largest logit: two implementations of two fp32 layers
WIDEST_HEAD = 1024
MAX_PROOF_BYTES = 1000  # bytes of it
# proofs, each a file of at most a line; a person works with a few dozen models, formats and
# versions
MAX_SAVED_PROOFS = 300
TWIN_LAYERS, TWIN_VOCABULARY, TWIN_LENGTH, TWIN_POSITIONS = 2, 96, 48, 512


def proofs_disabled(add_note: NoteCallback) -> bool:
    """Whether the environment says to leave the proofs out; then a note says so."""
    if os.environ.get(PROOFS_VARIABLE) != "0":
        return False
    add_note(
        f"{PROOFS_VARIABLE}=0: not checked that no position sees a later one, nor "
        "that the cache and the native decoder are correct"
    )
    return True


def prove_hf_model(model: HfModel, add_note: NoteCallback, where: str) -> None:
    """(a) and (b) for a model of transformers as it was loaded. Without (b) it generates without a
    cache, with a note.

    Raises ModelError, opening with ``where``, when a position sees later ones.
    """
    if proofs_disabled(add_note):
        return
    name, kept = _model_proof_digest(model), _kept_proofs()
    if (outcome := kept.read(name)) is None:
        _prove_or_raise(model, where)
        kept.save(name, _cut_to(model.recompute_reason, MAX_PROOF_BYTES))
    else:
        model.recompute_reason = outcome
    if model.recompute_reason:
        add_note(
            "generation is slow, since it runs the whole sequence again for every "
            f"token: {model.recompute_reason}"
        )


def _prove_or_raise(model: HfModel, where: str) -> None:
    if why := find_future_leak(model):
        if _is_random(model):
            raise ModelError(
                f"{where}: {type(model.inner).__name__} gives different scores for "
                "the same tokens: it is random even in evaluation mode, so its "
                "scores are meaningless"
            )
        raise ModelError(
            f"{where}: {type(model.inner).__name__} is not a causal language model: "
            f"{why}. {_suggest_remedy(model)}"
        )
    if not model.recompute_reason and (why := find_cache_error(model)):
        model.recompute_reason = why


def _suggest_remedy(model: HfModel) -> str:
    """What to set in config.json, if it was a setting that made the model look ahead."""
    text = model.inner.config.get_text_config()
    fields = {
        "use_bidirectional_attention": False,
        "is_causal": True,
        "causal": True,
        "is_decoder": True,
    }
    for field, value in fields.items():
        setting = getattr(text, field, None)
        if setting is not None and setting != "vision" and bool(setting) is not value:
            return (
                f"Set {field}={str(value).lower()} in config.json if it was trained "
                "to predict the next token; as it is, it can read the tokens that "
                "it has to predict"
            )
    return "It cannot be trained or scored as one: it can read the tokens that it has to predict"


# --- (a)


@torch.no_grad()
def find_future_leak(model: CausalLM) -> str:
    """ "" if no position's output depends on a later token, else where it does and by how much."""
    length = min(PROOF_TOKENS, model.context or PROOF_TOKENS)
    cuts = sorted({min(cut, length - 1) for cut in CUT_POSITIONS})
    if length < 2:
        return ""
    rows = _random_sequences(model, len(cuts), length)
    known = _text_token_ids(model)
    following = dict(zip(known, [*known[1:], known[0]], strict=True))
    changed = [
        [*row[:cut], *(following[t] for t in row[cut:])]
        for row, cut in zip(rows, cuts, strict=True)
    ]
    first, second = _hidden_outputs(model, rows), _hidden_outputs(model, changed)
    for i, cut in enumerate(cuts):
        a, b = first[i, :cut].float(), second[i, :cut].float()
        if torch.equal(a, b):
            continue
        share = float((a - b).abs().max() / a.abs().max())
        if getattr(getattr(model, "inner", model), "is_quantized", False):
            # products in 8 bits scale rows and choose outliers with their neighbours in view, and
            # have no exact gradient
            if share <= QUANTISED_TOLERANCE:
                continue
            return (
                f"changing tokens {cut} to {length - 1} of {length} changes those "
                f"before, by {share:.0e} of the largest"
            )
        if (
            first.dtype in ROUNDING_TOLERANCE and share > ROUNDING_TOLERANCE[first.dtype]
        ) or not _ignores_future(model, rows, i, cut):
            which = f"changing tokens {cut} to {length - 1} of {length}"
            return f"{which} changes its scores at those before, by {share:.0e} of the largest"
    return ""


@torch.no_grad()
def _is_random(model: HfModel) -> bool:
    """Whether two passes over the same tokens differ (Reformer's hashes are drawn anew in each)."""
    rows = _random_sequences(model, 2, min(PROOF_TOKENS, model.context or PROOF_TOKENS))
    return not torch.equal(_hidden_outputs(model, rows), _hidden_outputs(model, rows))


def _ignores_future(model: CausalLM, rows: list[list[int]], which: int, cut: int) -> bool:
    """Whether the outputs before ``cut`` have no gradient with respect to the embeddings from
    ``cut`` on.
    """
    held: list[Tensor] = []

    def leaf(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        held.append(out.detach().requires_grad_())
        return held[-1]

    embedding = model.get_input_embeddings()
    assert embedding is not None
    hook = embedding.register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            out = _hidden_outputs(model, [rows[which]])[0, :cut].float()
            out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out))
    finally:
        hook.remove()
    grad = held[0].grad
    if grad is None:
        return False
    return not grad.reshape(len(rows[which]), -1)[cut:].any()


# --- (b)


@torch.no_grad()
def find_cache_error(model: CausalLM, *, has_another_way: bool = True) -> str:
    """ "" if prompts of two lengths, and the tokens after them one by one, give what whole sequences give; else
    what is wrong. So is what is raised on the way, unless nothing ``has_another_way`` to run the model:
    then it is raised as it is.
    """
    length = min(PROOF_TOKENS, model.context or PROOF_TOKENS)
    prompts = [length - DECODE_STEPS, max(1, length // 2)]
    if length < DECODE_STEPS + 1:
        return ""
    rows = _random_sequences(model, 2, length)
    runner: Any = (
        DecodeRunner(model) if isinstance(model, Decoder) and DecodeRunner.takes(model) else model
    )
    whole = _hidden_outputs(model, rows).float()
    errors: list[Tensor] = []
    try:
        memory = runner.new_cache(2, length)
        packed = PackedInput.of(
            [row[:n] for row, n in zip(rows, prompts, strict=True)], model.device
        )
        owners = torch.tensor(
            [i for i, n in enumerate(prompts) for _ in range(n)], device=model.device
        )
        cached = runner.forward_cached(packed, owners, memory, AdapterContext(), decoding=False)[
            [stop - 1 for _, stop in packed.segments]
        ]
        for step in range(DECODE_STEPS + 1):
            expected = torch.stack([whole[i, n - 1 + step] for i, n in enumerate(prompts)])
            errors.append((cached.float() - expected).norm(dim=1) / expected.norm(dim=1))
            if step < DECODE_STEPS:
                now = torch.tensor(
                    [row[n + step] for row, n in zip(rows, prompts, strict=True)],
                    device=model.device,
                )
                packed = PackedInput(now, memory.lengths, [(0, 1), (1, 2)])
                cached = runner.forward_cached(
                    packed,
                    torch.arange(2, device=model.device),
                    memory,
                    AdapterContext(),
                    decoding=True,
                )
    except (
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
        LookupError,
        ModelError,
        ContractError,
    ) as e:
        if (
            isinstance(e, RunInterruptedError | OutOfMemoryError)
            or allocation_failure(e) is not None
        ):
            raise  # a signal, or no memory, says nothing of the cache
        if isinstance(model, Decoder) and isinstance(e, AttributeError | TypeError):
            raise  # a fault of our own code, which a slower way would only hide
        if not has_another_way:
            raise  # it would be told as that of a model which cannot be run
        return f"its cache cannot be used ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
    # the median over steps: a router that rounding tips over at one token is no fault of the cache
    worst = float(torch.stack(errors).median(0).values.max())
    if worst <= ROUNDING_TOLERANCE[model.dtype]:
        return ""
    return f"with its cache, hidden states differ by {worst:.0e} of their size from those without"


# --- (c)


@cache
def _proven_digests() -> set[str]:
    """Digests of the native proofs this process has seen held."""
    return set()


def find_native_mismatch(
    family: ModelFamily,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    add_note: NoteCallback,
    *,
    has_another_way: bool = True,
) -> str:
    """ "" if the native decoder computes this config, shown by (a), (b) and (c) on a twin; else what
    differs. ``has_another_way``: as in `find_cache_error`."""
    if proofs_disabled(add_note):
        return ""
    name, kept = _native_proof_digest(config, dtype, device), _kept_proofs()
    if name in _proven_digests() or kept.read(name) is not None:
        _proven_digests().add(name)
        return ""
    try:
        why = _compare_native(family, config, dtype, device, has_another_way)
    except ModelError as e:
        return f"Lorry's decoder could not be checked on a small copy of it: {e}"
    if why:
        return why
    _proven_digests().add(name)
    kept.save(name, "")
    return ""


def _compare_native(
    family: ModelFamily,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    has_another_way: bool,
) -> str:
    # imported here: a proof that was kept needs none of transformers
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    small = shrink_config(family, config)
    with (
        model_file_errors("transformers cannot build the small copy"),
        silence_transformers(),
        torch.random.fork_rng(devices=[]),
    ):
        hf_model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[config["model_type"]].from_dict(small), dtype=torch.float32
        )
    _randomise_weights(hf_model.eval().requires_grad_(False))
    native = _build_native_twin(family, hf_model)
    if isinstance(native, str):
        return native
    length = min(TWIN_LENGTH, native.context)
    ids = torch.tensor(_random_sequences(native, 2, length))
    with torch.no_grad(), model_file_errors("transformers cannot run the small copy"):
        expected, logits = hf_model(input_ids=ids, use_cache=False).logits, native(ids).logits
    gap = float((logits - expected).abs().max() / expected.abs().max())
    if not gap <= TWIN_TOLERANCE:
        return f"Lorry's decoder gives other logits than transformers for this config (by {gap:.0e} of the largest)"
    native = native.to(device, dtype)
    if native.geometry.tied:
        native.tie()
    if why := find_future_leak(native) or find_cache_error(native, has_another_way=has_another_way):
        return f"Lorry's decoder is not correct for this config: {why}"
    return ""


def _build_native_twin(family: ModelFamily, hf_model: Any) -> Decoder | str:
    """The native decoder with the weights of a model of transformers, or why they do not fit."""
    with torch.device("meta"):
        native = Decoder(family, hf_model.config.to_dict())
    hf_params = {
        family.current_name(name): parameter
        for name, parameter in hf_model.named_parameters(remove_duplicate=False)
    }
    native_state = native.state_dict()
    differing = sorted(
        n
        for n in hf_params.keys() | native_state.keys()
        if n not in hf_params
        or n not in native_state
        or hf_params[n].shape != native_state[n].shape
    )
    if differing:
        return f"transformers has other tensors than Lorry's decoder for this config ({', '.join(differing[:3])})"
    native.load_state_dict(
        {n: p.detach().clone() for n, p in hf_params.items()}, strict=True, assign=True
    )
    if native.geometry.tied:
        native.tie()
    return native.requires_grad_(False).eval()


def shrink_config(family: ModelFamily, config: Mapping[str, Any], ranks: int = 1) -> dict[str, Any]:
    """The config with few layers, heads and tokens, which so many ranks can share. Everything else
    stays, head width and rotary settings included.

    Raises ModelError for heads too wide to be true.
    """
    g = family.geometry(config)
    if g.head_dim > WIDEST_HEAD:
        raise ModelError(f"head_dim={g.head_dim}")
    groups = ranks * min(max(g.kv_heads // ranks, 1), 2)
    heads = groups * min(max(g.heads // g.kv_heads, 1), 2)
    sizes = {
        ("hidden_size", "n_embd"): heads * g.head_dim,
        ("num_attention_heads", "n_head"): heads,
        ("num_key_value_heads",): groups,
        ("num_hidden_layers", "n_layer"): min(g.layers, TWIN_LAYERS),
        ("intermediate_size", "n_inner"): 3 * heads * g.head_dim // 2,
        # as evenly shared as the model's
        ("vocab_size",): -(-TWIN_VOCABULARY // ranks) * ranks + g.vocab % ranks,
    }
    small = dict(config)
    for names, value in sizes.items():
        small.update({name: value for name in names if config.get(name) is not None})
    for name, value in config.items():
        if name.endswith("_token_id"):
            small[name] = None  # beyond the twin's vocabulary, and no part of the computation
        elif name == "layer_types" and value:
            small[name] = list(value[: min(g.layers, TWIN_LAYERS)])
        elif name == "n_positions" and family.positions:
            small[name] = min(int(value), TWIN_POSITIONS)
    return small


@torch.no_grad()
def _randomise_weights(model: nn.Module) -> None:
    """Weights wide enough that a wrong epsilon, bias or rotary base shows; biases away from 0,
    norms from 1.
    """
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        wide = 0.3 if p.dim() == 1 else min(0.2, 2 / p.shape[-1] ** 0.5)
        around = 1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0
        p.copy_(around + wide * torch.randn(p.shape, generator=generator))


def _native_proof_digest(
    config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> str:
    """Names a proof by all it depends on: the config, the number format and device, Lorry's code,
    torch, transformers.
    """
    parts = [
        json.dumps(config, sort_keys=True, default=str),
        str(dtype),
        device.type,
        _code_digest(),
        os.environ.get("LORRY_KERNELS", ""),
        os.environ.get("LORRY_ISA", ""),
    ]
    parts += [torch.__version__, version("transformers"), torch.backends.cpu.get_cpu_capability()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _model_proof_digest(model: HfModel) -> str:
    """Names a proof of a model of transformers' as it was loaded: weights that are all 0, say,
    would hide what others show.
    """
    parts = [
        *(
            f"{type(model.inner).__module__}.{type(model.inner).__qualname__}",
            str(model.body),
            model.recompute_reason,
        ),
        str(getattr(model.inner.config, "_attn_implementation", None)),
        str(getattr(model.inner, "is_quantized", False)),
        sample_digest(model),
        _native_proof_digest(model.config, model.dtype, model.device),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _code_digest() -> str:
    """SHA-256 over Lorry's sources that a forward pass runs through."""
    root = Path(__file__).parent.parent
    files = sorted(
        f
        for room in ("models", "families", "adapters", "kernels")
        for f in (root / room).rglob("*.*")
        if f.suffix in (".py", ".cpp", ".h")
    )
    return hashlib.sha256(
        b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)
    ).hexdigest()


def _kept_proofs() -> KeptAnswers:
    return KeptAnswers(lorry_home() / "proofs", MAX_SAVED_PROOFS, MAX_PROOF_BYTES)


def _cut_to(text: str, size: int) -> str:
    """As much of a text as fits into ``size`` bytes."""
    return text.encode()[:size].decode(errors="ignore")


# --- tokens and outputs


def _text_token_ids(model: CausalLM) -> list[int]:
    """Token ids that are plain text to the model."""
    if isinstance(model, Decoder):
        return list(range(min(model.geometry.vocab, 4096)))
    # imported here: transformers comes with it, which the native decoder does without
    from lorry.models.hf.anatomy import list_text_tokens

    return list_text_tokens(model.inner)


def _random_sequences(model: CausalLM, rows: int, length: int) -> list[list[int]]:
    """Random sequences [rows][length]."""
    known = _text_token_ids(model)
    picks = torch.randint(0, len(known), (rows, length), generator=torch.Generator().manual_seed(0))
    return [[known[i] for i in row] for row in picks.tolist()]


def _hidden_outputs(model: CausalLM, rows: list[list[int]]) -> Tensor:
    """Outputs [rows, length, D] of sequences of one length, without adapters."""
    last = model.hidden(PackedInput.of(rows, model.device), AdapterContext()).last
    assert last is not None
    return last.view(len(rows), len(rows[0]), -1)
