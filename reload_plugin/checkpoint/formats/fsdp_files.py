"""``model_world_size_N_rank_R.pt``: one file a rank, as verl and SkyRL save an FSDP model.

The tensors in them are DTensors (FSDP2, and FSDP1 with a device mesh) or ShardedTensors (FSDP1). Neither is
made here, which would need the process group they were saved with: their placements are read and worked out.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import SHOWN, SourceError
from ...plan.source import TensorInfo, tensor_info
from ..file_source import FileSource
from ..io.json_files import open_regular
from ..io.locations import AssembledLocation, StoredBox
from ..io.stamps import open_same
from ..pickle.pickle_names import SHARDS
from ..pickle.state_dicts import steps_in, weights_in
from ..pickle.values import ForeignTensor, OpaqueObject, StoredTensor
from ..sharding import Box, chunk_of, cover_error, whole_numbers
from .torch_files import TorchFile, read_torch_file

RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
ONE_SAVE = (
    "The folder is half written or holds files of two saves. "
    "Save or copy it again; reload when that is finished."
)
COMPARED = 4096
"""Bytes of each copy that are compared when a checkpoint is opened."""


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a tensor."""

    rank: int
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    pieces: tuple[tuple[Box, StoredTensor], ...]
    whole: bool = False
    """A plain tensor, which every rank holds."""


def rank_files(folder: Path) -> list[Path]:
    """The rank files in a folder."""
    return sorted(file for file in folder.iterdir() if RANK_FILE.fullmatch(file.name))


class FsdpSource(FileSource):
    """The files of all ranks as one checkpoint; each tensor is assembled while it is read.

    Copies that several ranks hold (HSDP, replicated placements) are read once, from the lowest rank.

    Raises:
        SourceError: ranks are missing, of another number of ranks or of another step; or a tensor is not
            whole.

    """

    def __init__(self, folder: str, within: str | None = None) -> None:
        super().__init__(folder, "fsdp")
        files = _files_by_rank(Path(folder))
        opened = {rank: read_torch_file(file, SHARDS) for rank, file in files.items()}
        self.stamps = {file.file: file.stamp for file in opened.values()}
        _check_steps(Path(folder), opened)
        held = {rank: _shards(file, rank, len(files), within) for rank, file in opened.items()}
        _check_same_names(opened, held)
        for name in held[0]:
            self._locations[name] = _assembled(name, [held[rank][name] for rank in held], opened)
        with contextlib.ExitStack() as stack:
            handles = open_same(self.stamps, self.stamps, stack)
            for name in held[0]:
                _check_copies(name, [held[rank][name] for rank in held], opened, handles)


def _files_by_rank(folder: Path) -> dict[int, Path]:
    """Rank -> file, all ranks of one world."""
    found = [(RANK_FILE.fullmatch(file.name), file) for file in rank_files(folder)]
    worlds = sorted({int(match[1]) for match, _ in found if match})
    if len(worlds) != 1:
        raise SourceError(f"{folder} holds rank files of {' and '.join(map(str, worlds))} ranks. {ONE_SAVE}")
    files = {int(match[2]): file for match, file in found if match}
    missing = [rank for rank in range(worlds[0]) if rank not in files]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        named = ", ".join(map(str, missing[:SHOWN]))
        raise SourceError(
            f"{folder} lacks the files of rank {named}{more} of {worlds[0]} "
            f"(model_world_size_{worlds[0]}_rank_{missing[0]}.pt). {ONE_SAVE}"
        )
    extra = sorted(rank for rank in files if rank >= worlds[0])
    if extra:
        raise SourceError(f"{folder} holds a file of rank {extra[0]} of {worlds[0]}. {ONE_SAVE}")
    return {rank: files[rank] for rank in range(worlds[0])}


def _check_steps(folder: Path, opened: Mapping[int, TorchFile]) -> None:
    """Refuse ranks that were saved at different steps, as far as they say so.

    verl writes each rank's optimizer and learning rate schedule beside its weights; both count steps.
    """
    said: dict[str, dict[int, float]] = {}
    for rank, file in opened.items():
        beside = [
            folder / f"{kind}_world_size_{len(opened)}_rank_{rank}.pt" for kind in ("extra_state", "optim")
        ]
        for each in (file, *map(_listed, beside)):
            for name, step in _numbers(each):
                said.setdefault(name, {})[rank] = step
    for name, steps in said.items():
        if len(set(steps.values())) > 1:
            low, high = min(steps, key=lambda r: steps[r]), max(steps, key=lambda r: steps[r])
            raise SourceError(
                f"{folder} holds ranks of different steps: {name} is {steps[low]:g} for rank {low} and "
                f"{steps[high]:g} for rank {high}. {ONE_SAVE}"
            )


def _listed(file: Path) -> TorchFile | None:
    """A file beside the weights, if it is there and can be listed: random states may be of any class."""
    try:
        return read_torch_file(file, SHARDS) if file.is_file() else None
    except SourceError:
        return None


