"""Parked weights: real tensors in host memory, the device's memory given back, and all of it back again."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from typing import TYPE_CHECKING

import pytest
import torch

import reload_plugin
from reload_plugin import vllm_api
from reload_plugin.device.accelerator import AcceleratorOps
from reload_plugin.offload.park import park_model
from reload_plugin.offload.parked_weights import recorded_tensors
from reload_plugin.record.snapshot import ABSENT
from reload_plugin.transaction.engine_state import state_of
from tests.engine.gpu_methods import walker
from tests.sim_device.device import SimDevice
from tests.sim_device.models import (
    DENSE,
    EXPERTS,
    FEW,
    PACKED,
    ROADS,
    built,
    expect_cold,
    expect_unmoved,
    in_chunks,
    start,
    weights,
)
from tests.sim_device.process import on_sim

if TYPE_CHECKING:
    from tests.engine.gpu_methods.driver import Built

MLA = "mla bf16"
LAYERS = 24


def described(model: Built) -> list[tuple[object, ...]]:
    """Each tensor's object, class, attributes, shape, strides and dtype, in order."""
    found = [*model.model.named_parameters(), *model.model.named_buffers()]
    return [
        (name, id(t), type(t), sorted(t.__dict__), t.shape, t.stride(), t.dtype, t.requires_grad)
        for name, t in found
    ]


def on_device(model: Built) -> list[str]:
    """Names of weights that are on the device."""
    found = recorded_tensors(state_of(model.model).record)
    return [name for name, tensor in found if tensor.device.type not in ("cpu", "meta")]


@pytest.mark.parametrize("name", [*FEW, MLA])
@on_sim(start)
def test_every_weight_is_a_real_tensor_on_the_host_and_comes_back(sim: SimDevice, name: str) -> None:
    with built(name) as model:
        before, values, placed = described(model), values_of(model), on_device(model)
        gc.collect()
        sim.empty_cache()
        held = sim.counters
        (report,) = reload_plugin.park(model.model)
        assert report.state == "parked"
        assert on_device(model) == []
        assert described(model) == before
        assert equal(values_of(model), values)
        assert held.allocated - sim.counters.allocated >= report.nbytes > 0
        assert held.reserved - sim.counters.reserved >= report.nbytes
        with pytest.raises(reload_plugin.SessionError, match="unpark"):
            state_of(model.model).before_forward_pass()
        assert reload_plugin.park(model.model)[0].tensors == report.tensors

        (back,) = reload_plugin.unpark(model.model)
        assert (back.state, back.written, back.nbytes) == ("serving", False, report.nbytes)
        assert on_device(model) == placed
        assert described(model) == before
        state_of(model.model).before_forward_pass()
        expect_cold(name, "A", model)
        ROADS["host iterator"](model, "B")
        expect_cold(name, "B", model)


SOME = [("host iterator", name) for name in (*FEW, MLA)]
SOME += [("folder", PACKED), ("chunks on two streams", EXPERTS), ("live push", PACKED), ("live push", MLA)]


@pytest.mark.parametrize(("road", "name"), SOME)
@on_sim(start)
def test_a_reload_while_parked_shows_after_unpark(sim: SimDevice, name: str, road: str) -> None:
    with built(name) as model:
        before = described(model)
        with reload_plugin.parked(model.model):
            ROADS[road](model, "B")
            assert on_device(model) == []
            assert described(model) == before
        assert state_of(model.model).generation.known
        expect_cold(name, "B", model)
        ROADS[road](model, "A")
        expect_cold(name, "A", model)


