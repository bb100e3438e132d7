"""The embedded job: a small Vision Transformer trained on EuroSAT, and a subset of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def settings() -> dict[str, Any]:
    """The settings of the demo's run, with the embedded files where this installation has them.

    Paths below the working directory are relative to it: results and reports are passed on, a machine's paths are not.
    """
    here = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
    values = yaml.safe_load((HERE / "demo.yaml").read_text("utf-8"))
    values["model"]["checkpoint"] = str(here / values["model"]["checkpoint"])
    values["data"]["source"] = str(here / values["data"]["source"])
    return values
