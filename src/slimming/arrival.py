"""Makes slim models known to timm as soon as timm is there, without importing it.

timm has no place where packages announce their models: a model must be in its registry before it is asked for. So
`import slimming` leaves a finder that waits for the first import of timm (being asked whether timm is there is none),
registers the architecture once timm is loaded, and goes. Nothing else of timm is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

HOST, ENTRY = "timm", "slimming.families.timm_entry"


def await_timm() -> None:
    """Register slim models with timm: now if it is loaded, else when it is."""
    if HOST in sys.modules:
        import_module(ENTRY)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Meets the first import of timm, and leaves the rest to the finders behind it."""

    asking = False
    """Whether those behind it are being asked, which asks this one again."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != HOST or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads a module as its own loader does, and registers the architecture afterwards."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Waiting)]
        import_module(ENTRY)
