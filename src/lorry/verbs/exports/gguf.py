"""`lorry export RUN to=gguf` and `to=gguf-lora`: files for llama.cpp and what is built on it.

llama.cpp is not a dependency. A model is read again twice before it gets its name: tensor by tensor
by the gguf package, against the exact weights and the rounding of its format; and whole by
transformers' GGUF reader, which puts rows and settings back in its own way, against the logits of
our decoder with the weights of the file. An adapter has no second reader: its products B A are
compared. The test suite asks llama.cpp itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.errors import ContractError, ModelError
from lorry.verbs.checks import probe
from lorry.verbs.open_model import print_note

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

    from lorry.models.gguf.architecture import GgufArchitecture
    from lorry.models.gguf.vocabulary import GgufVocabulary
    from lorry.models.gguf.writer import PlannedTensor
    from lorry.models.loading.open import OpenedModel

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# torch's name of a number format -> llama.cpp's
GGUF_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def export_gguf(
    opened: OpenedModel,
    weights: dict[str, float],
    output: Path,
    outtype: str,
    *,
    title: str = "model",
    measure: Callable[[Any], list[str]] | None = None,
) -> Path:
    """A GGUF file of base + ``weights`` {adapter: g} times the adapters (none: of the model as it
    is) in the folder ``output``, named by ``title``; returns its path. ``measure``: what else to
    tell of the model opened again by transformers. ``opened`` is of no use afterwards.

    Raises ConfigError for a place that is taken, ModelError for a model or tokenizer that llama.cpp
    does not have, ContractError if what was written is another model when it is read again.
    """
    from lorry.adapters.merge import separates_tied_head
    from lorry.disk import durable
    from lorry.families import find_family
    from lorry.models.gguf.vocabulary import read_vocabulary
    from lorry.models.gguf.writer import check_rounding, plan_tensors, write_gguf

    def add_note(text: str) -> None:
        print_note(f"note: {text}")

    architecture = _describe_opened(opened)
    family = find_family(str(opened.model.config["model_type"]))
    assert family is not None
    vocabulary = read_vocabulary(opened.tokenizer, architecture.geometry.vocab, add_note)
    tied = architecture.geometry.tied and not (
        weights and separates_tied_head(opened.model, weights)
    )
    head = family.head if tied else ""
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in opened.model.state_dict().items()
        if key.rpartition(".")[0] != head
    }
    plan = plan_tensors(architecture, shapes, outtype, add_note)

    def add_keys(writer: GGUFWriter) -> None:
        _add_model_keys(writer, title, outtype, architecture, vocabulary)

    with durable.build_directory(output) as folder:
        file = folder / f"{title}-{outtype}.gguf"
        write_gguf(file, architecture, plan, _stream(opened, weights, head), add_keys)
        error, bound = check_rounding(file, architecture, plan, _stream(opened, weights, head))
        lines = _compare_reopened(opened, weights, file, architecture, plan, measure)
    print_note(
        f"read back: {len(plan)} tensors, each value within {error:.1e} of the "
        f"largest beside it (bound {bound:.1e}, {outtype})"
    )
    for line in lines:
        print_note(line)
    return output / file.name


def export_gguf_mixture(directory: Path, output: Path, outtype: str, *, title: str) -> Path:
    """A GGUF file of the Mixtral, Qwen2-MoE or Qwen3-MoE in ``directory``, straight from its files,
    in the folder ``output``; returns its path.

    Raises what `export_gguf` raises, and ModelError for gates that llama.cpp makes otherwise.
    """
    from safetensors import safe_open

    from lorry.disk import durable
    from lorry.models.gguf.architecture import describe_architecture
    from lorry.models.gguf.vocabulary import read_vocabulary
    from lorry.models.gguf.writer import check_rounding, plan_tensors, write_gguf
    from lorry.models.loading.describe import describe_model
    from lorry.models.loading.tensor_files import read_tensor_entries
    from lorry.models.loading.tokenizer import load_tokenizer

    def add_note(text: str) -> None:
        print_note(f"note: {text}")

    architecture = describe_architecture(describe_model(directory, add_note=add_note).config)
    tokenizer = load_tokenizer(directory, add_note=add_note)
    if tokenizer is None:
        raise ModelError(f"{directory} has no tokenizer; put its tokenizer.json beside the weights")
    vocabulary = read_vocabulary(tokenizer, architecture.geometry.vocab, add_note)
    entries = read_tensor_entries(directory)
    copies = {}
    if architecture.needs_head and HEAD not in entries:
        add_note(
            "output head and embedding are stored as two tensors: llama.cpp does "
            "not read a tied Qwen2-MoE"
        )
        copies = {HEAD: entries[EMBEDDING]}
    everything = {**entries, **copies}
    plan = plan_tensors(
        architecture, {name: entry.shape for name, entry in everything.items()}, outtype, add_note
    )

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, entry in everything.items():
            with safe_open(entry.file, framework="pt") as file:
                yield name, file.get_tensor(entry.name)

    def add_keys(writer: GGUFWriter) -> None:
        _add_model_keys(writer, title, outtype, architecture, vocabulary)

    with durable.build_directory(output) as folder:
        file = folder / f"{title}-{outtype}.gguf"
        write_gguf(file, architecture, plan, stream(), add_keys)
        error, bound = check_rounding(file, architecture, plan, stream())
    print_note(
        f"read back: {len(plan)} tensors, each value within {error:.1e} of the "
        f"largest beside it (bound {bound:.1e}, {outtype})"
    )
    print_note("note: only llama.cpp can run such a file, so its logits were not compared")
    return output / file.name


def _describe_opened(opened: OpenedModel) -> GgufArchitecture:
    """llama.cpp's architecture of the model. Raises ModelError for one that Lorry's own decoder
    does not compute: a field that it does not know llama.cpp may well ignore.
    """
    from lorry.models.decoder.model import Decoder
    from lorry.models.gguf.architecture import MIXTURES, describe_architecture
    from lorry.models.loading.describe import describe_model
    from lorry.notes import ignore_note

    architecture = describe_architecture(opened.model.config)
    if opened.model.config.get("model_type") in MIXTURES:
        raise ModelError(
            "a GGUF file of a mixture of experts with an adapter beside it cannot be written; fold "
            "the adapter into it (lorry merge) and export what that writes"
        )
    if not isinstance(opened.model, Decoder):
        why = describe_model(Path(opened.source["path"]), add_note=ignore_note).why
        raise ModelError(
            f"a GGUF file of this model cannot be written: {why}, and llama.cpp may not either"
        )
    return architecture


def _add_model_keys(
    writer: GGUFWriter,
    title: str,
    outtype: str,
    architecture: GgufArchitecture,
    vocabulary: GgufVocabulary,
) -> None:
    """Write a model's metadata: what the file is, the architecture's numbers, the tokenizer."""
    import gguf

    from lorry.models.gguf.writer import OUTTYPES

    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(OUTTYPES[outtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architecture.add_keys(writer)
    vocabulary.add_to(writer)


def _stream(
    opened: OpenedModel, weights: dict[str, float], head: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model with ``weights`` folded in, in fp32, without the tied
    ``head``."""
    import torch

    from lorry.adapters.merge import merged_tensors

    if weights:
        yield from merged_tensors(opened.model, weights, dtype=torch.float32)
        return
    for name, tensor in opened.model.state_dict().items():
        if name.rpartition(".")[0] != head:
            yield name, tensor


