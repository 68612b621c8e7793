"""The shape of a model from its config: the matrices of a layer, the vocabulary, the experts; and
which path will run it.

Widths are in elements. A layer's linears come in the order they run, with the canonical names of
`families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorry.errors import ModelError
from lorry.families import SITES, ModelFamily, ModelGeometry, Site, find_family, unsupported_fields
from lorry.families.common import UnsupportedConfigError
from lorry.families.llama import LLAMA, QWEN2, QWEN3

# whose sizes and names an architecture without a family has
READERS = {"qwen2_moe": QWEN2, "qwen3_moe": QWEN3}


@dataclass(frozen=True, kw_only=True)
class LayerMatrix:
    """One matrix of a layer; ``path`` is its Hugging Face name with `{i}` for the layer."""

    target: str
    path: str
    inputs: int
    outputs: int
    site: Site
    bias: bool = False

    @property
    def size(self) -> int:
        """Weights, without the bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """A layer's experts in place of its MLP: how many there are, how many a token visits, and how
    wide each is.
    """

    count: int
    active: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the plan knows of a model. ``queries`` = heads x head_dim, ``keys`` = kv_heads x
    head_dim.

    ``native``: Lorry's own decoder runs it, else transformers', for the reason in ``why``.
    ``estimate``: the architecture is not described in `families` and was read as a Llama-like one.
    """

    geometry: ModelGeometry
    linears: tuple[LayerMatrix, ...]
    experts: ExpertShape | None
    norm: Literal["rms", "layer"]
    qk_norm: bool
    gated: bool
    fused_qkv: bool
    learned_positions: bool
    embed: str
    head: str
    layer: str
    native: bool
    why: str = ""
    estimate: bool = False

    @property
    def queries(self) -> int:
        return self.geometry.heads * self.geometry.head_dim

    @property
    def keys(self) -> int:
        return self.geometry.kv_heads * self.geometry.head_dim

    # --- parameters

    @property
    def layer_linears(self) -> int:
        """Weights of one layer's dense linears, without biases."""
        return sum(linear.size for linear in self.linears)

    @property
    def layer_experts(self) -> int:
        """Weights of one layer's experts, all of them."""
        return 0 if self.experts is None else self.experts.count * self._expert

    @property
    def layer_small(self) -> int:
        """Norms, biases and the router of one layer: never quantised."""
        g, per_norm = self.geometry, 2 if self.norm == "layer" else 1
        norms = 2 * per_norm * g.width + (2 * g.head_dim if self.qk_norm else 0)
        router = 0 if self.experts is None else self.experts.count * g.width
        return norms + router + sum(linear.outputs for linear in self.linears if linear.bias)

    @property
    def embedding(self) -> int:
        """Weights of the input embedding, learned positions included."""
        g = self.geometry
        return (g.vocab + (g.context if self.learned_positions else 0)) * g.width

    @property
    def head_size(self) -> int:
        """Weights of the output head as a matrix, whether or not it shares the embedding's memory."""
        return self.geometry.vocab * self.geometry.width

    @property
    def final_norm(self) -> int:
        return self.geometry.width * (2 if self.norm == "layer" else 1)

    @property
    def parameters(self) -> int:
        """All weights, a tied head counted once."""
        body = self.geometry.layers * (self.layer_linears + self.layer_experts + self.layer_small)
        return (
            body + self.embedding + self.final_norm + (0 if self.geometry.tied else self.head_size)
        )

    @property
    def active_body(self) -> int:
        """Weights of all layers that one token is multiplied with: N_b of the floor."""
        visited = 0 if self.experts is None else self.experts.active * self._expert
        return self.geometry.layers * (self.layer_linears + visited)

    @property
    def mlp_linears(self) -> int:
        """Weights of one layer's dense MLP; of experts those that every token passes."""
        return sum(linear.size for linear in self.linears if linear.site.startswith("mlp"))

    @property
    def _expert(self) -> int:
        assert self.experts is not None
        return (3 if self.gated else 2) * self.geometry.width * self.experts.width


