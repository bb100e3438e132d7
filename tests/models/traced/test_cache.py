"""The cache of readings: equal architectures share a value, others do not, and the oldest is dropped first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from slimming.models.traced.cache import CAPACITY, ArchitectureCache, architecture_digest


def net(width: int = 8, stride: int | tuple[int, int] = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU())


def set_attribute(model: Any) -> None:
    model[0].num_heads = 2


def set_option(model: Any) -> None:
    model[2].inplace = True


def change_class(model: Any) -> None:
    model[2] = nn.GELU()


def add_buffer(model: Any) -> None:
    model[0].register_buffer("table", torch.zeros(2))


def add_buffer_outside_the_state(model: Any) -> None:
    model[0].register_buffer("table", torch.zeros(2), persistent=False)


def test_weights_device_mode_and_names_of_classes_do_not_matter() -> None:
    first, second = net(), net().train()
    second.pretrained_cfg = {"label_names": ["cat"]}  # pyright: ignore
    assert architecture_digest(first.eval(), (3, 8, 8)) == architecture_digest(second, (3, 8, 8))


CHANGES = [set_attribute, set_option, change_class, add_buffer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_architecture_that_differs_has_another_digest(change: Callable[[Any], None]) -> None:
    changed = net()
    change(changed)
    assert architecture_digest(net(), (3, 8, 8)) != architecture_digest(changed, (3, 8, 8))


def test_a_buffer_in_the_state_dict_is_another_than_one_outside() -> None:
    inside, outside = net(), net()
    add_buffer(inside)
    add_buffer_outside_the_state(outside)
    assert architecture_digest(inside, (3, 8, 8)) != architecture_digest(outside, (3, 8, 8))


def test_sizes_strides_and_input_shapes_have_digests_of_their_own() -> None:
    cases = [(net(), (3, 8, 8)), (net(), (3, 8, 9)), (net(9), (3, 8, 8)), (net(stride=(1, 2)), (3, 8, 8))]
    assert len({architecture_digest(model, shape) for model, shape in cases}) == len(cases)


def test_a_value_is_computed_once_and_the_oldest_is_dropped() -> None:
    cache: ArchitectureCache[int] = ArchitectureCache()
    computed: list[int] = []

    def value(number: int) -> int:
        computed.append(number)
        return number

    for number in range(CAPACITY):
        assert cache.get(str(number), lambda number=number: value(number)) == number
        assert cache.get(str(number), lambda: value(-1)) == number
    assert computed == [*range(CAPACITY)]
    cache.get("one more", lambda: value(100))
    assert cache.get("1", lambda: value(-1)) == 1
    assert cache.get("0", lambda: value(200)) == 200
    cache.clear()
    assert cache.get("1", lambda: value(300)) == 300


def test_a_failure_is_not_stored() -> None:
    cache: ArchitectureCache[int] = ArchitectureCache()
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 // 0)
    assert cache.get("a", lambda: 2) == 2
