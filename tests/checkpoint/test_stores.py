"""Weights kept for later, and updates laid over one another: the newest value of each, and no pile."""

import errno
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reload_plugin.checkpoint import HostCopy, Overlay, Source, SpillFile, overlaid_sources
from reload_plugin.checkpoint.formats.safetensors_files import SafetensorsSource
from reload_plugin.errors import SourceError
from reload_plugin.record.model_record import ModelRecord
from reload_plugin.transaction import partial
from reload_plugin.transaction.engine_state import EngineState
from reload_plugin.transaction.partial import merge_updates


def step(folder: Path, number: int, names: str) -> SafetensorsSource:
    """A partial update of these weights, all of them ``number``."""
    save_file({name: torch.full((4,), float(number)) for name in names}, folder / f"{number}.safetensors")
    return SafetensorsSource([str(folder / f"{number}.safetensors")], f"step {number}")


def test_repeated_updates_of_the_same_weights_keep_one_copy(tmp_path: Path) -> None:
    """Only what still shows is needed: the folders of the steps between may go."""
    served = step(tmp_path, 0, "abc")
    for number in range(1, 6):
        served = merge_updates(Overlay(served, step(tmp_path, number, "ab")))
    for number in range(1, 5):
        (tmp_path / f"{number}.safetensors").unlink()
    assert served.unchanged()
    assert {name: t.unique().tolist() for name, t in served.read()} == {"a": [5], "b": [5], "c": [0]}


def kept(kind: str, number: int, names: str) -> HostCopy | SpillFile:
    """The same from an iterator, as it is kept."""
    made = HostCopy("an iterator") if kind == "host" else SpillFile(None, "an iterator")
    for name in names:
        made.add(name, torch.full((4,), float(number)))
    return made


def values(source: Source) -> dict[str, list[float]]:
    assert {info.name for info in source.infos() or ()} == {name for name, _ in source.read()}
    return {name: tensor.unique().tolist() for name, tensor in source.read()}


@pytest.mark.parametrize("first", ["host", "spill", "folder"])
@pytest.mark.parametrize("second", ["host", "spill", "folder"])
def test_updates_of_other_weights_are_all_there(tmp_path: Path, first: str, second: str) -> None:
    served: Source = step(tmp_path, 0, "abcd")
    for number, (kind, names) in enumerate([(first, "a"), (second, "b"), (first, "bc"), (second, "a")], 1):
        update = step(tmp_path, number, names) if kind == "folder" else kept(kind, number, names)
        served = merge_updates(Overlay(served, update))
    assert values(served) == {"a": [4], "b": [3], "c": [3], "d": [0]}
    assert served.unchanged()


def after(*updates: Source) -> Source:
    """What is served after updates, each laid over those before."""
    served = updates[0]
    for update in updates[1:]:
        served = merge_updates(Overlay(served, update))
    return served


def test_many_updates_go_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "SMALL_UPDATE", 40)
    served = after(step(tmp_path, 0, "abcd"), kept("host", 1, "ab"), kept("host", 2, "b"))
    assert [type(layer) for layer in overlaid_sources(served)] == [SafetensorsSource, SpillFile]
    assert values(after(served, kept("host", 3, "c"))) == {"a": [1], "b": [2], "c": [3], "d": [0]}


def test_a_full_disk_leaves_both_sources_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SMALL_UPDATE", 0)
    served = Overlay(after(step(tmp_path, 0, "abcd"), kept("host", 1, "ab")), kept("host", 2, "bc"))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(SourceError, match="No space is left"):
            merge_updates(served)
    assert values(served) == {"a": [1], "b": [2], "c": [2], "d": [0]}


def test_overlaid_sources_are_at_most_as_many_as_the_names(tmp_path: Path) -> None:
    """A thousand of them, each of other weights: as many layers as weights at most, and no deep recursion."""
    chance, names = random.Random(1), "abcdef"
    served: Source = step(tmp_path, 0, names)
    wanted = {name: [0.0] for name in names}
    for number in range(1, 1001):
        some = chance.sample(names, chance.randint(1, 3))
        served = merge_updates(Overlay(served, step(tmp_path, number, "".join(some))))
        wanted |= {name: [float(number)] for name in some}
        assert len(overlaid_sources(served)) <= len(names)
    assert values(served) == wanted
    assert served.unchanged()


def test_an_update_that_nothing_is_read_from_is_freed(tmp_path: Path) -> None:
    """And nothing else: layers that the next source has as well stay open."""
    hidden, showing = kept("spill", 1, "ab"), kept("spill", 3, "c")
    state = EngineState(ModelRecord([], None))
    state.replace_rollback_source(Overlay(step(tmp_path, 0, "abcd"), hidden, showing))
    state.replace_rollback_source(Overlay(state.rollback_source, step(tmp_path, 2, "ab")))
    assert not hidden.unchanged()
    assert values(state.rollback_source) == {"a": [2], "b": [2], "c": [3], "d": [0]}
    state.replace_rollback_source(None)
    assert not showing.unchanged()


def test_a_spill_file_does_not_grow_by_what_replaces_other_weights() -> None:
    file, sizes = SpillFile(None, "an iterator"), {"a": 1000, "b": 1000, "c": 50, "none": 0}
    largest = 0
    for number in range(40):
        for name, size in sizes.items():
            file.add(name, torch.full((size,), float(number + size)))
        if number == 1:
            largest = file.nbytes
    assert file.nbytes == largest == os.fstat(file._file.fileno()).st_size
    assert {name: t.unique().tolist() for name, t in file.read()} == {
        name: [39.0 + size] if size else [] for name, size in sizes.items()
    }


def test_a_write_that_fails_loses_nothing_of_a_spill_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = SpillFile(None, "an iterator")
    for number in range(3):
        file.add("a", torch.full((4,), float(number)))
    write = os.pwrite

    def half(handle: int, piece: memoryview, start: int) -> int:
        write(handle, piece[:8], start)
        raise OSError(errno.ENOSPC, "full")

    size = file.nbytes
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        for name, elements in (("a", 4), ("b", 4), ("at the end", 8)):
            with pytest.raises(SourceError, match="No space is left"):
                file.add(name, torch.full((elements,), -1.0))
    assert file.nbytes == size == os.fstat(file._file.fileno()).st_size
    assert values(file) == {"a": [2]}
    file.add("a", torch.full((4,), 9.0))
    file.add("b", torch.full((4,), 8.0))
    assert values(file) == {"a": [9], "b": [8]}
    assert file.nbytes == size, "the place that could not be written is lost"


def test_an_update_that_is_still_read_from_stays_beneath_another(tmp_path: Path) -> None:
    served = after(step(tmp_path, 0, "abcd"), step(tmp_path, 1, "ab"), step(tmp_path, 2, "bc"))
    assert {name: t.unique().tolist() for name, t in served.read()} == {
        "a": [1],
        "b": [2],
        "c": [2],
        "d": [0],
    }
    (tmp_path / "1.safetensors").unlink()
    assert not served.unchanged()
