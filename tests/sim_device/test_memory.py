"""Extra memory of the device during a reload: one layer, however many layers the model has."""

from __future__ import annotations

import gc

import pytest
import torch

import reload_plugin
from tests.sim_device.device import SimDevice
from tests.sim_device.models import DENSE, EXPERTS, PACKED, built, expect_cold, start, weights
from tests.sim_device.process import on_sim

FEW_LAYERS, MANY_LAYERS = 4, 12


def extra(sim: SimDevice, name: str, layers: int) -> int:
    """Bytes beside the weights at the peak of a later reload that commits layer by layer."""
    with built(name, layers=layers) as model:
        for generation in "BA":
            gc.collect()
            torch.accelerator.synchronize()
            before = sim.counters.allocated
            sim.reset()
            pairs = iter(weights(model, generation))
            reload_plugin.reload_weights(model.model, pairs, policy="streaming")
            peak = sim.counters.peak_allocated - before
        expect_cold(name, "A", model, layers)
    del model
    gc.collect()
    return peak


@pytest.mark.parametrize("name", [DENSE, PACKED, EXPERTS])
@on_sim(start)
def test_more_layers_take_no_more_memory(sim: SimDevice, name: str) -> None:
    assert extra(sim, name, MANY_LAYERS) <= 1.1 * extra(sim, name, FEW_LAYERS)
