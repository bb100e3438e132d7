"""Deep copies of models, with what ``copy.deepcopy`` refuses or forgets."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode


class WithoutGraph(TorchFunctionMode):
    """Within this context, ``copy.deepcopy`` copies tensors without their autograd graph, instead of refusing them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of ``model`` without what a forward pass left in it.

    Tensors in attributes of its modules, also in lists, dictionaries and objects, are copied without their autograd
    graph; the hosts' caches of values that they computed from the weights are empty in the copy. Graph modules of
    torch.fx keep the attributes that were set on them, and modules their modes; a plain copy loses both.

    Args:
        model: the model, which is not changed.
        memo: objects by `id` that are not copied but replaced, as in ``copy.deepcopy``.
    """
    memo = {} if memo is None else memo
    # Most of what a module holds are empty tables of hooks, which copy.deepcopy would rebuild slowly.
    for module in model.modules():
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:
                memo.setdefault(id(value), OrderedDict())
    with WithoutGraph():
        made = copy.deepcopy(model, memo)
        modules = dict(model.named_modules())
        for name, module in modules.items():
            if isinstance(module, fx.GraphModule):
                other = made.get_submodule(name)
                missing = {key: value for key, value in vars(module).items() if key not in vars(other)}
                vars(other).update(copy.deepcopy(missing, memo))
                other.train(module.training)  # torchvision's have one graph for each mode
    found = dict(made.named_modules())
    for name, module in modules.items():
        if name in found:  # the memo may have replaced a module
            found[name].training = module.training
    for module in made.modules():
        clear_caches_(module)
    return made


def clear_caches_(module: nn.Module) -> None:
    """Empty the host's caches of values that it computed from the tensors of ``module``."""
    for name, value in vars(module).items():
        if name.endswith("_cache") and isinstance(value, dict):
            value.clear()
