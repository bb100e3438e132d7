"""slimming: turn a pretrained vision model into a family of smaller, really faster ones."""

from __future__ import annotations

from slimming.api import attach, cost, cut, describe
from slimming.api import make_plan as plan
from slimming.checkpoint import load, save
from slimming.plan import Budget, Layout, Plan

__version__ = "0.1.0"

__all__ = ["Budget", "Layout", "Plan", "attach", "cost", "cut", "describe", "load", "plan", "save"]
