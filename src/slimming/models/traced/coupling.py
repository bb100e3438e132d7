"""Follow channels along the edges of a dependency graph, from one layer to everything that is coupled with it.

torch-pruning follows lists of channels until no list is new. Where a model rotates channels, as in
``x * cos + cat([-b, a]) * sin``, or adds a branch to itself many times, there is always another list. Here a channel
is followed from a node only once, so the work is bounded by the edges times the channels, and by a number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

STEPS = 20_000_000
"""Most channels that are followed along edges from one layer; the embedding width of ViT-H takes about 4 million."""


class TooManyStepsError(Exception):
    """There are more channels to follow from one layer than the allowed number of steps.

    Attributes:
        visits: what was reached by then.
        node: the node of the graph at which most channels arrived, apart from the layer itself.
    """

    def __init__(self, visits: Sequence[Visit]) -> None:
        super().__init__(len(visits))
        self.visits = visits
        others = [visit for visit in visits if visit.edge.target is not visits[0].edge.target]
        self.node = max(others or visits, key=lambda visit: visit.steps).edge.target


class Pair(Protocol):
    """A channel of a node, and the channel of the first layer that it is coupled with, if that is known."""

    @property
    def idx(self) -> int:
        """The channel of the node."""
        ...

    @property
    def root_idx(self) -> int | None:
        """The channel of the first layer."""
        ...


class Edge(Protocol):
    """An edge of the graph: removing channels by ``trigger`` at its source removes channels by ``handler`` at target.

    ``index_mapping`` are the functions that convert channels of the source to channels of the target.
    """

    trigger: Callable[..., Any]
    handler: Callable[..., Any]
    target: Any
    index_mapping: Sequence[Callable[[Sequence[Any]], Sequence[Any]] | None]


@dataclass
class Visit:
    """The channels of a node that are coupled with those of the first layer.

    Attributes:
        edge: the edge by which the node was reached first.
        roots: channel -> the channel of the first layer from which it was reached first.
        also: further pairs of a channel and the channel of the first layer.
        steps: how often channels arrived here.
    """

    edge: Edge
    roots: dict[int, int | None] = field(default_factory=dict)
    also: dict[tuple[int, int | None], None] = field(default_factory=dict)
    steps: int = 0

    def add(self, pairs: Iterable[Pair], limit: int) -> list[Pair]:
        """Add ``pairs`` below ``limit`` and return those whose channel is new here."""
        new = []
        for pair in pairs:
            index, root = pair.idx, pair.root_idx
            self.steps += 1
            if not 0 <= index < limit:
                continue  # past the end of every tensor: an operation that the graph does not map correctly
            if index not in self.roots:
                self.roots[index] = root
                new.append(pair)
            elif self.roots[index] != root:
                self.also[index, root] = None
        return new

    @property
    def pairs(self) -> list[tuple[int, int | None]]:
        """Every pair of a channel and the channel of the first layer that it is coupled with."""
        return [*self.roots.items(), *self.also]


def follow(first: Edge, pairs: Sequence[Pair], limit: int, steps: int) -> list[Visit]:
    """Everything that is coupled with the channels of one layer, the layer first.

    Args:
        first: an edge from the layer to itself.
        pairs: its channels.
        limit: the size of the largest dimension of a tensor.
        steps: most channels to follow along edges, see `STEPS`.

    Raises:
        TooManyStepsError: there are more.
    """
    visits: dict[tuple[Hashable, Hashable], Visit] = {}

    def visit(edge: Edge, arriving: Sequence[Pair]) -> list[Pair]:
        return visits.setdefault((edge.target, edge.handler), Visit(edge)).add(arriving, limit)

    stack = [(first, visit(first, pairs))]
    left = steps
    while stack:
        edge, new = stack.pop()
        for following in edge.target.dependencies:
            if following.trigger != edge.handler:
                continue
            arriving: Sequence[Any] = new
            for mapping in following.index_mapping:
                arriving = arriving if mapping is None else mapping(arriving)
            left -= len(arriving)
            if left < 0:
                raise TooManyStepsError(list(visits.values()))
            if new_there := visit(following, arriving) if arriving else []:
                stack.append((following, new_there))
    return list(visits.values())