def _numbers(file: TorchFile | None) -> Iterator[tuple[str, float]]:
    """What a file says of its step; of an optimizer's many equal counters the first."""
    tensors = 0
    for name, step in steps_in(file.tree) if file is not None else ():
        if isinstance(step, int):
            yield name, step
        elif file is not None and not tensors:
            tensors += 1
            with contextlib.suppress(OSError, ValueError, RuntimeError, TypeError):  # then it does not say it
                yield name, _number(file, step)


def _number(file: TorchFile, tensor: StoredTensor) -> float:
    """The value of a tensor of one element."""
    part = file.part(tensor)
    with open_regular(file.file) as handle:
        handle.seek(part.start)
        data = handle.read(tensor.dtype.itemsize)
    return float(torch.frombuffer(bytearray(data), dtype=tensor.dtype).item())


def _shards(file: TorchFile, rank: int, world: int, within: str | None) -> dict[str, Shard]:
    leaves: Any = (StoredTensor, ForeignTensor)
    weights = weights_in(file.tree, leaves, file.file, within)
    found = {}
    for name, tensor in weights.items():
        try:
            tensor_info(name, tensor.shape, tensor.dtype)
            found[name] = _shard(tensor, rank, world)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise SourceError(
                f"{name} in {file.file} cannot be placed: {error}. Save the model's full state "
                "dict and give that."
            ) from error
    return found


def _shard(tensor: StoredTensor | ForeignTensor, rank: int, world: int) -> Shard:
    if isinstance(tensor, StoredTensor):
        box = ((0,) * len(tensor.shape), tensor.shape)
        return Shard(rank, tensor.shape, tensor.dtype, ((box, tensor),), whole=True)
    if tensor.kind.endswith(".DTensor"):
        return _of_dtensor(tensor, rank, world)
    if tensor.kind.endswith(".ShardedTensor"):
        return _of_sharded_tensor(tensor, rank)
    raise ValueError(f"it is a {tensor.kind}")


def _check_same_names(opened: Mapping[int, TorchFile], held: Mapping[int, Mapping[str, Shard]]) -> None:
    for rank, shards in held.items():
        different = sorted(shards.keys() ^ held[0].keys())
        if different:
            more = f" and {len(different) - 1} more" if len(different) > 1 else ""
            raise SourceError(
                f"{opened[0].file} and {opened[rank].file} do not hold the same weights: {different[0]}"
                f"{more} is in one only. {ONE_SAVE}"
            )


def _assembled(name: str, shards: Sequence[Shard], opened: Mapping[int, TorchFile]) -> AssembledLocation:
    first = shards[0]
    for shard in shards:
        if (shard.shape, shard.dtype, shard.whole) != (first.shape, first.dtype, first.whole):
            raise SourceError(
                f"{name} is {list(first.shape)} {first.dtype} in {opened[first.rank].file} and "
                f"{list(shard.shape)} {shard.dtype} in {opened[shard.rank].file}. {ONE_SAVE}"
            )
    chosen: dict[Box, StoredBox] = {}
    for shard in shards:
        for box, tensor in shard.pieces:
            if box not in chosen:
                chosen[box] = _part(name, opened[shard.rank], tensor, box)
    wrong = cover_error(list(chosen), first.shape)
    if wrong is not None:
        raise SourceError(f"{name} is not whole in the files beside {opened[0].file}: {wrong}. {ONE_SAVE}")
    return AssembledLocation(TensorInfo(name, first.shape, first.dtype), tuple(chosen.values()))


def _check_copies(
    name: str, shards: Sequence[Shard], opened: Mapping[int, TorchFile], handles: Mapping[str, int]
) -> None:
    """Refuse copies of one box that differ in their first bytes: then one of them is of another step."""
    first: dict[Box, tuple[int, bytes]] = {}
    for shard in shards:
        for box, tensor in shard.pieces:
            part = _part(name, opened[shard.rank], tensor, box)
            if not part.numel or not part.is_contiguous:
                continue
            nbytes = min(COMPARED, part.numel * shard.dtype.itemsize)
            rank, sample = first.setdefault(box, (shard.rank, b""))
            found = os.pread(handles[part.file], nbytes, part.start)
            if rank == shard.rank:
                first[box] = rank, found
            elif found != sample:
                raise SourceError(
                    f"{opened[rank].file} and {opened[shard.rank].file} hold copies of {name} that differ: "
                    f"they are ranks of different steps. {ONE_SAVE}"
                )


def _part(name: str, file: TorchFile, tensor: StoredTensor, box: Box) -> StoredBox:
    if tensor.shape != box[1]:
        raise SourceError(
            f"{file.file} holds {list(tensor.shape)} of {name}, and by its placement it would be "
            f"{list(box[1])}. {ONE_SAVE}"
        )
    try:
        return file.part(tensor, box[0])
    except ValueError as error:
        raise SourceError(f"{name} in {file.file} is not whole: {error}. {ONE_SAVE}") from error


# -- FSDP1 ----------------------------------------------------------------------------------------


