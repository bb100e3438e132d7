"""Remove tokens before blocks: give a host's block a subclass whose forward first selects the tokens that it keeps.

The names of modules and parameters and the state dict do not change, and the host's forward runs as it is. Inputs that
have one entry per token, such as rotary tables and attention masks, are made by the model for the full grid; they are
selected at the same positions. So are tables over pairs of tokens that a module inside the block computes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.groups import Group, TokenInput
from slimming.errors import UnsupportedModelError
from slimming.models.layers import UnavailableMethod
from slimming.models.token_masks import last_sites, present_positions
from slimming.models.traced.free_heads import MARK, free_heads_class
from slimming.models.traced.input_columns import COLUMNS, replaced_at, select_columns, set_columns_, set_index_

TOKENS, TABLE = "tokens", "token_table"
"""Keys of a structure's entry: the tokens that a block keeps, and the part of a table over tokens that is used."""

TABLE_METHODS = ("get_bias", "_get_rel_pos_bias")
"""Methods of timm's modules that compute a relative position bias (H, N, N), with a batch dimension of 1 or none."""

NEEDS_GRID = ("forward_intermediates", "get_intermediate_layers", "prune_intermediate_layers", "set_input_size")
"""Methods of models and encoders that return or change the full grid of tokens."""

_HOST = "slimming_token_host"


