"""What a chat template makes of every conversation of one shape, found by one rendering with
symbols in place of the texts.

    frame = find_template_frame(template_source, variables, roles, add_generation_prompt=False)
    frame.fill(["Who steers?", "Oda."])     # what the template itself would write; None where that is not certain

Most templates only put the texts of messages into other text. That is proved, not tried out: the
rendering runs with symbols that can be joined, printed, asked for their type and for being empty
(texts here are not), and stripped (texts here have no white space at their ends). Whatever else a
template does with a symbol (compare, search, slice, measure, loop over, format, hand to a filter or
a call) ends the attempt, and so does a construct whose output is text that no longer knows it is a
symbol (macros, blocks, ``{% set %}`` with a body, recursive loops). Then, and for texts beyond the
account of a rendering, every conversation is rendered by itself. So no result depends on which way
was taken.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext, Undefined

from lorry.data.encoding.chat_template.budget import (
    MOST_CHARACTERS,
    MOST_MEMORY_BYTES,
    MOST_STEPS,
    READ_PER_STEP,
)
from lorry.data.encoding.chat_template.sandbox import TemplateSandbox

# U+FDD3 to U+FDEF: noncharacters that stand for the texts; the three before them have other uses
FIRST_SYMBOL = 0xFDD3
SMALL_BUDGET = 1 << 20  # bytes a rendering may take beside the texts
# steps and characters of the rendering with symbols: real templates take far fewer
QUICK, SHORT = (
    2000,
    1 << 14,
)
LARGEST_CONTAINER = 256  # values inside one value that are looked through
MOST_SYMBOLS = 0xFDEF - FIRST_SYMBOL + 1  # messages of a shape
SYMBOL_CHARACTER = re.compile(f"[{chr(FIRST_SYMBOL)}-{chr(FIRST_SYMBOL + MOST_SYMBOLS - 1)}]")
LOSES_SYMBOLS = (
    nodes.AssignBlock,
    nodes.Macro,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.Block,
    nodes.Extends,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
)
# methods of the sandbox that look after symbols themselves
PLANTED_NAMES = (
    "step",
    "concat_checked",
    "slice_checked",
    "compared",
)
PASSING_FILTERS = {
    "length",
    "count",
    "first",
    "last",
    "items",
    "list",
    "reverse",
    "map",
    "select",
    "reject",
    "selectattr",
    "rejectattr",
}
TYPE_TESTS = {
    "string",
    "defined",
    "undefined",
    "none",
    "mapping",
    "iterable",
    "sequence",
    "boolean",
    "number",
    "integer",
    "float",
}

# What the code of a template can raise by its own fault: all that Python's built-in types and
# jinja2 raise.
TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    NameError,
    RuntimeError,
    AssertionError,
    StopIteration,
    SyntaxError,
    ImportError,
    BufferError,
    OSError,
)


class LooksAtTextError(jinja2.TemplateError):
    """The template does more with a text than to put it into another."""


def _refuse_look(*_: object, **__: object) -> Any:
    raise LooksAtTextError("the template inspects a text")


class SymbolicText(str):
    """A text with symbols in it; ``str`` to a template that asks, and an end to the attempt where
    its characters matter.
    """

    __slots__ = ()
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse_look
    __iter__ = __contains__ = __getitem__ = __mod__ = __mul__ = __rmul__ = __format__ = _refuse_look

    def __add__(self, other: Any) -> SymbolicText:
        return SymbolicText(str.__add__(self, other))

    def __radd__(self, other: Any) -> SymbolicText:
        return SymbolicText(str.__add__(other, self))


def _holds_symbol(value: Any) -> bool:
    """Whether a value has, or may have, a symbol anywhere in it. Raises LooksAtText for one too
    large to look through.
    """
    waiting, looked = [value], 0
    while waiting:
        item, looked = waiting.pop(), looked + 1
        if looked > LARGEST_CONTAINER:
            _refuse_look()
        if isinstance(item, str):
            if SYMBOL_CHARACTER.search(item):
                return True
        elif isinstance(item, Mapping | list | tuple):
            if len(item) > LARGEST_CONTAINER:
                _refuse_look()
            waiting += [*item.keys(), *item.values()] if isinstance(item, Mapping) else item
        elif not isinstance(item, int | float | Undefined | None):
            return True
    return False


def _require_no_symbol(value: Any) -> Any:
    """A result; ends the attempt for a text that has a symbol's character and did not get it from a
    symbol.
    """
    return (
        _refuse_look()
        if isinstance(value, str) and not isinstance(value, SymbolicText) and _holds_symbol(value)
        else value
    )


class FrameSandbox(TemplateSandbox):
    """The sandbox in which a symbol may only be joined, stripped and printed. ``count``: joined and
    stripped symbols; ``longest``: characters of the longest; ``most``: symbols in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.longest, self.most = 0, 0, 0
        self.tests = {
            name: test if name in TYPE_TESTS else self._blind(cast(Callable[..., Any], test))
            for name, test in self.tests.items()
        }  # fmt: skip

    def symbol(self, text: str) -> SymbolicText:
        """A new text with symbols, counted."""
        self.count += 1
        self.longest, self.most = (
            max(self.longest, len(text)),
            max(self.most, len(SYMBOL_CHARACTER.findall(text))),
        )
        return SymbolicText(text)

    def concat_checked(self, *parts: Any) -> str:
        if any(_holds_symbol(part) and not isinstance(part, SymbolicText) for part in parts):
            _refuse_look()  # a list or an object prints as Python's repr of the texts in it
        joined = super().concat_checked(*parts)
        return self.symbol(joined) if _holds_symbol(joined) else joined

    def slice_checked(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        if isinstance(value, str) and _holds_symbol(value):
            _refuse_look()
        return super().slice_checked(value, start, stop, step)

    def compared(self, value: Any) -> Any:
        return _refuse_look() if _holds_symbol(value) else super().compared(value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if (isinstance(obj, str) and _holds_symbol(obj)) or _holds_symbol(argument):
            _refuse_look()
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if owner is self and name in PLANTED_NAMES:
            return super().call(context, obj, *args, **kwargs)
        if isinstance(obj, LoopContext) or _holds_symbol([*args, *kwargs.values()]):
            _refuse_look()
        if isinstance(owner, str) and _holds_symbol(owner):
            return (
                self.symbol(str.strip(owner))
                if name == "strip" and not args and not kwargs
                else _refuse_look()
            )
        if (
            isinstance(owner, Mapping | list | tuple)
            and name not in ("get", "items", "keys", "values")
            and _holds_symbol(owner)
        ):
            _refuse_look()
        return _require_no_symbol(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        symbolic = _holds_symbol(left) or _holds_symbol(right)
        if symbolic and operator != "+":
            _refuse_look()
        value = super().call_binop(context, operator, left, right)
        return (
            self.symbol(value) if symbolic and isinstance(value, str) else _require_no_symbol(value)
        )

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if isinstance(getattr(value, "__self__", None), str) and _holds_symbol(value.__self__):
            return super().wrap_str_format(value) and _refuse_look()
        return super().wrap_str_format(value)

    def _spend_output(self, value: Any) -> Any:
        if _holds_symbol(value) and not isinstance(value, SymbolicText):
            _refuse_look()
        return super()._spend_output(value)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        counted = super()._counted(name, function)
        position = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            value, others = args[position], [*args[position + 1 :], *kwargs.values()]
            if name == "trim" and isinstance(value, str) and _holds_symbol(value) and not others:
                return self.symbol(str.strip(value))
            passes = (
                name in PASSING_FILTERS and not isinstance(value, str) and not _holds_symbol(others)
            )
            if not passes and name not in ("default", "d") and _holds_symbol([value, *others]):
                _refuse_look()
            return _require_no_symbol(counted(*args, **kwargs))

        return guarded

    def _blind(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def blind(*args: Any) -> Any:
            return _refuse_look() if _holds_symbol(args) else test(*args)

        return blind


@dataclass(frozen=True)
class TemplateFrame:
    """``parts``: literal text and numbers of messages by turns; ``work``: steps and texts that one
    rendering makes; ``longest``: literal characters, and ``most``: texts, in the largest of them."""

    parts: tuple[str | int, ...]
    work: int
    longest: int
    most: int

    def fill(self, texts: Sequence[str]) -> str | None:
        """What the template writes for these texts; None where an empty text, white space or the
        account may matter.
        """
        if not all(texts) or any(text[0].isspace() or text[-1].isspace() for text in texts):
            return None
        size = self.longest + self.most * sum(map(len, texts))
        if (
            size > MOST_CHARACTERS
            or self.work * (1 + size // READ_PER_STEP) > MOST_STEPS
            or self.work * 4 * (size + 64) > MOST_MEMORY_BYTES
        ):
            return None
        return "".join(part if isinstance(part, str) else texts[part] for part in self.parts)

    def span(self, texts: Sequence[str], which: int, text: str) -> tuple[int, int] | None:
        """Where ``texts[which]`` stands in ``text``; None if that is not what ``fill`` gives, or it
        stands there not once.
        """
        if self.parts.count(which) != 1 or text != self.fill(texts):
            return None
        before = self.parts[: self.parts.index(which)]
        start = sum(len(part) if isinstance(part, str) else len(texts[part]) for part in before)
        return start, start + len(texts[which])


def find_template_frame(
    source: str, variables: Mapping[str, Any], roles: Sequence[str], *, add_generation_prompt: bool
) -> TemplateFrame | None:  # fmt: skip
    """The frame of conversations with these roles, each message nothing but a role and a text; None
    where there is none.
    """
    if len(roles) > MOST_SYMBOLS:
        return None
    sandbox = FrameSandbox()
    tree = sandbox.parse(source)
    if next(tree.find_all(LOSES_SYMBOLS), None) or any(
        loop.recursive for loop in tree.find_all(nodes.For)
    ):
        return None
    literals = [
        *(node.value for node in tree.find_all(nodes.Const)),
        *(node.data for node in tree.find_all(nodes.TemplateData)),
    ]
    try:
        if _holds_symbol(
            [literal for literal in literals if isinstance(literal, str)]
        ) or _holds_symbol(variables):
            return None
    except LooksAtTextError:  # more literals, or larger variables, than are looked through
        return None
    sandbox.budget.open(len(roles), len(roles))
    sandbox.budget.patience, sandbox.budget.room, sandbox.budget.memory = QUICK, SHORT, SMALL_BUDGET
    messages = [
        {"role": role, "content": SymbolicText(chr(FIRST_SYMBOL + number))}
        for number, role in enumerate(roles)
    ]
    try:
        text = sandbox.from_string(source).render(
            variables,
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )
    except TEMPLATE_FAULTS:
        return None
    parts = [
        ord(part) - FIRST_SYMBOL if SYMBOL_CHARACTER.fullmatch(part) else part
        for part in re.split(f"({SYMBOL_CHARACTER.pattern})", text)
    ]
    numbers = sum(isinstance(part, int) for part in parts)
    work = sandbox.budget.steps + sandbox.count + len(parts)
    return TemplateFrame(
        tuple(parts), work, max(sandbox.longest, len(text)), max(sandbox.most, numbers)
    )
