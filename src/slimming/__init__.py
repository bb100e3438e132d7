"""slimming: turn a pretrained vision model into a family of smaller, really faster ones.

groups = slimming.describe(model)                          what can go
result = slimming.search(model, data)                      weights and soft masks train together, once
plan   = slimming.plan(result, slimming.Budget(macs=0.5))  any number of budgets from that search
small  = slimming.cut(result.model, plan)                  a plain module, physically smaller
slimming.train(small, data, teacher=dense)                 distilled from the dense model
slimming.save(small, "small")                              no pickle; slimming.load("small") rebuilds it
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

# The public names are listed once, in __init__.pyi. Each is imported when it is first used: training needs accelerate,
# timm and more, which `import slimming` must not wait for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
