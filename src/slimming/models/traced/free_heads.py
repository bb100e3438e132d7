"""Forwards that no longer work out the head size from the embedding width.

Many hosts write ``reshape(B, N, 3, self.num_heads, C // self.num_heads)``, which ties the number of heads to the
width of the input. The same forward with that one expression left to ``reshape`` (-1) takes any number of heads.
It is made from the host's own source when a module loses heads; nothing else in it changes, and a forward in
which the expressions are not found is left alone, so that its heads stay.

This is the one place that executes a host's source (installed code, nothing that a checkpoint brings). The other ways
are a copy of each forward, which ties slimming to one version of the host, or leaving these heads whole. Of the 95
architectures of timm and torchvision in ``benchmarks/results/coverage.json`` whose heads can go, 41 need it, and 36 of
those, the Swins, BEiT, CaiT, XCiT and PVTv2 among them, have no heads that could go otherwise: 365 of 808 attentions.
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

from slimming.models.layers import SomeHeadsAttention

RESHAPES = ("reshape", "view")
COUNTS = ("num_heads", "self.groups")
"""What hosts divide the width by."""
WIDTHS = ("C", "D", "dim", "embed_dim", "num_channels")
"""What hosts call the embedding width in a forward."""
_MARK = "slimming_unbound"


@cache
def unbound_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """A class like ``cls`` whose forward takes any number of heads; None if its source does not show how."""
    if cls is nn.MultiheadAttention:
        return SomeHeadsAttention
    body: dict[str, Any] = {}
    for name, function in inspect.getmembers(cls, inspect.isfunction):
        if not name.startswith("__") and not function.__module__.startswith("torch.") and not function.__closure__:
            made = _unbound(function) or function
            made = _with_helpers(made)
            if made is not function:
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
    tree = change.visit(ast.parse(source))
    if not change.heads:
        return None
    tree = ast.fix_missing_locations(_Rescale(tree).visit(tree))
    text = ast.unparse(tree)
    filename = f"<slimming: {function.__module__}.{function.__qualname__}>"
    # So that tracebacks, torch.compile and inspect find the lines.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {}
    exec(compile(text, filename, "exec"), vars(sys.modules[function.__module__]), scope)
    made: FunctionType = scope[function.__name__]
    made.__qualname__ = function.__qualname__
    return made


def _with_helpers(function: FunctionType) -> FunctionType:
    """``function`` with what it calls of its own file for some number of heads unbound as well."""
    helpers: dict[str, FunctionType] = {}
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        if isinstance(found, FunctionType) and "num_heads" in found.__code__.co_varnames and not found.__closure__:
            made = _unbound(found)
            if made is not None:
                helpers[name] = made
    if not helpers:
        return function
    scope = {**function.__globals__, **helpers}
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    return made


def is_unbound(module: nn.Module) -> bool:
    """Whether the module's class was made by `unbound_class`."""
    return isinstance(module, SomeHeadsAttention) or bool(vars(type(module)).get(_MARK, False))


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


class _Rescale(ast.NodeTransformer):
    """Once there are queries, the size of a head is theirs."""

    def __init__(self, tree: ast.AST) -> None:
        stored = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        self.known_from = min((node.lineno for node in stored if node.id == "q"), default=None)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        size = isinstance(node.op, ast.FloorDiv) and isinstance(node.left, ast.Name) and _is_width(node)
        if size and self.known_from is not None and node.lineno > self.known_from:
            return ast.parse("q.size(-1)", mode="eval").body
        return node


def _is_width(node: ast.expr) -> bool:
    """``C``, ``C // self.num_heads``, or a product that begins with ``C``."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
        return any(word in ast.unparse(node.right) for word in COUNTS)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _is_width(node.left)
    return isinstance(node, ast.Name) and node.id in WIDTHS


def _is_minus_one(node: ast.expr) -> bool:
    return ast.unparse(node) == "-1"
