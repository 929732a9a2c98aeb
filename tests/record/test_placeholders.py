"""Placeholders of load-format tensors: all of a tensor but its memory, until somebody asks for that."""

import weakref

import pytest
import torch

from reload_plugin.device.host_memory import HostPool, MemoryGauge
from reload_plugin.record.model_record import TensorRecord
from reload_plugin.record.staged_storage import StagedStorage
from reload_plugin.record.tensor_layout import Constant, Geometry, TensorFormat

CPU = torch.device("cpu")


def staged(*geometries: Geometry, dtype: torch.dtype = torch.bfloat16) -> StagedStorage:
    """The staging of tensors in one storage, filled with ones when it gets memory."""
    records = [
        TensorRecord(
            TensorFormat(f"t{number}", geometry, dtype, CPU, torch.Tensor, False, {}, Constant(1.0)),
            0,
            weakref.ref(torch.empty(0)),
            False,
            "layer",
        )
        for number, geometry in enumerate(geometries)
    ]
    storage = StagedStorage(records, CPU, MemoryGauge())
    storage.objects = {id(record): storage.views[id(record)] for record in records}
    return storage


def geometry_of(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Geometry:
    return Geometry.of(torch.empty(0, device="meta").as_strided(shape, stride, offset))


def test_a_placeholder_of_a_layer_larger_than_any_memory_is_made_without_asking_for_it() -> None:
    storage = staged(geometry_of((1 << 30, 1 << 22), (1 << 22, 1)))
    (view,) = storage.views.values()
    nbytes, there = view.nbytes, storage.storage.nbytes()
    assert (nbytes, there) == (1 << 53, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("pool", [None, HostPool()])
def test_it_has_the_whole_load_format_before_and_after_it_gets_memory(
    mode: type[torch.no_grad], pool: HostPool | None
) -> None:
    """Shape, strides, offset, dtype; and it is no view of anything, as a parameter that was constructed."""
    with mode():
        geometries = [
            geometry_of((3, 4), (4, 1)),
            geometry_of((4, 3), (1, 4)),
            geometry_of((2, 2), (4, 1), offset=5),
            geometry_of((), (), offset=11),
            geometry_of((0, 4), (4, 1)),
        ]
        storage = staged(*geometries)
        for memory in (False, True):
            if memory:
                storage.materialise(pool=pool)
            for geometry, view in zip(geometries, storage.views.values(), strict=True):
                # Apart from the tensor: to print one without memory, for a message, ends the process.
                found = (Geometry.of(view), view.dtype, view._is_view(), view.requires_grad)
                assert found == (geometry, torch.bfloat16, False, False)
                identity = view.untyped_storage()._cdata
                assert identity == storage.key
        assert all(bool((view == 1).all()) for view in storage.views.values())


def test_memory_allocated_later_is_seen_by_views_of_the_placeholder() -> None:
    storage = staged(geometry_of((4, 4), (4, 1)))
    (view,) = storage.views.values()
    shared = view.detach()
    storage.materialise()
    shared[2].fill_(7)
    assert view[2].tolist() == [7] * 4
    assert view[1].tolist() == [1] * 4


@pytest.mark.parametrize("pool", [None, HostPool()])
def test_the_identity_of_memory_given_back_is_no_other_storages(pool: HostPool | None) -> None:
    """Loaders are watched by identity to the end: what they allocate later is no layer that was processed."""
    layers = [staged(geometry_of((64,), (1,))) for _ in range(64)]
    watched = {storage.key for storage in layers}
    for storage in layers:
        storage.materialise(pool=pool)
        watched.add(storage.key)
        storage.drop_references()
    later = [torch.UntypedStorage(16) for _ in range(1000)]
    assert not watched & {storage._cdata for storage in later}
