"""A rank reads its own part of a checkpoint's tensors: ranges, runs with gaps between them, or nothing."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reload_plugin.checkpoint import DirectRead, TensorInfo
from reload_plugin.checkpoint.formats.safetensors_files import SafetensorsSource
from reload_plugin.checkpoint.io import read_batches, readahead
from reload_plugin.errors import SourceError
from reload_plugin.plan.source import Region

ORDER = ("rows", "columns", "other", "norm")
ROWS, COLUMNS = 40, 32
HALF, LINE = COLUMNS // 2 * 4, COLUMNS * 4
REGIONS = {
    "rows": (Region("both", ROWS // 2 * LINE, 0, ROWS // 2 * LINE),),
    "columns": (Region("both", HALF, ROWS // 2 * LINE, HALF, ROWS, LINE, HALF),),
    "other": (),
    "norm": (Region("norm", 0, 0, COLUMNS * 4),),
}
READ = ROWS // 2 * LINE + ROWS * HALF + COLUMNS * 4


class SecondHalf:
    """Memory of the second of two ranks, read into directly, or from tensors that are handed over."""

    def __init__(self, direct: bool) -> None:
        self.key = self if direct else None
        self.both, self.norm = torch.zeros(ROWS * COLUMNS), torch.zeros(COLUMNS)
        self.read = 0

    def targets(self, infos: Sequence[TensorInfo]) -> list[tuple[Region, ...]]:
        return [REGIONS[info.name] for info in infos]

    def needed(self, info: TensorInfo) -> tuple[Region, ...] | None:
        return None if info.name == "norm" else REGIONS[info.name]

    def note_read(self, nbytes: int) -> None:
        self.read += nbytes

    def memory(self, parameter: str) -> torch.UntypedStorage:
        return getattr(self, parameter).untyped_storage()

    def __call__(self, info: TensorInfo) -> torch.Tensor:
        """Memory for a whole tensor, with something else in it."""
        return torch.full(info.shape, -1.0)


def save(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.randn(ROWS, COLUMNS) for name in ORDER[:3]} | {"norm": torch.randn(COLUMNS)}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def source_of(folder: Path) -> SafetensorsSource:
    return SafetensorsSource([str(folder / "model.safetensors")], str(folder))


@pytest.fixture(params=[1 << 20, 100], ids=["in one", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (read_batches, readahead):
        monkeypatch.setattr(module, "SHARED", request.param)
    monkeypatch.setattr(readahead, "WORTH_SHARING", 1)


@pytest.fixture(params=[0, 4], ids=["no reader", "readers"])
def readers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "reader_thread_count", lambda: request.param)


@pytest.mark.usefixtures("pieces", "readers")
def test_parts_are_read_to_where_they_go(tmp_path: Path) -> None:
    tensors, rank = save(tmp_path), SecondHalf(direct=True)
    (found,) = source_of(tmp_path).read(ORDER, destinations=rank)
    assert isinstance(found, DirectRead)
    assert list(found.names) == list(ORDER)
    assert found.parameters == {"both": ["rows", "columns"], "norm": ["norm"]}
    rows, columns = rank.both[: ROWS // 2 * COLUMNS], rank.both[ROWS // 2 * COLUMNS :]
    assert torch.equal(rows.view(-1, COLUMNS), tensors["rows"][ROWS // 2 :])
    assert torch.equal(columns.view(ROWS, -1), tensors["columns"][:, COLUMNS // 2 :])
    assert torch.equal(rank.norm, tensors["norm"])
    assert rank.read == READ


@pytest.mark.usefixtures("pieces", "readers")
def test_tensors_that_are_handed_over_hold_what_is_looked_at_and_no_more(tmp_path: Path) -> None:
    tensors, rank = save(tmp_path), SecondHalf(direct=False)
    found = dict(source_of(tmp_path).read(ORDER, destinations=rank))
    assert list(found) == list(ORDER)
    assert torch.equal(found["rows"][ROWS // 2 :], tensors["rows"][ROWS // 2 :])
    assert (found["rows"][: ROWS // 2] == -1).all()
    assert torch.equal(found["columns"][:, COLUMNS // 2 :], tensors["columns"][:, COLUMNS // 2 :])
    assert (found["columns"][:, : COLUMNS // 2] == -1).all()
    assert (found["other"] == -1).all()
    assert torch.equal(found["norm"], tensors["norm"])
    assert rank.read == READ


def test_memory_that_is_too_small_for_runs_is_not_written_past(tmp_path: Path) -> None:
    save(tmp_path)
    rank = SecondHalf(direct=True)
    rank.both = rank.both[:-1].clone()
    with pytest.raises(IndexError, match=r"longer than its place in .*both"):
        list(source_of(tmp_path).read(ORDER, destinations=rank))


@pytest.mark.usefixtures("readers")
@pytest.mark.parametrize("direct", [True, False], ids=["to where they go", "to tensors"])
def test_runs_go_on_after_a_short_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    tensors, rank, preadv = save(tmp_path), SecondHalf(direct), os.preadv

    def short(handle: int, memory: Sequence[memoryview], *where: int) -> int:
        return preadv(handle, [memory[0][: max(1, len(memory[0]) // 3)]], *where)

    monkeypatch.setattr(os, "preadv", short)
    found = list(source_of(tmp_path).read(ORDER, destinations=rank))
    columns = rank.both[ROWS // 2 * COLUMNS :].view(ROWS, -1) if direct else found[1][1][:, COLUMNS // 2 :]
    assert torch.equal(columns, tensors["columns"][:, COLUMNS // 2 :])


def cut_off(file: Path) -> Callable[..., int]:
    """``os.preadv`` of a file that ends in the middle of its columns, which lie before all else."""
    preadv, end = os.preadv, file.stat().st_size - (3 * ROWS - 4) * LINE

    def read(handle: int, memory: Sequence[memoryview], position: int, flags: int = 0) -> int:
        return 0 if position >= end else preadv(handle, memory, position, flags)

    return read


@pytest.mark.parametrize("direct", [True, False], ids=["to where they go", "to tensors"])
def test_a_file_that_ends_within_a_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    save(tmp_path)
    monkeypatch.setattr(os, "preadv", cut_off(tmp_path / "model.safetensors"))
    with pytest.raises(SourceError, match=r"model\.safetensors ends in the middle of columns"):
        list(source_of(tmp_path).read(ORDER, destinations=SecondHalf(direct)))
