"""The training of a classifier of prompts together with a LoRA of the base that reads them
(docs/experts.md): what trains of a router of kind `sequence` with `router.lora`.

    h = state of the prompt in W + s B A,  scores = classifier((h - mean) / deviation)

mean, deviation [D]: of the training prompts' states in the base, constants of the run: components of a
hidden state differ by a factor of thousands, and AdamW moves all weights alike. Files have them folded
into the first linear, so that what answers is a plain `ClassifierRouter` over the base with its
adapter. S sequences, D width, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.router import ROUTER_NAME, RouterParameters, refuse_router_name
from lorry.adapters.routing.sequence import (
    PromptRule,
    classifier_settings,
    classifier_shapes,
    classify,
    layer_count,
)
from lorry.adapters.seeds import derive_seed
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError

# before the names of the linears (0.weight), among those of the adapter's matrices
HEAD = "classifier_"
SMALLEST_DEVIATION = 1e-6  # of a state's component over the training prompts: a constant one


class LoraClassifier(RouterParameters):
    """A `ParameterSet`, a `SequenceRouter` and a `MixtureRouter`: the values of ``adapter``, which is
    in the bank under the router's name, and of a classifier behind it, in one buffer: one rate, one
    clip, one step. ``training``: what router.json keeps of how it was made.
    """

    router_kind = "sequence"

    def __init__(
        self, adapter: Adapter, adapters: Sequence[str], rule: PromptRule, width: int,
        hidden: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.adapters: Sequence[str] = tuple(adapters)
        self.rule, self.layer, self.pooling = rule, rule.layer, rule.pooling
        self.state_mix = Mix.one(adapter.name)
        self.training: Mapping[str, Any] = {}
        self.adapter, device = adapter, adapter.values.device
        head = classifier_shapes(width, hidden, len(adapters))
        self.head_names = list(head)
        by_rank = sorted(head.items(), key=lambda entry: -len(entry[1]))
        super().__init__(
            {
                **{name: tuple(value.shape) for name, value in adapter.tensors().items()},
                **{HEAD + name: shape for name, shape in by_rank},
            },
            device,
        )
        size = adapter.values.numel()
        self.values[:size] = adapter.values
        adapter.use_buffers(self.values[:size], self.grads[:size])
        # the very objects that the layers multiply with
        for module, slot in adapter.slots.items():
            self.params |= {f"{module}.lora_A": slot.A, f"{module}.lora_B": slot.B}
        self.mean = torch.zeros(width, device=device)
        self.deviation = torch.ones(width, device=device)

    @property
    def drops(self) -> bool:  # type: ignore[override]  # of other routers a constant
        """Whether the adapter's input has dropout."""
        return self.adapter.drops

    @torch.no_grad()
    def start(self, states: Tensor, seed: int) -> None:
        """Take mean and deviation from the training prompts' states [S,D] in the base, and draw the
        classifier, uniform within 1/sqrt(inputs) as `torch.nn.Linear` has it, from (seed, name)."""
        deviation = states.std(0, unbiased=False)
        self.mean = states.mean(0).to(self.mean)
        self.deviation = torch.where(deviation < SMALLEST_DEVIATION, 1.0, deviation).to(self.mean)
        for name in self.head_names:
            param = self.params[HEAD + name]
            inputs = self.shapes[HEAD + name.replace("bias", "weight")][1]
            generator = torch.Generator().manual_seed(derive_seed("router", seed, HEAD + name))
            param.copy_((2 * torch.rand(param.shape, generator=generator) - 1) * inputs**-0.5)

    def logits(self, states: Tensor) -> Tensor:
        """states [S,D] -> [S,K], with gradients to both."""
        weights = {name: self.params[HEAD + name] for name in self.head_names}
        return classify(weights, (states.to(self.mean) - self.mean) / self.deviation)

    def gates(self, states: Tensor) -> Tensor:
        """[S,D] -> [S,K], of the weights as files have them."""
        return self.rule.gates(classify(self.tensors(), states))

    def mix(self) -> Mix:
        """Every expert, gated by the router."""
        return Mix.by_prompt(self)

    def training_mix(self, role: str) -> Mix:
        """The adapter alone: it learns whose a prompt is, and no expert has a part in that."""
        return self.state_mix

    def settings(self) -> Mapping[str, Any]:
        """The rule, the widths, and how it was made."""
        return classifier_settings(self.rule, self.tensors(), self.training)

    def tensors(self) -> dict[str, Tensor]:
        """The classifier's, mean and deviation folded in; the adapter has files of its own."""
        weights = {name: self.params[HEAD + name].detach() for name in self.head_names}
        first = weights["0.weight"] / self.deviation
        return {**weights, "0.weight": first, "0.bias": weights["0.bias"] - first @ self.mean}

    def ranges(self) -> list[tuple[slice, bool, bool]]:
        """Those of the adapter, then the linears' matrices, which decay, and their biases."""
        size, total = self.adapter.values.numel(), self.values.numel()
        biases = sum(self.shapes[HEAD + n][0] for n in self.head_names if n.endswith("bias"))
        matrices = slice(size, total - biases), False, True
        return [*self.adapter.ranges(), matrices, (slice(total - biases, total), False, False)]

    def targets(self) -> list[str]:
        """The modules that the adapter sits on, and the linears' tensors."""
        return [*self.adapter.targets(), *(HEAD + name for name in self.head_names)]

    def zero_grad_names(self) -> list[str]:
        """Those of the targets whose gradient is exactly zero."""
        grads = self.split_like(self.grads)
        silent = [HEAD + name for name in self.head_names if not grads[HEAD + name].any()]
        return [*self.adapter.zero_grad_names(), *silent]

    def held_still(self) -> AbstractContextManager[None]:
        """The adapter is."""
        return self.adapter.held_still()

    def touch(self) -> None:
        """The adapter's compute copies are made again."""
        self.adapter.touch()


def attach_lora_classifier(
    model: nn.Module, experts: Sequence[str], rule: PromptRule, spec: LoraSpec, width: int,
    *, hidden: Sequence[int] = (), seed: int = 0,
) -> LoraClassifier:  # fmt: skip
    """A classifier over adapters of the model, and its own new adapter in the layers that it reads
    through. Raises ConfigError for a layer above the one whose output is read, and what `attach`
    raises."""
    bank, layers = get_bank(model), layer_count(model)
    refuse_router_name(bank)
    for name in experts:
        bank[name]
    rule.check(len(experts), layers)
    if rule.layer is not None:
        # those above are not run
        wanted = spec.layers_to_transform or tuple(range(rule.layer + 1))
        if above := [layer for layer in wanted if layer > rule.layer]:
            raise ConfigError(
                f"router.lora.layers_to_transform names layer {above[0]}, and the output of layer {rule.layer} is "
                "read (router.layer); leave it out, or read a higher layer"
            )
        spec = LoraSpec(**{**vars(spec), "layers_to_transform": wanted})
    adapter = attach(model, spec, ROUTER_NAME, seed=seed)
    router = LoraClassifier(adapter, experts, rule, width, hidden)
    bank.routers[ROUTER_NAME] = router
    return router
