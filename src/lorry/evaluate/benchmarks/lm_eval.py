"""A model with its adapters inside the lm-evaluation-harness (`pip install 'lorry[lm-eval]'`): its
tasks, our forward passes.

    evaluate("runs/people", ["boolq", "gsm8k"], limit=100)             # {"base": results, "people": results}
    lm_eval.simple_evaluate(model=lm(model, tokenizer, adapter="people"), tasks=[...])
    python -m lorry.evaluate.benchmarks.lm_eval run --model lorry --model_args path=runs/people --tasks boolq

Importing this module registers the model "lorry". Likelihoods come from `likelihood.py` (packed,
through training's score path), answers from `until.py`. Prompts of chats are written by our own
template code, as in training.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.progress import track
from torch import nn

from lorry.adapters.mix import Mix
from lorry.config import ModelConfig, build_settings
from lorry.console import VisibleConsole
from lorry.data.encoding.chat import locate_message
from lorry.data.encoding.chat_template.template import TemplateRefusedError
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.reading.content import ROLES, ChatMessage
from lorry.errors import ConfigError, DataError, ModelError, suggest_nearest
from lorry.evaluate.benchmarks.likelihood import (
    LOGLIKELIHOOD_BATCH_TOKENS,
    HarnessTokenizer,
    TokenPair,
    loglikelihoods,
    max_model_length,
    score_pairs,
)
from lorry.evaluate.benchmarks.until import generate_until_stops, parse_generation_kwargs
from lorry.generation.request import resolve_constant_mix
from lorry.generation.text import NO_TOKEN_LIMIT
from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel
from lorry.models.loading.open import OpenedModel, open_model
from lorry.models.loading.store import GENERATION_CONFIG

try:
    # an extra of the package: importing this module is how one asks for it
    from lm_eval.api.model import LM
    from lm_eval.api.registry import MODEL_REGISTRY, register_model
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
except ImportError as e:
    raise ConfigError(
        f"the lm-evaluation-harness is not installed ({e}); run: pip install 'lm_eval>=0.4.13'"
    ) from e

__all__ = ["LorryLM", "evaluate", "lm", "loglikelihoods"]

HARNESS_MODEL_NAME = "lorry"
BASE_SIDE = "base"
# the harness' own default, where a task says nothing
MAX_GEN_TOKS = 256
HARNESS_SETTINGS = ("batch_tokens", "batch_rows", "max_gen_toks", "max_length", "chat", "seed")
# sequences are packed by batch_tokens, and answers wait for batch_rows
IGNORED_SETTINGS = (
    "batch_size",
    "max_batch_size",
)
log = logging.getLogger("lorry")


class LorryLM(LM):
    """The harness' face of a model: `loglikelihood`, `loglikelihood_rolling`, `generate_until`,
    chat templates. Made by `lm`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        mix: Mix,
        batch_tokens: int = LOGLIKELIHOOD_BATCH_TOKENS,
        batch_rows: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        max_length: int | None = None,
        chat: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tokenizer is None:
            raise ModelError(
                "the harness needs a tokenizer and this model has none; put "
                "tokenizer.json beside its weights"
            )
        self.model, self.tokenizer, self.mix = model, tokenizer, mix
        self.batch_tokens, self.batch_rows, self.max_gen_toks, self.seed = (
            batch_tokens,
            batch_rows,
            max_gen_toks,
            seed,
        )
        self.max_length = (
            max_model_length(model)
            if max_length is None
            else min(max_length, max_model_length(model))
        )
        # a module that is not ours need not say how many embeddings it has
        rows = model.vocab_size if isinstance(model, (Decoder, HfModel)) else None
        self.encoder = ExampleEncoder(tokenizer, max_length=NO_TOKEN_LIMIT, embeddings=rows)
        self.wording, self.chat = HarnessTokenizer(tokenizer), chat
        # the harness reads this name of its base class
        self._device = model.device

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> LorryLM:
        """From ``path=runs/people,adapter=people,dtype=float32``: see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> LorryLM:
        """path (or name, pretrained), adapter (``base``: without any), what `lorry.load` takes, and
        what `lm` takes. Raises ConfigError for anything else."""
        # the harness passes every option of its command line, also those that nobody gave
        command_line = {
            name: value for name, value in (additional_config or {}).items() if value is not None
        }
        if str(command_line.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
            del command_line["device"]  # the command line says cuda:0 unless told otherwise
        args = {
            name: value
            for name, value in {**arg_dict, **command_line}.items()
            if name not in IGNORED_SETTINGS
        }
        path = next(
            (args.pop(name) for name in ("path", "name", "pretrained") if name in args), None
        )
        if path is None:
            raise ConfigError(
                "model_args names no model; give path=RUN, a directory, a hub id or an embedded model's name"
            )
        adapter, own_settings = (
            args.pop("adapter", None),
            {name: args.pop(name) for name in HARNESS_SETTINGS if name in args},
        )
        opened = _open_harness_model(str(path), args)
        return lm(
            opened.model,
            opened.tokenizer,
            adapter=None if adapter is None else _resolve_side(opened, str(adapter)),
            **own_settings,
        )

    # --- what the harness asks

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """[(log p of the continuation, it is the greedy one)] of requests (context, continuation)."""
        pairs = [self.wording.pair(*request.args) for request in requests]
        done: dict[int, tuple[float, bool]] = {}
        for at, got in _with_progress_bar(
            self._scored(pairs), len(pairs), "loglikelihoods", disable_tqdm
        ):
            done[at] = (got.total, got.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[at].args, done[at])
        return [done[at] for at in range(len(pairs))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in windows as long as the model takes."""
        pairs: list[TokenPair] = []
        owners: list[int] = []
        for at, request in enumerate(requests):
            tokens = self.wording.ids(request.args[0])
            # context_len=1 as in HFLM: published perplexities hang on it
            windows = get_rolling_token_windows(
                tokens, self.wording.prefix, max_seq_len=self.max_length, context_len=1
            )
            window_pairs = [TokenPair(*make_disjoint_window(window)) for window in windows]
            pairs, owners = pairs + window_pairs, owners + [at] * len(window_pairs)
        totals = [0.0] * len(requests)
        for number, likelihood in _with_progress_bar(
            self._scored(pairs), len(pairs), "windows", disable_tqdm
        ):
            totals[owners[number]] += likelihood.total
        for at, request in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[at])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to requests (context, generation settings), each cut before its stop strings."""
        groups: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            # requests of one task have equal settings; only equal ones can share a batch
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(at)
        done: dict[int, str] = {}
        for at, text in _with_progress_bar(
            self._answers(requests, list(groups.values())), len(requests), "answers", disable_tqdm
        ):
            done[at] = text
            self.cache_hook.add_partial("generate_until", requests[at].args, text)
        return [done[at] for at in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells caches of prompts apart by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template in use, for the record; None where none is applied."""
        if isinstance(chat_template, str):
            raise ConfigError(
                f"chat template {chat_template!r}: templates are not chosen by name; give chat_template_path=FILE"
            )
        return self.encoder.template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as the prompt of its next answer, or of the rest of its last one. The end of turn
        then ends answers too.
        """
        # the harness says nowhere else that it asks through the template
        self.chat = True
        messages = [ChatMessage(ROLES[turn["role"]], turn["content"]) for turn in chat_history]
        template = self.encoder.template
        try:
            if add_generation_prompt:
                return template.prompt(messages)
            text = template.render(messages).text
            # the last message is the beginning of an answer: no end of turn may follow it
            return text[: locate_message(template, messages, len(messages) - 1, text)[1]]
        except TemplateRefusedError as error:
            raise DataError(str(error)) from error

    def get_model_info(self) -> dict[str, Any]:
        """For the harness' results file."""
        adapters = {term.adapter: term.gate for term in self.mix.terms}
        return {"model_dtype": str(self.model.dtype).removeprefix("torch."), "adapters": adapters}

    # --- how it is done

    def _scored(self, pairs: Sequence[TokenPair]) -> Iterator[tuple[int, Any]]:
        cut = sum(
            len(pair.context) + len(pair.continuation) > self.max_length + 1 for pair in pairs
        )
        if cut:
            log.warning(
                f"{cut} of {len(pairs)} contexts were cut from the left to the "
                f"{self.max_length} tokens of the model's context"
            )
        return score_pairs(
            self.model, pairs, mix=self.mix, batch_tokens=self.batch_tokens, limit=self.max_length
        )

    def _answers(
        self, requests: Sequence[Any], groups: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, str]]:
        """Those of one group after the other; the requests of a group are generated with the same
        settings.
        """
        eos = self._ends()
        for group in groups:
            stops, params = parse_generation_kwargs(
                requests[group[0]].args[1], self.max_gen_toks, self.seed
            )
            new = params.max_new_tokens
            room = self.max_length - new
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks is {new}, but the model's context is "
                    f"{self.max_length} tokens, including the prompt"
                )
            prompts = [
                self.wording.ids(requests[at].args[0]) or [self.wording.prefix] for at in group
            ]
            # told and not refused, as the harness' own models do
            if cut := sum(len(prompt) > room for prompt in prompts):
                log.warning(
                    f"{cut} of {len(prompts)} prompts were cut from the left to "
                    f"{room} tokens, to leave room for {new} new ones"
                )
            answers = generate_until_stops(
                self.model,
                self.tokenizer,
                [prompt[-room:] for prompt in prompts],
                replace(params, stop_token_ids=eos),
                # texts as well: an end of turn may be several tokens, none of which ends anything
                stops=[*stops, *self._end_texts()],
                adapters=self.mix,
                batch_rows=self.batch_rows,
            )
            yield from ((group[number], text) for number, text in answers)

    def _ends(self) -> set[int]:
        """Ids that end an answer: the tokenizer's EOS, those of the model's generation_config, in a
        chat the end of turn.
        """
        eos_ids = self.model.__dict__.get(GENERATION_CONFIG, {}).get("eos_token_id")
        ends = {
            *(eos_ids if isinstance(eos_ids, list) else [eos_ids]),
            self.tokenizer.eos_token_id,
        } - {None}
        return ends | set(self.encoder.stop_tokens() if self.chat else ())

    def _end_texts(self) -> list[str]:
        """EOS as text, and in a chat the end of turn, which may be several tokens."""
        return [
            text
            for text in (
                self.tokenizer.eos_token,
                self.encoder.template.end_of_turn if self.chat else "",
            )
            if text
        ]


