"""A dry run leaves the model as it was, whatever its loader does, and says why it failed."""

import gc
import os
import signal
import types
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from reload_plugin.checkpoint import TensorInfo
from reload_plugin.errors import LateWriteError, ReloadError
from reload_plugin.plan.checkpoint_plan import PlanUnavailableError, make_plan
from reload_plugin.plan.dry_run import DryRun
from reload_plugin.plan.known_checkpoint import KnownCheckpoint
from reload_plugin.record import layer_groups
from reload_plugin.record.model_record import record_of
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.reload import reload_weights
from tests.transaction.test_session import A, B, Method, Model, Packing, cold, identities, registered, values  # noqa: F401 - the fixture is used by itself

INFOS = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in A.items()]
METHODS = pytest.mark.parametrize("method", [Method, Packing])


def loader_that(model: nn.Module, act: object) -> None:
    """Have the loader of a model do something before each weight it loads."""

    class Acting(type(model)):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            def acted() -> Iterable[tuple[str, torch.Tensor]]:
                for name, tensor in weights:
                    act(name)
                    yield name, tensor

            return super().load_weights(acted())

    model.__class__ = Acting


@METHODS
def test_a_dry_run_changes_nothing(method: type) -> None:
    model = cold(lambda: Model(method), A)
    before = values(model), identities(model), state_of(model).served_digest()
    with DryRun(model) as dry_run:
        dry_run.load([INFOS])
        assert (values(model), identities(model)) == before[:2], "it serves as soon as the loader is done"
        assert dry_run.account() == ({}, {})
        assert set(dry_run.coverage().values()) == {"whole"}
        assert dry_run.copy_plan().of.keys() == A.keys()
    assert not dry_run.mismatches
    state_of(model).generation = type(state_of(model).generation)()
    assert (values(model), identities(model), state_of(model).served_digest()) == before
    reload_weights(model, B.items())
    assert values(model) == values(cold(lambda: Model(method), B))


@METHODS
@pytest.mark.parametrize("error", [ReloadError("stop"), KeyboardInterrupt(), SystemExit()], ids=str)
def test_whatever_a_loader_raises_the_model_is_as_it_was(method: type, error: BaseException) -> None:
    model = cold(lambda: Model(method), A)
    before = values(model), identities(model)

    def act(name: str) -> None:
        if name == list(A)[-1]:
            raise error

    loader_that(model, act)
    with pytest.raises(type(error)), DryRun(model) as dry_run:
        dry_run.load([INFOS])
    assert (values(model), identities(model)) == before
    assert not record_of(model).changes


def test_ctrl_c_comes_when_the_model_is_as_it_was() -> None:
    model = cold(lambda: Model(Packing), A)
    before, at_interrupt = (values(model), identities(model)), []
    loader_that(model, lambda _: os.kill(os.getpid(), signal.SIGINT))

    def handler(number: int, frame: types.FrameType | None) -> None:
        at_interrupt.append((values(model), identities(model)))
        raise KeyboardInterrupt

    original = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            make_plan(model, INFOS, "A")
    finally:
        signal.signal(signal.SIGINT, original)
    assert at_interrupt == [before]


def test_nobody_takes_a_digest_of_the_load_format() -> None:
    model = cold(lambda: Model(Packing), A)
    digests = []
    loader_that(model, lambda _: digests.append(state_of(model).served_digest()))
    make_plan(model, INFOS, "A")
    assert digests == [None] * len(A)
    assert state_of(model).served_digest() is not None


def test_other_layers_are_left_alone_where_only_some_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_groups, "SMALL_GROUP", -1)
    model = cold(lambda: Model(Method), A)
    before = values(model), identities(model)
    with DryRun(model, KnownCheckpoint(groups=frozenset({"first"}))) as dry_run:
        dry_run.load([INFOS[:1]])
        assert dry_run.coverage() == {"first.weight": "whole"}
        with pytest.raises(LateWriteError, match=r"wrote to lm_head\.weight"):
            dry_run.load([INFOS[1:]])
    assert (values(model), identities(model)) == before


def test_each_listing_is_loaded_by_itself() -> None:
    model = cold(lambda: Model(Method), A)
    calls: list[int] = []
    loader_that(model, lambda _: calls.append(len(calls)))
    with DryRun(model) as dry_run:
        dry_run.load([[info] for info in INFOS])
        dry_run.load([INFOS[:1]])
    assert dry_run.loaded.tensor_plans.keys() == A.keys()
    assert dry_run.mismatches.duplicate == {INFOS[0].name: "sent more than once"}


def test_staging_of_a_dry_run_is_given_back() -> None:
    model = cold(lambda: Model(Packing), A)
    with DryRun(model) as dry_run:
        dry_run.load([INFOS])
        held = [s for group in dry_run._groups for s in group.storages if s.materialised]
        assert not [storage for storage in held if storage.primary.is_parameter]
    gc.collect()


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_want_of_memory_is_not_a_misshapen_weight(error: Exception) -> None:
    model = cold(lambda: Model(Method), A)
    before = values(model), identities(model)

    def act(name: str) -> None:
        if name == list(A)[-1]:
            raise error

    loader_that(model, act)
    with pytest.raises(PlanUnavailableError, match="Memory ran out while 'lm_head"):
        make_plan(model, INFOS, "A")
    with pytest.raises(ReloadError, match=r"Memory ran out while 'lm_head.*serves what it served before"):
        reload_weights(model, A.items())
    assert (values(model), identities(model)) == before
