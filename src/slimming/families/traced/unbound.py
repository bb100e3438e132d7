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
COUNTS = ("num_heads", "self.groups")
"""What hosts divide the width by."""
_MARK = "slimming_unbound"


@cache
def unbound_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """A class like ``cls`` whose forward takes any number of heads; None if its source does not show how."""
    body: dict[str, Any] = {}
    for name, function in inspect.getmembers(cls, inspect.isfunction):
        if not name.startswith("__") and not function.__module__.startswith("torch.") and not function.__closure__:
            made = _unbound(function)
            if made is not None:
                body[name] = made
    if not body:
        return None
    return type(cls.__name__, (cls,), {**body, "__module__": cls.__module__, "__doc__": cls.__doc__, _MARK: True})


def _unbound(function: FunctionType) -> FunctionType | None:
    """``function`` with head sizes left to reshapes; None if it works out none."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None
    change = _Unbind()
    tree = ast.fix_missing_locations(change.visit(ast.parse(source)))
    if not change.heads:
        return None
    text = ast.unparse(tree)
    filename = f"<slimming: {function.__module__}.{function.__qualname__}>"
    # So that tracebacks, torch.compile and inspect find the lines.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {}
    exec(compile(text, filename, "exec"), vars(sys.modules[function.__module__]), scope)
    made: FunctionType = scope[function.__name__]
    made.__qualname__ = function.__qualname__
    return made


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
    """``C``, ``C // self.num_heads``, or a product that begins with ``C``."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
        return any(word in ast.unparse(node.right) for word in COUNTS)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _is_width(node.left)
    return isinstance(node, ast.Name) and node.id in ("C", "dim")


def _is_minus_one(node: ast.expr) -> bool:
    return ast.unparse(node) == "-1"
