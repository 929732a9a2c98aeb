"""What a device can do for a reload. Outside ``device/`` nothing asks which kind of device a tensor is on.

A new device brings a class with the members of ``DeviceOps``, and a line in ``ops_for``. ``AcceleratorOps``
is right for every device that torch has a module for, so a subclass of it overrides only what the device does
better. ``copier`` gives what one session copies its weights with (``uploads``: a ring, an event a slot);
``reads_files`` stays False unless files can be read into device memory without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Protocol

import torch

from .accelerator import AcceleratorOps
from .cpu import CpuOps
from .host_memory import HostPool
from .pinned import PinnedBlocks
from .uploads import Copier


class DeviceOps(Protocol):
    """The operations of one device. One object serves all engines and threads of the process, so it holds no
    state of a reload.
    """

    on_host: bool
    """Whether its memory is the host's."""
    reads_files: bool
    """Whether files can be read straight into this memory: its address can be given to ``preadv``."""
    reuses_outputs: bool
    """Whether kernels that pack weights can be given served memory for their results, by way of
    ``torch.empty_like`` (see ``output_reuse``)."""
    has_native_handles: bool
    """Whether processing makes native objects that own packed weights which no tensor shows (see
    ``process.native_handles``), so that their constructors are watched."""
    pauses_gc: bool
    """Whether Python's garbage collection may be off while a reload runs. Not where memory that only a
    collection would free can run out without this package noticing."""

    def allocate(
        self, placeholder: torch.UntypedStorage, nbytes: int, pool: HostPool | None
    ) -> torch.UntypedStorage:
        """Staging memory of at least ``nbytes`` bytes, uninitialised.

        Args:
            placeholder: an empty, resizable storage on this device.
            nbytes: of staging.
            pool: blocks of host memory that the session reuses; None allocates apart from it.

        Returns:
            ``placeholder``, resized; or another storage on this device, which the caller's views have to move
            to. The caller owns it: it is free when no tensor refers to it any more.

        Raises:
            RuntimeError: out of memory (``torch.OutOfMemoryError`` on an accelerator).

        """

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """``target.copy_(source)``: any dtype, layout and device of ``source``; same shape, or broadcast.

        ``target`` is written in place. On an accelerator the copy may be queued: ``source`` has to keep its
        memory and its values until ``fence``.
        """

    def copier(self, blocks: PinnedBlocks) -> Copier:
        """What one session copies its weights into staging with.

        Args:
            blocks: pinned host memory of the engine.

        """

    def copy_bytes(self, target: torch.UntypedStorage, start: int, source: torch.Tensor) -> bool:
        """Write all of ``source`` as it is to ``target``, from byte ``start`` on, without a tensor there.

        A shortcut for small tensors: for these, the tensor over ``target`` costs more than the bytes.

        Returns:
            False if nothing was written, because this device or this source has no such shortcut; ``copy``
            does it then.

        """

    def fence(self) -> None:
        """Wait until all work that was queued on this device is done, on every stream. Raises what the
        device's asynchronous errors raise (``RuntimeError``).
        """

    def current_stream(self) -> torch.Stream | None:
        """The stream that this thread queues work on; None where nothing is queued."""

    def mark_read(self, tensor: torch.Tensor) -> torch.Event | None:
        """A point after all copies from ``tensor`` to this device that this thread queued.

        The memory of ``tensor`` is recorded on the current stream: its owner may drop it before.

        Returns:
            An event to wait for before the values of ``tensor`` change; None where the copies are done.

        """

    def free_bytes(self) -> int:
        """Bytes that can still be allocated on this device."""

    def release_unused(self) -> None:
        """Give memory back that is reserved on this device and holds nothing, so that other processes can
        have it.
        """

    def reserved_bytes(self) -> int:
        """Bytes of this device that torch's allocator holds, used or not."""

    def give_back(self, reserved: int) -> None:
        """Give memory that torch's allocator holds and does not use back to the device, if it holds more than
        ``reserved`` bytes.
        """

    def hash_values(self, tensor: torch.Tensor) -> Iterable[bytes | list[memoryview]]:
        """What stands for the values of ``tensor`` in a digest, in order: bytes, or pieces of host memory
        that are hashed when the digest is taken. Until then the caller keeps ``tensor`` and its values.

        Equal values give equal results on every device of this type, in every process. ``tensor`` has values:
        it is not on meta, not empty, its storage is allocated.
        """


@functools.cache
def ops_for(device: torch.device) -> DeviceOps:
    """The operations of a device, one object for each. The result never changes: look it up once a session or
    storage, not once a tensor.
    """
    return CpuOps() if device.type == "cpu" else AcceleratorOps(device)
