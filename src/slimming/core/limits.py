"""The largest files, numbers and models that slimming reads; `docs/reliability.md` lists them.

They are far above what real models need, and low enough that a file that exceeds them is refused within seconds.
"""

from __future__ import annotations

MIB = 1 << 20
LARGEST_FILE = 16 * MIB
"""Bytes of a JSON file; kinds of files that hold pictures or logs have a limit of their own."""
LARGEST_LOG = 256 * MIB
"""Bytes of the log of a training."""
LARGEST_LIST = 4 * MIB
"""Bytes of a list of class names."""
LARGEST_YAML = MIB
"""Bytes of a YAML file."""
DEEPEST = 64
"""Levels of nesting in a JSON or YAML file."""
MOST_VALUES = 2_000_000
"""Values in a JSON file."""
MOST_YAML_VALUES = 100_000
"""Values in a YAML file, after its aliases are expanded."""
LARGEST_INTEGER = 2**53
"""Size of an integer in a JSON file: larger ones are not exact in other programs."""
MOST_MODULES = 20_000
"""Modules of a model that is built from a file."""
MOST_TENSOR_ELEMENTS = 2**28
"""Elements of one tensor of a model that is built from a file."""
MOST_IN_RANGE = 2**20
"""Elements of a range that a host makes while it builds a model, such as one number per block or position."""
MOST_ELEMENTS = 2**36
"""Elements of the parameters of a model that is built from a file."""


def megabytes(size: int) -> str:
    """Return a number of bytes as text.

    >>> megabytes(LARGEST_FILE)
    '16 MiB'
    """
    return f"{size / MIB:g} MiB"
