"""Find the residual branches of a model from one recorded forward pass.

A branch is a value f(x) that is added to a stream which bypasses it, x + f(x). What is computed for the branch alone is
what every path from the outputs of the model back to it passes through that addition: the subtree of the addition's
edge in the dominator tree of the autograd graph. No names of classes, layers or attributes are used.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from slimming.core.example_inputs import tensors_in

ADD = "AddBackward0"
VIEWS = (
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "PermuteBackward0", "TransposeBackward0"),
    *("TBackward0", "CloneBackward0", "RollBackward0", "AliasBackward0", "UnsqueezeBackward0", "SqueezeBackward1"),
    *("SqueezeBackward0", "ExpandBackward0", "SliceBackward0", "SelectBackward0", "ConstantPadNdBackward0"),
    *("ToCopyBackward0", "CatBackward0"),
)
"""Operations that only rearrange values."""
PRODUCTS = ("mm", "bmm", "Convolution", "DotProduct", "Baddbmm", "Addbmm", "Addmv", "MvBackward")
"""Parts of the names of operations that cost multiply-adds."""
NEAR = 256
"""Most operations that are searched backwards for what a branch reads of the stream."""

Node = Any
"""An operation of the autograd graph, or an edge of an addition as a pair of the addition and a position."""


@dataclass(frozen=True)
class Value:
    """An argument or a result of a module.

    Attributes:
        shape: of a tensor; None for anything else.
        node: the operation that made the tensor.
        plain: the value of anything else.
    """

    shape: tuple[int, ...] | None = None
    node: Node = None
    plain: Any = None

    @classmethod
    def of(cls, value: Any) -> Value:
        """Describe ``value``, without keeping a tensor alive."""
        if isinstance(value, Tensor):
            return cls(tuple(value.shape), value.grad_fn)
        return cls(plain=value)


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        name: name of the module.
        arguments: position or keyword -> argument.
        results: its results.
        form: ``"one"``, ``"tuple"`` or ``"list"`` of results; ``"other"`` for anything else.
        nodes: the operations that made the tensors among its results.
    """

    name: str
    arguments: dict[int | str, Value]
    results: tuple[Value, ...]
    form: str
    nodes: tuple[Node, ...]


