"""Experts that a rank has more than once (EPLB): every copy is reloaded; moved experts are refused."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from reload_plugin.errors import UnsupportedError
from tests.engine.gpu_methods import walker
from tests.sim_device.device import SimDevice
from tests.sim_device.models import DEVICE, EXPERTS, GUARD, ROADS, ROW_OF, expect_unmoved, on_host, start
from tests.sim_device.process import on_sim

if TYPE_CHECKING:
    from tests.engine.gpu_methods import driver

COPIES = 2


@contextlib.contextmanager
def balanced(generation: str) -> Iterator[driver.Built]:
    """A mixture of experts of which the first two are there twice, with vLLM's tables of the start."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.eplb.eplb_state import EplbState

    from tests.engine.gpu_methods import driver

    original = driver._engine_config

    def configured(folder: str, row: Any) -> Any:
        made = original(folder, row)
        made.parallel_config.enable_eplb = True  # vLLM asks for several ranks
        made.parallel_config.eplb_config.num_redundant_experts = COPIES
        return made

    row = ROW_OF[EXPERTS]
    with driver.machine(row, DEVICE), mock.patch.object(driver, "_engine_config", configured):
        model = driver.build(row, generation, DEVICE)
        experts, layers = model.model.num_logical_experts, model.model.num_moe_layers
        places = EplbState.build_initial_global_physical_to_logical_map(experts, COPIES)
        table = torch.full((layers, experts, COPIES + 1), -1)
        for place, expert in enumerate(places):
            table[:, expert, (table[0, expert] >= 0).sum()] = place
        loads = torch.zeros(layers, experts + COPIES, dtype=torch.int32, device=DEVICE)
        model.model.set_eplb_state(loads, table.to(DEVICE), (table >= 0).sum(-1).to(DEVICE))
        with set_current_vllm_config(model.config):
            yield model


def experts_of(model: driver.Built) -> list[torch.Tensor]:
    """(places, ...) each, in host memory."""
    torch.accelerator.synchronize()
    found = [p for name, p in model.model.named_parameters() if name.endswith(("w13_weight", "w2_weight"))]
    return [parameter.detach().cpu() for parameter in found]


def picture(model: driver.Built) -> walker.Picture:
    torch.accelerator.synchronize()
    return on_host(walker.take_picture(model.model))


def exchange_two_experts(model: driver.Built) -> None:
    """What a rearrangement does, in the first layer: weights go to other places, and the tables with them."""
    for weight in model.model.expert_weights[0]:
        both = weight[[0, 1]].clone()
        weight[0].copy_(both[1])
        weight[1].copy_(both[0])
    layer = model.model.moe_layers[0]
    holders = (layer, getattr(layer, "router", None))
    state = next(one for one in (getattr(part, "eplb_state", None) for part in holders) if one is not None)
    state.logical_to_physical_map[0, 0].fill_(1)
    state.logical_to_physical_map[1, 0].fill_(0)


@on_sim(start)
def test_every_copy_of_an_expert_is_reloaded_where_it_is_served(sim: SimDevice) -> None:
    cold = {}
    for generation in "AB":
        with balanced(generation) as model:
            cold[generation] = picture(model)
        del model
        gc.collect()
    with balanced("A") as model:
        before = walker.take_picture(model.model)
        for road, generation in zip(ROADS, "BABABA", strict=True):
            ROADS[road](model, generation)
            for weight in experts_of(model):
                assert torch.equal(weight[-COPIES:], weight[:COPIES]), road
            found = walker.differences(cold[generation], picture(model))
            assert [line for line in found if not line.startswith(GUARD)] == [], road
            expect_unmoved(before, model)


@pytest.mark.parametrize("road", ROADS)
@on_sim(start)
def test_experts_that_were_moved_are_left_where_they_are(sim: SimDevice, road: str) -> None:
    with balanced("A") as model:
        exchange_two_experts(model)
        before = picture(model)
        with pytest.raises(UnsupportedError, match="rearranged"):
            ROADS[road](model, "B")
        found = walker.differences(before, picture(model))
        assert [line for line in found if not line.startswith(GUARD)] == []
