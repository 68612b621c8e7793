"""Any causal language model of transformers behind the decoder's face: same packed tokens, same
mixes, same bank, more slowly.

The model is used through its own forward and never edited. Where its body ends, and that its own
code after that (a plain head, a softcap, a scale) can be run apart, is found out and proven once in
`anatomy.py`; if it cannot be, whole logits are kept in place of hidden states: nothing is dropped
silently.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from lorry.adapters.bank import AdapterBank
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Half
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.models.causal_lm import CausalLM, HiddenStates, PackedInput
from lorry.models.hf.anatomy import (
    counts_from_zero,
    find_body,
    find_halves,
    find_layers,
    list_text_tokens,
    logits_from_hidden,
)
from lorry.models.hf.cache import HfCache, RecomputeCache
from lorry.models.hf.frames import (
    PaddedFrame,
    build_padded_frames,
    depends_on_position,
    unpad_frames,
)
from lorry.models.hf.routing import FramedRouter, frame_call, gate_half
from lorry.models.loading.config_json import EXPERT_COUNT_KEYS
from lorry.notes import NoteCallback, ignore_note

GROUPED_ROW_BYTES = 16  # torch._grouped_mm refuses other strides

PROBE_TOKENS = 16  # of the text that shows which layers train
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "n_ctx",
)


class _EarlyStop(Exception):
    """Ends a forward pass at the last layer that was asked for."""


def use_fitting_products(inner: Any) -> None:
    """Let a transformers model run fused experts one by one where torch's grouped product, its default,
    takes none of their tensors: a row is no multiple of `GROUPED_ROW_BYTES`."""
    fused = [p for p in inner.parameters() if p.dim() == 3]
    if any(size * p.element_size() % GROUPED_ROW_BYTES for p in fused for size in p.shape[1:]):
        # of older or foreign classes nothing chooses their products
        getattr(inner, "set_experts_implementation", lambda name: None)("eager")


class HfModel(CausalLM):
    """``inner``: a transformers causal model. Module paths, state-dict names and layers are those
    of ``inner``: both share one table of children, so an adapter attached to this model sits in
    that one.

    ``recompute_reason``: "" where generation uses the model's cache, else why every token is made from
    the whole sequence anew. ``head`` is the output layer when logits are plainly head(hidden), else
    None; ``body`` the path of the part that ends in hidden states, or None when only whole logits
    can be trusted (then ``hidden().last`` is [T, V] and ``logits`` the identity).
    """

    family = None
    inner: Any

    def __init__(self, inner: Any, add_note: NoteCallback = ignore_note) -> None:
        super().__init__()
        self.config: dict[str, Any] = inner.config.to_dict()
        self.layers: list[nn.Module] = find_layers(inner)
        if self.shapes_follow_tokens:
            use_fitting_products(inner)
        self.body, self._plain = find_body(inner.eval().requires_grad_(False))
        self._checkpointing = False
        self._gated = False
        self._reached: dict[frozenset[str], set[str]] = {}
        self.recompute_reason = ""
        self.__dict__["inner"] = inner  # not a child: its children are ours
        # the very dictionaries of inner: a replaced layer is replaced in both
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = inner.__dict__[table]
        if self.body is None:
            add_note(
                f"{type(inner).__name__} computes its logits in a way that Lorry "
                "cannot tile; all logits [T, V] are kept in memory"
            )
        parameters = inspect.signature(self._target().forward).parameters
        self._positioned = "position_ids" in parameters
        if "past_key_values" not in parameters:
            self.recompute_reason = f"{type(inner).__name__} takes no past_key_values"
        elif self._positioned and not counts_from_zero(inner, self.body):
            self.recompute_reason = (
                f"{type(inner).__name__} derives its positions from the text "
                "instead of counting from 0"
            )

    # --- what the bank and the engine ask of a model

    @property
    def shapes_follow_tokens(self) -> bool:
        """Where transformers' class is a mixture of experts."""
        return any((self.config.get(key) or 0) > 1 for key in EXPERT_COUNT_KEYS)

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def context(self) -> int | None:
        """The longest sequence the model can take, where its config says so (XLNet says -1: any)."""
        text = self.inner.config.get_text_config()
        lengths = (getattr(text, key, None) for key in CONTEXT_KEYS)
        return next((n for n in lengths if isinstance(n, int) and n > 0), None)

    @property
    def vocab_size(self) -> int:
        """How many tokens have an embedding."""
        return int(self.inner.get_input_embeddings().weight.shape[0])

    def resize_vocabulary(self, rows: int) -> None:
        """As of the decoder: transformers' own way. Raises ConfigError where the weights are cut over
        processes, which that does not know."""
        if self.layer_weights.sharded:
            raise ConfigError(
                f"{type(self.inner).__name__} runs in transformers' code, and its embedding, which processes have "
                "parts of, does not grow there; use backend=ddp"
            )
        self.inner.resize_token_embeddings(rows, mean_resizing=False)
        self.inner.requires_grad_(False)
        self.config = self.inner.config.to_dict()

    @property
    def head(self) -> nn.Module | None:
        return self.inner.get_output_embeddings() if self._plain else None

    def get_output_embeddings(self) -> nn.Module | None:
        return self.inner.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.inner.get_input_embeddings()

    def train(self, mode: bool = True) -> HfModel:
        """The base's own dropout stays off, as in the decoder: only the flag of this module
        changes.
        """
        self.training = mode
        return self

    @property
    def gradient_checkpointing(self) -> bool:
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        """Recompute each layer in backward, under the call its forward had. Raises ModelError if no
        layers can be found.
        """
        if on and not self.layers:
            raise ModelError(
                f"{type(self.inner).__name__}: no list of layers found; train it without gradient_checkpointing"
            )
        for layer in self.layers:
            # an instance attribute hides the class's method; without it the method is back
            layer.__dict__.pop("forward", None)
            if on:
                layer.__dict__["forward"] = recompute_with_context(layer.forward)
        self._checkpointing = bool(on)

    # --- hidden states for scores, one step for generation, as in the decoder

    def hidden(
        self,
        packed: PackedInput,
        call: AdapterContext,
        *,
        output_layers: Collection[int] = (),
        stop: int | None = None,
    ) -> HiddenStates:
        """As `Decoder.hidden`: last [T,D] (or [T,V] without a body), layer_outputs {layer: [T,D]}, an
        early stop after layer ``stop``.
        """
        parts = build_padded_frames(packed.segments, packed.tokens.device)
        last_states: list[tuple[PaddedFrame, Tensor]] = []
        layer_outputs: dict[int, list[tuple[PaddedFrame, Tensor]]] = {i: [] for i in output_layers}
        router_logits: dict[tuple[int, Half], list[tuple[PaddedFrame, Tensor]]] = {}
        for frame in parts:
            framed = frame_call(frame, call)
            with self._capture_layers(output_layers, stop) as tapped, suppress(_EarlyStop):
                last_states.append(
                    (
                        frame,
                        frame.unpad(
                            self._body(frame, frame.pad(packed.tokens), frame.mask(), framed)
                        ),
                    )
                )
            for i in output_layers:
                layer_outputs[i].append((frame, frame.unpad(tapped[i])))
            if isinstance(framed.router, FramedRouter):
                for site, logits in framed.router.made.items():
                    router_logits.setdefault(site, []).append((frame, logits))
        return HiddenStates(
            unpad_frames(last_states) if last_states else None,
            {i: unpad_frames(frames) for i, frames in layer_outputs.items()},
            # layer by layer, attention first, whichever a model runs first
            [unpad_frames(router_logits[site]) for site in sorted(router_logits)],
        )

    def logits(self, hidden: Tensor | None, call: AdapterContext) -> Tensor:
        """[t,D] -> [t,V], by the model's own code after its body, softcap and scale included."""
        assert hidden is not None
        if self.body is None:
            return hidden
        with use_adapter_context(call):
            return logits_from_hidden(self.inner, self.body, hidden)

    def new_cache(self, rows: int, room: int) -> HfCache | RecomputeCache:
        """An empty cache for ``rows`` sequences; it grows as needed, ``room`` is not reserved."""
        if self.recompute_reason:
            return RecomputeCache(rows, self.device)
        return HfCache(rows, self.device, lambda: DynamicCache(config=self.inner.config))

    def forward_cached(
        self,
        packed: PackedInput,
        rows: Tensor,
        cache: HfCache | RecomputeCache,
        call: AdapterContext,
        *,
        decoding: bool,
    ) -> Tensor:
        """As `Decoder.forward_cached`: whole prompts of cache rows, or one token for every row; returns
        hidden states [T,D].
        """
        if isinstance(cache, RecomputeCache):
            return cache.hidden_of_newest(self, packed, rows, call, decoding=decoding)
        parts = []
        for frame, mask, state in cache.extend(packed, rows, decoding=decoding):
            options = {"past_key_values": state, "use_cache": True}
            # in a row padded on its left a model counts the padding, unless it is told
            if self._positioned:
                options["position_ids"] = frame.pad(packed.positions)
            parts.append(
                (
                    frame,
                    frame.unpad(
                        self._body(
                            frame,
                            frame.pad(packed.tokens),
                            mask,
                            frame_call(frame, call),
                            **options,
                        )
                    ),
                )
            )
        return unpad_frames(parts)

    def reached(self, paths: Collection[str]) -> set[str]:
        """Those of these layers that text trains: called on random tokens, and with a gradient.

        Not called is a layer whose weight is used past it (Mamba's `dt_proj`), an image's tower or
        attention to an encoder. Layers that differ in numbers alone count as one: of routed experts
        a few tokens meet some.
        """
        key = frozenset(paths)
        if key not in self._reached:
            self._reached[key] = self._probe(key)
        return self._reached[key]

    def _probe(self, paths: Collection[str]) -> set[str]:
        # numbers to *: layers of one kind share one probe
        kinds = {path: re.sub(r"\d+", "*", path) for path in paths}
        probes: dict[str, Tensor] = {}

        def watch(kind: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
                if kind not in probes:
                    # a zero that is added changes nothing, but its gradient is the layer's
                    probes[kind] = torch.zeros(
                        (), dtype=out.dtype, device=out.device, requires_grad=True
                    )
                # not alike for all features: a layer norm takes such a shift away, and the gradient
                # that is left is rounding, or 0
                features = torch.linspace(1, 2, out.shape[-1], dtype=out.dtype, device=out.device)
                return out + probes[kind] * features

            return hook

        text_tokens = list_text_tokens(self.inner)
        length = min(PROBE_TOKENS, self.context or PROBE_TOKENS)
        picks = torch.randint(
            0, len(text_tokens), (length,), generator=torch.Generator().manual_seed(0)
        )
        with ExitStack() as hooks, torch.enable_grad():
            for path, kind in kinds.items():
                hooks.callback(self.get_submodule(path).register_forward_hook(watch(kind)).remove)
            logits = self.logits(
                self.hidden(
                    PackedInput.of([[text_tokens[i] for i in picks.tolist()]], self.device),
                    AdapterContext(),
                ).last,
                AdapterContext(),
            )
            if logits.requires_grad:
                with self.layer_weights.backward_pass():
                    logits.float().backward(
                        # not ones: where all logits shift alike, an even gradient cancels
                        torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
                    )
        trained = {
            kind
            for kind, probe in probes.items()
            if probe.grad is not None and bool(probe.grad != 0)
        }
        return {path for path, kind in kinds.items() if kind in trained}

    def save_inner(
        self, path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], shard_bytes: int
    ) -> None:
        """Write the directory as transformers does, with its own on-disk names; ``config`` replaces
        fields of the model's.
        """
        shell = self._shell(config)
        shell.save_pretrained(path, state_dict=dict(state), max_shard_size=shard_bytes)

    def save_config(self, path: Path, config: Mapping[str, Any]) -> None:
        """Write config.json of `save_inner` alone."""
        shell = self._shell(config)
        shell.config.architectures = [type(self.inner).__name__]
        shell.config.save_pretrained(path)

    def _shell(self, config: Mapping[str, Any]) -> Any:
        """The model beside a config of its own."""
        shell = copy.copy(self.inner)
        shell.config = copy.deepcopy(self.inner.config)
        for key, value in config.items():
            if key in self.config and self.config[key] != value:
                # only what differs: setting a field can trigger a class's own checks
                setattr(shell.config, key, value)
        return shell

    # --- inside

    @cached_property
    def router_halves(self) -> tuple[dict[tuple[int, Half], str], int]:
        """({(layer, half): the path of the module that a router of the layers gates}, the width of what
        it reads); empty where the model's layers have no such two halves (`find_halves`)."""
        # the base alone: an active mix may have the router that is to be asked
        with use_adapter_context(AdapterContext()):
            halves, width = find_halves(self.inner, self.layers)
        paths = {id(module): path for path, module in self.named_modules()}
        return {site: paths[id(module)] for site, module in halves.items()}, width

    def _gate_halves(self) -> None:
        """Let a router of the layers see what each half reads; once, since without one a half pays a
        look at the call."""
        if self._gated:
            return
        for (layer, half), path in self.router_halves[0].items():
            module = self.get_submodule(path)
            module.__dict__["forward"] = gate_half(module.forward, layer, half, use_adapter_context)
        self._gated = True

    def _target(self) -> Any:
        return self.inner if self.body is None else self.inner.get_submodule(self.body)

    def _body(
        self, frame: PaddedFrame, ids: Tensor, mask: Tensor, framed: AdapterContext, **options: Any
    ) -> Tensor:
        """Run the model up to its hidden states, [S, L, D] (or to its logits), with the call of the
        frame (`frame_call`) where the bank's layers see it.
        """
        if isinstance(framed.router, FramedRouter):
            self._gate_halves()
        with use_adapter_context(framed), self._rows_checked(frame, framed):
            out = self._target()(
                input_ids=ids, attention_mask=mask, **{"use_cache": False, **options}
            )
        return out.logits if self.body is None else out.last_hidden_state

    @contextmanager
    def _capture_layers(
        self, output_layers: Collection[int], stop: int | None
    ) -> Iterator[dict[int, Tensor]]:
        """Collect the outputs of some layers, and end the pass after layer ``stop``."""
        wanted = {*output_layers, *(() if stop is None else (stop,))}
        if wanted and max(wanted) >= len(self.layers):
            raise ModelError(
                f"layer {max(wanted)} was requested; {type(self.inner).__name__} "
                f"has {len(self.layers)} layers"
            )
        outputs: dict[int, Tensor] = {}

        def watch(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                outputs[i] = out if isinstance(out, Tensor) else out[0]
                if i == stop:
                    # layers above are not needed: the exception is the only way out of foreign code
                    raise _EarlyStop

            return hook

        with ExitStack() as hooks:
            for i in wanted:
                hooks.callback(self.layers[i].register_forward_hook(watch(i)).remove)
            yield outputs

    @contextmanager
    def _rows_checked(self, frame: PaddedFrame, call: AdapterContext) -> Iterator[None]:
        """Under a call that goes by position, every adapted layer must see the frame's tokens, all
        of them and in order.
        """
        bank: AdapterBank | None = self.__dict__.get("lorry_bank")
        if bank is None or not depends_on_position(call):
            yield
            return
        # padding counts: layers see the whole frame
        expected = len(frame.spans) * frame.length

        def check(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, AdaptableLayer)
            if (tokens := module.count_tokens(*args)) != expected:
                raise ContractError(
                    f"{module.path}: receives {tokens} of "
                    f"{expected} tokens (a routed or pooled layer), so a mix per "
                    "sequence, a gate or dropout cannot be applied; exclude the "
                    "layer with exclude_modules"
                )

        with ExitStack() as hooks:
            for module in bank.modules.values():
                hooks.callback(module.register_forward_pre_hook(check).remove)
            yield


@contextmanager
def use_adapter_context(call: AdapterContext | None) -> Iterator[None]:
    """Let every bank layer inside see this call."""
    token = AMBIENT_CONTEXT.set(call)
    try:
        yield
    finally:
        AMBIENT_CONTEXT.reset(token)


def recompute_with_context(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward that is run again in backward, seeing the call it saw first."""

    def run(*args: Any, **kwargs: Any) -> Any:
        # while generating nothing is recomputed, and a cache must be written once
        if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
            return forward(*args, **kwargs)
        call = AMBIENT_CONTEXT.get()
        contexts = lambda: (nullcontext(), use_adapter_context(call))  # noqa: E731
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            # no layer draws random numbers: dropout is a function of names
            preserve_rng_state=False,
            context_fn=contexts,
            **kwargs,
        )

    return run
