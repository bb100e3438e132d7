"""The shape of the code, read from its syntax tree: who may import whom, what never and what always appears.

Each rule is a function from parsed files to complaints. The rules hold for the package, and each of them is
shown to complain about a small tree that breaks it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = {
    "errors": 0,
    "io": 0,
    "arrival": 0,
    "hub": 1,
    "modes": 0,
    "formulas": 1,
    "groups": 1,
    "plan": 1,
    "solve": 1,
    "family": 1,
    "macs": 1,
    "inputs": 1,
    "families": 2,
    "masks": 2,
    "token_gates": 2,
    "scaling": 2,
    "chunks": 2,
    "kept_norms": 1,
    "worth": 2,
    "rank": 2,
    "cost": 2,
    "cut": 2,
    "compensation": 2,
    "elimination": 2,
    "rotation": 2,
    "layers": 2,
    "checkpoint": 3,
    "latency": 3,
    "sensitivity": 3,
    "training": 3,
    "bench": 3,
    "programs": 1,
    "runtimes": 1,
    "report": 3,
    "demo": 3,
    "api": 4,
    "searching": 4,
    "slopes": 4,
    "turns": 4,
    "oneshot": 4,
    "opening": 4,
    "slimmable": 4,
    "progressive": 4,
    "budgets": 4,
    "hours": 4,
    "run_config": 4,
    "search_config": 4,
    "retrain": 4,
    "results": 4,
    "contract": 4,
    "exporting": 4,
    "explore": 4,
    "pipeline": 4,
    "card": 3,
    "publish": 4,
    "cli": 5,
    "__main__": 6,
}
SIDEWAYS = {
    ("cut", "layers"),
    ("compensation", "cut"),
    ("rank", "chunks"),
    ("rank", "worth"),
    ("worth", "chunks"),
    ("families", "layers"),
    ("masks", "token_gates"),
    ("masks", "scaling"),
    ("latency", "bench"),
    ("searching", "api"),
    ("slopes", "api"),
    ("turns", "api"),
    ("turns", "slopes"),
    ("oneshot", "api"),
    ("oneshot", "slopes"),
    ("oneshot", "turns"),
    ("searching", "slopes"),
    ("opening", "api"),
    ("retrain", "api"),
    *(("pipeline", part) for part in ("opening", "run_config", "hours", "budgets", "slimmable")),
    *(("run_config", part) for part in ("opening", "results", "retrain", "search_config")),
    *(("progressive", part) for part in ("api", "oneshot", "retrain", "searching")),
    *(("budgets", part) for part in ("api", "results", "retrain", "run_config", "searching")),
    *(("budgets", part) for part in ("progressive", "slimmable")),
    ("hours", "run_config"),
    ("hours", "search_config"),
    ("slimmable", "api"),
    ("slimmable", "retrain"),
    ("slimmable", "searching"),
    ("searching", "turns"),
    ("search_config", "api"),
    ("searching", "search_config"),
    ("pipeline", "oneshot"),
    ("results", "api"),
    ("results", "searching"),
    ("contract", "api"),
    ("exporting", "api"),
    ("exporting", "opening"),
    ("publish", "api"),
    ("publish", "results"),
    *(("explore", part) for part in ("api", "opening", "results", "run_config", "searching")),
    ("pipeline", "explore"),
    *(("pipeline", part) for part in ("api", "searching", "results")),
}
"""Pairs of one layer that may know each other; layers 0 and 1 are plain data and may do so throughout."""

ONLY = {"training": {"errors", "io", "modes"}}
"""Parts that may use less than what lies below them."""

HOSTS = {"timm", "transformers", "torchvision", "torch_pruning", "lightning"}
HOST_ROOMS = {"families", "training"}
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HARMLESS = {"pickle.UnpicklingError"}
"""What torch.load raises when it refuses; naming it runs nothing."""
OWN_SOURCE = {"slimming.families.traced.unbound"}
"""Compiles a method of an installed host from its own source, changed in one place; no file is ever its input."""
LINES = 450
CONVENTIONAL = {"forward", "extra_repr", "state_dict", "load_state_dict", "train"}
"""Public methods whose meaning the framework has fixed; a docstring would repeat it."""


@dataclass(frozen=True)
class Source:
    """One file of a package."""

    module: str  # "package.part.file"; a package's __init__ has the package's own name
    path: Path
    text: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """The part of the package that the file belongs to; empty for the top __init__."""
        return self.module.partition(".")[2].partition(".")[0]


@dataclass(frozen=True)
class Import:
    target: str
    line: int


def sources(root: Path, package: str = "slimming") -> list[Source]:
    found = []
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text("utf-8")
        found.append(Source(module, path, text, ast.parse(text)))
    return found


def imports(source: Source) -> Iterator[Import]:
    """Every import of the file, in functions and under TYPE_CHECKING too, and `import_module("name")`."""
    base = source.module.split(".")
    if source.path.name != "__init__.py":
        base = base[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*anchor, *([node.module] if node.module else [])])
            # `from package import part` names the part, `from package.part import name` the part as well.
            yield from (Import(f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(argument.value, node.lineno)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def inner(files: list[Source], source: Source) -> Iterator[tuple[str, int]]:
    """The package's own modules that ``source`` imports."""
    modules = {file.module for file in files}
    package = source.module.partition(".")[0]
    for found in imports(source):
        if found.target.partition(".")[0] != package:
            continue
        target = found.target
        while target not in modules and "." in target:
            target = target.rpartition(".")[0]
        yield target, found.line


