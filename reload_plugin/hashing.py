"""Hashing the values of tensors, where they are.

Memory of the CPU goes through XXH3 (128 bits; 20 GB/s and more on one core). On any other device
each tensor becomes a few words there, by sums that depend on the position of every word, and only those
come to the host. So digests of one engine are compared with those of engines on the same kind of device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import xxhash

from .tensors import wraps_others

_CHUNK = 1 << 22
"""Words that are multiplied and summed at a time on a device: 32 MiB of temporary memory, twice."""


def add_tensor(total: xxhash.xxh3_128, tensor: torch.Tensor) -> None:
    """Add dtype, shape, strides and values of ``tensor``; a wrapper subclass counts as its parts."""
    if wraps_others(type(tensor)):
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        total.update(f"{type(tensor).__name__} {names} {context!r};".encode())
        for name in names:
            add_tensor(total, getattr(tensor, name))
        return
    total.update(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()};".encode())
    if tensor.is_meta or not tensor.numel() or not tensor.untyped_storage().nbytes():
        return  # no values: on meta, empty, or its memory was given back
    for part in _contiguous_parts(tensor.detach()):
        if part.device.type == "cpu":
            total.update(_bytes_of(part).numpy().data)
        else:
            total.update(device_sums(part).cpu().numpy().data)


def _contiguous_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values in the order in which they lie in memory, copied only where they lie in pieces."""
    if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        yield tensor
        return
    tensor = tensor.resolve_conj().resolve_neg()
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
    ordered = tensor.permute(order)
    if ordered.is_contiguous() or ordered.dim() < 2:
        yield ordered.contiguous()
    else:
        yield from (row.contiguous() for row in ordered)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def device_sums(tensor: torch.Tensor) -> torch.Tensor:
    """Position-weighted sums of a tensor's words: int64 [chunks], on the tensor's device.

    Integer sums wrap and do not depend on the order in which a device adds. The weights are odd, so one
    changed word always changes its sum.

    Args:
        tensor: contiguous, of any dtype.

    """
    words = _words_of(tensor)
    weights = _weights(tensor.device)
    chunks = [words[start : start + _CHUNK] for start in range(0, len(words), _CHUNK)]
    return torch.stack([(chunk.to(torch.int64) * weights[: len(chunk)]).sum() for chunk in chunks])


def _words_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor in words as large as fit."""
    flat = _bytes_of(tensor)
    for word in (torch.int64, torch.int32, torch.int16):
        if flat.numel() % word.itemsize == 0 and flat.data_ptr() % word.itemsize == 0:
            return flat.view(word)
    return flat


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    """Odd numbers, the same for every process: int64 [_CHUNK]."""
    generator = torch.Generator().manual_seed(0x5EED)
    drawn = torch.randint(-(1 << 63), (1 << 63) - 1, (_CHUNK,), dtype=torch.int64, generator=generator)
    return (drawn | 1).to(device)