def _compare_reopened(
    opened: OpenedModel,
    weights: dict[str, float],
    file: Path,
    architecture: GgufArchitecture,
    plan: list[PlannedTensor],
    measure: Callable[[Any], list[str]] | None = None,
) -> list[str]:
    """What to tell of ``file`` opened by transformers, with what ``measure`` tells. Raises
    ContractError unless its logits are those of our decoder with the same stored weights.
    ``opened`` is of no use afterwards.
    """
    import torch

    from lorry.adapters.attach import get_bank
    from lorry.adapters.merge import merge
    from lorry.adapters.mix import Mix
    from lorry.models.gguf.header import check_gguf
    from lorry.models.gguf.tensors import load_gguf_model
    from lorry.models.gguf.writer import read_model_tensors
    from lorry.models.loading.describe import build_hf_config
    from lorry.models.loading.reopen import (
        LOGIT_BOUNDS,
        compare_logits,
        compute_fp32_logits,
        free_model_memory,
    )

    model = opened.model
    # transformers' reader knows no Mistral: its tensors and its maths are Llama's
    kind = "llama" if architecture.name == "llama" else str(model.config["model_type"])
    tied = "output.weight" not in {tensor.name for tensor in plan}
    settings = {**model.config, "model_type": kind, "tie_word_embeddings": tied}
    rows, rows_words = probe.probe_rows(opened)
    get_bank(model, create=True).activate(Mix.constants(weights))
    exact = compute_fp32_logits(model, rows)
    if weights:
        merge(model, weights)
    state = model.state_dict()
    with torch.no_grad():
        for name, values in read_model_tensors(file, architecture, plan):
            state[name].copy_(values)
    stored, dtype = compute_fp32_logits(model, rows), model.dtype
    del state
    free_model_memory(model)
    drift, largest = (float(t.abs().max()) for t in (exact - stored, exact))
    moved = f"rounding changed logits by {drift:.1e} of {largest:.1e}, on {rows_words}"
    try:
        config = build_hf_config(kind, settings, file)
        again = load_gguf_model(file, check_gguf(file), dtype, config).eval()
    except ModelError as error:
        raise ContractError(
            f"the file written cannot be opened again and was removed: {error}"
        ) from error
    computed = str(dtype).removeprefix("torch.")
    difference, bound = compare_logits(
        stored, compute_fp32_logits(again, rows), LOGIT_BOUNDS[computed], file.stem
    )
    return [
        f"reloaded by transformers: largest logit difference {difference:.1e} (bound {bound:.1e})",
        moved,
        *([] if measure is None else measure(again)),
    ]


def export_gguf_lora(
    opened: OpenedModel, name: str, output: Path, outtype: str, weight: float = 1.0
) -> Path:
    """The adapter ``name`` times ``weight``, with what it was trained over, as a GGUF file in the
    folder ``output``; returns its path.

    Raises ConfigError for a place that is taken, ModelError for an adapter that llama.cpp cannot
    add, ContractError if another one is read again.
    """
    from lorry.adapters.attach import get_bank
    from lorry.adapters.merge import concatenate
    from lorry.disk import durable
    from lorry.models.gguf.lora import check_gguf_lora, write_gguf_lora

    architecture, bank = _describe_opened(opened), get_bank(opened.model)
    plain = weight == 1.0 and not bank.base_adapters
    adapter = bank[name] if plain else concatenate(opened.model, name, {name: weight})
    with durable.build_directory(output) as folder:
        file = folder / f"{name}-lora-{outtype}.gguf"
        write_gguf_lora(file, architecture, adapter, name, outtype)
        error = check_gguf_lora(file, architecture, adapter)
    print_note(
        f"read back: {2 * len(adapter.slots)} matrices, each value within "
        f"{error:.1e} of itself ({outtype}); use it with the base model that it was "
        f"trained on: llama-cli -m BASE.gguf --lora {file.name}"
    )
    return output / file.name
