"""The same on a device of its own: weights on the CPU and on disk, and forward passes on the device."""

from __future__ import annotations

import gc
import tempfile
from typing import Any

import pytest
import torch

from reload_plugin import (
    OffloadError,
    dispatch,
    keep_weights_in_module,
    materialize,
    materialized,
    reload_dispatched,
)
from reload_plugin.offload.collected import digest_of
from reload_plugin.offload.placement import placements

process = pytest.importorskip("tests.sim_device.process")
on_sim, start = process.on_sim, process.start

MAPS = {"cpu": ("cpu", "sim:0"), "mixed": ("cpu", "disk"), "disk": ("disk", "disk")}


def model_on(device: torch.device, kind: str, how: str, tied: bool = True) -> Any:
    """A small Llama, dispatched: by Accelerate, with its weights kept, or by ``dispatch``."""
    from accelerate import dispatch_model

    from tests.dispatched import llama, split_map

    first, second = (device if where == "sim:0" else where for where in MAPS[kind])
    options = {"main_device": device, "offload_dir": tempfile.mkdtemp()}
    if how == "dispatch":
        return dispatch(llama(tied), split_map(first, second, device), **options)
    model = dispatch_model(llama(tied), split_map(first, second, device), **options)
    if how == "kept":
        keep_weights_in_module(model)
    return model


def answers(model: Any) -> torch.Tensor:
    from tests.dispatched import logits

    return logits(model).cpu()


def allocated(sim: Any) -> int:
    """Bytes on the device, without models that wait for the garbage collector."""
    gc.collect()
    sim.synchronize()
    return sim.counters.allocated


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("how", ["accelerate", "kept", "dispatch"])
@pytest.mark.parametrize("target", ["cpu", "sim"])
@on_sim(start)
def test_to_the_cpu_or_the_device_and_back(sim: Any, kind: str, how: str, target: str) -> None:
    from tests.dispatched import llama

    # Accelerate takes a weight from disk for a tied one where an address is used again
    tied = how != "accelerate"
    digest_of(torch.ones(1, device=sim.device))  # keeps 32 MiB of weights for sums on the device
    base = allocated(sim)
    model = model_on(sim.device, kind, how, tied)
    expected = answers(model)
    held = allocated(sim)
    before = {place.name: (place.where, place.shown.device) for place in placements(model)}
    with materialized(model, target):
        assert {value.device.type for value in model.parameters()} == {target}
        assert {value.device.type for value in model.buffers()} == {target}
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        if target == "cpu":
            assert allocated(sim) == base
            assert torch.equal(answers(model), answers(llama(tied)))
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.mul_(2)
    assert {place.name: (place.where, place.shown.device) for place in placements(model)} == before
    assert allocated(sim) <= held
    changed = answers(model)
    assert not torch.equal(changed, expected)
    with materialized(model, target), torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.div_(2)
    assert torch.equal(answers(model), expected)


@pytest.mark.parametrize("how", ["kept", "dispatch"])
@on_sim(start)
def test_kept_weights_go_to_the_device_for_a_pass_only(sim: Any, how: str) -> None:
    model = model_on(sim.device, "mixed", how)
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.device.type == "cpu"
    first = answers(model)
    held = allocated(sim)
    seen = []
    handle = layer.mlp.act_fn.register_forward_hook(
        lambda *_: seen.append(layer.mlp.up_proj.weight.device.type)
    )
    sim.reset()
    assert torch.equal(answers(model), first)
    assert allocated(sim) == held
    handle.remove()
    kept = list(layer.parameters())
    assert {value.device.type for value in kept} == {"cpu"}
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)
    assert not torch.equal(answers(model), first)
    layer.mlp.down_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(model)
    assert [value is other for value, other in zip(layer.parameters(), kept, strict=True)] == [True] * len(
        kept
    )
    assert allocated(sim) == held


@on_sim(start)
def test_gradients_reach_weights_on_the_cpu(sim: Any) -> None:
    model = model_on(sim.device, "cpu", "kept", tied=False)
    model(torch.arange(4).reshape(1, 4).to(sim.device)).logits.square().mean().backward()
    assert all(value.grad is not None for value in model.model.layers[0].parameters())
    assert {value.grad.device.type for value in model.model.layers[0].parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", MAPS)
@on_sim(start)
def test_a_reload_reaches_every_place(sim: Any, kind: str) -> None:
    from tests.dispatched import checkpoint, llama

    model = model_on(sim.device, kind, "kept")
    before = answers(model)
    reload_dispatched(model, checkpoint(True, 1))
    assert not torch.equal(answers(model), before)
    materialize(model, "cpu")
    assert torch.equal(answers(model), answers(llama(True, 1)))


@on_sim(start)
def test_too_little_device_memory_leaves_the_model_dispatched(sim: Any) -> None:
    model = model_on(sim.device, "mixed", "accelerate", tied=False)
    expected = answers(model)
    before = {place.name: id(place.shown) for place in placements(model)}
    sim.empty_cache()
    error = None
    with sim.limit(sim.counters.reserved):
        try:
            materialize(model, "sim")
        except (OffloadError, RuntimeError) as raised:
            error = raised
    assert error is not None
    assert {place.name: id(place.shown) for place in placements(model)} == before
    assert torch.equal(answers(model), expected)
