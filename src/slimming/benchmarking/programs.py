"""Models as programs without Python: torch.export's, and ONNX made from it. The one exporter of the package."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.errors import ConfigError, UnsupportedModelError

OPSET = 20
"""The first opset with GELU as one operation; onnxruntime and onnxruntime-web run it since 1.17."""
INPUT, OUTPUT = "image", "logits"


def to_program(model: nn.Module, x: Tensor, *, any_batch: bool) -> Any:
    """The torch.export program of ``model``.

    Args:
        model: in evaluation mode; it is not changed.
        x: an input, (B, C, H, W); with ``any_batch``, B is 2 or more.
        any_batch: leave the batch size open, instead of that of ``x``.

    Raises:
        UnsupportedModelError: the model cannot be exported, or not with an open batch size.
    """
    # By position, whatever the model calls its input.
    shapes = ({0: torch.export.Dim("batch", min=1, max=1 << 16)},) if any_batch else None
    with _exporting(model, "exported"):
        return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)


def write_onnx(
    model: nn.Module, x: Tensor, file: Path, *, any_batch: bool = False, program: Any = None, opset: int = OPSET
) -> None:
    """Write ``model`` to an ONNX file with all weights in it; its input is called `INPUT`, its output `OUTPUT`.

    Args:
        model: in evaluation mode; it is not changed.
        x: an input, (B, C, H, W); with ``any_batch``, B is 2 or more.
        file: where to.
        any_batch: leave the batch size open, instead of that of ``x``.
        program: what `to_program` made of the model, if it was made before.
        opset: version of ONNX's operations.

    Raises:
        UnsupportedModelError: the model cannot be exported, or is larger than one ONNX file may be (2 GB).
    """
    program = program if program is not None else to_program(model, x, any_batch=any_batch)
    with _exporting(model, "exported to ONNX"):
        found = torch.onnx.export(
            program, (), dynamo=True, verbose=False, opset_version=opset, input_names=[INPUT], output_names=[OUTPUT]
        )
        assert found is not None
        found.save(file, external_data=False)


def open_onnx(file: Path, provider: str = "CPUExecutionProvider") -> Any:
    """An ONNX Runtime session of ``file``, with as many threads as PyTorch has.

    Raises:
        ConfigError: this ONNX Runtime has no such provider.
    """
    import onnxruntime as ort  # pyright: ignore

    if provider not in ort.get_available_providers():
        raise ConfigError(f"This ONNX Runtime has no {provider}: install onnxruntime-gpu, or measure on the CPU.")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return ort.InferenceSession(file, options, providers=[provider])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what exporters and runtimes say of themselves: on stdout, in warnings and in logs of advice."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _exporting(model: nn.Module, what: str) -> Iterator[None]:
    with quiet(), torch.no_grad():
        try:
            yield
        except OSError:  # of the disk, and not of the model
            raise
        except Exception as error:  # the exporter raises whatever it meets
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            first = (str(cause).strip().splitlines() or [""])[0][:200]
            raise UnsupportedModelError(
                f"This {type(model).__name__} cannot be {what} ({type(cause).__name__}: {first}). "
                "It runs in PyTorch, and is measured with runtime eager."
            ) from error
