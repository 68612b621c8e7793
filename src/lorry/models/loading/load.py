"""Load a model: an HF directory, a hub id, a GGUF file, an embedded model, or an adapter's base;
natively where possible.

    loaded = load_model("smollm2-135m-instruct", add_note=print)

Weights are read from safetensors alone. `dtype="auto"` is bfloat16 where the device computes it
as fast (CUDA with bf16, CPUs with AMX-BF16, AMD's AVX512-BF16 or ARM BF16), float32 elsewhere,
whatever the checkpoint's own type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorry.adapters.peft.base_digest import keep_base_digest, remember_base_digest
from lorry.adapters.quantization.linear import quantize_linears
from lorry.adapters.quantization.packed import (
    KEPT_BFLOAT16,
    KEPT_GGUF,
    QUANTIZATIONS,
    Quantization,
)
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.config.parsing.sizes import size_in_words
from lorry.errors import ConfigError, ModelError
from lorry.families import ModelFamily
from lorry.models.causal_lm import CausalLM
from lorry.models.converter import ModelConverter
from lorry.models.layer_weights import Sharder
from lorry.models.loading.accounting import refuse_unfit_tensors
from lorry.models.loading.describe import (
    ModelDescription,
    describe_model,
    model_file_errors,
    read_model_json,
    silence_transformers,
)
from lorry.models.loading.sources import ModelLocation, find_adapters_in, resolve_model
from lorry.models.loading.store import GENERATION_CONFIG
from lorry.models.loading.tensor_files import read_tensor_entries, stored_float_dtype
from lorry.models.loading.tokenizer import load_tokenizer
from lorry.models.loading.weights import load_decoder
from lorry.models.packed.parts import PackedFormat
from lorry.models.packed.reading import MatrixSource, PackedCheckpoint, PackedWhileRead
from lorry.models.proofs import find_native_mismatch, prove_hf_model
from lorry.models.tensor_parallel_proof import prove_shared_layers
from lorry.notes import NoteCallback
from lorry.plan.machine import dtype_of_auto
from lorry.plan.parallel.split import check_tensor_parallel
from lorry.processor import may_use_bfloat16
from lorry.runs.layout import ADAPTER_FACTS

if TYPE_CHECKING:
    from lorry.models.hf.model import HfModel

# quantize: hold matrices as the files have them packed
KEEP = "keep"
DTYPES = {
    "float32": torch.float32,
    # short names as other tools spell them
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass
class LoadedModel:
    """A model, its tokenizer (None if the checkpoint has none), and where they came from.

    source: name (as asked), kind (directory, hub, gguf, embedded), path (the directory read),
    revision, dtype, device, family (None for transformers' own implementation) and why not native
    (""), generation_config, and adapter: the adapter or run directory, when that was asked for
    (path is its base then). Adapters are not loaded here.
    """

    model: CausalLM
    tokenizer: Any | None
    source: dict[str, Any] = field(default_factory=dict)


def load_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    native: bool = True,
    ranks: TensorRanks | None = None,
    shard: Sharder | None = None,
    convert: ModelConverter | None = None,
    quantize: str | None = None,
    adapter: Path | None = None,
    as_trained: bool = True,
    must_share: bool = True,
    add_note: NoteCallback,
) -> LoadedModel:
    """The frozen base model, in evaluation mode. ``native=False`` forces transformers'
    implementation; ``ranks``: those that share it, all of which call this together and get a part
    each (not ``must_share``: where it cannot be shared each has the whole of it, with a note);
    ``shard``: cuts its weights over the ranks of a run, which all load it then; ``convert``: takes
    the decoder for another implementation of its layers, on all of them too; ``quantize``: nf4, fp4 or
    int8, in which matrices of linears are held, or keep, as the files have them; None of it means as the
    base of the ``adapter``, or of the one that was named, was held (``as_trained``), else as the files are. ``add_note`` hears what a person
    should know. Raises ModelError when anything does not fit, ConfigError for an unknown dtype or
    device, and for a model that ranks cannot share or ``convert`` cannot take.
    """
    location = resolve_model(
        str(name_or_path), revision=revision, trust_remote_code=trust_remote_code, add_note=add_note
    )
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(
        # an adapter gives the logits it was trained for only in its base's dtype
        trained_dtype(location.adapter)
        if dtype == "auto" and location.adapter is not None
        else dtype,
        torch_device,
    )
    description = describe_model(
        location.directory,
        trust_remote_code=trust_remote_code,
        native=native,
        packed=True,
        add_note=add_note,
    )
    if quantize is None and as_trained:
        quantize = _quantize_of_adapters((adapter, location.adapter), location)
    quantization = _pick_quantization(quantize, location, description.packed_as, torch_dtype)
    has_another_way = convert is None and (ranks is None or not must_share)
    description = _without_mismatch(
        description, torch_dtype, torch_device, add_note, has_another_way=has_another_way
    )
    try:
        _refuse_unfit(description, quantization, ranks, shard, convert)
    except ConfigError as error:
        if must_share or ranks is None:
            raise
        ranks = None
        _refuse_unfit(description, quantization, ranks, shard, convert)
        add_note(f"{location.directory.name} lies whole on every process ({error})")
    model: CausalLM
    if description.family is not None:
        matrices = _matrix_source(quantization, description, location)
        model = _load_native(
            location.directory,
            description,
            description.family,
            torch_dtype,
            torch_device,
            ranks,
            shard,
            convert,
            matrices,
            add_note,
        )
    else:
        model = _load_foreign(
            location.directory,
            description,
            quantization,
            torch_dtype,
            torch_device,
            shard,
            trust_remote_code=trust_remote_code,
            add_note=add_note,
        )
    for note in note_disabled_dropout(description.config):
        add_note(note)
    tokenizer = load_tokenizer(
        location.directory, trust_remote_code=trust_remote_code, add_note=add_note
    )
    vocabulary = model.vocab_size
    # the other way round is common: embeddings padded to a round number
    if tokenizer is not None and len(tokenizer) > vocabulary:
        add_note(
            f"the tokenizer has {len(tokenizer)} entries, the model only {vocabulary} embeddings; the rest cannot be used"
        )
    generation = location.directory / "generation_config.json"
    model.__dict__[GENERATION_CONFIG] = read_model_json(generation) if generation.is_file() else {}
    source: dict[str, Any] = {
        "name": str(name_or_path),
        "kind": location.kind,
        "path": str(location.directory),
        "revision": revision,
        "dtype": str(torch_dtype).removeprefix("torch."),
        "device": str(torch_device),
        "family": description.family.name if description.family is not None else None,
        "why": description.why,
        "quantize": quantization.name if quantization is not None else None,
        "generation_config": model.__dict__[GENERATION_CONFIG],
    }
    if location.adapter is not None:
        source["adapter"] = str(location.adapter)
    return LoadedModel(model, tokenizer, source)


def _without_mismatch(
    description: ModelDescription,
    dtype: torch.dtype,
    device: torch.device,
    add_note: NoteCallback,
    *,
    has_another_way: bool,
) -> ModelDescription:
    """The description without its family, and why, where Lorry's own decoder does not give the model's
    logits."""
    if description.family is None:
        return description
    why = find_native_mismatch(
        description.family,
        description.config,
        dtype,
        device,
        add_note,
        has_another_way=has_another_way,
    )
    return replace(description, family=None, why=why) if why else description


def _quantize_of_adapters(adapters: Sequence[Path | None], location: ModelLocation) -> str | None:
    """In what the base of the first adapter that says it was held; None for whole matrices."""
    for folder in adapters:
        quantize = None if folder is None else trained_quantization(folder)
        # the converted base is the same one, bit for bit, where the GGUF file is not at hand
        if quantize is not None and not (quantize == KEEP and location.file is None):
            return quantize
    return None


def _load_native(
    directory: Path,
    description: ModelDescription,
    family: ModelFamily,
    dtype: torch.dtype,
    device: torch.device,
    ranks: TensorRanks | None,
    shard: Sharder | None,
    convert: ModelConverter | None,
    matrices: MatrixSource | None,
    add_note: NoteCallback,
) -> CausalLM:
    """The model in Lorry's own decoder, proved first where ranks share it or other layers compute it, and
    in those layers then. ``matrices``: where packed ones come from."""
    if ranks is not None or convert is not None:
        prove_shared_layers(family, description.config, dtype, device, ranks, convert, add_note)
    decoder = load_decoder(
        directory, family, description.config, dtype, device, ranks, shard, matrices
    )
    for note in matrices.notes() if matrices is not None else ():
        add_note(note)
    if convert is not None and ranks is None and shard is None:  # else it is taken already
        remember_base_digest(decoder)
    model: CausalLM = decoder if convert is None else keep_base_digest(decoder, convert(decoder))
    # PEFT's field for the base: adapters saved later name it
    model.config["_name_or_path"] = str(directory)
    return model


def _load_foreign(
    directory: Path,
    description: ModelDescription,
    quantization: Quantization | None,
    dtype: torch.dtype,
    device: torch.device,
    shard: Sharder | None,
    *,
    trust_remote_code: bool,
    add_note: NoteCallback,
) -> CausalLM:
    """The model in transformers' own class, its matrices packed behind that. Raises ModelError where the
    files have them packed."""
    if description.packed_as is not None or (
        quantization is not None and quantization.keeps_values
    ):
        assert quantization is not None
        raise ModelError(
            f"{directory}: its matrices are packed ({quantization.name}), which Lorry's "
            f"own decoder alone computes with, and {description.why}; give the unquantised checkpoint"
        )
    add_note(f"{description.why}; it runs in transformers, more slowly")
    model = load_hf(
        directory,
        description,
        # packed from what the files hold: in whatever dtype it computes, it is the same base
        dtype if quantization is None else stored_float_dtype(read_tensor_entries(directory)),
        device,
        shard,
        trust_remote_code=trust_remote_code,
        add_note=add_note,
    )
    if quantization is not None:
        _pack_foreign(model, quantization, dtype, add_note)
    return model


def _matrix_source(
    quantization: Quantization | None, description: ModelDescription, location: ModelLocation
) -> MatrixSource | None:
    """Where the decoder's packed matrices come from; None where it holds whole ones."""
    if description.packed_as is not None:
        return PackedCheckpoint(description.packed_as)
    if quantization is None or description.family is None:
        return None
    if quantization == KEPT_GGUF:
        # imported here: gguf and transformers' reader of it, which no other model needs
        from lorry.models.packed.gguf import PackedGguf

        assert location.file is not None  # `_pick_quantization` asks for one
        return PackedGguf(location.file, description.config)
    return PackedWhileRead(quantization, description.family.transposed)


def _refuse_cut_matrices(
    quantization: Quantization,
    description: ModelDescription,
    ranks: TensorRanks | None,
    shard: Sharder | None,
    convert: ModelConverter | None,
) -> None:
    """Raises ConfigError where packed matrices would be cut over processes, and are not: our own decoder
    alone packs each as it reads it, and then keeps this rank's part."""
    sharing = {"backend=megatron": convert, "backend=fsdp": shard, "backend.tensor_parallel": ranks}
    cut = [name for name, how in sharing.items() if how is not None]
    why = None
    if convert is not None:
        why = "Megatron's linears hold whole ones"
    elif description.family is None:
        why = f"{description.why}, and transformers reads it whole before it is packed"
    elif description.packed_as is not None or quantization == KEPT_GGUF:
        why = "matrices that files store packed are not cut over processes"
    if cut and why is not None:
        raise ConfigError(
            f"model.quantize={quantization.name} with {cut[0]}: {why}; train on one device, or with backend=ddp"
        )


def _pack_foreign(
    model: HfModel, quantization: Quantization, dtype: torch.dtype, add_note: NoteCallback
) -> None:
    """Pack the matrices of transformers' model, and say what could not be. Raises ConfigError for a
    class that reads weights past its layers."""
    add_note(
        f"transformers reads the model whole before its matrices are packed as {quantization.name}: "
        "memory falls to what they take afterwards"
    )
    quantize_linears(model, quantization, dtype)
    _refuse_weights_read_past_layers(model, quantization)
    remember_base_digest(model)
    if stacked := sum(p.nbytes for p in model.parameters() if p.dim() > 2):
        add_note(
            f"its stacked experts are no linears and stay whole, {size_in_words(stacked)} of them"
        )


def _refuse_unfit(
    description: ModelDescription,
    quantization: Quantization | None,
    ranks: TensorRanks | None,
    shard: Sharder | None,
    convert: ModelConverter | None,
) -> None:
    """Raises ConfigError for a model that these ranks cannot share or cut, or that has no other layers."""
    if quantization is not None:
        _refuse_cut_matrices(quantization, description, ranks, shard, convert)
    family = description.family
    if convert is not None:
        convert.refuse_unfit(family, description.config, description.why)
    if ranks is None:
        return
    if family is None:
        raise ConfigError(
            f"backend.tensor_parallel={ranks.size}: {description.why}, and only Lorry's own decoder is "
            "cut over processes; leave tensor_parallel out"
        )
    check_tensor_parallel(
        family.geometry(description.config), ranks.size, even_vocabulary=convert is not None
    )


def _refuse_weights_read_past_layers(model: HfModel, quantization: Quantization) -> None:
    """Raises ConfigError for a model whose code computes with a linear's weight itself, as Mamba's does:
    it meets the codes there."""
    from lorry.models.hf.anatomy import list_text_tokens

    tokens = torch.tensor(list_text_tokens(model.inner)[:2], device=model.device)
    try:
        with torch.no_grad():
            model(tokens[None])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.quantize={quantization.name}: {type(model.inner).__name__} computes with the weight of a "
            f"layer past the layer, which has codes there now ({error}); leave model.quantize out"
        ) from error


