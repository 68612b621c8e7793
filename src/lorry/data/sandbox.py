"""A chat template is a program from the internet: it runs in jinja2's immutable sandbox, with a budget for time and memory.

The sandbox keeps a template away from Python's internals; the budget bounds what it may still do, because a few
characters are enough to loop for ever or to ask for terabytes. Loops and macros count steps (a call is planted in each
body), outputs count characters, and every operation whose result can be far larger than its inputs is checked before it
runs. A template that oversteps is a ``ModelError``. What is not counted: comparing and slicing
values, each bounded by the size of its operands.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.defaults import DEFAULT_FILTERS
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEPS = 200_000  # loop rounds, macro calls and work of filters that one rendering may take, beyond one per character given
ROOM = 1 << 20  # characters a rendering may produce, beyond a multiple of what it was given
LONGEST_SOURCE = 1 << 19  # characters of template source
OPEN, CLOSE = "\ufdd1", "\ufdd2"  # mark a {% generation %} block; Unicode noncharacters, never part of real text
DATE = datetime(2024, 7, 26)  # strftime_now: a fixed day, Llama 3's own default, so that tokens are the same tomorrow
FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round",
    "safe", "select", "selectattr", "sort", "sum", "title", "trim", "unique", "upper",
)  # fmt: skip
WIDTHS = {"center", "ljust", "rjust", "zfill", "expandtabs"}  # methods of str that pad to a given width


class Refusal(jinja2.TemplateError):
    """The template called raise_exception: it does not take this conversation."""


class OverBudget(jinja2.sandbox.SecurityError):
    """The template wants more steps or characters than a chat template can need."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment for one template; ``open_budget`` starts a rendering's account."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControls, Generation], finalize=self._spend_output)
        self.open_budget(0)
        checked: dict[str, Callable[..., Any]] = {
            "join": self._join, "replace": self._replace, "indent": self._indent, "tojson": self._tojson,
            "string": self._string, "format": lambda text, *args: self._percent(text, args),
        }  # fmt: skip
        plain = {name: DEFAULT_FILTERS[name] for name in FILTERS}
        self.filters = {name: self._counted(function) for name, function in (plain | checked).items()}
        self.globals = {
            "range": lambda *args: self._work(safe_range(*args), 1),
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "raise_exception": _refuse,
            "strftime_now": self._strftime,
        }

    def open_budget(self, given: int) -> None:
        """Start counting anew for a rendering whose messages hold ``given`` characters."""
        self.steps, self.patience = 0, STEPS + given
        self.spent, self.room = 0, ROOM + 4 * given

    def step(self, characters: int) -> str:
        """One round of a loop or one macro call, whose body holds this much literal text."""
        self.steps += 1
        self.spent += characters
        if self.steps > self.patience:
            raise OverBudget(f"it takes more than {self.patience} steps")
        self._afford(self.spent)
        return ""

    def _work(self, value: Any, per_step: int = 64) -> Any:
        """Count going through a value once as steps; gives the value back."""
        self.steps += len(value) // per_step if hasattr(value, "__len__") else 1
        if self.steps > self.patience:
            raise OverBudget(f"it takes more than {self.patience} steps")
        return value

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for the value it works on."""
        position = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if isinstance(args[position], list | tuple | dict):
                self._weigh(args[position])  # many filters print what they are given
            self._work(args[position])
            return function(*args, **kwargs)

        return counted

    def concat_checked(self, *parts: Any) -> str:
        """The ``~`` operator."""
        return self._join(parts, "")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Plant(self).visit(super()._parse(source, name, filename))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call a template makes; those of built-in methods are measured first."""
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str | int | bytes | list | dict | tuple):
            args = self._measured(self._work(owner), obj.__name__, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str and len(left) + len(right) <= self.room:
            return left + right  # nearly every operation of a real template
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._afford(len(left) + len(right))
        if operator in ("*", "**"):
            self._afford_product(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _afford(self, characters: int) -> None:
        if characters > self.room:
            raise OverBudget(f"it builds a value of {characters} characters; {self.room} are allowed")

    def _afford_product(self, operator: str, left: Any, right: Any) -> None:
        for sized, times in ((left, right), (right, left)):
            if hasattr(sized, "__len__") and isinstance(times, int):
                self._afford(len(sized) * times)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            self._afford(bits)

    def _weigh(self, value: Any) -> int:
        """Characters that printing a value takes, counted without printing it and never past the room."""
        total, waiting = 0, [value]
        while waiting:
            item = waiting.pop()
            total += len(item) if isinstance(item, str) else 1
            if isinstance(item, Mapping):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                waiting += item
            self._afford(total + len(waiting))
        return total

    def _spend_output(self, value: Any) -> Any:
        self.spent += len(value) if type(value) is str else self._weigh(value)
        self._afford(self.spent)
        return value

    def _measured(self, owner: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments of a built-in method, after the size of its result was found affordable."""
        given = (*args, *kwargs.values())
        if any(isinstance(value, int) and abs(value) > self.room for value in given) or method in ("translate", "to_bytes"):
            raise OverBudget(f"it calls {method} with numbers or tables no chat needs")
        if not isinstance(owner, str):
            return args
        if method in WIDTHS and any(isinstance(value, int) and value > 1000 for value in given):
            raise OverBudget(f"it pads text by {method} to more than 1000 columns")
        if method == "replace" and len(args) >= 2:
            self._replace(owner, args[0], args[1])
        if method == "join" and args:
            items = list(args[0])
            self._join(items, owner)
            return (items,)
        return args

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format``, which the sandbox replaces where it is looked up, with its sizes checked."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            self._afford_format(value.__self__, "{", (*args, *kwargs.values()))
            return safe(*args, **kwargs)

        return measured

    def _join(self, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        items = list(value)
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        self._afford(sum(map(self._weigh, items)) + len(d) * len(items))
        return str(d).join(map(str, items))

    def _replace(self, value: Any, old: Any, new: Any, count: int = -1) -> str:
        text = str(value)
        self._afford(len(text) + (text.count(str(old)) if old else len(text) + 1) * len(str(new)))
        return text.replace(str(old), str(new), -1 if count is None else count)

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text, margin = str(value), " " * min(width, 1000) if isinstance(width, int) else width
        self._afford(len(text) + len(margin) * (text.count("\n") + 1))
        lines = text.split("\n")
        kept = [margin + line if line or blank else line for line in lines]
        return "\n".join(kept if first else [lines[0], *kept[1:]])

    def _tojson(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        self._weigh(value)
        margin = None if indent is None else min(int(indent), 16)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=margin, separators=separators, sort_keys=sort_keys)

    def _string(self, value: Any) -> str:
        self._weigh(value)
        return str(value)

    def _percent(self, text: str, args: Any) -> str:
        self._afford_format(text, "%", args if isinstance(args, tuple) else (args,))
        return str(text % args)

    def _afford_format(self, text: str, sign: str, args: tuple[Any, ...]) -> None:
        if re.search(r"\d{4}|\*|\{[^}]*\{", text):
            raise OverBudget("it formats text with a width no chat needs")
        self._afford(len(text) + text.count(sign) * (1000 + sum(map(self._weigh, args))))

    def _strftime(self, form: str) -> str:
        self._afford_format(form, "%", ())
        return DATE.strftime(form)


class _Namespace(Namespace):
    """jinja2's namespace, closed to names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        Namespace.__init__(self, {})
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"it sets {name!r} on a namespace")
        super().__setitem__(name, value)


class _Plant(NodeTransformer):
    """Plants a ``step`` call in every loop and macro body, and sends ``~`` through ``concat_checked``."""

    def __init__(self, environment: Sandbox) -> None:
        self.environment = environment

    def _call(self, method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
        made = nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)
        return made.set_lineno(line, override=False).set_environment(self.environment)  # type: ignore[return-value]

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        literal = sum(len(text.data) for part in node.body for text in _texts(part))
        step = nodes.ExprStmt(self._call("step", [nodes.Const(literal)], node.lineno), lineno=node.lineno)
        node.body.insert(0, step.set_environment(self.environment))
        if isinstance(node, nodes.For) and node.test is not None:  # rounds that `for ... if` skips count as well
            node.test = nodes.Or(self._call("step", [nodes.Const(0)], node.lineno), node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concat_checked", node.nodes, node.lineno)


def _texts(part: nodes.Node) -> list[nodes.TemplateData]:
    return [*part.find_all(nodes.TemplateData)] + ([part] if isinstance(part, nodes.TemplateData) else [])


class Generation(Extension):
    """The ``{% generation %}`` block with which a template marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _refuse(message: str) -> None:
    raise Refusal(message)
