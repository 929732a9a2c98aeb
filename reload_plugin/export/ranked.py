"""An export of what several ranks serve together: each writes its own parts into files of the full size.

Nothing is gathered: no rank sees the values of another. The ranks agree three times, by votes: on who writes
what, when the files are there, and when all parts are written. The first rank makes the folder and exchanges
it for the old one; should any rank fail, nothing is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.io.writing import FilePlan
from ..errors import ReloadError
from ..plan.source import TensorInfo
from ..ranks.votes import Vote
from .outputs import ExportPlan, OutputGroup, plan_export
from .parts import RankOffer, SharedOut, as_json, from_json, share_out, slices
from .planned_files import Box, PlannedFiles, check_written, create_files
from .replacement import failed, replacing
from .target import find_target
from .writer import METADATA, Written

OUT_OF_REACH = (
    "Several ranks hold this model, and the others cannot be reached from here. Nothing was written. Export "
    "from the engine (vllm.LLM), or reload from files that stay where they are."
)


class RankedExport:
    """One rank's part of an export.

    Args:
        vote: of this rank, cast by nobody yet.
        rank: of this one among those that hold the model.

    """

    def __init__(self, vote: Vote, rank: int) -> None:
        self._vote, self._rank = vote, rank

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one failed; harmless when they know."""
        self._vote(error)

    def agree(self, offer: RankOffer) -> SharedOut:
        """Who writes what.

        Raises:
            RanksDisagreeError: another rank failed.
            ExportError: a part is missing, the same error on every rank.

        """
        return share_out(
            [RankOffer.model_validate_json(text) for text in self._told(offer.model_dump_json())]
        )

    def write(
        self,
        directory: str | Path,
        shared: SharedOut,
        groups: Iterable[OutputGroup],
        max_shard_size: int | str | None,
        beside: Callable[[Path], object],
    ) -> tuple[ExportPlan, Written | None]:
        """Write this rank's parts.

        Args:
            directory: see ``write_export``.
            shared: who writes what.
            groups: what this rank can make; tensors have the shape of the whole, and values in their parts.
            max_shard_size: as ``write_export``'s plan.
            beside: as there.

        Returns:
            The plan of the whole export, and on the first rank what was written.

        """
        plan = plan_export([OutputGroup((info,), dict) for info in shared.infos.values()], max_shard_size)
        mine = shared.owned[self._rank]
        if self._rank:
            (folder, *_) = self._told("")
            try:
                self._write_parts(Path(folder), plan.files, groups, mine)
            except OSError as error:
                raise failed(Path(directory), error, plan.nbytes) from error
            return plan, None
        started = time.perf_counter()
        target = find_target(directory)
        try:
            with replacing(target, plan.files) as replacement:
                beside(replacement.path)
                copied = tuple(sorted(entry.name for entry in replacement.path.iterdir()))
                create_files(replacement.path, plan.files, METADATA)
                self._told(str(replacement.path))
                told = self._write_parts(replacement.path, plan.files, groups, mine)
                check_written(plan.files, told)
                replacement.commit()
        except OSError as error:
            raise failed(target.path, error, plan.nbytes) from error
        return plan, Written(copied, replacement.replaced, time.perf_counter() - started)

    def _write_parts(
        self,
        folder: Path,
        plans: tuple[FilePlan, ...],
        groups: Iterable[OutputGroup],
        mine: Mapping[str, tuple[Box, ...]],
    ) -> list[dict[str, list[Box]]]:
        """Write, flush, and wait for the others; what each rank wrote."""
        files = PlannedFiles(folder, plans, METADATA)
        try:
            for group in groups:
                if any(info.name in mine for info in group.outputs):
                    _write_group(files, group.outputs, dict(group.produce()), mine)
            files.close()
        finally:
            files.abandon()
        return [from_json(json.loads(text)) for text in self._told(json.dumps(as_json(files.written)))]

    def _told(self, text: str) -> list[str]:
        """Tell the other ranks something, and wait until each has; what they told, by rank."""
        vote = self._vote
        vote.note(text)
        vote(None)
        found = vote.notes()
        self._vote = vote.following()
        return found


def _write_group(
    files: PlannedFiles,
    outputs: Iterable[TensorInfo],
    made: dict[str, Any],
    mine: Mapping[str, tuple[Box, ...]],
) -> None:
    for info in outputs:
        tensor = made.pop(info.name, None)
        for box in mine.get(info.name, ()):
            if tensor is None:
                raise ReloadError(f"{info.name} was planned and not made. Nothing was written.")
            files.write(info.name, tensor[slices(box)], box.starts)