def trained_dtype(adapter: Path) -> str:
    """The number format of the base an adapter of ours was trained on, so that it gives the same
    logits again; else "auto".
    """
    dtypes = {str(facts.get("dtype")) for facts in _adapter_facts(adapter)} & set(DTYPES)
    # adapters of one run share their base, so several answers mean files edited by hand
    return dtypes.pop() if len(dtypes) == 1 else "auto"


def trained_quantization(adapter: Path) -> str | None:
    """How the matrices of the base an adapter of ours was trained on are packed; None where they are
    not, or its files do not say."""
    formats = {
        str(packed.get("format"))
        for facts in _adapter_facts(adapter)
        if isinstance(packed := facts.get("quantization"), dict)
    }
    if formats == {KEPT_GGUF.name}:
        return KEEP
    formats &= set(QUANTIZATIONS)
    return formats.pop() if len(formats) == 1 else None


def _adapter_facts(adapter: Path) -> list[dict[str, Any]]:
    """What only Lorry knows of the adapters in a directory, of those that have it."""
    folders = [f for f in find_adapters_in(adapter) if (f / ADAPTER_FACTS).is_file()]
    return [read_model_json(folder / ADAPTER_FACTS) for folder in folders]


def _pick_quantization(
    name: str | None,
    location: ModelLocation,
    packed_as: PackedFormat | None,
    dtype: torch.dtype,
) -> Quantization | None:
    """How matrices are held: as the files have them packed, or as was asked for, for a model that
    computes in ``dtype``. Raises ConfigError for an unknown name, and for another format than the files'."""
    if name is not None and name not in (*QUANTIZATIONS, KEEP):
        raise ConfigError(f"quantize={name!r}; choose {', '.join((*QUANTIZATIONS, KEEP))}")
    if packed_as is not None:
        held = packed_as.quantization
        if name in (None, KEEP, held.name):
            return held
        raise ConfigError(
            f"model.quantize={name}: {location.directory} holds its matrices in {held.name} already, and packing "
            f"them again would round them twice; leave quantize out, or give the unquantised checkpoint"
        )
    if name == KEEP and location.file is not None:
        return KEPT_GGUF
    if name == KEEP:
        stored = stored_float_dtype(read_tensor_entries(location.directory))
        if stored == torch.bfloat16:
            # computed in as they are, they are held as they are already
            return KEPT_BFLOAT16 if dtype == torch.float32 else None
        raise ConfigError(
            f"model.quantize={KEEP}: the matrices of {location.directory} are whole, and no bfloat16; choose "
            f"{', '.join(QUANTIZATIONS)}, or leave quantize out"
        )
    return None if name is None else QUANTIZATIONS[name]


