"""A detector and a segmenter: dense, cut in one shot, and retrained, at 70 % and 50 % of the multiply-adds.

    python examples/scenes.py --output DIR
    .venv/bin/python benchmarks/dense_tasks.py --data DIR --work DIR [--steps 600] [--seeds 0 1 2]

The detector is torchvision's RetinaNet with a small ResNet of timm, the segmenter transformers' SegFormer, both trained
from random weights on scenes composed of EuroSAT tiles. Each is cut by this library with compensation, and by
Torch-Pruning (magnitude of whole groups) to the same multiply-adds where it can. The dense model is trained on for as
long as the slim ones are, as a control. mAP is that of COCO, by torchmetrics and pycocotools; mIoU is over all classes
and the background. Each seed draws the weights and the batches anew. Trained weights stay in ``--work``, where an
interrupted run continues.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.datasets import CocoDetection
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.transforms.functional import pil_to_tensor

import slimming
from slimming.core.example_inputs import ExampleCall
from slimming.counting.measured import count

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmarks.common import parser, store, table  # noqa: E402

BUDGETS = (0.7, 0.5)
CLASSES = 4
"""Classes of objects; the background is one more."""
SIDE, BATCH, CALIBRATION = 96, 16, 128


class Pyramid(nn.Module):
    """A ResNet of timm with a feature pyramid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body: Any = timm.create_model("resnet10t", features_only=True, out_indices=(2, 3, 4))
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), width)
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps at strides 8, 16 and 32."""
        return self.pyramid({str(level): feature for level, feature in enumerate(self.body(images))})


def detector() -> nn.Module:
    """RetinaNet at the size of the scenes, with BatchNorm in its heads, since it starts from random weights."""
    backbone = Pyramid(48)
    anchors = AnchorGenerator(tuple((side, side * 1.4) for side in (16, 24, 40)), ((0.7, 1.0, 1.4),) * 3)
    head = RetinaNetHead(48, anchors.num_anchors_per_location()[0], CLASSES + 1, norm_layer=nn.BatchNorm2d)
    sizes = {"min_size": SIDE, "max_size": SIDE, "image_mean": [0.4, 0.4, 0.4], "image_std": [0.15, 0.15, 0.15]}
    return RetinaNet(backbone, CLASSES + 1, anchor_generator=anchors, head=head, detections_per_img=20, **sizes)


def segmenter() -> nn.Module:
    """SegFormer with three stages."""
    config = transformers.SegformerConfig(
        num_encoder_blocks=3,
        depths=[2, 2, 2],
        sr_ratios=[4, 2, 1],
        hidden_sizes=[32, 64, 128],
        num_attention_heads=[1, 2, 4],
        patch_sizes=[7, 3, 3],
        strides=[4, 2, 2],
        mlp_ratios=[4, 4, 4],
        decoder_hidden_size=96,
        num_labels=CLASSES + 1,
    )
    model = transformers.SegformerForSemanticSegmentation(config)
    model.image_size = SIDE  # pyright: ignore
    return model


class Detection:
    """Training and mAP of a detector."""

    name, metric = "RetinaNet", "mAP"

    def __init__(self, data: Path) -> None:
        self.train, self.val = (self._read(data / split) for split in ("train", "val"))

    @staticmethod
    def _read(place: Path) -> list[tuple[Tensor, dict[str, Tensor]]]:
        scenes = CocoDetection(str(place / "images"), str(place / "annotations.json"))
        result = []
        for image, objects in scenes:
            boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.tensor([each["category_id"] for each in objects], dtype=torch.int64)
            result.append((pil_to_tensor(image).float() / 255, {"boxes": boxes, "labels": labels}))
        return result

    def make(self) -> nn.Module:
        model = detector()
        image, target = self.train[0]
        model.example_inputs = [([image],), ([image], [target])]  # pyright: ignore
        return model

    def loss(self, model: nn.Module, chosen: Sequence[int]) -> Tensor:
        flips = torch.rand(len(chosen)) < 0.5
        images, targets = zip(
            *(_flipped(self.train[at]) if flip else self.train[at] for at, flip in zip(chosen, flips, strict=True)),
            strict=True,
        )
        return sum(model(list(images), list(targets)).values())

    def calibration(self) -> list[Any]:
        images = [image for image, _ in self.train[:CALIBRATION]]
        return [(images[at : at + BATCH],) for at in range(0, len(images), BATCH)]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        model.eval()
        metric = MeanAveragePrecision()
        for at in range(0, len(self.val), 50):
            images, targets = zip(*self.val[at : at + 50], strict=True)
            metric.update(model(list(images)), list(targets))
        return float(metric.compute()["map"])

    def example(self) -> Any:
        return ([self.train[0][0]],)


def _flipped(scene: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    image, target = scene
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = SIDE - boxes[:, [2, 0]]
    return image.flip(-1), {**target, "boxes": boxes}


class Segmentation:
    """Training and mIoU of a segmenter."""

    name, metric = "SegFormer", "mIoU"

    def __init__(self, data: Path) -> None:
        self.train, self.val = (self._read(data / split) for split in ("train", "val"))

    @staticmethod
    def _read(place: Path) -> tuple[Tensor, Tensor]:
        names = sorted(file.name for file in (place / "images").iterdir())
        images = torch.stack([pil_to_tensor(Image.open(place / "images" / name)) for name in names]).float() / 255
        masks = torch.cat([pil_to_tensor(Image.open(place / "masks" / name)) for name in names]).long()
        return (images - 0.4) / 0.15, masks

    def make(self) -> nn.Module:
        return segmenter()

    def loss(self, model: nn.Module, chosen: Sequence[int]) -> Tensor:
        images, masks = (values[torch.tensor(chosen)] for values in self.train)
        if torch.rand(()) < 0.5:
            images, masks = images.flip(-1), masks.flip(-1)
        return F.cross_entropy(self._logits(model, images), masks)

    @staticmethod
    def _logits(model: nn.Module, images: Tensor) -> Tensor:
        return F.interpolate(model(images).logits, size=images.shape[2:], mode="bilinear")

    def calibration(self) -> list[Any]:
        return list(self.train[0][:CALIBRATION].split(BATCH))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        model.eval()
        intersections, unions = torch.zeros(CLASSES + 1), torch.zeros(CLASSES + 1)
        for images, masks in zip(self.val[0].split(50), self.val[1].split(50), strict=True):
            found = self._logits(model, images).argmax(1)
            for label in range(CLASSES + 1):
                intersections[label] += ((found == label) & (masks == label)).sum()
                unions[label] += ((found == label) | (masks == label)).sum()
        return float((intersections / unions.clamp_min(1)).mean())

    def example(self) -> Any:
        return self.train[0][:1]


def train(task: Any, model: nn.Module, steps: int, seed: int, rate: float = 1e-3) -> None:
    """AdamW with a warm-up and a cosine; the same batches for the same seed."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    scenes = len(task.train) if isinstance(task.train, list) else len(task.train[0])
    for step in range(steps):
        loss = task.loss(model, torch.randint(scenes, (BATCH,)).tolist())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{task.name}: step {step} of {steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


def ours(task: Any, dense: nn.Module, budget: float) -> nn.Module:
    """Scored and compensated on unlabelled training images."""
    scored = slimming.score(dense, task.calibration(), images=CALIBRATION)
    plan = slimming.plan(scored, slimming.Budget(macs=budget))
    return slimming.cut(scored.model, plan, images=scored.images)


def theirs(task: Any, dense: nn.Module, budget: float) -> nn.Module:
    """Torch-Pruning by magnitude, over all layers together; the ratio is bisected until the MACs are met."""
    whole, low, high = macs(task, dense), 0.0, 0.95
    best: tuple[float, nn.Module] | None = None
    failed: Exception | None = None
    for _ in range(8):
        ratio = (low + high) / 2
        try:
            model = _pruned(task, dense, ratio)
            share = macs(task, model) / whole
        except Exception as error:  # cut through, or not supported
            high, failed = ratio, error
            continue
        if share <= budget and (best is None or share > best[0]):
            best = share, model
        low, high = (ratio, high) if share > budget else (low, ratio)
    if best is None:
        raise failed or RuntimeError(f"no ratio reaches {budget:.0%} of the MACs")
    return best[1]


def _pruned(task: Any, dense: nn.Module, ratio: float) -> nn.Module:
    import torch_pruning as tp  # pyright: ignore

    model = copy.deepcopy(dense).eval()
    last = [module for name, module in model.named_modules() if name.endswith(("cls_logits", "bbox_reg", "classifier"))]
    example = task.example()
    attention = [module for module in model.modules() if type(module).__name__ == "SegformerAttention"]
    heads = {
        layer: module.num_attention_heads
        for module in attention
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    }
    pruner: Any = tp.pruner.BasePruner(
        model,
        example[0] if isinstance(example, tuple) else example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,
        ignored_layers=last,
        num_heads=heads,
        output_transform=_tensors,
        forward_fn=lambda model, images: _tensors(model(images)),
    )
    pruner.step()
    return model


def _tensors(outputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs if isinstance(outputs, (list, tuple)) else dict(outputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def macs(task: Any, model: nn.Module) -> int:
    """Counted multiply-adds of one image."""
    return count(model, ExampleCall.of(task.example())).macs


def unpruned(task: Any, dense: nn.Module, budget: float) -> nn.Module:
    """The dense model, which is then trained for as long as the slim ones are."""
    return copy.deepcopy(dense)


METHODS: dict[str, Callable[[Any, nn.Module, float], nn.Module]] = {"slimming": ours, "Torch-Pruning": theirs}


def main() -> None:
    """Run everything that is not in ``--work`` yet, and write the table."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="what examples/scenes.py wrote")
    options.add_argument("--work", type=Path, required=True, help="directory of trained models and of rows")
    options.add_argument("--steps", type=int, default=600, help="of the dense training; half of it for each retraining")
    options.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    settings = options.parse_args()
    torch.set_num_threads(settings.threads)
    rows: list[dict[str, Any]] = []
    for task_class in (Detection, Segmentation):
        task = task_class(settings.data)
        for seed in settings.seeds:
            rows += of_seed(task, seed, settings.steps, settings.work / f"seed-{seed}")
    store("dense_tasks", settings, markdown(rows), rows=rows)
    print(markdown(rows))


def of_seed(task: Any, seed: int, steps: int, work: Path) -> list[dict[str, Any]]:
    """The rows of one task with one seed."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    dense = task.make()
    _kept(work / f"{task.name}.pt", dense, functools.partial(train, task, dense, steps, seed))
    common = {"task": task.name, "metric": task.metric, "seed": seed, "dense_macs": macs(task, dense)}
    runs = [("dense", unpruned, 1.0), *((name, cut, budget) for budget in BUDGETS for name, cut in METHODS.items())]
    return [{**common, **_row(task, dense, name, cut, budget, steps, seed, work)} for name, cut, budget in runs]


def _row(
    task: Any, dense: nn.Module, method: str, cut: Any, budget: float, steps: int, seed: int, work: Path
) -> dict[str, Any]:
    place = work / f"{task.name} {method} {budget}.json"
    if place.exists():
        return json.loads(place.read_text())
    row: dict[str, Any] = {"method": method, "budget": budget}
    began = time.perf_counter()
    try:
        small = cut(task, dense, budget)
    except Exception as error:  # what the other library raises is the result
        if method != "Torch-Pruning":
            raise
        return {**row, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"}
    row |= {"seconds": time.perf_counter() - began, "macs": macs(task, small)}
    row |= {"params": sum(p.numel() for p in small.parameters()), "cut": task.measure(small)}
    small.requires_grad_(True)
    train(task, small, steps // 2, seed + 1000)
    row["retrained"] = task.measure(small)
    place.write_text(json.dumps(row))
    return row


def _kept(file: Path, model: nn.Module, work: Callable[[], None]) -> None:
    """Load the weights in ``file``, or do the work that makes them and keep them."""
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        model.eval()
        return
    work()
    torch.save(model.state_dict(), file)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table: means over the seeds, with the smallest and the largest value."""
    lines = []
    for task, method, budget in dict.fromkeys((row["task"], row["method"], row["budget"]) for row in rows):
        same = [row for row in rows if (row["task"], row["method"], row["budget"]) == (task, method, budget)]
        name = f"{task}, {same[0]['metric']}"
        if failed := [row["error"] for row in same if "error" in row]:
            lines.append([name, method, f"{budget:.0%} asked", "", "", failed[0]])
            continue
        share = statistics.mean(row["macs"] / row["dense_macs"] for row in same)
        params = statistics.mean(row["params"] for row in same) / 1e6
        spread = [_spread([row[key] for row in same]) for key in ("cut", "retrained")]
        lines.append([name, method, f"{share:.1%}", f"{params:.2f} M", *spread])
    return table(["model", "cut by", "MACs", "params", "straight after the cut", "after training on"], lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


if __name__ == "__main__":
    main()
