"""A detector in the manner of YOLO and a U-Net, in plain PyTorch."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 1, stride: int = 1) -> nn.Sequential:
    """A convolution with BatchNorm and SiLU."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class Bottleneck(nn.Module):
    """Two convolutions with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = conv(width, width, 3), conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class CSP(nn.Module):
    """A cross-stage block: one half passes bottlenecks, and all intermediate results are concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1) -> None:
        super().__init__()
        self.half = outputs // 2
        self.split = conv(inputs, 2 * self.half)
        self.blocks = nn.ModuleList(Bottleneck(self.half) for _ in range(depth))
        self.join = conv((2 + depth) * self.half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.join(torch.cat(parts, 1))


class TwoBranchCSP(nn.Module):
    """A cross-stage block with a convolution for each half."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1) -> None:
        super().__init__()
        half = outputs // 2
        self.left, self.right = conv(inputs, half), conv(inputs, half)
        self.blocks = nn.Sequential(*(Bottleneck(half) for _ in range(depth)))
        self.join = conv(2 * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.blocks(self.left(x)), self.right(x)], 1))


class SPPF(nn.Module):
    """Pooling at several scales."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.join = conv(width, width // 2), conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.reduce(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.join(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Backbone, top-down and bottom-up path, and heads for boxes and classes at three scales."""

    image_size = 64

    def __init__(self, width: int = 8, classes: int = 3, bins: int = 4, csp: type[nn.Module] = CSP) -> None:
        super().__init__()
        w = [width * 2**stage for stage in range(5)]
        self.stem = nn.Sequential(conv(3, w[0], 3, 2), conv(w[0], w[1], 3, 2), csp(w[1], w[1]))
        self.stage3 = nn.Sequential(conv(w[1], w[2], 3, 2), csp(w[2], w[2], 2))
        self.stage4 = nn.Sequential(conv(w[2], w[3], 3, 2), csp(w[3], w[3]))
        self.stage5 = nn.Sequential(conv(w[3], w[4], 3, 2), csp(w[4], w[4]), SPPF(w[4]))
        self.top4, self.top3 = csp(w[4] + w[3], w[3]), csp(w[3] + w[2], w[2])
        self.down4, self.down5 = conv(w[2], w[2], 3, 2), conv(w[3], w[3], 3, 2)
        self.bottom4, self.bottom5 = csp(w[2] + w[3], w[3]), csp(w[3] + w[4], w[4])
        self.boxes = nn.ModuleList(
            nn.Sequential(conv(size, 2 * bins, 3), nn.Conv2d(2 * bins, 4 * bins, 1)) for size in w[2:]
        )
        self.classes = nn.ModuleList(nn.Sequential(conv(size, 8, 3), nn.Conv2d(8, classes, 1)) for size in w[2:])
        self.bins = bins

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        p3 = self.stage3(self.stem(x))
        p4 = self.stage4(p3)
        p5 = self.stage5(p4)
        n4 = self.top4(torch.cat([F.interpolate(p5, scale_factor=2.0), p4], 1))
        n3 = self.top3(torch.cat([F.interpolate(n4, scale_factor=2.0), p3], 1))
        n4 = self.bottom4(torch.cat([self.down4(n3), n4], 1))
        n5 = self.bottom5(torch.cat([self.down5(n4), p5], 1))
        maps = (n3, n4, n5)
        classes = [head(x).flatten(2) for head, x in zip(self.classes, maps, strict=True)]
        distances = []
        for head, x in zip(self.boxes, maps, strict=True):
            weights = head(x).flatten(2).unflatten(1, (4, self.bins)).softmax(2)
            distances.append((weights * torch.arange(self.bins, device=x.device).view(1, 1, -1, 1)).sum(2))
        return {"logits": torch.cat(classes, 2).mT, "distances": torch.cat(distances, 2).mT}


class DoubleConv(nn.Sequential):
    """Two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(conv(inputs, outputs, 3), conv(outputs, outputs, 3))


class UNet(nn.Module):
    """A U-Net with transposed convolutions."""

    image_size = 32

    def __init__(self, width: int = 8, classes: int = 3, depth: int = 3) -> None:
        super().__init__()
        w = [width * 2**stage for stage in range(depth + 1)]
        pairs = list(itertools.pairwise(w))
        self.first = DoubleConv(3, w[0])
        self.down = nn.ModuleList(DoubleConv(*pair) for pair in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(high, low, 2, 2) for low, high in reversed(pairs))
        self.join = nn.ModuleList(DoubleConv(high, low) for low, high in reversed(pairs))
        self.head = nn.Conv2d(w[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = [self.first(x)]
        for block in self.down:
            skipped.append(block(F.max_pool2d(skipped[-1], 2)))
        x = skipped.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skipped.pop(), up(x)], 1))
        return self.head(x)


MODELS = {
    "YOLO": lambda: (Yolo().eval(), (torch.randn(1, 3, 64, 64),)),
    "YOLO, two branches": lambda: (Yolo(csp=TwoBranchCSP).eval(), (torch.randn(1, 3, 64, 64),)),
    "U-Net": lambda: (UNet().eval(), (torch.randn(1, 3, 32, 32),)),
}
