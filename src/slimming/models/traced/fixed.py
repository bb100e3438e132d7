"""Find what cannot change its size: computed weights, quantized layers, and programs that fix their shapes."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from slimming.errors import UnsupportedModelError

_REMOVE = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm({})",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm({})",
}
"""Hooks of torch.nn.utils -> the call that removes them."""
_PRUNE = "torch.nn.utils.prune.remove({}, {!r})"
_PARAMETRIZATIONS = "torch.nn.utils.parametrize.remove_parametrizations({}, {!r})"


def computed_weights(model: nn.Module) -> dict[str, str]:
    """The modules with a parametrized weight, such as a weight norm -> why channels through them are not cut."""
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        found = _computed_weight(module)
        if found is None:
            continue
        method, call, tensor = found
        call = call.format(f"model.get_submodule({name!r})", tensor)
        reasons[name] = (
            f"{method} computes the {tensor} of {name} in each forward pass. To cut them, call {call}, and apply it "
            "again to the slim model"
        )
    return reasons


def _computed_weight(module: nn.Module) -> tuple[str, str, str] | None:
    """The method, the call that removes it, and the name of the tensor."""
    if parametrize.is_parametrized(module):
        tensor, chain = next(iter(module.get_submodule("parametrizations").named_children()))
        method = type(next(chain.children())).__name__.removeprefix("_")
        return method, _PARAMETRIZATIONS, tensor
    for hook in module._forward_pre_hooks.values():
        cls = type(hook)
        if cls.__module__.startswith("torch.nn.utils."):
            tensor = str(getattr(hook, "name", getattr(hook, "_tensor_name", "weight")))
            return cls.__name__, _REMOVE.get(cls.__name__, _PRUNE), tensor
    return None


def check_resizable(model: nn.Module) -> None:
    """Check that the model has no observers, no quantized layers, and is not a program with fixed shapes.

    Raises:
        UnsupportedModelError: it is one, or has such layers.
    """
    for name, module in model.named_modules():
        program = "a TorchScript program" if isinstance(module, torch.jit.ScriptModule) else None
        if isinstance(module, fx.GraphModule) and "train" in vars(module):  # it refuses to change its mode
            program = "a program of torch.export"
        if program is not None:
            raise UnsupportedModelError(
                f"{name or 'This model'} is {program}, whose sizes are fixed: give the nn.Module that it was made from "
                "to slimming, and make the program anew from the slim model."
            )
        if type(module).__module__.startswith("torch.ao."):
            raise UnsupportedModelError(
                f"This {type(model).__name__} is prepared for quantization: {name!r} is a {type(module).__name__} of "
                "torch.ao, which rounds values and keeps statistics of each channel. Cut the model before that, and "
                "prepare the slim model (prepare, prepare_qat, prepare_fx) afterwards."
            )
