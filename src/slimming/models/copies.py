"""Deep copies of models, with what ``copy.deepcopy`` refuses or forgets."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of ``model``.

    Tensors that a forward pass left in attributes of its modules are copied without their autograd graph, with which
    ``copy.deepcopy`` refuses them. Graph modules of torch.fx keep the attributes that were set on them, and modules
    their modes; a plain copy loses both.
    """
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    made = copy.deepcopy(model, memo)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, fx.GraphModule):
            other = made.get_submodule(name)
            missing = {key: value for key, value in vars(module).items() if key not in vars(other)}
            vars(other).update(copy.deepcopy(missing, memo))
            other.train(module.training)  # torchvision's have one graph for each mode
    for name, module in modules.items():
        made.get_submodule(name).training = module.training
    return made
