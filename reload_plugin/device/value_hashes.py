"""What stands for the values of a tensor in a digest: XXH3 of pieces of host memory, or sums on a device."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import xxhash

from .host_memory import view_of
from .openmp import run_on_openmp_threads

_PIECE = 1 << 20
"""Bytes of host memory that have a digest of their own."""
WIDTH = xxhash.xxh3_128().digest_size
_WORTH_SHARING = 4 << 20
"""Bytes from which on a team hashes: its threads have to wait for one another at the end."""
_CHUNK = 1 << 15
"""Words that make one sum on a device. Their weights stay there: 256 KiB."""
_AT_ONCE = 32
"""Sums that a device makes at a time: 8 MiB of temporary memory, twice for words below 8 bytes."""


def pieces_of(tensor: torch.Tensor) -> list[memoryview]:
    """The memory of a contiguous tensor on the CPU, in pieces that have a digest each."""
    return pieces_at(tensor.data_ptr(), tensor.nbytes)


def pieces_at(address: int, nbytes: int) -> list[memoryview]:
    values = view_of(address, nbytes)
    if nbytes <= _PIECE:
        return [values]
    return [values[start : start + _PIECE] for start in range(0, nbytes, _PIECE)]


def digests_of(pieces: Sequence[memoryview]) -> bytes:
    """The digests of pieces of host memory, one behind the other. All cores hash, if that is worth it."""
    digests = [b""] * len(pieces)

    def hash_piece(number: int) -> None:
        digests[number] = xxhash.xxh3_128_digest(pieces[number])

    if sum(map(len, pieces)) >= _WORTH_SHARING:
        run_on_openmp_threads(hash_piece, len(pieces))
    else:
        for number in range(len(pieces)):
            hash_piece(number)
    return b"".join(digests)


def contiguous_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values in the order in which they lie in memory, copied only where they lie in pieces."""
    if _is_plain(tensor):
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


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the values lie in memory one behind the other, as they are."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def lies_in_one_piece(tensor: torch.Tensor) -> bool:
    """The same, or transposed, as kernels take many a matrix."""
    if _is_plain(tensor):
        return True
    transposed = tensor.dim() == 2 and tensor.stride() == (1, tensor.shape[0])
    return transposed and not tensor.is_conj() and not tensor.is_neg()


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
    whole = len(words) // _CHUNK * _CHUNK
    sums = [
        (block.to(torch.int64) * weights).sum(1)
        for block in words[:whole].view(-1, _CHUNK).split(_AT_ONCE)
        if len(block)
    ]
    if whole < len(words):
        rest = words[whole:].to(torch.int64)
        sums.append((rest * weights[: len(rest)]).sum(0, keepdim=True))
    return torch.cat(sums)


def _words_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor in words as large as divide it."""
    flat = _bytes_of(tensor)
    for word in (torch.int64, torch.int32, torch.int16):
        if flat.numel() % word.itemsize == 0:
            # The same words wherever the tensor lies: a view may begin anywhere in its storage.
            aligned = flat if flat.data_ptr() % word.itemsize == 0 else flat.clone()
            return aligned.view(word)
    return flat


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    """Odd numbers, the same for every process: int64 [_CHUNK]."""
    generator = torch.Generator("cpu").manual_seed(0x5EED)
    drawn = torch.randint(
        -(1 << 63), (1 << 63) - 1, (_CHUNK,), dtype=torch.int64, generator=generator, device="cpu"
    )
    return (drawn | 1).to(device)
