"""adapter_config.json: PEFT's file as a LoraSpec, and the other way round. Nothing in it
is silently ignored.

A key this module does not know is fine while its value says "off" (null, false, empty or PEFT's
default); any other value changes what the adapter computes, so the file is refused by key. Files
come from strangers: patterns that take exponential time, deep nesting, duplicate keys and numbers
that are none are refused too, always as a ModelError.
"""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lorry.adapters.spec import LoraSpec
from lorry.config.adapter.initialization import find_initialization
from lorry.config.left_out import find_left_out
from lorry.disk import documents
from lorry.errors import ConfigError, ModelError

# An adapter that only makes sense over another one is no LORA to PEFT, vLLM or transformers, which
# would open it on the bare base and compute another model without a word: its own settings lie one
# level down, where none of them finds a rank.
OVER_ADAPTER = "LORA_OVER_ADAPTER"
PATTERN_LIMIT = 2000  # characters of one regular expression
# seconds of processor time for all regular expressions of a file on all modules of a model; real
# ones take milliseconds. Not of the clock: on a busy machine a sound adapter would be refused
TIME_LIMIT = 10.0
# no repeat, no choice: linear time, so a process need not be started for it
PLAIN_PATTERN = re.compile(r"(?:[\w^$-]|\\?\.)*")
TRIAL_SCRIPT = """
import json, re, signal, sys
limit, patterns, paths = json.load(sys.stdin)
# SIGPROF ends the process, whatever a regular expression is at; a parent may have it ignored
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.setitimer(signal.ITIMER_PROF, limit)
for pattern in patterns:
    for path in paths:
        re.fullmatch(pattern, path), re.match(rf"(.*\\.)?({pattern})$", path)
"""

# Keys that describe the file, the training or the loading, never the function that was learnt.
INFORMATION_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "runtime_config",
        # the layer's own class says how its weight lies; the file's word is not needed
        "fan_in_fan_out",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
    }
)
READ_KEYS = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "init_lora_weights",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "trainable_token_indices",
        "bias",
        "ensure_weight_tying",
        "target_parameters",
        "alora_invocation_tokens",
    }
)
# values that mean "off" without being empty
DEFAULT_VALUES: Mapping[str, Any] = {"megatron_core": "megatron.core"}


def read_adapter_json(file: Path) -> dict[str, Any]:
    """A JSON object from a stranger's file. Raises ModelError; what is refused: disk/documents.py."""
    # a number that is not finite: refused by its key
    return documents.read_object(file, error=ModelError, nonfinite=True)


