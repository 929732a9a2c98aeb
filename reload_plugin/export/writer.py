"""Writes groups of tensors as a folder that loads: one group in memory at a time, all or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import export_error
from ..load.progress import byte_bar
from .outputs import ExportPlan, OutputGroup
from .planned_files import PlannedFiles, check_written, create_files
from .replacement import Replacement, failed, replacing
from .target import Target, find_target

METADATA: Mapping[str, str] = {"format": "pt"}
"""Text in every header; loaders of Hugging Face want it."""


@dataclass(frozen=True)
class Written:
    """What was written, for a report."""

    copied: tuple[str, ...]
    """Files beside the weights."""
    replaced: tuple[str, ...]
    """Weight files of the older save."""
    seconds: float


def write_export(
    directory: str | Path,
    plan: ExportPlan,
    *,
    beside: Callable[[Path], object] | None = None,
    description: str = "weights",
    progress: bool | None = None,
    before_commit: Callable[[], object] | None = None,
) -> Written:
    """Write a plan as a folder; the old folder is replaced whole, or not touched.

    Each group is made, checked against the plan, written at its offsets and freed before the next one is
    made, so the peak is the largest group, whatever the size of the files. Files that a group reads may lie
    in the target folder: it is not changed until all groups are written.

    Args:
        directory: a folder to make, or one whose weights are replaced. A symbolic link is followed.
        plan: what is written.
        beside: called with the new folder before the weights are written, to put config and tokenizer there.
        description: what the weights are, for the progress bar and messages.
        progress: whether to show a bar on stderr; None for only on a terminal.
        before_commit: called when all bytes are written and nothing is replaced yet; what it raises undoes
        all.

    Raises:
        ExportError: the place cannot be written, or a group made something else than planned.

    """
    started = time.perf_counter()
    target = find_target(directory)
    try:
        with replacing(target, plan.files) as replacement:
            copied = _put_beside(replacement, beside)
            create_files(replacement.path, plan.files, METADATA)
            files = PlannedFiles(replacement.path, plan.files, METADATA)
            try:
                with byte_bar(plan.nbytes, f"writing {description}", progress) as wrote:
                    for group in plan.groups:
                        write_group(files, group, wrote)
                files.close()
            finally:
                files.abandon()
            check_written(plan.files, [files.written])
            if before_commit is not None:
                before_commit()
            replacement.commit()
    except OSError as error:
        raise failed(target.path, error, plan.nbytes) from error
    return Written(copied, replacement.replaced, time.perf_counter() - started)


def write_group(files: PlannedFiles, group: OutputGroup, wrote: Callable[[int], None] | None = None) -> None:
    """Make the tensors of a group, check them against what was planned, write them and free them.

    Raises:
        ExportError: the group made other tensors.
        OSError: writing failed.

    """
    made: dict[str, torch.Tensor] = dict(group.produce())
    planned = {info.name for info in group.outputs}
    wrong = dict.fromkeys(planned - made.keys(), "planned and not made")
    wrong |= dict.fromkeys(made.keys() - planned, "made and not planned")
    if wrong:
        raise export_error(
            "would not be what was planned",
            "Nothing was written. The model changed while it was exported.",
            wrong,
        )
    for info in group.outputs:
        files.write(info.name, made.pop(info.name), wrote=wrote)


def _put_beside(replacement: Replacement, beside: Callable[[Path], object] | None) -> tuple[str, ...]:
    if beside is not None:
        beside(replacement.path)
    return tuple(sorted(entry.name for entry in replacement.path.iterdir()))


__all__ = ["METADATA", "Target", "Written", "find_target", "replacing", "write_export", "write_group"]
