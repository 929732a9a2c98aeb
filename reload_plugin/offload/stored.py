"""Places in which an offloaded value can be: memory, a ``.dat`` file, an entry of a safetensors file.

Formats: ``.dat`` is the plain memory of one tensor, described by the ``index.json`` of Accelerate's offload
folder (``accelerate/utils/offload.py``); entries of safetensors files are named by the index that
transformers or compressed-tensors keep in memory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Hashable, MutableMapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ..checkpoint.formats.offloading import IndexedValue
from ..checkpoint.formats.safetensors_files import SafetensorsSource
from ..checkpoint.io.readahead import Piece, read_piece
from ..checkpoint.io.stamps import WRITE_AGAIN
from ..checkpoint.io.writing import FilePlan, write_file
from ..checkpoint.stores import SPILL_DIRECTORY, bytes_of
from ..errors import SourceError
from ..plan.source import TensorInfo
from ..tensors import storage_id

OURS = "reloaded"
"""Marks files of new values that an index was pointed at; they are removed when it is pointed elsewhere."""


class StagedWrite(Protocol):
    """A new value that is on disk, and not in use yet."""

    def commit(self) -> None:
        """Put it in use: a rename, or an assignment to an index."""

    def undo(self) -> None:
        """After ``commit``, or one that failed: the old value is in use again."""

    def close(self) -> None:
        """Remove the file that is not in use."""


class InMemory:
    """A tensor: a module's own, or a value of the mapping (or the cache) that weights are taken from.

    Args:
        tensor: the memory that holds the value.
        where: ``module`` or ``memory``.

    """

    file = None

    def __init__(self, tensor: torch.Tensor, where: str) -> None:
        self.where = where
        self._tensor = tensor

    @property
    def key(self) -> Hashable:
        """Equal for the same view of the same memory."""
        return memory_key(self._tensor)

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self._tensor.device

    def read(self) -> torch.Tensor:
        """The memory itself."""
        return self._tensor.detach()

    def write(self, tensor: torch.Tensor) -> None:
        """Copy into it."""
        with torch.no_grad():
            self._tensor.detach().copy_(tensor)


class DatFile:
    """The ``.dat`` file of a weight in Accelerate's offload folder.

    Args:
        value: its file, and the index that describes it.

    """

    where = "dat"

    def __init__(self, value: IndexedValue) -> None:
        self.file = value.file
        self._name = value.name
        self.entry = value.key
        self.index = value.index
        self._folder = str(value.folder)

    @property
    def key(self) -> Hashable:
        """Equal for the same file."""
        return os.path.realpath(self.file)

    def read(self) -> torch.Tensor:
        """The value in new memory on the CPU, in the dtype of the file.

        Raises:
            SourceError: the file is missing, or not of the size that the index says.

        """
        entry = self.index[self._name]
        out = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="cpu")
        try:
            handle = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(handle).st_size
                if size != max(out.nbytes, out.element_size()):
                    raise SourceError(
                        f"{self.file} has {size:,} bytes, and {self._name} has {out.nbytes:,}. {WRITE_AGAIN}"
                    )
                read_piece(Piece(handle, 0, out, self.file, self._name))
            finally:
                os.close(handle)
        except OSError as error:
            raise _unreadable(self._name, self.file, error) from error
        return out

    def write(self, tensor: torch.Tensor) -> None:
        """``stage`` and commit."""
        write_now(self.stage(tensor))

    def stage(self, tensor: torch.Tensor) -> StagedWrite:
        """Write a new file beside the old one.

        Raises:
            SourceError: the disk is full or cannot be written.

        """
        entry = self.index[self._name]
        if getattr(torch, entry["dtype"]) != tensor.dtype:  # the index goes before the file's name
            return _repointed(self._name, self._name, self.index, self._folder, tensor)
        return ReplacedFile(self._name, self.file, lambda path: _write_dat(path, tensor))


class SafetensorsEntry:
    """A weight in a safetensors file, as an index names it.

    Args:
        value: the index, and its key there.
        folder: where new files go; called when one is written.
        replaceable: whether a file belongs to the offload folder and may be replaced. Others are checkpoints:
            they stay, and the index is pointed at a new file.
        listed: files that were listed already, by path.

    """

    where = "safetensors"

    def __init__(
        self,
        value: IndexedValue,
        folder: Callable[[], str],
        replaceable: Callable[[str], bool],
        listed: MutableMapping[str, SafetensorsSource],
    ) -> None:
        self._value = value
        self._name = value.name
        self.entry = value.key
        self.index = value.index
        self._folder = folder
        self._replaceable = replaceable
        self._listed = listed

    @property
    def file(self) -> str:
        return self._value.file

    @property
    def weight_name(self) -> str:
        """The tensor's name in the file."""
        return self._value.weight_name

    @property
    def key(self) -> Hashable:
        """Equal for the same tensor of the same file."""
        return os.path.realpath(self.file), self.weight_name

    def read(self) -> torch.Tensor:
        """The value in new memory on the CPU, in the dtype of the index.

        Raises:
            SourceError: the file is missing, truncated, does not hold the tensor, or changed since it was
                listed.

        """
        source = self._listed.get(self.file)
        if source is None:
            source = self._listed[self.file] = SafetensorsSource([self.file], self.file)
        info = next((info for info in source.infos() if info.name == self.weight_name), None)
        if info is None:
            raise SourceError(f"{self.file} does not hold {self.weight_name} any more. {WRITE_AGAIN}")
        out = torch.empty(info.shape, dtype=info.dtype, device="cpu")
        source.read_spans(info.name, [(0, out.numel())], out.reshape(-1))
        wanted = self.index[self.entry].get("dtype")
        return out if wanted is None else out.to(getattr(torch, wanted))

    def write(self, tensor: torch.Tensor) -> None:
        """``stage`` and commit."""
        write_now(self.stage(tensor))

    def stage(self, tensor: torch.Tensor) -> StagedWrite:
        """Write a new file: beside the old one, or where the index is pointed at.

        Raises:
            SourceError: the disk is full or cannot be written.

        """
        self._listed.pop(self.file, None)
        entry = self.index[self.entry]
        same = entry.get("dtype") in (None, str(tensor.dtype).removeprefix("torch."))
        if same and self._replaceable(self.file):
            name = self.weight_name
            return ReplacedFile(self._name, self.file, lambda path: _write_safetensors(path, name, tensor))
        return _repointed(self._name, self.entry, self.index, self._folder(), tensor)


