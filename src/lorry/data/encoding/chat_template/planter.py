"""What the compiler of a template is given instead of what was written: every loop and macro body pays
for itself by a call planted in it, and what jinja2 compiles to bare Python goes through methods of the
sandbox (sandbox.py).
"""

from __future__ import annotations

import math

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer


class BudgetPlanter(NodeTransformer):
    """Plants a ``step`` call in every loop and macro body, and calls of ``concat_checked``,
    ``slice_checked`` and ``compared`` where jinja2 would compile to bare Python; ``environment`` is the
    sandbox that has these methods.
    """

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment

    def _call(self, method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)
        return call.set_lineno(line, override=False).set_environment(self.environment)  # type: ignore[return-value]

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        literal = sum(len(text.data) for part in node.body for text in _template_texts(part))
        work = 1 + sum(1 for part in node.body for _ in part.find_all(nodes.Node)) // 64
        displays = [
            display
            for part in node.body
            for display in part.find_all((nodes.List, nodes.Tuple, nodes.Dict))
        ]
        items = sum(
            len(display.items)
            for display in displays
            if isinstance(display, nodes.List | nodes.Tuple | nodes.Dict)
        )
        self.generic_visit(node)
        counts = [nodes.Const(count) for count in (literal, work, items)]
        step = nodes.ExprStmt(self._call("step", [*counts], node.lineno), lineno=node.lineno)
        node.body.insert(0, step.set_environment(self.environment))
        # rounds that `for ... if` skips count as well
        if isinstance(node, nodes.For) and node.test is not None:
            passed = self._call(
                "step", [nodes.Const(0), nodes.Const(1), nodes.Const(0)], node.lineno
            )
            node.test = nodes.Or(passed, node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concat_checked", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = [
            part if part is not None else nodes.Const(None)
            for part in (node.arg.start, node.arg.stop, node.arg.step)
        ]
        return self._call("slice_checked", [node.node, *ends], node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        searching = any(operand.op in ("in", "notin") for operand in node.ops)
        if (
            not searching
            and len(operands) == 2
            and any(isinstance(side, nodes.Const) for side in operands)
        ):
            # as cheap as the constant is short: nearly every comparison of a real template
            return node
        node.expr = self._compared(node.expr)
        for operand in node.ops:
            operand.expr = self._compared(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = self._compared(node.key)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        # jinja2 would compile it to the name `inf`
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise jinja2.TemplateSyntaxError("a number is too large for a float", node.lineno)
        return node

    def _compared(self, operand: nodes.Expr) -> nodes.Expr:
        return (
            operand
            if isinstance(operand, nodes.Const)
            else self._call("compared", [operand], operand.lineno)
        )


def _template_texts(part: nodes.Node) -> list[nodes.TemplateData]:
    return [*part.find_all(nodes.TemplateData)] + (
        [part] if isinstance(part, nodes.TemplateData) else []
    )
