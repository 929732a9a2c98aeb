"""Files in a converted folder that no conversion wrote: found, and protected from the next conversion."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.sidecar import file_digest, written_files
from ..errors import SHOWN, SourceError


def foreign_files(folder: Path) -> list[Path]:
    """Entries of a converted folder that the conversion did not write, or that were changed since.

    Raises:
        SourceError: the folder cannot be read, or holds no converted file.

    """
    written = written_files(folder)
    return sorted(entry for entry in folder.iterdir() if not _as_written(entry, written))


def _as_written(entry: Path, written: dict[str, str | None]) -> bool:
    if entry.name not in written or entry.is_symlink() or not entry.is_file():
        return False
    digest = written[entry.name]
    return digest is None or file_digest(entry) == digest


def refuse_collisions(foreign: Iterable[Path], names: Iterable[str], beside: Iterable[Path]) -> None:
    """Refuse a conversion that would write over a foreign file with other content.

    Args:
        foreign: what ``foreign_files`` found in the target.
        names: names of the files that the conversion makes.
        beside: files that the conversion copies, under their own names.

    Raises:
        SourceError: it names the files.

    """
    copied = {file.name: file for file in beside}
    made = set(names)
    collisions = [
        entry.name
        for entry in foreign
        if entry.name in made or (entry.name in copied and not _same(entry, copied[entry.name]))
    ]
    if collisions:
        shown = ", ".join(collisions[:SHOWN])
        raise SourceError(
            f"The conversion would replace files that it did not write, or that were changed since: {shown}. "
            "Move them elsewhere, or convert with overwrite, which replaces the whole target."
        )


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and filecmp.cmp(one, other, shallow=False)
