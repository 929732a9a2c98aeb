"""The simulated device catches what it is there to catch, and lets right programs through."""

import ctypes

import pytest
import torch

from tests.sim_device.device import SimDevice
from tests.sim_device.process import on_sim, start

SEEDS = range(20)
N = 1024
OLD, NEW = 1.0, 2.0


def on_device(value: float, count: int = N) -> torch.Tensor:
    return torch.full((count,), value, device="sim")


def pinned(value: float, count: int = N) -> torch.Tensor:
    return torch.full((count,), value).pin_memory()


def stream() -> torch.Stream:
    return torch.Stream(device="sim")


# --- memory ---


@on_sim(start)
def test_the_host_cannot_touch_device_memory(sim: SimDevice) -> None:
    """The access is noted and raised by the next operation; the process goes on."""
    tensor = on_device(OLD)
    here = torch.zeros(N)
    ctypes.memmove(here.data_ptr(), tensor.data_ptr(), here.nbytes)
    assert here.isnan().all()
    with pytest.raises(RuntimeError, match="illegal host access"):
        tensor + 1
    assert (tensor == OLD).all()
    ctypes.memset(tensor.data_ptr(), 0, 8)
    assert len(sim.traps()) == 1
    assert (tensor == OLD).all()


@on_sim(start)
def test_memory_that_was_given_back_cannot_be_used(sim: SimDevice) -> None:
    tensor = on_device(OLD)
    address = tensor.data_ptr()
    assert sim.is_live(address, tensor.nbytes)
    tensor.untyped_storage().resize_(0)
    assert not sim.is_live(address, tensor.nbytes)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tensor.zero_()


@on_sim(start)
def test_freed_memory_is_poisoned_and_handed_out_again_at_once(sim: SimDevice) -> None:
    tensor = on_device(OLD)
    address = tensor.data_ptr()
    del tensor
    again = torch.empty(N, device="sim")
    assert again.data_ptr() == address
    assert again.cpu().isnan().all()


@on_sim(start)
def test_each_stream_has_free_memory_of_its_own(sim: SimDevice) -> None:
    tensor = on_device(OLD)
    address = tensor.data_ptr()
    del tensor
    with stream():
        other = torch.empty(N, device="sim")
    assert other.data_ptr() != address
    assert torch.empty(N, device="sim").data_ptr() == address


@on_sim(start)
def test_a_limit_raises_out_of_memory_and_peaks_are_exact(sim: SimDevice) -> None:
    sim.empty_cache()
    sim.reset()
    held = sim.counters.allocated
    with sim.limit(sim.counters.reserved + 10 * 4096):
        parts = [torch.empty(4096, dtype=torch.uint8, device="sim") for _ in range(10)]
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 512 bytes"):
            torch.empty(1, device="sim")
        del parts
        assert sim.counters.reserved - held == 10 * 4096
        whole = torch.empty(40_000, dtype=torch.uint8, device="sim")  # what is cached is given back first
        assert torch.accelerator.get_memory_info()[0] == 40960 - 40448
    assert sim.counters.peak_allocated - held == 40960
    assert whole.nbytes == 40_000


@on_sim(start)
def test_a_pool_that_sleeps_cannot_be_used_and_may_lose_its_values(sim: SimDevice) -> None:
    with sim.pool("weights"):
        inside = on_device(OLD)
    outside = on_device(OLD)
    sim.sleep("weights", discard=False)
    with pytest.raises(RuntimeError, match="asleep"):
        inside.add_(1)
    assert (outside == OLD).all()
    sim.wake("weights")
    assert (inside == OLD).all()
    sim.sleep("weights", discard=True)
    sim.wake("weights")
    assert inside.cpu().isnan().all()


# --- order ---


@on_sim(start)
def test_a_host_buffer_reused_too_early_gives_the_wrong_bytes(sim: SimDevice) -> None:
    target, buffer = on_device(OLD), pinned(NEW)
    target.copy_(buffer, non_blocking=True)
    buffer.fill_(3.0)
    assert (target == 3.0).all()
    buffer.fill_(NEW)
    target.copy_(buffer, non_blocking=True)
    done = torch.Event(device="sim")
    done.record()
    done.synchronize()
    buffer.fill_(3.0)
    assert (target == NEW).all()


@on_sim(start)
def test_pageable_and_blocking_copies_are_over_when_they_return(sim: SimDevice) -> None:
    target = on_device(OLD)
    for buffer, non_blocking in ((torch.full((N,), NEW), True), (pinned(NEW), False)):
        target.copy_(buffer, non_blocking=non_blocking)
        buffer.fill_(3.0)
        assert (target == NEW).all()
        target.fill_(OLD)


@on_sim(start)
def test_a_copy_to_the_host_read_too_early_gives_the_wrong_bytes(sim: SimDevice) -> None:
    source, buffer = on_device(NEW), pinned(OLD)
    buffer.copy_(source, non_blocking=True)
    assert (buffer == OLD).all()
    torch.accelerator.synchronize()
    assert (buffer == NEW).all()


def _produced_and_consumed(waits: bool) -> torch.Tensor:
    producer, consumer = stream(), stream()
    between, result, source = on_device(OLD), on_device(OLD), on_device(NEW)
    torch.accelerator.synchronize()
    with producer:
        between.copy_(source)
    if waits:
        consumer.wait_stream(producer)
    with consumer:
        result.copy_(between)
    consumer.synchronize()
    value = result.cpu()
    torch.accelerator.synchronize()
    return value


