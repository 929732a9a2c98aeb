"""Saves over the files that a model is offloaded to, and files that change while they are read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.offload import OffloadCache

from reload_plugin.checkpoint.formats import weight_reader
from reload_plugin.errors import ExportError
from reload_plugin.export.offloaded import save_offloaded
from tests.export.folders import files_of, tensors_of
from tests.export.placements import PLACEMENTS
from tests.export.small_models import FAMILIES
from tests.offloaded_saves import make_original, quiet, scratch_folder, why_wrong

IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    quiet()
    with scratch_folder() as folder:
        yield Path(folder)


@pytest.fixture
def place(work: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        yield Path(folder)


def made(name: str, folder: Path) -> dict[str, torch.Tensor]:
    return make_original(next(family for family in FAMILIES if family.name == name), folder)


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("sizes", [(1, 1), (1, 1 << 30), (1 << 30, 4000), (4000, 4000)])
@pytest.mark.parametrize("name", ["mixtral", "llama, tied"])
def test_a_save_over_the_folder_that_the_model_is_offloaded_from(
    place: Path, name: str, sizes: tuple[int, int]
) -> None:
    """Its files go, and the model reads the new ones from then on, at each save."""
    original = made(name, place / "model")
    first = PLACEMENTS["in memory"](place / "model", place)
    save_offloaded(first, place / "model", max_shard_size=sizes[0])
    model = PLACEMENTS["full disk"](place / "model", place / "scratch")
    before = answers(model)
    for size in (sizes[1], 2000, sizes[0]):
        report = save_offloaded(model, place / "model", max_shard_size=size)
        assert report.replaced
        assert why_wrong(place / "model", original) is None
        assert torch.equal(answers(model), before)
    save_offloaded(model, place / "other")
    assert why_wrong(place / "other", original) is None


def test_a_save_into_the_folder_of_offloaded_weights(place: Path) -> None:
    """Weights that transformers converted lie there, one a file; they stay, and no loader takes them."""
    original = made("mixtral", place / "model")
    model = PLACEMENTS["full disk"](place / "model", place / "out")
    before, there = answers(model), files_of(place / "out")
    save_offloaded(model, place / "out")
    assert set(there) <= set(files_of(place / "out"))
    assert torch.equal(answers(model), before)
    again = PLACEMENTS["in memory"](place / "out", place)
    assert torch.equal(answers(again), before)
    assert "model.safetensors.index.json" in files_of(place / "out")
    save_offloaded(again, place / "clean")
    assert why_wrong(place / "clean", original) is None


def test_files_that_the_model_needs_and_that_would_go_are_named(place: Path) -> None:
    """The folder holds transformers' own format; the checkpoint's could not take its place for the model."""
    made("mixtral", place / "model")
    own = PLACEMENTS["in memory"](place / "model", place)
    save_offloaded(own, place / "own", save_original_format=False)
    model = PLACEMENTS["full disk"](place / "own", place / "scratch")
    before = answers(model)
    with pytest.raises(
        ExportError, match=r"would no longer be in .*own, where the model reads them"
    ) as raised:
        save_offloaded(model, place / "own")
    assert "model.layers.0.mlp.experts.gate_up_proj" in raised.value.tensors
    save_offloaded(model, place / "own", save_original_format=False, max_shard_size=4000)
    assert torch.equal(answers(model), before)


def meanwhile(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], object]) -> None:
    """Do something before weight number ``at`` is read."""
    plain = weight_reader.WeightReader.fetch
    read = []

    def fetch(self: Any, name: str) -> torch.Tensor:
        read.append(name)
        if len(read) == at:
            action()
        return plain(self, name)

    monkeypatch.setattr(weight_reader.WeightReader, "fetch", fetch)


def sources(place: Path) -> list[Path]:
    return [*(place / "model").glob("*.safetensors"), *(place / "scratch").glob("*.*")]


@pytest.fixture(params=["full disk", "disk_offload()", "compressed-tensors, disk"])
def offloaded(request: pytest.FixtureRequest, place: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model on disk, its weights, and an older save at ``out``."""
    original = made("mixtral", place / "model")
    (place / "out").mkdir()
    (place / "out" / "model.safetensors").write_text("older")
    return PLACEMENTS[request.param](place / "model", place / "scratch"), original


@pytest.mark.parametrize("at", [1, 4, 12])
def test_files_deleted_meanwhile_are_read_to_their_end(
    offloaded: tuple[Any, dict[str, torch.Tensor]], place: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    model, original = offloaded
    meanwhile(monkeypatch, at, lambda: [file.unlink() for file in sources(place)])
    save_offloaded(model, place / "out", max_shard_size=2000)
    assert why_wrong(place / "out", original) is None


@pytest.mark.parametrize("at", [1, 4, 12])
@pytest.mark.parametrize("change", ["cut", "written"])
def test_files_that_are_cut_or_written_meanwhile_are_named(
    offloaded: tuple[Any, dict[str, torch.Tensor]],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    change: str,
) -> None:
    """Plain reads: of a mapped file the process would die."""
    model, _ = offloaded

    def damage() -> None:
        for file in sources(place):
            if change == "cut":
                os.truncate(file, file.stat().st_size // 2)
            else:
                file.write_bytes(bytes(file.stat().st_size))
                os.utime(file, ns=(1, 1))

    meanwhile(monkeypatch, at, damage)
    with pytest.raises(ExportError, match=r"(model|scratch)/.*(ends in the middle of|changed)"):
        save_offloaded(model, place / "out", max_shard_size=2000)
    assert files_of(place / "out") == ["model.safetensors"]
    assert (place / "out" / "model.safetensors").read_text() == "older"
    assert not [name for name in files_of(place) if name.endswith(".partial")]


def test_files_that_are_gone_before_are_named(
    offloaded: tuple[Any, dict[str, torch.Tensor]], place: Path
) -> None:
    model, _ = offloaded
    for file in sources(place):
        file.unlink()
    with pytest.raises(ExportError, match=r"(model|scratch)/"):
        save_offloaded(model, place / "out")
    assert files_of(place / "out") == ["model.safetensors"]
    assert not OffloadCache.onloading_disabled, "other models of the process compute with meta tensors"


def test_more_files_than_may_be_open(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = made("mixtral", place / "model")
    model = PLACEMENTS["disk_offload()"](place / "model", place / "scratch")
    monkeypatch.setattr(weight_reader, "open_file_limit", lambda: 16)
    save_offloaded(model, place / "out", max_shard_size=1)
    assert why_wrong(place / "out", original) is None
    assert tensors_of(place / "out").keys() == original.keys()