def token_entries(groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """The entries of the structure for blocks without some tokens, and for the modules that make inputs over tokens."""
    present, last = present_positions(groups, kept), last_sites(groups)
    result: dict[str, dict[str, Any]] = {}
    before: dict[str, tuple[int, ...]] = {}
    for group in groups:
        site = group.token
        if site is None:
            continue
        left = present[group.name]
        incoming = before.get(site.sequence, tuple(range(site.grid)))
        before[site.sequence] = left
        if len(left) == site.grid:
            continue
        entry = {
            "path": list(site.path),
            "grid": site.grid,
            "prefix": site.prefix,
            "suffix": site.suffix,
            "incoming": list(incoming),
            "positions": list(left),
            "inputs": [_plain(each) for each in site.inputs if each.module == site.block],
        }
        result[site.block] = {TOKENS: entry}
        index = [*range(site.prefix), *(site.prefix + position for position in left)]
        index += range(site.prefix + site.grid, site.prefix + site.grid + site.suffix)
        for table in site.tables:
            result[table] = {TABLE: {"index": index, "of": site.prefix + site.grid + site.suffix}}
        if last[site.sequence] is group:
            for name in dict.fromkeys(each.module for each in site.inputs if each.module != site.block):
                inputs = [_plain(each) for each in site.inputs if each.module == name]
                result[name] = {TOKENS: {**entry, "path": [], "incoming": list(left), "inputs": inputs}}
    return result


def _plain(each: TokenInput) -> dict[str, Any]:
    return {"path": list(each.path), "dims": list(each.dims), "fixed": each.fixed}


def adapt_(module: nn.Module, entry: Mapping[str, Any], like: Tensor | None) -> None:
    """Make ``module`` select the tokens and columns of its ``entry`` of a structure.

    Args:
        module: a module of the host, or one that has been adapted before.
        entry: its entry.
        like: a tensor on its device.
    """
    tokens, table, columns = (entry.get(key) for key in (TOKENS, TABLE, COLUMNS))
    if tokens is None and table is None and columns is None:
        return
    device = like.device if like is not None and not like.is_meta else torch.device("cpu")
    if tokens is not None:
        _set_tokens_(module, tokens, device)
    elif table is not None:
        module.__dict__["token_table_size"] = int(table["of"])
        set_index_(module, "token_table_index", table["index"], device)
    if columns is not None:
        set_columns_(module, columns, device)
    host, free = _host_of(module)
    module.__class__ = _adapted(host, free, "token_table_size" in vars(module))


def _set_tokens_(module: nn.Module, tokens: Mapping[str, Any], device: torch.device) -> None:
    prefix, grid, suffix = (int(tokens[name]) for name in ("prefix", "grid", "suffix"))
    positions, incoming = tokens["positions"], tokens["incoming"]
    ends = range(prefix + grid, prefix + grid + suffix)
    place_of = {position: place for place, position in enumerate(incoming)}
    end = prefix + len(incoming)
    selected = [*range(prefix), *(prefix + place_of[p] for p in positions), *range(end, end + suffix)]
    settings = {
        "token_path": tuple(tokens["path"]),
        "token_positions": tuple(positions),
        "tokens_incoming": prefix + len(incoming) + suffix,
        "token_sizes": (grid, prefix + grid + suffix),
        "token_inputs": tuple((tuple(e["path"]), tuple(e["dims"]), bool(e["fixed"])) for e in tokens["inputs"]),
    }
    module.__dict__.update(settings)
    set_index_(module, "token_index", selected if len(positions) < len(incoming) else [], device)
    set_index_(module, "token_grid_index", positions, device)
    set_index_(module, "token_full_index", [*range(prefix), *(prefix + p for p in positions), *ends], device)


def selected_inputs(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The arguments of a module with the tokens that it keeps, and with the columns of tables that it uses.

    Raises:
        UnsupportedModelError: the sequence has another length than when tokens were removed.
    """
    values: Mapping[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    if "token_positions" in vars(module):
        values = _select_tokens(module, values)
    if "columns_places" in vars(module):
        values = select_columns(module, values)
    return tuple(values[place] for place in range(len(args))), {name: values[name] for name in kwargs}


def _select_tokens(module: Any, values: Mapping[int | str, Any]) -> Mapping[int | str, Any]:
    if module.token_path:
        values = replaced_at(values, module.token_path, lambda x: _selected(module, x))
    grid, full = module.token_sizes
    for path, dims, fixed in module.token_inputs:
        size, index = (full, module.token_full_index) if fixed else (grid, module.token_grid_index)
        values = replaced_at(values, path, lambda x, s=size, i=index, d=dims: _along(x, d, s, i))
    return values


def _selected(module: Any, x: Tensor) -> Tensor:
    if x.shape[1] != module.tokens_incoming:
        raise UnsupportedModelError(
            f"Tokens were cut for sequences of {module.tokens_incoming} tokens here, but this image has {x.shape[1]}: "
            "use the image size that the model was slimmed at, or plan without tokens."
        )
    return x.index_select(1, module.token_index) if module.token_index.numel() else x


def _along(x: Tensor, dims: Sequence[int], size: int, index: Tensor) -> Tensor:
    for dim in dims:
        if x.shape[dim] != size:
            raise UnsupportedModelError(
                f"Tokens were cut for a grid with {size} entries per table, but this image has {x.shape[dim]}: use the "
                "image size that the model was slimmed at, or plan without tokens."
            )
        x = x.index_select(dim, index)
    return x


def _host_of(module: nn.Module) -> tuple[type[nn.Module], bool]:
    """The host's class of ``module``, and whether its forward is rewritten for free heads."""
    cls, free = type(module), False
    while True:
        if _HOST in vars(cls):
            cls = vars(cls)[_HOST]
        elif MARK in vars(cls):
            cls, free = cls.__bases__[0], True
        else:
            return cls, free


@functools.cache
def _adapted(host: type[nn.Module], free: bool, table: bool) -> type[nn.Module]:
    """A subclass of ``host`` that selects its inputs, and with ``table`` the part of the table that it computes."""
    base = free_heads_class(host) if free else host
    if base is None:
        raise UnsupportedModelError(
            f"The forward of {host.__name__} cannot be rewritten for fewer heads in the installed version of its "
            "library. Install the version with which the model was cut."
        )
    methods = _with_part_of_table(base) if table else {}
    if "forward" not in methods:
        methods["forward"] = _with_selected_inputs(base)
    reduced = functools.partial(_reduced, host, free, table)
    extra = {
        "__module__": host.__module__,
        "__doc__": host.__doc__,
        "__reduce_ex__": lambda module, protocol: reduced(module),
        _HOST: base,
    }
    return type(host.__name__, (base,), {**methods, **extra})


def _with_selected_inputs(base: Any) -> Any:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = selected_inputs(self, args, kwargs)
        return base.forward(self, *args, **kwargs)

    return forward


def table_methods(cls: type[nn.Module]) -> tuple[str, ...]:
    """The methods with which modules of ``cls`` compute a table over tokens."""
    return tuple(name for name in TABLE_METHODS if callable(getattr(cls, name, None))) or ("forward",)


def _with_part_of_table(base: Any) -> dict[str, Any]:
    def method(name: str) -> Any:
        full = getattr(base, name)

        @functools.wraps(full)
        def part(self: Any, *args: Any, **kwargs: Any) -> Any:
            table = full(self, *args, **kwargs)
            size = self.token_table_size
            return _along(table, (-2, -1), size, self.token_table_index)

        return part

    return {name: method(name) for name in table_methods(base)}


def computes_part_of_table(module: nn.Module) -> bool:
    """Whether ``module`` computes the part of a table over tokens that is left after a cut."""
    return getattr(type(module), _HOST, None) is not None and "token_table_size" in vars(module)


def _reduced(host: type[nn.Module], free: bool, table: bool, module: nn.Module) -> tuple[Any, ...]:
    """How ``pickle``, `torch.save` and ``copy`` describe a module whose class has no name: by the host's class."""
    return new_adapted, (host, free, table), module.__dict__


def new_adapted(host: type[nn.Module], free: bool, table: bool) -> nn.Module:
    """An empty module of the adapted class, which `pickle` fills."""
    cls = _adapted(host, free, table)
    return cls.__new__(cls)


def bar_grid_methods_(model: nn.Module) -> None:
    """Replace the methods that need the full grid in ``model`` and the encoders in it that lost tokens."""
    cut = [name for name, module in model.named_modules() if "token_positions" in vars(module)]
    if not cut:
        return
    owners = {prefix for name in cut for prefix in _ancestors(name)}
    for owner in owners:
        module = model.get_submodule(owner)
        for method in NEEDS_GRID:
            if callable(getattr(type(module), method, None)):
                module.__dict__[method] = UnavailableMethod(
                    f"{method} needs the full grid of tokens, but tokens were cut from this model. Call the model "
                    'itself, or cut a plan without tokens (keep={"head": …, "mlp": …}).'
                )


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]
