"""The folder of a save, wherever it is: what it replaces, what stays, and what is refused."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from reload_plugin.checkpoint.io import atomic
from reload_plugin.errors import ExportError
from reload_plugin.export import target
from tests.export.folders import as_vllm_loads, files_of, tensors_of
from tests.export.older_saves import (
    NEW,
    OLD,
    SIZES,
    as_root,
    assert_clean,
    assert_whole,
    is_equal,
    mounted,
    old_save,
    write,
)


@as_root
@pytest.mark.parametrize("new", ["one file", "three files"])
def test_a_mounted_output_in_a_parent_that_is_read_only(work: Path, new: str) -> None:
    with mounted(work / "parent"):
        out = work / "parent" / "out"
        with mounted(out):
            subprocess.run(["mount", "-o", "remount,ro", str(work / "parent")], check=True)
            with pytest.raises(OSError, match="Read-only"):
                (work / "parent" / "x").write_text("")
            for tensors, size in ((OLD, "three files"), (NEW, new), (OLD, new), (NEW, "six files")):
                write(out, tensors, SIZES[size])
                assert is_equal(tensors_of(out), tensors)
                assert is_equal(as_vllm_loads(out), tensors)
            assert len(files_of(out)) == 8
        subprocess.run(["mount", "-o", "remount,rw", str(work / "parent")], check=True)


@as_root
def test_a_folder_that_is_read_only(work: Path) -> None:
    with mounted(work / "disk"):
        out = work / "disk" / "out"
        write(out, OLD, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(work / "disk")], check=True)
        for place in (out, work / "disk" / "other"):
            with pytest.raises(ExportError, match=rf"{place.name} .*cannot be written.*|cannot be written"):
                write(place, NEW, 1)
        assert is_equal(tensors_of(out), OLD)


def test_a_folder_that_its_mode_protects(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a user whom modes bind; root may write anywhere."""
    out = old_save(work, "one file")
    monkeypatch.setattr(target, "_writable", lambda folder: folder != out)
    with pytest.raises(ExportError, match=r"The folder .*out cannot be written. Nothing was written. Choose"):
        write(out, NEW, 1)
    assert_whole(out, OLD)


@pytest.mark.parametrize("link", ["out", "dangling"])
def test_a_symbolic_link_is_followed_and_stays(work: Path, way: str, link: str) -> None:
    real = work / "real"
    if link == "out":
        write(real, OLD, 1)
    (work / "link").symlink_to(real)
    write(work / "link", NEW, 10_000)
    assert (work / "link").is_symlink()
    assert is_equal(tensors_of(real), NEW)
    assert files_of(work) == ["link", "real"]


def test_a_file_in_the_way_is_an_error(work: Path) -> None:
    (work / "out").write_text("mine")
    with pytest.raises(
        ExportError, match=r"out is no folder but a file. Nothing was written. Choose another"
    ):
        write(work / "out", NEW, 1)
    with pytest.raises(ExportError, match=r"out is no folder but a file, so .*below cannot be made"):
        write(work / "out" / "below", NEW, 1)
    assert (work / "out").read_text() == "mine"
    assert files_of(work) == ["out"]


@pytest.mark.parametrize("old", [*SIZES, "pytorch_model.bin"])
@pytest.mark.parametrize("new", SIZES)
def test_an_older_save_goes_and_other_files_stay(work: Path, way: str, old: str, new: str) -> None:
    out = old_save(work, old)
    out.chmod(0o750)
    write(out, NEW, SIZES[new])
    assert_clean(out, NEW)
    assert_whole(out, NEW)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750


def test_files_that_an_index_names_go_with_it(work: Path, way: str) -> None:
    out = old_save(work, "three files")
    index = out / "model.safetensors.index.json"
    (out / "model-00001-of-00003.safetensors").rename(out / "first.safetensors")
    index.write_text(index.read_text().replace("model-00001-of-00003", "first"))
    write(out, NEW, SIZES["one file"])
    assert_clean(out, NEW)


@pytest.mark.parametrize("new", SIZES)
def test_weights_of_something_else_stay_and_are_not_loaded(work: Path, way: str, new: str) -> None:
    """An adapter, say: an index tells vLLM, which would take every safetensors file."""
    out = old_save(work, "one file")
    shutil.copy(out / "model.safetensors", out / "adapter_model.safetensors")
    write(out, NEW, SIZES[new])
    assert (out / "adapter_model.safetensors").exists()
    assert_whole(out, NEW)


def test_files_that_appear_meanwhile_stay(work: Path, way: str) -> None:
    out = old_save(work, "one file")
    write(out, NEW, 1, before_commit=lambda: (out / "late.txt").write_text("late"))
    assert (out / "late.txt").read_text() == "late"
    assert is_equal(tensors_of(out), NEW)


def test_file_modes_follow_the_umask(work: Path, way: str) -> None:
    out = old_save(work, "one file")
    before = os.umask(0o027)
    try:
        write(out, NEW, SIZES["three files"])
        write(work / "new", NEW, 1)
    finally:
        os.umask(before)
    weights = [*out.glob("model*"), *(work / "new").iterdir()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in weights} == {0o640}
    assert stat.S_IMODE((work / "new").stat().st_mode) == 0o750


def test_the_working_directory_stays_where_it_is(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = old_save(work, "three files")
    monkeypatch.chdir(out)
    write(Path(), NEW, SIZES["one file"])
    assert Path.cwd() == out
    assert_clean(out, NEW)


def test_a_file_system_that_cannot_exchange_folders(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = atomic._renamed
    monkeypatch.setattr(atomic, "_renamed", lambda one, two, flags: flags == 1 and plain(one, two, flags))
    out = old_save(work, "three files")
    write(out, NEW, SIZES["three files"])
    assert_clean(out, NEW)


def test_a_file_system_without_hard_links(work: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", none)
    out = old_save(work, "three files")
    write(out, NEW, SIZES["three files"])
    assert_clean(out, NEW)


def test_two_exports_to_one_place_do_not_disturb_one_another(work: Path, way: str) -> None:
    out = old_save(work, "one file")
    write(out, NEW, 1, before_commit=lambda: write(out, OLD, SIZES["three files"]))
    assert_clean(out, NEW)


def test_what_raises_before_the_commit_undoes_all(work: Path, way: str) -> None:
    out = old_save(work, "one file")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(out, NEW, 1, before_commit=stop)
    assert_whole(out, OLD)
    assert files_of(work) == ["out"]
    assert not [name for name in files_of(out) if name.endswith(atomic.PARTIAL)]


def test_a_place_that_appears_meanwhile_is_not_overwritten(work: Path) -> None:
    def appear() -> None:
        (work / "out").mkdir()
        (work / "out" / "theirs").write_text("theirs")

    with pytest.raises(ExportError, match="it was made by somebody else meanwhile"):
        write(work / "out", NEW, 1, before_commit=appear)
    assert files_of(work / "out") == ["theirs"]


def test_temporary_folders_of_others_are_left_alone(work: Path) -> None:
    with tempfile.TemporaryDirectory(dir=work, prefix=".out.", suffix=atomic.PARTIAL) as other:
        write(work / "out", NEW, 1)
        assert Path(other).is_dir()