def load_hf(
    directory: Path,
    description: ModelDescription,
    dtype: torch.dtype,
    device: torch.device,
    shard: Sharder | None = None,
    *,
    trust_remote_code: bool,
    add_note: NoteCallback,
) -> HfModel:
    """transformers' own implementation, with every tensor of the checkpoint accounted for; with
    ``shard`` this rank's share of it. Raises ModelError otherwise.
    """
    # imported here, with all of transformers that it takes: the native decoder needs none of it
    from transformers import AutoModelForCausalLM

    from lorry.models.hf.model import HfModel

    if shard is not None:
        # and transformers' conversions are a tenth of a second of every other model
        from lorry.models.hf.shares import read_shares

        inner, weights = read_shares(
            directory,
            description.build_hf(),
            dtype,
            device,
            shard,
            trust_remote_code=trust_remote_code,
        )
        sharded = HfModel(inner, add_note)
        sharded.layer_weights = weights
        remember_base_digest(sharded, weights.values_at)
        prove_hf_model(sharded, add_note, str(directory))
        return sharded
    # refuses pickles, broken shards and paths that lead elsewhere
    entries = read_tensor_entries(directory)
    warnings: list[str] = []
    with (
        model_file_errors(f"{directory}: transformers cannot load it"),
        silence_transformers(warnings),
    ):
        inner, info = AutoModelForCausalLM.from_pretrained(
            str(directory),
            config=description.build_hf(),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # `refuse_unfit_tensors` names them
            output_loading_info=True,
        )
    refuse_unfit_tensors(directory, inner, info, entries, add_note)
    try:
        with silence_transformers(warnings):
            model = HfModel(inner.to(device), add_note)
            prove_hf_model(model, add_note, str(directory))
    finally:
        # in `finally`: the warning often explains the error
        for text in dict.fromkeys(warnings):
            add_note(f"transformers says: {text}")
    return model


