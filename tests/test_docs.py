"""The documentation is true: its Python runs, its commands parse, its tables and links are up to date."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image

import slimming
import slimming.errors
from clocks import CountingClock
from slimming.cli.configs import config_from_values
from slimming.cli.entry import COMMANDS, make_parser
from slimming.core.yaml_text import read_yaml
from slimming.planning import latency_measurement
from slimming.runs.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
NOTES = sorted((ROOT / "benchmarks" / "notes").glob("*.md"))
REFERENCE = {"api", "configuration", "models", "glossary"}
LONGEST = 2000
"""Words of a page that is no reference, without the parts that are made from results and code."""
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CLASSES = ("field", "forest", "river")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    line: int  # of its first line of content
    language: str
    text: str


def blocks(text: str, *languages: str) -> list[Block]:
    found = [Block(text[: match.start(2)].count("\n") + 1, match[1], match[2]) for match in FENCE.finditer(text)]
    return [block for block in found if block.language in languages]


def run_blocks(page: Path) -> None:
    """Run the Python blocks of a page in order, in one namespace; tracebacks show the page's own lines."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page.read_text("utf-8"), "python"):
        program = "\n" * (block.line - 1) + block.text
        exec(compile(program, str(page), "exec"), namespace)


def page_id(page: Path) -> str:
    return page.stem


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory like a reader's: images in `photos`, and pretrained models that need no network.

    A pretrained model is a tiny one with random weights, whatever its name, and a latency table's times are counted,
    since no timing decides a test; all else is as for a reader.
    """
    make_photos(tmp_path / "photos")
    make: Callable[..., Any] = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        if not pretrained or name.startswith("local-dir:"):
            return make(name, pretrained=pretrained, **options)
        return make("test_vit", img_size=32, patch_size=8, num_classes=options.get("num_classes", 1000))

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(latency_measurement, "Clock", CountingClock)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_photos(root: Path) -> None:
    """Write class folders of tiny images, each class of its own colour."""
    random = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for channel, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 127
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")


WITH_PYTHON = [page for page in PAGES if blocks(page.read_text("utf-8"), "python")]


@pytest.mark.parametrize(
    "page",
    WITH_PYTHON,
    ids=page_id,
)
def test_python_of_the_page_runs(page: Path, workplace: Path) -> None:
    run_blocks(page)


def test_a_wrong_block_fails_with_the_line_of_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\nText.\n\n```python\nassert x == 2\n```\n", "utf-8")
    with pytest.raises(AssertionError) as caught:
        run_blocks(page)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == (str(page), 10)


def commands(text: str) -> list[list[str]]:
    """The words of every `slimming` command in the shell blocks of a page, launchers in front left out."""
    found = []
    for block in blocks(text, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "slimming" in words[:-1] and words[words.index("slimming") + 1] in COMMANDS:
                found.append(words[words.index("slimming") + 1 :])
    return found


WITH_COMMANDS = [page for page in PAGES if commands(page.read_text("utf-8"))]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=page_id)
def test_commands_of_the_page_parse(page: Path) -> None:
    for name, *rest in commands(page.read_text("utf-8")):
        make_parser(name).parse_args(rest)


def test_a_wrong_command_fails() -> None:
    (name, *rest), *others = commands("```sh\ntorchrun slimming run a.yaml \\\n    --outptu b\nls slimming\n```\n")
    assert others == []
    with pytest.raises(slimming.errors.ConfigError, match="--output"):
        make_parser(name).parse_args(rest)


WITH_YAML = [page for page in PAGES if blocks(page.read_text("utf-8"), "yaml")]


@pytest.mark.parametrize("page", WITH_YAML, ids=page_id)
def test_configurations_of_the_page_are_whole(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text("utf-8"), "yaml"):
        file = tmp_path / "config.yaml"
        file.write_text(block.text, "utf-8")
        config_from_values(RunConfig, read_yaml(file))


def fill_tables() -> ModuleType:
    return script("fill_tables")


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_made_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text("utf-8")
    assert fill_tables().filled(text) == text, "run: python docs/fill_tables.py"


def test_pictures_of_results_are_up_to_date() -> None:
    for name, picture in script("make_pictures").from_results().items():
        committed = (ROOT / "docs" / "images" / name).read_text("utf-8")
        # Where words of a chart stand depends on the fonts of a machine; what is drawn does not.
        for part in (r' d="([^"]+)"', r">([^<>]+)</text>", r"<(?:rect|style)[^>]*>[^<]*"):
            assert re.findall(part, committed) == re.findall(part, picture), "run: python docs/make_pictures.py"


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"([\w/-]+(?:\.md|/))$", (ROOT / "mkdocs.yml").read_text("utf-8"), flags=re.MULTILINE))
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in DOCS]
    assert [page for page in pages if page not in named and f"{page.rpartition('/')[0]}/" not in named] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in REFERENCE], ids=page_id)
def test_a_page_can_be_read_in_one_sitting(page: Path) -> None:
    written = fill_tables().PART.sub("", page.read_text("utf-8"))
    assert len(written.split()) <= LONGEST


def test_every_result_is_named_with_its_note() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    results = [path.stem for path in (ROOT / "benchmarks" / "results").glob("*.md")]
    assert [name for name in results if f"(results/{name}.md)" not in text and f"(notes/{name}.md)" not in text] == []
    for note in NOTES:
        assert f"(notes/{note.name})" in text
        assert f"\nTable: [{note.name}](../results/{note.name})\n" in note.read_text("utf-8")


def test_every_setting_is_explained() -> None:
    made = fill_tables()
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    for name in made.CONFIGS:
        assert f"<!-- config:{name} -->" in text
        # A field without a line in the class's docstring raises here.
        assert made.config_table(name).count("\n") > 1


def test_every_public_name_has_an_entry_with_an_example() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    entries = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    by_name = {entry.partition("\n")[0].strip("` "): entry for entry in entries}
    assert sorted(by_name) == sorted(set(dir(slimming)) - {"errors"})  # the module has a section of its own
    for name, entry in by_name.items():
        assert f"<!-- api:{name} -->" in entry
        assert any(re.search(rf"\b{name}\b", block.text) for block in blocks(entry, "python")), name


RESULTS = {
    "name": "a run",
    "seed": 0,
    "model": {"name": "vit", "input": [3, 64, 64]},
    "data": {"source": "photos", "note": "", "train_images": 90, "val_images": 9},
    "machine": {"cpu": "a CPU", "gpu": None, "threads": 2},
    "versions": {"torch": "2"},
    "dense": {
        "name": "dense", "params": 1_250_000, "macs": 90_000_000, "memory_bytes": 2**20, "top1": 0.95,
        "latency_ms": {"1": {"median": 2.0, "p25": 1.5, "p75": 2.5}},
    },
    "rows": [
        {
            "name": "macs-0.50", "params": 625_000, "macs": 45_000_000, "memory_bytes": 2**19,
            "latency_ms": {"1": {"median": 1.0, "p25": 0.9, "p75": 1.1}},
            "speedup": {"1": {"median": 2.0, "p25": 1.8, "p75": 2.2}},
            "top1_cut": 0.5, "top1": 0.94,
        }
    ],
}  # fmt: skip


def test_a_summary_of_accuracies_takes_means_and_the_best_criterion() -> None:
    def row(top1: float) -> dict[str, Any]:
        return {"macs": 0.5, "top1": top1, "retrained": {"0.5": 0.1, "3.0": top1 + 0.1}}

    methods = {"one-shot": 0.80, "search": 0.79, "taylor, global": 0.5, "magnitude, per layer": 0.7, "paper": 0.9}
    rows = {}
    for budget in ("0.5", "0.3"):
        for method, top1 in methods.items():
            for seed in (0, 1):
                rows[f"vit/all/{method}/{budget}/{seed}"] = row(top1 + 0.02 * seed)
        rows[f"vit/mlp/one-shot/{budget}/0"] = row(0.0)  # of one kind alone: not in the summary
    header, lines = fill_tables().accuracy_summary({"rows": rows, "dense": {"vit": {"top1": {"0": 0.8, "1": 0.9}}}})
    assert [len(line) for line in lines] == [len(header)] * 2
    assert lines[0] == [
        "vit", "85.0%", "50%", "81.0%", "80.0%", "71.0%", "3", "91.0%", "90.0%", "81.0%"
    ]  # fmt: skip


def test_the_table_of_a_run_shows_its_numbers() -> None:
    lines = fill_tables().run_table(RESULTS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert len({len(row) for row in cells}) == 1
    assert cells[2] == ["dense", "1.25 M", "90.0 M", "1.00 MiB", "2.00 (1.50–2.50)", "1", "", "95.0 %"]
    assert cells[3][-3:] == ["2.00× (1.80–2.20)", "50.0 %", "94.0 %"]
    assert "a CPU" in lines[-1]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md", *NOTES], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), target
        if anchor:
            assert anchor in anchors(aim.read_text("utf-8")), target


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
