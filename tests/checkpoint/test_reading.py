"""Reading straight to where tensors go: one plan of it for every save of the same layout."""

import errno
import itertools
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from reload_plugin.checkpoint import DirectRead, TensorInfo
from reload_plugin.checkpoint.formats.safetensors_files import SafetensorsSource
from reload_plugin.checkpoint.io import read_batches, readahead, vectored
from reload_plugin.checkpoint.io import reading as reading_module
from reload_plugin.checkpoint.io.locations import ContiguousLocation
from reload_plugin.errors import SourceError
from reload_plugin.load.completeness import Completeness
from reload_plugin.plan.arrivals import Loaded
from reload_plugin.plan.copy_plan import CopyPlan
from reload_plugin.plan.known_checkpoint import KnownCheckpoint
from reload_plugin.plan.mismatches import Mismatches
from reload_plugin.plan.source import Region

EXPERTS = 5
ORDER = (*(f"experts.{n}.{part}" for n in range(EXPERTS) for part in ("gate", "up", "down")), "norm", "empty")


class StackedDestinations:
    """Memory as a layer of experts has it: gate and up of an expert one behind the other, down elsewhere."""

    def __init__(self) -> None:
        self.key = self
        self.asked = 0
        self.stacked = torch.zeros(EXPERTS, 2, 4, 8, dtype=torch.bfloat16)
        self.down = torch.zeros(EXPERTS, 8, 4, dtype=torch.bfloat16)
        self.norm = torch.zeros(8, dtype=torch.float32)

    def targets(self, infos: list[TensorInfo]) -> list[list[Region]] | None:
        self.asked += 1
        return [
            [Region(self._target(info.name)[0], 0, self._target(info.name)[1], info.nbytes)] for info in infos
        ]

    def needed(self, info: TensorInfo) -> None:
        return None

    def note_read(self, nbytes: int) -> None:
        self.read = getattr(self, "read", 0) + nbytes

    def _target(self, name: str) -> tuple[str, int]:
        if not name.startswith("experts"):
            return "norm", 0
        _, number, part = name.split(".")
        row = int(number) * 64 * 2
        return {"gate": ("stacked", row), "up": ("stacked", row + 64), "down": ("down", row // 2)}[part]

    def memory(self, parameter: str) -> torch.UntypedStorage:
        return getattr(self, parameter).untyped_storage()

    def __call__(self, info: TensorInfo) -> torch.Tensor | None:
        return None

    def holds(self, tensors: dict[str, torch.Tensor]) -> None:
        for n in range(EXPERTS):
            assert torch.equal(self.stacked[n, 0], tensors[f"experts.{n}.gate"])
            assert torch.equal(self.stacked[n, 1], tensors[f"experts.{n}.up"])
            assert torch.equal(self.down[n], tensors[f"experts.{n}.down"])
        assert torch.equal(self.norm, tensors["norm"])


def save(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint in two files."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (4, 8), "up": (4, 8), "down": (8, 4)}
    tensors = {
        name: torch.randn(shapes[name.rsplit(".", 1)[1]], generator=generator).to(torch.bfloat16)
        for name in ORDER
        if name.startswith("experts")
    }
    tensors |= {"norm": torch.randn(8, generator=generator), "empty": torch.empty(0, dtype=torch.float32)}
    folder.mkdir()
    names = list(tensors)
    for number, part in enumerate((names[:7], names[7:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
    return tensors


def save_and_read(folder: Path, seed: int, destinations: StackedDestinations) -> dict[str, torch.Tensor]:
    tensors = save(folder, seed)
    assert all(
        isinstance(direct_read, DirectRead)
        for direct_read in source_of(folder).read(ORDER, destinations=destinations)
    )
    return tensors


def source_of(folder: Path) -> SafetensorsSource:
    return SafetensorsSource([str(file) for file in sorted(folder.iterdir())], str(folder))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_batches, "BATCH", 300)


def test_direct_reads_fill_their_parameters_and_are_accounted_for(tmp_path: Path) -> None:
    tensors = save(tmp_path / "1", seed=1)
    destinations = StackedDestinations()
    found = list(source_of(tmp_path / "1").read(ORDER, destinations=destinations))
    assert all(isinstance(direct_read, DirectRead) for direct_read in found)
    destinations.holds(tensors)
    assert [name for direct_read in found for name in direct_read.names] == list(ORDER)
    assert sum(direct_read.nbytes for direct_read in found) == sum(
        tensor.nbytes for tensor in tensors.values()
    )
    assert {name: shape for direct_read in found for name, shape in direct_read.shapes.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_the_next_save_is_read_by_the_same_plan_and_has_its_own_values(tmp_path: Path) -> None:
    destinations = StackedDestinations()
    destinations.holds(save_and_read(tmp_path / "1", 1, destinations))
    asked = destinations.asked
    assert asked, "nothing was planned for this room"
    tensors = save_and_read(tmp_path / "2", 2, destinations)
    destinations.holds(tensors)
    assert destinations.asked == asked, "the second save was planned again"
    other = StackedDestinations()
    list(source_of(tmp_path / "2").read(ORDER, destinations=other))
    assert other.asked == asked, "another room has other places"
    other.holds(tensors)


def test_other_shapes_under_the_same_names_are_planned_anew(tmp_path: Path) -> None:
    save(tmp_path / "1", seed=1)
    list(source_of(tmp_path / "1").read(ORDER, destinations=StackedDestinations()))
    changed = save(tmp_path / "2", seed=2) | {"norm": torch.arange(4.0)}
    for file in (tmp_path / "2").iterdir():
        file.unlink()
    save_file(changed, tmp_path / "2" / "model-0.safetensors")
    destinations = StackedDestinations()
    list(source_of(tmp_path / "2").read(ORDER, destinations=destinations))
    assert destinations.norm.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    assert torch.equal(destinations.down[4], changed["experts.4.down"])


def test_a_cut_file_and_its_tensor_are_named(tmp_path: Path) -> None:
    save(tmp_path / "1", seed=1)
    list(source_of(tmp_path / "1").read(ORDER, destinations=StackedDestinations()))
    save(tmp_path / "2", seed=2)
    source, second = source_of(tmp_path / "2"), tmp_path / "2" / "model-1.safetensors"
    last = max(
        (place for place in source.locations if place.file == second.name), key=lambda place: place.start
    )
    reading = source.read(ORDER, destinations=StackedDestinations())
    next(reading)
    os.truncate(second, second.stat().st_size - 4)
    with pytest.raises(
        SourceError, match=rf"{second} ends in the middle of {last.info.name}: it was cut while"
    ):
        list(reading)


@pytest.mark.parametrize("direct", [True, False], ids=["to where they go", "to tensors"])
def test_reads_that_stop_early_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    preadv, lengths = vectored.preadv, itertools.cycle([1, 7, 50])

    def some(handle: int, parts: vectored.IoVec, start: int, flags: int = 0) -> int:
        (address, nbytes), *_ = parts.tolist()
        return preadv(handle, vectored.iovec_of([address], [min(next(lengths), nbytes)]), start, flags)

    tensors, destinations = save(tmp_path / "1", seed=1), StackedDestinations()
    monkeypatch.setattr(vectored, "preadv", some)
    found = list(source_of(tmp_path / "1").read(ORDER, destinations=destinations if direct else None))
    if direct:
        destinations.holds(tensors)
    else:
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found)


class ReversedDestinations(StackedDestinations):
    """One memory for all: the last tensor first, and a gap of four bytes before each."""

    def __init__(self, infos: list[TensorInfo]) -> None:
        super().__init__()
        self.starts, end = {}, 0
        for info in reversed(infos):
            self.starts[info.name] = end + 4
            end += 4 + info.nbytes
        self.all = torch.zeros(end, dtype=torch.uint8)

    def _target(self, name: str) -> tuple[str, int]:
        return "all", self.starts[name]


def test_contiguous_tensors_of_a_file_go_to_separate_places_in_memory(tmp_path: Path) -> None:
    tensors = save(tmp_path / "1", seed=1)
    source = source_of(tmp_path / "1")
    destinations = ReversedDestinations(
        [next(info for info in source.infos() if info.name == name) for name in ORDER]
    )
    list(source.read(ORDER, destinations=destinations))
    for name, tensor in tensors.items():
        found = destinations.all[destinations.starts[name] :][: tensor.nbytes]
        assert torch.equal(found, tensor.view(torch.uint8).reshape(-1)), name
    written = sum(tensor.nbytes for tensor in tensors.values())
    assert destinations.all.numel() == written + 4 * len(tensors)
    gaps = [destinations.all[start - 4 : start] for start in destinations.starts.values()]
    assert not torch.cat(gaps).any()


@pytest.mark.parametrize("direct", [True, False], ids=["to where they go", "to tensors"])
def test_large_requests_are_read_in_pieces_by_openmp_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    preadv, reads = vectored.preadv, []

    def noting(handle: int, parts: vectored.IoVec, start: int, flags: int = 0) -> int:
        reads.append(sum(nbytes for _, nbytes in parts.tolist()))
        return preadv(handle, parts, start, flags)

    monkeypatch.setattr(read_batches, "SHARED", 50)
    monkeypatch.setattr(readahead, "SHARED", 50)
    monkeypatch.setattr(readahead, "WORTH_SHARING", 1)
    tensors, destinations = save(tmp_path / "1", seed=1), StackedDestinations()
    monkeypatch.setattr(vectored, "preadv", noting)
    found = list(source_of(tmp_path / "1").read(ORDER, destinations=destinations if direct else None))
    if direct:
        destinations.holds(tensors)
    else:
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found)
    assert sum(reads) == sum(tensor.nbytes for tensor in tensors.values())
    assert max(reads) == 50


def test_memory_that_is_too_small_is_not_written_past(tmp_path: Path) -> None:
    save(tmp_path / "1", seed=1)
    destinations = StackedDestinations()
    destinations.norm = torch.zeros(8)[:4].clone()
    with pytest.raises(IndexError, match=r"longer than its place in .*norm"):
        list(source_of(tmp_path / "1").read(ORDER, destinations=destinations))


# --- several readers, and a disk that is told what comes ---


@pytest.fixture
def spare_cores(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Enough cores for every reader; the names of those that read."""
    readers: list[str] = []
    preadv = vectored.preadv

    def noting(handle: int, parts: vectored.IoVec, start: int, flags: int = 0) -> int:
        readers.append(threading.current_thread().name)
        time.sleep(0.001)  # so that no reader does all the work before the others have begun
        return preadv(handle, parts, start, flags)

    monkeypatch.setattr(readahead, "_cores", lambda: torch.get_num_threads() + 8)
    monkeypatch.setattr(vectored, "preadv", noting)
    return readers


@pytest.mark.parametrize("direct", [True, False], ids=["to where they go", "to tensors"])
def test_several_reader_threads_read_what_one_does(
    tmp_path: Path, spare_cores: list[str], direct: bool
) -> None:
    tensors, destinations = save(tmp_path / "1", seed=1), StackedDestinations()
    found = list(source_of(tmp_path / "1").read(ORDER, destinations=destinations if direct else None))
    assert len(set(spare_cores)) == readahead.READERS
    assert threading.main_thread().name not in spare_cores
    if direct:
        destinations.holds(tensors)
    else:
        assert [name for name, _ in found] == list(ORDER)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found)
    assert not [thread for thread in threading.enumerate() if "reader" in thread.name]


def test_batches_of_reader_threads_are_half_as_large_as_those_of_openmp_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = [
        ContiguousLocation(TensorInfo(str(n), (25,), torch.float32), "file", 100 * n, 100) for n in range(6)
    ]
    monkeypatch.setattr(readahead, "_cores", torch.get_num_threads)
    assert [len(batch.locations) for batch in read_batches.read_batches_of(places)] == [3, 3]
    monkeypatch.setattr(readahead, "_cores", lambda: torch.get_num_threads() + 8)
    assert [len(batch.locations) for batch in read_batches.read_batches_of(places)] == [2, 2, 2]


def test_an_error_in_one_reader_thread_is_raised_and_all_threads_end(
    tmp_path: Path, spare_cores: list[str]
) -> None:
    save(tmp_path / "1", seed=1)
    source = source_of(tmp_path / "1")
    reading = source.read(ORDER)
    next(reading)
    assert len([thread for thread in threading.enumerate() if "reader" in thread.name]) == readahead.READERS
    for file in (tmp_path / "1").iterdir():
        os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(SourceError, match=r"ends in the middle|changed"):
        list(reading)
    assert not [thread for thread in threading.enumerate() if "reader" in thread.name]


class Storage:
    """Files as ``preadv`` sees them, in the page cache or not, and what the system is told of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cached: bool, refusal: int = errno.EAGAIN) -> None:
        self.told: set[tuple[int, int]] = set()
        self.reads: list[tuple[bool, int]] = []
        """Of each read: whether all of it had been told, and how many bytes had been by then."""
        self.tries = 0
        self._preadv, self._cached, self._refusal = vectored.preadv, cached, refusal
        monkeypatch.setattr(os, "posix_fadvise", self._tell)
        monkeypatch.setattr(vectored, "preadv", self._read)
        monkeypatch.setattr(reading_module, "ANNOUNCED", 500)

    def _tell(self, handle: int, start: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        self.told.update((handle, byte) for byte in range(start, start + nbytes))

    def _read(self, handle: int, parts: vectored.IoVec, start: int, flags: int = 0) -> int:
        self.tries += flags == os.RWF_NOWAIT
        if flags and not self._cached:
            raise OSError(self._refusal, os.strerror(self._refusal))
        got = self._preadv(handle, parts, start)
        wanted = {(handle, byte) for byte in range(start, start + got)}
        self.reads.append((wanted <= self.told, len(self.told)))
        return got


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system does not say what is in its cache")
@pytest.mark.parametrize("refusal", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_once_a_read_misses_the_page_cache_later_ones_are_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    tensors, destinations = save(tmp_path / "1", seed=1), StackedDestinations()
    storage = Storage(monkeypatch, cached=False, refusal=refusal)
    list(source_of(tmp_path / "1").read(ORDER, destinations=destinations))
    destinations.holds(tensors)
    told = [told for told, _ in storage.reads]
    assert told == sorted(told), "a read of what the system was not told of, after one that had to wait"
    assert 0 < told.index(True) < len(told) // 2
    assert storage.tries == 1, "asked again whether it has to wait"
    first_told = storage.reads[told.index(True)][1]
    assert first_told < len(storage.told), "all at once, however large the checkpoint"


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system does not say what is in its cache")
def test_reads_from_the_page_cache_are_not_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, destinations = save(tmp_path / "1", seed=1), StackedDestinations()
    storage = Storage(monkeypatch, cached=True)
    list(source_of(tmp_path / "1").read(ORDER, destinations=destinations))
    destinations.holds(tensors)
    assert storage.tries == len(storage.reads)
    assert not storage.told


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system does not say what is in its cache")
def test_a_storage_error_is_raised_and_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "1", seed=1)
    storage = Storage(monkeypatch, cached=False, refusal=errno.EIO)
    with pytest.raises(SourceError, match="Input/output error"):
        list(source_of(tmp_path / "1").read(ORDER, destinations=StackedDestinations()))
    assert storage.tries == 1
    assert not storage.reads


# --- which layers are complete by what landed ---


def test_a_layer_is_complete_when_the_last_weight_of_each_of_its_parameters_was_read() -> None:
    names = {"a": frozenset({"a1", "a2", "both"}), "b": frozenset({"b1", "both"})}
    completeness = Completeness(
        Loaded(), Mismatches(), KnownCheckpoint(names, planned=True, copy_plan=CopyPlan(None, {}))
    )
    for group, parameters in {"a": ("p", "q"), "b": ("r",)}.items():
        storages = [SimpleNamespace(primary=SimpleNamespace(name=name), key=id(name)) for name in parameters]
        completeness.admit(SimpleNamespace(group=SimpleNamespace(name=group), storages=storages))

    def complete(**direct_read: list[str]) -> list[str]:
        names = tuple(dict.fromkeys(name for found in direct_read.values() for name in found))
        stages = completeness.note_direct_read(DirectRead(names, dict.fromkeys(names, (1,)), 4, direct_read))
        return [stage.group.name for stage in stages]

    assert complete(p=["a1"]) == []
    assert complete(q=["both"], r=["b1", "both"]) == ["b"]
    assert complete(p=["a2"]) == ["a"]
