"""The registry of export targets, with the functions that write and run their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimming.benchmarking.programs import onnx_feed, open_onnx, quiet, to_program, write_onnx
from slimming.benchmarking.runtimes import check_onnx
from slimming.core.example_inputs import ExampleCall
from slimming.errors import ConfigError, MissingExtraError, UnsupportedModelError, nearest
from slimming.exporting.metadata import KEY

Run = Callable[[ExampleCall], list[np.ndarray]]
"""A function from the arguments of the model, in float32 on the CPU, to its outputs."""


class Job:
    """The export of one model; the program and the ONNX file are created once for all targets.

    Args:
        model: a model with one or more tensors as output, in evaluation mode, float32, on the CPU.
        example: an example call; with ``any_batch``, of one tensor of images.
        description: see `slimming.exporting.metadata.description`.
        calibration: calls with the calibration images of static quantisation.
        opset: version of the ONNX operator set.
        workplace: a directory for temporary files.
        outputs: names of the outputs.
        any_batch: whether the batch size of the files is dynamic.
    """

    def __init__(
        self,
        model: nn.Module,
        example: ExampleCall,
        description: Mapping[str, Any],
        calibration: Sequence[ExampleCall],
        opset: int,
        workplace: Path,
        outputs: Sequence[str],
        any_batch: bool,
    ) -> None:
        self.model, self.calibration, self.opset, self.workplace = model, calibration, opset, workplace
        self.description = json.dumps(description)
        self.outputs, self.any_batch = outputs, any_batch
        # torch.export treats sizes 0 and 1 as constants.
        self.example = example.with_batch(2) if any_batch else example

    @cached_property
    def program(self) -> Any:
        """The model as a `torch.export` program."""
        return to_program(self.model, self.example, any_batch=self.any_batch)

    @cached_property
    def onnx(self) -> Path:
        """The model as an ONNX file."""
        file = self.workplace / "float.onnx"
        outputs = self.outputs if len(self.outputs) > 1 else ()
        write_onnx(self.model, self.example, file, program=self.program, opset=self.opset, outputs=outputs)
        _describe_onnx(file, self.description)
        return file


@dataclass(frozen=True, kw_only=True)
class Target:
    """An export target.

    Attributes:
        name: name in ``slimming.export(to=...)``.
        suffix: suffix of the file.
        what: description in a few words.
        tolerance: largest difference from the model as a share of the model's largest logit; None: not checked.
        agreement: smallest share of images with the same top-1 class as the model; None: not checked.
        check: raises MissingExtraError if the library is not installed.
        write: writes the file.
        open: returns a function that runs the file.
        companions: suffixes of further files of the target, which replace ``suffix``.
    """

    name: str
    suffix: str
    what: str
    tolerance: float | None
    agreement: float | None
    check: Callable[[], None]
    write: Callable[[Job, Path], None]
    open: Callable[[Path], Run]
    companions: tuple[str, ...] = ()

    def files(self, directory: Path, stem: str) -> list[Path]:
        """Return the paths of the files; the first is the one to open."""
        return [directory / f"{stem}{suffix}" for suffix in (self.suffix, *self.companions)]


def choose(names: str | Sequence[str]) -> list[Target]:
    """Return the targets called ``names`` after checking that their libraries are installed.

    Raises:
        ConfigError: there is no such target, a target is given twice, or none is given.
        MissingExtraError: the library of a target is not installed.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"Give each target once; targets are {', '.join(TARGETS)}.")
    for name in names:
        if name not in TARGETS:
            hint = nearest(name, TARGETS)
            raise ConfigError(
                f"There is no target {name!r}; targets are {', '.join(TARGETS)}.{hint} For ExecuTorch, Core ML and "
                "TensorRT there are scripts in examples/export."
            )
        TARGETS[name].check()
    return [TARGETS[name] for name in names]


def _describe_onnx(file: Path, description: str) -> None:
    import onnx  # pyright: ignore

    proto = onnx.load(file)
    # The exporter stores module names and source lines with each node, which make up half of a small file.
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    del proto.graph.value_info[:]  # runtimes infer the shapes; those of the exporter of PyTorch 2.8 can be wrong
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    proto.producer_name = "slimming"
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, description
    onnx.save(proto, file)


def _nothing() -> None:
    """PyTorch is always installed."""


def _write_pt2(job: Job, file: Path) -> None:
    with quiet():
        torch.export.save(job.program, file, extra_files={f"{KEY}.json": job.description})


