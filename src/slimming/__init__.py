"""slimming: prune pretrained vision models to smaller, measurably faster ones.

groups = slimming.describe(model)                          the groups of prunable units
result = slimming.search(model, data)                      trains weights and soft masks together
plan   = slimming.plan(result, slimming.Budget(macs=0.5))  plans for any number of budgets
small  = slimming.cut(result.model, plan)                  a plain module with smaller tensors
slimming.train(small, data, teacher=dense)                 retrains with knowledge distillation
slimming.save(small, "small")                              no pickle; slimming.load("small") rebuilds it
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

# The public names are listed once, in __init__.pyi. Each is imported when it is first used: training needs accelerate,
# timm and more, whose import takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
