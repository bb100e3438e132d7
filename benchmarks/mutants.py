"""Do the tests notice when a line is wrong? A sample of mutants of the package, each run against the tests of its line.

    python -m benchmarks.mutants                     the committed sample
    python -m benchmarks.mutants --only planning     some folders
    python -m benchmarks.mutants --again core/layout.py:31   mutants by their place, whether drawn or not
    python -m benchmarks.mutants --retry tests/planning      the survivors of the result, on these tests; updates it

One mutant changes one thing in one expression: a comparison, an operator, a number, a condition, what is returned, or a
call whose result nobody takes is left out. Types, docstrings, decorators, and the messages of errors stay as they are.

Each mutant has a process of its own, forked from one that has imported PyTorch and the hosts and nothing of `slimming`:
the import of a mutant costs a second instead of ten. It runs the tests that executed the line when nothing was changed,
the quickest first, until one fails. A mutant is killed when a test fails, the package cannot be imported, or the tests
take ten times as much processor time as they should. Lines that run on import only are tried with the tests that ran
anything else of their module.

mutmut and cosmic-ray start one interpreter and one import of PyTorch for every mutant, or rewrite the package so that
every function passes through a switch, which the tracing of models and tests/test_architecture.py do not bear.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.mutants_equivalent import EQUIVALENT

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "slimming"
FOLDERS = ("planning", "pruning", "masks", "core")
SOME = "plain or qk or registers or test_vit or CNN or Swin or MobileViT"
TESTS: tuple[tuple[str, ...], ...] = (
    ("tests/planning/test_latency_table.py", "tests/core"),
    ("tests/planning", "--ignore", "tests/planning/test_latency_table.py"),
    ("tests/pruning", "tests/masks", "tests/retraining", "-k", "not resumed"),
    (
        "tests/scoring",
        "tests/models/test_widths.py",
        "tests/models/test_masked_norms.py",
        "tests/checkpoints",
        "-k",
        "not killed and not memory",
    ),
    ("tests/test_contract.py", "tests/models/test_slim_models.py", "-k", f"{SOME} and not compile and not process"),
)
"""Where tests of the four folders are, in parts that are read at once; what others find besides is not counted."""
IMPORTED = "ignore::pytest.PytestAssertRewriteWarning"
"""Plugins of pytest are imported before it, with all else that every mutant needs."""
MOST = 12.0
"""Seconds of tests that one mutant is given, by their time without it."""
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult,
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "max", "sorted": "list"}


RETRIED = (
    "Mutants of the package at commit ccf47b2, drawn by `python -m benchmarks.mutants` from 1738 with seed 0. The "
    "tests of that commit killed 235 of 301 (78.1%). The 66 that survived were read one by one: ten more were found "
    "equivalent, and tests were written for the others, which were run again at the place that their line has in later "
    "source. `python -m benchmarks.mutants --retry TESTS` killed {} of them; the other rows are as they were measured. "
    "The share below is that of this sample only: mutants that nobody has looked at survive more often."
)


@dataclass(frozen=True)
class Mutant:
    """One change: the text of ``[start, end)`` of a file becomes ``new``."""

    file: str
    line: int
    operator: str
    start: int
    end: int
    old: str
    new: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line} {self.old} -> {self.new}"

    def text(self) -> str:
        source = (PACKAGE / self.file).read_bytes()
        return (source[: self.start] + self.new.encode() + source[self.end :]).decode()


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in the place of a node, by the name of the change."""
    if isinstance(node, ast.Compare):
        for place, one in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[place] = COMPARISONS[type(one)]()
            yield "comparison", changed
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield "operator", ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield "operator", ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
        yield "assignment", ast.Assign([node.target], node.value, lineno=0)
    elif isinstance(node, ast.BoolOp):
        yield "and or", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "sign", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield "constant", ast.Constant((not node.value) if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield "condition", ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        yield "call", ast.Call(ast.Name(CALLS[node.func.id]), node.args, node.keywords)
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield "loop", ast.Continue() if isinstance(node, ast.Break) else ast.Break()
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield "return", ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "statement", ast.Pass()


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def changeable(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below ``node`` that may change: no types, decorators, errors or texts."""
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list", "bases"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from changeable(child)


def mutants(folders: Sequence[str]) -> list[Mutant]:
    """Every mutant of the folders, in the order of the files."""
    found: dict[str, Mutant] = {}
    for path in sorted(path for folder in folders for path in (PACKAGE / folder).rglob("*.py")):
        source = path.read_bytes()
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for node in changeable(ast.parse(source)):
            for operator, other in variants(node):
                at: Any = node
                start, end = starts[at.lineno - 1] + at.col_offset, starts[at.end_lineno - 1] + at.end_col_offset
                new = ast.unparse(ast.fix_missing_locations(other))
                new = f"({new})" if isinstance(other, ast.expr) else new
                old = " ".join(source[start:end].decode().split())
                one = Mutant(path.relative_to(PACKAGE).as_posix(), at.lineno, operator, start, end, old, new)
                found.setdefault(f"{one.key} {one.start}", one)
    return list(found.values())


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import one module of the package from another text."""

    def __init__(self, mutant: Mutant) -> None:
        parts = Path(mutant.file).with_suffix("").parts
        self.name = ".".join(("slimming", *(parts[:-1] if parts[-1] == "__init__" else parts)))
        self.path, self.text = PACKAGE / mutant.file, mutant.text()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)  # pyright: ignore

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.text, self.path, "exec"), module.__dict__)