# importing this module twice, by two names, is no error
if HARNESS_MODEL_NAME not in MODEL_REGISTRY:
    register_model(HARNESS_MODEL_NAME)(LorryLM)


def lm(
    model: nn.Module, tokenizer: Any, *, adapter: Mix | str | None = None, **settings: Any
) -> LorryLM:
    """A model for `lm_eval.simple_evaluate`. ``adapter``: a name, a Mix of constants (`Mix.none()`:
    the base), or None: what a plain `model(x)` uses now.

    Settings: batch_tokens (4096; tokens in one pass), batch_rows (answers alive at once),
    max_gen_toks (256; where a task says nothing), max_length (tokens; at most the model's context),
    chat (the end of turn ends answers; set by itself where the harness applies the chat template),
    seed (of sampled answers). Raises ConfigError, ModelError (no tokenizer).
    """
    if unknown := [name for name in settings if name not in HARNESS_SETTINGS]:
        raise ConfigError(
            f"unknown setting {unknown[0]!r}{suggest_nearest(unknown[0], HARNESS_SETTINGS)}; there are {', '.join(HARNESS_SETTINGS)}"
        )
    return LorryLM(model, tokenizer, mix=resolve_constant_mix(model, adapter), **settings)


def evaluate(
    path: str,
    tasks: Sequence[str],
    *,
    adapter: str | Sequence[str] | None = None,
    include_path: str | None = None,
    chat: bool = False,
    model: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """{side: the harness' results} of a run, an adapter or a plain model: the base and each
    adapter, on the same weights.

    ``tasks``: names or patterns (``mmlu_*``) of the harness or of YAML files under
    ``include_path``. ``adapter``: only these sides (``base``: without any). ``chat``: prompts
    through the chat template. ``model``: dtype, device, adapter ... of `lorry.load`; ``settings``:
    those of `lm`; ``options``: those of `lm_eval.simple_evaluate` (limit, num_fewshot ...). Raises
    ConfigError for an unknown task or side, ModelError, and DataError for data that cannot be had.
    """
    from lm_eval import simple_evaluate

    manager, names = _load_harness_tasks(tasks, include_path)
    opened = _open_harness_model(path, model or {})
    sides = (
        list(harness_sides(opened))
        if adapter is None
        else [adapter]
        if isinstance(adapter, str)
        else list(adapter)
    )
    models = {
        name: lm(
            opened.model, opened.tokenizer, adapter=_resolve_side(opened, name), **(settings or {})
        )
        for name in sides
    }
    chosen = {"log_samples": False, "apply_chat_template": chat, "task_manager": manager, **options}
    try:
        return {
            name: simple_evaluate(model=side_model, tasks=names, **chosen)
            for name, side_model in models.items()
        }
    except OSError as error:  # what `datasets` raises for a file or hub set that cannot be had
        raise DataError(f"the data of {', '.join(names)} could not be read: {error}") from error


def harness_sides(opened: OpenedModel) -> dict[str, Mix | str]:
    """{base: none, and each adapter's name: itself}; one called base is "adapter base"."""
    return {BASE_SIDE: Mix.none()} | {
        f"adapter {name}" if name == BASE_SIDE else name: name for name in opened.adapters
    }


def _open_harness_model(path: str, model: Mapping[str, Any]) -> OpenedModel:
    settings = {"name": path, **model}
    return open_model(build_settings(ModelConfig, settings, log.warning), log.warning)


def _resolve_side(opened: OpenedModel, name: str) -> Mix | str:
    """A side by its name. Raises ConfigError for an unknown one."""
    known = harness_sides(opened)
    if name not in known:
        raise ConfigError(
            f"no adapter named {name!r}{suggest_nearest(name, known)}; there are {', '.join(known)}"
        )
    return known[name]


def _load_harness_tasks(tasks: Sequence[str], include_path: str | None) -> tuple[Any, list[str]]:
    """(the harness' task manager, the names that are meant). Its own tasks, whose index takes many
    seconds, are only looked through when ``include_path`` has not all of them."""
    from lm_eval.tasks import TaskManager

    wanted = [tasks] if isinstance(tasks, str) else list(tasks)
    if include_path is not None:
        included = TaskManager(include_path=include_path, include_defaults=False)
        if all(included.match_tasks([name]) for name in wanted):
            return included, included.match_tasks(wanted)
    manager = TaskManager(include_path=include_path)
    for name in wanted:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"no task named {name!r}{suggest_nearest(name, manager.all_tasks)}; `lm_eval ls tasks` lists them"
            )
    return manager, manager.match_tasks(wanted)


def _with_progress_bar(items: Iterator[Any], total: int, what: str, quiet: bool) -> Iterator[Any]:
    """The items, with a bar of how many there are."""
    return iter(
        track(
            items,
            what,
            total=total,
            console=VisibleConsole(stderr=True),
            transient=True,
            disable=quiet,
        )
    )


if __name__ == "__main__":  # the harness' own command line, with the model "lorry" in it
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
