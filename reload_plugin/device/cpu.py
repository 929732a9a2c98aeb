"""The CPU's operations: staging in the host pool, copies by ``memmove``, hashing where the values lie."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator

import torch

from .available_memory import available
from .host_memory import SMALL, HostPool
from .pinned import PinnedBlocks
from .value_hashes import WIDTH, contiguous_parts, digests_of, lies_in_one_piece, pieces_at, pieces_of

DIRECT_BYTES = 1 << 20
"""Plain memory up to this size is copied by the calling thread: for an expert's matrix, waking the other
threads and waiting for them costs more than the copy."""
_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)
"""Classes without a say in what their memory means."""


class CpuOps:
    """See ``DeviceOps``. Nothing is queued: each operation is done when it returns."""

    on_host = True
    reads_files = True
    reuses_outputs = True
    has_native_handles = True  # oneDNN's matmul handlers
    pauses_gc = True  # ``host_memory`` collects when memory is short

    def allocate(
        self, placeholder: torch.UntypedStorage, nbytes: int, pool: HostPool | None
    ) -> torch.UntypedStorage:
        """A block of the pool, where there is a pool and the block is no small one."""
        if pool is not None and nbytes >= SMALL:
            return pool.take(nbytes)
        placeholder.resize_(nbytes)
        return placeholder

    def copier(self, blocks: PinnedBlocks) -> CpuOps:  # noqa: ARG002 - nothing crosses a bus
        """These operations themselves."""
        return self

    def sources_read(self) -> None:
        """Copies are done when they return."""

    def finish(self) -> None:
        """Nothing is held."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """``memmove`` by this thread where both are plain, contiguous and small; else torch's copy."""
        plain = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
        nbytes = target.numel() * target.element_size()
        on_cpu = target.is_cpu and source.is_cpu
        there = plain and on_cpu and target.data_ptr() and source.data_ptr()  # an emptied storage has none
        if there and nbytes <= DIRECT_BYTES and not source.is_conj() and not source.is_neg():
            ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)
        else:
            target.copy_(source)

    def copy_bytes(self, target: torch.UntypedStorage, start: int, source: torch.Tensor) -> bool:
        """``memmove``, which takes a few microseconds less than a copy between tensors. That is nearly all
        that many small experts cost.
        """
        if type(source) not in _PLAIN_CLASSES or not source.is_cpu or not source.is_contiguous():
            return False
        nbytes, values = source.nbytes, source.data_ptr()
        if nbytes > DIRECT_BYTES or not values or source.is_conj() or source.is_neg():
            return False
        address = target.data_ptr()
        if target.device.type != "cpu" or not address or start + nbytes > target.nbytes():
            return False
        ctypes.memmove(address + start, values, nbytes)
        return True

    def fence(self) -> None:
        """Nothing is queued."""

    def current_stream(self) -> None:
        """Nothing is queued."""

    def mark_read(self, tensor: torch.Tensor) -> None:
        """Copies are done when they return, those from a device's memory too."""

    def free_bytes(self) -> int:
        """What the system and the control groups of this process leave."""
        return available()

    def release_unused(self) -> None:
        """The C heap gives back what it can by itself."""

    def reserved_bytes(self) -> int:
        """Nothing is held back."""
        return 0

    def give_back(self, reserved: int) -> None:
        """The heap is settled by ``host_memory.settle_heap``."""

    def hash_values(self, tensor: torch.Tensor) -> Iterable[bytes | list[memoryview]]:
        """The memory itself where the values lie in one piece, as those of nearly all tensors do."""
        if not lies_in_one_piece(tensor):
            return _values_in_parts(tensor)
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        return (ctypes.string_at(address, nbytes) if nbytes <= WIDTH else pieces_at(address, nbytes),)


def _values_in_parts(tensor: torch.Tensor) -> Iterator[bytes | list[memoryview]]:
    own = tensor.untyped_storage().data_ptr()
    for part in contiguous_parts(tensor.detach()):
        copied = part.untyped_storage().data_ptr() != own
        yield digests_of(pieces_of(part)) if copied else pieces_of(part)
