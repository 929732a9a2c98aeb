"""A folder of weights that takes the place of an older one whole, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..checkpoint.formats.safetensors_files import read_header
from ..checkpoint.io.atomic import PARTIAL, carry_over, exchanged, moved_to_free_name, sync_folder
from ..checkpoint.io.writing import FilePlan, index_of
from ..errors import ExportError, SourceError
from .target import INDEX, TAG, Target, other_weights, saved_weights

_LOOSE_INDEX = {"reason": "other weight files lie beside this save"}


class Replacement:
    """A new folder under construction; see ``replacing``.

    Attributes:
        path: where to write the new files.
        replaced: after the commit, the weight files of the older save.

    """

    def __init__(self, target: Target, path: Path, plans: Sequence[FilePlan]) -> None:
        self._target = target
        self.path = path
        self._plans = plans
        self.replaced: tuple[str, ...] = ()

    def commit(self) -> None:
        """Put the new files in the place of the old.

        Raises:
            OSError: it failed. The old files are still what is loaded, unless the error says otherwise.

        """
        old = saved_weights(self._target.path) if self._target.exists else []
        _sync_files(self.path)
        if self._target.inside:
            try:
                _Inside(self._target.path, self.path, self._plans, old).commit()
            except OSError as error:
                raise ExportError(
                    f"Files in {self._target.path} could not be renamed ({error}). It loads, with the "
                    "old weights or the new ones. Export again."
                ) from error
        else:
            self._beside(old)
        self.replaced = tuple(old)

    def _beside(self, old: Sequence[str]) -> None:
        target = self._target.path
        stay = _that_stay(target, old) if self._target.exists else []
        if index := _index(self._plans, stay):
            _write(self.path / INDEX, index)
        carry_over(stay, self.path)
        if self._target.exists:
            _like(target, self.path)
        sync_folder(self.path)
        if self._target.exists:
            exchanged(self.path, target)
        elif not moved_to_free_name(self.path, target):
            raise OSError(errno.EEXIST, "it was made by somebody else meanwhile", str(target))
        try:
            sync_folder(target.parent)
        except BaseException:  # it may not last, so the old folder comes back
            undo = exchanged if self._target.exists else moved_to_free_name
            undo(target, self.path)
            raise
        if self._target.exists:  # what others put into the old folder while the new one was made
            for entry in _that_stay(self.path, old):
                if not os.path.lexists(target / entry.name):
                    entry.rename(target / entry.name)


@contextlib.contextmanager
def replacing(target: Target, plans: Sequence[FilePlan]) -> Iterator[Replacement]:
    """Yield a new folder to write to; ``commit`` puts it in the place of the target.

    Files of the old folder that are no weights stay (``saved_weights`` says which are). Where the folder
    itself can be exchanged, that is one step. Else files are renamed one by one in an order in which at each
    moment the old weights or the new are what Hugging Face's and vLLM's loaders load. However the block is
    left, the folder under construction is removed; one of a process that was killed goes when the next export
    to the same place begins.

    Raises:
        OSError: no folder can be made there.

    """
    parent = target.path if target.inside else target.path.parent
    for folder in {parent, target.path} if target.exists else {parent}:
        _sweep(folder, target.path.name)
    path, lock = _made_and_locked(parent, target.path.name)
    try:
        if target.exists and not target.inside and not _can_exchange(parent, target.path.name):
            target = dataclasses.replace(target, inside=True)
            with replacing(target, plans) as replacement:
                yield replacement
            return
        yield Replacement(target, path, plans)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _made_and_locked(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        path = parent / f".{name}.{secrets.token_hex(4)}{PARTIAL}"
        path.mkdir()
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():  # nobody took it for a left one before it was locked
            return path, handle
        os.close(handle)


def _sweep(parent: Path, name: str) -> None:
    """Remove what exports to this place left behind that were killed: folders that nobody holds locked."""
    left = re.compile(re.escape(f".{name}.") + TAG + re.escape(PARTIAL))
    for entry in [entry for entry in parent.iterdir() if left.fullmatch(entry.name)]:
        with contextlib.suppress(OSError):
            handle = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry, ignore_errors=True)
            finally:
                os.close(handle)


def _can_exchange(parent: Path, name: str) -> bool:
    """Whether the file system can exchange two folders in one step."""
    tries = [parent / f".{name}.{secrets.token_hex(4)}{PARTIAL}" for _ in range(2)]
    try:
        for path in tries:
            path.mkdir()
        exchanged(*tries)
    except OSError:
        return False
    finally:
        for path in tries:
            with contextlib.suppress(OSError):
                path.rmdir()
    return True


def _that_stay(folder: Path, old: Sequence[str]) -> list[Path]:
    gone = set(old)
    found = (entry for entry in folder.iterdir() if entry.name not in gone)
    return sorted(entry for entry in found if not entry.name.endswith(PARTIAL))


def _index(plans: Sequence[FilePlan], stay: Sequence[Path]) -> str | None:
    """The index, if one is needed: for several files, or where other files would be taken for the model's."""
    if len(plans) > 1:
        return index_of(plans, {})
    made = {plan.name for plan in plans}
    return (
        index_of(plans, _LOOSE_INDEX) if other_weights(e.name for e in stay if e.name not in made) else None
    )


