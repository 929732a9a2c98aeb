"""A card whose memory is taken, as where vLLM's KV cache has it: what a reload then has to do with."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

PIECE = 2 << 20
"""Bytes of the smallest piece that is taken; torch's allocators give memory out in such pieces."""


def free_bytes() -> int:
    """What the device has free, with what torch's allocator has of it and does not use."""
    torch.accelerator.empty_cache()
    return int(torch.accelerator.get_memory_info()[0])


@contextlib.contextmanager
def filled(spare: int) -> Iterator[None]:
    """Within, the device has about ``spare`` bytes free, at most a piece less."""
    gc.collect()
    taken: list[torch.Tensor] = []
    device = torch.accelerator.current_accelerator()
    size = 1 << 40
    while size >= PIECE:
        if free_bytes() - size < spare:
            size //= 2
            continue
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:  # other libraries have some, or it is in parts
            size //= 2
    try:
        yield
    finally:
        taken.clear()
        torch.accelerator.empty_cache()


class Peak:
    """Bytes of the device at the peak of a block, beside what was allocated before: ``extra``."""

    extra = 0

    def __enter__(self) -> Peak:
        gc.collect()
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        self._before = torch.accelerator.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        torch.accelerator.synchronize()
        self.extra = torch.accelerator.max_memory_allocated() - self._before