class Flow(TorchFunctionMode):
    """What flows through a model in a forward pass: calls of modules, and the module in which each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.running = [""]
        self.frames: dict[Node, str] = {}
        self.calls: defaultdict[str, list[ModuleCall]] = defaultdict(list)
        self.outputs: list[Node] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                self.frames.setdefault(leaf.grad_fn, self.running[-1])
        return out

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Record the calls of the modules of ``model`` inside the context."""

        def leave(name: str, args: Any, kwargs: Any, output: Any) -> None:
            self.running.pop()
            arguments = {key: Value.of(value) for key, value in [*enumerate(args), *kwargs.items()]}
            form = next((word for word, cls in (("tuple", tuple), ("list", list)) if type(output) is cls), "other")
            if isinstance(output, Tensor):
                form = "one"
            results = tuple(Value.of(value) for value in (output if form in ("tuple", "list") else (output,)))
            nodes = tuple(leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            self.calls[name].append(ModuleCall(name, arguments, results, form, nodes))
            if not name:
                self.outputs = [leaf.grad_fn for leaf in tensors_in(output) if leaf.grad_fn is not None]

        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
            handles.append(
                module.register_forward_hook(
                    lambda _, args, kwargs, output, name=name: leave(name, args, kwargs, output),
                    with_kwargs=True,
                    always_call=True,
                )
            )
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Residual:
    """A branch of the autograd graph.

    Attributes:
        frame: name of the module in which the branch is added to the stream.
        node: the operation whose result is added.
        nodes: the operations that are for the branch alone.
        stream: the operation that made the other summand.
        add: the addition.
    """

    frame: str
    node: Node
    nodes: frozenset[Node] = field(repr=False)
    stream: Node
    add: Node


class Graph:
    """The autograd graph of a recorded forward pass, with its dominator tree.

    Attributes:
        frames: operation -> name of the module in which it ran.
    """

    def __init__(self, flow: Flow) -> None:
        order, consumers = _ordered(flow.outputs)
        self.frames: dict[Node, str] = {}
        depth: dict[Node, int] = {None: 0}
        parent: dict[Node, Node] = {}
        self._children: defaultdict[Node, list[Node]] = defaultdict(list)
        for node in order:
            users = consumers[node]
            nearest = users[0]
            for user in users[1:]:
                nearest = _common(nearest, user, parent, depth)
            parent[node], depth[node] = nearest, depth[nearest] + 1
            self._children[nearest].append(node)
            user = users[0][0] if isinstance(users[0], tuple) else users[0]
            if not isinstance(node, tuple):
                self.frames[node] = flow.frames.get(node, self.frames.get(user, ""))
        self._order = order

    def inside(self, node: Node) -> set[Node]:
        """The operations that are used through ``node`` alone."""
        found: set[Node] = set()
        stack = list(self._children[node])
        while stack:
            child = stack.pop()
            if not isinstance(child, tuple):
                found.add(child)
            stack.extend(self._children[child])
        return found

    def residuals(self) -> list[Residual]:
        """Every branch that reads the stream that it is added to, in the order of the forward pass."""
        result = []
        for add in reversed(self._order):
            if isinstance(add, tuple) or not _is_addition(add):
                continue
            summands = [function for function, _ in add.next_functions]
            for position, branch in enumerate(summands):
                stream = summands[1 - position]
                nodes = self.inside((add, position))
                if branch in nodes and self._bypasses(add, stream, nodes):
                    result.append(Residual(self.frames[add], branch, frozenset(nodes), stream, add))
        return result

    def _bypasses(self, add: Node, stream: Node, branch: set[Node]) -> bool:
        """Whether the operations of ``branch`` depend on a value that reaches ``add`` through ``stream`` unchanged."""
        carried = set(self.carried(stream, self.frames[add]))
        queue = deque(node for inner in branch for node in _read(inner) if node not in branch)
        seen: set[Node] = set()
        while queue and len(seen) < NEAR:
            node = queue.popleft()
            if node in carried:
                return True
            if node not in seen:
                seen.add(node)
                queue.extend(_read(node))
        return False

    def carried(self, node: Node, frame: str) -> Iterator[Node]:
        """The operations whose results reach ``node`` unchanged, or as summands that are added in ``frame``."""
        stack, seen = [node], set[Node]()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            yield node
            name = type(node).__name__
            if name in VIEWS or name.startswith("NativeDropout") or (name == ADD and self.frames[node] == frame):
                stack.extend(_read(node))
            elif name.startswith("MulBackward"):
                stack.extend(other for other in _read(node) if parameter_of(other) is None)

    def between(self, first: Node, last: Node, branches: Mapping[Node, Residual]) -> list[Residual] | None:
        """The branches that are added on the way from ``first`` to ``last``; None if anything else happens there.

        Args:
            first: an operation.
            last: an operation after it.
            branches: addition -> its branch.
        """
        found: list[Residual] = []
        node = last
        while node is not first:
            if node in branches:
                found.append(branches[node])
                node = branches[node].stream
            elif type(node).__name__ in (*VIEWS, "ReluBackward0") and len(_read(node)) == 1:
                node = _read(node)[0]
            else:
                return None
        return found


def parameter_of(node: Node) -> Tensor | None:
    """The parameter whose values ``node`` gives, possibly rearranged."""
    while type(node).__name__ in VIEWS and len(_read(node)) == 1:
        node = _read(node)[0]
    return node.variable if type(node).__name__ == "AccumulateGrad" else None


def is_product(node: Node) -> bool:
    """Whether ``node`` multiplies matrices or is a convolution."""
    return any(word.lower() in type(node).__name__.lower() for word in PRODUCTS)


def last_parameters(node: Node) -> list[Tensor] | None:
    """The parameters whose multiplication with 0 makes the result of ``node`` 0, as of the last layer before it.

    Whether the operations after them keep 0 is not checked here but by the verification of the group.
    """
    name, read = type(node).__name__, _read(node)
    parameters = [parameter for parameter in map(parameter_of, read) if parameter is not None]
    computed = [other for other in read if parameter_of(other) is None]
    if name == "AccumulateGrad" or not read:
        return None
    if name.startswith("MulBackward"):
        if parameters:
            return parameters
        return next((found for other in computed if (found := last_parameters(other)) is not None), None)
    if name in ("AddBackward0", "SubBackward0", "CatBackward0", "StackBackward0"):
        found = [last_parameters(other) for other in computed]
        if any(each is None for each in found):
            return None
        return [*parameters, *(parameter for each in found for parameter in each or ())]
    if parameters:
        # The weight of a product may be computed, as with weight standardisation, and only the bias a parameter.
        return parameters if not is_product(node) or any(each.dim() > 1 for each in parameters) else None
    return last_parameters(computed[-1]) if len(computed) == 1 or is_product(node) else None


def _is_addition(node: Node) -> bool:
    return type(node).__name__ == ADD and sum(function is not None for function, _ in node.next_functions) == 2


def _read(node: Node) -> list[Node]:
    """The operations whose results ``node`` reads."""
    if isinstance(node, tuple):
        add, position = node
        return [add.next_functions[position][0]]
    return [function for function, _ in node.next_functions if function is not None]


def _following(node: Node) -> list[Node]:
    """Like `_read`, with the edges of additions as nodes of their own."""
    if not isinstance(node, tuple) and _is_addition(node):
        return [(node, 0), (node, 1)]
    return _read(node)


def _ordered(outputs: Sequence[Node]) -> tuple[list[Node], dict[Node, list[Node]]]:
    """The nodes of the graph, each after all that use it, and the users of each; None uses the outputs."""
    consumers: defaultdict[Node, list[Node]] = defaultdict(list)
    finished: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, Iterator[Node]]] = [(None, iter(dict.fromkeys(outputs)))]
    while stack:
        node, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            finished.append(node)
            stack.pop()
            continue
        consumers[following].append(node)
        if following not in seen:
            seen.add(following)
            stack.append((following, iter(_following(following))))
    return finished[-2::-1] if len(finished) > 1 else [], consumers


def _common(first: Node, second: Node, parent: dict[Node, Node], depth: dict[Node, int]) -> Node:
    """The nearest node of the dominator tree above both, which may be one of them."""
    while first is not second and first != second:
        if depth[first] < depth[second]:
            first, second = second, first
        first = parent[first]
    return first