def _like(old: Path, new: Path) -> None:
    """Give a folder the owner and mode of the one it replaces, as far as that is allowed."""
    found = old.stat()
    with contextlib.suppress(OSError):
        os.chown(new, found.st_uid, found.st_gid)
    new.chmod(found.st_mode & 0o7777)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_files(folder: Path) -> None:
    for entry in folder.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            handle = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        elif entry.is_dir():
            sync_folder(entry)


class _Inside:
    """The commit in a folder that stays where it is: renames within it, each of which leaves it loadable.

    Hugging Face loads ``model.safetensors`` if it is there, else what the index names; vLLM loads what the
    index names, else every safetensors file. New files therefore get names of their own first, the index
    moves to them in one rename, and only then do files take their final names.
    """

    def __init__(self, folder: Path, staged: Path, plans: Sequence[FilePlan], old: Sequence[str]) -> None:
        self._folder = folder
        self._staged = staged
        self._plans = plans
        self._old = old
        self._moved = False
        """Whether the index names the new files."""
        tag = secrets.token_hex(4)
        self._tagged = [
            dataclasses.replace(plan, name=plan.name.replace(".safetensors", f".{tag}.safetensors"))
            for plan in plans
        ]

    def commit(self) -> None:
        """See the class. What fails before the index moved is undone; after that the new files are loaded.

        For the moment of the renames vLLM finds part of the new files where the old save is a ``.bin``
        without an index: no order suits both loaders then.
        """
        single = self._folder / "model.safetensors"
        try:
            if single.exists() and INDEX not in self._old:
                with contextlib.suppress(SourceError):  # a file that nobody can load needs no index
                    self._put_index(index_of([_plan_of(single)], {}))
            for plan, tagged in zip(self._plans, self._tagged, strict=True):
                (self._staged / plan.name).rename(self._folder / tagged.name)
            self._put_index(index_of(self._tagged, {}))
        except BaseException:
            self._undo()
            raise
        if len(self._plans) > 1:
            single.unlink(missing_ok=True)
        self._final_names()
        for entry in sorted(self._staged.iterdir()):
            _moved_over(entry, self._folder / entry.name)
        self._remove_old()

    def _undo(self) -> None:
        if self._moved:
            return
        for tagged in self._tagged:
            (self._folder / tagged.name).unlink(missing_ok=True)
        if INDEX not in self._old:
            (self._folder / INDEX).unlink(missing_ok=True)

    def _remove_old(self) -> None:
        stay = _that_stay(self._folder, self._old)
        tagged = {plan.name for plan in self._tagged}
        index = _index(self._plans, [entry for entry in stay if entry.name not in tagged])
        self._put_index(index or index_of(self._plans, {}))
        made = {plan.name for plan in self._plans} | {INDEX}
        for name in {*self._old, *tagged} - made:
            (self._folder / name).unlink(missing_ok=True)
        if index is None:
            (self._folder / INDEX).unlink(missing_ok=True)
        sync_folder(self._folder)

    def _final_names(self) -> None:
        for plan, tagged in zip(self._plans, self._tagged, strict=True):
            link = self._staged / plan.name
            carry = self._folder / tagged.name
            try:
                os.link(carry, link)
            except OSError:  # no hard links on this file system
                shutil.copyfile(carry, link)
                _sync_files(self._staged)
            link.replace(self._folder / plan.name)
        sync_folder(self._folder)

    def _put_index(self, text: str) -> None:
        sync_folder(self._folder)
        staged = self._staged / INDEX
        _write(staged, text)
        staged.replace(self._folder / INDEX)
        self._moved = any(plan.name in text for plan in self._tagged)
        sync_folder(self._folder)


def _plan_of(file: Path) -> FilePlan:
    """A file of the older save as a plan, for an index that names it."""
    return FilePlan(file.name, tuple(read_header(str(file)).layout.infos))


def _moved_over(entry: Path, target: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(target, ignore_errors=True)
    entry.replace(target)


def failed(target: Path, error: OSError, nbytes: int) -> ExportError:
    """What went wrong while files were written, as an error that names the place and the next step."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"No space is left at {target.parent} for {nbytes:,} bytes of weights"
    else:
        what = f"Writing to {target} failed ({error})"
    return ExportError(
        f"{what}. What was there before is still there, and nothing of the new weights. Choose a place with "
        "room that can be written."
    )
