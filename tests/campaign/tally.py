"""Count attacks: tried, clean and bad."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Tally:
    """The outcome of one kind of attack.

    Attributes:
        attack: what was done, as a row of the table says it.
        promise: what must hold after it.
        tried: number of attacks.
        bad: what happened in each attack that broke the promise.
    """

    attack: str
    promise: str
    tried: int = 0
    bad: list[str] = field(default_factory=list)

    @property
    def clean(self) -> int:
        """Number of attacks after which the promise held."""
        return self.tried - len(self.bad)

    def add(self, fault: str | None) -> None:
        """Count one attack; ``fault`` says how it broke the promise, None that it did not."""
        self.tried += 1
        if fault is not None:
            self.bad.append(fault)

    def check(self) -> None:
        """Raise AssertionError if no attack was tried, or if any was bad."""
        assert self.tried > 0, f"{self.attack}: nothing was tried"
        assert not self.bad, f"{self.attack}: {len(self.bad)} of {self.tried} bad:\n" + "\n".join(self.bad[:20])


def table(tallies: Iterable[Tally]) -> str:
    """Return a Markdown table of tallies with a row of sums."""
    lines = ["| attack | promise | tried | clean | bad |", "|---|---|---:|---:|---:|"]
    tallies = list(tallies)
    for one in tallies:
        lines.append(f"| {one.attack} | {one.promise} | {one.tried:,} | {one.clean:,} | {len(one.bad):,} |")
    tried, bad = sum(one.tried for one in tallies), sum(len(one.bad) for one in tallies)
    return "\n".join([*lines, f"| all | | {tried:,} | {tried - bad:,} | {bad:,} |"]) + "\n"


def save(tallies: Iterable[Tally], path: Path) -> None:
    """Write tallies as JSON."""
    path.write_text(json.dumps([{**asdict(one), "clean": one.clean} for one in tallies], indent=1) + "\n")