def read_model_shape(
    config: Mapping[str, Any], *, where: str = "config.json", native: bool = True
) -> ModelShape:
    """Read a config as `config.json` spells it. ``native=False``: transformers' implementation is
    forced.

    Raises ModelError naming the field when the numbers needed are not there.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{where}: no model_type; this is not the config of a transformers model")
    family = find_family(kind)
    reader, experts = family, None
    if family is None:
        # sizes alone are read here, and nearly every newer architecture names them as Llama does
        reader, experts = READERS.get(kind, LLAMA), _read_experts(config)
    assert reader is not None
    why = _why_not_native(family, kind, config) if native else "native=false"
    try:
        geometry = reader.geometry(
            {"rope_parameters": {}, **config} if family else _plain_rotary(config)
        )
    except UnsupportedConfigError:
        # a rotary rule that the decoder lacks: it changes no size, so the plan leaves it out
        geometry = reader.geometry(_plain_rotary(config))
    except KeyError as missing:
        raise ModelError(
            f"{where}: no {missing.args[0]}; this architecture ({kind}) cannot be planned from its config"
        ) from None
    except (ValueError, TypeError, ArithmeticError) as e:
        raise ModelError(f"{where}: unusable numbers ({type(e).__name__}: {e})") from e
    _check_geometry(geometry, where)
    # the dense width of such a config is that of no matrix: experts bring their own
    if experts is not None:
        geometry = replace(geometry, mlp_width=experts.width)
    linears = tuple(
        linear
        for linear in _layer_matrices(reader, geometry)
        if experts is None or linear.site.startswith("attention")
    )
    if kind == "qwen2_moe":
        linears += _shared_expert(reader, geometry, config, where)
    return ModelShape(
        geometry=geometry,
        linears=linears,
        experts=experts,
        norm=reader.norm,
        qk_norm=reader.norms.q is not None,
        gated=reader.gated,
        fused_qkv=len(reader.roles.qkv) == 1,
        learned_positions=reader.positions is not None,
        embed=reader.embed,
        head=reader.head,
        layer=reader.layer,
        native=not why,
        why=why,
        estimate=family is None and kind not in ("mixtral", "qwen2_moe", "qwen3_moe"),
    )


def _plain_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without its rotary rule, which changes no size."""
    return {
        k: v
        for k, v in config.items()
        if k not in ("rope_scaling", "rope_parameters", "partial_rotary_factor")
    }


def _why_not_native(family: ModelFamily | None, kind: str, config: Mapping[str, Any]) -> str:
    """Why Lorry's own decoder will not run this config; "" when it will. Defaults are not known
    here, so only fields that the family itself doubts are looked at; the loader has the last word."""
    if family is None:
        return f"Lorry's decoder has no family for model_type {kind!r}"
    try:
        odd = unsupported_fields(
            family, {"max_position_embeddings": 1, **config}, dict.fromkeys(family.ignores)
        )
        family.geometry(config)
    except UnsupportedConfigError as e:
        return f"Lorry's decoder does not support {e}"
    except (LookupError, ValueError, TypeError, ArithmeticError):
        return ""  # said properly by the caller, which reads the same numbers
    return f"Lorry's decoder does not support {', '.join(odd)}" if odd else ""


def _read_experts(config: Mapping[str, Any]) -> ExpertShape | None:
    """Mixtral's and Qwen3-MoE's words for experts; None for a dense model."""
    count = config.get("num_local_experts") or config.get("num_experts")
    if not count:
        return None
    width = config.get("moe_intermediate_size") or config.get("intermediate_size")
    active = config.get("num_experts_per_tok")
    if not isinstance(width, int) or not isinstance(active, int):
        raise ModelError(
            "config.json: a model with experts needs num_experts_per_tok and moe_intermediate_size"
        )
    return ExpertShape(count=int(count), active=active, width=width)


def _shared_expert(
    reader: ModelFamily, g: ModelGeometry, config: Mapping[str, Any], where: str
) -> tuple[LayerMatrix, ...]:
    """The MLP that every token of a Qwen2-MoE passes besides its experts, and the linear that weighs
    it."""
    width = config.get("shared_expert_intermediate_size")
    if not isinstance(width, int):
        raise ModelError(
            f"{where}: no shared_expert_intermediate_size; Qwen2-MoE has a shared expert"
        )
    shared = f"{reader.layer}.mlp.shared_expert"
    matrices = [
        replace(linear, path=f"{shared}.{linear.target}")
        for linear in _layer_matrices(reader, replace(g, mlp_width=width))
        if linear.site.startswith("mlp")
    ]
    gate = LayerMatrix(
        target="shared_expert_gate",
        path=f"{shared}_gate",
        inputs=g.width,
        outputs=1,
        site="mlp.in",
    )
    return (*matrices, gate)


def _check_geometry(g: ModelGeometry, where: str) -> None:
    for name in (
        "layers",
        "width",
        "heads",
        "kv_heads",
        "head_dim",
        "mlp_width",
        "vocab",
        "context",
    ):
        value = getattr(g, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(
                f"{where}: {name} is {value!r}; a whole number of at least 1 is expected"
            )


def _layer_matrices(family: ModelFamily, g: ModelGeometry) -> list[LayerMatrix]:
    """The layer's matrices in the order they run."""
    return [
        LayerMatrix(
            target=target,
            path=f"{family.layer}.{family.targets[target]}",
            inputs=inputs,
            outputs=outputs,
            site=site,
            bias=target in g.biased,
        )
        for site, sizes in zip(SITES, family.sizes(g), strict=True)
        for target, (outputs, inputs) in sizes.items()
    ]
