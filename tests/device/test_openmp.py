"""Work that is shared out among the threads of the kernels: every number once, and errors come out."""

import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from reload_plugin.checkpoint.io.readahead import SHARED, WORTH_SHARING, Batch, PageCache, Piece, runs_of
from reload_plugin.device import openmp as team
from reload_plugin.device.hashing import Hash
from reload_plugin.device.value_hashes import _PIECE, _WORTH_SHARING
from reload_plugin.errors import SourceError

WHOLE = WORTH_SHARING + 3 * SHARED + 5


@pytest.fixture(params=["team", "alone", "no runtime"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in which the work may be shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "alone" else 2)
    if request.param == "no runtime":
        monkeypatch.setattr(team, "_parallel", lambda: None)
    yield request.param
    torch.set_num_threads(before)


def test_every_number_is_worked_on_once(threads: str) -> None:
    done: list[int] = []
    team.run_on_openmp_threads(done.append, 1000)
    assert sorted(done) == list(range(1000))
    team.run_on_openmp_threads(done.append, 0)
    assert len(done) == 1000


def test_two_threads_work_at_one_time() -> None:
    if team._parallel() is None or torch.get_num_threads() < 2:
        pytest.skip("no team here")
    together = threading.Barrier(2)
    team.run_on_openmp_threads(
        lambda _: together.wait(timeout=60), 2
    )  # neither call returns before the other began


def test_the_first_error_comes_out_and_the_next_work_goes_well(threads: str) -> None:
    def fail(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        team.run_on_openmp_threads(fail, 100)
    done: list[int] = []
    team.run_on_openmp_threads(done.append, 5)
    assert len(done) == 5


def whole_file(folder: Path, nbytes: int = WHOLE) -> Path:
    path = folder / "file"
    path.write_bytes(os.urandom(nbytes))
    return path


def read(path: Path, target: torch.Tensor, cuts: Sequence[int]) -> None:
    """Read a file into memory, as tensors that end at each of the ``cuts``."""
    handle = os.open(path, os.O_RDONLY)
    try:
        pieces = [
            Piece(handle, start, target[start:end], str(path), f"the tensor of byte {start}")
            for start, end in itertools.pairwise(cuts)
        ]
        Batch(runs_of(pieces), PageCache(), True).wait()
    finally:
        os.close(handle)


def test_a_large_request_is_read_whole_into_memory_in_pieces(threads: str, tmp_path: Path) -> None:
    path = whole_file(tmp_path)
    target = torch.zeros(WHOLE, dtype=torch.uint8)
    read(path, target, [0, 1, SHARED - 1, SHARED, 2 * SHARED, 5 * SHARED + 7, WHOLE])
    assert target.numpy().tobytes() == path.read_bytes()


def test_a_cut_file_is_named_with_the_tensor_that_it_ends_in(threads: str, tmp_path: Path) -> None:
    path = whole_file(tmp_path)
    os.truncate(path, SHARED + 10)
    target = torch.zeros(WHOLE, dtype=torch.uint8)
    with pytest.raises(SourceError, match="ends in the middle of the tensor of byte 5:"):
        read(path, target, [0, 5, WHOLE])


def test_a_digest_does_not_depend_on_who_hashes(threads: str) -> None:
    tensors = [torch.arange(_WORTH_SHARING // 4), torch.arange(7), torch.arange(_PIECE).view(2, -1).t()]
    digests = set()
    for count in (1, 2):
        torch.set_num_threads(count)
        total = Hash()
        for number, tensor in enumerate(tensors):
            total.add_text(f"{number};")
            total.add_tensor(tensor)
        digests.add(total.digest())
    assert len(digests) == 1


@pytest.mark.parametrize("place", [0, _PIECE - 1, _PIECE, _WORTH_SHARING, 2 * _WORTH_SHARING - 1])
def test_a_digest_sees_each_piece_and_their_order(place: int) -> None:
    def digest(values: torch.Tensor) -> bytes:
        total = Hash()
        total.add_tensor(values)
        return total.digest()

    values = torch.zeros(2 * _WORTH_SHARING, dtype=torch.uint8)
    before = digest(values)
    values[place] = 1
    after = digest(values)
    assert after != before
    assert digest(values.roll(_PIECE)) != after


def test_a_digest_sees_each_tensor_and_their_order() -> None:
    def digest(*tensors: torch.Tensor) -> bytes:
        total = Hash()
        for tensor in tensors:
            total.add_tensor(tensor)
        return total.digest()

    first, second, third = torch.zeros(8), torch.ones(8), torch.full((8,), 2.0)
    assert digest(first, second) != digest(first, third)
    assert digest(first, second) != digest(second, first)
    assert digest(first, second) == digest(first.clone(), second.clone())
