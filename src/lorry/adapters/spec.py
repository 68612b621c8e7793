"""LoraSpec: what one adapter is. Names are PEFT's, so people can type what they know; the
mathematics is in `product.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

from lorry.adapters.tensor_parallel.slices import SIDES, Side
from lorry.config.adapter.adalora import AdaLoraSettings
from lorry.config.adapter.initialization import check_initialization, find_initialization
from lorry.config.schema.lora import ADALORA_FIELDS, DEFAULT_ALPHA, DEFAULT_RANK, LoraConfig
from lorry.errors import ConfigError, describe_value

BiasTraining = Literal["none", "all", "lora_only"]
# where layer numbers stand without a layers_pattern: anywhere in a path
LAYER_NUMBER = re.compile(r"(?:^|\.)(?P<number>\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Rank, scale, dropout and targets of an adapter (Hu et al. 2021, arXiv 2106.09685).

    r: rank. lora_alpha: scale numerator. use_rslora: alpha/sqrt(r) instead of alpha/r
    (arXiv 2312.03732). target_modules: "auto" (every linear of attention and MLP that text trains:
    `list_skipped_modules` names what a foreign model has besides), "all-linear" (every linear but the
    output head), either with the fused experts of a mixture, a list of names (a module matches when its
    path equals the name or ends in ".name"; `lm_head` and `embed` are understood for every family), or
    one regular expression matched against the whole path. exclude_modules: list or regular
    expression. layers_to_transform: layer numbers to keep. rank_pattern, alpha_pattern: {name or
    regex of the path's end: value}. target_parameters: names of tensors that are no linear's, or ends of
    such (`mlp.experts.down_proj`: the fused experts; `gate.weight`: a router); with it "auto" and
    "all-linear" mean linears alone. layers_pattern: the name (or regex) of the list that numbers layers,
    where a path has several numbers. modules_to_save: names of modules that train whole, in a copy
    of the adapter's own; trainable_token_indices: token ids whose rows of the embedding (of a map: of the
    modules it names) do; bias: whose biases do, none, all or those of the targets; ensure_weight_tying: a
    tied head and embedding that train have one weight. init_lora_weights: True = Kaiming-uniform A and zero B,
    "gaussian" = normal A of std 1/r and zero B, False = both random; pissa, pissa_niter_N, olora, milora,
    corda, lora_ga, eva, loftq, orthogonal: from the base or from rows
    (`adapters.initialization`). rho: how many times its rank EVA may give a module. keep_residual: save
    A and B without what pissa or olora took off the base. use_dora: a magnitude for every output
    feature beside A and B (arXiv 2402.09353, `variants.magnitude`). lora_bias: a bias beside every B, scaled
    with it. train: the halves that train, "B" alone as in
    LoRA-FA; the other one keeps its first values, without memory for gradients or moments.
    alora_invocation_tokens: token ids from whose last occurrence in a sequence on the adapter counts
    (`variants.alora`). adalora:
    AdaLoRA's numbers (or
    a map of them), with which the ranks begin as r everywhere and end as its target_r on average;
    None is plain LoRA. Raises ConfigError for values outside their range, or that do not go together.
    """

    r: int = DEFAULT_RANK
    lora_alpha: float = DEFAULT_ALPHA
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "auto"
    exclude_modules: str | tuple[str, ...] | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rho: float = 2.0
    keep_residual: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    train: tuple[Side, ...] = SIDES
    alora_invocation_tokens: tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    bias: BiasTraining = "none"
    ensure_weight_tying: bool = False
    adalora: AdaLoraSettings | None = None
    target_parameters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        # a text would be read letter by letter
        if isinstance(self.target_parameters, str):
            raise ConfigError(
                f"target_parameters is {self.target_parameters!r}; give a list of parameter names"
            )
        for name in (
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
            "trainable_token_indices",
            "target_parameters",
        ):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(
                    f"{name} is {describe_value(getattr(self, name))}; give a map of names"
                )
        for name in ("target_modules", "exclude_modules", "layers_pattern", "target_parameters"):
            _check_modules(name, getattr(self, name))
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"bias is {self.bias!r}; it must be none, all or lora_only")
        _check_names("modules_to_save", self.modules_to_save)
        _check_tokens(self.trainable_token_indices)
        for pattern in _as_tuple(self.layers_pattern):
            _compile("layers_pattern", pattern)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "layers_pattern says where layer numbers stand; give layers_to_transform"
            )
        # PEFT accepts a bare number here, and files have it
        if isinstance(self.layers_to_transform, int):
            object.__setattr__(self, "layers_to_transform", (self.layers_to_transform,))
        for where, rank in [
            ("r", self.r),
            *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items()),
        ]:
            # True is an int to Python
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(f"{where} is {rank!r}; a rank is a whole number of at least 1")
        for where, value in {
            "lora_alpha": self.lora_alpha,
            **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()},
        }.items():
            if not _is_number(value) or value == 0:
                raise ConfigError(
                    f"{where} is {value!r}; it must be a number other than 0, which would leave the "
                    "model as it is"
                )
        for where, key in [("rank_pattern", k) for k in self.rank_pattern] + [
            ("alpha_pattern", k) for k in self.alpha_pattern
        ]:
            _compile(where, key)
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"lora_dropout is {self.lora_dropout!r}; it must be at least 0 and below 1"
            )
        if not _is_number(self.rho) or self.rho < 1:
            raise ConfigError(f"rho is {self.rho!r}; it must be a number of at least 1")
        check_initialization(
            self.init_lora_weights,
            [self.r, *self.rank_pattern.values()],
            keep_residual=self.keep_residual,
            use_dora=self.use_dora,
        )
        if self.target_parameters:
            refuse_at_parameters(self, f"target_parameters={list(self.target_parameters)}")
        self._settle_halves()
        self._check_invocation()
        # a text is true to Python, also "false"
        for name in ("use_rslora", "use_dora", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.lora_bias and self.use_dora:
            raise ConfigError(
                "lora_bias does not go with use_dora: PEFT has no such adapter; give one"
            )
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"lora_bias does not go with init_lora_weights={self.init_lora_weights}; leave one out"
            )
        if isinstance(self.adalora, Mapping):
            known = [each.name for each in fields(AdaLoraSettings)]
            if unknown := [name for name in self.adalora if name not in known]:
                raise ConfigError(f"adalora names {unknown[0]!r:.80}; it has {', '.join(known)}")
            object.__setattr__(self, "adalora", AdaLoraSettings(**self.adalora))
        if not isinstance(self.adalora, AdaLoraSettings | None):
            raise ConfigError(
                f"adalora is {describe_value(self.adalora)}; give a map of its numbers"
            )
        if self.adalora is not None:
            self.adalora.refuse_rank(self.r)
            self._refuse_with_adalora()

    def _check_invocation(self) -> None:
        tokens = self.alora_invocation_tokens
        if tokens is None:
            return
        if (
            isinstance(tokens, str)
            or not tokens
            or not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens)
        ):
            raise ConfigError(
                f"alora_invocation_tokens is {tokens!r:.80}; it must be a list of token ids"
            )
        if self.keep_residual:
            raise ConfigError(
                "keep_residual does not go with alora_invocation_tokens: PEFT takes the product off the base of "
                "every token, and the adapter counts for some; leave keep_residual out"
            )
        object.__setattr__(self, "alora_invocation_tokens", tuple(tokens))
        for name, given in (
            ("use_dora", self.use_dora),
            ("lora_bias", self.lora_bias),
            ("adalora", self.adalora is not None),
            ("modules_to_save", self.modules_to_save),
            ("trainable_token_indices", self.trainable_token_indices is not None),
            ("bias", self.bias != "none"),
        ):
            if given:
                raise ConfigError(
                    f"{name} does not go with alora_invocation_tokens, whose adapter is a low-rank term "
                    "that counts for some of the tokens; leave one of them out"
                )

    def _settle_halves(self) -> None:
        """Put the halves that train in order. Raises ConfigError for what they cannot go with."""
        halves = tuple(self.train) if isinstance(self.train, str | tuple | list) else ()
        if not halves or len({*halves}) < len(halves) or not {*halves} <= {*SIDES}:
            raise ConfigError(f"train is {self.train!r}; give A, B or both, each once")
        way = find_initialization(self.init_lora_weights)
        if way is not None and way.trains is not None and halves in (SIDES, (way.trains,)):
            halves = (way.trains,)
        elif way is not None and way.trains is not None:
            raise ConfigError(
                f"init_lora_weights={way.name} trains {way.trains} alone; leave train out"
            )
        halves = tuple(side for side in SIDES if side in halves)
        if halves != SIDES and way is not None and way.takes_off:
            raise ConfigError(
                f"train={','.join(halves)} with init_lora_weights={way.name}, whose first A and B are "
                "both taken off the base again, is not built; train both, or begin with true or eva"
            )
        # of an A or B that is zero and stays so nothing would come
        if halves == ("A",) and self.init_lora_weights in (True, "gaussian"):
            raise ConfigError(
                "train=A leaves lora_B at zero, so nothing would ever train; give "
                "init_lora_weights=mica, orthogonal or false with it, or train B"
            )
        object.__setattr__(self, "train", halves)

    def _refuse_with_adalora(self) -> None:
        """Raises ConfigError for what has another meaning there, or none."""
        for name, value in (
            ("train", self.train != SIDES),
            ("use_rslora", self.use_rslora),
            ("use_dora", self.use_dora),
            ("lora_bias", self.lora_bias),
            ("modules_to_save", self.modules_to_save),
            ("trainable_token_indices", self.trainable_token_indices is not None),
            ("bias", self.bias != "none"),
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
            ("init_lora_weights", self.init_lora_weights is not True),
        ):
            if value:
                raise ConfigError(
                    f"{name} does not go with AdaLoRA, which trains A, E and B alone, from normal A and "
                    "B, with the same rank and alpha at every module and alpha / r as the scale; leave "
                    "it out"
                )

    def rank(self, module: str) -> int:
        """The rank at a module path."""
        return int(_match_pattern(self.rank_pattern, module, self.r))

    def alpha(self, module: str) -> float:
        """The scale numerator at a module path; without a pattern entry `lora_alpha`."""
        return float(_match_pattern(self.alpha_pattern, module, self.lora_alpha))

    def with_doubled_rank(self) -> LoraSpec:
        """Twice the rank at every module, of the same scale: alpha/r, or alpha/sqrt(r)."""
        factor = math.sqrt(2) if self.use_rslora else 2
        return replace(
            self,
            r=2 * self.r,
            lora_alpha=factor * self.lora_alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: factor * each for key, each in self.alpha_pattern.items()},
            init_lora_weights=True,
            keep_residual=False,
        )

    def at_modules(self, modules: Iterable[str]) -> LoraSpec:
        """The same at these modules alone, by their paths, whatever chose them before."""
        return replace(
            self,
            target_modules=tuple(modules),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )

    def layer_number(self, module: str) -> int | None:
        """The layer that a module path lies in, by `layers_pattern` or the first number."""
        if self.layers_pattern is None:
            found = LAYER_NUMBER.search(module)
        else:
            found = next(
                (
                    m
                    for pattern in _as_tuple(self.layers_pattern)
                    # PEFT's rule: the first of several
                    if (m := re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<number>\d+)\.", module))
                ),
                None,
            )
        return None if found is None else int(found["number"])

    def scale(self, module: str) -> float:
        """s = alpha/r, or alpha/sqrt(r) with use_rslora."""
        # the pattern's rank, not r: PEFT scales each module by its own
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)


