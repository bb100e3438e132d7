"""Count attacks: tried, clean and bad."""

from __future__ import annotations

from dataclasses import dataclass, field


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
