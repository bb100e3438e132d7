"""From `slimming export … --to onnx` to a TensorRT engine, for NVIDIA's GPUs.

    pip install tensorrt
    python examples/export/to_tensorrt.py photos-export/model.onnx model.plan --largest 32

Not run here. An engine holds for one kind of GPU and one version of TensorRT. Compare it with the ONNX file before you
use it: polygraphy run photos-export/model.onnx --trt --onnxrt --atol 1e-2
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Parse, build, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model.onnx")
    parser.add_argument("output", type=Path, help="model.plan")
    parser.add_argument("--usual", type=int, default=1, help="batch size that the engine is tuned for")
    parser.add_argument("--largest", type=int, default=32, help="largest batch size that it takes")
    arguments = parser.parse_args()

    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network()
    reader = trt.OnnxParser(network, logger)
    if not reader.parse(arguments.model.read_bytes()):
        raise SystemExit("\n".join(str(reader.get_error(k)) for k in range(reader.num_errors)))
    image = tuple(network.get_input(0).shape)[1:]
    profile = builder.create_optimization_profile()
    profile.set_shape("image", (1, *image), (arguments.usual, *image), (arguments.largest, *image))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise SystemExit("TensorRT built no engine; its messages stand above.")
    arguments.output.write_bytes(engine)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
