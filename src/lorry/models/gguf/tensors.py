"""Every tensor of a GGUF file accounted for: the rule of `models.loading.weights`.

transformers' reader fills what is missing at random, drops what it does not know, and says neither.

    model = load_gguf_model(file, check_gguf(file), torch.bfloat16)

Half-converted files exist (llama.cpp's converters are stopped, disks run full), and variants of an
architecture with biases or with rotary factors (Llama 3.1) under the plain architecture's name do
as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from gguf.constants import GGMLQuantizationType
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from lorry.errors import ModelError
from lorry.models.gguf.header import GgufHeader
from lorry.models.loading.accounting import refuse_loading_errors
from lorry.models.loading.describe import model_file_errors, silence_transformers
from lorry.models.loading.tensor_files import refuse_not_finite

try:
    from transformers import GgufConfig
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
except ImportError:
    # transformers before 5.17: one reader for all architectures, which always opens every block
    GgufConfig = None

    def is_gguf_arch_supported(kind: str) -> bool:
        """Whether transformers' newer reader has an architecture."""
        return False


ROTARY_FACTORS = "rope_freqs.weight"  # [head_dim / 2]: what each rotary frequency is divided by
# original_max_position_embeddings of every Llama 3.x; its low and high frequency factors are 1 and
# 4
LLAMA3_CONTEXT = 8192
KNOWN_SCALING = frozenset({"type", "factor", "original_context_length", "finetuned"})
# architectures whose scaling transformers' reader does take over
OWN_SCALING = frozenset({"gpt-oss", "gpt_oss"})
ROTARY_TOLERANCE = 1e-3  # relative; the factors are stored in fp32, the frequencies computed in it


def refuse_older_tokenizers(file: Path) -> None:
    """Raises ModelError where transformers would make another tokenizer of the file: before 5.17 texts
    end with another token (SmolLM2's with `<|im_start|>`), and lines of merges may not be empty."""
    if GgufConfig is None:
        raise ModelError(
            f"{file}: a GGUF file is converted by transformers 5.17 or newer, whose tokenizers are the "
            f"file's; {transformers.__version__} is installed. Convert it where a newer one is and give "
            "the directory that is made below LORRY_HOME (~/.cache/lorry), or the model's own directory "
            "of Hugging Face's format"
        )


def load_gguf_model(
    file: Path, header: GgufHeader, dtype: torch.dtype, config: Any | None = None
) -> Any:
    """The model in ``file`` as transformers reads it, dequantised, every tensor accounted for.

    ``config``: transformers' own, for a model that is known; None takes it from the file, with the
    rotary scaling that transformers' reader does not look at (nor at Qwen3's `key_length`, biases
    of a Llama, or the context that Llama 3's factors are of). Raises ModelError.
    """
    source: dict[str, Any] = {
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    opens = {}
    if GgufConfig is not None:
        opens["quantization_config"] = GgufConfig(gguf_file=file.name, dequantize=True)
    trouble = f"{file}: transformers cannot convert this GGUF file of architecture {header.values.get('general.architecture')!r}"
    with model_file_errors(trouble), silence_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            **source,
            **opens,
            config=read_gguf_config(file, header, source) if config is None else config,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # `refuse_unfit_gguf` names them
            output_loading_info=True,
        )
        refuse_unfit_gguf(file, header, model, info)
    return model


def read_gguf_config(file: Path, header: GgufHeader, source: dict[str, Any]) -> Any | None:
    """transformers' config for the file with its rotary scaling; None where there is none, and what
    transformers reads by itself will do (to read it here takes 10 s for a real vocabulary). Raises
    ModelError for a scaling that cannot be taken over.

    ``source``: how to find the file with `from_pretrained`.
    """
    kind = str(header.values.get("general.architecture"))
    parts = header.values.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"{file} is one of {parts} parts of a model; join them first (llama-gguf-split --merge)"
        )
    scaling = {} if kind in OWN_SCALING else _read_rope_scaling(file, header, kind)
    factors = rotary_factors(file, header)
    if factors is not None and not scaling and kind == "llama" and float(factors.max()) > 1:
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": LLAMA3_CONTEXT,
        }
    if not scaling:
        return None
    config = AutoConfig.from_pretrained(str(file.parent), **source)
    config.rope_parameters = {**(getattr(config, "rope_parameters", None) or {}), **scaling}
    return config


def _read_rope_scaling(file: Path, header: GgufHeader, kind: str) -> dict[str, Any]:
    """`rope.scaling.*` of the metadata as transformers' rope_parameters; {} where there is none."""
    settings = {
        k.removeprefix(f"{kind}.rope.scaling."): v
        for k, v in header.values.items()
        if k.startswith(f"{kind}.rope.scaling.")
    }
    if f"{kind}.rope.scale_linear" in header.values:  # how older converters wrote it
        settings = {
            "type": "linear",
            "factor": header.values[f"{kind}.rope.scale_linear"],
            **settings,
        }
    way, factor = settings.get("type", "none"), settings.get("factor", 1.0)
    if way == "none" or (way == "linear" and factor in (0, 1)):
        return {}
    odd = sorted(settings.keys() - KNOWN_SCALING)
    if way not in ("linear", "yarn") or odd or not isinstance(factor, float) or factor <= 0:
        name = odd[0] if odd else "type"
        raise ModelError(
            f"{file}: {kind}.rope.scaling.{name}={settings.get(name)!r} cannot be "
            "converted from a GGUF file; use the model's Hugging Face directory"
        )
    scaling = {"rope_type": way, "factor": factor}
    if way == "yarn" and "original_context_length" in settings:
        scaling["original_max_position_embeddings"] = settings["original_context_length"]
    return scaling


