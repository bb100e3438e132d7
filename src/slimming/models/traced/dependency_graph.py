"""Find coupled channels with torch-pruning's dependency graph; the only module that uses torch-pruning.

Beyond the documented interface of torch-pruning it replaces two functions of its index mapping, and reads the nodes
and edges of its graph. The requirement is therefore pinned below the next minor version.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimming.core.copies import copied
from slimming.core.modules import MODEL_ERRORS, in_mode
from slimming.errors import UnsupportedModelError
from slimming.models.separate import SeparateLinear
from slimming.models.traced import coupling
from slimming.models.traced.coupling import TooManyStepsError, Visit
from slimming.models.traced.opaque import OpaqueTokenConcat, opaque, opaque_channels
from slimming.models.traced.verification import Pass

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""The layers whose output channels are followed."""


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


@dataclass(frozen=True)
class Coupled:
    """A set of channels that can only be removed together.

    Attributes:
        members: the layers and parameters with these channels; the first one is the layer that was followed.
        beyond: name of the module inside which the channels could not be followed, if so.
    """

    members: list[Member]
    beyond: str | None = None


def coupled_channels(
    model: nn.Module,
    passes: Sequence[Pass],
    opaque_names: Iterable[str],
    normaliser_names: Iterable[str] = (),
    *,
    report: Callable[[str], None] = lambda layer: None,
) -> list[Coupled]:
    """The sets of channels that can only be removed together.

    Args:
        model: on the CPU, with parameters that require gradients; see `with_batch_norms`.
        passes: the forward passes to trace; the sets hold for all of them together.
        opaque_names: names of modules that are not traced inside.
        normaliser_names: names of modules with the same channels at their input and output, not traced inside either.
        report: called with the name of each layer that is followed.

    Raises:
        UnsupportedModelError: torch-pruning cannot trace the model.
    """
    trace = functools.partial(_trace, model, passes, opaque_names, normaliser_names, report)
    try:
        try:
            return trace()
        except MODEL_ERRORS:
            with _SplitTokensByIndex(), OpaqueTokenConcat(), _unsupported_mappings_skipped():
                return trace()
    except MODEL_ERRORS as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise UnsupportedModelError(
            f"torch-pruning cannot trace this model ({type(error).__name__}: {first})"
        ) from error


