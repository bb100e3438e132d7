"""From `slimming export … --to pt2` to ExecuTorch, for phones and small devices.

    pip install executorch
    python examples/export/to_executorch.py photos-export/model.pt2 model.pte [--batch 1]

ExecuTorch plans the memory of the largest batch ahead, so the batch size is fixed here. XNNPACK takes what it can; the
rest runs in portable kernels. The result is compared with the program.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Lower, write, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="model.pt2")
    parser.add_argument("output", type=Path, help="model.pte")
    parser.add_argument("--batch", type=int, default=1, help="images that go through at once")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="as a share of the largest logit")
    arguments = parser.parse_args()

    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.load(arguments.program)
    image = torch.randn(arguments.batch, *program.example_inputs[0][0].shape[1:])
    fixed = torch.export.export(program.module(), (image,))
    lowered = to_edge_transform_and_lower(fixed, partitioner=[XnnpackPartitioner()]).to_executorch()
    arguments.output.write_bytes(lowered.buffer)

    method = Runtime.get().load_program(arguments.output).load_method("forward")
    with torch.no_grad():
        wanted = program.module()(image)
    difference = float((method.execute([image])[0] - wanted).abs().max() / wanted.abs().max())
    print(f"{arguments.output}: logits differ by up to {difference:.1e} of the largest")
    if not difference <= arguments.tolerance:
        arguments.output.unlink()
        raise SystemExit("The difference is too large; the file was removed.")


if __name__ == "__main__":
    main()
