"""What people call from Python: `sft`, `distill`, `load`, `generate`. The command line calls the
same functions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from lorry.config import (
    DistillRunConfig,
    ModelConfig,
    RunConfig,
    UnlearnRunConfig,
    build_settings,
)
from lorry.errors import ConfigError, describe_value, require_path
from lorry.ranks import is_main_process, note_of_one_process

if TYPE_CHECKING:
    from torch import nn

    from lorry.train.session import TrainResult

PathLike = str | os.PathLike[str]


def sft(**settings: Any) -> TrainResult:
    """Fine-tune: `sft(model="smollm2-135m-instruct", data="people.jsonl", r=16,
    learning_rate=1e-3)`.

    Keywords are those of `lorry sft --help`, with or without their group (`train={"seed": 1}` or
    `seed=1`). Returns the finished run: `.path`, `.contracts`, `.outcome`. Raises ConfigError,
    DataError, ModelError, ContractError (all LorryError).
    """
    notes: list[str] = []
    return _train(build_settings(RunConfig, settings, notes.append), notes)


def distill(**settings: Any) -> TrainResult:
    """Learn from a teacher: `distill(teacher="runs/large", data="people.jsonl", loss="jsd", r=16)`.

    Keywords are those of `lorry distill --help`; see `sft` for what is returned and raised.
    """
    notes: list[str] = []
    return _train(build_settings(DistillRunConfig, settings, notes.append), notes)


def unlearn(**settings: Any) -> TrainResult:
    """Forget: `unlearn(model="runs/people", forget="forget.jsonl", retain="retain.jsonl",
    method="NPO")`. An adapter that the model has becomes a frozen part of the base.

    Keywords are those of `lorry unlearn --help`; see `sft` for what is returned and raised.
    """
    notes: list[str] = []
    return _train(build_settings(UnlearnRunConfig, settings, notes.append), notes)


def _train(run: RunConfig, notes: Sequence[str]) -> TrainResult:
    """A run, shown on the terminal after the notes about its settings, and pushed where it asks for
    that (`train.push_to_hub`). What `lorry sft` does before its report.
    """
    from lorry.hub.push import push_when_finished
    from lorry.train.monitoring.events import terminal_listener
    from lorry.train.session import train_run

    if (alone := note_of_one_process(run.backend)) is not None:
        notes = [*notes, alone]
    if not is_main_process():  # rank 0 shows and uploads
        return _with_whole_tokenizer(train_run(run, notes))
    listener = terminal_listener(run.train.logging_steps)
    with push_when_finished(run.train, run.output_dir, listener.note):
        return _with_whole_tokenizer(train_run(run, notes, [listener]))


def _with_whole_tokenizer(result: TrainResult) -> TrainResult:
    """With transformers' own tokenizer: whoever trains from Python may hand it to other libraries."""
    from lorry.models.loading.tokenizer import whole_tokenizer

    return replace(result, tokenizer=whole_tokenizer(result.tokenizer))


def load(path: PathLike, adapter: PathLike | None = None, **model: Any) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a run, an adapter, a model directory, a hub id, a GGUF file or the
    embedded name.

    ``adapter``: one more adapter directory; ``model``: dtype, device, revision, native. With an
    adapter, `model(input_ids).logits` uses it; adapters are named after their directories. The
    tokenizer is None where the model brings none. What a person should know is logged as warnings
    of the logger "lorry". Raises ModelError, ConfigError.
    """
    from lorry.models.loading.open import open_model
    from lorry.models.loading.tokenizer import whole_tokenizer

    require_path(path, "path", "; of a model that is open already, lorry.load_adapter(model, path)")
    if adapter is not None:
        require_path(adapter, "adapter", " of an adapter's directory")
    settings = {
        "name": os.fspath(path),
        "adapter": None if adapter is None else os.fspath(adapter),
        **model,
    }
    log = logging.getLogger("lorry")
    opened = open_model(build_settings(ModelConfig, settings, log.warning), log.warning)
    return opened.model, whole_tokenizer(opened.tokenizer)


@overload
def generate(model: nn.Module, tokenizer: Any, prompt: str, **options: Any) -> str: ...
@overload
def generate(
    model: nn.Module, tokenizer: Any, prompt: Sequence[str], **options: Any
) -> list[str]: ...
def generate(
    model: nn.Module, tokenizer: Any, prompt: str | Sequence[str], **options: Any
) -> str | list[str]:
    """Answer a prompt, or several in one batch. With a chat template a prompt is the user's
    message; ``chat=False`` continues it as plain text.

    Options: max_new_tokens=128, temperature=0 (greedy), top_k, top_p, repetition_penalty, seed,
    system, batch_rows, and adapters: a name, a list with a name or None (the base) per prompt, or a
    Mix (`Mix.none()` is the base); left out, what a plain `model(x)` uses. Returns the new text
    only. Raises ConfigError, and ModelError for a prompt the context cannot hold.
    """
    from lorry.adapters.attach import require_model
    from lorry.generation.sampling import read_sampling_params
    from lorry.generation.text import generate_texts

    require_model(model)
    if tokenizer is None:
        raise ConfigError(
            "generate needs a tokenizer and this model has none; put "
            "tokenizer.json beside its weights"
        )
    # a str is a Sequence of str, too
    single = isinstance(prompt, str)
    listed = isinstance(prompt, Iterable) and not isinstance(prompt, Mapping)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if listed else []
    if not (listed and all(isinstance(each, str) for each in prompts)):
        raise ConfigError(
            f"prompt is {describe_value(prompt)}; give a text or a list of texts (turns of a chat as a text: "
            "tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), with chat=False)"
        )
    # what is no parameter of sampling is about the prompts and who answers them
    others = {
        name: options.pop(name)
        for name in ("system", "chat", "adapters", "batch_rows")
        if name in options
    }
    texts = generate_texts(model, tokenizer, prompts, read_sampling_params(options), **others)
    return texts[0] if single else texts