def _member(visit: Visit) -> Member:
    handler, target = visit.edge.handler.__name__, visit.edge.target
    indices, roots = zip(*visit.pairs, strict=True)
    return Member(
        module=target.module,
        is_output="out" in handler or "depthwise" in handler,
        dim=target.pruning_dim,
        roots=roots,
        indices=indices,
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


class _NormaliserPruner(_OpaquePruner):
    """torch-pruning's interface to an opaque module with the same channels at its input and output."""

    # torch-pruning takes input and output for the same channels if they have one function.
    prune_in_channels = _OpaquePruner.prune_out_channels


def _trace(
    model: nn.Module,
    passes: Sequence[Pass],
    opaque_names: Iterable[str],
    normaliser_names: Iterable[str],
    report: Callable[[str], None],
) -> list[Coupled]:
    """The coupled sets of channels.

    torch-pruning prints warnings about operations that it may not support. They are suppressed, because every group
    is verified on the model afterwards.
    """
    import torch_pruning
    from torch_pruning.dependency import index_mapping

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
        warnings.simplefilter("ignore")
        with (
            opaque(model, opaque_names) as opaque_classes,
            opaque(model, normaliser_names) as normaliser_classes,
            in_mode(model, False),
            _call_log(model) as calls,
        ):
            pruners = {cls: _OpaquePruner() for cls in opaque_classes}
            pruners |= {cls: _NormaliserPruner() for cls in normaliser_classes}
            graph = torch_pruning.DependencyGraph()
            graph.build_dependency(
                model,
                example_inputs=(),
                forward_fn=lambda model, _: calls.with_unread(_differentiable_outputs(model, passes)),
                # Their results are no tensors; where their heads cannot be told apart, they stay whole.
                ignored_layers=[module for module in model.modules() if isinstance(module, SeparateLinear)],
                customized_pruners=pruners,  # pyright: ignore
                verbose=False,
            )
            index_mapping.update_index_mapping(graph)  # with the sizes of concatenations that the first pass found
            return list(_coupled_sets(graph, model, calls, report))


def _coupled_sets(graph: Any, model: nn.Module, calls: _CallLog, report: Callable[[str], None]) -> Iterator[Coupled]:
    """Follow the output channels of every layer that is in no set yet."""
    from torch_pruning._helpers import _HybridIndex
    from torch_pruning.dependency.dependency import Dependency
    from torch_pruning.pruner.function import prune_depthwise_conv_out_channels

    names = {module: name for name, module in model.named_modules()}
    limit = max(size for tensor in model.parameters() for size in tensor.shape)
    ignored = set(graph.IGNORED_LAYERS_IN_TRACING)
    seen: set[Any] = set()
    for layer, node in list(graph.module2node.items()):
        if not isinstance(layer, LAYERS) or layer in ignored or layer in seen:
            continue
        report(names.get(layer, ""))
        channels = graph.get_out_channels(layer)
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        if getattr(layer, "groups", 1) == channels > 1:
            prune = prune_depthwise_conv_out_channels
        first: Any = Dependency(prune, prune, source=node, target=node)
        pairs = [_HybridIndex(idx=index, root_idx=index) for index in range(channels)]
        beyond = None
        try:
            visits = coupling.follow(first, pairs, limit, coupling.STEPS)
        except TooManyStepsError as error:
            visits = error.visits
            own = names.get(error.node.module)
            beyond = calls.module_of(error.node.grad_fn) if own is None else own
        except (IndexError, ZeroDivisionError):  # a channel shuffle or an expansion that torch-pruning does not follow
            continue
        made = [visit.edge.target.module for visit in visits if graph.is_out_channel_pruning_fn(visit.edge.handler)]
        seen.update(made)
        if ignored.isdisjoint(made):
            yield Coupled([_member(visit) for visit in visits if visit.roots], beyond)


@dataclass
class _CallLog:
    """What happened in a forward pass.

    Attributes:
        starts: numbers of operations of the autograd graph, in order.
        modules: the name of the module that was running from each of these operations on.
        made: the outputs of layers.
    """

    starts: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)

    def module_of(self, operation: Any) -> str:
        """The name of the innermost module that made ``operation``; empty for the model itself."""
        position = bisect.bisect_right(self.starts, operation._sequence_nr()) - 1
        return self.modules[position] if position >= 0 else ""

    def with_unread(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """``outputs``, and the outputs of layers that no gradient of these reaches.

        These are layers whose output is detached, or only chooses, such as the scores of a detector's proposals.
        """
        result, reached = list(outputs), set[Any]()
        for tensor in [*outputs, *reversed(self.made)]:
            if tensor.grad_fn is None or tensor.grad_fn in reached:
                continue
            if not any(tensor is output for output in outputs):
                result.append(tensor)
            stack = [tensor.grad_fn]
            while stack:
                node = stack.pop()
                if node is not None and node not in reached:
                    reached.add(node)
                    stack.extend(following for following, _ in node.next_functions)
        return result


@contextlib.contextmanager
def _call_log(model: nn.Module) -> Iterator[_CallLog]:
    """Log the forward pass that runs inside the context."""
    log, stack = _CallLog(), [""]
    like = torch.zeros((), requires_grad=True)

    def note() -> None:
        operation: Any = (like * 1).grad_fn
        log.starts.append(operation._sequence_nr() if operation is not None else 0)
        log.modules.append(stack[-1])

    def enter(name: str) -> None:
        stack.append(name)
        note()

    def leave(module: nn.Module, output: Any) -> None:
        stack.pop()
        note()
        if isinstance(module, LAYERS) and isinstance(output, Tensor):
            log.made.append(output)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        handles.append(module.register_forward_hook(lambda module, _, output: leave(module, output), always_call=True))
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()


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


def _differentiable_outputs(model: nn.Module, passes: Sequence[Pass]) -> list[Tensor]:
    return [tensor for forward in passes for tensor in forward.outputs(model) if tensor.grad_fn is not None]