def parse_peft_config(
    config: Mapping[str, Any], where: str, *, convert_init: bool = False
) -> LoraSpec:
    """A LoraSpec from the parsed file; ``where`` opens every message. ``convert_init``: an initialisation
    that changed the base is taken as one that can be found again. Raises ModelError."""
    if config.get("peft_type") == OVER_ADAPTER and isinstance(config.get("lora"), dict):
        config = config["lora"]
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{where}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be read"
            f"{_left_out(config.get('peft_type'))}"
        )
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise ModelError(
            f"{where}: task_type is {config['task_type']!r}; only CAUSAL_LM adapters can be read"
        )
    for key, value in config.items():
        if key not in READ_KEYS | INFORMATION_KEYS and not _is_neutral(key, value):
            raise ModelError(
                f"{where}: {key}={value!r:.80} is not supported; it may change what the adapter computes"
                f"{_left_out(key)}"
            )
    fields: dict[str, Any] = {
        # 8 is PEFT's default for both; ours differs, and a file that leaves them out means PEFT's
        "r": _read_number(config, "r", where, default=8, whole=True),
        "lora_alpha": _read_number(config, "lora_alpha", where, default=8),
        "lora_dropout": _read_number(config, "lora_dropout", where, default=0.0),
        "use_rslora": _read_bool(config, "use_rslora", where),
        "init_lora_weights": _read_init(
            config.get("init_lora_weights", True), where, convert=convert_init
        ),
        "use_dora": _read_bool(config, "use_dora", where),
        "lora_bias": _read_bool(config, "lora_bias", where),
        "target_modules": _read_names(config, "target_modules", where),
        "exclude_modules": _read_names(config, "exclude_modules", where),
        "layers_to_transform": _read_layers(config, where),
        "alora_invocation_tokens": _read_invocation(config, where),
        "layers_pattern": _read_names(config, "layers_pattern", where),
        "modules_to_save": _read_name_list(config, "modules_to_save", where),
        "trainable_token_indices": _read_tokens(config, where),
        "bias": config.get("bias") or "none",
        "ensure_weight_tying": _read_bool(config, "ensure_weight_tying", where),
        "target_parameters": _read_names(config, "target_parameters", where),
        "rank_pattern": _read_patterns(config, "rank_pattern", where, whole=True),
        "alpha_pattern": _read_patterns(config, "alpha_pattern", where, whole=False),
    }
    # a way that is still named is one to be found again
    if fields["alora_invocation_tokens"] and find_initialization(fields["init_lora_weights"]):
        raise ModelError(
            f"{where}: init_lora_weights={fields['init_lora_weights']!r} took its product off the base of every "
            "token, and with alora_invocation_tokens the adapter counts for some; such a file is not read"
        )
    if isinstance(fields["target_parameters"], str):
        raise ModelError(f"{where}: target_parameters is a text; it must be a list of names")
    if not fields["target_modules"]:
        if not fields["target_parameters"]:
            raise ModelError(
                f"{where}: target_modules is empty; the file must name the adapted layers"
            )
        fields["target_modules"] = ()
    # PEFT looks at it beside layers_to_transform alone
    if fields["layers_to_transform"] is None:
        fields["layers_pattern"] = None
    # PEFT refuses the combination too
    if isinstance(fields["target_modules"], str) and fields["layers_to_transform"] is not None:
        raise ModelError(
            f"{where}: layers_to_transform needs target_modules to be a list, not a regular expression"
        )
    try:
        return LoraSpec(**fields)
    except ConfigError as e:
        raise ModelError(f"{where}: {e}") from e


def match_peft_targets(
    spec: LoraSpec, linears: Collection[str], inner: Collection[str]
) -> set[str]:
    """The modules a file's spec selects by PEFT's rules: of ``linears``, or for "all-linear" all of
    ``inner``.
    """
    wanted, excluded = spec.target_modules, spec.exclude_modules
    # what trains whole is never a target as well
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in spec.modules_to_save or ()]
    linears = [p for p in linears if not any(one.match(p) for one in saved)]
    if isinstance(excluded, str):
        candidates = [p for p in linears if not re.fullmatch(excluded, p)]
    else:
        candidates = [p for p in linears if not _ends_in(p, excluded or ())]
    # PEFT compares "all-linear" without case
    if isinstance(wanted, str):
        everything = wanted.lower() == "all-linear"
        return {p for p in candidates if (p in inner if everything else re.fullmatch(wanted, p))}
    return {p for p in candidates if p in wanted or (_ends_in(p, wanted) and _in_layers(p, spec))}


