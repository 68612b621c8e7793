"""A chat template is a program from the internet: it runs in jinja2's immutable sandbox, with a
budget for time and memory.

The sandbox keeps a template away from Python's internals; the budget (budget.py) bounds
what it may still do, because a few characters are enough to loop for ever or to ask for terabytes.
The rule: **every operation pays into one account, before it runs where its cost is more than a
step, and what it builds counts until the rendering ends.** Loops, macros and container displays pay
by a call planted in their bodies (planter.py); slices, comparisons, ``in`` and keys of dictionaries, which
jinja2 compiles to bare Python, are sent through methods of this environment; operators, calls,
filters and tests come by here anyway. Whoever adds a filter, a test or a global here says what it
costs. A template that oversteps is a ``ModelError``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_TESTS
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from lorry.data.encoding.chat_template.budget import RenderBudget, RenderBudgetError
from lorry.data.encoding.chat_template.planter import BudgetPlanter

LONGEST_SOURCE = 1 << 19  # characters of template source
# mark a {% generation %} block; Unicode noncharacters, never part of real text
GENERATION_OPEN, GENERATION_CLOSE = (
    "\ufdd1",
    "\ufdd2",
)
# strftime_now: a fixed day, Llama 3's own default, so that tokens are the same tomorrow
TEMPLATE_DATE = datetime(2024, 7, 26)
ALLOWED_FILTERS = (
    "abs",
    "capitalize",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "int",
    "items",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "sort",
    "title",
    "trim",
    "unique",
    "upper",
)
CONSTANT_TIME_FILTERS = {"length", "count", "first", "last", "d", "default", "items"}
# the others print, compare or hash
SHALLOW_FILTERS = {
    "list",
    "map",
    "select",
    "selectattr",
    "reject",
    "rejectattr",
    "reverse",
}
SORTING_FILTERS = {"sort", "dictsort", "unique", "min", "max"}
COMPARING_TESTS = (
    "in",
    "==",
    "eq",
    "equalto",
    "!=",
    "ne",
    ">",
    "gt",
    "greaterthan",
    "ge",
    ">=",
    "<",
    "lt",
    "lessthan",
    "<=",
    "le",
    "lower",
    "upper",
    "divisibleby",
    "odd",
    "even",
)
WIDTH_METHODS = {"center", "ljust", "rjust", "zfill"}  # methods of str that pad to a given width
# Methods whose time is the length of the text times that of the argument: CPython searches
# backwards, and strips, naively.
PRODUCT_METHODS = {"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"}
# Never in a chat template: tables and bytes, and markupsafe's own loop, whose time is the square of
# the text.
REFUSED_METHODS = {
    "translate",
    "maketrans",
    "encode",
    "to_bytes",
    "from_bytes",
    "striptags",
    "unescape",
}


class TemplateRaisedError(jinja2.TemplateError):
    """The template called raise_exception: it does not take this conversation."""


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment for one template; ``budget.open`` starts a rendering's account."""

    intercepted_binops = frozenset({"*", "**", "+", "-", "/", "//", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControls, GenerationExtension],
            finalize=self._spend_output,
        )
        self.budget = RenderBudget()
        checked: dict[str, Callable[..., Any]] = {
            "join": self._join,
            "replace": self._replace,
            "indent": self._indent,
            "tojson": self._tojson,
            "string": self._string,
            "format": lambda text, *args: self._percent(text, args),
            "sum": self._sum,
        }
        plain = {name: DEFAULT_FILTERS[name] for name in ALLOWED_FILTERS}
        self.filters = {
            name: self._counted(name, function) for name, function in (plain | checked).items()
        }
        self.tests = {
            **DEFAULT_TESTS,
            **{
                name: self._comparing(name, cast(Callable[..., Any], DEFAULT_TESTS[name]))
                for name in COMPARING_TESTS
            },
        }
        self.globals = {
            "range": self._range,
            "dict": self._dict,
            "namespace": _GuardedNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime,
        }

    # Called by what `BudgetPlanter` plants.

    def step(self, characters: int, work: int, items: int) -> str:
        """One round of a loop or one macro call, whose body holds this much literal text, work, and
        elements of displays.
        """
        self.budget.work(work)
        self.budget.write(characters)
        self.budget.hold(64 * items)
        return ""

    def concat_checked(self, *parts: Any) -> str:
        """The ``~`` operator."""
        return str(self.budget.charge(self._join(parts, "")))

    def slice_checked(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """``value[start:stop:step]``."""
        return self.budget.charge(value[start:stop:step])

    def compared(self, value: Any) -> Any:
        """An operand of a comparison or of ``in``, or a key of a dictionary."""
        return self.budget.compare(value)

    # Called by jinja2.

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return BudgetPlanter(self).visit(super()._parse(source, name, filename))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """``obj[argument]``; a tuple is hashed by that, and a tuple of tuples of tuples takes for
        ever.
        """
        return super().getitem(
            obj, argument if isinstance(argument, str | int) else self.budget.compare(argument)
        )

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call a template makes; those of built-in methods are measured first."""
        self.budget.work(len(args) // 8)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str | int | float | bytes | list | dict | tuple):
            self.budget.read(owner)
            args = self._measured(owner, obj.__name__, args, kwargs)
            return self.budget.charge(super().call(context, obj, *args, **kwargs), anew=True)
        if isinstance(owner, LoopContext):  # loop.changed compares
            for value in args:
                self.budget.compare(value)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        if (
            operator == "+"
            and type(left) is str
            and type(right) is str
            and len(left) + len(right) <= budget.room
        ):
            return budget.charge(left + right)  # nearly every operation of a real template
        if operator == "%" and isinstance(left, str):
            return budget.charge(self._percent(left, right))
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            budget.afford(len(left) + len(right))
        if operator in ("*", "**"):
            self._afford_product(operator, left, right)
        budget.work()
        return budget.charge(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format``, which the sandbox replaces where it is looked up, with its sizes checked."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            self._afford_format(value.__self__, "{", (*args, *kwargs.values()))
            return str(self.budget.charge(safe(*args, **kwargs)))

        return measured

    def _spend_output(self, value: Any) -> Any:
        self.budget.write(len(value) if type(value) is str else self.budget.weigh(value))
        return value

    # Filters, tests and globals with their costs.

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for the value it works on and for what it makes of it."""
        position = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            value, others = args[position], (*args[position + 1 :], *kwargs.values())
            if name in CONSTANT_TIME_FILTERS:
                self.budget.work()
                return function(*args, **kwargs)
            self.budget.read(value)
            if name not in SHALLOW_FILTERS and isinstance(value, list | tuple | dict):
                weight = self.budget.weigh(value)
                self.budget.work(weight // 64 if name in SORTING_FILTERS else 0)
            if name == "trim":
                self._afford_searches(value, others)
            if any(isinstance(other, int) and abs(other) > 1000 for other in others) and name in (
                "round",
                "int",
            ):
                raise RenderBudgetError(
                    f"it uses the filter {name} with numbers larger than any chat needs"
                )
            return self.budget.charge(function(*args, **kwargs), anew=True)

        return counted

    def _comparing(self, name: str, test: Callable[..., Any]) -> Callable[..., Any]:
        """A test that looks at the whole of its values."""

        @functools.wraps(test)
        def compared(*args: Any) -> Any:
            for value in args:
                self.budget.read(value) if name in ("lower", "upper") else self.budget.compare(
                    value
                )
            self.budget.work()
            return test(*args)

        return compared

    def _range(self, *args: Any) -> Any:
        numbers = safe_range(*args)
        self.budget.work(len(numbers))
        return numbers

    def _dict(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        pairs = [value if isinstance(value, Mapping) else [*value] for value in args]
        self.budget.weigh(pairs)  # a key is hashed, and a tuple of tuples of tuples takes for ever
        return dict(self.budget.charge(dict(*pairs, **kwargs), anew=True))

    def _sum(
        self, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0
    ) -> Any:
        """Of numbers alone: sums of lists copy what they have at each of their elements."""
        pick = make_attrgetter(self, attribute) if attribute is not None else lambda item: item
        total = start
        for item in iterable:
            self.budget.work()
            value = pick(item)
            if not isinstance(total, int | float) or not isinstance(value, int | float):
                raise TypeError(f"sum adds numbers, got {type(value).__name__}")
            total = self.budget.charge(total + value)
        return total

    def _join(self, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        items = list(value)
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        self.budget.afford(sum(map(self.budget.weigh, items)) + len(d) * len(items))
        return str(d).join(map(str, items))

    def _replace(self, value: Any, old: Any, new: Any, count: int = -1) -> str:
        text = self._string(value)
        self.budget.afford(
            len(text) + (text.count(str(old)) if old else len(text) + 1) * len(str(new))
        )
        return text.replace(str(old), str(new), -1 if count is None else count)

    def _indent(
        self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        text, margin = (
            self._string(value),
            " " * min(width, 1000) if isinstance(width, int) else width,
        )
        self.budget.afford(len(text) + len(margin) * (text.count("\n") + 1))
        lines = text.split("\n")
        indented = [margin + line if line or blank else line for line in lines]
        return "\n".join(indented if first else [lines[0], *indented[1:]])

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        margin = None if indent is None else min(int(indent), 16)
        around = sum(len(part) for part in separators or ())
        self.budget.afford(
            self.budget.weigh(value) * (1 + around + (margin or 0) * _container_depth(value))
        )
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=margin,
            separators=separators,
            sort_keys=sort_keys,
        )

    def _string(self, value: Any) -> str:
        self.budget.weigh(value)
        return str(value)

    def _strftime(self, form: str) -> str:
        self._afford_format(form, "%", ())
        return TEMPLATE_DATE.strftime(form)

    # What a call, a product or a format would cost.

    def _measured(
        self, owner: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """The arguments of a built-in method, after its work and the size of its result were found
        affordable.
        """
        values = (*args, *kwargs.values())
        if (
            any(isinstance(value, int) and abs(value) > self.budget.room for value in values)
            or method in REFUSED_METHODS
        ):
            raise RenderBudgetError(
                f"it calls {method} with numbers or tables larger than any chat needs"
            )
        if isinstance(owner, bytes):
            raise RenderBudgetError("it works with bytes, which no chat template needs")
        for value in values:
            self.budget.compare(value)
        if not isinstance(owner, str):
            if isinstance(owner, list | tuple) and method in ("index", "count"):
                self.budget.weigh(owner)
            return args
        if method in WIDTH_METHODS and any(
            isinstance(value, int) and value > 1000 for value in values
        ):
            raise RenderBudgetError(f"it pads text by {method} to more than 1000 columns")
        if method == "expandtabs":
            self.budget.afford(
                len(owner)
                + owner.count("\t") * max((v for v in values if isinstance(v, int)), default=8)
            )
        if method in PRODUCT_METHODS:
            self._afford_searches(owner, values)
        if method == "replace" and len(args) >= 2:
            self._replace(owner, args[0], args[1])
        if method == "join" and args:
            items = list(args[0])
            self._join(items, owner)
            return (items,)
        return args

    def _afford_searches(self, text: Any, patterns: Iterable[Any]) -> None:
        if isinstance(text, str):
            self.budget.work(
                sum(len(text) * len(sought) for sought in patterns if isinstance(sought, str))
                // 4096
            )

    def _afford_product(self, operator: str, left: Any, right: Any) -> None:
        for sized, times in ((left, right), (right, left)):
            if hasattr(sized, "__len__") and isinstance(times, int):
                self.budget.afford(len(sized) * times)
        if isinstance(left, int) and isinstance(right, int):
            self.budget.afford_bits(
                left.bit_length() * abs(right)
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )

    def _percent(self, text: str, args: Any) -> str:
        self._afford_format(text, "%", args if isinstance(args, tuple) else (args,))
        return str(text % args)

    def _afford_format(self, text: str, sign: str, args: tuple[Any, ...]) -> None:
        if re.search(r"\d{4}|\*|\{[^}]*\{", text):
            raise RenderBudgetError("it formats text with a width larger than any chat needs")
        self.budget.afford(
            len(text) + text.count(sign) * (1000 + sum(map(self.budget.weigh, args)))
        )


def _container_depth(value: Any) -> int:
    """Containers inside each other in a value that was weighed; 1 for a plain one."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inside = [inner for inner in level if isinstance(inner, Mapping | list | tuple)]
        level = [
            part
            for inner in inside
            for part in (inner.values() if isinstance(inner, Mapping) else inner)
        ]
    return depth


class _GuardedNamespace(Namespace):
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


class GenerationExtension(Extension):
    """The ``{% generation %}`` block with which a template marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{GENERATION_OPEN}{caller()}{GENERATION_CLOSE}"


def _raise_exception(message: str) -> None:
    raise TemplateRaisedError(message)
