"""A device that is full, as vLLM leaves it: the weights and eight percent, or four layers where that is more.

Every policy and every road ends on the new weights, or refuses and serves the old ones. The extra memory of
the device is one layer, as it is loaded, processed and served, and the staging of the layers that are begun.
"""

import contextlib
import gc
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import reload_plugin
from reload_plugin.checkpoint import SpillFile
from reload_plugin.device.value_hashes import device_sums
from reload_plugin.transaction.engine_state import state_of
from tests.engine.gpu_methods.driver import Built
from tests.sim_device.device import SimDevice
from tests.sim_device.models import (
    DENSE,
    DEVICE,
    EXPERTS,
    FEW,
    PACKED,
    built,
    cold,
    expect_cold,
    in_chunks,
    one_by_one,
    start,
    weights,
    written,
)
from tests.sim_device.process import on_sim

LAYERS = 24
HOST, DEVICE_ITERATOR = "host iterator", "device iterator"


@contextlib.contextmanager
def full(sim: SimDevice, name: str, parts: int = 0) -> Iterator[tuple[Built, int]]:
    """A model of many layers, on a device that has no room for much more. With the bytes of its weights.

    ``parts``: the weights come in so many chunks, of which the caller has the memory of one.
    """
    for generation in "AB":
        cold(name, generation, LAYERS)  # before memory is counted: vLLM caches rotary tables
    device_sums(torch.zeros(1, device=DEVICE))  # and digests the weights of their sums
    gc.collect()
    torch.accelerator.synchronize()
    sim.empty_cache()
    before = sim.counters.allocated
    with built(name, layers=LAYERS) as model:
        torch.accelerator.synchronize()
        sim.empty_cache()
        nbytes = sim.counters.allocated - before
        sim.reset()
        room = max(nbytes * 8 // 100, 4 * one_layer(model))  # a tiny model has few layers
        chunk = largest_chunk(model, parts) if parts else 0
        with sim.limit(sim.counters.reserved + room + chunk):
            yield model, nbytes


def largest_chunk(model: Built, parts: int) -> int:
    """Bytes of device memory, as its allocator rounds, that ``in_chunks`` has at a time."""
    sizes = [-(-tensor.nbytes // 512) * 512 for _, tensor in weights(model, "B")]
    ends = [len(sizes) * number // parts for number in range(parts + 1)]
    return max(sum(sizes[start:end]) for start, end in itertools.pairwise(ends))


def one_layer(model: Built) -> int:
    """Bytes of the largest group in load format."""
    return state_of(model.model).record.largest


def peak(sim: SimDevice, before: int) -> int:
    return sim.counters.peak_allocated - before


@contextlib.contextmanager
def no_files() -> Iterator[None]:
    """Within, nothing is written to a spill file."""

    def refuse(*_: object) -> None:
        raise AssertionError("weights went to a file")

    add, SpillFile.add = SpillFile.add, refuse
    try:
        yield
    finally:
        SpillFile.add = add


def reloaded(model: Built, generation: str, how: str, policy: str) -> reload_plugin.ReloadReport:
    pairs = iter(weights(model, generation))
    if how == "folder":
        with tempfile.TemporaryDirectory() as folder:
            path = written(model, generation, Path(folder))
            return reload_plugin.reload_weights(model.model, weights_path=path, policy=policy)
    if how == DEVICE_ITERATOR:
        pairs = ((name, tensor.to(DEVICE)) for name, tensor in pairs)
    return reload_plugin.reload_weights(model.model, pairs, policy=policy)


@pytest.mark.parametrize(
    ("policy", "how"),
    [
        ("auto", "folder"),
        ("auto", HOST),
        ("host", DEVICE_ITERATOR),
        ("device", DEVICE_ITERATOR),
        ("streaming", HOST),
    ],
)
@pytest.mark.parametrize("name", FEW)
@on_sim(start)
def test_a_reload_succeeds_or_refuses_before_anything_changes(
    sim: SimDevice, name: str, policy: str, how: str
) -> None:
    with full(sim, name) as (model, _), no_files():
        before = sim.counters.allocated
        for generation in "BA":
            sim.reset()
            if policy == "device":
                with pytest.raises(reload_plugin.ReloadError, match="out of memory"):
                    reloaded(model, generation, how, policy)
                expect_cold(name, "A", model, LAYERS)
                continue
            report = reloaded(model, generation, how, policy)
            assert report.old_generation == {"streaming": "none"}.get(policy, "host")
            assert report.spilled_bytes == 0
            assert report.digest is not None
            expect_cold(name, generation, model, LAYERS)
        gc.collect()
        assert sim.counters.allocated == before


@pytest.mark.parametrize("parts", [60, 0], ids=["chunks on two streams", "live push"])
@pytest.mark.parametrize("name", FEW)
@on_sim(start)
def test_an_update_in_many_calls_fits(sim: SimDevice, name: str, parts: int) -> None:
    with full(sim, name, parts) as (model, _), no_files():
        for generation in "BA":
            if parts:
                in_chunks(model, generation, parts)
            else:
                one_by_one(model, generation)
            assert state_of(model.model).outcome.report.old_generation in ("host", "reread")
            expect_cold(name, generation, model, LAYERS)


@pytest.mark.parametrize("name", [DENSE, PACKED, EXPERTS])
@on_sim(start)
def test_tensors_in_kernel_format_fit_and_come_back(sim: SimDevice, name: str) -> None:
    with full(sim, name) as (model, _), no_files():
        served = dict(model.model.named_parameters())
        old = {key: parameter.detach().cpu() for key, parameter in served.items()}
        sim.reset()
        before = sim.counters.allocated
        new = {key: torch.zeros_like(value) for key, value in old.items()}
        how = {"is_checkpoint_format": False, "digest": False}  # a digest takes a few MiB for its sums
        reload_plugin.reload_weights(model.model, iter(new.items()), **how)
        assert peak(sim, before) == 0
        assert not any(parameter.cpu().view(torch.uint8).any() for parameter in served.values())
        wrong = itertools.chain(list(old.items())[:-1], [("no such", torch.zeros(1))])
        with pytest.raises(reload_plugin.WeightsError, match="no such"):
            reload_plugin.reload_weights(model.model, wrong, is_checkpoint_format=False)
        torch.accelerator.synchronize()
        assert not any(parameter.cpu().view(torch.uint8).any() for parameter in served.values())


@pytest.mark.parametrize("name", FEW)
@on_sim(start)
def test_a_failure_half_way_brings_the_old_values_back_from_host_memory(sim: SimDevice, name: str) -> None:
    with full(sim, name) as (model, nbytes), no_files():
        state = state_of(model.model)
        pairs = weights(model, "B")

        def failing() -> Iterator[tuple[str, torch.Tensor]]:
            yield from pairs[:-3]
            raise OSError("the trainer died")

        for _ in range(2):
            with pytest.raises(reload_plugin.ReloadError, match="serves what it served before"):
                reload_plugin.reload_weights(model.model, failing())
            assert state.broken is None
            expect_cold(name, "A", model, LAYERS)
        sim.reset()
        reload_plugin.reload_weights(model.model, iter(pairs))
        assert sim.counters.bytes_to_host >= nbytes * 9 // 10
        expect_cold(name, "B", model, LAYERS)


@pytest.mark.parametrize("name", FEW)
@on_sim(start)
def test_extra_memory_of_the_device_is_one_layer(sim: SimDevice, name: str) -> None:
    """In load format, in kernel format, and what processing allocates beside them."""
    with full(sim, name) as (model, _), no_files():
        before = sim.counters.allocated
        sim.reset()
        reloaded(model, "B", HOST, "auto")
        sim.reset()
        reloaded(model, "A", HOST, "auto")
        assert peak(sim, before) <= 4 * one_layer(model)
