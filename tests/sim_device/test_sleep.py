"""Sleep: memory that is away is not touched, and what was lost is made again by a reload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import reload_plugin
from tests.engine.gpu_methods import walker
from tests.sim_device.device import SimDevice
from tests.sim_device.models import DENSE, FEW, ROADS, built, expect_cold, expect_unmoved, start
from tests.sim_device.process import on_sim

if TYPE_CHECKING:
    from tests.engine.gpu_methods.driver import Built
    from tests.sleep_backends import SleepingWorker

POOL = "weights"
LARGE_TABLE = "mxfp4 experts marlin"
"""Its rotary table is computed by the constructor, and too large for the record to keep."""


@contextmanager
def sleeper(name: str) -> Iterator[tuple[Built, SleepingWorker]]:
    """A model whose start allocated memory that can sleep, and vLLM's worker around it."""
    from tests.sleep_backends import SleepingWorker, register

    register()
    with built(name, pool=POOL) as model:
        yield model, SleepingWorker(model.model, "SimBackend")


@pytest.mark.parametrize("name", [*FEW, LARGE_TABLE])
@pytest.mark.parametrize("how", ["level 2", "discard"])
@on_sim(start)
def test_a_reload_heals_a_model_whose_weights_were_discarded(sim: SimDevice, name: str, how: str) -> None:
    with sleeper(name) as (model, worker):
        before = walker.take_picture(model.model)
        for generation, road in (("B", "host iterator"), ("A", "live push")):
            if how == "discard":
                worker.discard(("weights",))
            else:
                worker.sleep(2)
            worker.wake_up(["weights"])
            ROADS[road](model, generation)
            expect_cold(name, generation, model)
            expect_unmoved(before, model)


@pytest.mark.parametrize("road", ROADS)
@on_sim(start)
def test_a_reload_touches_no_memory_that_is_away(sim: SimDevice, road: str) -> None:
    with sleeper(DENSE) as (model, worker):
        worker.sleep(1)
        with pytest.raises(reload_plugin.SessionError, match="Wake it up first"):
            ROADS[road](model, "B")
        assert reload_plugin.status(model.model)[0].state == "asleep"
        worker.wake_up(["weights"])
        expect_cold(DENSE, "A", model)
        ROADS[road](model, "B")
        expect_cold(DENSE, "B", model)
