"""The registry of kinds of prunable units, used by budgets, searches, reports and commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slimming.errors import SlimmingError, nearest


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of unit.

    Attributes:
        units: plural name of the units in tables.
        description: what one unit is.
        penalty: default weight of the l1 penalty in a search, on the mean of |mask|. For DeiT-S the weights of
            ``head_dim``, ``mlp`` and ``token`` equal the paper's W1, W2 and W3 on sums (ViT-Slim, joint search).
        on_request: whether units of this kind are pruned only if it is named.
    """

    units: str
    description: str
    penalty: float = 1.0
    on_request: bool = False


KINDS: Mapping[str, Kind] = {
    "head_dim": Kind(
        units="head dimensions", description="one dimension of the queries and keys, or of the values, of a head"
    ),
    "head": Kind(units="heads", description="one attention head"),
    "mlp": Kind(units="hidden units", description="one hidden unit of an MLP"),
    "channel": Kind(units="channels", description="one channel of a convolution, with all layers that share it"),
    "token": Kind(units="tokens", description="one token position, from one block to the last", penalty=0.25),
    "block": Kind(
        units="blocks", description="one whole residual branch: an attention, an MLP, or a block", on_request=True
    ),
    "width": Kind(units="embedding", description="one feature of the residual stream", on_request=True),
}
"""The kinds by name, in the order in which they are shown."""


def check_kinds(names: Iterable[str], error: type[SlimmingError]) -> None:
    """Check that each of ``names`` is a kind.

    Raises:
        SlimmingError: one is not; raised as class ``error``, with the known kinds in the message.
    """
    for name in names:
        if name not in KINDS:
            raise error(f"There is no kind {name!r}; kinds are {', '.join(KINDS)}.{nearest(name, KINDS)}")