def check_pattern_time(spec: LoraSpec, modules: Collection[str], where: str) -> None:
    """Try a file's regular expressions on ``modules`` in a process of their own, which can be
    stopped: they come from strangers and may take exponential time. Names without any repeat or
    choice are not tried. Raises ModelError after TIME_LIMIT seconds of processor time.
    """
    expressions = [
        *spec.rank_pattern,
        *spec.alpha_pattern,
        *_list_of(spec.layers_pattern),
        *(spec.modules_to_save or ()),
        *(w for w in (spec.target_modules, spec.exclude_modules) if isinstance(w, str)),
    ]
    patterns = [p for p in expressions if not PLAIN_PATTERN.fullmatch(p)]
    if not patterns:
        return
    try:
        request = json.dumps([TIME_LIMIT, patterns, list(modules)]).encode()
        subprocess.run(
            # -I -S: no site-packages and no PYTHON* variables, so it starts in milliseconds
            [sys.executable, "-I", "-S", "-c", TRIAL_SCRIPT],
            input=request,
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as e:
        if isinstance(e, subprocess.CalledProcessError) and e.returncode == -signal.SIGPROF:
            raise ModelError(
                f"{where}: its regular expressions ({patterns[0]!r:.80}) take too long; list the modules by name"
            ) from e
        raise ModelError(
            f"{where}: its regular expressions could not be tested safely ({e}); "
            "list the modules by name"
        ) from e


def to_peft_config(
    spec: LoraSpec,
    target_modules: list[str],
    target_parameters: list[str] | None = None,
    *,
    transposed: bool,
    base_name: str | None,
    task_type: str | None = "CAUSAL_LM",
) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it, with the keys that every PEFT since 0.10 knows (a
    strange one stops old versions); `target_parameters` (0.17) where there are any.

    Layer numbers and exclusions are not repeated: ``target_modules`` already says it all.
    """
    alpha = spec.lora_alpha
    parameters = {"target_parameters": target_parameters} if target_parameters else {}
    config: dict[str, Any] = {
        **parameters,
        "alpha_pattern": dict(spec.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": spec.bias,
        "fan_in_fan_out": transposed,
        # as PEFT's save_pretrained writes it
        "inference_mode": True,
        "init_lora_weights": _written_init(spec),
        "layers_pattern": None,
        "layers_to_transform": None,
        # an int where it is one, as PEFT's field is typed
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": spec.lora_dropout,
        "modules_to_save": spec.modules_to_save and list(spec.modules_to_save),
        "peft_type": "LORA",
        "r": spec.r,
        "rank_pattern": dict(spec.rank_pattern),
        "revision": None,
        "target_modules": target_modules,
        "task_type": task_type,
        "use_dora": spec.use_dora,
        "use_rslora": spec.use_rslora,
    }
    # keys that PEFT has only since 0.15 and 0.18: where they say something
    asked = spec.trainable_token_indices
    if isinstance(asked, Mapping):
        config["trainable_token_indices"] = {name: list(ids) for name, ids in asked.items()}
    elif asked is not None:
        config["trainable_token_indices"] = list(asked)
    if spec.lora_bias:
        config["lora_bias"] = True
    if spec.ensure_weight_tying:
        config["ensure_weight_tying"] = True
    if spec.alora_invocation_tokens:
        config["alora_invocation_tokens"] = list(spec.alora_invocation_tokens)
    return config


def _written_init(spec: LoraSpec) -> bool | str:
    """How a reader of the file is to begin: with plain LoRA, as which the values are whole, unless
    what was taken off the base is to be found again."""
    value = spec.init_lora_weights
    return value if isinstance(value, bool) or value == "gaussian" or spec.keep_residual else True


def over_adapter_config(lora: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json of an adapter trained over another (`AdapterBank.move_to_base`), from
    what `to_peft_config` gives. `lorry export` writes both as one that PEFT reads.
    """
    name = {"base_model_name_or_path": lora["base_model_name_or_path"]}
    kind = {"task_type": lora["task_type"]}
    return {"peft_type": OVER_ADAPTER, **kind, **name, "lora": dict(lora)}


def _left_out(word: object) -> str:
    """What to do about a method that is known and left out, by PEFT's type or key of it."""
    method = find_left_out(word)
    return "" if method is None else f". {method}; {method.file}"


def _is_neutral(key: str, value: Any) -> bool:
    return (
        value is None
        or value is False
        or value in ("", [], {})
        or (key in DEFAULT_VALUES and value == DEFAULT_VALUES[key])
    )


def _read_number(
    config: Mapping[str, Any], key: str, where: str, *, default: float, whole: bool = False
) -> float:
    value = config.get(key, default)
    _check_number(value, f"{where}: {key}", whole=whole)
    return value


def _check_number(value: Any, what: str, *, whole: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ModelError(f"{what} is {value!r:.80}; it must be a {'whole ' if whole else ''}number")
    # far above any real rank or alpha, far below what overflows an allocation's size
    if abs(value) > 2**31 or not math.isfinite(value):
        raise ModelError(f"{what} is {value!r:.80}; that is out of range")


def _read_bool(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ModelError(f"{where}: {key} is {value!r:.80}; it must be true or false")
    return value


def _read_init(value: Any, where: str, *, convert: bool) -> bool | str:
    """How the values came to be no longer matters, unless that changed the base as well."""
    try:
        if not isinstance(value, bool | str):
            raise ConfigError("a text, true or false is expected")
        way = find_initialization(value)
    except ConfigError as error:
        raise ModelError(f"{where}: init_lora_weights={value!r:.80} is not known") from error
    if way is None:
        return value
    if not way.changes_base:
        return True
    if convert and way.is_repeatable:
        return value
    raise ModelError(
        f"{where}: init_lora_weights={value!r} changed the base weights too, so "
        "the adapter alone is not the whole change; save it again from PEFT "
        "with path_initial_model_for_weight_conversion"
        + (
            ", or, if this is the very base it began on, in the same dtype, read it with convert_init=true"
            if way.is_repeatable
            else " (what it took off cannot be found again from the base alone)"
        )
    )


def _read_names(config: Mapping[str, Any], key: str, where: str) -> str | tuple[str, ...] | None:
    value = config.get(key)
    if isinstance(value, str) and value:
        _check_pattern(value, f"{where}: {key}")
        return value
    if value and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
        raise ModelError(
            f"{where}: {key} is {value!r:.80}; it must be a list of names or one regular expression"
        )
    return tuple(value) if value else None


def _read_name_list(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...] | None:
    value = config.get(key)
    if isinstance(value, str) and value:
        raise ModelError(f"{where}: {key} is {value!r:.80}; it must be a list of names")
    names = _read_names(config, key, where)
    for name in names or ():
        # PEFT puts it into a regular expression
        _check_pattern(name, f"{where}: {key}")
    return None if names is None else tuple(names)


def _read_tokens(
    config: Mapping[str, Any], where: str
) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    value = config.get("trainable_token_indices")
    if value is None or value in ([], {}):
        return None
    # what else is wrong with them, the spec says
    if isinstance(value, dict) and all(isinstance(ids, list) for ids in value.values()):
        return {name: tuple(ids) for name, ids in value.items()}
    if isinstance(value, list):
        return tuple(value)
    raise ModelError(
        f"{where}: trainable_token_indices is {value!r:.80}; it must be a list of token ids, or an object "
        "of such lists"
    )


def _list_of(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value or ()


def _read_invocation(config: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """alora_invocation_tokens: null, or ids; an empty list is no adapter of that kind to PEFT either."""
    value = config.get("alora_invocation_tokens")
    if not value:
        return None
    if not isinstance(value, list):
        raise ModelError(
            f"{where}: alora_invocation_tokens is {value!r:.80}; it must be a list of token ids"
        )
    for token in value:
        _check_number(token, f"{where}: alora_invocation_tokens", whole=True)
    return tuple(value)


def _read_layers(config: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    value = config.get("layers_to_transform")
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    for n in numbers:
        _check_number(n, f"{where}: layers_to_transform", whole=True)
    return tuple(numbers)


def _read_patterns(
    config: Mapping[str, Any], key: str, where: str, *, whole: bool
) -> dict[str, float]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise ModelError(
            f"{where}: {key} is {value!r:.80}; it must be an object of names and numbers"
        )
    for name, number in (value or {}).items():
        _check_pattern(name, f"{where}: {key}")
        _check_number(number, f"{where}: {key}[{name!r:.80}]", whole=whole)
    return value or {}


def _check_pattern(pattern: str, what: str) -> None:
    try:
        if len(pattern) > PATTERN_LIMIT:
            raise ModelError(
                f"{what}: a regular expression of {len(pattern)} characters; list the modules by name"
            )
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise ModelError(f"{what}: {pattern!r:.80} is not a valid regular expression ({e})") from e


def _ends_in(path: str, names: Collection[str]) -> bool:
    return any(path == n or path.endswith(f".{n}") for n in names)


def _in_layers(path: str, spec: LoraSpec) -> bool:
    if spec.layers_to_transform is None:
        return True
    if spec.layers_pattern is not None:
        return spec.layer_number(path) in spec.layers_to_transform
    # PEFT's rule: the first number behind two name parts
    number = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return number is not None and int(number.group(1)) in spec.layers_to_transform
