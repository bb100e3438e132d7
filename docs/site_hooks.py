"""Make the pages of the site that are no files of docs/; MkDocs calls the functions `on_…`.

- README.md is the first page; CONTRIBUTING.md and CHANGELOG.md have a page each.
- ``benchmarks/``: a page for every committed result with the note on it in benchmarks/notes, and benchmarks/README.md.
- ``reference/``: docstrings of the public names, divided like api.md, and of the modules in `MODULES`.
- ``commands.md``: the help of every command.

Links are those that work in the repository. What is linked but no page is copied to ``files/``.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import slimming
from slimming.cli.entry import COMMANDS, make_parser

sys.path.insert(0, str(Path(__file__).parent))
import fill_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOTES = ROOT / "benchmarks" / "notes"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/index.md",
}
"""Pages that lie outside docs/: place in the repository -> place in the site."""
ORIGINS = {site: source for source, site in PAGES.items()}
HAS_PAGE = {"coverage": "models.md"}
"""Results whose table is a page of docs/: they have no other page."""
MODULES = {
    "Errors": ("slimming.errors",),
    "Training": ("slimming.training.tasks", "slimming.training.samples"),
    "Measuring": ("slimming.benchmarking.timing", "slimming.benchmarking.runtimes"),
    "Families": ("slimming.models.family", "slimming.core.groups"),
}
"""Modules whose docstrings are shown whole, for those who build on them: title -> modules."""
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MATHS = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$")
MARKER = re.compile(r"^<!-- /?(results|summary|registry|config|api):[\w.]+ -->$", re.MULTILINE)
TABLE_LINK = re.compile(r"^Table: .*\n", re.MULTILINE)
"""The line of a note that leads to its table, which stands below it in the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages, and what pages link to outside docs/."""
    for source, site in PAGES.items():
        text = (ROOT / source).read_text("utf-8")
        # The first page has no neighbours to list beside it, and a wide table.
        text = f"---\nhide: [navigation]\n---\n\n{text}" if site == "index.md" else text
        files.append(File.generated(config, site, content=text))
    for site, text in (*benchmarks(), *reference(), ("commands.md", commands())):
        files.append(File.generated(config, site, content=text))
    for file in [file for file in files if file.is_documentation_page()]:
        for copied in sorted(linked_files(file.content_string, file.src_uri)):
            place = as_file(copied)
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / copied)))
    config.nav = expanded(config.nav or [], files)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where things lie in the site, and set formulas."""
    here = page.file.src_uri
    text = outside_code(MARKER.sub("", markdown), lambda part: MATHS.sub(formula, part))
    return outside_code(text, lambda part: LINK.sub(lambda link: f"]({aim(link[1], here)})", part))


def on_post_build(config: MkDocsConfig) -> None:
    """Fail when a page would fetch anything from elsewhere."""
    for page in Path(config.site_dir).rglob("*.html"):
        found = re.search(
            r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?https?://[^\">]+", page.read_text("utf-8")
        )
        if found:
            raise PluginError(f"{page.relative_to(config.site_dir)} loads from the network: {found[0]}")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """``text`` with ``change`` made to all that is not code."""
    parts = CODE.split(text)
    return "".join(part if place % 2 else change(part) for place, part in enumerate(parts))


def formula(found: re.Match[str]) -> str:
    """MathML of a formula, on one line; between double signs it is set apart."""
    display = "block" if found[1] else "inline"
    maths = latex2mathml.converter.convert(" ".join((found[1] or found[2]).split()), display).replace("\n", "")
    # Markdown takes <math> at the beginning of a line for a paragraph of its own.
    return maths if found[1] else f"<span>{maths}</span>"


def in_repository(target: str, here: str) -> str | None:
    """The path from the repository's root that ``target`` means on page ``here``; None if it is no path."""
    path = target.partition("#")[0]
    if not path or re.match(r"[a-z]+:", target):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(ORIGINS.get(here, f"docs/{here}")), path))


def as_file(path: str) -> str:
    """The place in the site of a file of the repository that is no page. Source is shown as text."""
    known = {".svg", ".png", ".json", ".md", ".txt", ".html"}
    return f"files/{path}" if posixpath.splitext(path)[1] in known else f"files/{path}.txt"


def linked_files(text: str, here: str) -> set[str]:
    """The files outside docs/, other than pages, to which ``text`` links."""
    found: set[str] = set()
    for target in LINK.findall("".join(CODE.split(text)[::2])):
        path = in_repository(target, here)
        if path and not page_of(path) and (ROOT / path).is_file():
            found.add(path)
    return found


def aim(target: str, here: str) -> str:
    """``target``, a link that works in the repository, as a link from ``here`` in the site."""
    path = in_repository(target, here)
    if path is None:
        return target
    _, mark, anchor = target.partition("#")
    site = page_of(path) or as_file(path)
    return posixpath.relpath(site, posixpath.dirname(here) or ".") + mark + anchor


