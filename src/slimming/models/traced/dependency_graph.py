"""Which channels are coupled, by torch-pruning's dependency graph: all that knows torch-pruning from within.

It goes beyond what torch-pruning documents: it replaces a method of one graph and two functions of its index mapping,
and reads the items of its groups. So the version is pinned below the next minor one.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimming.errors import UnsupportedModelError
from slimming.models.traced.opaque import TokensJoined, channels_seen, closed


@dataclass(frozen=True)
class Member:
    """One side of a layer, or a parameter, in a coupled set of channels.

    Attributes:
        module: the layer, an operation without weights, or the parameter.
        makes: whether the channels are its outputs rather than its inputs.
        dim: dimension of a parameter that holds them.
        roots: for each channel the root channel that it goes with; None where torch-pruning has lost track.
        places: the channels.
    """

    module: Any
    makes: bool
    dim: Any
    roots: Sequence[Any]
    places: Sequence[Any]


def coupled(model: nn.Module, example: Any, claimed: Iterable[str]) -> list[list[Member]]:
    """The sets of channels that go only together; the first member of each is its root.

    Args:
        model: in evaluation mode, on the CPU, with parameters that require gradients; see `thawed`.
        example: what its forward takes.
        claimed: names of modules that are not followed inside.

    Raises:
        UnsupportedModelError: torch-pruning cannot trace the model.
    """
    try:
        try:
            return _trace(model, example, claimed)
        except Exception:  # torch-pruning raises whatever the graph leads it to
            with _TokensApart(), TokensJoined(), _passing_over():
                return _trace(model, example, claimed)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise UnsupportedModelError(
            f"torch-pruning cannot trace this model ({type(error).__name__}: {first})"
        ) from error


def _member(item: Any) -> Member:
    handler = item.dep.handler.__name__
    return Member(
        module=item.dep.target.module,
        makes="out" in handler or "depthwise" in handler,
        dim=item.dep.target.pruning_dim,
        roots=item.root_idxs or range(len(item.idxs)),
        places=item.idxs,
    )


class _Opaque:
    """What torch-pruning asks about a closed module: channels go in, others come out, and nothing ties them."""

    pruning_dim = 1

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Cut nothing: the graph is only read."""
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Cut nothing: the graph is only read."""
        return layer

    def get_out_channels(self, layer: nn.Module) -> int | None:
        """How many channels came out."""
        return channels_seen(layer)[1]

    def get_in_channels(self, layer: nn.Module) -> int | None:
        """How many channels went in."""
        return channels_seen(layer)[0]

    def get_in_channel_groups(self, layer: nn.Module) -> int:
        """Whether channels go in groups of several; they do not."""
        return 1

    get_out_channel_groups = get_in_channel_groups


def _trace(model: nn.Module, example: Any, claimed: Iterable[str]) -> list[list[Member]]:
    """The coupled sets; torch-pruning prints and warns where it is not sure, which the proof of the groups settles."""
    import torch_pruning

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
        warnings.simplefilter("ignore")
        with closed(model, claimed) as classes, _as_it_is(model):
            graph = torch_pruning.DependencyGraph()
            follow = graph.get_pruning_group

            def follow_or_pass(*args: Any) -> Any:
                try:
                    return follow(*args)
                except IndexError:  # its channels are shuffled
                    return []

            vars(graph)["get_pruning_group"] = follow_or_pass
            graph.build_dependency(
                model,
                example_inputs=example,
                output_transform=_first_tensors,
                customized_pruners={cls: _Opaque() for cls in classes},  # pyright: ignore
                verbose=False,
            )
            return [[_member(item) for item in group] for group in graph.get_all_groups() if len(group)]


def thawed(model: nn.Module) -> nn.Module:
    """``model`` with a BatchNorm in place of every frozen one, which torch-pruning does not know as such."""
    statistics = {"weight", "bias", "running_mean", "running_var"}

    def frozen(module: nn.Module) -> bool:
        own = dict(module.named_buffers(recurse=False))
        return not list(module.parameters(recurse=False)) and statistics <= own.keys() and own["weight"].dim() == 1

    names = [name for name, module in model.named_modules() if frozen(module)]
    model = copy.deepcopy(model) if names else model
    for name in names:
        around, _, last = name.rpartition(".")
        old = model.get_submodule(name)
        norm = nn.BatchNorm2d(len(old.weight), dtype=old.weight.dtype).train(old.training)
        setattr(model.get_submodule(around), last, norm)
    return model


@contextlib.contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Keep torch-pruning from switching the model to evaluation, where auxiliary heads do not run."""
    vars(model)["eval"] = lambda: model
    try:
        yield
    finally:
        del vars(model)["eval"]


@contextlib.contextmanager
def _passing_over() -> Iterator[None]:
    """Pass over reshapes and joins whose channels torch-pruning cannot follow; the proof finds groups they spoil."""
    from torch_pruning.dependency import index_mapping

    followed = {
        # A residual sum over one part of a split, joined with the other part, has no size there.
        "update_concat_index_mapping": TypeError,
        "update_reshape_index_mapping": ArithmeticError,
    }
    kept = {name: getattr(index_mapping, name) for name in followed}

    def passing(follow: Callable[[Any, Any], None], error: type[Exception]) -> Callable[[Any, Any], None]:
        def follow_or_pass(graph: Any, node: Any) -> None:
            with contextlib.suppress(error):
                follow(graph, node)

        return follow_or_pass

    for name, error in followed.items():
        setattr(index_mapping, name, passing(kept[name], error))
    try:
        yield
    finally:
        for name, follow in kept.items():
            setattr(index_mapping, name, follow)


class _TokensApart(TorchFunctionMode):
    """Splits of tokens inside attention become selections: torch-pruning takes every split for one of channels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.split, Tensor.split) and len(args) > 1:
            tensor, sizes = args[:2]
            dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
            if tensor.dim() == 4 and dim % 4 == 2:
                places = torch.arange(tensor.shape[dim], device=tensor.device)
                return tuple(tensor.index_select(dim, part) for part in places.split(sizes))
        return func(*args, **kwargs)


def _first_tensors(output: Any) -> Any:
    """The differentiable tensors of an output of any form."""
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
