"""What to add to timm's train.py for a search, in a miniature of its loop with timm's own helpers.

    python examples/adapters/timm_train.py [--steps 100]

timm's script is not part of its package. It makes the optimiser with `create_optimizer_v2`, and steps with a
`NativeScaler` or by hand; either way the optimiser's step is where a search can enter: lines (1) to (3) below are all
that the script needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler, dispatch_clip_grad

import common


def main(words: Sequence[str] | None = None) -> None:
    """Search, cut to half of the multiply-adds, save."""
    options = common.parser(__doc__)
    options.add_argument("--scaler", action="store_true", help="step by timm's NativeScaler, as with --amp")
    settings = options.parse_args(words)
    torch.manual_seed(0)
    images, labels, classes = common.images(settings.images)
    model = common.vit(len(classes))
    masks = common.attach(model)  # (1) after create_model
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    optimizer.register_step_pre_hook(lambda *_: masks.before_step())  # (2) after create_optimizer_v2
    loss_scaler = NativeScaler(device="cpu") if settings.scaler else None
    loss_fn = LabelSmoothingCrossEntropy(0.1)
    for _ in range(settings.steps):
        chosen = torch.randint(len(images), (32,))
        loss = loss_fn(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        if loss_scaler is not None:
            loss_scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        else:
            loss.backward()
            dispatch_clip_grad(model.parameters(), value=1.0)
            optimizer.step()
    common.finish(model, masks, settings.output)  # (3) at the end


if __name__ == "__main__":
    main()
