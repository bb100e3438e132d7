"""The outputs of a model that count: every floating-point tensor per image, by name.

`score`, `search`, `train` and `evaluate` use these functions, so that they agree on the outputs of a model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from slimming.errors import ConfigError

CLASSES, BINARY, VALUES = "classes", "binary", "values"
"""Kinds of outputs: logits of classes, which are compared after a softmax; logits of single yes-or-no answers, which
are compared after a sigmoid; and other values."""
ON_THE_WAY = re.compile(
    r"(^|_)(attentions?|hidden_states|past_key_values|cache)$|^(auxiliary|enc|init|initial|intermediate)_|^denoising"
)
"""Names of values that a model computes on the way, or for its loss only; they do not count."""
LAST_STATE = re.compile(r"(^|_)last_hidden_state$")
"""The last of these values counts if the model returns no logits, as in an encoder."""
NO_CLASSES = re.compile(r"(^|_)(heatmaps|depth|embeds?)$")
"""Names of outputs that are no logits, whatever their shape."""
WAY_OUT = "Pass your own function as loss, see `slimming.train`, or wrap the model in a module that returns {}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountedOutput:
    """An output that counts in a score.

    Attributes:
        name: its path in what the model returns, such as ``"logits"``, ``"1"`` or ``"heads.box"``; ``"output"`` if the
            model returns one tensor.
        kind: ``"classes"``, ``"binary"`` or ``"values"``.
        scale: what the output is divided by: 1 for a single output. For one of several, the square root of its spread
            between images: the variance, summed over the values; for logits, twice the mean KL divergence of the
            predictions from their mean, summed over the predictions.
    """

    name: str
    kind: str
    scale: float = 1.0


def named_outputs(output: Any, images: int) -> dict[str, Tensor]:
    """Return the outputs that count, by name.

    These are the floating-point tensors with one entry per image in nested tuples, lists, dicts, dataclasses and the
    outputs of transformers. A tensor that is returned twice counts once. Hidden states, attentions and caches do not
    count, except the last hidden state of a model without logits.

    Args:
        output: what the model returned.
        images: number of images that the model was given.

    Raises:
        ConfigError: there is no such tensor.

    >>> import torch
    >>> boxes, best = torch.randn(2, 4), torch.tensor([1, 0])
    >>> list(named_outputs({"class": torch.randn(2, 3), "box": [boxes], "again": boxes, "best": best}, 2))
    ['class', 'box.0']
    """
    found: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for path, tensor in _tensors(output, ()):
        if any(ON_THE_WAY.search(part) for part in path):
            continue
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.is_floating_point() and tensor.ndim and len(tensor) == images and key not in seen:
            seen.add(key)
            found[".".join(path) or "output"] = tensor
    if any(name.endswith("logits") for name in found):
        found = {name: tensor for name, tensor in found.items() if not any(map(LAST_STATE.search, name.split(".")))}
    if not found:
        raise ConfigError(
            f"The model gives {type(output).__name__}, in which there is no floating-point tensor with one entry per "
            f"image. {WAY_OUT.format('such a tensor')}"
        )
    return found


def named_tensors(value: Any) -> dict[str, Tensor]:
    """Return all tensors in a nested value, by their paths."""
    return {".".join(path) or "output": tensor for path, tensor in _tensors(value, ())}


def _tensors(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield the tensors in a nested value with their paths."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, Mapping):  # a dict, or an output of transformers
        items = [(str(key), item) for key, item in value.items()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or map(str, range(len(value)))  # of a named tuple
        items = list(zip(names, value, strict=True))
    elif isinstance(logits := getattr(value, "logits", None), Tensor):
        items = [("logits", logits)]
    else:
        return
    for name, item in items:
        yield from _tensors(item, (*path, name))


def kind_of(name: str, tensor: Tensor, *, single: bool, classes: int) -> str:
    """Return the kind of an output, see `CountedOutput`.

    Logits (B, queries, K) with exactly one entry per class of the model have no entry for "nothing", so each of them is
    a yes-or-no answer, as in detectors that are trained with a focal loss.

    Args:
        name: its name.
        tensor: its value.
        single: whether it is the only one; it is then taken for logits if it has one entry per class of the model.
        classes: number of classes of the model; 0 if it has none.
    """
    dim = class_dim(tensor, classes) if tensor.ndim > 1 else 0
    named = name.endswith("logits") and tensor.ndim <= 3
    if named and tensor.ndim == 3 and tensor.shape[2] == classes:
        return BINARY
    if tensor.ndim < 2 or tensor.shape[dim] < 2:
        return VALUES
    if single and not NO_CLASSES.search(name):
        return CLASSES if classes > 1 and (named or tensor.shape[dim] == classes) else VALUES
    return CLASSES if named else VALUES


def class_dim(logits: Tensor, classes: int) -> int:
    """Return the dimension of the classes in logits: (B, K), (B, K, H, W), or (B, queries, K).

    Three dimensions are taken as (B, K, N) if only then K is ``classes``.
    """
    return 2 if logits.ndim == 3 and not logits.shape[1] == classes != logits.shape[2] else 1


def logits_by_head(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return the logits of the class head, and those of the distillation head or None, from the output of a model.

    Args:
        output: logits (B, K); a pair of logits of the same shape, which timm's distilled models return in training; or
            nested outputs, of which one is called ``logits`` or there is only one.

    Raises:
        ConfigError: the output contains no logits, or several tensors of which none is called ``logits``.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits, None
    if isinstance(logits, tuple) and len(logits) == 2 and all(isinstance(item, Tensor) for item in logits):
        first, second = logits
        if first.shape == second.shape and first.ndim == 2:
            return first, second
    images = next((len(tensor) for _, tensor in _tensors(output, ()) if tensor.ndim), 0)
    named = named_outputs(output, images)
    chosen = [name for name in named if name.rpartition(".")[2] == "logits"] or list(named)
    if len(chosen) == 1:
        return named[chosen[0]], None
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
    raise ConfigError(
        f"The model gives {len(named)} outputs ({shapes}), none of which is called logits, so that its classes are "
        f"unknown. {WAY_OUT.format('the logits of its classes')}"
    )