@pytest.mark.parametrize("name", [DENSE, PACKED, EXPERTS])
@on_sim(start)
def test_a_reload_while_parked_takes_a_layer_of_the_device_at_a_time(sim: SimDevice, name: str) -> None:
    with built(name, layers=LAYERS) as model:
        most = 6 * state_of(model.model).record.largest  # two of them are a chunk of the caller
        roads = (ROADS["host iterator"], functools.partial(in_chunks, parts=60), ROADS["live push"])
        for reload, generation in itertools.product(roads, "BA"):
            with reload_plugin.parked(model.model) as (report, *_):
                gc.collect()
                before = sim.counters.allocated
                sim.reset()
                reload(model, generation)
                extra = sim.counters.peak_allocated - before
                assert extra <= most < report.nbytes // 2, (reload, generation, extra, most)
            expect_cold(name, generation, model, LAYERS)


@on_sim(start)
def test_copies_that_a_drafter_has_of_the_head_are_made_when_it_is_back(sim: SimDevice) -> None:
    made: list[torch.device] = []
    with built(DENSE) as model, pytest.MonkeyPatch.context() as patch:
        head = next(p for name, p in model.model.named_parameters() if "lm_head" in name)
        patch.setattr(vllm_api, "refresh_copied_heads", lambda *_: made.append(head.device))
        with reload_plugin.parked(model.model):
            ROADS["host iterator"](model, "B")
            assert made == []
        assert [device.type for device in made] == ["sim"]


@on_sim(start)
def test_policies_that_write_layer_by_layer_while_parked(sim: SimDevice) -> None:
    for name in (DENSE, PACKED, MLA):
        with built(name) as model:
            for generation in "BA":
                with reload_plugin.parked(model.model):
                    pairs = iter(weights(model, generation))
                    reload_plugin.reload_weights(model.model, pairs, policy="streaming")
                expect_cold(name, generation, model)


def values_of(model: Built) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().clone() for name, t in model.model.state_dict().items()}


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    assert some.keys() == others.keys()
    return all(torch.equal(bits(tensor), bits(others[name])) for name, tensor in some.items())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def linear(model: Built) -> torch.Tensor:
    """A weight that kernels read as it was loaded."""
    return next(p for name, p in model.model.named_parameters() if name.endswith("o_proj.weight"))


@on_sim(start)
def test_an_adapter_merged_layer_by_layer_while_parked_counts(sim: SimDevice) -> None:
    with built(DENSE) as model:
        expected = {}
        with reload_plugin.parked(model.model):
            for name, weight in model.model.named_parameters():
                if weight.dim() == 2 and "proj" in name:
                    torch.manual_seed(len(name))
                    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
                    weight.data.add_((up @ down).to(weight.dtype))  # values, in place
                    expected[name] = weight.detach().clone()
        assert len(expected) > 4
        now = values_of(model)
        assert equal({name: now[name] for name in expected}, expected)
        generation = state_of(model.model).generation
        assert not generation.known
        assert "parked" in generation.source
        ROADS["host iterator"](model, "B")
        expect_cold(DENSE, "B", model)


@on_sim(start)
def test_new_memory_of_a_parked_weight_counts_too(sim: SimDevice) -> None:
    with built(DENSE) as model:
        with reload_plugin.parked(model.model):
            weight = linear(model)
            weight.data = merged = weight.data + 1
        assert torch.equal(linear(model).cpu(), merged)


@on_sim(start)
def test_a_weight_that_was_replaced_is_refused_and_nothing_is_lost(sim: SimDevice) -> None:
    with built(DENSE) as model:
        reload_plugin.park(model.model)
        owner = next(m for name, m in model.model.named_modules() if name.endswith("o_proj"))
        kept, owner.weight = owner.weight, torch.nn.Parameter(owner.weight + 1, requires_grad=False)
        with pytest.raises(reload_plugin.OffloadError, match=r"o_proj\.weight.*copy_"):
            reload_plugin.unpark(model.model)
        assert on_device(model) == []
        owner.weight = kept
        reload_plugin.unpark(model.model)
        expect_cold(DENSE, "A", model)


