"""Safetensors files written from a stream, and outputs that appear whole or not at all.

The safetensors library wants all tensors in memory. The format itself (its description in the safetensors
project) needs a header with names, dtypes, shapes and offsets, and then the bytes without gaps: names and
shapes are enough to begin.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ...errors import SourceError
from .. import TensorInfo
from ..dtypes import METADATA_KEY, SAFETENSORS_NAMES
from ..stores import bytes_of

PARTIAL = ".partial"
"""Suffix of the name of an output under construction; the name begins with a dot as well."""
_ALIGN = 8
"""Where the data begins, for readers that map the file."""
_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100


@dataclass(frozen=True)
class FilePlan:
    """One file to write: its tensors in the order in which they lie in it."""

    name: str
    infos: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        return sum(info.meta().nbytes for info in self.infos)


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
        file.write(_header(plan, metadata))
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


# -- whole or not at all --------------------------------------------------------------------------


@contextlib.contextmanager
def written_atomically(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` to write to; on success rename it to ``target``.

    On any failure, Ctrl-C included, the temporary path is removed. With ``overwrite`` an existing target is
    exchanged for the new one in one step where the file system can (Linux), and then removed.

    Raises:
        SourceError: ``target`` exists and ``overwrite`` is False; an empty folder does not count.
        OSError: its folder cannot be written.

    """
    _refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}{PARTIAL}"
    try:
        yield partial
        if partial.is_dir():
            sync_folder(partial)
        back = _rename_into_place(partial, target, overwrite)
        try:
            sync_folder(target.parent)
        except BaseException:
            _renamed(target, partial, back)
            raise
    finally:
        _remove(partial)


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of a folder to disk (fsync)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    there = target.exists() or target.is_symlink()
    if there and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise SourceError(
            f"{target} exists already. Choose another place, or say that it may be overwritten."
        )


def _rename_into_place(partial: Path, target: Path, overwrite: bool) -> int:
    """Rename ``partial`` to ``target``; returns the kind of rename that would undo it."""
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        target.rmdir()
    if _renamed(partial, target, _NOREPLACE):
        return _NOREPLACE
    _refuse_existing(target, overwrite)
    if not (overwrite and _renamed(partial, target, _EXCHANGE)):
        _replace(partial, target)
    return _EXCHANGE


def _replace(partial: Path, target: Path) -> None:
    """Remove, then rename, where the file system cannot exchange two names; not atomic."""
    if target.is_dir() and not target.is_symlink():
        _remove(target)
    partial.replace(target)


def _renamed(source: Path, target: Path, flags: int) -> bool:
    """Rename in one step (renameat2 of Linux); False where that is not supported, or a file is in the way."""
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EEXIST, errno.ENOENT, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOTEMPTY):
        return False
    raise OSError(code, os.strerror(code), str(target))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