def note_disabled_dropout(config: Mapping[str, Any]) -> list[str]:
    """A note if the base was trained with dropout of its own: in Lorry it is off, only the
    adapters' is on.
    """
    rates = [
        f"{k}={v}"
        for k, v in config.items()
        if ("dropout" in k or k.endswith("pdrop")) and isinstance(v, float) and v > 0
    ]
    return [f"the base model's own dropout is off ({', '.join(rates)})"] if rates else []


def pick_device(device: str | torch.device) -> torch.device:
    """`auto`: CUDA if there is one, else the CPU. Raises ConfigError for a device this machine does
    not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        # torch accepts the name of a device that is not there; an allocation does not
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as e:  # torch without CUDA asserts
        raise ConfigError(
            f"device={str(device)!r} cannot be used here ({str(e).splitlines()[0]})"
        ) from e
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where it is computed natively, else float32, or what LORRY_DTYPE says.
    Raises ConfigError for an unknown name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        override = dtype_of_auto()
        return (
            DTYPES[override]
            if override is not None
            else torch.bfloat16
            if has_fast_bfloat16(device)
            else torch.float32
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}; choose auto, float32, bfloat16 or float16")
    return DTYPES[dtype]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are at least as fast as in float32 here: on hardware made for
    them, and LORRY_ISA allows it."""
    if device.type == "cuda":
        # older GPUs emulate bf16, more slowly than float32
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return (
        device.type == "cpu"
        and may_use_bfloat16()
        # on a CPU it is oneDNN that multiplies bfloat16; builds for macOS are without it
        and torch.backends.mkldnn.is_available()
        and any(has.get(flag, False) for flag in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
    )
