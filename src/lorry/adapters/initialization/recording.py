"""What linears read and what their weights' gradients are, while somebody runs the model on rows.

    moments = record_inputs(layers, run_model)         # {path: InputMoments}
    gradients = record_gradients(layers, run_model)    # {path: [O,I]}

Neither keeps a row: of inputs their sum and second moments [I,I] remain, of gradients the mean. A base in few
bits has a gradient as any other: it is made from what a linear reads and what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lorry.adapters.layers.frozen_linear import DenseLinear, FrozenLinear
from lorry.adapters.layers.linear import BankLinear
from lorry.errors import ConfigError, ContractError

RunModel = Callable[[], None]
# of the rows that the model is given now: which of their tokens count
_COUNTED: ContextVar[Tensor | None] = ContextVar("lorry_counted_tokens", default=None)


@contextmanager
def counting_tokens(counted: Tensor) -> Iterator[None]:
    """Around a forward pass over T tokens, which may be padded behind: only those that ``counted`` [T]
    bool names are recorded."""
    token = _COUNTED.set(counted)
    try:
        yield
    finally:
        _COUNTED.reset(token)


@dataclass
class InputMoments:
    """Of what a linear has read: ``tokens``, ``calls``, ``total`` [I] and ``second`` [I,I] = sum of x x^T,
    fp32 or wider."""

    tokens: int
    calls: int
    total: Tensor
    second: Tensor

    def covariance(self) -> Tensor:
        """[I,I] float64, about the mean."""
        mean = self.total.double() / self.tokens
        return self.second.double() / self.tokens - torch.outer(mean, mean)


@dataclass
class _Recorder:
    """Gathers what several linears read, once for those that read the same. ``normed``: every call by
    its largest value, as CorDA has it, and all of its tokens."""

    normed: bool
    moments: dict[str, InputMoments] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict)
    # the input before, kept so that nothing else can lie where it lies
    last: tuple[str, Tensor] | None = None

    def record(self, path: str, x: Tensor) -> None:
        """Take x [T,I], what the linear reads."""
        if path not in self.readers:
            alike = self.last is not None and _is_same(self.last[1], x)
            self.readers[path] = self.last[0] if alike and self.last is not None else path
        if self.readers[path] != path:
            return
        self.last = (path, x)
        counted, rows = _COUNTED.get(), x.detach()
        if counted is not None:
            if len(rows) < len(counted):
                raise ContractError(
                    f"{path} reads {len(rows)} tokens, of {len(counted)} that were given"
                )
            # what lies behind them is padding
            rows = rows[: len(counted)]
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        if self.normed:
            rows = rows / rows.max().abs()
        elif counted is not None:
            rows = rows[counted.to(rows.device)]
        known = self.moments.get(path)
        if known is None:
            width = rows.shape[1]
            known = InputMoments(0, 0, rows.new_zeros(width), rows.new_zeros(width, width))
            self.moments[path] = known
        known.tokens, known.calls = known.tokens + len(rows), known.calls + 1
        known.total += rows.sum(0)
        known.second.addmm_(rows.t(), rows)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same memory."""
    return (one.data_ptr(), one.shape, one.stride()) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
    )


@dataclass
class WatchedLinear:
    """The base product of a layer in whose place somebody looks on: as that multiplies, and nothing of it
    trains. ``product``: what the layer had for one."""

    layer: BankLinear
    product: FrozenLinear | None

    @property
    def linear(self) -> FrozenLinear:
        """The base product, as it is now: a sharded weight is whole while a pass is at its layer."""
        if self.product is not None:
            return self.product
        return DenseLinear(self.layer.weight, self.layer.added_bias(), self.layer.transposed)

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.shape

    @property
    def requires_grad(self) -> bool:
        """Nothing of it trains meanwhile."""
        return False

    def parameters(self) -> Sequence[Tensor]:
        """None that trains."""
        return []

    def forward(self, x: Tensor) -> Tensor:
        return self.linear.forward(x)

    def backward(self, g: Tensor, into: Tensor | None) -> Tensor:
        return self.linear.backward(g, into)

    def parameter_gradients(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """None."""
        return []


@contextmanager
def watched_products(
    layers: Mapping[str, BankLinear], watch: Callable[[str, BankLinear], WatchedLinear]
) -> Iterator[None]:
    """Around passes of the model: each linear multiplies through what ``watch`` makes of its path and it."""
    before = {path: layer.product for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.product = watch(path, layer)
        yield
    finally:
        for path, layer in layers.items():
            layer.product = before[path]


@dataclass
class _RecordedLinear(WatchedLinear):
    """A base product that tells a recorder what it multiplies."""

    path: str
    recorder: _Recorder

    def forward(self, x: Tensor) -> Tensor:
        self.recorder.record(self.path, x)
        return self.linear.forward(x)


def record_inputs(
    layers: Mapping[str, BankLinear], run_model: RunModel, *, normed: bool = False
) -> dict[str, InputMoments]:
    """The moments of what each linear reads while ``run_model`` runs; one object for those that read
    the same. Raises ConfigError naming a linear that read nothing."""
    recorder = _Recorder(normed)

    def watch(path: str, layer: BankLinear) -> WatchedLinear:
        return _RecordedLinear(layer, layer.product, path, recorder)

    with watched_products(layers, watch), torch.no_grad():
        run_model()
    for path in layers:
        if path not in recorder.readers or not recorder.moments[recorder.readers[path]].tokens:
            raise ConfigError(
                f"no token reached {path} on the rows that the initialisation reads; give rows that do, "
                "or leave it out of target_modules"
            )
    return {path: recorder.moments[recorder.readers[path]] for path in layers}


@dataclass
class ProbedLinear(WatchedLinear):
    """A base product that shows the gradient its weight would have, whole or in few bits. ``wanted``: a
    number that asks autograd for it."""

    wanted: nn.Parameter
    show: Callable[[Tensor], None]

    @property
    def requires_grad(self) -> bool:
        """Always."""
        return True

    def parameters(self) -> Sequence[Tensor]:
        """The number that asks."""
        return [self.wanted]

    def parameter_gradients(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """Zero, once the gradient [O,I] was shown."""
        self.show(torch.mm(g.t(), x))
        return [torch.zeros_like(self.wanted)]


def record_gradients(layers: Mapping[str, BankLinear], run_model: RunModel) -> dict[str, Tensor]:
    """The mean gradient [O,I], fp32, of each linear's weight over the backward passes of ``run_model``.
    Raises ConfigError naming a linear that had none."""
    sums, counts = dict[str, Tensor](), dict.fromkeys(layers, 0)

    def add(path: str, gradient: Tensor) -> None:
        gradient = gradient.float()
        sums[path] = gradient if path not in sums else sums[path].add_(gradient)

    def count(path: str, _: Tensor) -> None:
        counts[path] += 1

    def watch(path: str, layer: BankLinear) -> WatchedLinear:
        wanted = nn.Parameter(torch.zeros((), device=layer.weight.device))
        # once a backward pass, however often the linear multiplied in it
        wanted.register_post_accumulate_grad_hook(partial(count, path))
        return ProbedLinear(layer, layer.product, wanted, partial(add, path))

    with watched_products(layers, watch), torch.enable_grad():
        run_model()
    if missing := [path for path in layers if path not in sums]:
        raise ConfigError(
            f"{missing[0]}.weight got no gradient on the rows that the initialisation reads; "
            "run_model has to call backward() of a loss that depends on it"
        )
    return {path: total / counts[path] for path, total in sums.items()}
