"""The folder of a save appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reload_plugin.checkpoint.io import atomic
from reload_plugin.errors import ExportError
from reload_plugin.export import replacement, target
from reload_plugin.export.outputs import OutputGroup, plan_export
from reload_plugin.export.writer import write_export
from reload_plugin.plan.source import TensorInfo
from tests.export.folders import as_hugging_face_loads, as_vllm_loads, files_of, tensors_of, vllm_files
from tests.offloaded_saves import scratch_folder

OLD = {f"model.layers.{i}.weight": torch.full((4, 5), float(i)) for i in range(6)}
NEW = {name: tensor + 100 for name, tensor in OLD.items()}
SIZES = {"one file": 10_000, "three files": 160, "six files": 1}
README = "what this model is"
as_root = pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounts")


def write(folder: Path, tensors: dict[str, torch.Tensor], size: int, **options: Any) -> None:
    """One group of one tensor each, and a config."""
    groups = [
        OutputGroup((TensorInfo(name, tuple(t.shape), t.dtype),), lambda n=name, t=t: {n: t})
        for name, t in tensors.items()
    ]
    options.setdefault("beside", lambda new: (new / "config.json").write_text("{}"))
    write_export(folder, plan_export(groups, size), **options)


def is_equal(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)


@pytest.fixture
def work() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield Path(folder)


@pytest.fixture(params=["exchanged", "inside"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the folder is replaced: in one step, or file by file where it cannot be exchanged."""
    if request.param == "inside":
        monkeypatch.setattr(target, "_is_mounted", lambda _: True)
    return str(request.param)


def old_save(work: Path, size: str) -> Path:
    out = work / "out"
    if size == "pytorch_model.bin":
        out.mkdir()
        torch.save(OLD, out / "pytorch_model.bin")
    else:
        write(out, OLD, SIZES[size])
    (out / "README.md").write_text(README)
    (out / "sub").mkdir()
    (out / "sub" / "notes.txt").write_text(README)
    return out


def assert_whole(out: Path, *allowed: dict[str, torch.Tensor]) -> None:
    """Both loaders get one of the allowed sets of weights, and what is no weight is still there."""
    for load in (as_hugging_face_loads, as_vllm_loads):
        found = load(out)
        assert any(is_equal(found, right) for right in allowed), f"{load.__name__}: {files_of(out)}"
    assert (out / "README.md").read_text() == README
    assert (out / "sub" / "notes.txt").read_text() == README


def assert_clean(out: Path, right: dict[str, torch.Tensor]) -> None:
    """The new save, nothing of the old, nothing left behind."""
    assert is_equal(tensors_of(out), right)
    rest = {name for name in files_of(out) if not name.startswith("model")}
    assert rest == {"README.md", "config.json", "sub"}
    assert files_of(out.parent) == ["out"]


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


# -- places ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, options: str = "size=1m") -> Iterator[None]:
    """A file system in memory at a folder, for the block."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


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
    assert replacement.TAG