@on_sim(start)
def test_a_stream_that_does_not_wait_reads_the_old_values(sim: SimDevice) -> None:
    assert (_produced_and_consumed(waits=False) == OLD).all()
    assert (_produced_and_consumed(waits=True) == NEW).all()


@on_sim(start)
def test_other_orders_show_races_and_leave_right_programs_alone(sim: SimDevice) -> None:
    found = set()
    for seed in SEEDS:
        with sim.order(seed):
            found.add(float(_produced_and_consumed(waits=False)[0]))
            assert (_produced_and_consumed(waits=True) == NEW).all()
    assert found == {OLD, NEW}


@on_sim(start)
def test_a_wait_of_the_same_stream_or_for_nothing_returns(sim: SimDevice) -> None:
    own = stream()
    own.wait_stream(own)
    torch.Event(device="sim").synchronize()
    own.wait_event(torch.Event(device="sim"))
    own.synchronize()
    assert own.query()


# --- memory and order ---


def _freed_while_another_stream_reads(recorded: bool) -> torch.Tensor:
    source, target, reader = on_device(NEW), on_device(OLD), stream()
    torch.accelerator.synchronize()
    with reader:
        target.copy_(source)
    if recorded:
        source.record_stream(reader)
    del source
    reused = torch.full((N,), 3.0, device="sim")
    torch.accelerator.synchronize()
    assert (reused == 3.0).all()
    return target.cpu()


@on_sim(start)
def test_memory_freed_while_another_stream_reads_it_gives_the_wrong_bytes(sim: SimDevice) -> None:
    assert not (_freed_while_another_stream_reads(recorded=False) == NEW).any()
    assert (_freed_while_another_stream_reads(recorded=True) == NEW).all()
    for seed in SEEDS:
        with sim.order(seed):
            assert (_freed_while_another_stream_reads(recorded=True) == NEW).all()


@on_sim(start)
def test_memory_freed_while_its_own_stream_reads_it_is_right(sim: SimDevice) -> None:
    source, target = on_device(NEW), on_device(OLD)
    target.copy_(source)
    del source
    torch.full((N,), 3.0, device="sim")
    assert (target == NEW).all()


@on_sim(start)
def test_staging_that_moves_to_another_stream_without_a_wait_is_overwritten(sim: SimDevice) -> None:
    """As a layer that is split over two chunks on alternating streams, each with its own staging."""
    first, second = stream(), stream()
    with first:
        staging = torch.empty(N, device="sim")
    with second:
        staging.copy_(on_device(NEW))
    del staging
    with first:
        reused = torch.zeros(N, device="sim")
    first.synchronize()
    second.synchronize()
    assert (reused == NEW).all()


# --- operators, counts, the clock ---


@on_sim(start)
def test_other_operators_give_what_the_cpu_gives(sim: SimDevice) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    there = (a.to("sim") @ b.to("sim")).relu().sum(0)
    assert there.device == sim.device
    assert torch.equal(there.cpu(), (a @ b).relu().sum(0))
    rows = a.to("sim")
    rows[2:4, ::2] = rows.t()[:8, 2:4].t() * 2
    rows.view(-1)[3:5].mul_(3)
    here = a.clone()
    here[2:4, ::2] = here.t()[:8, 2:4].t() * 2
    here.view(-1)[3:5].mul_(3)
    assert torch.equal(rows.cpu(), here)
    assert torch.equal(
        rows.to(torch.float8_e4m3fn).view(torch.uint8).cpu(), here.to(torch.float8_e4m3fn).view(torch.uint8)
    )
    assert sim.counters.fallbacks >= 5


@on_sim(start)
def test_copies_launches_and_waits_are_counted(sim: SimDevice) -> None:
    host, pinned_host = torch.ones(N), pinned(NEW)
    target = torch.empty(N, device="sim")
    sim.reset()
    target.copy_(host)
    target.copy_(pinned_host, non_blocking=True)
    target.clone()
    target.cpu()
    found = sim.counters
    assert (found.copies_to_device, found.copies_on_device, found.copies_to_host) == (2, 1, 1)
    assert (found.bytes_to_device, found.bytes_on_device, found.bytes_to_host) == (8192, 4096, 4096)
    assert found.launches == 4
    assert found.synchronizations == 2


@on_sim(start)
def test_the_clock_lets_both_directions_of_the_bus_overlap(sim: SimDevice) -> None:
    count = 55_000_000 // 4
    up, down = pinned(NEW, count), pinned(OLD, count)
    device, other = on_device(OLD, count), on_device(OLD, count)
    torch.accelerator.synchronize()

    def seconds(both_on: tuple[torch.Stream, torch.Stream]) -> float:
        sim.reset()
        with both_on[0]:
            device.copy_(up, non_blocking=True)
        with both_on[1]:
            down.copy_(other, non_blocking=True)
        torch.accelerator.synchronize()
        return sim.counters.host_seconds

    one, two = stream(), stream()
    assert seconds((one, one)) == pytest.approx(2e-3, rel=0.05)
    assert seconds((one, two)) == pytest.approx(1e-3, rel=0.05)


@on_sim(start)
def test_pinned_memory_is_known_and_outlives_its_queued_copies(sim: SimDevice) -> None:
    buffer, target = pinned(NEW), on_device(OLD)
    assert buffer.is_pinned()
    assert not torch.ones(4).is_pinned()
    target.copy_(buffer, non_blocking=True)
    del buffer
    pinned(3.0)
    assert (target == NEW).all()
