"""Reads of one range of a file to many places, against slices of the file's bytes."""

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reload_plugin.checkpoint.io import vectored

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(CONTENT)
    opened = os.open(tmp_path / "file", os.O_RDONLY)
    yield opened
    os.close(opened)


@pytest.fixture(params=["by address", "by views"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C library's own function, and on a system that has none."""
    if request.param == "by views":
        monkeypatch.setattr(vectored, "_preadv2", lambda: None)
    elif vectored._preadv2() is None:
        pytest.skip("this C library has no preadv2")


@pytest.fixture
def memory() -> np.ndarray:
    return np.zeros(4096, dtype=np.uint8)


def parts_in(memory: np.ndarray, places: list[tuple[int, int]]) -> vectored.IoVec:
    base = memory.ctypes.data
    return vectored.iovec_of([base + start for start, _ in places], [nbytes for _, nbytes in places])


@pytest.mark.usefixtures("either")
def test_a_range_is_read_to_its_places_and_nowhere_else(handle: int, memory: np.ndarray) -> None:
    places = [(100, 10), (0, 1), (4000, 96), (500, 300)]
    assert vectored.preadv(handle, parts_in(memory, places), 5) == 407
    expected, at = np.zeros_like(memory), 5
    for start, nbytes in places:
        expected[start : start + nbytes] = np.frombuffer(CONTENT[at : at + nbytes], dtype=np.uint8)
        at += nbytes
    assert (memory == expected).all()


@pytest.mark.usefixtures("either")
def test_at_the_end_of_a_file_a_read_is_short(handle: int, memory: np.ndarray) -> None:
    assert vectored.preadv(handle, parts_in(memory, [(0, 10), (10, 10)]), len(CONTENT) - 15) == 15
    assert vectored.preadv(handle, parts_in(memory, [(0, 10)]), len(CONTENT)) == 0


@pytest.mark.usefixtures("either")
def test_a_failed_read_is_an_oserror_with_its_number(memory: np.ndarray) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as caught:
        vectored.preadv(-1, parts_in(memory, [(0, 10)]), 0)
    assert caught.value.errno == errno.EBADF


def test_a_read_interrupted_by_a_signal_is_repeated(memory: np.ndarray) -> None:
    calls = []

    def interrupted_once(*args: object) -> int:
        calls.append(args)
        ctypes.set_errno(errno.EINTR)
        return -1 if len(calls) == 1 else 7

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectored, "_preadv2", lambda: interrupted_once)
        assert vectored.preadv(3, parts_in(memory, [(0, 10)]), 0) == 7
    assert calls[0] == calls[1]


places = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(places, st.data())
def test_places_after_a_short_read_are_the_rest_in_order(sizes: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, sum(sizes) - 1))
    addresses = [1000 * number for number in range(1, len(sizes) + 1)]
    whole = [address + byte for address, size in zip(addresses, sizes, strict=True) for byte in range(size)]
    left = vectored.from_byte(vectored.iovec_of(addresses, sizes), first)
    assert [address + byte for address, size in left.tolist() for byte in range(size)] == whole[first:]
    assert all(size for _, size in left.tolist())


def test_rows_of_a_table_are_read_alone(handle: int, memory: np.ndarray) -> None:
    rows = parts_in(memory, [(0, 10), (20, 5), (40, 5), (60, 10)]).rows(1, 3)
    assert rows.tolist() == [[memory.ctypes.data + 20, 5], [memory.ctypes.data + 40, 5]]
    assert vectored.preadv(handle, rows, 3) == 10
    assert memory.nonzero()[0].tolist() == [*range(20, 25), *range(40, 45)]
