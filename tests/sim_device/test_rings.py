"""Rings of pinned memory: each engine has its own, and without them everything is right, and slower."""

from __future__ import annotations

import time

import pytest
import torch

import reload_plugin
from reload_plugin.device import pinned
from reload_plugin.device.host_copies import HostCopies
from reload_plugin.device.pinned import PinnedBlocks
from reload_plugin.device.uploads import Uploads
from reload_plugin.transaction.engine_state import state_of
from tests.sim_device.device import SimDevice
from tests.sim_device.models import DENSE, DEVICE, PACKED, built, expect_cold, start, weights
from tests.sim_device.process import on_sim
from tests.sim_device.process import start as start_plain

BYTES = 5000


def values(seed: int, nbytes: int = BYTES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("limit", [1 << 40, 2048, 0], ids=["a ring", "a short ring", "none"])
@on_sim(start_plain)
def test_copies_to_the_device_are_right_with_and_without_a_ring(sim: SimDevice, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch, sim.pinned_limit(sim.counters.pinned + limit):
        patch.setattr(pinned, "SLOT", 1024)
        copies = Uploads(sim.device, PinnedBlocks())
        targets = [torch.empty(BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(4)]
        source = torch.empty(BYTES, dtype=torch.uint8)
        for number, target in enumerate(targets):
            source.copy_(values(number))
            copies.copy(target, source)
            copies.sources_read()
            source.fill_(0)  # the caller uses its buffer again
        copies.finish()
        for number, target in enumerate(targets):
            assert torch.equal(target.cpu(), values(number))


@pytest.mark.parametrize("limit", [1 << 40, 2048, 0], ids=["a ring", "a short ring", "none"])
@on_sim(start_plain)
def test_copies_to_the_host_are_right_with_and_without_a_ring(sim: SimDevice, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch, sim.pinned_limit(sim.counters.pinned + limit):
        patch.setattr(pinned, "SLOT", 1024)
        copies = HostCopies(sim.device, PinnedBlocks())
        source = torch.empty(BYTES, dtype=torch.uint8, device=DEVICE)
        found = []
        for number in range(4):
            source.copy_(values(number))
            found.append(copies.copy(source))
            source.fill_(0)  # queued behind the copy
        copies.finish()
        for number, target in enumerate(found):
            assert torch.equal(target, values(number))


@on_sim(start_plain)
def test_a_large_tensor_is_cut_into_parts_that_threads_copy(sim: SimDevice) -> None:
    nbytes = 3 * pinned.SLOT + 12345
    source, target = values(0, nbytes), torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    copies = Uploads(sim.device, blocks := PinnedBlocks())
    sim.reset()
    copies.copy(target, source)
    copies.sources_read()
    assert sim.counters.synchronizations == 0
    copies.finish()
    assert torch.equal(target.cpu(), source)
    assert len(blocks._unused) == 4


@on_sim(start_plain)
def test_slow_threads_are_waited_for_in_both_directions(sim: SimDevice) -> None:
    def slow(target: torch.Tensor, source: torch.Tensor) -> None:
        time.sleep(0.1)
        target.copy_(source)

    source, target = values(0, pinned.SLOT), torch.empty(pinned.SLOT, dtype=torch.uint8, device=DEVICE)
    blocks = PinnedBlocks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinned, "copy_on_host", slow)
        up, down = Uploads(sim.device, blocks), HostCopies(sim.device, blocks)
        up.copy(target, source)
        up.sources_read()
        given, source = source.clone(), source.fill_(0)
        assert torch.equal(target.cpu(), given)
        up.finish()
        found = down.copy(target)
        down.finish()
        assert torch.equal(found, given)


@pytest.mark.parametrize("name", [DENSE, PACKED])
@on_sim(start)
def test_without_pinned_memory_a_reload_is_right_and_can_be_taken_back(sim: SimDevice, name: str) -> None:
    with built(name) as model, sim.pinned_limit(0):
        pairs = weights(model, "B")
        broken = [*pairs[:-1], ("no such weight", torch.zeros(1))]
        with pytest.raises(reload_plugin.ReloadError, match="no such weight"):
            reload_plugin.reload_weights(model.model, iter(broken), policy="host")
        expect_cold(name, "A", model)
        report = reload_plugin.reload_weights(model.model, iter(pairs), policy="host")
        assert report.old_generation == "host"
        expect_cold(name, "B", model)
        assert sim.counters.peak_pinned == sim.counters.pinned


@on_sim(start)
def test_each_engine_has_blocks_of_its_own(sim: SimDevice) -> None:
    before = sim.counters.pinned
    with built(DENSE) as one, built(DENSE) as other:
        for model in (one, other):
            reload_plugin.reload_weights(model.model, iter(weights(model, "B")), policy="host")
        owned = [state_of(model.model).pool.pinned._unused for model in (one, other)]
        assert all(owned)
        addresses = [{block.data_ptr() for block in blocks} for blocks in owned]
        assert not addresses[0] & addresses[1]
        for blocks in owned:
            blocks.clear()
        assert sim.counters.pinned == before


@on_sim(start)
def test_weights_that_are_all_there_are_waited_for_once(sim: SimDevice) -> None:
    with built(DENSE) as model:
        pairs = [(name, tensor.to(DEVICE)) for name, tensor in weights(model, "B")]
        waits = []
        for at_once in (True, False, True, False):
            given = pairs if at_once else iter(pairs)
            torch.accelerator.synchronize()
            sim.reset()
            reload_plugin.reload_weights(model.model, given, policy="streaming", digest=False)
            waits.append(sim.counters.synchronizations)
            expect_cold(DENSE, "B", model)
        assert waits[3] - waits[2] >= len(pairs) - 1, waits
