"""The registry of the runtimes in which models are timed. Imports no PyTorch, so that ``--help`` is fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimming.errors import ConfigError, MissingExtraError, nearest

if TYPE_CHECKING:
    from torch import nn

    from slimming.core.example_inputs import ExampleCall


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One way to run a model.

    Attributes:
        description: the software that runs the model.
        prepare: returns a module that runs a model in evaluation mode, for calls like the given one.
        check: raises `MissingExtraError` if its library is not installed.
    """

    description: str
    prepare: Callable[[nn.Module, ExampleCall], nn.Module]
    check: Callable[[], None] = lambda: None


def check_onnx() -> None:
    """Check that the libraries that write and run ONNX are installed.

    Raises:
        MissingExtraError: one is not.
    """
    try:
        import onnxruntime  # pyright: ignore # noqa: F401
        import onnxscript  # pyright: ignore # noqa: F401
    except ImportError as error:
        raise MissingExtraError("ONNX Runtime is not installed: pip install 'slimming[onnx]'.") from error


def _compiled(model: nn.Module, call: ExampleCall) -> nn.Module:
    from slimming.benchmarking.runtime_modules import compiled

    return compiled(model, call)


def _onnx_runtime(model: nn.Module, call: ExampleCall) -> nn.Module:
    from slimming.benchmarking.runtime_modules import OnnxRuntime

    return OnnxRuntime(model, call)


RUNTIMES: Mapping[str, Runtime] = {
    "eager": Runtime(description="PyTorch as it is", prepare=lambda model, call: model),
    "compile": Runtime(description="torch.compile", prepare=_compiled),
    "onnxruntime": Runtime(description="ONNX Runtime", prepare=_onnx_runtime, check=check_onnx),
}
"""Every runtime by name, the default first."""


def check_runtime(name: str) -> None:
    """Check that there is a runtime called ``name`` and that its library is installed.

    Raises:
        ConfigError: there is no such runtime.
        MissingExtraError: its library is not installed.
    """
    if name not in RUNTIMES:
        raise ConfigError(f"There is no runtime {name!r}; runtimes are {', '.join(RUNTIMES)}.{nearest(name, RUNTIMES)}")
    RUNTIMES[name].check()


def prepare(model: nn.Module, example: Any, runtime: str) -> nn.Module:
    """Return a module that runs ``model`` in evaluation mode in ``runtime``, for calls like ``example``.

    Args:
        model: any module; it is not changed.
        example: an example call with the batch size, dtype and device of later ones: an `ExampleCall`, or what
            `ExampleCall.of` takes, such as a tensor of images.
        runtime: one of `RUNTIMES`.

    Raises:
        ConfigError: there is no such runtime, or it does not support the device of the example.
        MissingExtraError: the runtime is not installed.
        UnsupportedModelError: the model cannot be exported.
    """
    check_runtime(runtime)
    from slimming.core.example_inputs import ExampleCall

    return RUNTIMES[runtime].prepare(model, ExampleCall.of(example))
