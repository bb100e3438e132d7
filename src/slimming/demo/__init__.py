"""The settings and files of the demo: a small Vision Transformer trained on EuroSAT, and a subset of the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def settings() -> dict[str, Any]:
    """Return the settings of the demo with the paths of the embedded files.

    Paths below the working directory are relative, so that results do not contain paths of this machine.
    """
    here = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
    values = yaml.safe_load((HERE / "demo.yaml").read_text("utf-8"))
    values["model"]["checkpoint"] = str(here / values["model"]["checkpoint"])
    values["data"]["source"] = str(here / values["data"]["source"])
    return values
