"""What becomes of a folder when a save meets an accident: this package's save and transformers' own.

``python -m tests.offloaded_saves --table`` makes the table. A cell is how often both loaders then
found the old weights or the new / tried.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.export.folders import as_hugging_face_loads, as_vllm_loads, tensors_of
from tests.export.placements import PLACEMENTS

Save = Callable[[Any, Path, int], object]
KB = 1000


def _is_one_of(folder: Path, *allowed: dict[str, torch.Tensor]) -> bool:
    """Whether both loaders find one of these sets of weights."""
    for load in (as_hugging_face_loads, as_vllm_loads):
        try:
            found = load(folder)
        except Exception:  # noqa: BLE001 - it does not load
            return False
        if not any(
            found.keys() == right.keys() and all(torch.equal(found[n], right[n]) for n in right)
            for right in allowed
        ):
            return False
    return True


def _old_and_model(folder: Path) -> tuple[Path, dict[str, torch.Tensor], Any]:
    """An older save in files of 4 KB, its weights, and a model on disk with others."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    model = PLACEMENTS["in memory"](folder / "original", folder)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.neg_()
    model.save_pretrained(out, max_shard_size=4 * KB)
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    return out, tensors_of(out), PLACEMENTS["full disk"](folder / "original", scratch)


def into_an_older_save(save: Save, folder: Path, original: dict[str, torch.Tensor]) -> list[bool]:
    """One file, several files and one file again, into one folder."""
    model = PLACEMENTS["in memory"](folder / "original", folder)
    outcomes = []
    for size in (KB * KB, 4 * KB, KB * KB, 4 * KB):
        save(model, folder / "out", size)
        outcomes.append(_is_one_of(folder / "out", original))
    return outcomes


def over_its_own_files(save: Save, folder: Path, original: dict[str, torch.Tensor]) -> list[bool]:
    """Into the folder that the model is offloaded from, in other files."""
    outcomes = []
    for size in (1, 2 * KB, KB * KB):
        own = folder / "own"
        shutil.rmtree(own, ignore_errors=True)
        PLACEMENTS["in memory"](folder / "original", folder).save_pretrained(own, max_shard_size=4 * KB)
        model = PLACEMENTS["full disk"](own, folder / "scratch")
        with contextlib.suppress(Exception):
            save(model, own, size)
        outcomes.append(_is_one_of(own, original))
    return outcomes


def with_a_file_in_the_way(save: Save, folder: Path, original: dict[str, torch.Tensor]) -> list[bool]:
    """A file has the name of the folder: an error has to say so."""
    del original
    (folder / "out").write_text("mine")
    model = PLACEMENTS["full disk"](folder / "original", folder / "scratch")
    try:
        save(model, folder / "out", KB)
    except Exception:  # noqa: BLE001 - any error says that nothing was saved
        return [(folder / "out").read_text() == "mine"]
    return [False]


def killed(save: Save, folder: Path, original: dict[str, torch.Tensor]) -> list[bool]:
    """Kill -9 before each call that changes a file of the target, or writes one."""
    outcomes = []
    for step in range(400):
        out, old, model = _old_and_model(folder)
        child = os.fork()
        if child == 0:
            _die_at(step)
            with contextlib.suppress(BaseException):
                save(model, out, 2 * KB)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return outcomes
        outcomes.append(_is_one_of(out, old, original))
    return outcomes


def _die_at(step: int) -> None:
    """From now on kill this process before call number ``step`` of those that change files."""
    import transformers.modeling_utils

    calls = [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("pwrite", "fsync", "link", "rename", "replace", "unlink", "remove", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    owner = transformers.modeling_utils
    owner.safe_save_file = counted(owner.safe_save_file)  # one call a file; it writes outside of Python


def mode_of_files(save: Save, folder: Path, original: dict[str, torch.Tensor]) -> list[bool]:
    """Weights are readable by others under umask 022."""
    del original
    before = os.umask(0o022)
    try:
        save(PLACEMENTS["in memory"](folder / "original", folder), folder / "out", 4 * KB)
    finally:
        os.umask(before)
    files = sorted((folder / "out").glob("*.safetensors"))
    return [stat.S_IMODE(file.stat().st_mode) == 0o644 for file in files]


ACCIDENTS: dict[str, Callable[[Save, Path, dict[str, torch.Tensor]], list[bool]]] = {
    "one file, then several, into one folder, and again": into_an_older_save,
    "over the folder that the model is offloaded from": over_its_own_files,
    "a file in the way": with_a_file_in_the_way,
    "kill -9 at each call that writes": killed,
    "files have the mode of the umask": mode_of_files,
}
