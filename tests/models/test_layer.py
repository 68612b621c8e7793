"""A layer's hand-written backward against transformers' own autograd in float64, for every family,
precision and kind of mix.

The other side is transformers' model with a plain low-rank term added by hooks: it shares no line
with ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.base_weights import make_weights_trainable
from lorry.adapters.dropout import DropoutNoise
from lorry.adapters.layers.frozen_linear import FrozenLinear
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.merge import merge
from lorry.adapters.mix import AdapterContext, Mix, MixTerm
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError, ContractError
from lorry.kernels import kernel_status
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder import layer
from lorry.models.decoder.model import Decoder
from tests.support import tiny

LONG = {"max_position_embeddings": 256}
WIDE: dict[
    str, dict[str, Any]
] = {  # heads as wide as the kernel takes them, lengths that cross a block of it
    "llama": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, **LONG},
    "llama biased": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, **LONG},
    "qwen2": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, **LONG},
    "qwen3": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
    },
    "gpt2": {"n_embd": 64, "n_head": 2, "n_positions": 256},
    "gpt_neox parallel": {"hidden_size": 64, "num_attention_heads": 2, **LONG},
    "gpt_neox sequential": {"hidden_size": 64, "num_attention_heads": 2, **LONG},
}
LENGTHS = (70, 3, 40)


def rows(seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, tiny.VOCAB, (n,), generator=draw).tolist() for n in LENGTHS]


def packed() -> PackedInput:
    return PackedInput.of(rows())


def objective(logits: Tensor) -> Tensor:
    """Something whose gradient is not small anywhere: a fixed random functional of the
    log-probabilities.
    """
    weights = torch.randn(
        logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return (logits.log_softmax(-1) * weights.to(logits.dtype)).sum()


def ours(model: Decoder, call: AdapterContext, batch: PackedInput) -> Tensor:
    last = model.hidden(batch, call).last
    assert last is not None
    logits = model.logits(last, call)
    return objective(logits.float() if logits.dtype == torch.bfloat16 else logits)


def hooked(
    theirs: nn.Module, model: Decoder, terms: Callable[[str, int], list[tuple[Tensor, Tensor, Any]]]
) -> Tensor:
    """transformers' logits of every row with the terms (A, B, g * s) added to each adapted linear's
    output.
    """
    handles, row = [], 0
    for path in get_bank(model).modules:

        def add(module: nn.Module, inputs: Any, output: Tensor, path: str = path) -> Tensor:
            for a, b, g in terms(path, row):
                output = output + g * ((inputs[0] @ a.t()) @ b.t())
            return output

        handles.append(theirs.get_submodule(path).register_forward_hook(add))
    out = []
    for row, tokens in enumerate(rows()):  # noqa: B007 - the hooks read it
        out.append(theirs(input_ids=torch.tensor([tokens])).logits[0])
    for handle in handles:
        handle.remove()
    return torch.cat(out)


def masters(model: Decoder, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)} in float64, as leaves."""
    slots = get_bank(model)[name].slots
    return {
        path: (slot.A.detach().double().requires_grad_(), slot.B.detach().double().requires_grad_())
        for path, slot in slots.items()
    }


def rounded(model: Decoder, theirs: nn.Module, dtype: torch.dtype) -> nn.Module:
    """transformers' model in float64 with the very weights ours has."""
    theirs = theirs.double()
    mine = dict(model.state_dict())
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(mine[name].double())
        for adapter in get_bank(model).adapters.values():
            adapter.values.copy_(adapter.values.to(dtype).float())
            adapter.touch()
    return theirs


