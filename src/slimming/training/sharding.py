"""Train with sharded weights, by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Masks, penalties, evaluation and files need whole weights. A copy of the model is therefore sharded and trained, and its
weights are gathered into the model for evaluations, saved states, and at the end. Parameters with fewer than two
dimensions (masks, biases, norms) and buffers are small: the copy shares them with the model, whole on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from slimming.core.copies import copied
from slimming.errors import ConfigError
from slimming.training.config import TrainConfig
from slimming.training.distributed import asks_for_fsdp, rank_and_world_size


def shard(model: nn.Module, accelerator: Accelerator, config: TrainConfig) -> ShardedModel | None:
    """Return a sharded copy of ``model`` if the launcher asks for FSDP2, which has no effect on a single process.

    Raises:
        ConfigError: a setting of the training or of the launcher does not work with sharded weights.
    """
    if not asks_for_fsdp() or rank_and_world_size()[1] == 1:
        return None
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    _check(config, plugin)
    return ShardedModel(model, accelerator.device, plugin)


def _check(config: TrainConfig, plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse by name what needs whole weights in every step, or was not tried."""
    refused = {
        "ema": config.ema is not None,
        "precision fp16": config.precision == "fp16",
        "compile": config.compile,
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
    }
    for name, asked in refused.items():
        if asked:
            raise ConfigError(
                f"{name} does not work with sharded weights (FSDP2). Leave it out, or train without FSDP."
            )


class ShardedModel:
    """A model, and the sharded copy of it that is trained.

    Args:
        model: the model, whole on every process; between trainings its weights are on the CPU.
        device: device of the training.
        plugin: settings of Accelerate, of which the wrapping policy, ``reshard_after_forward`` and ``cpu_offload`` are
            used.
    """

    def __init__(self, model: nn.Module, device: torch.device, plugin: FullyShardedDataParallelPlugin) -> None:
        self.model, self.device = model, device
        for tensor in _tensors(model):  # as DistributedDataParallel does
            dist.broadcast(tensor.data, src=0)
        shared = [tensor for tensor in _tensors(model) if tensor.dim() < 2 or not isinstance(tensor, nn.Parameter)]
        self.copy = copied(model, {id(tensor): tensor for tensor in shared})
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        whole = [parameter for parameter in self.copy.parameters() if parameter.dim() < 2]
        settings: dict[str, Any] = {"mesh": mesh, "offload_policy": plugin.cpu_offload, "ignored_params": set(whole)}
        reshard: Any = plugin.reshard_after_forward
        wraps = _wrapping(plugin)
        for module in reversed(list(self.copy.modules())[1:]):
            if wraps(module):
                fully_shard(module, reshard_after_forward=reshard, **settings)
        self.root = fully_shard(self.copy, **settings)
        self.whole = [parameter for parameter in whole if parameter.requires_grad]
        self.release()

    def _pairs(self) -> Iterator[tuple[nn.Parameter, DTensor]]:
        """The whole and the sharded weights."""
        for parameter, sharded in zip(self.model.parameters(), self.copy.parameters(), strict=True):
            if isinstance(sharded, DTensor):
                yield parameter, sharded

    @torch.no_grad()
    def gather(self) -> None:
        """Copy the trained weights to the model; every process must call it."""
        for parameter, sharded in self._pairs():
            parameter.data = sharded.full_tensor().to(self.device)

    def release(self) -> None:
        """Move the whole weights to the CPU, which makes room on the device."""
        for parameter, _ in self._pairs():
            parameter.data = parameter.data.cpu()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The model has the trained weights in this block; every process must enter it."""
        self.gather()
        yield
        self.release()

    @torch.no_grad()
    def scatter(self) -> None:
        """Copy the weights of the model to the shards; every process must call it."""
        for parameter, sharded in self._pairs():
            sharded.copy_(distribute_tensor(parameter.data.to(sharded.device), sharded.device_mesh, sharded.placements))

    def average_whole(self) -> None:
        """Replace the gradients of the parameters that are not sharded by their means over all processes."""
        grads = [parameter.grad for parameter in self.whole if parameter.grad is not None]
        if grads:
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Do not exchange gradients in this block, which accumulates them."""
        self.root.set_requires_gradient_sync(False)
        yield
        self.root.set_requires_gradient_sync(True)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _wrapping(plugin: FullyShardedDataParallelPlugin) -> Callable[[nn.Module], bool]:
    """Whether a module is gathered and released by itself; the rest is one unit with the model."""
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    names, least = plugin.transformer_cls_names_to_wrap or [], plugin.min_num_params or 0
    if policy is transformer_auto_wrap_policy:
        return lambda module: type(module).__name__ in names
    if policy is size_based_auto_wrap_policy:
        return lambda module: sum(parameter.numel() for parameter in module.parameters()) > least
    return lambda module: False


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients, whole and sharded; every process must call it if some are sharded."""
    shards = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    norm = torch.nn.utils.get_total_norm([grad for grad in grads if not isinstance(grad, DTensor)])
    if not shards:
        return norm
    squares = torch.nn.utils.get_total_norm(shards).square()
    dist.all_reduce(squares)
    return (norm.to(squares.device).square() + squares).sqrt()


@torch.no_grad()
def clip_(grads: Sequence[Tensor], largest: float, norm: Tensor) -> None:
    """Scale gradients, whole or sharded, so that their norm ``norm`` becomes at most ``largest``."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(factor.to(local.device))


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer with whole tensors; every process must call it."""
    moments = {
        index: {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": moments}


def sharded_state(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return a whole state of an optimizer with tensors that are sharded like its ``parameters``."""

    def like(value: Any, parameter: Tensor) -> Any:
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    moments = {
        index: {name: like(value, parameters[index]) for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": moments}
