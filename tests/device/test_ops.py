"""The operations of a device: what each promises, on the CPU and on another device (meta stands for one)."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from reload_plugin.device import accelerator, cpu
from reload_plugin.device.accelerator import AcceleratorOps
from reload_plugin.device.cpu import DIRECT_BYTES, CpuOps
from reload_plugin.device.hashing import Hash
from reload_plugin.device.host_memory import SMALL, HostPool
from reload_plugin.device.ops import DeviceOps, ops_for

CPU, META = torch.device("cpu"), torch.device("meta")
GPU = torch.device("cuda", 1)
"""Nothing is ever allocated there: its module is a stand-in."""
# The general operations are right for host memory too, so they can be run with values.
BOTH = pytest.mark.parametrize("ops", [CpuOps(), AcceleratorOps(CPU)], ids=["cpu", "accelerator"])


def test_a_device_has_one_object_and_the_cpu_its_own_class() -> None:
    assert isinstance(ops_for(CPU), CpuOps)
    assert isinstance(ops_for(META), AcceleratorOps)
    assert ops_for(torch.device("cpu")) is ops_for(CPU)
    assert ops_for(GPU) is not ops_for(torch.device("cuda", 0))
    assert ops_for(GPU).device == GPU


def test_only_the_cpu_does_what_touches_memory_by_its_address() -> None:
    questions = ("on_host", "reads_files", "reuses_outputs", "has_native_handles", "pauses_gc")
    assert all(getattr(ops_for(CPU), question) for question in questions)
    assert not any(getattr(ops_for(META), question) for question in questions)


# --- allocate ---


@pytest.mark.parametrize("nbytes", [0, 1, SMALL - 1, SMALL, SMALL + 1])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_staging_is_as_large_as_asked_and_on_the_device(
    device: torch.device, pooled: bool, nbytes: int
) -> None:
    pool, placeholder = HostPool() if pooled else None, torch.UntypedStorage(0, device=device)
    memory = ops_for(device).allocate(placeholder, nbytes, pool)
    assert memory.nbytes() >= nbytes
    assert memory.device == device
    of_pool = device == CPU and pooled and nbytes >= SMALL
    assert (memory is placeholder) is not of_pool


# --- copy ---

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.clone,
    "transposed": lambda t: t.t().contiguous().t(),
    "every second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "negated": torch._neg_view,
}


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_is_torchs_copy(ops: DeviceOps, layout: str, dtype: torch.dtype) -> None:
    source = LAYOUTS[layout](torch.arange(12.0).view(3, 4))
    target, expected = torch.zeros(3, 4, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
    ops.copy(target, source)
    ops.fence()
    assert torch.equal(target, expected.copy_(source))


@BOTH
def test_a_value_is_spread_as_torchs_copy_does(ops: DeviceOps) -> None:
    target = torch.zeros(2, 3, dtype=torch.int32)
    ops.copy(target, torch.tensor(7))
    assert target.eq(7).all()


@pytest.mark.parametrize("nbytes", [DIRECT_BYTES, DIRECT_BYTES + 1])
def test_copies_of_every_size_arrive_on_the_cpu(nbytes: int) -> None:
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    CpuOps().copy(target, source)
    assert torch.equal(target, source)


def test_tensors_of_another_device_are_left_to_torch() -> None:
    """Also by the CPU's operations: a session's device and a tensor's need not be the same."""
    target = torch.ones(4)
    with pytest.raises(NotImplementedError, match="meta"):
        CpuOps().copy(target, torch.empty(4, device="meta"))
    CpuOps().copy(torch.empty(4, device="meta"), target)
    AcceleratorOps(META).copy(torch.empty(4, device="meta"), target)


# --- copy_bytes ---


def test_bytes_go_where_they_belong_and_nowhere_else() -> None:
    target = torch.zeros(8, dtype=torch.int16)
    assert CpuOps().copy_bytes(target.untyped_storage(), 4, torch.tensor([1, 2, 3], dtype=torch.int16))
    assert target.tolist() == [0, 0, 1, 2, 3, 0, 0, 0]


class Own(torch.Tensor):
    pass


WITHOUT_SHORTCUT = {
    "large": torch.zeros(DIRECT_BYTES + 1, dtype=torch.uint8),
    "with gaps": torch.zeros(8)[::2],
    "empty": torch.zeros(0),
    "on another device": torch.zeros(4, device="meta"),
    "a class of its own": torch.zeros(4).as_subclass(Own),
    "conjugated": torch.zeros(4, dtype=torch.complex64).conj(),
    "negated": torch._neg_view(torch.zeros(4)),
    "beyond the end": torch.zeros(1025),
}


@pytest.mark.parametrize("case", WITHOUT_SHORTCUT)
def test_what_has_no_shortcut_is_not_written(case: str) -> None:
    target = torch.full((1024,), 7.0)
    if case == "large":
        target = torch.full((DIRECT_BYTES,), 7.0)
    assert not CpuOps().copy_bytes(target.untyped_storage(), 0, WITHOUT_SHORTCUT[case])
    assert target.eq(7).all()


def test_no_bytes_are_written_to_memory_that_the_host_does_not_have() -> None:
    values, elsewhere = torch.ones(4), torch.empty(4, device="meta").untyped_storage()
    assert not CpuOps().copy_bytes(elsewhere, 0, values)
    assert not CpuOps().copy_bytes(torch.UntypedStorage(0), 0, values)
    target = torch.zeros(4)
    assert not AcceleratorOps(CPU).copy_bytes(target.untyped_storage(), 0, values)
    assert target.eq(0).all()


# --- fence and free memory ---


def test_a_fence_waits_for_the_device_that_torch_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    ops_for(CPU).fence()
    ops_for(META).fence()
    assert waited == []
    ops_for(GPU).fence()
    assert waited == [GPU]


def test_a_fence_asks_the_devices_own_module_where_torch_drives_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[str] = []
    module = SimpleNamespace(synchronize=lambda: waited.append("own"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    ops_for(GPU).fence()
    assert waited == ["own"]


def test_free_memory_is_what_the_device_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: 5)
    monkeypatch.setattr(accelerator, "available", lambda: 6)
    module = SimpleNamespace(mem_get_info=lambda device: (7 + device.index, 99))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert ops_for(CPU).free_bytes() == 5
    assert ops_for(GPU).free_bytes() == 8
    del module.mem_get_info
    assert ops_for(GPU).free_bytes() == 6, "a device that does not say has the host's"


# --- hash ---


def hashed(ops: DeviceOps, tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr("reload_plugin.device.hashing.ops_for", lambda _: ops)
    total = Hash()
    total.add_tensor(tensor)
    return total.digest()


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hash_sees_every_value_in_every_layout(
    ops: DeviceOps, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.arange(12.0).view(3, 4) + 1
    before = hashed(ops, LAYOUTS[layout](values), monkeypatch)
    assert hashed(ops, LAYOUTS[layout](values), monkeypatch) == before
    for place in range(12):
        changed = values.clone()
        changed.view(-1)[place] += 1
        assert hashed(ops, LAYOUTS[layout](changed), monkeypatch) != before


def test_memory_that_is_hashed_at_the_end_lives_until_then() -> None:
    total, other = Hash(), Hash()
    for hash_ in (total, other):
        hash_.add_tensor(torch.arange(1 << 20, dtype=torch.int32))
        hash_.add_tensor(torch.arange(1 << 20, dtype=torch.int32).view(1024, -1)[:, ::2])
        torch.zeros(1 << 20, dtype=torch.int32)  # would take the memory if it were free
    assert total.digest() == other.digest()