@on_sim(start)
def test_without_memory_on_the_device_the_weights_stay_parked(sim: SimDevice) -> None:
    with built(PACKED) as model:
        reload_plugin.park(model.model)
        with (
            sim.limit(sim.counters.reserved + 4096),
            pytest.raises(reload_plugin.OffloadError, match="parked"),
        ):
            reload_plugin.unpark(model.model)
        assert on_device(model) == []
        with pytest.raises(reload_plugin.SessionError, match="parked"):
            state_of(model.model).before_forward_pass()
        reload_plugin.unpark(model.model)
        expect_cold(PACKED, "A", model)


@on_sim(start)
def test_fifty_rounds_take_no_more_memory(sim: SimDevice) -> None:
    with built(DENSE) as model:
        sizes = []
        for _ in range(50):
            with reload_plugin.parked(model.model):
                pass
            gc.collect()
            sim.synchronize()
            tensors = sum(isinstance(found, torch.Tensor) for found in gc.get_objects())
            sizes.append((sim.counters.allocated, tensors))
        assert len(set(sizes[1:])) == 1, sizes


@on_sim(start)
def test_a_reload_that_changes_a_layout_while_parked(sim: SimDevice) -> None:
    """What a reload leaves in another layout, or in another object, comes back so."""
    with built(DENSE) as model:
        state = state_of(model.model)
        with reload_plugin.parked(model.model):
            weight = linear(model)
            weight.data = turned = weight.data.t().contiguous().t()
            state.commit(None, "another layout")
            with state.in_a_call():
                pass
        assert state.generation.known
        assert linear(model).stride() == turned.stride()
        assert torch.equal(linear(model).cpu(), turned)


@on_sim(start)
def test_memory_that_sleeps_keeps_its_addresses(sim: SimDevice) -> None:
    with contextlib.ExitStack() as stack:
        with sim.pool("weights"):
            model = stack.enter_context(built(PACKED))
        before = walker.take_picture(model.model)
        for generation in "AB":
            report = park_model(model.model, sleeps=True)
            assert report.sleeps
            sim.sleep("weights", discard=False)  # level 1: what is not parked is kept by vLLM
            state_of(model.model).fall_asleep()
            sim.wake("weights")
            state_of(model.model).wake_up()
            if generation == "B":
                ROADS["host iterator"](model, "B")
            reload_plugin.unpark(model.model)
            expect_cold(PACKED, generation, model)
            expect_unmoved(before, model)


@on_sim(start)
def test_what_cannot_be_parked_is_refused_and_serves_on(sim: SimDevice) -> None:
    with built(DENSE) as model, pytest.MonkeyPatch.context() as patch:
        state = state_of(model.model)
        patch.setattr(vllm_api, "captures_graphs", lambda _: True)
        with pytest.raises(reload_plugin.UnsupportedError, match="enable_sleep_mode"):
            reload_plugin.park(model.model)
        patch.undo()
        patch.setattr(AcceleratorOps, "free_bytes", lambda _: 1)
        patch.setattr("reload_plugin.device.cpu.available", lambda: 1)
        with pytest.raises(reload_plugin.OffloadError, match="on cpu"):
            reload_plugin.park(model.model)
        patch.undo()
        layer = next(m for name, m in model.model.named_modules() if name.endswith("o_proj"))
        held = next(h for one in state.record.layers for h in one.holders if h.ref() is layer)
        patch.setattr(layer, "input_size", layer.weight.data_ptr())
        patch.setitem(held.undo, ("attribute", "input_size"), ABSENT)  # as if processing had made it
        vars(held).pop("keys", None)
        with pytest.raises(reload_plugin.UnsupportedError, match="input_size holds its address"):
            reload_plugin.park(model.model)
        patch.undo()
        vars(held).pop("keys", None)
        state.broken = "half of it"
        with pytest.raises(reload_plugin.EngineBrokenError, match="Reload"):
            reload_plugin.park(model.model)
        state.broken = None
        state.before_forward_pass()
        expect_cold(DENSE, "A", model)
