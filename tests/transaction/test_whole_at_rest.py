"""Between any two calls of an open update the live model shows exactly what it serves."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from reload_plugin import SessionError, reload_weights, restore_for_reloading, status
from reload_plugin.errors import LateWriteError
from reload_plugin.transaction.chunked_update import abort_weight_update, finish_layerwise, open_layerwise
from tests.transaction.test_session import (
    METHODS,
    A,
    B,
    Hooked,
    Make,
    Method,
    Model,
    Packing,
    Tied,
    ViewedByAnother,
    cold,
    identities,
    registered,  # noqa: F401 - the fixture is used by itself
    values,
)

MAKES: list[Make] = [
    *(lambda method=method: Model(method) for method in METHODS),
    Tied,
    ViewedByAnother,
    Hooked,
]


def assert_whole(model: nn.Module) -> None:
    """Every tensor that can be reached has its memory: a checksum, a saver and a dummy batch read it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        needed = tensor.numel() * tensor.element_size()
        assert tensor.untyped_storage().nbytes() >= needed, f"{name} is a placeholder"
        assert not tensor.is_meta, name


def by_hand(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """As frameworks do that look the parameter up and call its loader."""
    parameter = dict(model.named_parameters())[name]
    getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)


def by_loader(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    model.load_weights([(name, tensor)])


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("known", [False, True], ids=["new", "copy plan known"])
def test_an_open_update_shows_what_is_served_between_its_calls(make: Make, known: bool) -> None:
    model = cold(make, A)
    if known:
        reload_weights(model, iter(A.items()))
    before, ids = values(model), identities(model)
    open_layerwise(model)
    assert_whole(model)
    for name, tensor in B.items():
        model.load_weights([(name, tensor)])
        assert_whole(model)
        assert values(model) == before
        assert identities(model) == ids
    finish_layerwise(model)
    assert values(model) == values(cold(make, B))
    assert identities(model) == ids


@pytest.mark.parametrize("make", MAKES)
def test_a_block_shows_what_is_served_between_its_calls(make: Make) -> None:
    model = cold(make, A)
    before, ids = values(model), identities(model)
    with restore_for_reloading(model):
        for name, tensor in B.items():
            assert values(model) == before
            assert_whole(model)
            model.load_weights([(name, tensor)])
        assert values(model) == before
    assert values(model) == values(cold(make, B))
    assert identities(model) == ids


def test_what_is_written_to_a_served_buffer_between_two_calls_is_kept() -> None:
    """verl copies buffers back; that goes to real memory, and to the buffer that is served."""

    class Buffered(Model):
        def __init__(self) -> None:
            super().__init__(Packing)
            self.register_buffer("counter", torch.zeros(3), persistent=False)

    model = cold(Buffered, A)
    open_layerwise(model)
    model.load_weights([("first.weight", B["first.weight"])])
    dict(model.named_buffers())["counter"].copy_(torch.ones(3))
    abort_weight_update(model)
    assert torch.equal(model.counter, torch.ones(3))


@pytest.mark.parametrize("load", [by_loader, by_hand])
@pytest.mark.parametrize("method", [Method, Packing])
def test_loaders_of_parameters_load_into_the_update(
    method: type, load: Callable[[nn.Module, str, torch.Tensor], None]
) -> None:
    model = cold(lambda: Model(method), A)
    before = values(model)
    attributes = {name: dict(p.__dict__) for name, p in model.named_parameters()}
    open_layerwise(model)
    for name, tensor in B.items():
        load(model, name, tensor)
        assert values(model) == before
    finish_layerwise(model)
    assert values(model) == values(cold(lambda: Model(method), B))
    assert {name: dict(p.__dict__) for name, p in model.named_parameters()}.keys() == attributes.keys()
    assert all("weight_loader" not in p.__dict__ for p in model.parameters()) or method is Method


def test_a_loader_of_a_complete_group_is_refused_and_writes_nothing() -> None:
    model = cold(lambda: Model(Packing), A)
    reload_weights(model, iter(A.items()))
    before = values(model)
    open_layerwise(model)
    model.load_weights([("first.weight", B["first.weight"])])
    with pytest.raises(LateWriteError, match=r"first\.weight"):
        by_hand(model, "first.weight", B["first.weight"])
    assert values(model) == before
    abort_weight_update(model)
    assert values(model) == before
    assert all("weight_loader" not in parameter.__dict__ for parameter in model.parameters())


def test_a_second_reload_inside_a_block_is_refused_and_the_block_goes_on() -> None:
    model = cold(Model, A)
    before = values(model)
    with restore_for_reloading(model):
        model.load_weights([("first.weight", B["first.weight"])])
        assert status(model)[0].state == "updating"
        with pytest.raises(SessionError, match="A weight update is open"):
            reload_weights(model, iter(B.items()))
        with pytest.raises(SessionError, match="A weight update is open"), restore_for_reloading(model):
            pass
        assert values(model) == before
        model.load_weights([("lm_head.weight", B["lm_head.weight"])])
    assert values(model) == values(cold(Model, B))
    assert status(model)[0].state == "serving"


def test_an_update_that_is_aborted_inside_its_block_ends_in_an_error_and_the_old_weights() -> None:
    model = cold(Model, A)
    before = values(model)

    def aborted() -> None:
        with restore_for_reloading(model):
            model.load_weights(iter(B.items()))
            assert abort_weight_update(model)

    with pytest.raises(SessionError, match="aborted"):
        aborted()
    assert values(model) == before
    reload_weights(model, iter(B.items()))
    assert values(model) == values(cold(Model, B))
