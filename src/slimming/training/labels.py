"""Labels and classes: one rule for class folders, Parquet files, tar shards and ``hf:`` data.

A label is an integer; 1.0, true and "1" are not. If the data names its classes, labels are numbers from 0. If it does
not, the labels that occur are the classes, in ascending order.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from slimming.errors import DataError

_log = logging.getLogger(__name__)

LARGEST = 2**63 - 1
INTEGER = re.compile(rb"\s*(-?[0-9]{1,19})\s*", re.ASCII)


def integer_label(value: Any, name: str) -> int:
    """Return the label of one sample.

    Args:
        value: an integer, the content of a ``.cls`` file, or None if the label is missing.
        name: name of the sample for the message.

    Raises:
        DataError: the value is not an integer of 64 bits.

    >>> integer_label(b"3", "00001.cls")
    3
    """
    if isinstance(value, bytes) and (match := INTEGER.fullmatch(value)) is not None:
        value = int(match[1])
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST:
        return int(value)
    shown = value.decode("ascii", "backslashreplace").strip() if isinstance(value, bytes) else repr(value)
    shown = "missing" if value is None else shown if len(shown) <= 40 else shown[:40] + "..."
    raise DataError(f"The label of {name} is {shown}; write the number of its class as an integer, such as 0 or 12.")


def integer_labels(values: np.ndarray, column: str, where: object) -> np.ndarray:
    """Return the labels of a table as int64.

    Raises:
        DataError: the column does not hold integers of 64 bits without missing values.
    """
    if not np.issubdtype(values.dtype, np.integer):
        raise DataError(
            f"Column {column!r} of {where} holds {values.dtype}, not integers without missing values; set label_key."
        )
    if len(values) and int(values.max()) > LARGEST:
        raise DataError(f"Column {column!r} of {where} holds {values.max()}, which is no class number; set label_key.")
    return values.astype(np.int64)


def named_by_label(where: str, *parts: np.ndarray) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return the classes of data without names, and the labels as numbers of these classes.

    The classes are the labels that occur in any of the parts, in ascending order, and are named by their label. If they
    do not count from 0, a note says so.

    Raises:
        DataError: a label is negative.

    >>> named_by_label("photos", np.array([1, 3, 2]), np.array([3]))
    (('1', '2', '3'), [array([0, 2, 1]), array([2])])
    """
    labels = np.unique(np.concatenate(parts))
    if len(labels) and labels[-1] != len(labels) - 1:
        shown = ", ".join(map(str, labels[:5])) + (f", ... {labels[-1]}" if len(labels) > 5 else "")
        _log.warning(
            "%s names no classes, and its labels do not count from 0: the labels %s become the classes 0 to %d",
            where, shown, len(labels) - 1,
        )  # fmt: skip
    return tuple(map(str, labels)), [np.searchsorted(labels, part) for part in parts]


def check_labels(where: str, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Check that the training images belong to more than one class.

    Raises:
        DataError: all labels are the same.
    """
    seen = np.unique(labels)
    if len(seen) < 2:
        which = ", ".join(classes[int(label)] for label in seen)
        raise DataError(
            f"All {len(labels)} training images of {where} are of one class ({which}); at least two are needed."
        )


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split the indices into (training, validation), with the same fraction of each class.

    The split does not depend on the seed of a run, so that runs with different seeds are comparable.

    Raises:
        DataError: a class has a single image.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    train, val = [], []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        count = max(1, round(fraction * len(members)))
        if count == len(members):
            raise DataError(f"Class number {label} has {len(members)} image; at least two are needed to hold some out.")
        val.append(members[:count])
        train.append(members[count:])
    rng = np.random.default_rng(1)
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(val))
