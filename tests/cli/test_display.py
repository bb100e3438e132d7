"""What files name is shown without control characters, and what is handed on names no place of this machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

import slimming as package
from slimming.core.files import seal

from .conftest import ARGUMENTS, Call

ESCAPE, BIDI = "\x1b[2J\x1b]0;owned\x07", "\u202egnp"


def test_names_are_shown_escaped_by_errors(slimming: Call, tmp_path: Path) -> None:
    done = slimming("eval", tmp_path / f"no{ESCAPE}{BIDI}")
    assert done.code == 2
    assert done.err.rstrip("\n").isprintable()
    assert "no\\x1b[2J\\x1b]0;owned\\x07\\u202egnp" in done.err


@pytest.mark.filterwarnings("ignore")
def test_class_names_and_file_names_are_shown_escaped(slimming: Call, site: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("dark", f"light{ESCAPE.replace('/', '')}"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(2):
                Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(folder / f"{index}{BIDI}.png")
            (folder / f"bad{ESCAPE}.png").write_bytes(b"no image")
    words = ["--model.checkpoint", site / "dense.safetensors", "--data.max_unreadable", "1"]
    done = slimming("search", site / "config.yaml", "--data.source", tmp_path / "images", *words,
                    "--output", tmp_path / f"out{ESCAPE}")  # fmt: skip
    assert done.code == 0, done.err
    for text in (done.out, done.err):
        assert "\x1b[2J" not in text
        assert "\x07" not in text
        assert "\u202e" not in text


def test_what_is_handed_on_names_no_directory_of_this_machine(finished: Path, slimming: Call, tmp_path: Path) -> None:
    assert slimming("push", finished / "macs-0.70" / "slim", "--to", tmp_path / "pushed").code == 0
    handed = [finished / name for name in ("results.json", "report.html", "table.md")]
    handed += [*(finished / "macs-0.70").rglob("provenance.json"), *(finished / "macs-0.70").rglob("structure.json")]
    handed += [path for path in (tmp_path / "pushed").iterdir() if path.suffix in (".json", ".md")]
    assert len(handed) > 8
    for path in handed:
        text = path.read_text("utf-8")
        assert str(finished.parent) not in text, path
        assert "/tmp/" not in text, path
    assert json.loads((finished / "results.json").read_text())["data"]["source"] == "images"


def test_a_run_goes_on_only_with_the_data_that_it_had(
    site: Path, finished: Path, slimming: Call, tmp_path: Path
) -> None:
    """Results name only the last component of a path, so other data of the same name must be told apart."""
    copied = shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(site / "images", tmp_path / "images")
    done = slimming("run", site / "config.yaml", "--data.source", tmp_path / "images", "--output", copied)
    assert done.code == 2, done.out
    assert "data.source" in done.err


NASTY = "a|b`c`[d](javascript:e)<img src=x onerror=f>\n# g</script><!--"


def test_tables_cards_and_reports_show_marks_instead_of_using_them(
    slimming: Call, finished: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(finished, tmp_path / "run")
    results = json.loads((copied / "results.json").read_text())
    del results["sha256"]
    results["name"] = results["model"]["name"] = results["data"]["source"] = results["model"]["classes"][0] = NASTY
    (copied / "results.json").write_text(json.dumps(seal(results)))
    assert slimming("report", copied).code == 0
    table, page = (copied / "table.md").read_text("utf-8"), (copied / "report.html").read_text("utf-8")
    assert "<img" not in table
    assert "\n# g" not in table
    assert r"a\|b\`c\`\[d\]" in table
    assert "<img src=x" not in page
    assert page.count("</script>") == len(re.findall("<script", page))
    package.save(
        timm.create_model("vit_tiny_patch16_224", **ARGUMENTS), tmp_path / "dense", {"data": {"source": NASTY}}
    )
    assert slimming("push", tmp_path / "dense", "--to", tmp_path / "pushed").code == 0
    body = (tmp_path / "pushed" / "README.md").read_text("utf-8").split("---", 2)[2]
    assert "\n# g" not in body
    assert "`` a|b`c`[d]" in body
