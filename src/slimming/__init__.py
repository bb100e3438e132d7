"""slimming: turn a pretrained vision model into a family of smaller, really faster ones.

groups = slimming.describe(model)                          what can go
result = slimming.search(model, data)                      weights and soft masks train together, once
plan   = slimming.plan(result, slimming.Budget(macs=0.5))  any number of budgets from that search
small  = slimming.cut(result.model, plan)                  a plain module, physically smaller
slimming.train(small, data, teacher=dense)                 distilled from the dense model
slimming.save(small, "small")                              no pickle; slimming.load("small") rebuilds it
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slimming import arrival as _arrival
from slimming import errors as errors
from slimming.api import attach, cost, cut, describe, plan, plans
from slimming.checkpoint import load, save
from slimming.plan import Budget, Layout, Plan

if TYPE_CHECKING:
    from slimming.contract import Check, check
    from slimming.exporting.export import Exported, export
    from slimming.latency import LatencyTable, build_latency_table
    from slimming.oneshot import OneShot, score
    from slimming.opening import ModelConfig, load_images, open_data, open_model
    from slimming.pipeline import run
    from slimming.progressive import train_progressive
    from slimming.publish import as_transformers, push_to_hub, register_with_transformers
    from slimming.results import BenchConfig
    from slimming.retrain import DistilConfig, train
    from slimming.run_config import RunConfig
    from slimming.search_config import SearchConfig, preset
    from slimming.searching import SearchResult, load_search, search
    from slimming.slimmable import train_slimmable
    from slimming.training.batches import calibration_images
    from slimming.training.config import DataConfig, TrainConfig
    from slimming.training.evaluate import evaluate
    from slimming.training.tasks import MatchTask

__version__ = "0.1.0"

__all__ = [
    "BenchConfig",
    "Budget",
    "Check",
    "DataConfig",
    "DistilConfig",
    "Exported",
    "LatencyTable",
    "Layout",
    "MatchTask",
    "ModelConfig",
    "OneShot",
    "Plan",
    "RunConfig",
    "SearchConfig",
    "SearchResult",
    "TrainConfig",
    "as_transformers",
    "attach",
    "build_latency_table",
    "calibration_images",
    "check",
    "cost",
    "cut",
    "describe",
    "evaluate",
    "export",
    "load",
    "load_images",
    "load_search",
    "open_data",
    "open_model",
    "plan",
    "plans",
    "preset",
    "push_to_hub",
    "register_with_transformers",
    "run",
    "save",
    "score",
    "search",
    "train",
    "train_progressive",
    "train_slimmable",
]

# What trains needs accelerate, timm and more; it is imported when it is first used.
_LAZY = {
    "BenchConfig": "results",
    "Check": "contract",
    "DataConfig": "training.config",
    "DistilConfig": "retrain",
    "Exported": "exporting.export",
    "LatencyTable": "latency",
    "build_latency_table": "latency",
    "ModelConfig": "opening",
    "OneShot": "oneshot",
    "RunConfig": "run_config",
    "MatchTask": "training.tasks",
    "SearchConfig": "search_config",
    "SearchResult": "searching",
    "TrainConfig": "training.config",
    "calibration_images": "training.batches",
    "check": "contract",
    "evaluate": "training.evaluate",
    "export": "exporting.export",
    "load_images": "opening",
    "load_search": "searching",
    "open_data": "opening",
    "open_model": "opening",
    "as_transformers": "publish",
    "preset": "search_config",
    "push_to_hub": "publish",
    "register_with_transformers": "publish",
    "run": "pipeline",
    "score": "oneshot",
    "search": "searching",
    "train": "retrain",
    "train_progressive": "progressive",
    "train_slimmable": "slimmable",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'slimming' has no attribute {name!r}")
    value = getattr(import_module(f"slimming.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


_arrival.await_timm()
