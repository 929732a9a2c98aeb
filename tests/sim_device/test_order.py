"""Work of a reload is ordered, whatever stream its caller is on, and buffers are not reused too early."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import reload_plugin
from tests.engine.gpu_methods import walker
from tests.sim_device.device import SimDevice
from tests.sim_device.models import (
    DENSE,
    DEVICE,
    FEW,
    PACKED,
    ROADS,
    built,
    expect_cold,
    expect_unmoved,
    start,
    weights,
)
from tests.sim_device.process import on_sim

if TYPE_CHECKING:
    from tests.engine.gpu_methods.driver import Built

SEEDS = (None, 1, 2, 3)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", FEW)
@on_sim(start)
def test_warm_equals_cold_by_every_road(sim: SimDevice, name: str, road: str) -> None:
    with built(name) as model:
        before = walker.take_picture(model.model)
        for generation in "BAB":
            ROADS[road](model, generation)
            expect_cold(name, generation, model)
            expect_unmoved(before, model)


@pytest.mark.parametrize("seed", SEEDS)
@on_sim(start)
def test_warm_equals_cold_in_other_orders(sim: SimDevice, seed: int | None) -> None:
    with built(DENSE) as model:
        for road in ("reused buffer", "chunks on two streams"):
            for generation in "BA":
                if seed is None:
                    ROADS[road](model, generation)
                else:
                    with sim.order(seed):
                        ROADS[road](model, generation)
                expect_cold(DENSE, generation, model)


def _read_by_another_stream(model: Built) -> list[torch.Tensor]:
    """Copies of the served weights, queued on a stream of their own: what a forward pass reads."""
    reader = torch.Stream(device=DEVICE)
    with reader:
        return [parameter.detach().clone() for parameter in model.model.parameters()]


def _on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.accelerator.synchronize()
    return [tensor.cpu() for tensor in tensors]


def _all_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("road", ["folder", "device iterator", "chunks on two streams", "live push"])
@pytest.mark.parametrize("name", [DENSE, PACKED])
@on_sim(start)
def test_a_forward_pass_that_was_queued_before_reads_the_old_weights(
    sim: SimDevice, name: str, road: str
) -> None:
    with built(name) as model:
        old = _on_host([parameter.detach() for parameter in model.model.parameters()])
        queued = _read_by_another_stream(model)
        ROADS[road](model, "B")
        assert _all_equal(_on_host(queued), old)


@pytest.mark.parametrize("road", ["folder", "device iterator", "chunks on two streams", "live push"])
@pytest.mark.parametrize("name", [DENSE, PACKED])
@on_sim(start)
def test_a_forward_pass_on_another_stream_afterwards_reads_the_new_weights(
    sim: SimDevice, name: str, road: str
) -> None:
    with built(name) as model:
        ROADS[road](model, "B")
        reader = torch.Stream(device=DEVICE)
        with reader:
            seen = [parameter.detach().clone() for parameter in model.model.parameters()]
        reader.synchronize()
        assert _all_equal(_on_host(seen), _on_host([p.detach() for p in model.model.parameters()]))
        expect_cold(name, "B", model)


@on_sim(start)
def test_tensors_in_kernel_format_are_ordered_too(sim: SimDevice) -> None:
    with built(DENSE) as model:
        served = dict(model.model.named_parameters())
        old = _on_host([parameter.detach() for parameter in served.values()])
        queued = _read_by_another_stream(model)
        sent = {name: torch.full_like(parameter, 2.0) for name, parameter in served.items()}
        reload_plugin.reload_weights(model.model, iter(sent.items()), is_checkpoint_format=False)
        reader = torch.Stream(device=DEVICE)
        with reader:
            seen = [parameter.detach().clone() for parameter in served.values()]
        reader.synchronize()
        assert _all_equal(_on_host(seen), _on_host(list(sent.values())))
        assert _all_equal(_on_host(queued), old)


@on_sim(start)
def test_memory_of_a_session_that_used_two_streams_is_not_handed_out_while_in_use(sim: SimDevice) -> None:
    """One that is aborted: its staging was allocated on one stream and is still written to on the other."""
    with built(DENSE) as model:
        first, second = torch.Stream(device=DEVICE), torch.Stream(device=DEVICE)
        pairs = [(name, tensor.to(DEVICE)) for name, tensor in weights(model, "B")]
        torch.accelerator.synchronize()
        session = reload_plugin.ReloadSession(model.model)
        session.open()
        with first:
            session.load(pairs[::2])
        with second:
            session.load(pairs[1::2])
            session.abort()
        with first:
            mine = [torch.zeros_like(tensor) for _, tensor in pairs]
        first.synchronize()
        torch.accelerator.synchronize()
        assert all(not tensor.cpu().any() for tensor in mine)
        expect_cold(DENSE, "A", model)