def _open_pt2(file: Path) -> Run:
    with quiet():
        module = torch.export.load(file).module()
    return lambda call: [tensor.numpy() for tensor in tree_leaves(call.run(module))]


def _write_onnx(job: Job, file: Path) -> None:
    file.write_bytes(job.onnx.read_bytes())


def _open_onnx(file: Path) -> Run:
    session = open_onnx(file)
    return lambda call: session.run(None, onnx_feed(session, call))


def _write_dynamic(job: Job, file: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore

    # ONNX Runtime has no integer convolution with per-channel int8 weights on CPUs.
    _check_quantised(job, ("MatMul", "Gemm"), "onnx-int8-static quantises convolutions")
    with quiet():
        quantize_dynamic(
            job.onnx, file, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
        )
    _describe_onnx(file, job.description)


def _write_static(job: Job, file: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static  # pyright: ignore

    session = open_onnx(job.onnx)

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.calls: Iterator[ExampleCall] = iter(job.calibration)

        def get_next(self) -> Any:  # arrays by input; None at the end
            call = next(self.calls, None)
            return None if call is None else onnx_feed(session, call)

    with quiet():
        quantize_static(
            job.onnx,
            file,
            Images(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            # Matrix products in attention have no weights: quantising them reduces accuracy and not the file size.
            extra_options={"MatMulConstBOnly": True},
        )
    _describe_onnx(file, job.description)


def _check_quantised(job: Job, kinds: tuple[str, ...], instead: str) -> None:
    import onnx  # pyright: ignore

    graph = onnx.load(job.onnx, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    if not any(node.op_type in kinds and node.input[1] in weights for node in graph.node):
        raise UnsupportedModelError(f"The model has no layers that onnx-int8-dynamic quantises; {instead}.")


def _check_openvino() -> None:
    check_onnx()
    try:
        import openvino  # pyright: ignore # noqa: F401
    except ImportError as error:
        raise MissingExtraError("OpenVINO is not installed: pip install 'slimming[openvino]'.") from error


def _write_openvino(job: Job, file: Path, *, half: bool) -> None:
    import openvino  # pyright: ignore

    with quiet():
        converted = openvino.convert_model(job.onnx)
        converted.set_rt_info(job.description, [KEY])
        openvino.save_model(converted, file, compress_to_fp16=half)


def _open_openvino(file: Path) -> Run:
    import openvino  # pyright: ignore

    # By default, OpenVINO computes in bfloat16 on some CPUs.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(file, "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})

    def run(call: ExampleCall) -> list[np.ndarray]:
        named = {name: value for name, value in call.kwargs.items() if isinstance(value, Tensor)}
        names = [each.get_names() for each in compiled.inputs]
        if named and all(found & named.keys() for found in names):
            arrays = [named[next(iter(found & named.keys()))] for found in names]
        else:
            arrays = call.tensors
        result = compiled([array.numpy() for array in arrays])
        return [result[output] for output in compiled.outputs]

    return run


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="pt2", suffix=".pt2", what="torch.export program", tolerance=1e-5, agreement=None,
            check=_nothing, write=_write_pt2, open=_open_pt2,
        ),
        Target(
            name="onnx", suffix=".onnx", what="ONNX, float32", tolerance=1e-4, agreement=None,
            check=check_onnx, write=_write_onnx, open=_open_onnx,
        ),
        Target(
            name="onnx-int8-dynamic", suffix=".int8-dynamic.onnx", what="ONNX, linear layers in 8 bits",
            tolerance=None, agreement=0.95, check=check_onnx, write=_write_dynamic, open=_open_onnx,
        ),
        Target(
            name="onnx-int8-static", suffix=".int8-static.onnx", what="ONNX, weights and activations in 8 bits",
            tolerance=None, agreement=0.95, check=check_onnx, write=_write_static, open=_open_onnx,
        ),
        Target(
            name="openvino", suffix=".openvino.xml", companions=(".openvino.bin",), what="OpenVINO, float32",
            tolerance=1e-4, agreement=None, check=_check_openvino,
            write=lambda job, file: _write_openvino(job, file, half=False), open=_open_openvino,
        ),
        Target(
            name="openvino-fp16", suffix=".openvino-fp16.xml", companions=(".openvino-fp16.bin",),
            what="OpenVINO, weights in float16", tolerance=1e-2, agreement=None, check=_check_openvino,
            write=lambda job, file: _write_openvino(job, file, half=True), open=_open_openvino,
        ),
    )
}  # fmt: skip
