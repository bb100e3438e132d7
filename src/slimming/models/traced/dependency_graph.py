"""Find coupled channels with torch-pruning's dependency graph; the only module that uses torch-pruning.

Beyond the documented interface of torch-pruning it replaces one method of a graph and two functions of its index
mapping, and reads the items of its groups. The requirement is therefore pinned below the next minor version.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimming.core.copies import copied
from slimming.core.modules import MODEL_ERRORS, in_mode
from slimming.errors import UnsupportedModelError
from slimming.models.traced.opaque import OpaqueTokenConcat, opaque, opaque_channels
from slimming.models.traced.verification import Pass


@dataclass(frozen=True)
class Member:
    """The input or output channels of a layer, or a parameter, in a coupled set of channels.

    Attributes:
        module: the layer, an operation without weights, or the parameter.
        is_output: whether these are the output channels of the layer rather than its input channels.
        dim: dimension of the channels in a parameter.
        roots: for each channel, the channel of the first member that it is coupled with; None where torch-pruning
            could not follow it.
        indices: the channels.
    """

    module: Any
    is_output: bool
    dim: Any
    roots: Sequence[Any]
    indices: Sequence[Any]


def coupled_channels(model: nn.Module, passes: Sequence[Pass], opaque_names: Iterable[str]) -> list[list[Member]]:
    """The sets of channels that can only be removed together; the first member of each is its root.

    Args:
        model: on the CPU, with parameters that require gradients; see `with_batch_norms`.
        passes: the forward passes to trace; the sets hold for all of them together.
        opaque_names: names of modules that are not traced inside.

    Raises:
        UnsupportedModelError: torch-pruning cannot trace the model.
    """
    try:
        try:
            return _trace(model, passes, opaque_names)
        except MODEL_ERRORS:
            with _SplitTokensByIndex(), OpaqueTokenConcat(), _unsupported_mappings_skipped():
                return _trace(model, passes, opaque_names)
    except MODEL_ERRORS as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise UnsupportedModelError(
            f"torch-pruning cannot trace this model ({type(error).__name__}: {first})"
        ) from error


def _member(item: Any) -> Member:
    handler = item.dep.handler.__name__
    return Member(
        module=item.dep.target.module,
        is_output="out" in handler or "depthwise" in handler,
        dim=item.dep.target.pruning_dim,
        roots=item.root_idxs or range(len(item.idxs)),
        indices=item.idxs,
    )


class _OpaquePruner:
    """torch-pruning's interface to an opaque module, whose input and output channels are independent."""

    pruning_dim = 1

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Return ``layer`` unchanged: the graph is only read."""
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Return ``layer`` unchanged: the graph is only read."""
        return layer

    def get_out_channels(self, layer: nn.Module) -> int | None:
        """The number of output channels."""
        return opaque_channels(layer)[1]

    def get_in_channels(self, layer: nn.Module) -> int | None:
        """The number of input channels."""
        return opaque_channels(layer)[0]

    def get_in_channel_groups(self, layer: nn.Module) -> int:
        """The number of channel groups, as in a grouped convolution."""
        return 1

    get_out_channel_groups = get_in_channel_groups


def _trace(model: nn.Module, passes: Sequence[Pass], opaque_names: Iterable[str]) -> list[list[Member]]:
    """The coupled sets of channels.

    torch-pruning prints warnings about operations that it may not support. They are suppressed, because every group
    is verified on the model afterwards.
    """
    import torch_pruning

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
        warnings.simplefilter("ignore")
        with opaque(model, opaque_names) as opaque_classes, in_mode(model, False):
            graph = torch_pruning.DependencyGraph()
            get_group = graph.get_pruning_group

            def get_group_or_none(*args: Any) -> Any:
                try:
                    return get_group(*args)
                except IndexError:  # a channel shuffle, which torch-pruning does not follow
                    return []

            vars(graph)["get_pruning_group"] = get_group_or_none
            graph.build_dependency(
                model,
                example_inputs=(),
                forward_fn=lambda model, _: _differentiable_outputs(model, passes),
                customized_pruners={cls: _OpaquePruner() for cls in opaque_classes},  # pyright: ignore
                verbose=False,
            )
            return [[_member(item) for item in group] for group in graph.get_all_groups() if len(group)]


def with_batch_norms(model: nn.Module) -> nn.Module:
    """``model`` with ``nn.BatchNorm2d`` in place of frozen BatchNorm classes, which torch-pruning does not support.

    The model is copied if it has any.
    """
    statistics = {"weight", "bias", "running_mean", "running_var"}

    def is_frozen_norm(module: nn.Module) -> bool:
        buffers = dict(module.named_buffers(recurse=False))
        no_parameters = not list(module.parameters(recurse=False))
        return no_parameters and statistics <= buffers.keys() and buffers["weight"].dim() == 1

    names = [name for name, module in model.named_modules() if is_frozen_norm(module)]
    model = copied(model) if names else model
    for name in names:
        parent, _, child = name.rpartition(".")
        frozen = model.get_submodule(name)
        norm = nn.BatchNorm2d(len(frozen.weight), dtype=frozen.weight.dtype).train(frozen.training)
        setattr(model.get_submodule(parent), child, norm)
    return model


@contextlib.contextmanager
def _unsupported_mappings_skipped() -> Iterator[None]:
    """Skip reshapes and concatenations that torch-pruning cannot map.

    Groups that become wrong because of it fail their verification.
    """
    from torch_pruning.dependency import index_mapping

    errors = {
        # torch-pruning has no size for a residual sum over one part of a split that is concatenated with the other
        # part.
        "update_concat_index_mapping": TypeError,
        "update_reshape_index_mapping": ArithmeticError,
    }
    originals = {name: getattr(index_mapping, name) for name in errors}

    def skipping(update: Callable[[Any, Any], None], error: type[Exception]) -> Callable[[Any, Any], None]:
        def update_or_skip(graph: Any, node: Any) -> None:
            with contextlib.suppress(error):
                update(graph, node)

        return update_or_skip

    for name, error in errors.items():
        setattr(index_mapping, name, skipping(originals[name], error))
    try:
        yield
    finally:
        for name, update in originals.items():
            setattr(index_mapping, name, update)


class _SplitTokensByIndex(TorchFunctionMode):
    """Replace splits along the token dimension by index selections: torch-pruning takes every split for channels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.split, Tensor.split) and len(args) > 1:
            tensor, sizes = args[:2]
            dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
            if tensor.dim() == 4 and dim % 4 == 2:
                indices = torch.arange(tensor.shape[dim], device=tensor.device)
                return tuple(tensor.index_select(dim, part) for part in indices.split(sizes))
        return func(*args, **kwargs)


def _differentiable_outputs(model: nn.Module, passes: Sequence[Pass]) -> Any:
    return [tensor for forward in passes for tensor in forward.outputs(model) if tensor.grad_fn is not None]