def page_of(path: str) -> str | None:
    """The place in the site of a page or picture of the repository; None for other files."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    result = re.fullmatch(r"benchmarks/(?:results|notes)/(\w+)\.md", path)
    if result and result[1] in result_names():
        return HAS_PAGE.get(result[1], f"benchmarks/{result[1]}.md")
    return PAGES.get(path)


def expanded(nav: list[Any], files: Files) -> list[Any]:
    """The navigation with ``FOLDER/`` replaced by the pages of the folder, its index first."""
    found: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            found.append({k: expanded(v, files) if isinstance(v, list) else v for k, v in entry.items()})
        elif entry.endswith("/"):
            names = sorted(f.src_uri for f in files.documentation_pages() if posixpath.dirname(f.src_uri) == entry[:-1])
            if not names:
                raise PluginError(f"mkdocs.yml: there are no pages in {entry}")
            found += sorted(names, key=lambda name: not name.endswith("/index.md"))
        else:
            found.append(entry)
    return found


def benchmarks() -> Iterator[tuple[str, str]]:
    """A page for every committed result: what is asked, how it is made, what it shows, the table, all numbers."""
    questions = benchmark_questions()
    for name in result_names():
        if name in HAS_PAGE:
            continue
        ORIGINS[f"benchmarks/{name}.md"] = f"benchmarks/notes/{name}.md"
        note = NOTES / f"{name}.md"
        parts = [f"# {name.replace('_', ' ').capitalize()}", questions.get(name, "")]
        if note.exists():
            parts = [*TABLE_LINK.sub(questions.get(name, "") + "\n", note.read_text("utf-8")).split("\n\n")]
            parts.append("## The table")
        parts.append(fill_tables.results_table(name))
        if (RESULTS / f"{name}.svg").exists():
            parts.append(f"![{name}: the picture of the table above](../results/{name}.svg)")
        if (RESULTS / f"{name}.json").exists():
            parts.append(f"[All numbers, with settings, machine and versions](../results/{name}.json)")
        yield f"benchmarks/{name}.md", "\n\n".join(part for part in parts if part)


def result_names() -> list[str]:
    """Results with a table; that of the demo is made from its numbers."""
    return sorted({path.stem for path in RESULTS.glob("*.md")} | {"demo"})


def benchmark_questions() -> dict[str, str]:
    """Result -> question and command, from the table of benchmarks/README.md."""
    found = {"demo": "The demo, `slimming demo`, from its search to its retrained models."}
    for line in (ROOT / "benchmarks" / "README.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = re.search(r"benchmarks[./]([\w/]+?)(?:\.py)?[ `]", cells[0])
        if line.startswith("|") and name:
            found[name[1]] = f"{cells[1]}\n\nMade by {cells[0]}."
    return found


def reference() -> Iterator[tuple[str, str]]:
    """Pages of docstrings."""
    sections = re.split(r"^## ", (ROOT / "docs" / "api.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
    index = ["# Reference", "From the docstrings. [API by example](../api.md) has an example for each public name.", ""]
    for section in sections:
        title = section.partition("\n")[0]
        names = [name for name in re.findall(r"^### `(\w+)`", section, flags=re.MULTILINE) if hasattr(slimming, name)]
        if names:
            place = re.sub(r"\W+", "-", title.lower())
            index.append(f"- [{title}]({place}.md): {', '.join(f'`{name}`' for name in names)}")
            yield f"reference/{place}.md", "\n\n".join([f"# {title}", *map(public_name, names)])
    for title, modules in MODULES.items():
        place = f"modules-{title.lower()}"
        index.append(f"- [{title}]({place}.md), whole modules: {', '.join(f'`{module}`' for module in modules)}")
        blocks = "\n\n".join(f"::: {module}\n    options:\n      show_root_full_path: true" for module in modules)
        yield f"reference/{place}.md", f"# Modules: {title.lower()}\n\n{blocks}"
    yield "reference/index.md", "\n".join(index)


def public_name(name: str) -> str:
    """The docstring of one public name, which Griffe finds where it is defined."""
    value = getattr(slimming, name)
    where = f"{value.__module__}.{value.__qualname__}"
    return f"::: {where}\n    options:\n      heading: slimming.{name}\n      toc_label: {name}"


@lru_cache(maxsize=1)
def commands() -> str:
    """The help of every command."""
    os.environ["COLUMNS"] = "110"
    parts = ["# Commands", "`slimming COMMAND --help` shows the same."]
    for name, summary in COMMANDS.items():
        help_text = make_parser(name).format_help().rstrip()
        parts.append(f"## `slimming {name}`\n\n{summary[0].upper()}{summary[1:]}.\n\n```text\n{help_text}\n```")
    return "\n\n".join(parts)
