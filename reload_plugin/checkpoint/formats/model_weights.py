"""Where the weights of a torch model lie: in its modules, with Accelerate's hooks, in compressed-tensors'
cache, or in files that these have offloaded weights to.

An offloaded weight is a meta tensor in its module. Accelerate's hooks hold a mapping from names to values
(``weights_map``), which lazily reads files: ``.dat`` files of its own, and any tensor of a safetensors file.
The libraries map these files into memory, so that one cut short ends the process and what was read stays
resident; here they are read with plain reads.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import SourceError, export_error
from ...plan.source import TensorInfo
from ...tensors import storage_id, wraps_others
from ..dtypes import TORCH_DTYPES
from ..io.stamps import Stamp, stamp_of
from .offloading import (
    FoundValue,
    HeldValue,
    IndexedValue,
    hooks_of,
    is_cache,
    value_in_cache,
    value_in_mapping,
)
from .safetensors_files import read_header


@dataclass(frozen=True)
class LiveWeight:
    """A weight in memory: the model's own, or a hook's."""

    info: TensorInfo
    tensor: torch.Tensor

    @property
    def identity(self) -> object:
        """Equal for two names of one tensor."""
        t = self.tensor
        return storage_id(t), t.storage_offset(), tuple(t.shape), t.stride(), t.dtype


@dataclass(frozen=True)
class FileWeight:
    """A weight that lies contiguously in a file."""

    info: TensorInfo
    file: str
    start: int
    """First byte."""
    stored: torch.dtype
    """dtype in the file; the weight is cast to its own when it is read."""
    entry: Any = field(default=None, repr=False, compare=False)
    """The entry of the offloading library's index, by which the model finds the weight."""

    @property
    def identity(self) -> object:
        """Equal for two names of one tensor."""
        return self.file, self.start, self.info.shape, self.info.dtype


@dataclass(frozen=True)
class MappedWeight:
    """A weight that a mapping of somebody else's makes when it is asked for."""

    info: TensorInfo
    mapping: Mapping[str, torch.Tensor]
    key: str

    @property
    def identity(self) -> object:
        """Equal for two names of one tensor."""
        return id(self.mapping), self.key


HeldWeight = LiveWeight | FileWeight | MappedWeight


def weights_of(model: torch.nn.Module) -> dict[str, HeldWeight]:
    """Every entry of a model's state dict and where its value lies. Reads headers of files and no values.

    Raises:
        ExportError: entries that have no values, are no tensors, or are parts of a tensor that ranks share.
        SourceError: a file of offloaded weights is missing or damaged.

    """
    return _Search(model).weights()


class _Search:
    """One look through a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._headers: dict[str, Mapping[str, tuple[TensorInfo, int]]] = {}
        self._refused: dict[str, str] = {}

    def weights(self) -> dict[str, HeldWeight]:
        found = {}
        with _caches_untouched():
            for name, entry in self._model.state_dict().items():
                if not isinstance(entry, torch.Tensor):
                    self._refused[name] = f"is no tensor but a {type(entry).__name__}"
                elif wraps_others(type(entry)):
                    self._refused[name] = f"is a {type(entry).__name__}, which has no bytes of its own"
                elif weight := self._weight(name, entry):
                    found[name] = weight
        if self._refused:
            raise export_error(
                f"of {type(self._model).__name__} cannot be read",
                "Nothing was written. Gather shared tensors, or load the weights, before saving them.",
                self._refused,
            )
        return found

    def _weight(self, name: str, entry: torch.Tensor) -> HeldWeight | None:
        info = TensorInfo(name, tuple(entry.shape), entry.dtype)
        if not entry.is_meta:
            return LiveWeight(info, entry.detach())
        if cached := self._cached(name, info):
            return cached
        for value in self._mapped(name):
            return self._resolved(info, value)
        self._refused[name] = "is on meta, and no hook of Accelerate's holds its values"
        return None

    def _cached(self, name: str, info: TensorInfo) -> HeldWeight | None:
        """A weight that compressed-tensors has put into a file."""
        path, _, leaf = name.rpartition(".")
        module = self._modules.get(path)
        for cache in (getattr(module, "_parameters", None), getattr(module, "_buffers", None)):
            value = value_in_cache(cache, leaf, name) if is_cache(cache) else None
            if isinstance(value, IndexedValue):
                return self._indexed(info, value)
        return None

    def _mapped(self, name: str) -> Iterator[FoundValue]:
        """What hooks have for a weight, those of the innermost module first."""
        path = name.rpartition(".")[0]
        while True:
            key = name.removeprefix(f"{path}." if path else "")
            for hook in hooks_of(self._modules.get(path)):
                mapping: Any = getattr(hook, "weights_map", None)
                if mapping is not None and (value := value_in_mapping(mapping, key)) is not None:
                    yield value
            if not path:
                return
            path = path.rpartition(".")[0]

    def _resolved(self, info: TensorInfo, value: FoundValue) -> HeldWeight:
        if isinstance(value, HeldValue):
            return LiveWeight(info, value.tensor.detach())
        if isinstance(value, IndexedValue):
            return self._indexed(info, value)
        return MappedWeight(info, value.mapping, value.key)

    def _indexed(self, info: TensorInfo, value: IndexedValue) -> FileWeight:
        """A weight by its entry in an index of offloaded weights."""
        file, entry = str(Path(value.file).absolute()), value.entry
        if value.is_dat:
            return FileWeight(info, file, 0, _checked(info, file, entry, _size_of(file)), entry)
        if file not in self._headers:
            layout = read_header(file).layout
            places = layout.locations_in(file)
            self._headers[file] = {name: (place.info, place.start) for name, place in places.items()}
        stored, start = self._headers[file].get(value.weight_name, (None, 0))
        if stored is None or stored.shape != info.shape:
            found = "nothing" if stored is None else str(list(stored.shape))
            raise SourceError(
                f"{file} should hold {value.weight_name} {list(info.shape)} and holds {found}. "
                "The file was replaced after the model was offloaded: load the model again."
            )
        return FileWeight(info, file, start, stored.dtype, entry)


def _checked(info: TensorInfo, file: str, entry: Mapping[str, Any], size: int) -> torch.dtype:
    """The dtype of a ``.dat`` file, which has no header."""
    stored = TORCH_DTYPES.get(str(entry.get("dtype")), info.dtype)
    wanted = max(1, info.meta().numel()) * stored.itemsize
    if tuple(entry.get("shape", info.shape)) != info.shape or size < wanted:
        raise SourceError(
            f"{file} should hold {list(info.shape)} in {wanted:,} bytes and has {size:,} bytes for "
            f"{entry.get('shape')}. The file was replaced after the model was offloaded: load the model "
            "again."
        )
    return stored


def _size_of(file: str) -> int:
    return stamp_of(file)[0]


@contextlib.contextmanager
def _caches_untouched() -> Iterator[None]:
    """While entered, modules that compressed-tensors offloads show what is held and bring nothing back."""
    offload = sys.modules.get("compressed_tensors.offload")
    if offload is None:
        yield
        return
    before = offload.OffloadCache.onloading_disabled
    try:
        with offload.disable_onloading():
            yield
    finally:  # its own context leaves the switch on after an exception, for every model of the process
        offload.OffloadCache.onloading_disabled = before


def files_of(weights: Mapping[str, HeldWeight]) -> dict[str, Stamp]:
    """Files that weights lie in -> their stamps."""
    files = dict.fromkeys(weight.file for weight in weights.values() if isinstance(weight, FileWeight))
    return {file: stamp_of(file) for file in files}
