"""``*.index.json``: which file of a checkpoint holds which tensor, and whether the files agree."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ...errors import SourceError
from ..io.json_files import open_regular, strict_json

TWO_SAVES = (
    "The folder is half written or holds files of two saves. "
    "Save or copy it again; reload when that is finished."
)


def read_index(folder: Path, name: str, present: Collection[str]) -> tuple[Path, dict[str, str]] | None:
    """The index of a folder and its table (tensor -> file name), if it has one.

    Args:
        folder: where it would be.
        name: its file name.
        present: names of the files in the folder.

    Raises:
        SourceError: the index is something else, or names files that are not there.

    """
    if name not in present:
        return None
    index = folder / name
    kind = "safetensors index" if name.endswith(".safetensors.index.json") else "index"
    try:
        with open_regular(index) as handle:
            table = strict_json(handle.read())["weight_map"]
        files = set(table.values())
        if not all(type(file) is str for file in files):
            raise ValueError("its weight_map is not a table of file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(f"{index} is not a {kind}: {reason}. {TWO_SAVES}") from error
    missing = sorted(files - set(present))
    if missing:
        raise SourceError(f"{index} names {_some(missing, 'files')} that are not there. {TWO_SAVES}")
    return index, table


def check_index(index: Path, table: Mapping[str, str], held: Mapping[str, str], read: Sequence[str]) -> None:
    """Every tensor in the file that the index says, and no other. Files that are not read do not count.

    A cold start takes whatever the files hold; where the index says otherwise they are not of one save.
    """
    listed = {name: file for name, file in table.items() if file in read}
    elsewhere = sorted(n for n, file in listed.items() if n not in held or Path(held[n]).name != file)
    if elsewhere:
        raise SourceError(
            f"{index} says that {listed[elsewhere[0]]} holds {_some(elsewhere, 'tensors')}; it does not. "
            f"{TWO_SAVES}"
        )
    unlisted = sorted(held.keys() - listed.keys())
    if unlisted:
        raise SourceError(
            f"{held[unlisted[0]]} holds {_some(unlisted, 'tensors')} that {index.name} does not list. "
            f"{TWO_SAVES}"
        )


def _some(names: Sequence[str], kind: str) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more {kind}"