class Watch:
    """A pytest plugin: which test ran which line, and for how long."""

    def __init__(self, coverage: Any) -> None:
        self.coverage, self.seconds = coverage, {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)
        self.seconds[nodeid] = time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = time.process_time() - self.seconds[nodeid]
        self.coverage.switch_context("")


def read_tests(folder: Path, part: int) -> None:
    """Run a part of the tests on the package as it is; leave in ``folder`` which lines each ran."""
    import pytest

    import coverage

    measured = coverage.Coverage(data_file=str(folder / f"{part}.lines"), config_file=False, source=[str(PACKAGE)])
    watch = Watch(measured)
    measured.start()
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:doctest", *_options(), *TESTS[part]], plugins=[watch])
    measured.stop()
    measured.save()
    if code != 0:
        raise SystemExit("The tests fail without any mutant: mend them first.")
    (folder / f"{part}.json").write_text(json.dumps(watch.seconds))


def _options() -> list[str]:
    return ["-o", "addopts=", "-m", "not slow and not gpu and not network", "--rootdir", str(ROOT), "-W", IMPORTED]


class Lines:
    """Which tests to run for a line, quickest first."""

    def __init__(self, folder: Path) -> None:
        import coverage

        data = coverage.CoverageData(no_disk=True)
        self.seconds: dict[str, float] = {}
        for part in range(len(TESTS)):
            read = coverage.CoverageData(str(folder / f"{part}.lines"))
            read.read()
            data.update(read)
            self.seconds |= json.loads((folder / f"{part}.json").read_text())
        self.of = {path: data.contexts_by_lineno(path) for path in data.measured_files()}

    def tests(self, mutant: Mutant) -> list[str]:
        """Those that ran the line; where it ran on import only, those that ran anything of the file."""
        lines = self.of.get(str(PACKAGE / mutant.file), {})
        found = {name for name in lines.get(mutant.line, []) if name}
        if not found and lines.get(mutant.line):
            found = {name for names in lines.values() for name in names if name}
        chosen, spent = [], 0.0
        for name in sorted(found, key=lambda name: (self.seconds.get(name, 1e9), name)):
            if name in self.seconds and spent + self.seconds[name] <= MOST:
                chosen.append(name)
                spent += self.seconds[name]
        return chosen

    def limit(self, tests: Sequence[str]) -> int:
        """Seconds of processor time after which the tests hang."""
        return int(60 + 10 * sum(self.seconds[name] for name in tests))


