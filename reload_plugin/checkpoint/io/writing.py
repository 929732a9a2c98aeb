"""Safetensors files written from a stream.

The safetensors library wants all tensors in memory. The format itself (its description in the safetensors
project) needs a header with names, dtypes, shapes and offsets, and then the bytes without gaps: names and
shapes are enough to begin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ...errors import SourceError
from .. import TensorInfo
from ..dtypes import METADATA_KEY, SAFETENSORS_NAMES
from ..stores import bytes_of

_ALIGN = 8
"""Where the data begins, for readers that map the file."""


@dataclass(frozen=True)
class FilePlan:
    """One file to write: its tensors in the order in which they lie in it."""

    name: str
    infos: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self.infos)

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """What the file begins with, its length included; the tensors follow without gaps."""
        return _header(self, metadata)


def plan_files(infos: Iterable[TensorInfo], max_file_bytes: int | None) -> list[FilePlan]:
    """Spread tensors over files, in their order, by the names that Hugging Face gives to such files.

    Args:
        infos: what will be written.
        max_file_bytes: largest file; a larger tensor gets a file of its own. None for one file.

    Raises:
        SourceError: a name or dtype that a safetensors file cannot have.

    """
    parts: list[list[TensorInfo]] = [[]]
    held = 0
    for info in infos:
        _check(info)
        nbytes = info.meta().nbytes
        if parts[-1] and max_file_bytes is not None and held + nbytes > max_file_bytes:
            parts.append([])
            held = 0
        parts[-1].append(info)
        held += nbytes
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    names = ["model.safetensors"] if len(parts) == 1 else names
    return [FilePlan(name, _aligned(part)) for name, part in zip(names, parts, strict=True)]


def _aligned(infos: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Larger elements first, else as they came, so that every tensor begins at a multiple of its element."""
    return tuple(sorted(infos, key=lambda info: -info.dtype.itemsize))


def _check(info: TensorInfo) -> None:
    if info.dtype not in SAFETENSORS_NAMES:
        raise SourceError(
            f"{info.name} has the dtype {info.dtype}, which safetensors has no name for. Save it in another."
        )
    try:
        info.name.encode()
    except UnicodeEncodeError:
        raise SourceError(f"The name {info.name!r} is no text. Save it under another.") from None
    if info.name == METADATA_KEY:
        raise SourceError(
            f"No tensor in a safetensors file can be called {METADATA_KEY}. Save it under another name."
        )


def write_file(
    path: Path,
    plan: FilePlan,
    metadata: Mapping[str, str],
    tensors: Iterator[tuple[str, torch.Tensor]],
    wrote: Callable[[int], None],
) -> None:
    """Write one file and have it on disk.

    Args:
        path: must not exist.
        plan: what the file holds.
        metadata: text for the header.
        tensors: an iterator; as many are taken as the plan has, in its order. Each is released once written.
        wrote: called with the bytes of each piece written.

    Raises:
        SourceError: a tensor is not what the plan says.
        OSError: writing failed.

    """
    with path.open("xb") as file:
        file.write(plan.header(metadata))
        for info in plan.infos:
            _write_tensor(file, info, tensors, wrote)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(
    file: BinaryIO,
    info: TensorInfo,
    tensors: Iterator[tuple[str, torch.Tensor]],
    wrote: Callable[[int], None],
) -> None:
    name, tensor = next(tensors, ("nothing", torch.empty(0, device="cpu")))
    if (name, tuple(tensor.shape), tensor.dtype) != (info.name, info.shape, info.dtype):
        found = f"{name} {list(tensor.shape)} {tensor.dtype}"
        raise SourceError(
            f"{info.name} {list(info.shape)} {info.dtype} was announced and {found} came. The source changed "
            "while it was read: convert it when the trainer has finished writing."
        )
    for piece in bytes_of(tensor):
        file.write(piece)
        wrote(len(piece))


def _header(plan: FilePlan, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    end = 0
    for info in plan.infos:
        start, end = end, end + info.meta().nbytes
        header[info.name] = {
            "dtype": SAFETENSORS_NAMES[info.dtype],
            "shape": info.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def index_of(plans: Sequence[FilePlan], metadata: Mapping[str, str]) -> str:
    """The text of ``model.safetensors.index.json``."""
    table = {info.name: plan.name for plan in plans for info in plan.infos}
    total = sum(plan.nbytes for plan in plans)
    return json.dumps({"metadata": {"total_size": total, **metadata}, "weight_map": table}, indent=2) + "\n"