def imports_point_down(files: list[Source]) -> list[str]:
    wrong = []
    for source in files:
        if not source.part:
            continue
        if source.part not in LAYERS:
            wrong.append(f"{source.module}: {source.part!r} has no layer; give it one in LAYERS")
            continue
        for target, line in inner(files, source):
            part = target.partition(".")[2].partition(".")[0]
            where = f"{source.module}:{line} imports {target}"
            if not part:
                wrong.append(f"{where}: the top of the package lies above everything")
            elif part != source.part and not _may(source.part, part):
                wrong.append(f"{where}: not below {source.part!r}")
    return wrong


def _may(part: str, other: str) -> bool:
    if other not in LAYERS or (part in ONLY and other not in ONLY[part]):
        return False
    if LAYERS[part] == LAYERS[other]:
        return LAYERS[part] <= 1 or (part, other) in SIDEWAYS
    return LAYERS[other] < LAYERS[part]


def no_cycles(files: list[Source]) -> list[str]:
    graph = {source.module: {target for target, _ in inner(files, source)} - {source.module} for source in files}
    # What imports nothing that is left, or is imported by nothing that is left, lies on no cycle.
    while loose := [
        module
        for module, targets in graph.items()
        if not targets & graph.keys() or not any(module in others for others in graph.values())
    ]:
        for module in loose:
            del graph[module]
    return [f"{module} lies on a cycle of imports, or between two" for module in sorted(graph)]


def hosts_in_their_rooms(files: list[Source]) -> list[str]:
    return [
        f"{source.module}:{found.line} names {found.target}"
        for source in files
        if source.part not in HOST_ROOMS
        for found in imports(source)
        if found.target.partition(".")[0] in HOSTS
    ]


def nothing_unpickled(files: list[Source]) -> list[str]:
    wrong = []
    for source in files:
        for found in imports(source):
            if found.target.partition(".")[0] in UNPICKLERS and found.target not in HARMLESS:
                wrong.append(f"{source.module}:{found.line} imports {found.target}")
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            where = f"{source.module}:{node.lineno}"
            if ast.unparse(node.func) == "torch.load" and not _flag(node, "weights_only", True):
                wrong.append(f"{where} calls torch.load without weights_only=True")
            if _flag(node, "weights_only", False) or _flag(node, "allow_pickle", True):
                wrong.append(f"{where} allows pickles")
            if ast.unparse(node.func) in {"eval", "exec"} and source.module not in OWN_SOURCE:
                wrong.append(f"{where} runs text as code")
    return wrong


def _flag(call: ast.Call, name: str, value: bool) -> bool:
    return any(
        keyword.arg == name and isinstance(keyword.value, ast.Constant) and keyword.value.value is value
        for keyword in call.keywords
    )


def files_stay_short(files: list[Source]) -> list[str]:
    counts = {source.module: len(source.text.splitlines()) for source in files}
    return [f"{module} has {count} lines, more than {LINES}" for module, count in counts.items() if count > LINES]


