"""Checkpoints of torch.distributed.checkpoint: ``.metadata`` and ``*.distcp``, or sharded safetensors.

``.metadata`` is a pickle of tables: which boxes every tensor was cut into, and in which file each lies, as a
small file of torch.save of its own (``torch/distributed/checkpoint/metadata.py``, ``filesystem.py``). The
safetensors form notes in each file where its boxes begin (``_hf_utils.py`` there).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import SourceError
from ...plan.source import TensorInfo, tensor_info
from ..file_source import FileSource
from ..io.json_files import open_regular, strict_json
from ..io.locations import AssembledLocation, ContiguousLocation, StoredBox, UnresolvedLocation
from ..io.stamps import Stamp, stamp_of, stamped
from ..pickle.pickle_names import DCP_METADATA
from ..pickle.state_dicts import bare_name, weights_in
from ..pickle.unpickling import unpickle
from ..pickle.values import OpaqueObject, StoredTensor
from ..sharding import Box, cover_error, whole_numbers
from .safetensors_files import read_header
from .torch_files import LONGEST_PICKLE, read_chunk

METADATA = ".metadata"
SHARD_FILE = re.compile(r"shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors")
ONE_SAVE = (
    "The folder is half written or holds files of two saves. "
    "Save or copy it again; reload when that is finished."
)
_SHARDING = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor, and where its file of torch.save lies."""

    box: Box
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class _Chunked:
    """A tensor of the metadata."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]


class DcpSource(FileSource):
    """A folder of torch.distributed.checkpoint; each tensor is assembled while it is read.

    Raises:
        SourceError: the metadata is damaged or names what it may not; files are missing or cut off; a
            tensor is not whole.

    """

    def __init__(self, folder: str, within: str | None = None) -> None:
        super().__init__(folder, "dcp")
        place = Path(folder)
        stamp, metadata = _metadata(place)
        self.stamps[str(place / METADATA)] = stamp
        try:
            tensors = dict(_tensors(metadata.get("state_dict_metadata")))
            stored = dict(_stored(metadata.get("storage_data"), place))
            tree = _nested(tensors, metadata.get("planner_data"))
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise SourceError(f"{place / METADATA} is damaged: {error}. {ONE_SAVE}") from error
        self._stamp_files(stored)
        for name, tensor in weights_in(tree, _Chunked, folder, within).items():
            self._locations[name] = _deferred(name, tensor, stored, place)

    def _stamp_files(self, stored: Mapping[tuple[str, tuple[int, ...]], _Chunk]) -> None:
        """Stamp every file; refuse missing ones, and files shorter than the metadata says."""
        ends: dict[str, int] = {}
        for chunk in stored.values():
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.nbytes)
        missing = sorted(file for file in ends if not Path(file).is_file())
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise SourceError(
                f"{self.description} lacks {Path(missing[0]).name}{more}, which its {METADATA} "
                f"names. {ONE_SAVE}"
            )
        for file, end in ends.items():
            self.stamps[file] = stamp_of(file)
            if self.stamps[file][0] < end:
                raise SourceError(
                    f"{file} has {self.stamps[file][0]:,} bytes and by {METADATA} it has {end:,}. {ONE_SAVE}"
                )


def _metadata(folder: Path) -> tuple[Stamp, OpaqueObject]:
    if (folder / f"{METADATA}.tmp").exists():
        raise SourceError(f"{folder} holds {METADATA}.tmp: a save into it has not ended. {ONE_SAVE}")
    path = folder / METADATA
    try:
        with open_regular(path) as handle:
            stamp = stamped(os.fstat(handle.fileno()))
            if stamp[0] > LONGEST_PICKLE:
                raise ValueError(f"it has {stamp[0]:,} bytes")
            found = unpickle(handle.read(), DCP_METADATA, tensors=False, plain=False)
        if not isinstance(found, OpaqueObject) or not found.kind.endswith(".Metadata"):
            raise ValueError("it is another object")
    except FileNotFoundError as error:
        raise SourceError(f"{folder} holds .distcp files and no {METADATA}. {ONE_SAVE}") from error
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path} is no metadata of torch.distributed.checkpoint: {error}. {ONE_SAVE}"
        ) from error
    return stamp, found


def _tensors(table: Any) -> Iterator[tuple[str, _Chunked]]:
    for fqn, entry in table.items():
        if type(fqn) is not str:
            raise ValueError("a name is no text")
        if entry.kind.endswith(".BytesStorageMetadata"):
            continue
        properties = entry.get("properties")
        state = properties.state
        dtype = state[0] if type(state) is tuple else properties.get("dtype")
        if type(dtype) is not torch.dtype:
            raise ValueError(f"{fqn} has no dtype")
        tensor_info(fqn, whole_numbers(entry.get("size")), dtype)
        boxes = [
            (whole_numbers(chunk.get("offsets")), whole_numbers(chunk.get("sizes")))
            for chunk in entry.get("chunks")
        ]
        yield fqn, _Chunked(fqn, whole_numbers(entry.get("size")), dtype, tuple(boxes))


def _stored(table: Any, folder: Path) -> Iterator[tuple[tuple[str, tuple[int, ...]], _Chunk]]:
    for index, info in table.items():
        name, offsets = index.get("fqn"), index.get("offset")
        path, start, nbytes = info.get("relative_path"), info.get("offset"), info.get("length")
        if (
            type(name) is not str
            or type(path) is not str
            or path in ("", ".", "..")
            or "/" in path
            or "\0" in path
        ):
            raise ValueError(f"it names a file outside its folder: {path!r}")
        if info.get("transform_descriptors"):
            raise ValueError(f"{name} is stored through {info.get('transform_descriptors')}; save it without")
        start, nbytes = whole_numbers((start, nbytes))
        at = whole_numbers(offsets) if offsets is not None else ()
        yield (name, at), _Chunk((at, ()), str(folder / path), start, nbytes)


def _nested(tensors: Mapping[str, _Chunked], paths: Any) -> dict[str, Any]:
    """The dicts that were flattened when they were saved; the planner noted the way to each tensor."""
    tree: dict[Any, Any] = {}
    for fqn, tensor in tensors.items():
        path = paths.get(fqn) if type(paths) is dict else None
        if type(path) is not tuple or not path:
            path = (fqn,)
        inside: Any = tree
        for key in path[:-1]:
            inside = inside.setdefault(key, {})
            if type(inside) is not dict:
                raise ValueError(f"{fqn} lies inside another tensor")
        inside[path[-1]] = tensor
    return tree


def _deferred(
    name: str, tensor: _Chunked, stored: Mapping[tuple[str, tuple[int, ...]], _Chunk], folder: Path
) -> UnresolvedLocation:

    boxes = [box for box in tensor.boxes if 0 not in box[1]]
    wrong = cover_error(boxes, tensor.shape)
    if wrong is not None:
        raise SourceError(f"{name} is not whole in {folder}: {wrong}. {ONE_SAVE}")
    chunks = []
    for box in boxes:
        found = stored.get((tensor.fqn, box[0]))
        if found is None:
            raise SourceError(f"{folder / METADATA} does not say where {name} lies. {ONE_SAVE}")
        chunks.append(_Chunk(box, found.file, found.start, found.nbytes))
    info = TensorInfo(name, tensor.shape, tensor.dtype)
    files = tuple(dict.fromkeys(chunk.file for chunk in chunks))
    return UnresolvedLocation(info, files, functools.partial(_resolved, info, tuple(chunks)))


def _resolved(info: TensorInfo, chunks: Sequence[_Chunk], handles: Mapping[str, int]) -> AssembledLocation:
    parts = []
    for chunk in chunks:
        try:
            found = read_chunk(handles[chunk.file], chunk.file, chunk.start, chunk.nbytes)
            tensor = found.tree
            if (
                not isinstance(tensor, StoredTensor)
                or tensor.shape != chunk.box[1]
                or tensor.dtype != info.dtype
            ):
                raise ValueError(f"it is not the tensor that {METADATA} says")
            parts.append(found.part(tensor, chunk.box[0]))
        except ValueError as error:
            raise SourceError(
                f"{chunk.file} is damaged at byte {chunk.start:,}, in {info.name}: {error}. {ONE_SAVE}"
            ) from error
    return AssembledLocation(info, tuple(parts))


# -- the safetensors form -------------------------------------------------------------------------


class ShardedSafetensorsSource(FileSource):
    """What HuggingFaceStorageWriter writes without consolidation: boxes of tensors in safetensors files.

    No file says how large a tensor is: shards that lack at the end of a tensor show only when its shape does
    not fit the model.

    Raises:
        SourceError: a file is damaged, or is missing from their numbers, or a tensor has holes.

    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, "dcp-safetensors")
        files = sorted(file for file in Path(folder).iterdir() if SHARD_FILE.fullmatch(file.name))
        _check_numbers(folder, files)
        parts: dict[str, dict[tuple[int, ...], ContiguousLocation]] = {}
        for file in files:
            header = read_header(str(file))
            self.stamps[str(file)] = header.stamp
            offsets = _offsets(file, header.metadata)
            for place in header.layout.locations_in(str(file)).values():
                at = offsets.get(place.info.name, (0,) * len(place.info.shape))
                same = parts.setdefault(bare_name(place.info.name), {})
                if at in same:
                    raise SourceError(
                        f"{place.info.name} is in {same[at].file} and in {file}, at the same place. "
                        f"{ONE_SAVE}"
                    )
                same[at] = place
        for name, found in parts.items():
            self._locations[name] = _joined(name, found, folder)


