"""Forwards that no longer work out the head size from the embedding width.

Many hosts write ``reshape(B, N, 3, self.num_heads, C // self.num_heads)``, which ties the number of heads to the
width of the input. The same forward with that one expression left to ``reshape`` (-1) takes any number of heads.
It is made from the host's own source when a module loses heads; nothing else in it changes, and a forward in
which the expressions are not found is left alone, so that its heads stay.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
import textwrap
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

RESHAPES = ("reshape", "view")
_MARK = "slimming_unbound"


@cache
def unbound_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """A class like ``cls`` whose forward takes any number of heads; None if its source does not show how."""
    forward: Any = cls.forward
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except (OSError, TypeError):
        return None
    tree = ast.parse(source)
    change = _Unbind()
    tree = ast.fix_missing_locations(change.visit(tree))
    if not change.heads:
        return None
    text = ast.unparse(tree)
    filename = f"<slimming: {cls.__module__}.{cls.__qualname__}.forward>"
    # So that tracebacks, torch.compile and inspect find the lines.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {}
    exec(compile(text, filename, "exec"), vars(sys.modules[cls.__module__]), scope)
    made: FunctionType = scope[forward.__name__]
    made.__qualname__ = forward.__qualname__
    body = {"forward": made, "__module__": cls.__module__, "__doc__": cls.__doc__, _MARK: True}
    return type(cls.__name__, (cls,), body)


def is_unbound(module: nn.Module) -> bool:
    """Whether the module's class was made by `unbound_class`."""
    return bool(vars(type(module)).get(_MARK, False))


class _Unbind(ast.NodeTransformer):
    """Replace head sizes and widths in reshapes by -1."""

    def __init__(self) -> None:
        self.heads = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not (isinstance(node.func, ast.Attribute) and node.func.attr in RESHAPES):
            return node
        places = [place for place, argument in enumerate(node.args) if _is_width(argument)]
        known = any(_is_minus_one(argument) for argument in node.args)
        if len(places) == 1 and not known:
            self.heads += 1
            node.args[places[0]] = ast.parse("-1", mode="eval").body
        return node


def _is_width(node: ast.expr) -> bool:
    """``C``, ``C // self.num_heads`` or ``self.dim``."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
        return "num_heads" in ast.unparse(node.right)
    return isinstance(node, ast.Name) and node.id in ("C", "dim")


def _is_minus_one(node: ast.expr) -> bool:
    return ast.unparse(node) == "-1"