def started(do: Callable[[], object], seconds: int | None = None) -> int:
    """The process that does ``do`` without output, for at most so many seconds of processor time."""
    if (pid := os.fork()) != 0:
        return pid
    code = 70
    try:
        if seconds:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            if seconds:
                os.dup2(nothing.fileno(), 2)
        code = int(do() or 0)  # pyright: ignore
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 70
        print(stop, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code of a process once it ends; 124 for one that was stopped."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 124 if code < 0 else code


def run(mutant: Mutant | None, tests: Sequence[str]) -> int:
    """Run the tests on a mutant, or on the package as it is, in this process."""
    import pytest

    if mutant is not None:
        sys.meta_path.insert(0, Changed(mutant))
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *_options(), *tests]))


RETRY_SECONDS = 600
"""Processor time of the tests of ``--retry``, after which they hang."""
LOST = {"survived", "not run"}
VERDICTS = {0: "survived", 1: "killed", 2: "killed", 4: "killed", 124: "timed out"}
"""By the exit code of pytest: 2 and 4 where the mutant cannot be imported."""


def judge(mutant: Mutant, lines: Lines) -> dict[str, Any]:
    """Whether the tests notice the mutant."""
    tests, start = lines.tests(mutant), time.time()
    verdict = "not run" if not tests else ""
    with contextlib.suppress(SyntaxError):
        compile(mutant.text(), mutant.file, "exec")
        verdict = verdict or VERDICTS.get(ended(started(partial(run, mutant, tests), lines.limit(tests))), "killed")
    return {**asdict(mutant), "key": mutant.key, "verdict": verdict or "killed", "tests": len(tests),
            "seconds": round(time.time() - start, 1)}  # fmt: skip