def rotary_factors(file: Path, header: GgufHeader) -> Tensor | None:
    """[head_dim / 2] in fp64, or None where the file has none."""
    if ROTARY_FACTORS not in header.tensors:
        return None
    stored = header.tensors[ROTARY_FACTORS]
    if stored.kind != GGMLQuantizationType.F32:  # what llama.cpp writes
        raise ModelError(
            f"{file}: {ROTARY_FACTORS} is stored as {stored.kind.name}; rotary factors are read in F32 only"
        )
    values = numpy.fromfile(file, dtype="<f4", count=math.prod(stored.shape), offset=stored.begin)
    return torch.from_numpy(values.astype(numpy.float64))


def refuse_unfit_gguf(file: Path, header: GgufHeader, model: Any, info: Any) -> None:
    """Raise ModelError unless every tensor of the model came from one of the file, in its shape,
    every tensor of the file was used, and every value is finite. ``info``: transformers' loading
    info.
    """
    named = _reader_names(header, model)
    by_name = {ours: theirs for theirs, ours in (named or {}).items()}
    refuse_loading_errors(
        file,
        model,
        info,
        file_names=by_name,
        described_by="the file's metadata, or the file is incomplete",
    )
    if named is not None:
        sources: dict[str, list[str]] = defaultdict(list)
        for theirs, ours in named.items():
            sources[ours].append(theirs)
        loaded = {ours for theirs, ours in named.items() if theirs in header.tensors}
        halves = sorted(
            t
            for ours in loaded
            for t in sources[ours]
            if len(sources[ours]) > 1 and t not in header.tensors
        )
        if halves:  # gate and up of fused experts: the other half would be zeros
            raise ModelError(
                f"{file}: {len(halves)} tensors missing for {type(model).__name__} ({', '.join(halves[:3])})"
            )
        unknown = [t for t in header.tensors if t not in named and t != ROTARY_FACTORS]
        if unknown:
            raise ModelError(
                f"{file}: {len(unknown)} tensors unknown for {type(model).__name__} "
                f"({', '.join(sorted(unknown)[:3])}); without them the model would "
                "be wrong"
            )
    _refuse_rotary(file, header, model)
    refuse_not_finite(
        file, ((by_name.get(n, n), t) for n, t in model.state_dict().items()), model.dtype
    )


def _reader_names(header: GgufHeader, model: Any) -> dict[str, str] | None:
    """{name in the file: name in the model} as transformers' older reader maps them; None for the
    architectures of its newer one, which reports whatever it does not expect."""
    kind = str(header.values.get("general.architecture"))
    if is_gguf_arch_supported(kind):
        return None
    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=model.config.to_dict())
    weights_map: dict[str, str] = get_gguf_hf_weights_map(
        _NamesOnlyModel.of(model, model.base_model_prefix), processor
    )
    # experts are named without `.weight` in the map, since the model holds them as a parameter of
    # its own
    return {
        f"{theirs}.weight" if theirs.endswith("_exps") else theirs: ours
        for theirs, ours in weights_map.items()
    }


@dataclass(frozen=True)
class _NamesOnlyModel:
    """The names in a model and in its body: all that transformers' map looks at, which would ask
    every module of a model of 30 layers for another 10 s and learn nothing from it."""

    config: Any
    names: dict[str, None]
    body: dict[str, _NamesOnlyModel]

    @staticmethod
    def of(model: Any, prefix: str) -> _NamesOnlyModel:
        body = getattr(model, prefix, None) if prefix else None
        inner = {} if body is None else {prefix: _NamesOnlyModel.of(body, "")}
        return _NamesOnlyModel(model.config, dict.fromkeys(model.state_dict()), inner)

    def state_dict(self) -> dict[str, None]:
        return self.names

    def named_children(self) -> Iterable[tuple[str, _NamesOnlyModel]]:
        return self.body.items()


def _refuse_rotary(file: Path, header: GgufHeader, model: Any) -> None:
    """Raise ModelError where the file's rotary factors are not those that the model computes with."""
    factors = rotary_factors(file, header)
    if factors is None:
        return
    base = float(
        header.values.get(f"{header.values.get('general.architecture')}.rope.freq_base", 10000.0)
    )
    places = torch.arange(len(factors), dtype=torch.float64) / len(factors)
    wanted = base**-places / factors
    tables = [
        t.double()
        for n, t in model.named_buffers()
        if n.endswith("inv_freq") and t.shape == wanted.shape
    ]
    if not any(torch.allclose(t, wanted, rtol=ROTARY_TOLERANCE, atol=1e-12) for t in tables):
        raise ModelError(
            f"{file}: {ROTARY_FACTORS} holds rotary factors (up to {float(factors.max()):g}) of no scaling known for this "
            "architecture; use the model's Hugging Face directory"
        )