def _of_sharded_tensor(tensor: ForeignTensor, rank: int) -> Shard:
    """``ShardedTensor.__getstate__``: local shards, metadata, process group, sharding spec, RRefs."""
    local, metadata = tensor.state[0], tensor.state[1]
    shape = whole_numbers(metadata.get("size"))
    pieces = []
    for shard in local:
        box = (
            whole_numbers(shard.get("metadata").get("shard_offsets")),
            whole_numbers(shard.get("metadata").get("shard_sizes")),
        )
        pieces.append((box, _plain(shard.get("tensor"))))
    return Shard(rank, shape, tensor.dtype, tuple(pieces))


def _plain(tensor: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise ValueError("it has no plain tensor in it")
    return tensor


# -- FSDP2 ----------------------------------------------------------------------------------------


def _of_dtensor(tensor: ForeignTensor, rank: int, world: int) -> Shard:
    state = tensor.state[1] if type(tensor.state) is tuple else tensor.state
    spec, local = state["_spec"], _plain(state["_local_tensor"])
    sizes, place = _coordinate(spec.get("mesh"), rank, world)
    box = _box(tensor.shape, spec.get("placements"), sizes, place)
    return Shard(rank, tensor.shape, tensor.dtype, ((box, local),))


def _coordinate(mesh: OpaqueObject, rank: int, world: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of a device mesh, and this rank's coordinate in it, as different versions of torch store them."""
    if mesh.get("_rank") not in (None, rank):
        raise ValueError(f"it was saved by rank {mesh.get('_rank')} and the file says rank {rank}")
    sizes = _mesh_sizes(mesh)
    place = mesh.get("_coordinate_on_dim")
    if place is None:
        place = _unravelled(rank, sizes) if math.prod(sizes) == world else None
    if place is None or len(place) != len(sizes):
        raise ValueError("its device mesh does not hold this rank")
    if not all(at < size for at, size in zip(whole_numbers(place), sizes, strict=True)):
        raise ValueError("its device mesh has no such place")
    return sizes, tuple(place)


def _mesh_sizes(mesh: OpaqueObject) -> tuple[int, ...]:
    layout = mesh.get("_layout")
    if isinstance(layout, OpaqueObject):
        axes = layout.get("axes")
        if axes is not None:
            return tuple(math.prod(whole_numbers(axis.get("shape"))) for axis in axes)
        shape = layout.get("shape")
        if shape is None and type(layout.args) is tuple and layout.args:
            shape = layout.args[0]
        shape = (shape,) if type(shape) is int else shape
        return tuple(math.prod(_flat(size)) for size in shape)
    ranks = mesh.get("mesh", mesh.get("_mesh"))
    if isinstance(ranks, StoredTensor):
        return ranks.shape
    raise ValueError("its device mesh has no shape")


def _flat(sizes: Any) -> tuple[int, ...]:
    return (sizes,) if type(sizes) is int else tuple(n for size in sizes for n in _flat(size))


def _unravelled(rank: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        rank, at = divmod(rank, size)
        place.append(at)
    return tuple(reversed(place))


def _box(
    shape: tuple[int, ...], placements: Sequence[OpaqueObject], sizes: tuple[int, ...], place: tuple[int, ...]
) -> Box:
    """The box of a tensor that the rank at one coordinate of the mesh holds."""
    if len(placements) != len(sizes):
        raise ValueError("it has not one placement a dimension of its device mesh")
    offsets, left = [0] * len(shape), list(shape)
    for axis in _in_order(placements, sizes):
        dim = placements[axis].get("dim")
        if not 0 <= dim < len(shape):
            raise ValueError(f"it is sharded along dimension {dim}")
        start, left[dim] = chunk_of(left[dim], sizes[axis], place[axis])
        offsets[dim] += start
    return tuple(offsets), tuple(left)


def _in_order(placements: Sequence[OpaqueObject], sizes: tuple[int, ...]) -> list[int]:
    """The axes of the mesh that shard, in the order in which they were applied.

    From left to right, but for a ``_StridedShard``: FSDP, on the left, shards what tensor parallelism on its
    right has sharded already, and notes in how many pieces (``torch/distributed/tensor/placement_types.py``).
    """
    order: list[int] = []
    waiting: dict[int, int] = {}
    for axis, placement in enumerate(placements):
        kind = placement.kind.rpartition(".")[2]
        if kind == "Replicate":
            continue
        if kind == "_StridedShard" and placement.get("split_factor") != 1:
            waiting[axis] = placement.get("split_factor")
        elif kind in ("Shard", "_StridedShard"):
            order.append(axis)
        else:
            raise ValueError(f"it is placed as {kind}, which is not a value but a part of a sum")
    for axis in sorted(waiting, reverse=True):
        dim = placements[axis].get("dim")
        right = [other for other in order if other > axis and placements[other].get("dim") == dim]
        if math.prod(sizes[other] for other in right) != waiting[axis]:
            raise ValueError(f"it is strided by {waiting[axis]}, which its device mesh does not explain")
        order.insert(order.index(right[-1]) + 1 if right else len(order), axis)
    return order