class ReplacedFile:
    """A file that takes the place of another at ``commit``.

    Args:
        name: of the weight, for messages.
        file: the path that it takes.
        write: writes the new file at the path it is given, and has it on disk.

    """

    def __init__(self, name: object, file: str, write: Callable[[Path], None]) -> None:
        self._file = Path(file)
        mark = secrets.token_hex(4)
        self._new = self._file.parent / f".{self._file.name}.{mark}.partial"
        self._old = self._file.parent / f".{self._file.name}.{mark}.old"
        try:
            write(self._new)
        except OSError as error:
            self._new.unlink(missing_ok=True)
            raise _unwritable(name, self._new, error) from error
        except BaseException:
            self._new.unlink(missing_ok=True)
            raise
        self._name = name

    def commit(self) -> None:
        try:
            os.link(self._file, self._old, follow_symlinks=False)
            self._new.replace(self._file)
        except OSError as error:
            raise _unwritable(self._name, self._file, error) from error

    def undo(self) -> None:
        if self._old.is_symlink() or self._old.exists():
            self._old.replace(self._file)

    def close(self) -> None:
        for path in (self._new, self._old):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


class RepointedEntry:
    """An index entry that names another file from ``commit`` on.

    Args:
        key: in the index.
        index: it is written to.
        entry: the new one; its file is on disk.

    """

    def __init__(self, key: Any, index: MutableMapping[Any, Any], entry: dict[str, Any]) -> None:
        self._index = index
        self._keys = [other for other, value in index.items() if value is index[key]]
        """Tied weights have one entry under several names."""
        self._new = entry
        self._old = index[key]

    def commit(self) -> None:
        self._index.update(dict.fromkeys(self._keys, self._new))

    def undo(self) -> None:
        self._index.update(dict.fromkeys(self._keys, self._old))

    def close(self) -> None:
        unused = self._old if self._index[self._keys[0]] is self._new else self._new
        path = unused.get("safetensors_file")
        if path is not None and f".{OURS}-" in Path(path).name:
            with contextlib.suppress(OSError):
                Path(path).unlink(missing_ok=True)


def _repointed(
    name: str, key: Any, index: MutableMapping[Any, Any], folder: str, tensor: torch.Tensor
) -> RepointedEntry:
    path = Path(folder) / f"{name}.{OURS}-{secrets.token_hex(4)}.safetensors"
    try:
        _write_safetensors(path, name, tensor)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _unwritable(name, path, error) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    dtype = str(tensor.dtype).removeprefix("torch.")
    entry = {"safetensors_file": str(path), "weight_name": name, "dtype": dtype}
    return RepointedEntry(key, index, entry)


Stored = InMemory | DatFile | SafetensorsEntry
"""A place that holds one value."""


def pointed_at(
    stored: DatFile | SafetensorsEntry, file: str, weight_name: str, dtype: torch.dtype
) -> StagedWrite:
    """Let an index name a tensor of another file, which is not copied.

    Args:
        stored: the place whose value it takes.
        file: of safetensors; has to stay as it is.
        weight_name: of the tensor there.
        dtype: of the tensor there.

    """
    entry = {
        "safetensors_file": file,
        "weight_name": weight_name,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return RepointedEntry(stored.entry, stored.index, entry)


def memory_key(tensor: torch.Tensor) -> Hashable:
    """Equal for two tensors that are the same view of the same memory."""
    own = storage_id(tensor)
    if own is None:
        return id(tensor)
    return own, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def write_now(staged: StagedWrite) -> None:
    """Commit one staged write by itself."""
    try:
        staged.commit()
    except BaseException:
        staged.undo()
        raise
    finally:
        staged.close()


def folder_of(owner: object, folder: str | os.PathLike[str] | None) -> str:
    """The folder for new files of an index: its offload folder, else one that lasts as long as ``owner``."""
    if folder is not None and Path(folder).is_dir():
        return str(folder)
    made = getattr(owner, "_reload_plugin_folder", None)
    if made is None:
        made = tempfile.mkdtemp(prefix="reload_plugin-", dir=os.environ.get(SPILL_DIRECTORY))
        weakref.finalize(owner, shutil.rmtree, made, ignore_errors=True)
        owner._reload_plugin_folder = made  # type: ignore[attr-defined]
    return str(made)


def _write_dat(path: Path, tensor: torch.Tensor) -> None:
    with path.open("xb") as file:
        for piece in bytes_of(tensor):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _write_safetensors(path: Path, name: str, tensor: torch.Tensor) -> None:
    info = TensorInfo(name, tuple(tensor.shape), tensor.dtype)
    write_file(path, FilePlan(path.name, (info,)), {"format": "pt"}, iter([(name, tensor)]), lambda _: None)


def _unreadable(name: str, file: str, error: OSError) -> SourceError:
    return SourceError(f"{name} could not be read from {file}: {error}. {WRITE_AGAIN}")


def _unwritable(name: object, path: Path, error: BaseException) -> SourceError:
    return SourceError(
        f"{name} could not be written to {path}: {error}. Free space there, or let the process write there."
    )
