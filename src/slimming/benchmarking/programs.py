"""Export models with `torch.export` and to ONNX, and open ONNX files in ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimming.core.example_inputs import ExampleCall
from slimming.core.modules import MODEL_ERRORS
from slimming.errors import ConfigError, UnsupportedModelError

OPSET = 20
"""The first opset with GELU as one operation; supported by onnxruntime and onnxruntime-web since 1.17."""
INPUT, OUTPUT = "image", "logits"


def to_program(model: nn.Module, example: Any, *, any_batch: bool) -> Any:
    """Return the `torch.export` program of ``model``.

    Args:
        model: a model in evaluation mode; it is not changed.
        example: an example call, see `ExampleCall.of`; with ``any_batch``, of one tensor for 2 images or more.
        any_batch: make the batch size dynamic, instead of fixing it to that of the example.

    Raises:
        UnsupportedModelError: the model cannot be exported, or not with a dynamic batch size.
    """
    call = ExampleCall.of(example)
    # By position, since models name their input differently.
    shapes = ({0: torch.export.Dim("batch", min=1, max=1 << 16)},) if any_batch else None
    with _exporting(model, "exported"):
        return torch.export.export(model, call.args, dict(call.kwargs), dynamic_shapes=shapes, strict=False)


def write_onnx(
    model: nn.Module,
    example: Any,
    file: Path,
    *,
    any_batch: bool = False,
    program: Any = None,
    opset: int = OPSET,
    outputs: Sequence[str] = (),
) -> None:
    """Write ``model`` to an ONNX file that contains all weights.

    The input of a model of images is called `INPUT`, and its output `OUTPUT`. Keyword arguments keep their names.

    Args:
        model: a model in evaluation mode; it is not changed.
        example: an example call, see `to_program`.
        file: path of the file.
        any_batch: make the batch size dynamic, instead of fixing it to that of the example.
        program: result of `to_program`, if the model was exported before.
        opset: version of the ONNX operator set.
        outputs: names of the outputs, if there are several.

    Raises:
        UnsupportedModelError: the model cannot be exported, or is larger than one ONNX file may be (2 GB).
    """
    call = ExampleCall.of(example)
    program = program if program is not None else to_program(model, call, any_batch=any_batch)
    of_image = not call.kwargs and len(call.tensors) == 1
    made = [spec for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    names: dict[str, Any] = {"input_names": [INPUT]} if of_image else {}
    names |= {"output_names": list(outputs) if len(made) > 1 else [OUTPUT]} if outputs or len(made) == 1 else {}
    _drop_checks_(program.graph_module.graph)
    with _exporting(model, "exported to ONNX"):
        exported = torch.onnx.export(program, (), dynamo=True, verbose=False, opset_version=opset, **names)
        assert exported is not None
        exported.save(file, external_data=False)


def _drop_checks_(graph: fx.Graph) -> None:
    """Remove the checks of values from a graph: ONNX has none."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and "_assert" in str(node.target) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def open_onnx(file: Path, provider: str = "CPUExecutionProvider") -> Any:
    """Return an ONNX Runtime session of ``file`` with the same number of threads as PyTorch.

    Raises:
        ConfigError: the installed ONNX Runtime has no such provider.
    """
    import onnxruntime as ort  # pyright: ignore

    if provider not in ort.get_available_providers():
        raise ConfigError(f"This ONNX Runtime has no {provider}: install onnxruntime-gpu, or measure on the CPU.")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return ort.InferenceSession(file, options, providers=[provider])


def onnx_feed(session: Any, call: ExampleCall) -> dict[str, Any]:
    """The inputs of a session for a call like that of the export: by name, or else in order."""
    names = [each.name for each in session.get_inputs()]
    named = {name: value for name, value in call.kwargs.items() if isinstance(value, Tensor)}
    if set(names) <= set(named):
        return {name: named[name].detach().cpu().numpy() for name in names}
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, call.tensors, strict=False)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of exporters and runtimes: on stdout, warnings, and log messages up to WARNING."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _exporting(model: nn.Module, action: str) -> Iterator[None]:
    with quiet(), torch.no_grad():
        try:
            yield
        except OSError:  # caused by the disk, not by the model
            raise
        except MODEL_ERRORS as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            first = (str(cause).strip().splitlines() or [""])[0][:200]
            of_ours = type(model).__module__.startswith("slimming.")
            inner = model._modules.get("model") if of_ours else model
            raise UnsupportedModelError(
                f"This {type(inner or model).__name__} cannot be {action} ({type(cause).__name__}: {first}). "
                "It can be run in PyTorch, and measured with runtime eager."
            ) from error
