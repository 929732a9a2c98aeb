"""Hashing the values of tensors, where they are.

Memory of the CPU goes through XXH3 (128 bits), piece by piece, on all cores. On any other device
each tensor becomes a few words there, by sums that depend on the position of every word, and only those
come to the host. So digests of one engine are compared with those of engines on the same kind of device.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence

import torch
import xxhash

from ..tensors import wraps_others
from .host_memory import view_of
from .openmp import run_on_openmp_threads

_PIECE = 1 << 20
"""Bytes of host memory that have a digest of their own."""
_WIDTH = xxhash.xxh3_128().digest_size
_WORTH_SHARING = 4 << 20
"""Bytes from which on a team hashes: its threads have to wait for one another at the end."""
_CHUNK = 1 << 22
"""Words that are multiplied and summed at a time on a device: 32 MiB of temporary memory, twice."""


class Hash:
    """XXH3-128 of a sequence of texts and tensors, the same however many cores hash it.

    Values in host memory are hashed at the end, all at once; they have to stay as they are until then.
    """

    def __init__(self) -> None:
        self._parts: list[bytes | list[memoryview]] = []
        """Texts and digests, and pieces of memory whose digests are to stand in their place."""
        self._alive: list[torch.Tensor] = []
        """What that memory belongs to."""

    def add_text(self, text: str) -> None:
        self._parts.append(text.encode())

    def add_digest(self, digest: bytes) -> None:
        self._parts.append(digest)

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """Add dtype, shape, strides and values of ``tensor``; a wrapper subclass counts as its parts."""
        if wraps_others(type(tensor)):
            names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            self.add_text(f"{type(tensor).__name__} {names} {context!r};")
            for name in names:
                self.add_tensor(getattr(tensor, name))
            return
        self._parts.append(form_of(tensor))
        if tensor.is_meta or not tensor.numel() or not tensor.untyped_storage().nbytes():
            return  # no values: on meta, empty, or its memory was given back
        if tensor.is_cpu and _lies_in_one_piece(tensor):  # nearly all
            address, nbytes = tensor.data_ptr(), tensor.nbytes
            small = nbytes <= _WIDTH
            self._parts.append(ctypes.string_at(address, nbytes) if small else _pieces_at(address, nbytes))
            self._alive.append(tensor)
            return
        for part in _contiguous_parts(tensor.detach()):
            if not part.is_cpu:
                self._parts.append(device_sums(part).cpu().numpy().tobytes())
                continue
            pieces = _pieces_of(part)
            copied = part.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
            self._parts.append(_digests_of(pieces) if copied else pieces)
            self._alive.append(part)

    def digest(self) -> bytes:
        """The digest of all that was added."""
        waiting = [number for number, part in enumerate(self._parts) if not isinstance(part, bytes)]
        pieces = [piece for number in waiting for piece in self._parts[number]]
        digests = _digests_of(pieces)  # type: ignore[arg-type]
        end = 0
        for number in waiting:
            start, end = end, end + len(self._parts[number]) * _WIDTH
            self._parts[number] = digests[start:end]
        return xxhash.xxh3_128_digest(b"".join(self._parts))  # type: ignore[arg-type]


def form_of(tensor: torch.Tensor) -> bytes:
    """What a tensor is beside its values."""
    return _form_of(tensor.dtype, tensor.shape, tensor.stride())


@functools.lru_cache(4096)
def _form_of(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    return f"{dtype} {tuple(shape)} {strides};".encode()


def _pieces_of(tensor: torch.Tensor) -> list[memoryview]:
    """The memory of a contiguous tensor on the CPU, in pieces that have a digest each."""
    return _pieces_at(tensor.data_ptr(), tensor.nbytes)


def _pieces_at(address: int, nbytes: int) -> list[memoryview]:
    values = view_of(address, nbytes)
    if nbytes <= _PIECE:
        return [values]
    return [values[start : start + _PIECE] for start in range(0, nbytes, _PIECE)]


def _digests_of(pieces: Sequence[memoryview]) -> bytes:
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


def _contiguous_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
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


def _lies_in_one_piece(tensor: torch.Tensor) -> bool:
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
    generator = torch.Generator("cpu").manual_seed(0x5EED)
    drawn = torch.randint(
        -(1 << 63), (1 << 63) - 1, (_CHUNK,), dtype=torch.int64, generator=generator, device="cpu"
    )
    return (drawn | 1).to(device)
