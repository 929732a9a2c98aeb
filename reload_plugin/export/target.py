"""Where an export goes, and which files of an older save it replaces."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ExportError

INDEX = "model.safetensors.index.json"
TAG = r"[0-9a-f]{8}"
_SAVED = re.compile(
    rf"model(-\d+-of-\d+)?(\.{TAG})?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)
"""Names that saves of Hugging Face give to weights; with a tag, what an export that was killed left behind.
"""
_INDEXES = (INDEX, "pytorch_model.bin.index.json")
_NOTHING = "Nothing was written."


@dataclass(frozen=True)
class Target:
    """A folder to write to, symbolic links followed."""

    path: Path
    exists: bool
    inside: bool
    """Whether the new files have to be made inside the folder, because it cannot be exchanged for another:
    its parent cannot be written, something is mounted there, or a process stands in it.
    """


def find_target(directory: str | Path) -> Target:
    """Look at a place before anything is written.

    Raises:
        ExportError: a file is in the way, or the folder cannot be written.

    """
    path = Path(os.path.realpath(directory))
    try:
        exists = path.is_dir()
        if not exists and os.path.lexists(path):
            raise ExportError(
                f"{directory} is no folder but a file. {_NOTHING} Choose another name, or remove it."
            )
        if exists and not _writable(path):
            raise ExportError(
                f"The folder {path} cannot be written. {_NOTHING} Choose another, or change its mode."
            )
        if not exists:
            _make_parents(path, directory)
    except OSError as error:
        raise ExportError(f"{directory} cannot be used: {error}. {_NOTHING} Choose another place.") from error
    inside = exists and (not _writable(path.parent) or _is_mounted(path) or _stands_in(path))
    return Target(path, exists, inside)


def _make_parents(path: Path, shown: str | Path) -> None:
    above = next(folder for folder in path.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise ExportError(
            f"{above} is no folder but a file, so {shown} cannot be made. {_NOTHING} Choose another place."
        )
    if not _writable(above):
        raise ExportError(
            f"{shown} cannot be made: {above} cannot be written. {_NOTHING} Choose another place."
        )
    path.parent.mkdir(parents=True, exist_ok=True)


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _is_mounted(path: Path) -> bool:
    """Whether the folder is where something is mounted, a folder of the same file system included."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    octal = re.compile(r"\\(\d{3})")
    points = (octal.sub(lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines)
    return str(path) in points


def _stands_in(path: Path) -> bool:
    """Whether this process's working directory is the folder or lies in it: it would be a removed one."""
    try:
        here = Path.cwd()
    except OSError:
        return False
    return here == path or path in here.parents


def saved_weights(folder: Path) -> list[str]:
    """Names of the weight files and indexes of an older save at the top of a folder.

    By name, as Hugging Face names them, and what an index there names. Other files of weights (adapters,
    GGUF) are no part of a save and not listed.
    """
    indexed = {name for index in _INDEXES for name in _named_by(folder / index)}
    files = (entry.name for entry in os.scandir(folder) if not entry.is_dir(follow_symlinks=False))
    return sorted(name for name in files if name in indexed or _SAVED.fullmatch(name))


def other_weights(names: Iterable[str]) -> bool:
    """Whether, among files that stay, there are some that a loader without an index takes for the model's."""
    return any(name.endswith(".safetensors") for name in names)


def _named_by(index: Path) -> set[str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name for name in found.values() if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()  # none, or none that any loader could follow
