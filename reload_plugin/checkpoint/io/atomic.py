"""Outputs that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ...errors import SourceError

PARTIAL = ".partial"
"""Suffix of the name of an output under construction; the name begins with a dot as well."""
_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100


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


def exchanged(one: Path, other: Path) -> None:
    """Exchange two names in one step.

    Raises:
        OSError: the file system cannot, or one of them is not there.

    """
    if not _renamed(one, other, _EXCHANGE):
        raise OSError(errno.ENOTSUP, "two folders cannot be exchanged in one step", str(other))


def moved_to_free_name(source: Path, target: Path) -> bool:
    """Rename in one step; False where ``target`` exists."""
    if _renamed(source, target, _NOREPLACE):
        return True
    if os.path.lexists(target):
        return False
    source.rename(target)  # where the file system cannot make sure in the same step
    return True


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


def carry_over(foreign: Iterable[Path], new: Path) -> None:
    """Put foreign files of the old folder into the new one, as hard links where the file system has them.

    The old folder is not changed: it can be removed, or kept if the conversion fails.

    Raises:
        OSError: a file can be neither linked nor copied.

    """
    for entry in foreign:
        if not (new / entry.name).exists():  # a copied file with the same content is there
            _carry(entry, new / entry.name)


def _carry(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # no hard links on this file system, or none to a file of another owner
        shutil.copy2(source, target, follow_symlinks=False)
