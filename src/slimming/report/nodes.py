"""Values of a JSON file with the way to them, so that a complaint says where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slimming.core.budget import LEAST_ABSOLUTE
from slimming.errors import CheckpointError


@dataclass(frozen=True)
class Node:
    """A value in the file and the way to it, so that complaints say where."""

    value: Any
    where: str

    def wrong(self, wanted: str) -> CheckpointError:
        """The error that says that this is not ``wanted``."""
        return CheckpointError(
            f"{self.where} is not {wanted}. The results are damaged: repeat `slimming run`, which goes on where "
            "it stopped and writes them again."
        )

    def need(self, key: str) -> Node:
        """The entry, which must be there."""
        found = self.get(key)
        if found is None:
            raise Node(None, f"{self.where}.{key}").wrong("there")
        return found

    def get(self, key: str) -> Node | None:
        """The entry, or None when it is absent or null."""
        value = self.mapping().get(key)
        return None if value is None else Node(value, f"{self.where}.{key}")

    def mapping(self) -> Mapping[str, Any]:
        """The value as a mapping."""
        if not isinstance(self.value, dict):
            raise self.wrong("a mapping")
        return self.value

    def entries(self) -> Iterator[tuple[str, Node]]:
        """The entries that are not null."""
        for key, value in self.mapping().items():
            if value is not None:
                yield key, Node(value, f"{self.where}.{key}")

    def items(self) -> list[Node]:
        """The entries of a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [Node(value, f"{self.where}[{i}]") for i, value in enumerate(self.value)]

    def number(self) -> float:
        """The value as a finite number."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise self.wrong("a number")
        if self.value != self.value or abs(self.value) == float("inf"):
            raise self.wrong("a finite number")
        return float(self.value)

    def positive(self) -> float:
        """The value as a number above 0."""
        if self.number() <= 0:
            raise self.wrong("above 0")
        return self.number()

    def share(self) -> float:
        """The value as a number from 0 to 1."""
        if not 0 <= self.number() <= 1:
            raise self.wrong("between 0 and 1")
        return self.number()

    def limit(self, metric: str) -> float:
        """The value as a limit of a budget."""
        if metric == "latency_ms":
            return self.positive()
        if not (0 < self.number() <= 1 or self.number() >= LEAST_ABSOLUTE):
            raise self.wrong(f"a share between 0 and 1, or at least {LEAST_ABSOLUTE}")
        return self.number()

    def count(self) -> int:
        """The value as a whole number of at least 0."""
        if self.number() < 0 or self.number() != int(self.number()):
            raise self.wrong("a whole number of at least 0")
        return int(self.number())

    def text(self) -> str:
        """The value as a text."""
        if not isinstance(self.value, str):
            raise self.wrong("a text")
        return self.value


def maybe(node: Node | None, key: str, read: Callable[[Node], Any]) -> Any:
    """What ``read`` makes of an entry; None where it is absent."""
    found = node.get(key) if node is not None else None
    return None if found is None else read(found)


def children(node: Node | None, key: str) -> list[tuple[str, Node]]:
    """The entries of a mapping below ``node``; none where it is absent."""
    found = node.get(key) if node is not None else None
    return [] if found is None else list(found.entries())


def entries_of(node: Node, key: str) -> list[Node]:
    """The entries of a list below ``node``; none where it is absent."""
    found = node.get(key)
    return [] if found is None else found.items()
