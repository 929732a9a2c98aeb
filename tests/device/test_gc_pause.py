"""Where only routes and processing run, garbage is searched for when memory runs short, and only then."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import nn

from reload_plugin import ReloadSession
from reload_plugin.device import host_memory as memory
from reload_plugin.device.gc_pause import collect_young, full_gc_paused, gc_paused
from reload_plugin.device.host_memory import HostPool
from tests.record.test_aliased_served import (
    A,
    B,
    Computing,
    Linear,
    Method,
    Model,
    Weights,
    cold,
    only_values,
    planned,
    weights,
)
from tests.transaction.test_session import registered  # noqa: F401 - the fixture is used by itself

MIB = 1 << 20
LAYERS, ROWS = 24, 2048
SIZE = 4 * ROWS * 1024
"""Bytes of a layer; all of them are more than a pool has room for."""


class Knot:
    """Something that only a search for garbage frees."""

    def __init__(self, held: object = None) -> None:
        self.held, self.itself = held, self


@pytest.fixture
def disabled() -> Iterator[None]:
    with gc_paused():
        yield


@pytest.mark.usefixtures("disabled")
def test_a_search_that_somebody_asks_for_finds_what_is_young() -> None:
    knot = weakref.ref(Knot())
    assert knot() is not None
    assert collect_young()
    assert knot() is None


def test_no_search_is_added_where_searches_run_by_themselves() -> None:
    with full_gc_paused():
        gc.collect()
        knot = weakref.ref(Knot())
        assert not collect_young()
        assert knot() is not None


@pytest.mark.usefixtures("disabled")
def test_a_pool_without_room_looks_for_blocks_that_only_garbage_has() -> None:
    pool = HostPool()
    first = pool.take(memory.ROOM)
    place = first.data_ptr()
    knot = weakref.ref(Knot(first))
    del first
    assert pool.take(memory.SPARE).data_ptr() == place + memory.ROOM
    assert knot() is not None, "searched although there was room"
    assert pool.take(memory.ROOM).data_ptr() == place
    assert knot() is None


@pytest.mark.usefixtures("disabled")
@pytest.mark.parametrize("short", [False, True])
def test_a_heap_that_grew_too_much_loses_its_garbage_first(
    monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    knot = weakref.ref(Knot())
    alive: list[bool] = []
    allocator = memory.Allocator("one", None, lambda _: alive.append(knot() is not None))
    monkeypatch.setattr(memory, "allocator", lambda: allocator)
    monkeypatch.setattr(memory, "resident", lambda: 500 * MIB)
    memory.keep_within(499 * MIB if short else 500 * MIB, 0)
    assert alive == ([False] if short else [])
    assert (knot() is None) is short


class Asking(Method):
    """Notes whether garbage is searched for while it runs."""

    def __init__(self, seen: list[bool]) -> None:
        self.seen = seen

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.seen.append(gc.isenabled())
        super().process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("kind", "by_copy_plan", "searched"),
    [(Model, True, False), (Computing, True, True), (Model, False, True)],
)
@pytest.mark.parametrize("fails", [False, True])
def test_garbage_waits_only_where_no_loader_runs(
    kind: type[Model], by_copy_plan: bool, searched: bool, fails: bool
) -> None:
    seen: list[bool] = []
    model = cold(A, kind)
    model.linear.quant_method = Asking(seen)
    new = B if by_copy_plan else weights(2, "norm.scale")
    session = planned(model, new) if by_copy_plan else ReloadSession(model)
    before = gc.isenabled(), gc.get_threshold()
    expected = pytest.raises(RuntimeError, match="stop") if fails else contextlib.nullcontext()
    with expected, session, session.undisturbed():
        session.load_last(new.items())
        session.finish()
        if fails:
            raise RuntimeError("stop")
    assert seen == [searched]
    assert (gc.isenabled(), gc.get_threshold()) == before


class Tying(Method):
    """Leaves what it was given to be found by a search for garbage."""

    knots: ClassVar[list[weakref.ref[Knot]]] = []
    most: ClassVar[int] = 0

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        layer.weight = nn.Parameter(torch.empty(ROWS, 1024), requires_grad=False)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.knots.append(weakref.ref(Knot(layer.weight.data)))
        Tying.most = max(Tying.most, sum(knot() is not None for knot in self.knots))
        layer.scale = float(layer.weight.sum())
        del layer.weight
        layer.weight = nn.Parameter(torch.full((2, 2), layer.scale), requires_grad=False)


class Deep(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(Tying()) for _ in range(LAYERS))


def checkpoint(seed: int, small: Weights) -> Weights:
    return small | {f"layers.{n}.weight": torch.full((ROWS, 1024), float(seed + n)) for n in range(LAYERS)}


def test_staging_that_processing_leaves_to_the_garbage_is_used_again() -> None:
    model = cold(checkpoint(1, A), Deep)
    Tying.knots.clear()
    Tying.most, new = 0, checkpoint(2, B)
    with planned(model, new) as session, session.undisturbed():
        session.load_last(new.items())
        assert not gc.isenabled()
        session.finish()
    assert len(Tying.knots) == LAYERS
    assert 1 < Tying.most * SIZE <= memory.ROOM + memory.SPARE + SIZE < LAYERS * SIZE
    assert only_values(model) == only_values(cold(new, Deep))
