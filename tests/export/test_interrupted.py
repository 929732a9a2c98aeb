"""Saves that are killed, or whose calls fail: the folder loads what it held before, or the new weights."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reload_plugin.checkpoint.io import atomic
from reload_plugin.errors import ExportError
from reload_plugin.export import target
from reload_plugin.export.outputs import OutputGroup, plan_export
from reload_plugin.export.writer import write_export
from reload_plugin.plan.source import TensorInfo
from tests.export.folders import as_hugging_face_loads, as_vllm_loads, files_of, tensors_of, vllm_files
from tests.export.older_saves import (
    NEW,
    OLD,
    README,
    SIZES,
    as_root,
    assert_clean,
    assert_whole,
    is_equal,
    mounted,
    old_save,
    write,
)

# -- killed ---------------------------------------------------------------------------------------

CALLS = ("pwrite", "fsync", "link", "rename", "replace", "unlink", "rmdir", "mkdir", "ftruncate")


@contextlib.contextmanager
def interrupted_at(step: int, interrupt: Callable[[], object]) -> Iterator[list[str]]:
    """Call ``interrupt`` before call number ``step`` of those that change files; yields the calls made."""
    made: list[str] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == step + 1:
                interrupt()
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patches:
        for name in CALLS:
            patches.setattr(os, name, counted(name, getattr(os, name)))
        patches.setattr(atomic, "_renamed", counted("renameat2", atomic._renamed))
        yield made


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Run something in a copy of this process that is killed before a call; False where it ended."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            with interrupted_at(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                action()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("one file", "one file"),
        ("one file", "three files"),
        ("three files", "three files"),
        ("six files", "one file"),
    ],
)
def test_killed_at_any_call_the_folder_loads_old_or_new(work: Path, way: str, old: str, new: str) -> None:
    step, kills = 0, 0
    while True:
        out = old_save(work, old)
        if not killed_at(step, functools.partial(write, out, NEW, SIZES[new])):
            break
        kills += 1
        assert_whole(out, OLD, NEW)
        if step % 5 == 0:
            write(out, NEW, SIZES[new])
            assert_clean(out, NEW)
        for entry in work.iterdir():
            shutil.rmtree(entry)
        step += 1
    assert_clean(out, NEW)
    assert kills > 20


def test_killed_at_any_call_there_is_no_folder_or_a_whole_one(work: Path) -> None:
    step = 0
    while killed_at(step, lambda: write(work / "out", NEW, 1)):
        assert not (work / "out").exists() or is_equal(tensors_of(work / "out"), NEW)
        shutil.rmtree(work / "out", ignore_errors=True)
        step += 1
    assert is_equal(tensors_of(work / "out"), NEW)
    assert files_of(work) == ["out"]  # what the killed ones left is gone
    assert step > 20


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("indexed", [True, False])
def test_what_vllm_reads_is_what_these_tests_take_it_to_read(work: Path, size: str, indexed: bool) -> None:
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    out = old_save(work, size)
    shutil.copy(next(out.glob("*.safetensors")), out / "other.safetensors")
    if not indexed:
        (out / target.INDEX).unlink(missing_ok=True)
    files = sorted(map(str, out.glob("*.safetensors")))
    kept = filter_duplicate_safetensors_files(files, str(out), target.INDEX)
    assert [Path(file) for file in kept] == vllm_files(out)


# -- writing fails --------------------------------------------------------------------------------


@pytest.mark.parametrize("old", ["one file", "three files", "pytorch_model.bin"])
def test_a_call_that_fails_changes_nothing(work: Path, way: str, old: str) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    step = 0
    out = old_save(work, old)
    before = files_of(out)
    while True:
        with interrupted_at(step, fail) as made:
            try:
                write(out, NEW, SIZES["three files"])
            except ExportError as error:
                says = str(error)
            else:
                says = ""
        if len(made) <= step:
            break
        assert_whole(out, OLD, NEW)
        assert files_of(work) == ["out"] or says == ""
        if is_equal(as_hugging_face_loads(out), OLD) and is_equal(as_vllm_loads(out), OLD):
            assert "No space is left" in says or "It loads" in says
            if "No space" in says:
                assert files_of(out) == before
        else:  # the new weights were in place already
            assert says == "" or "It loads" in says
            shutil.rmtree(out)
            old_save(work, old)
        step += 1
    assert_clean(out, NEW)


@as_root
@pytest.mark.parametrize("spare", [0, 4, 16, 64])
def test_a_disk_that_is_full_at_any_point(work: Path, spare: int) -> None:
    """A small file system in memory, with room for some of the new files."""
    large = {name: torch.randn(64, 64) for name in OLD}  # six files of 16 KiB, and as much again
    with mounted(work / "disk", "size=400k"):
        out = work / "disk" / "out"
        write(out, large, 1)
        (out / "README.md").write_text(README)
        before = {file: (out / file).read_bytes() for file in files_of(out)}
        free = os.statvfs(out).f_bavail * os.statvfs(out).f_frsize
        (work / "disk" / "filler").write_bytes(bytes(max(0, free - spare * 1024)))
        with pytest.raises(ExportError, match=r"No space is left at .*disk for 98,304 bytes of weights"):
            write(out, {name: tensor + 1 for name, tensor in large.items()}, 1)
        assert {file: (out / file).read_bytes() for file in files_of(out)} == before
        assert files_of(work / "disk") == ["filler", "out"]
        (work / "disk" / "filler").unlink()
        write(out, {name: tensor + 1 for name, tensor in large.items()}, 1)
        assert is_equal(tensors_of(out), {name: tensor + 1 for name, tensor in large.items()})


def test_a_full_disk_shows_before_anything_is_made(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = []
    monkeypatch.setattr("reload_plugin.export.planned_files._reserve", full)
    info = TensorInfo("w", (2,), torch.float32)
    plan = plan_export([OutputGroup((info,), lambda: made.append(1) or {"w": torch.zeros(2)})], None)
    with pytest.raises(ExportError, match="No space is left"):
        write_export(work / "out", plan)
    assert not made
    assert files_of(work) == []
