"""What a model family is: its names, roles, and the geometry that a config describes. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, NamedTuple, TypeVar

# Values are a stranger's: any JSON type may stand where a number is expected.
ConfigMapping = Mapping[str, Any]
T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")


class LayerLinears(NamedTuple, Generic[T_co]):
    """One thing for each of the four matrix products of a layer, in the order they run; linears
    that read the same input are one product.

    qkv: the projections into attention; attn_out: the one out of it; mlp_in: those into the MLP
    (the gate first, then up); mlp_out: the one out of it.
    """

    qkv: T_co
    attn_out: T_co
    mlp_in: T_co
    mlp_out: T_co

    def map(self, function: Callable[[T_co], U]) -> LayerLinears[U]:
        """``function`` of each."""
        return LayerLinears(
            function(self.qkv),
            function(self.attn_out),
            function(self.mlp_in),
            function(self.mlp_out),
        )


class LayerNorms(NamedTuple, Generic[T_co]):
    """One thing for each norm of a layer: before attention, before the MLP, and of the heads of q
    and k where a family has those."""

    attn: T_co
    mlp: T_co
    q: T_co | None = None
    k: T_co | None = None

    def map(self, function: Callable[[T_co], U]) -> LayerNorms[U]:
        """``function`` of each that is there."""
        q, k = (None if norm is None else function(norm) for norm in (self.q, self.k))
        return LayerNorms(function(self.attn), function(self.mlp), q, k)

    def present(self) -> list[T_co]:
        """Those that are there, in order."""
        return [norm for norm in self if norm is not None]


# Names of the four inputs. Dropout masks are a function of them (adapters/dropout.py): another name
# would draw other masks.
Site = Literal["attention.in", "attention.out", "mlp.in", "mlp.out"]
SITES = LayerLinears[Site]("attention.in", "attention.out", "mlp.in", "mlp.out")


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary positions: base frequency, how many of the head's dimensions turn, and a scaling rule
    with its numbers.
    """

    theta: float
    dim: int
    kind: Literal["default", "linear", "llama3"] = "default"
    scaling: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelGeometry:
    """Everything the decoder needs to know beyond names."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab: int
    context: int
    # family defaults stand in `geometry`, so a config without the key means what transformers means
    norm_eps: float
    activation: str
    tied: bool
    rotary: RotaryConfig | None
    # target names whose linears have a bias
    biased: frozenset[str]
    # attention and MLP both read the layer's input, and both are added to it
    parallel_residual: bool = False

    def of_each(self, ranks: int, vocab: int) -> ModelGeometry:
        """What one of ``ranks`` that share every matrix computes (tensor parallel): its heads, its
        columns of the MLP, which they divide, and its ``vocab`` rows of the vocabulary."""
        return replace(
            self,
            heads=self.heads // ranks,
            kv_heads=self.kv_heads // ranks,
            mlp_width=self.mlp_width // ranks,
            vocab=vocab,
        )


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One architecture. Paths are Hugging Face module names; `{i}` is the layer number.

    targets: canonical target name -> path inside a layer; the layer's linears in the order they
    run. roles: the targets of each of the layer's products, every target once; norms: paths in a
    layer. qkv: `separate` (three linears), `thirds` (one linear, rows q|k|v) or `heads` (one
    linear, q,k,v interleaved by head). on_disk: module names that checkpoints, and releases of
    transformers before 5.17, spell otherwise, {transformers' module name: the file's}. reads: config keys `geometry` understands;
    ignores: keys that change nothing here, with a test of their value.
    """

    name: str
    model_types: tuple[str, ...]
    embed: str
    positions: str | None
    layer: str
    final_norm: str
    head: str
    norms: LayerNorms[str]
    targets: Mapping[str, str]
    roles: LayerLinears[tuple[str, ...]]
    norm: Literal["rms", "layer"]
    qkv: Literal["separate", "thirds", "heads"]
    gated: bool
    transposed: bool = False
    on_disk: Mapping[str, str] = field(default_factory=dict)
    geometry: Callable[[ConfigMapping], ModelGeometry]
    reads: frozenset[str]
    ignores: Mapping[str, Callable[[Any, ConfigMapping], bool]]

    def __post_init__(self) -> None:
        # the roles must list the targets in their own order: parameters are made in it, gradients
        # return in it
        role_targets = [target for role in self.roles for target in role]
        if role_targets != list(self.targets):
            raise ValueError(
                f"family {self.name}: roles {role_targets} do not match the targets "
                f"{list(self.targets)}"
            )
        # the decoder derives from these counts whether to split a fused qkv and whether there is a
        # gate
        counts = tuple(map(len, self.roles))
        if counts != (3 if self.qkv == "separate" else 1, 1, 2 if self.gated else 1, 1):
            settings = f"qkv={self.qkv}, gated={self.gated}"
            raise ValueError(f"family {self.name}: {counts} targets per role do not fit {settings}")

    def path(self, target: str, layer: int) -> str:
        """Full module name of a canonical target, e.g. `q_proj` of layer 3."""
        return f"{self.layer.format(i=layer)}.{self.targets[target]}"

    def current_name(self, name: str) -> str:
        """A tensor's or module's name with a renamed module's older spelling in the present one."""
        for present, older in self.on_disk.items():
            if name == older or name.startswith(f"{older}."):
                return present + name[len(older) :]
        return name

    def sizes(self, g: ModelGeometry) -> LayerLinears[dict[str, tuple[int, int]]]:
        """{target: (out, in) features} by role."""
        # not width: head_dim may be set apart from width / heads (Qwen3, Mistral-Nemo)
        q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
        # fused: one linear whose rows are q, k and v, however they are ordered
        outputs = (q, kv, kv) if len(self.roles.qkv) == 3 else (q + 2 * kv,)
        return LayerLinears(
            qkv={
                target: (out, g.width) for target, out in zip(self.roles.qkv, outputs, strict=True)
            },
            attn_out=dict.fromkeys(self.roles.attn_out, (g.width, q)),
            mlp_in=dict.fromkeys(self.roles.mlp_in, (g.mlp_width, g.width)),
            mlp_out=dict.fromkeys(self.roles.mlp_out, (g.width, g.mlp_width)),
        )


def unsupported_fields(
    family: ModelFamily, config: ConfigMapping, defaults: ConfigMapping
) -> list[str]:
    """Config fields that the native decoder would have to ignore although they change the model, as
    `key=value` words.

    ``defaults`` are the values transformers' own config class starts with: a key that class does
    not know is metadata, and a key at its default changes nothing.
    """
    unsupported = []
    for key, value in config.items():
        # a key transformers does not know either is metadata (a trainer's, a hub's)
        if key in family.reads or key not in defaults:
            continue
        harmless = family.ignores.get(key)
        if harmless is not None:
            if not harmless(value, config):
                unsupported.append(f"{key}={value!r}")
        elif value != defaults[key]:
            unsupported.append(f"{key}={value!r}")
    return unsupported
