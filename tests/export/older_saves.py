"""A small save with files beside it, to be replaced by another, and what has to be there afterwards."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reload_plugin.export.outputs import OutputGroup, plan_export
from reload_plugin.export.writer import write_export
from reload_plugin.plan.source import TensorInfo
from tests.export.folders import as_hugging_face_loads, as_vllm_loads, files_of, tensors_of

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


@contextlib.contextmanager
def mounted(folder: Path, options: str = "size=1m") -> Iterator[None]:
    """A file system in memory at a folder, for the block."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
