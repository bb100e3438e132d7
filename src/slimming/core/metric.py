"""What the quality of a model is measured by: the name of the metric, its unit, and its direction."""

from __future__ import annotations

from dataclasses import dataclass

from slimming.errors import ConfigError

PERCENT = "%"


@dataclass(frozen=True, kw_only=True)
class Metric:
    r"""A metric of the quality of models, as results and reports name it.

    Attributes:
        name: name in tables and charts, such as ``"mAP"``, ``"mIoU"``, ``"abs rel"`` or ``"PSNR"``.
        unit: unit of the values. With ``"%"``, values are shares from 0 to 1, which are shown as percentages.
        higher_is_better: whether larger values are better.
        key: entry of what ``evaluate`` returns; by default the name.

    Raises:
        ConfigError: the name is empty.

    >>> Metric(name="PSNR", unit="dB").show(31.234)
    '31.2\xa0dB'
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True
    key: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError("The name of a metric is empty; give one, such as mAP.")
        if not self.key:
            object.__setattr__(self, "key", self.name)

    @property
    def title(self) -> str:
        """The name with its unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def factor(self) -> float:
        """What values are multiplied by to be shown in the unit."""
        return 100.0 if self.unit == PERCENT else 1.0

    def number(self, value: float) -> str:
        """A value in the unit, without the name of the unit."""
        shown = self.factor * value
        return f"{shown:.1f}" if self.unit == PERCENT or abs(shown) >= 10 else f"{shown:.3f}"

    def show(self, value: float) -> str:
        """A value with its unit."""
        return f"{self.number(value)}\xa0{self.unit}" if self.unit else self.number(value)

    def change(self, value: float, dense: float) -> str:
        """The difference of a value from that of the dense model, with its sign."""
        sign = "+" if value >= dense else "\N{MINUS SIGN}"
        return f"{sign}{self.number(abs(value - dense))}" if value != dense else "+0.0"


TOP1 = Metric(name="top-1", unit=PERCENT, key="top1")
"""The default: the share of images whose class is predicted first."""
