"""The comparison itself: what it must see, in a model small enough to break on purpose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.engine.gpu_methods.walker import differences, moved, take_picture, unchanged


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


def model() -> nn.Linear:
    """A layer with a helper object that holds an alias, a view, a float, a closure and a partial."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(8).view(2, 4))
        layer.bias.zero_()
    captured = torch.ones(3)
    layer.kernel = SimpleNamespace(
        alias=layer.weight,
        view=layer.weight.detach()[1],
        slotted=Slotted(0.5),
        call=lambda: captured,
        part=functools.partial(torch.add, torch.zeros(2)),
        names=["a", None, torch.bfloat16],
    )
    return layer


BREAKS: dict[str, tuple[Callable[[nn.Linear], object], str]] = {
    "a value": (lambda m: m.weight.data.add_(1), "weight"),
    "the sign of a zero": (lambda m: m.bias.data.neg_(), "bias"),
    "a float in slots": (lambda m: setattr(m.kernel.slotted, "scale", 0.25), "slotted.scale"),
    "a float that became an int": (lambda m: setattr(m.kernel.slotted, "scale", 1), "slotted.scale"),
    "a tensor in a closure": (lambda m: m.kernel.call().zero_(), "<captured>"),
    "a tensor in a partial": (lambda m: m.kernel.part.args[0].fill_(2), "part"),
    "an item of a list": (lambda m: m.kernel.names.__setitem__(0, "b"), "names[0]"),
    "a new attribute": (lambda m: setattr(m.kernel, "extra", 1), "extra"),
    "a lost attribute": (lambda m: delattr(m.kernel, "part"), "part"),
    "an alias that became a copy": (lambda m: setattr(m.kernel, "alias", m.weight.detach().clone()), "alias"),
    "a view that became a copy": (lambda m: setattr(m.kernel, "view", m.kernel.view.clone()), "view"),
    "a shape": (lambda m: setattr(m.bias, "data", m.bias.data.view(1, 2)), "bias"),
    "a stride": (lambda m: setattr(m.weight, "data", m.weight.data.t().contiguous().t()), "weight"),
    "an attribute of a parameter": (lambda m: setattr(m.weight, "output_dim", 0), "output_dim"),
}


def test_equal_models_have_no_differences() -> None:
    assert differences(take_picture(model()), take_picture(model())) == []


@pytest.mark.parametrize("what", BREAKS)
def test_a_difference_is_seen_and_named(what: str) -> None:
    change, path = BREAKS[what]
    other = model()
    change(other)
    assert any(path in line for line in differences(take_picture(model()), take_picture(other)))


def test_a_tensor_that_stays_has_not_moved() -> None:
    layer = model()
    before = take_picture(layer)
    layer.weight.data.copy_(torch.ones(2, 4))
    assert moved(before, take_picture(layer)) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: setattr(m.weight, "data", m.weight.data.clone()), "another address"),
        (lambda m: setattr(m, "weight", nn.Parameter(m.weight.data)), "another tensor object"),
        (lambda m: delattr(m, "bias"), "no longer reachable"),
    ],
)
def test_a_tensor_that_moved_is_named(change: Callable[[nn.Linear], object], word: str) -> None:
    layer = model()
    before = take_picture(layer)
    change(layer)
    assert any(word in line for line in moved(before, take_picture(layer)))


def test_unchanged_lists_equal_tensors_only() -> None:
    other = model()
    other.weight.data.add_(1)
    paths = unchanged(take_picture(model()), take_picture(other))
    assert any("bias" in path for path in paths)
    assert not any("weight" in path for path in paths)
