"""Cuts by Torch-Pruning 1.6.1, for `accuracy.py`: its documented use, with its options for transformers."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from torch import nn

from slimming.counting.measured import count
from slimming.retraining.slimmable import recalibrate_batch_norms_


def theirs(subject: Any, method: str, kinds: tuple[str, ...] | None, budget: float, seed: int) -> nn.Module:
    """Torch-Pruning by its documented use; the ratio is bisected until the MACs are met."""
    if kinds is not None:
        return pruned(subject, method, kinds, 1 - budget, seed)
    low, high, best = 0.0, 0.99, None
    for _ in range(12):
        ratio = (low + high) / 2
        try:
            found = pruned(subject, method, kinds, ratio, seed)
            share = count(found, subject.shape).macs / subject.macs
        except (RuntimeError, ZeroDivisionError):  # cut through
            high = ratio
            continue
        if best is None or abs(share - budget) < abs(best[0] - budget):
            best = share, found
        low, high = (ratio, high) if share > budget else (low, ratio)
    if best is None:
        raise RuntimeError(f"{method} cannot reach {budget}")
    if "BatchNorm anew" in method:
        recalibrate_batch_norms_(best[1], [images for images, _ in subject.calibration(seed)])
    return best[1]


def pruned(subject: Any, method: str, kinds: tuple[str, ...] | None, ratio: float, seed: int) -> nn.Module:
    """One cut of Torch-Pruning 1.6.1."""
    import torch_pruning as tp  # pyright: ignore

    start, own = prepared(subject, method, seed)
    model, importance = copy.deepcopy((start, own))
    for mine, its in zip(model.parameters(), start.parameters(), strict=True):
        mine.grad = None if its.grad is None else its.grad.clone()
    attentions: list[Any] = [m for m in model.modules() if isinstance(m, Attention)]
    mlps: list[Any] = [m for m in model.modules() if isinstance(m, Mlp)]
    ignored: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    if attentions and "width too" not in method:  # their option --bottleneck
        ignored += [*(m.proj for m in attentions), *(m.fc2 for m in mlps), model.patch_embed.proj]
    if kinds == ("mlp",):
        ignored += [m.qkv for m in attentions]
    if kinds == ("head_dim",):
        ignored += [m.fc1 for m in mlps]
    extra = {name: p for name, p in model.named_parameters() if name in ("cls_token", "pos_embed")}
    pruner: Any = tp.pruner.BasePruner(
        model,
        torch.zeros(1, *subject.shape),
        importance=importance,
        global_pruning="global" in method,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads={m.qkv: m.num_heads for m in attentions},
        prune_head_dims=True,
        unwrapped_parameters=[(p, 2) for p in extra.values()],  # pyright: ignore
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for m in attentions:
        m.num_heads = pruner.num_heads[m.qkv]
        m.attn_dim = m.qkv.out_features // 3
        m.head_dim = m.attn_dim // m.num_heads
    return model


@cache
def prepared(subject: Any, method: str, seed: int) -> tuple[Any, Any]:
    """The dense model with the gradients that a criterion reads, from the labelled calibration images, and that."""
    import torch_pruning as tp  # pyright: ignore

    model: Any = copy.deepcopy(subject.dense)
    importance = getattr(tp.importance, {
        "magnitude": "GroupMagnitudeImportance", "taylor": "GroupTaylorImportance",
        "hessian": "GroupHessianImportance", "random": "RandomImportance",
    }[method.split(",")[0]])()  # fmt: skip
    if method.startswith("taylor"):
        for images, labels in subject.calibration(seed):
            (F.cross_entropy(model(images), labels) / len(subject.calibration(seed))).backward()
    if method.startswith("hessian"):
        importance.zero_grad()
        for images, labels in subject.calibration(seed)[: subject.settings.hessian_batches]:
            losses = F.cross_entropy(model(images), labels, reduction="none")
            for loss in losses:
                model.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(model)
    return model, importance
