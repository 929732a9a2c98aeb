"""Hashing the values of tensors, where they are.

Memory of the CPU goes through XXH3 (128 bits), piece by piece, on all cores. On any other device
each tensor becomes a few words there, by sums that depend on the position of every word, and only those
come to the host. So digests of one engine are compared with those of engines on the same kind of device.
"""

from __future__ import annotations

import functools

import torch
import xxhash

from ..tensors import wraps_others
from .ops import ops_for
from .value_hashes import WIDTH, digests_of


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
        self._parts.extend(ops_for(tensor.device).hash_values(tensor))
        self._alive.append(tensor)

    def digest(self) -> bytes:
        """The digest of all that was added."""
        waiting = [number for number, part in enumerate(self._parts) if not isinstance(part, bytes)]
        pieces = [piece for number in waiting for piece in self._parts[number]]
        digests = digests_of(pieces)  # type: ignore[arg-type]
        end = 0
        for number in waiting:
            start, end = end, end + len(self._parts[number]) * WIDTH
            self._parts[number] = digests[start:end]
        return xxhash.xxh3_128_digest(b"".join(self._parts))  # type: ignore[arg-type]


def form_of(tensor: torch.Tensor) -> bytes:
    """What a tensor is beside its values."""
    return _form_of(tensor.dtype, tensor.shape, tensor.stride())


@functools.lru_cache(4096)
def _form_of(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    return f"{dtype} {tuple(shape)} {strides};".encode()