def refuse_at_parameters(spec: LoraSpec, where: str) -> None:
    """Raise ConfigError for a spec that cannot be at fused experts or another parameter: PEFT adds
    the update to the weight, which has no input to drop, and has neither magnitudes nor biases there.
    """
    unfit = {
        "lora_dropout": spec.lora_dropout,
        "use_dora": spec.use_dora,
        "lora_bias": spec.lora_bias,
        "variant=adalora": spec.adalora is not None,
        "alora_invocation_tokens": spec.alora_invocation_tokens is not None,
    }
    for setting, given in unfit.items():
        if given:
            raise ConfigError(
                f"{where}: {setting} does not work at parameters and fused experts; leave it out, or "
                "the experts with exclude_modules=[experts]"
            )


def lora_spec_of(lora: LoraConfig) -> LoraSpec:
    """The bank's spec from the run's settings."""
    adalora = lora.adalora
    left_out = (
        "adapter_name",
        "init_rows",
        "rank_by",
        "lora_B_bias",
        "new_tokens",
        "new_token_init",
    )
    others = {*left_out, *ADALORA_FIELDS}
    rank = lora.most_rank
    plain: dict[str, Any] = {
        **lora.model_dump(exclude=others),
        "r": rank,
        "lora_alpha": lora.alpha_at(rank),
    }
    return LoraSpec(
        **plain,
        lora_bias=lora.lora_B_bias,
        adalora=None if adalora is None else AdaLoraSettings(**adalora),
    )


