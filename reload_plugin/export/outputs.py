"""What an export writes, known before a byte is written: tensors, groups and files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..checkpoint.io.writing import FilePlan, plan_files
from ..errors import ExportError, SourceError, export_error
from ..plan.source import TensorInfo, layer_order

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class OutputGroup:
    """Tensors that are made together, because they come from the same sources."""

    outputs: tuple[TensorInfo, ...]
    """What the group makes: names, shapes and dtypes as they will be in the files."""
    produce: Callable[[], Mapping[str, torch.Tensor]] = field(repr=False, compare=False)
    """Makes the tensors when the group's turn comes: name -> tensor, exactly those of ``outputs``, on any
    device and in any layout. The writer reads them and keeps none; whoever made them may lend memory of its
    own.
    """
    source_bytes: int = 0
    """Bytes that ``produce`` fetches into new memory; 0 where the outputs are views of memory that is there.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs."""
        return sum(info.nbytes for info in self.outputs)


@dataclass(frozen=True)
class ExportPlan:
    """Groups in the order in which they are made, and the files their outputs go to."""

    groups: tuple[OutputGroup, ...]
    files: tuple[FilePlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(plan.nbytes for plan in self.files)

    @property
    def file_of(self) -> dict[str, str]:
        """Name of a tensor -> name of its file, in natural order."""
        return {info.name: plan.name for plan in self.files for info in plan.infos}

    @property
    def peak_bytes(self) -> int:
        """Bytes of the largest group: what it fetches and what it makes."""
        return max((group.source_bytes + group.nbytes for group in self.groups), default=0)


def plan_export(groups: Sequence[OutputGroup], max_shard_size: int | str | None) -> ExportPlan:
    """Spread the outputs of groups over files. Reads nothing and writes nothing.

    Tensors are in natural order (layer by layer, numbers counted as numbers), whichever group makes them;
    groups are made in the order of their first outputs. A tensor larger than a file gets a file of its own.

    Args:
        groups: what will be written. Groups without outputs are left out.
        max_shard_size: see ``parse_size``; None for one file.

    Raises:
        ExportError: two groups make one name, or a name or dtype is none that a safetensors file can have.

    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    infos = [info for group in groups for info in group.outputs]
    counted = Counter(info.name for info in infos)
    twice = {name: f"{count} times" for name, count in counted.items() if count > 1}
    if twice:
        raise export_error(
            "would be written more than once", "Nothing was written. Give each of them one name.", twice
        )
    infos.sort(key=lambda info: layer_order(info.name))
    place = {info.name: index for index, info in enumerate(infos)}
    made = [group for group in groups if group.outputs]
    made.sort(key=lambda group: min(place[info.name] for info in group.outputs))
    try:
        files = plan_files(infos, limit)
    except SourceError as error:
        raise ExportError(f"{error} Nothing was written.") from error
    return ExportPlan(tuple(made), tuple(files))


def parse_size(size: int | str) -> int:
    """Bytes of a size as Hugging Face writes it.

    Args:
        size: a number of bytes, or a number with a unit: ``"5GB"`` is 5 * 10**9, ``"5GiB"`` is 5 * 2**30.

    Raises:
        ExportError: it is neither, or not positive.

    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        if match is not None:
            number, unit, binary = match.groups()
            power = " KMGT".index(unit.upper() or " ")
            size = int(float(number) * (1024 if binary else 1000) ** power)
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ExportError(
            f"max_shard_size is {size!r} and has to be a positive number of bytes, or one with a unit. "
            'Nothing was written. Write "5GB" or "500MiB".'
        )
    return size