def retry(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Run the survivors in the folders of ``--only`` on the tests of ``--retry``, and write each that is killed."""
    if ended(started(partial(run, None, arguments.retry), RETRY_SECONDS)) != 0:
        raise SystemExit("The tests fail without any mutant: mend them first.")
    for row in rows:
        folder = row["file"].partition("/")[0]
        if row["verdict"] not in LOST or row["key"] in EQUIVALENT or folder not in arguments.only:
            continue
        mutant = Mutant(**{name: row[name] for name in ("file", "line", "operator", "start", "end", "old", "new")})
        if mutant not in mutants([folder]):
            raise SystemExit(f"{mutant.key} is no mutant of today's source: correct its place in the result.")
        start = time.time()
        verdict = VERDICTS.get(ended(started(partial(run, mutant, arguments.retry), RETRY_SECONDS)), "killed")
        if verdict not in LOST:
            row.update(verdict=verdict, seconds=round(time.time() - start, 1), retried=True)
            write(rows, arguments.output)
        print(verdict, row["key"], flush=True)


def write(rows: Sequence[dict[str, Any]], output: Path) -> None:
    output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def summary(rows: Sequence[dict[str, Any]], folders: Sequence[str], drawn: str) -> str:
    """The result as Markdown: how the rows were ``drawn``, counts by folder, then who survived."""
    lost = [row for row in rows if row["verdict"] in LOST]
    judged = [row for row in rows if row["key"] not in EQUIVALENT]
    killed = [row for row in judged if row not in lost]
    out = [
        "# Mutants",
        "",
        f"{drawn} The tests kill {len(killed)} of the {len(judged)} that differ from the package: "
        f"{len(killed) / max(len(judged), 1):.1%}.",
        "",
        "| folder | mutants | killed | equivalent | survive |",
        "| :-- | --: | --: | --: | --: |",
    ]
    for folder in folders:
        of = [row for row in rows if row["file"].startswith(f"{folder}/")]
        same = sum(row["key"] in EQUIVALENT for row in of)
        alive = sum(row in lost and row["key"] not in EQUIVALENT for row in of)
        out.append(f"| `{folder}` | {len(of)} | {len(of) - same - alive} | {same} | {alive} |")
    counts = Counter(row["operator"] for row in lost if row["key"] not in EQUIVALENT)
    out += ["", "Survivors by the kind of change: " + ", ".join(f"{k} {n}" for k, n in counts.most_common()) + ".", ""]
    out += [f"- `{row['key']}`" + (" (no test runs it)" if row["verdict"] == "not run" else "")
            for row in lost if row["key"] not in EQUIVALENT]  # fmt: skip
    out += ["", "Equivalent, with the reason:", ""]
    out += [f"- `{row['key']}`: {EQUIVALENT[row['key']]}" for row in rows if row["key"] in EQUIVALENT]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FOLDERS), help="folders")
    parser.add_argument("--sample", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", nargs="*", default=[], help="FILE:LINE of mutants to run in place of a sample")
    parser.add_argument("--retry", nargs="+", default=[], metavar="TESTS", help="run the survivors of the result again")
    parser.add_argument("--lines", type=Path, help="a folder for the lines that each test runs, kept between calls")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "mutants")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    preload()
    if arguments.retry:
        rows = json.loads(arguments.output.with_suffix(".json").read_text("utf-8"))
        retry(rows, arguments)
        how = RETRIED.format(sum("retried" in row for row in rows))
        arguments.output.with_suffix(".md").write_text(summary(rows, FOLDERS, how), "utf-8")
        return
    every = mutants(arguments.only)
    drawn = random.Random(arguments.seed).sample(every, min(arguments.sample, len(every)))
    if arguments.again:
        drawn = [one for one in every if any(one.key.startswith(f"{place} ") for place in arguments.again)]
    folder = arguments.lines or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    missing = [part for part in range(len(TESTS)) if not (folder / f"{part}.json").exists()]
    if any(ended(pid) for pid in [started(partial(read_tests, folder, part)) for part in missing]):
        raise SystemExit("The lines that the tests run could not be read.")
    lines, log = Lines(folder), arguments.output.with_suffix(".jsonl")
    # What was judged already is kept: a call that was stopped goes on, and what is tried again counts as it ended last.
    kept = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() and not arguments.again else []
    done = {(row["file"], row["start"], row["new"]): row for row in kept}
    waiting = [one for one in drawn if (one.file, one.start, one.new) not in done]
    children = []
    for share in range(arguments.processes):
        if (pid := os.fork()) == 0:
            for one in waiting[share :: arguments.processes]:
                row = judge(one, lines)
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row["verdict"], row["key"], flush=True)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    if arguments.again:
        return
    kept = [json.loads(line) for line in log.read_text().splitlines()]
    done = {(row["file"], row["start"], row["new"]): row for row in kept}
    rows = [done[one.file, one.start, one.new] for one in drawn]
    rows.sort(key=lambda row: (row["file"], row["start"], row["new"]))
    how = (
        f"Made by `python -m benchmarks.mutants`: {len(rows)} of {len(every)} mutants of {', '.join(arguments.only)}, "
    )
    how += f"drawn with seed {arguments.seed}."
    write(rows, arguments.output)
    arguments.output.with_suffix(".md").write_text(summary(rows, arguments.only, how), "utf-8")


def preload() -> None:
    """Import what tests import besides the package, once for all."""
    hosts = ("torch", "torchvision", "timm", "transformers", "torch_pruning")
    others = ("scipy.optimize", "hypothesis", "pytest", "yaml", "onnx", "safetensors.torch", "pyarrow.parquet")
    for name in (*hosts, *others):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if found := [name for name in sys.modules if name.partition(".")[0] == "slimming"]:
        raise SystemExit(f"{found[0]} is imported already: no mutant would be seen.")


if __name__ == "__main__":
    main()
