"""vLLM's own weight offloaders around models on the device: reloaded as without them, or refused."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

import reload_plugin
from reload_plugin.errors import MissingWeightsError, UnsupportedError
from tests.engine.gpu_methods import walker
from tests.sim_device.device import SimDevice
from tests.sim_device.models import (
    DENSE,
    DEVICE,
    EXPERTS,
    GUARD,
    PACKED,
    ROADS,
    ROW_OF,
    expect_unmoved,
    on_host,
    start,
    weights,
)
from tests.sim_device.process import on_sim

if TYPE_CHECKING:
    from tests.engine.gpu_methods import driver

MAPPED, MOVED = "a view of host memory", "in host memory, moved for each layer"
"""What a parameter is that was offloaded: the first where the device can read the host's memory."""


@contextlib.contextmanager
def data_of_another_device() -> Iterator[None]:
    """``tensor.data = ...`` takes data of another device, as torch lets it with a GPU and the CPU."""
    from reload_plugin.offload.parked_weights import replace_data

    of_torch = torch._C.TensorBase.data

    def show(tensor: torch.Tensor, data: torch.Tensor) -> None:
        if torch._has_compatible_shallow_copy_type(tensor, data):
            of_torch.__set__(tensor, data)
        else:
            replace_data(tensor, data.detach())

    torch.Tensor.data = property(of_torch.__get__, show)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.data


@contextlib.contextmanager
def started(name: str, generation: str, offloader: Any, **config: object) -> Iterator[driver.Built]:
    """A model of a row, built and loaded under an offloader as vLLM's runner does it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.offloader import set_offloader

    from tests.engine.gpu_methods import driver

    original = driver._engine_config

    def configured(folder: str, row: Any) -> Any:
        made = original(folder, row)
        for name, value in config.items():
            setattr(made.offload_config.prefetch, name, value)
        return made

    row = ROW_OF[name]
    with (
        driver.machine(row, DEVICE),
        mock.patch.object(driver, "_engine_config", configured),
        data_of_another_device(),
    ):
        set_offloader(offloader)
        try:
            model = driver.build(row, generation, DEVICE)
            offloader.post_init()
            with set_current_vllm_config(model.config):
                yield model
        finally:
            set_offloader(None)


@contextlib.contextmanager
def uva(name: str, generation: str, kind: str) -> Iterator[driver.Built]:
    """Under vLLM's ``cpu_offload_gb``; the view is a copy here, as nothing maps memory of the host."""
    import vllm.model_executor.model_loader.utils as loader_utils
    import vllm.model_executor.offloader.uva as module

    view = mock.Mock(side_effect=lambda tensor: tensor.to(DEVICE))
    with (
        mock.patch.object(module, "get_accelerator_view_from_cpu_tensor", view),
        mock.patch.object(loader_utils, "get_accelerator_view_from_cpu_tensor", view),
    ):
        offloader = module.UVAOffloader(cpu_offload_max_bytes=1 << 40)
        offloader.uva_offloading, offloader.pin_memory = kind == MAPPED, False
        with started(name, generation, offloader) as model:
            assert offloader.cpu_offload_bytes > 0
            parameters = list(model.model.parameters())
            where = {parameter.device.type for parameter in parameters}
            assert ("cpu" in where) is (kind == MOVED)
            assert any(hasattr(one, "_vllm_is_uva_offloaded") for one in parameters) is (kind == MAPPED)
            yield model


def picture(model: driver.Built) -> walker.Picture:
    torch.accelerator.synchronize()
    return on_host(walker.take_picture(model.model))


@pytest.mark.parametrize("kind", [MAPPED, MOVED])
@pytest.mark.parametrize("name", [DENSE, PACKED, EXPERTS])
@on_sim(start)
def test_offloaded_weights_are_reloaded(sim: SimDevice, name: str, kind: str) -> None:
    cold = {}
    for generation in "AB":
        with uva(name, generation, kind) as model:
            cold[generation] = picture(model)
        del model
        gc.collect()
    with uva(name, "A", kind) as model:
        before = walker.take_picture(model.model)
        markers = [getattr(p, "_vllm_is_uva_offloaded", False) for p in model.model.parameters()]
        for road, generation in zip(ROADS, "BABABA", strict=True):
            ROADS[road](model, generation)
            found = walker.differences(cold[generation], picture(model))
            assert [line for line in found if not line.startswith(GUARD)] == [], road
            expect_unmoved(before, model)
        now = [getattr(p, "_vllm_is_uva_offloaded", False) for p in model.model.parameters()]
        assert now == markers


@pytest.mark.parametrize("kind", [MAPPED, MOVED])
@on_sim(start)
def test_a_weight_that_does_not_come_is_missed(sim: SimDevice, kind: str) -> None:
    """What the constructor put into memory that was offloaded is no value of a weight."""
    with uva(DENSE, "A", kind) as model:
        before = picture(model)
        pairs = weights(model, "B")
        lost = next(name for name, _ in pairs if "layers" in name and "proj" in name)
        with pytest.raises(MissingWeightsError):
            reload_plugin.reload_weights(model.model, iter([pair for pair in pairs if pair[0] != lost]))
        assert walker.differences(before, picture(model)) == []


@contextlib.contextmanager
def streams_of_the_device() -> Iterator[None]:
    """What ``torch.cuda`` offers, of this device: the prefetch offloader asks for nothing else."""
    with (
        mock.patch("torch.cuda.Stream", side_effect=functools.partial(torch.Stream, device=DEVICE)),
        mock.patch("torch.cuda.Event", side_effect=functools.partial(torch.Event, device=DEVICE)),
        mock.patch("torch.cuda.stream", lambda stream: stream),
        mock.patch("torch.cuda.current_stream", side_effect=torch.accelerator.current_stream),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
    ):
        yield


@on_sim(start)
def test_prefetched_weights_are_refused_by_every_road(sim: SimDevice) -> None:
    from vllm.model_executor.offloader.prefetch import PrefetchOffloader

    with streams_of_the_device():
        offloader = PrefetchOffloader(group_size=2, num_in_group=1, prefetch_step=1)
        given = {"offload_group_size": 2, "offload_num_in_group": 1, "offload_prefetch_step": 1}
        with started(DENSE, "A", offloader, **given) as model:
            torch.accelerator.synchronize()
            offloaded = [
                one for layer in offloader.module_offloaders for one in layer._param_offloaders.values()
            ]
            assert offloaded
            assert all(one._param.data_ptr() == one._gpu_buffer.data_ptr() for one in offloaded)
            before, kept = picture(model), [one._cpu_storage.clone() for one in offloaded]
            for road in ROADS:
                with pytest.raises(UnsupportedError, match="prefetch offloader"):
                    ROADS[road](model, "B")
                found = walker.differences(before, picture(model))
                assert [line for line in found if not line.startswith(GUARD)] == [], road
            assert all(torch.equal(one._cpu_storage, was) for one, was in zip(offloaded, kept, strict=True))