def error(model: Decoder, name: str, truth: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Largest relative error of an adapter's gradient tensors, in the Frobenius norm."""
    worst = 0.0
    for path, slot in get_bank(model)[name].slots.items():
        for mine, leaf in zip((slot.A, slot.B), truth[path], strict=True):
            assert mine.grad is not None
            assert leaf.grad is not None
            assert leaf.grad.norm() > 0
            worst = max(worst, float((mine.grad.double() - leaf.grad).norm() / leaf.grad.norm()))
    return worst


def one_layer(
    name: str, tmp_path: Path, dtype: torch.dtype
) -> tuple[Decoder, nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """Ours, transformers in float64, and its adapter leaves with their gradient. One layer, large
    weights everywhere.
    """
    source = tiny.fresh(
        name, **{**WIDE[name], "n_layer" if name == "gpt2" else "num_hidden_layers": 1}
    )
    model = tiny.decoder(source, tmp_path, dtype)
    attach(model, LoraSpec(r=4, lora_alpha=8, init_lora_weights=False))
    theirs = rounded(model, source, dtype)
    truth = masters(model, "default")
    objective(hooked(theirs, model, lambda path, row: [(*truth[path], 2.0)])).backward()
    return model, theirs, truth


@pytest.mark.parametrize("name", list(WIDE))
def test_gradients_of_every_family(name: str, tmp_path: Path) -> None:
    model, _, truth = one_layer(name, tmp_path, torch.float32)
    ours(model, AdapterContext(Mix.one("default")), packed()).backward()
    assert error(model, "default", truth) < 1e-5


@pytest.mark.parametrize("name", list(WIDE))
def test_bfloat16_gradients_are_as_good_as_transformers(name: str, tmp_path: Path) -> None:
    """Of the whole gradient: no further off than transformers' own bfloat16 pass is."""
    model, theirs, truth = one_layer(name, tmp_path, torch.bfloat16)
    ours(model, AdapterContext(Mix.one("default")), packed()).backward()
    exact = torch.cat(
        [leaf.grad.flatten() for pair in truth.values() for leaf in pair if leaf.grad is not None]
    )
    other = {
        path: tuple(leaf.detach().bfloat16().requires_grad_() for leaf in pair)
        for path, pair in truth.items()
    }
    objective(
        hooked(theirs.bfloat16(), model, lambda path, row: [(*other[path], 2.0)]).float()
    ).backward()  # type: ignore[list-item]
    slots = get_bank(model)["default"].slots
    mine = torch.cat(
        [
            leaf.grad.flatten()
            for path in truth
            for leaf in (slots[path].A, slots[path].B)
            if leaf.grad is not None
        ]
    )
    peer = torch.cat(
        [leaf.grad.flatten() for pair in other.values() for leaf in pair if leaf.grad is not None]
    )
    off, peers = (float((g.double() - exact).norm() / exact.norm()) for g in (mine, peer))
    assert off < 1.25 * peers


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_gradients_through_several_layers(name: str, tmp_path: Path) -> None:
    source = tiny.trained(name)
    model = tiny.decoder(source, tmp_path)
    attach(model, LoraSpec(r=4, lora_alpha=8, init_lora_weights=False))
    batch = [tokens[: tiny.CONTEXT - 1] for tokens in rows()]
    truth = masters(model, "default")
    theirs = tiny.fresh(name).double()
    theirs.load_state_dict({k: v.double() for k, v in source.state_dict().items()})
    outs = []
    handles = [
        theirs.get_submodule(path).register_forward_hook(
            lambda m, i, o, ab=ab: o + 2.0 * (i[0] @ ab[0].t() @ ab[1].t())
        )
        for path, ab in truth.items()
    ]
    for tokens in batch:
        outs.append(theirs(input_ids=torch.tensor([tokens])).logits[0])
    objective(torch.cat(outs)).backward()
    assert len(handles) == len(truth)
    ours(model, AdapterContext(Mix.one("default")), PackedInput.of(batch)).backward()
    assert error(model, "default", truth) < 1e-5


def test_every_kind_of_mix_at_once(tmp_path: Path) -> None:
    """Two adapters of unlike rank and targets, gates per token that want gradients, and rows that
    use neither.
    """
    source = tiny.fresh("llama", **WIDE["llama"], num_hidden_layers=2)
    model = tiny.decoder(source, tmp_path)
    attach(model, LoraSpec(r=4, lora_alpha=8, init_lora_weights=False), "a")
    attach(
        model,
        LoraSpec(
            r=3,
            lora_alpha=6,
            init_lora_weights=False,
            target_modules=["v_proj", "down_proj", "up_proj"],
        ),
        "b",
        seed=1,
    )
    theirs = rounded(model, source, torch.float32)
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    gates = torch.rand(bounds[-1], 2, generator=torch.Generator().manual_seed(3))
    gates[bounds[1] : bounds[2]] = 0.0
    mine, other = gates.clone().requires_grad_(), gates.double().requires_grad_()
    truth = {"a": masters(model, "a"), "b": masters(model, "b")}
    scales = {"a": 2.0, "b": 2.0}

    def terms(path: str, row: int) -> list[tuple[Tensor, Tensor, Any]]:
        part = other[bounds[row] : bounds[row + 1]]
        return [
            (*truth[n][path], scales[n] * part[:, k, None])
            for k, n in enumerate("ab")
            if path in truth[n]
        ]

    objective(hooked(theirs, model, terms)).backward()
    ours(model, AdapterContext(Mix.routed(["a", "b"], mine)), packed()).backward()
    for name in "ab":
        assert error(model, name, truth[name]) < 1e-5
    assert mine.grad is not None
    assert other.grad is not None
    assert float((mine.grad.double() - other.grad).norm() / other.grad.norm()) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_adapters_side_by_side_in_bfloat16(dropout: float, tmp_path: Path) -> None:
    """Rows of one adapter are widened to even shapes there: each adapter's gradient is what it is
    in a batch of its own, and not one bit of a sequence's output depends on what the other
    sequences say.
    """
    model = tiny.decoder(
        tiny.fresh("llama", **WIDE["llama"], num_hidden_layers=2), tmp_path, torch.bfloat16
    )
    for i, name in enumerate("ab"):
        attach(
            model, LoraSpec(r=4 - i, lora_dropout=dropout, init_lora_weights=False), name, seed=i
        )
    names, keys = ["a", None, "b"], (5, 6, 7)

    def hidden(batch: list[list[int]], which: list[int]) -> Tensor:
        starts = [0, *torch.tensor([len(t) for t in batch]).cumsum(0).tolist()]
        noise = DropoutNoise(1, 2, tuple(keys[i] for i in which), tuple(starts))
        last = model.hidden(
            PackedInput.of(batch),
            AdapterContext(Mix.per_sequence([names[i] for i in which], starts), noise),
        ).last
        assert last is not None
        return last

    def gradients(out: Tensor) -> list[Tensor]:
        adapters = [get_bank(model)[name] for name in "ab"]
        for adapter in adapters:
            adapter.grads.zero_()
        objective(out.float()).backward()
        return [adapter.grads.clone() for adapter in adapters]

    together = hidden(rows(), [0, 1, 2])
    joint = gradients(together[:70])
    assert joint[0].norm() > 0
    assert not joint[1].any()
    alone = gradients(hidden(rows()[:1], [0]))
    assert float((joint[0] - alone[0]).norm() / alone[0].norm()) < 1e-2
    strangers = [rows()[0], *rows(seed=1)[1:]]
    assert torch.equal(hidden(strangers, [0, 1, 2])[:70], together[:70])
    assert not torch.equal(hidden(strangers, [0, 1, 2])[70:], together[70:])


@pytest.mark.parametrize("name", ["llama biased", "qwen3", "gpt2", "gpt_neox parallel"])
def test_the_base_itself_can_train(name: str, tmp_path: Path) -> None:
    """Full fine-tuning: every base weight's gradient is transformers'."""
    source = tiny.fresh(name, **WIDE[name])
    model = tiny.decoder(source, tmp_path)
    theirs = source.double().requires_grad_(True)
    objective(
        torch.cat([theirs(input_ids=torch.tensor([tokens])).logits[0] for tokens in rows()])
    ).backward()
    model.requires_grad_(True)
    ours(model, AdapterContext(), packed()).backward()
    named = dict(model.named_parameters())
    for path, p in theirs.named_parameters():
        grad = named[path].grad
        assert grad is not None, path
        assert p.grad is not None
        assert float((grad.double() - p.grad).norm()) < 1e-5 * float(p.grad.norm()) + 1e-9, path


def test_some_of_the_base_can_train(tmp_path: Path) -> None:
    """Only what asks for a gradient gets one, and it is the same one."""
    model = tiny.decoder(tiny.fresh("llama", **WIDE["llama"]), tmp_path)
    grads = []
    for only in ("", "mlp.up_proj"):
        for name, p in model.named_parameters():
            p.requires_grad_(only in name)
            p.grad = None
        ours(model, AdapterContext(), packed()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(grads[1]) == {n for n in grads[0] if "mlp.up_proj" in n}
    for name, grad in grads[1].items():
        assert torch.equal(grad, grads[0][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice_and_with_recompute(dtype: torch.dtype, tmp_path: Path) -> None:
    """A second backward through the same graph, and a layer that runs again in backward, give the
    same bits; dropout on.
    """
    model = tiny.decoder(tiny.fresh("qwen3", **WIDE["qwen3"]), tmp_path, dtype)
    attach(model, LoraSpec(r=4, lora_alpha=8, lora_dropout=0.3, init_lora_weights=False))
    adapter, batch = get_bank(model)["default"], packed()
    starts = (0, *torch.tensor(LENGTHS).cumsum(0).tolist())
    call = AdapterContext(
        Mix.one("default"), DropoutNoise(seed=3, step=1, keys=(7, 8, 9), starts=starts)
    )
    found = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        loss = ours(model, call, batch)
        for _ in range(2):
            adapter.grads.zero_()
            loss.backward(retain_graph=True)
            found.append(adapter.grads.clone())
    assert found[0].abs().sum() > 0
    assert all(torch.equal(f, found[0]) for f in found)


def test_nothing_is_done_below_the_lowest_adapter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Adapters in layers 2 and 3 of 4: two layers go backward, and the lower of them makes no
    gradient for its input.
    """
    model = tiny.decoder(tiny.fresh("llama", **WIDE["llama"], num_hidden_layers=4), tmp_path)
    attach(model, LoraSpec(r=4, lora_alpha=8, init_lora_weights=False, layers_to_transform=[2, 3]))
    ran: list[tuple[int, bool]] = []
    original = layer.LayerBackward.run

    def watched(self: layer.LayerBackward, dy: Tensor, needs_x: bool) -> Tensor | None:
        ran.append((self.block.index, needs_x))
        return original(self, dy, needs_x)

    monkeypatch.setattr(layer.LayerBackward, "run", watched)
    ours(model, AdapterContext(Mix.one("default")), packed()).backward()
    assert ran == [(3, True), (2, False)]


@pytest.mark.skipif(
    kernel_status().attention == "none", reason="torch's own attention keeps what it likes"
)
def test_what_a_layer_keeps(tmp_path: Path) -> None:
    """Bytes per token and layer in bf16: 2(d + q + 2k + q + d + 2f) + 4 heads, and 2r per product's
    A (docs/architecture.md).
    """
    model = tiny.decoder(
        tiny.fresh("llama", **WIDE["llama"], num_hidden_layers=3), tmp_path, torch.bfloat16
    )
    attach(model, LoraSpec(r=4, lora_alpha=8, init_lora_weights=False))
    held: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    batch = packed()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        last = model.hidden(batch, AdapterContext(Mix.one("default"))).last
    assert last is not None
    d, q, k, f, r = 96, 96, 32, 48, 4
    layers = 2 * (d + q + 2 * k + q + d + 2 * f) + 2 * r * 7
    final = 2 * d
    tokens = -(-sum(LENGTHS) // 16) * 16  # bfloat16 batches are padded to few lengths
    expected, softmax = tokens * (3 * layers + final), 4 * 3 * 3 * tokens
    assert sum(held.values()) == expected + softmax


# --- products that are not the dense one


@dataclass(frozen=True)
class Int8:
    """A weight in 8 bits with a scale per row: w [O,I] int8, scale [O], bias [O] or None."""

    w: Tensor
    scale: Tensor
    bias: Tensor | None
    requires_grad = False

    @staticmethod
    def of(linear: BankLinear) -> Int8:
        weight = linear.weight.detach().t() if linear.transposed else linear.weight.detach()
        scale = weight.abs().amax(1) / 127
        bias = None if linear.bias is None else linear.bias.detach()
        return Int8((weight / scale[:, None]).round().to(torch.int8), scale, bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.w.shape
        return rows, columns

    def parameters(self) -> Sequence[Tensor]:
        return []

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.w.to(x.dtype).t()) * self.scale
        return y if self.bias is None else y + self.bias

    def backward(self, g: Tensor, into: Tensor | None) -> Tensor:
        dx = (g * self.scale) @ self.w.to(g.dtype)
        return dx if into is None else into + dx

    def parameter_gradients(self, x: Tensor, g: Tensor) -> list[Tensor]:
        return []


@dataclass(frozen=True)
class Scaled:
    """A variant with a term of its own: y = W x + m * (W x), m [O] trained (of the shape of
    DoRA's).
    """

    inner: FrozenLinear
    m: Tensor
    requires_grad = True

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def parameters(self) -> Sequence[Tensor]:
        return [self.m]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.forward(x) * (1 + self.m.detach())

    def backward(self, g: Tensor, into: Tensor | None) -> Tensor:
        return self.inner.backward(g * (1 + self.m.detach()), into)

    def parameter_gradients(self, x: Tensor, g: Tensor) -> list[Tensor]:
        return [(g * self.inner.forward(x)).sum(0)]


def layer_linears(model: Decoder) -> dict[str, BankLinear]:
    named = {path: m for path, m in model.named_modules() if isinstance(m, BankLinear)}
    return {path: m for path, m in named.items() if m is not model.head}


@pytest.mark.parametrize("name", ["llama biased", "qwen3", "gpt2", "gpt_neox parallel"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_weight_in_eight_bits_brings_its_own_product(
    name: str, recompute: bool, tmp_path: Path
) -> None:
    """Its adapters' gradients are those of transformers' model with the weights that the bytes
    stand for.
    """
    source = tiny.fresh(name, **WIDE[name])
    model = tiny.decoder(source, tmp_path)
    attach(model, LoraSpec(r=4, lora_alpha=8, init_lora_weights=False))
    theirs, meant = rounded(model, source, torch.float32), dict(source.named_parameters())
    for path, linear in layer_linears(model).items():
        stored = Int8.of(linear)
        linear.use_product(stored)
        weight = stored.w.double() * stored.scale.double()[:, None]
        with torch.no_grad():
            meant[f"{path}.weight"].copy_(weight.t() if linear.transposed else weight)
            linear.weight.fill_(torch.nan)  # nothing reads it
    truth = masters(model, "default")
    objective(hooked(theirs, model, lambda path, row: [(*truth[path], 2.0)])).backward()
    model.gradient_checkpointing = recompute
    ours(model, AdapterContext(Mix.one("default")), packed()).backward()
    assert error(model, "default", truth) < 1e-5
    with pytest.raises(ConfigError, match="have a custom product"):
        merge(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_variant_adds_a_term_of_its_own_that_trains(name: str, tmp_path: Path) -> None:
    """Magnitudes beside an adapter: the gradients of both are those of float64 autograd."""
    source = tiny.fresh(name, **WIDE[name])
    model = tiny.decoder(source, tmp_path)
    attach(model, LoraSpec(r=4, lora_alpha=8, init_lora_weights=False))
    theirs, truth = rounded(model, source, torch.float32), masters(model, "default")
    draw = torch.Generator().manual_seed(5)
    mine, other = dict[str, Tensor](), dict[str, Tensor]()
    for path, linear in layer_linears(model).items():
        m = torch.randn(linear.out_features, generator=draw) * 0.1
        mine[path], other[path] = m.clone().requires_grad_(), m.double().requires_grad_()
        linear.use_product(Scaled(linear.base_product(), mine[path]))
        scaled = lambda module, inputs, y, m=other[path]: y * (1 + m)  # noqa: E731
        theirs.get_submodule(path).register_forward_hook(scaled)
    objective(hooked(theirs, model, lambda path, row: [(*truth[path], 2.0)])).backward()
    ours(model, AdapterContext(Mix.one("default")), packed()).backward()
    assert error(model, "default", truth) < 1e-5
    for path, m in mine.items():
        exact = other[path].grad
        assert m.grad is not None
        assert exact is not None
        assert float((m.grad.double() - exact).norm() / exact.norm()) < 1e-5, path


def test_a_product_by_itself_is_differentiated_too(tmp_path: Path) -> None:
    """A linear that is called alone, without an adapter, goes through its product; and what cannot
    be is refused.
    """
    model = tiny.decoder(tiny.fresh("llama", **WIDE["llama"]), tmp_path)
    path, linear = next(iter(layer_linears(model).items()))
    stored = Int8.of(linear)
    x = torch.randn(5, linear.in_features, requires_grad=True)
    linear.use_product(stored)
    linear(x).sum().backward()
    assert x.grad is not None
    exact = (stored.w.double() * stored.scale.double()[:, None]).sum(0).expand(5, -1)
    assert float((x.grad.double() - exact).norm() / exact.norm()) < 1e-5
    with pytest.raises(ConfigError, match=f"{path}.weight cannot train"):
        make_weights_trainable(model, "all")
    with pytest.raises(ContractError, match="its new product"):
        model.head.use_product(stored)


# --- a router in every layer


class Softmax:
    """A toy router: gates [T, K] = softmax(x W), one W [width, K] per layer and half."""

    halves, level = ("attn", "mlp"), "delta"

    def __init__(
        self, model: Decoder, adapters: Sequence[str], dtype: torch.dtype = torch.float32
    ) -> None:
        draw, width = torch.Generator().manual_seed(9), model.geometry.width
        self.adapters = adapters
        self.weights = {
            (i, half): torch.randn(width, len(adapters), generator=draw).to(dtype).requires_grad_()
            for i in range(model.geometry.layers)
            for half in ("attn", "mlp")
        }

    def parameters(self, layer: int) -> Sequence[Tensor]:
        return [self.weights[layer, half] for half in ("attn", "mlp")]

    def logits(self, layer: int, half: str, x: Tensor) -> Tensor:
        return x.to(self.weights[layer, half].dtype) @ self.weights[layer, half]

    def gates(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class Routed:
    """transformers' model in float64 with the terms of adapters whose gates are made of the norms'
    outputs, by hooks.
    """

    def __init__(
        self, theirs: nn.Module, model: Decoder, router: Softmax, strength: Tensor
    ) -> None:
        """strength [T, K]: what each token's terms are multiplied with besides."""
        self.model, self.router, self.strength = model, router, strength
        self.truth = {name: masters(model, name) for name in router.adapters}
        self.gates: dict[tuple[int, str], Tensor] = {}
        self.bounds, self.row, self.theirs = (
            [0, *torch.tensor(LENGTHS).cumsum(0).tolist()],
            0,
            theirs,
        )
        family = model.family
        for i in range(model.geometry.layers):
            for half, norm in (("attn", family.norms.attn), ("mlp", family.norms.mlp)):
                module = theirs.get_submodule(f"{family.layer.format(i=i)}.{norm}")
                module.register_forward_hook(lambda m, a, y, at=(i, half): self.note(at, y))
            for site, targets in family.roles._asdict().items():
                half = "attn" if site in ("qkv", "attn_out") else "mlp"
                for path in (family.path(target, i) for target in targets):
                    hook = lambda m, a, y, path=path, at=(i, half): self.add(path, at, a[0], y)  # noqa: E731
                    theirs.get_submodule(path).register_forward_hook(hook)

    def note(self, at: tuple[int, str], normed: Tensor) -> None:
        part = self.strength[self.bounds[self.row] : self.bounds[self.row + 1]]
        self.gates[at] = self.router.gates(self.router.logits(*at, normed)) * part

    def add(self, path: str, at: tuple[int, str], x: Tensor, y: Tensor) -> Tensor:
        for k, name in enumerate(self.router.adapters):
            if path in self.truth[name]:
                a, b = self.truth[name][path]
                y = y + self.gates[at][..., k, None] * 2.0 * (x @ a.t() @ b.t())
        return y

    def run(self) -> Tensor:
        out = []
        for self.row, tokens in enumerate(rows()):
            out.append(self.theirs(input_ids=torch.tensor([tokens])).logits[0])
        return torch.cat(out)


# and how near float64 the worst tensor comes; without a router it is 8% off in bfloat16, as others
# are
FLOAT, BRAIN = (torch.float32, 2e-5), (torch.bfloat16, 0.15)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", FLOAT),
        ("qwen3", FLOAT),
        ("gpt2", FLOAT),
        ("gpt_neox parallel", FLOAT),
        ("llama", BRAIN),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_router_reads_each_layers_normed_inputs(
    name: str, kind: tuple[torch.dtype, float], recompute: bool, tmp_path: Path
) -> None:
    """Outputs, and gradients of the experts and of the router through two layers, against float64
    autograd.
    """
    source = tiny.fresh(
        name, **WIDE[name], **{"n_layer" if name == "gpt2" else "num_hidden_layers": 2}
    )
    dtype, bound = kind
    model = tiny.decoder(source, tmp_path, dtype)
    attach(model, LoraSpec(r=4, lora_alpha=8, init_lora_weights=False), "a")
    (out,) = model.family.roles.mlp_out
    only = model.family.targets[out].rpartition(".")[2]
    attach(
        model,
        LoraSpec(r=3, lora_alpha=6, init_lora_weights=False, target_modules=[only]),
        "b",
        seed=1,
    )
    theirs, router = rounded(model, source, dtype), Softmax(model, ["a", "b"])
    twin = Softmax(model, ["a", "b"], torch.float64)
    strength = torch.tensor([[1.0, 0.0]]).double().repeat(sum(LENGTHS), 1)
    strength[5:100, 1] = 0.5
    exact = Routed(theirs, model, twin, strength)
    there = exact.run()
    objective(there).backward()
    model.gradient_checkpointing = recompute
    call, batch = (
        AdapterContext(
            Mix((MixTerm("a", route=0), MixTerm("b", slice(5, 100), 0.5, route=1)), router)
        ),
        packed(),
    )
    with torch.no_grad():
        here = model.logits(model.hidden(batch, call).last, call)
    assert float((here.double() - there.detach()).norm() / there.detach().norm()) < bound
    loss = ours(model, call, batch)
    for _ in range(2):  # a second backward through the same graph gives the same again
        for adapter in "ab":
            get_bank(model)[adapter].grads.zero_()
        for w in router.weights.values():
            w.grad = None
        loss.backward(retain_graph=True)
    for adapter in "ab":
        assert error(model, adapter, exact.truth[adapter]) < bound
    for at, w in router.weights.items():
        wanted = twin.weights[at].grad
        assert w.grad is not None
        assert wanted is not None
        assert float((w.grad.double() - wanted).norm() / wanted.norm()) < bound, at


class SoftmaxByLinear:
    """A toy router of the linears: gates of a linear = softmax(x V^T), one V [K, in] for each."""

    halves = ("attn", "mlp")

    def __init__(
        self, model: Decoder, adapters: Sequence[str], dtype: torch.dtype = torch.float32
    ) -> None:
        draw, family = torch.Generator().manual_seed(9), model.family
        self.adapters, self.layer = adapters, family.layer
        paths = [
            family.path(target, i)
            for i in range(model.geometry.layers)
            for targets in family.roles
            for target in targets
        ]
        self.weights = {
            path: torch.randn(len(adapters), model.get_submodule(path).in_features, generator=draw)
            .mul(0.2)
            .to(dtype)
            .requires_grad_()
            for path in paths
        }

    def parameters(self, layer: int) -> Sequence[Tensor]:
        prefix = self.layer.format(i=layer) + "."
        return [w for path, w in self.weights.items() if path.startswith(prefix)]

    def linear_gates(self, linears: Sequence[str], x: Tensor) -> Tensor:
        parts = [(x.to(w.dtype) @ w.t()).softmax(-1) for w in map(self.weights.get, linears)]
        return torch.cat(parts, -1)


class RoutedByLinear(Routed):
    """`Routed`, with each linear's gates made of what it reads."""

    def note(self, at: tuple[int, str], normed: Tensor) -> None:
        self.part = self.strength[self.bounds[self.row] : self.bounds[self.row + 1]]

    def add(self, path: str, at: tuple[int, str], x: Tensor, y: Tensor) -> Tensor:
        self.gates[at] = self.router.linear_gates([path], x) * self.part
        return super().add(path, at, x, y)


@pytest.mark.parametrize(("name", "recompute"), [("llama", False), ("gpt2", True)])
def test_a_router_of_the_linears_gates_each_by_its_own_input(
    name: str, recompute: bool, tmp_path: Path
) -> None:
    """Outputs, and gradients of experts and router through two layers, against float64 autograd:
    q, k and v have other gates, and those of the last linear read what the activation made."""
    source = tiny.fresh(
        name, **WIDE[name], **{"n_layer" if name == "gpt2" else "num_hidden_layers": 2}
    )
    model = tiny.decoder(source, tmp_path, torch.float32)
    attach(model, LoraSpec(r=4, lora_alpha=8, init_lora_weights=False), "a")
    (out,) = model.family.roles.mlp_out
    only = model.family.targets[out].rpartition(".")[2]
    attach(
        model,
        LoraSpec(r=3, lora_alpha=6, init_lora_weights=False, target_modules=[only]),
        "b",
        seed=1,
    )
    theirs, router = rounded(model, source, torch.float32), SoftmaxByLinear(model, ["a", "b"])
    twin = SoftmaxByLinear(model, ["a", "b"], torch.float64)
    exact = RoutedByLinear(theirs, model, twin, torch.ones(sum(LENGTHS), 1).double())
    there = exact.run()
    objective(there).backward()
    model.gradient_checkpointing = recompute
    call, batch = AdapterContext(Mix.layer_routed(router)), packed()
    with torch.no_grad():
        here = model.logits(model.hidden(batch, call).last, call)
    assert float((here.double() - there.detach()).norm() / there.detach().norm()) < FLOAT[1]
    for adapter in "ab":
        get_bank(model)[adapter].grads.zero_()
    ours(model, call, batch).backward()
    for adapter in "ab":
        assert error(model, adapter, exact.truth[adapter]) < FLOAT[1]
    for path, w in router.weights.items():
        wanted = twin.weights[path].grad
        if wanted is None or not wanted.any():
            assert w.grad is None or not w.grad.any()
            continue
        assert float((w.grad.double() - wanted).norm() / wanted.norm()) < FLOAT[1], path


def test_a_router_is_refused_where_no_layer_asks_it(tmp_path: Path) -> None:
    """An adapter at the head cannot take a gate of the layers, nor a term two gates: said, not left
    out.
    """
    model = tiny.decoder(tiny.fresh("llama", **WIDE["llama"]), tmp_path)
    attach(
        model,
        LoraSpec(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "lm_head"]),
        "a",
    )
    call = AdapterContext(Mix.layer_routed(Softmax(model, ["a"])))
    with pytest.raises(
        ContractError, match=r"lm_head: .* but this linear is not in a decoder layer"
    ):
        ours(model, call, packed())
    gate = torch.ones(sum(LENGTHS))
    with pytest.raises(ContractError, match="a gate of its own"):
        model.hidden(
            packed(),
            AdapterContext(Mix((MixTerm("a", None, gate, 0),), Softmax(model, ["a"]))),
        )
