"""Rewrite forwards that infer the head size from the embedding width, so that heads can be removed.

Many attention classes contain ``reshape(B, N, 3, self.num_heads, C // self.num_heads)``, which determines the size of
a head by the width of the input. With -1 in place of this size, the same forward accepts any number of heads. The
forward is rewritten from the installed source of the host when a module loses heads, and nothing else in it changes. A
forward without such an expression is not rewritten, and its heads are not removed.

This is the only module that executes source text: that of installed hosts, never of a checkpoint. The alternatives are
a copy of each forward, which depends on the version of the host, or not removing these heads. Of the 95 architectures
of timm and torchvision in ``benchmarks/results/coverage.json`` whose heads can be removed, 41 need it. In 36 of them
(among others Swin, BEiT, CaiT, XCiT and PVTv2) no other heads can be removed: 365 of 808 attention modules.
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

from slimming.errors import UnsupportedModelError
from slimming.models.layers import SomeHeadsAttention

RESHAPES = ("reshape", "view")
COUNTS = ("heads", "self.groups")
"""Names of the number of heads in the hosts' forwards, by which they divide the width."""
WIDTHS = ("C", "D", "c", "dim", "embed_dim", "num_channels")
"""Names of the embedding width in the hosts' forwards."""
MARK = "slimming_free_heads"
"""Attribute of the classes that `free_heads_class` makes."""
ADAPTED = "slimming_adapted_free_heads"
"""Attribute of classes with another forward around the host's: makes the same around the rewritten one, or None."""


@cache
def free_heads_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """A subclass of ``cls`` whose forward accepts any number of heads; None if its source cannot be rewritten."""
    if cls is nn.MultiheadAttention:
        return SomeHeadsAttention
    if ADAPTED in vars(cls):
        return vars(cls)[ADAPTED]()
    methods: dict[str, Any] = {}
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        if not name.startswith("__") and not method.__module__.startswith("torch.") and not method.__closure__:
            rewritten = _with_rewritten_helpers(_rewritten(method) or method)
            if rewritten is not method:
                methods[name] = rewritten
    if not methods:
        return None
    methods |= {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce_ex__": _reduced, MARK: True}
    return type(cls.__name__, (cls,), methods)


def _reduced(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """How ``pickle``, `torch.save` and ``copy`` describe a module whose class has no name: by the host's class."""
    return new_with_free_heads, (type(module).__bases__[0],), module.__dict__


def new_with_free_heads(cls: type[nn.Module]) -> nn.Module:
    """An empty module of `free_heads_class`, which `pickle` fills.

    Raises:
        UnsupportedModelError: the installed version of the host has another forward.
    """
    rewritten = free_heads_class(cls)
    if rewritten is None:
        raise UnsupportedModelError(
            f"The forward of {cls.__name__} cannot be rewritten for fewer heads in the installed version of its "
            "library. Install the version with which the model was cut."
        )
    return rewritten.__new__(rewritten)


def has_free_heads(module: nn.Module) -> bool:
    """Whether the class of ``module`` was made by `free_heads_class`."""
    return isinstance(module, SomeHeadsAttention) or bool(getattr(type(module), MARK, False))


def _rewritten(function: FunctionType) -> FunctionType | None:
    """``function`` with -1 for head sizes in its reshapes; None if it has no such sizes."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None
    transformer = _InferHeadSize()
    tree = transformer.visit(ast.parse(source))
    if not transformer.replaced:
        return None
    tree = ast.fix_missing_locations(_HeadSizeOfQueries(tree).visit(tree))
    text = ast.unparse(tree)
    filename = f"<slimming: {function.__module__}.{function.__qualname__}>"
    # Tracebacks, torch.compile and inspect look the source up here.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {}
    exec(compile(text, filename, "exec"), vars(sys.modules[function.__module__]), scope)
    rewritten: FunctionType = scope[function.__name__]
    rewritten.__qualname__ = function.__qualname__
    return rewritten


def _with_rewritten_helpers(function: FunctionType) -> FunctionType:
    """``function`` with rewritten versions of the functions of its module that it calls with a number of heads."""
    helpers: dict[str, FunctionType] = {}
    for name in function.__code__.co_names:
        helper = function.__globals__.get(name)
        if isinstance(helper, FunctionType) and "num_heads" in helper.__code__.co_varnames and not helper.__closure__:
            rewritten = _rewritten(helper)
            if rewritten is not None:
                helpers[name] = rewritten
    if not helpers:
        return function
    scope = {**function.__globals__, **helpers}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    return copy


class _InferHeadSize(ast.NodeTransformer):
    """Replace the one head size or width in the arguments of a reshape by -1."""

    def __init__(self) -> None:
        self.replaced = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not (isinstance(node.func, ast.Attribute) and node.func.attr in RESHAPES):
            return node
        positions = [position for position, argument in enumerate(node.args) if _is_width(argument)]
        has_inferred = any(_is_minus_one(argument) for argument in node.args)
        if len(positions) == 1 and not has_inferred:
            self.replaced += 1
            node.args[positions[0]] = ast.parse("-1", mode="eval").body
        return node


class _HeadSizeOfQueries(ast.NodeTransformer):
    """Replace head sizes that are computed after the queries, such as in a scale, by the size of the queries."""

    def __init__(self, tree: ast.AST) -> None:
        stored = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        self.queries_line = min((node.lineno for node in stored if node.id == "q"), default=None)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        is_head_size = isinstance(node.op, ast.FloorDiv) and isinstance(node.left, ast.Name) and _is_width(node)
        if is_head_size and self.queries_line is not None and node.lineno > self.queries_line:
            return ast.parse("q.size(-1)", mode="eval").body
        return node


def _is_width(node: ast.expr) -> bool:
    """Whether an expression is ``C``, ``C // self.num_heads``, or a product that begins with ``C``."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
        return any(word in ast.unparse(node.right) for word in COUNTS)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _is_width(node.left)
    return isinstance(node, ast.Name) and node.id in WIDTHS


def _is_minus_one(node: ast.expr) -> bool:
    return ast.unparse(node) == "-1"
