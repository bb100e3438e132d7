"""From `slimming export … --to pt2` to Core ML, for Apple's devices.

    pip install coremltools
    python examples/export/to_coreml.py photos-export/model.pt2 model.mlpackage

The file says how an image becomes the input under the key "slimming". On macOS the result is compared with the program;
elsewhere Core ML does not run.
"""

from __future__ import annotations

import argparse
import platform
import shutil
from pathlib import Path


def main() -> None:
    """Convert, write, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="model.pt2")
    parser.add_argument("output", type=Path, help="model.mlpackage")
    parser.add_argument("--tolerance", type=float, default=2e-2, help="as a share of the largest logit")
    arguments = parser.parse_args()

    import coremltools as ct
    import torch

    about = {"slimming.json": ""}
    program = torch.export.load(arguments.program, extra_files=about)
    image = torch.randn(program.example_inputs[0][0].shape)
    model = ct.convert(program.run_decompositions({}), outputs=[ct.TensorType(name="logits")])
    model.user_defined_metadata["slimming"] = str(about["slimming.json"])
    model.save(str(arguments.output))
    if platform.system() != "Darwin":
        print(f"{arguments.output}: written, not compared")
        return
    with torch.no_grad():
        wanted = program.module()(image)
    name = model.get_spec().description.input[0].name
    found = torch.from_numpy(model.predict({name: image.numpy()})["logits"])
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    print(f"{arguments.output}: logits differ by up to {difference:.1e} of the largest")
    if not difference <= arguments.tolerance:
        shutil.rmtree(arguments.output)
        raise SystemExit("The difference is too large; the package was removed.")


if __name__ == "__main__":
    main()