def unscaled_spec(ranks: Mapping[str, int]) -> LoraSpec:
    """An adapter whose factors hold its scale already: alpha = r at every module; ``ranks``: {module
    path: rank}."""
    most = max(ranks.values())
    # not escaped, though PEFT reads a pattern: others look the path up as it is, and a dot matches
    # itself
    others = {path: rank for path, rank in ranks.items() if rank != most}
    return LoraSpec(
        r=most,
        lora_alpha=most,
        target_modules=tuple(ranks),
        rank_pattern=others,
        alpha_pattern={path: float(rank) for path, rank in others.items()},
    )


def _as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value or ()


def _compile(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as e:
        raise ConfigError(
            f"{where} names {pattern!r}, which is not a valid regular expression: {e}"
        ) from e


def _check_modules(where: str, modules: object) -> None:
    """Raises ConfigError for what is no expression and no list of names."""
    if modules is None and where != "target_modules":
        return
    listed = isinstance(modules, Collection) and not isinstance(modules, Mapping)
    if not listed or not all(isinstance(name, str) for name in cast(Collection[object], modules)):
        words = "'auto', 'all-linear', " if where == "target_modules" else ""
        raise ConfigError(
            f"{where} is {describe_value(modules)}; give {words}names of modules, or one regular expression"
        )


def _check_names(where: str, names: object) -> None:
    if names is not None and not (
        isinstance(names, tuple) and names and all(isinstance(n, str) and n for n in names)
    ):
        raise ConfigError(f"{where} is {names!r}; it must be a list of names of modules")


def _check_tokens(asked: object) -> None:
    """Raises ConfigError for anything but lists of different token ids."""
    where = "trainable_token_indices"
    if asked is None:
        return
    for name, ids in (asked if isinstance(asked, Mapping) else {"": asked}).items():
        of = f" of {name}" if name else ""
        if not isinstance(name, str) or not isinstance(ids, (list, tuple)) or not ids:
            raise ConfigError(
                f"{where}{of} is {ids!r:.80}; it must be a list of token ids, or a map of them by module"
            )
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ConfigError(f"{where}{of} has {token!r:.80}; a token id is a whole number")
        if len(set(ids)) < len(ids):
            twice = next(t for n, t in enumerate(ids) if t in ids[:n])
            raise ConfigError(f"{where}{of} names token {twice} twice")


def _is_number(value: object) -> bool:
    # True is an int to Python
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _match_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """First pattern that matches the end of the path, as PEFT reads them (`(.*\\.)?(pattern)$`)."""
    return next(
        (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default
    )
