"""A torch file as the nested state dict it is: its structure at once, its tensors one at a time.

The structure is laid out with tensors on meta, one storage for each that the file has. They say which tensors
share memory and how each lies in it; where that is in the file gives the places to read.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoint import Destinations, FileSource, Stream, TensorInfo
from ...checkpoint.dtypes import SAFETENSORS_NAMES
from ...checkpoint.formats.torch_files import TorchFile, read_torch_file
from ...checkpoint.io.locations import StoredBox, location_of
from ...checkpoint.io.stamps import WRITE_AGAIN
from ...checkpoint.pickle.values import ForeignTensor, OpaqueObject, StoredDict, StoredTensor
from ...device.host_memory import HostPool
from ...errors import SourceError
from .table import lay_out
from .walk import NotMade


class NestedFile(FileSource):
    """Everything in a file of torch.save, under names and in the form that a safetensors file can have.

    Attributes:
        structure: where each tensor belongs; ``unflatten`` takes it.

    Raises:
        SourceError: the file is damaged, its pickle names what it may not, or it holds what cannot be stored.

    """

    def __init__(self, file: Path) -> None:
        super().__init__(str(file), "torch")
        opened = read_torch_file(file, exact=True)
        self.stamps[opened.file] = opened.stamp
        outline = _Outline(opened)
        try:
            nested = outline.of(opened.tree)
        except RecursionError:
            raise SourceError(f"The state dict in {file} is nested too deeply. Save a flatter one.") from None
        except (ValueError, RuntimeError, TypeError, OverflowError) as error:
            raise SourceError(f"{file} is not a whole file of torch.save: {error}. {WRITE_AGAIN}") from error
        stored, self.structure = lay_out(nested, outline=True)
        self._stored = {item.name: item.tensor for item in stored}
        for item in stored:
            info = TensorInfo(item.name, tuple(item.tensor.shape), item.tensor.dtype)
            self._locations[item.name] = location_of(info, outline.part(item.tensor))

    def infos(self) -> Sequence[TensorInfo]:
        """Every tensor as it is stored: of a dtype that safetensors has, else as bytes."""
        return [_info(name, tensor) for name, tensor in self._stored.items()]

    def read(
        self,
        order: Sequence[str] | None = None,
        pool: HostPool | None = None,
        destinations: Destinations | None = None,
    ) -> Stream:
        with contextlib.closing(super().read(order, pool, destinations)) as tensors:
            for name, tensor in tensors:
                yield name, _as_stored(tensor, self._stored[name])


def _info(name: str, tensor: torch.Tensor) -> TensorInfo:
    if tensor.dtype in SAFETENSORS_NAMES:
        return TensorInfo(name, tuple(tensor.shape), tensor.dtype)
    return TensorInfo(name, (tensor.numel() * tensor.element_size(),), torch.uint8)


def _as_stored(read: torch.Tensor, described: torch.Tensor) -> torch.Tensor:
    """The values that ``described`` stands for, from the bytes that were read for it; in place."""
    if described.is_conj():
        read.conj_physical_()
    if described.is_neg():
        read.neg_()
    return read if read.dtype in SAFETENSORS_NAMES else read.reshape(-1).view(torch.uint8)


class _Outline:
    """One tree of a file being turned into the nested state dict it describes, with tensors on meta."""

    def __init__(self, opened: TorchFile) -> None:
        self._opened = opened
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._keys: dict[int, str] = {}
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """The same with tensors on meta; one object for one, so that what holds itself still does."""
        if type(value) not in (dict, StoredDict, list, tuple, StoredTensor, OpaqueObject, ForeignTensor):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = self._container(value)
        return self._made[id(value)]

    def _container(self, value: Any) -> Any:
        if isinstance(value, StoredTensor):
            return self._tensor(value)
        if isinstance(value, (OpaqueObject, ForeignTensor)):
            return NotMade(value.kind)
        if type(value) is tuple:
            return tuple(self.of(item) for item in value)
        made: Any = [] if type(value) is list else OrderedDict() if type(value) is StoredDict else {}
        self._made[id(value)] = made
        if type(value) is list:
            made.extend(self.of(item) for item in value)
            return made
        made.update((self.of(key), self.of(item)) for key, item in value.items())
        if isinstance(value, StoredDict) and isinstance(value.attributes, dict):
            vars(made).update((str(name), self.of(item)) for name, item in value.attributes.items())
        return made

    def _tensor(self, tensor: StoredTensor) -> torch.Tensor:
        part = self._opened.part(tensor)
        storage = self._storage(tensor.storage.key)
        start, rest = divmod(part.start - self._record(tensor.storage.key)[0], tensor.dtype.itemsize)
        if rest:
            raise ValueError(f"a tensor begins in the middle of an element of storage {tensor.storage.key}")
        empty = torch.empty(0, dtype=tensor.dtype, device="meta")
        made = empty.set_(storage, start, tensor.shape, tensor.strides)
        made = made.conj() if tensor.conj else made
        made = torch._neg_view(made) if tensor.neg else made
        if tensor.parameter:
            return nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)

    def _record(self, key: str) -> tuple[int, int]:
        return self._opened.records.get(key, (0, 0))

    def _storage(self, key: str) -> torch.UntypedStorage:
        if key not in self._storages:
            storage = torch.UntypedStorage(self._record(key)[1], device="meta")
            self._storages[key] = storage
            self._keys[storage._cdata] = key
        return self._storages[key]

    def part(self, tensor: torch.Tensor) -> StoredBox:
        """Where the bytes of a tensor lie that is a view of one of the storages."""
        start, _ = self._record(self._keys[tensor.untyped_storage()._cdata])
        offset = int(tensor.storage_offset()) * tensor.element_size()
        shape = tuple(tensor.shape)
        return StoredBox((0,) * len(shape), shape, self._opened.file, start + offset, tensor.stride())