def _check_numbers(folder: str, files: Sequence[Path]) -> None:
    numbers = {int(match[1]) for file in files if (match := SHARD_FILE.fullmatch(file.name))}
    missing = sorted(set(range(1, max(numbers) + 1)) - numbers)
    if missing:
        raise SourceError(f"{folder} has no shard {missing[0]} of its {max(numbers)} or more. {ONE_SAVE}")


def _offsets(file: Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    if _SHARDING not in metadata:
        return {}
    try:
        table = strict_json(metadata[_SHARDING].encode())
        return {name: whole_numbers(entry["saved_offsets"]) for name, entry in table.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise SourceError(f"{file} has a damaged {_SHARDING}: {error}. {ONE_SAVE}") from error


def _joined(name: str, found: Mapping[tuple[int, ...], ContiguousLocation], folder: str) -> AssembledLocation:
    places = list(found.items())
    dtype, dims = places[0][1].info.dtype, len(places[0][1].info.shape)
    for at, place in places:
        if place.info.dtype != dtype or len(place.info.shape) != dims or len(at) != dims:
            raise SourceError(f"{name} is not alike in {places[0][1].file} and {place.file}. {ONE_SAVE}")
    ends = [tuple(s + n for s, n in zip(at, p.info.shape, strict=True)) for at, p in places]
    shape = tuple(max(end[dim] for end in ends) for dim in range(dims))
    solid = [(at, place) for at, place in places if 0 not in place.info.shape]
    wrong = cover_error([(at, place.info.shape) for at, place in solid], shape)
    try:
        info = tensor_info(name, shape, dtype)
    except ValueError as error:
        raise SourceError(f"{folder} is damaged: {error}. {ONE_SAVE}") from error
    if wrong is not None:
        raise SourceError(f"{name} is not whole in {folder}: {wrong}. {ONE_SAVE}")
    parts = tuple(
        StoredBox(at, place.info.shape, place.file, place.start, place.info.meta().stride())
        for at, place in solid
    )
    return AssembledLocation(info, parts)
