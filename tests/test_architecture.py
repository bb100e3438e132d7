"""The shape of the code, read from its syntax tree: who may import whom, what never and what always appears.

Each rule is a function from parsed files to complaints. The rules hold for the package, and each of them is
shown to complain about a small tree that breaks it.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ORDER = (
    "errors",
    "core",
    "counting",
    "training",
    "report",
    "models",
    "benchmarking",
    "masks",
    "checkpoints",
    "planning",
    "pruning",
    "scoring",
    "searching",
    "retraining",
    "runs",
    "exporting",
    "publishing",
    "demo",
    "cli",
    "__main__",
)
"""The folders (and single modules) of the package: each imports from those before it only."""
ONLY = {
    "training": (
        "errors",
        "core.argument_types",
        "core.console",
        "core.copies",
        "core.files",
        "core.inputs",
        "core.interrupts",
        "core.limits",
        "core.modules",
        "core.plain_text",
        "core.records",
        "core.same_settings",
    ),
    "report": ("errors", "core"),
}
"""Folders that may import less than what stands before them: training and reports know nothing of pruning."""

HOSTS = {"timm", "transformers", "torchvision", "torch_pruning", "lightning"}
HOST_ROOMS = {"models", "training"}
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HARMLESS = {"pickle.UnpicklingError"}
"""What torch.load raises when it refuses; naming it runs nothing."""
SHOW_TRACEBACK = {"print_exception", "_print_traceback"}
OWN_SOURCE = {"slimming.models.traced.free_heads"}
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


def imports_follow_the_order(files: list[Source]) -> list[str]:
    wrong = []
    for source in files:
        if not source.part:
            continue
        if source.part not in ORDER:
            wrong.append(f"{source.module}: {source.part!r} has no place; give it one in ORDER")
            continue
        for target, line in inner(files, source):
            inside = target.partition(".")[2]
            part = inside.partition(".")[0]
            where = f"{source.module}:{line} imports {target}"
            if not part:
                wrong.append(f"{where}: the top of the package comes after everything")
            elif part == source.part:
                continue
            elif part not in ORDER or ORDER.index(part) > ORDER.index(source.part):
                wrong.append(f"{where}: not before {source.part!r}")
            elif not any(f"{inside}.".startswith(f"{one}.") for one in ONLY.get(source.part, ORDER)):
                wrong.append(f"{where}: {source.part!r} may not know it")
    return wrong


def public_functions_hide_no_module(files: list[Source]) -> list[str]:
    """A module or folder called as a public function is would make ``slimming.NAME`` mean two things."""
    public = {alias.asname or alias.name for source in files for alias in _exported(source)} - {"errors"}
    return [
        f"{source.module} bears the name of the public {source.module.rpartition('.')[2]}"
        for source in files
        if source.part and source.module.rpartition(".")[2] in public
    ]


def _exported(source: Source) -> Iterator[ast.alias]:
    """The public names of the package, listed in the stub beside its top file."""
    stub = source.path.with_suffix(".pyi")
    if not source.part and stub.exists():
        for node in ast.parse(stub.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                yield from node.names


def no_private_names_of_others(files: list[Source]) -> list[str]:
    wrong = []
    for source in files:
        modules = {}
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] not in PACKAGES:
                continue
            for alias in node.names:
                if _private(alias.name):
                    wrong.append(f"{source.module}:{node.lineno} imports {alias.name} of {node.module}")
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and _private(node.attr) and isinstance(node.value, ast.Name):
                if (owner := modules.get(node.value.id)) is not None:
                    wrong.append(f"{source.module}:{node.lineno} uses {node.attr} of {owner}")
            elif isinstance(node, ast.Call) and _called(node) in {"setattr", "object", "delattr"}:
                wrong += [f"{source.module}:{node.lineno} replaces {name}" for name in _replaced(node, modules)]
    return wrong


PACKAGES = {"slimming", "pkg"}


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _replaced(node: ast.Call, modules: dict[str, str]) -> list[str]:
    """Private names that a patch replaces, of a module or in a dotted path."""
    texts = [one.value for one in node.args[:2] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    first = node.args[0] if node.args else None
    if isinstance(first, ast.Name) and first.id in modules:
        return [text for text in texts if _private(text)]
    dotted = [text for text in texts if text.partition(".")[0] in PACKAGES]
    return [text for text in dotted if any(_private(part) for part in text.split("."))]


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


def models_are_copied_by_the_helper(files: list[Source]) -> list[str]:
    """A plain deep copy refuses what a forward pass left in a model."""
    return [
        f"{source.module}:{node.lineno} calls {ast.unparse(node.func)}; call slimming.core.copies.copied"
        for source in files
        if not source.module.endswith("core.copies")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and _called(node) == "deepcopy"
    ]


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


def broad_exceptions_go_on(files: list[Source]) -> list[str]:
    """A handler of every exception raises it again, or prints its traceback; all others name what they expect."""
    wrong = []
    for source in files:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
                shown = any(isinstance(n, ast.Call) and _called(n) in SHOW_TRACEBACK for n in ast.walk(node))
                last = node.body[-1]
                if not shown and not (isinstance(last, ast.Raise) and last.exc is None):
                    wrong.append(f"{source.module}:{node.lineno} hides an exception of any class")
    return wrong


def _is_broad(kind: ast.expr | None) -> bool:
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(name is None or ast.unparse(name) in ("Exception", "BaseException") for name in names)


RULES: tuple[Callable[[list[Source]], list[str]], ...] = (
    imports_follow_the_order,
    public_functions_hide_no_module,
    no_private_names_of_others,
    no_cycles,
    hosts_in_their_rooms,
    nothing_unpickled,
    models_are_copied_by_the_helper,
    files_stay_short,
    no_hasattr,
    broad_exceptions_go_on,
    public_is_annotated_and_documented,
)


@functools.cache
def package() -> list[Source]:
    return sources(ROOT / "src")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[list[Source]], list[str]]) -> None:
    assert len(package()) > 100
    assert rule(package()) == []


SOUND = {
    "__init__.py": '"""Top."""\nimport lazy_loader\n',
    "__init__.pyi": "from .pruning.cutting import cut as cut\n",
    "errors.py": '"""Errors."""\n\n\nclass E(Exception):\n    """An error."""\n',
    "core/__init__.py": '"""Core."""\n',
    "core/plan.py": '"""Plan."""\nfrom pkg.errors import E\n',
    "core/groups.py": '"""Groups."""\nfrom pkg.core.plan import E\n',
    "models/__init__.py": '"""Models."""\n\n\ndef get() -> None:\n    """Get."""\n    import timm\n',
    "models/layers.py": '"""Layers."""\n',
    "pruning/__init__.py": '"""Pruning."""\n',
    "pruning/cutting.py": (
        '"""Cut."""\nfrom pkg.models.layers import x\n\n\ndef cut(a: int) -> int:\n    """Cut."""\n'
    ),
    "training/__init__.py": '"""Training."""\nimport torch\n\nstate = torch.load("x", weights_only=True)\n',
    "cli/__init__.py": '"""Command line."""\nfrom pkg.pruning.cutting import cut\n',
}

BROKEN = [
    (imports_follow_the_order, "core/plan.py", "from pkg.pruning.cutting import cut", "not before"),
    (imports_follow_the_order, "models/layers.py", "def _f():\n    import pkg.cli", "not before"),
    (imports_follow_the_order, "models/layers.py", "from ..pruning import cutting", "not before"),
    (imports_follow_the_order, "training/loop.py", "from pkg.core.plan import E", "may not know"),
    (imports_follow_the_order, "cli/__init__.py", "from pkg import version", "top of the package"),
    (imports_follow_the_order, "helpers.py", "x = 1", "has no place"),
    (public_functions_hide_no_module, "core/cut.py", "x = 1", "public cut"),
    (public_functions_hide_no_module, "cut/__init__.py", "x = 1", "public cut"),
    (no_private_names_of_others, "cli/__init__.py", "from pkg.core.plan import _x", "imports _x"),
    (no_private_names_of_others, "cli/__init__.py", "from pkg.core import plan\nplan._x()", "uses _x"),
    (no_private_names_of_others, "cli/__init__.py", "from pkg.core import plan\nsetattr(plan, '_x', 1)", "replaces"),
    (no_private_names_of_others, "cli/__init__.py", "patch.setattr('pkg.core.plan._x.y', 1)", "replaces"),
    (broad_exceptions_go_on, "core/plan.py", "try:\n    x = 1\nexcept Exception:\n    x = 2", "any class"),
    (
        broad_exceptions_go_on,
        "core/plan.py",
        "try:\n    x = 1\nexcept (OSError, BaseException):\n    x = 2",
        "any class",
    ),
    (no_cycles, "core/plan.py", "def _f():\n    from pkg.core.groups import x", "cycle"),
    (hosts_in_their_rooms, "pruning/cutting.py", "def _f():\n    from timm.layers import Mlp", "names timm"),
    (hosts_in_their_rooms, "cli/__init__.py", "import torchvision.ops", "names torchvision"),
    (hosts_in_their_rooms, "core/plan.py", "importlib.import_module('timm.models')", "names timm"),
    (nothing_unpickled, "core/plan.py", "import pickle", "imports pickle"),
    (nothing_unpickled, "core/plan.py", "from dill import loads", "imports dill"),
    (nothing_unpickled, "core/plan.py", "torch.load(path)", "without weights_only"),
    (nothing_unpickled, "core/plan.py", "torch.load(path, weights_only=False)", "without weights_only"),
    (nothing_unpickled, "core/plan.py", "numpy.load(path, allow_pickle=True)", "allows pickles"),
    (nothing_unpickled, "core/plan.py", "eval('1')", "runs text"),
    (models_are_copied_by_the_helper, "core/plan.py", "small = copy.deepcopy(model)", "calls copy.deepcopy"),
    (files_stay_short, "core/plan.py", "\n" * LINES, "more than"),
    (no_hasattr, "core/plan.py", "x = hasattr(1, 'real')", "calls hasattr"),
    (public_is_annotated_and_documented, "core/plan.py", "def f() -> None:\n    pass", "no docstring"),
    (public_is_annotated_and_documented, "core/plan.py", "class C:\n    pass", "no docstring"),
    (public_is_annotated_and_documented, "core/plan.py", "def f(a) -> None:\n    '''F.'''", "a has no annotation"),
    (public_is_annotated_and_documented, "core/plan.py", "def f():\n    '''F.'''", "no return annotation"),
    (
        public_is_annotated_and_documented,
        "core/plan.py",
        "class C:\n    '''C.'''\n    def f(self, *, a) -> int:\n        '''F.'''",
        "a has no annotation",
    ),
    (
        public_is_annotated_and_documented,
        "models/layers.py",
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


@pytest.mark.parametrize(
    ("rule", "name", "line", "complaint"), BROKEN, ids=[f"{rule.__name__}-{at}" for at, (rule, *_) in enumerate(BROKEN)]
)
def test_a_broken_tree_is_caught(
    tmp_path: Path, rule: Callable[[list[Source]], list[str]], name: str, line: str, complaint: str
) -> None:
    broken = SOUND | {name: SOUND.get(name, '"""New."""\n') + line + "\n"}
    assert any(complaint in found for found in rule(tree(tmp_path, broken)))


def test_every_rule_is_shown_to_fail() -> None:
    assert {rule for rule, *_ in BROKEN} == set(RULES)


def cases_have_names(files: list[Source]) -> list[str]:
    """Every `parametrize` says what its cases are called, in ``ids`` or case by case."""
    return [
        f"{source.module}:{node.lineno} parametrizes without ids"
        for source in files
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and _called(node) == "parametrize" and not _names_cases(node)
    ]


def _names_cases(call: ast.Call) -> bool:
    if any(keyword.arg == "ids" for keyword in call.keywords):
        return True
    values = call.args[1] if len(call.args) > 1 else None
    return isinstance(values, (ast.List, ast.Tuple)) and all(
        isinstance(value, ast.Call) and _called(value) == "param" and any(key.arg == "id" for key in value.keywords)
        for value in values.elts
    )


def folders_mirror_the_package(files: list[Source]) -> list[str]:
    """Tests lie in folders called as those of the package, in campaign, or beside them where they are of the whole."""
    return [
        f"{source.module}: the package has no folder {folder!r}"
        for source in files
        if (folder := source.module.split(".")[1]) not in (*ORDER, "campaign") and len(source.module.split(".")) > 2
    ]


TEST_RULES: tuple[Callable[[list[Source]], list[str]], ...] = (
    no_private_names_of_others,
    cases_have_names,
    folders_mirror_the_package,
)


@pytest.mark.parametrize("rule", TEST_RULES, ids=lambda rule: rule.__name__)
def test_the_tests_keep_the_rule(rule: Callable[[list[Source]], list[str]]) -> None:
    files = sources(ROOT, "tests")
    assert len(files) > 50
    assert rule(files) == []


BROKEN_TESTS = [
    (cases_have_names, "core/test_plan.py", "@pytest.mark.parametrize('x', [1, 2])\ndef test(x): ..."),
    (cases_have_names, "core/test_plan.py", "parametrize('x', [pytest.param(1, id='one'), pytest.param(2)])"),
    (folders_mirror_the_package, "odds/test_plan.py", "x = 1"),
    (no_private_names_of_others, "core/test_plan.py", "from pkg.core.plan import _x"),
]
SOUND_TESTS = {
    "core/test_plan.py": "parametrize('x', [pytest.param(1, id='one')])\nparametrize('x', [1], ids=str)\n",
    "test_contract.py": "x = 1\n",
}


@pytest.mark.parametrize(
    ("rule", "name", "text"), BROKEN_TESTS, ids=[f"{rule.__name__}-{at}" for at, (rule, *_) in enumerate(BROKEN_TESTS)]
)
def test_broken_tests_are_caught(
    tmp_path: Path, rule: Callable[[list[Source]], list[str]], name: str, text: str
) -> None:
    sound = tree(tmp_path, SOUND_TESTS)
    assert all(one(sound) == [] for one in TEST_RULES)
    assert rule(tree(tmp_path, {name: text})) != []


def undeclared(files: list[Source], declared: set[str], distributions: Mapping[str, list[str]]) -> list[str]:
    """Imports of distributions that are not in ``declared``."""
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
    installed = packages_distributions()
    assert undeclared(package(), declared, installed) == []
    stranger = tree(tmp_path, {"a.py": "import hypothesis\nimport torch\nimport yaml\nimport nowhere\n"})
    assert [line.partition(", ")[0] for line in undeclared(stranger, declared, installed)] == [
        "pkg.a:1 imports hypothesis",
        "pkg.a:4 imports nowhere",
    ]


HEAVY = (
    "torch",
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
