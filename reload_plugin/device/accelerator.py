"""Operations of every device that is not the CPU, by what torch offers for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .available_memory import available
from .host_memory import HostPool
from .pinned import PinnedBlocks
from .uploads import Uploads
from .value_hashes import contiguous_parts, device_sums


class AcceleratorOps:
    """See ``DeviceOps``. Copies are queued on the current stream, as torch queues them.

    Args:
        device: with its index, or without one for the current device of its type.

    """

    on_host = False
    reads_files = False
    reuses_outputs = False
    has_native_handles = False
    pauses_gc = False  # nothing watches whether this device's memory runs short

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(
        self,
        placeholder: torch.UntypedStorage,
        nbytes: int,
        pool: HostPool | None,  # noqa: ARG002 - host memory is of no use here
    ) -> torch.UntypedStorage:
        """The placeholder, with memory from torch's caching allocator."""
        placeholder.resize_(nbytes)
        return placeholder

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Torch's copy, queued on the current stream where it can be."""
        target.copy_(source)

    def copier(self, blocks: PinnedBlocks) -> Uploads:
        """Through a ring of pinned memory, where torch has one for this device."""
        return Uploads(self.device, blocks if self._is_accelerator else None)

    def copy_bytes(
        self,
        target: torch.UntypedStorage,  # noqa: ARG002 - there is no shortcut
        start: int,  # noqa: ARG002
        source: torch.Tensor,  # noqa: ARG002
    ) -> bool:
        """No shortcut: the address means nothing to the host."""
        return False

    @property
    def _is_accelerator(self) -> bool:
        current = torch.accelerator.current_accelerator()
        return current is not None and current.type == self.device.type

    def fence(self) -> None:
        """Synchronize the device. Tensors on meta have no values, so nothing is queued for them."""
        if self.device.type == "meta":
            return
        if self._is_accelerator:
            torch.accelerator.synchronize(self.device)
        else:
            torch.get_device_module(self.device).synchronize()

    def current_stream(self) -> torch.Stream | None:
        """Torch's current stream of this thread; None for a device that is not torch's accelerator."""
        return torch.accelerator.current_stream(self.device) if self._is_accelerator else None

    def mark_read(self, tensor: torch.Tensor) -> torch.Event | None:
        """An event on the current stream. Copies from host memory are done when torch returns from them."""
        if tensor.device.type in ("cpu", "meta") or (stream := self.current_stream()) is None:
            return None
        tensor.record_stream(stream)
        event = torch.Event(device=self.device)
        event.record(stream)
        return event

    def free_bytes(self) -> int:
        """What the device says is free, and what torch holds of it and does not use; what the host has left,
        for a device that does not say.
        """
        with contextlib.suppress(RuntimeError, AttributeError):
            if self._is_accelerator:
                return int(torch.accelerator.get_memory_info(self.device)[0]) + self._unused_bytes()
            return int(torch.get_device_module(self.device).mem_get_info(self.device)[0])
        return available()

    def release_unused(self) -> None:
        """Empty torch's caching allocator, once what is queued is done."""
        self.fence()
        if self._is_accelerator:
            torch.accelerator.empty_cache()

    def reserved_bytes(self) -> int:
        """What torch's allocator holds of the device, used or not; 0 for a device without one."""
        with contextlib.suppress(RuntimeError, AttributeError):
            if self._is_accelerator:
                return torch.accelerator.memory_reserved(self.device)
        return 0

    def give_back(self, reserved: int) -> None:
        """Give memory that torch holds and does not use back to the device, if torch holds more than
        ``reserved`` bytes of it: other libraries allocate beside torch.
        """
        if self.reserved_bytes() > reserved:
            torch.accelerator.empty_cache()

    def _unused_bytes(self) -> int:
        return self.reserved_bytes() - torch.accelerator.memory_allocated(self.device)

    def hash_values(self, tensor: torch.Tensor) -> Iterator[bytes | list[memoryview]]:
        """Sums that the device makes of each contiguous part; only these come to the host."""
        for part in contiguous_parts(tensor.detach()):
            yield device_sums(part).cpu().numpy().tobytes()
