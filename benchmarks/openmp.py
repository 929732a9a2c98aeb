"""Reading and hashing right after a kernel: on one thread, on two Python threads, on the OpenMP threads.

Prints the median milliseconds for one block of memory. After a parallel region OpenMP's worker threads spin
for some milliseconds, so a second Python thread shares its core with one of them.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from document import table

from reload_plugin.device.host_memory import view_of
from reload_plugin.device.openmp import run_on_openmp_threads

PIECE = 1 << 20
Work = Callable[[int], object]


def alone(work: Work, count: int) -> None:
    for number in range(count):
        work(number)


def two_threads(work: Work, count: int) -> None:
    """Run ``work`` for each number on two Python threads, which take the numbers from one iterator."""
    numbers = iter(range(count))

    def take() -> None:
        for number in numbers:
            work(number)

    other = threading.Thread(target=take)
    other.start()
    take()
    other.join()


def milliseconds(how: Callable[[Work, int], None], work: Work, count: int, trials: int) -> float:
    """Median milliseconds of ``trials`` runs, each right after a kernel that ran on all OpenMP threads."""
    kernel = torch.zeros(4 << 20)
    times = []
    for _ in range(trials):
        kernel.add_(1)
        started = time.perf_counter()
        how(work, count)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def measure(file: Path, pieces: int, trials: int) -> list[list[str]]:
    """Time reading and hashing ``pieces`` MiB of ``file``; returns one row of milliseconds for each.

    Raises:
        SystemExit: a byte or a digest was not the expected one.

    """
    target = torch.zeros(pieces * PIECE, dtype=torch.uint8)
    memory = view_of(target.data_ptr(), target.numel())
    content = file.read_bytes()
    digests: dict[int, bytes] = {}
    right = {n: xxhash.xxh3_128_digest(content[n * PIECE : (n + 1) * PIECE]) for n in range(pieces)}
    handle = os.open(file, os.O_RDONLY)

    def read(number: int) -> None:
        start = number * PIECE
        if os.preadv(handle, [memory[start : start + PIECE]], start) != PIECE:
            raise RuntimeError(f"a short read at byte {start}")

    def digest(number: int) -> None:
        digests[number] = xxhash.xxh3_128_digest(memory[number * PIECE : (number + 1) * PIECE])

    rows: list[list[str]] = [["read"], ["hash"]]
    for how in (alone, two_threads, run_on_openmp_threads):
        target.zero_()
        rows[0].append(f"{milliseconds(how, read, pieces, trials):.2f}")
        if memory != content:
            raise SystemExit(f"{how.__name__} read wrong bytes")
        digests.clear()
        rows[1].append(f"{milliseconds(how, digest, pieces, trials):.2f}")
        if digests != right:
            raise SystemExit(f"{how.__name__} computed wrong digests")
    os.close(handle)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=32, help="size of the block")
    parser.add_argument("--trials", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "block"
        file.write_bytes(os.urandom(arguments.mib * PIECE))
        rows = measure(file, arguments.mib, arguments.trials)
    print(table((f"{arguments.mib} MiB, ms", "one thread", "two threads", "OpenMP threads"), rows))


if __name__ == "__main__":
    main()