def no_hasattr(files: list[Source]) -> list[str]:
    return [
        f"{source.module}:{node.lineno} calls hasattr"
        for source in files
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and _called(node) == "hasattr"
    ]


def public_is_annotated_and_documented(files: list[Source]) -> list[str]:
    classes = {node.name: node for source in files for node in source.tree.body if isinstance(node, ast.ClassDef)}
    wrong = []
    for source in files:
        if source.text.strip() and not ast.get_docstring(source.tree):
            wrong.append(f"{source.module} has no docstring")
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    wrong.append(f"{source.module}.{node.name} has no docstring")
                excused = CONVENTIONAL | _documented_in_bases(node, classes)
                for method in _functions(node):
                    wrong += _function(f"{source.module}.{node.name}", method, excused, is_method=True)
        for function in _functions(source.tree):
            wrong += _function(source.module, function, set(), is_method=False)
    return wrong


def _functions(node: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [found for found in node.body if isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef))]


def _documented_in_bases(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Methods that a base in the package documents already."""
    bases = [classes[name] for base in node.bases if (name := ast.unparse(base).rpartition(".")[2]) in classes]
    return {method.name for base in bases for method in _functions(base) if ast.get_docstring(method)}


def _function(
    owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef, excused: set[str], *, is_method: bool
) -> list[str]:
    if node.name.startswith("_"):
        return []
    names = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    if names & {"setter", "overload"}:
        return []
    given = [*node.args.posonlyargs, *node.args.args]
    given = given[1:] if is_method and "staticmethod" not in names else given
    given += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
    wrong = [f"{owner}.{node.name}: {arg.arg} has no annotation" for arg in given if arg.annotation is None]
    if node.returns is None:
        wrong.append(f"{owner}.{node.name} has no return annotation")
    if not ast.get_docstring(node) and node.name not in excused:
        wrong.append(f"{owner}.{node.name} has no docstring")
    return wrong


RULES: tuple[Callable[[list[Source]], list[str]], ...] = (
    imports_point_down,
    no_cycles,
    hosts_in_their_rooms,
    nothing_unpickled,
    files_stay_short,
    no_hasattr,
    public_is_annotated_and_documented,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[list[Source]], list[str]]) -> None:
    files = sources(ROOT / "src")
    assert len(files) > 5
    assert rule(files) == []


SOUND = {
    "__init__.py": '"""Top."""\nfrom pkg.cut import cut\n',
    "errors.py": '"""Errors."""\n\n\nclass E(Exception):\n    """An error."""\n',
    "plan.py": '"""Plan."""\nfrom pkg.errors import E\n',
    "groups.py": '"""Groups."""\nfrom pkg.plan import E\n',
    "layers.py": '"""Layers."""\n',
    "cut.py": '"""Cut."""\nfrom pkg.layers import x\n\n\ndef cut(a: int) -> int:\n    """Cut."""\n',
    "families/__init__.py": '"""Families."""\n\n\ndef get() -> None:\n    """Get."""\n    import timm\n',
    "training/__init__.py": '"""Training."""\nimport torch\n\nstate = torch.load("x", weights_only=True)\n',
    "cli/__init__.py": '"""Command line."""\nfrom pkg import cut\n',
}

BROKEN = [
    (imports_point_down, "plan.py", "from pkg.cut import cut", "not below"),
    (imports_point_down, "layers.py", "def _f():\n    import pkg.cli", "not below"),
    (imports_point_down, "layers.py", "from .cut import cut", "not below"),
    (imports_point_down, "families/__init__.py", "from .. import cut", "not below"),
    (imports_point_down, "rank.py", "from pkg.cost import x", "not below"),
    (imports_point_down, "training/loop.py", "from pkg.plan import E", "not below"),
    (imports_point_down, "cli/__init__.py", "from pkg import version", "top of the package"),
    (imports_point_down, "helpers.py", "x = 1", "has no layer"),
    (no_cycles, "errors.py", "def _f():\n    from pkg.groups import x", "cycle"),
    (hosts_in_their_rooms, "cut.py", "def _f():\n    from timm.layers import Mlp", "names timm"),
    (hosts_in_their_rooms, "cli/__init__.py", "import torchvision.ops", "names torchvision"),
    (hosts_in_their_rooms, "plan.py", "importlib.import_module('timm.models')", "names timm"),
    (nothing_unpickled, "plan.py", "import pickle", "imports pickle"),
    (nothing_unpickled, "plan.py", "from dill import loads", "imports dill"),
    (nothing_unpickled, "plan.py", "torch.load(path)", "without weights_only"),
    (nothing_unpickled, "plan.py", "torch.load(path, weights_only=False)", "without weights_only"),
    (nothing_unpickled, "plan.py", "numpy.load(path, allow_pickle=True)", "allows pickles"),
    (nothing_unpickled, "plan.py", "eval('1')", "runs text"),
    (files_stay_short, "plan.py", "\n" * LINES, "more than"),
    (no_hasattr, "plan.py", "x = hasattr(1, 'real')", "calls hasattr"),
    (public_is_annotated_and_documented, "plan.py", "def f() -> None:\n    pass", "no docstring"),
    (public_is_annotated_and_documented, "plan.py", "class C:\n    pass", "no docstring"),
    (public_is_annotated_and_documented, "plan.py", "def f(a) -> None:\n    '''F.'''", "a has no annotation"),
    (public_is_annotated_and_documented, "plan.py", "def f():\n    '''F.'''", "no return annotation"),
    (
        public_is_annotated_and_documented,
        "plan.py",
        "class C:\n    '''C.'''\n    def f(self, *, a) -> int:\n        '''F.'''",
        "a has no annotation",
    ),
    (
        public_is_annotated_and_documented,
        "layers.py",
        "class C:\n    '''C.'''\n    def f(self) -> int: ...",
        "no doc",
    ),
]


def tree(directory: Path, files: dict[str, str]) -> list[Source]:
    for name, text in files.items():
        path = directory / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return sources(directory, "pkg")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_passes(tmp_path: Path, rule: Callable[[list[Source]], list[str]]) -> None:
    assert rule(tree(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("rule", "name", "line", "complaint"), BROKEN)
def test_a_broken_tree_is_caught(
    tmp_path: Path, rule: Callable[[list[Source]], list[str]], name: str, line: str, complaint: str
) -> None:
    cost = {"cost.py": '"""Cost."""\n'}
    broken = SOUND | cost | {name: SOUND.get(name, '"""New."""\n') + line + "\n"}
    assert any(complaint in found for found in rule(tree(tmp_path, broken)))


def test_every_rule_is_shown_to_fail() -> None:
    assert {rule for rule, *_ in BROKEN} == set(RULES)


def undeclared(files: list[Source], declared: set[str]) -> list[str]:
    """Imports of distributions that are not in ``declared``."""
    distributions = packages_distributions()
    wrong = []
    for source in files:
        for found in imports(source):
            top = found.target.partition(".")[0]
            owners = {_canonical(name) for name in distributions.get(top, [top])}
            known = top in sys.stdlib_module_names or top == source.module.partition(".")[0]
            if not known and not owners & declared:
                wrong.append(f"{source.module}:{found.line} imports {top}, which pyproject.toml does not name")
    return wrong


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_distributions() -> set[str]:
    """The names in `dependencies` and in every extra but `dev`."""
    lines = [line for line in requires("slimming") or [] if not re.search("extra == .dev.", line)]
    return {_canonical(re.split(r"[^A-Za-z0-9_.-]", line)[0]) for line in lines}


def test_every_import_is_declared(tmp_path: Path) -> None:
    declared = declared_distributions()
    assert {"torch", "pyyaml", "datasets"} <= declared
    assert undeclared(sources(ROOT / "src"), declared) == []
    stranger = tree(tmp_path, {"a.py": "import hypothesis\nimport torch\nimport yaml\nimport nowhere\n"})
    assert [line.partition(", ")[0] for line in undeclared(stranger, declared)] == [
        "pkg.a:1 imports hypothesis",
        "pkg.a:4 imports nowhere",
    ]


HEAVY = (
    "timm",
    "accelerate",
    "torchvision",
    "pyarrow",
    "plotly",
    "matplotlib",
    "datasets",
    "transformers",
    "rich",
    "lightning",
    "huggingface_hub",
)


def test_import_slimming_is_light() -> None:
    program = f"import slimming, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
