"""The threads that the CPU's kernels run on, for work that is not a kernel's.

Between two parallel regions the workers of an OpenMP team spin for a while, and any other thread shares a
core with one of them. So reading and hashing are shared out as a region of that very team: through
``GOMP_parallel``, which compilers call for ``#pragma omp parallel`` (the ABI of GNU's runtime; LLVM's and
Intel's have it too).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_on_openmp_threads(work: Callable[[int], object], count: int) -> None:
    """Call ``work`` with every number below ``count``, each once, in any order and on several threads.

    Worth it only where ``work`` spends its time outside of Python. Without a team, or with a team of one,
    the calls come one after the other.

    Raises:
        BaseException: the first that a call raised; numbers that were not begun by then are left out.

    """
    threads = min(torch.get_num_threads(), count)
    parallel = _parallel() if threads > 1 else None
    if parallel is None:
        for number in range(count):
            work(number)
        return
    numbers = iter(range(count))
    errors: list[BaseException] = []

    def take(_: object) -> None:
        try:
            for number in numbers:  # one iterator for all: the interpreter's lock gives each number once
                if errors:
                    return
                work(number)
        except BaseException as error:  # noqa: BLE001 - nothing can be raised through the region
            errors.append(error)

    parallel(_Region(take), None, threads, 0)
    if errors:
        raise errors[0]


@functools.cache
def _parallel() -> Callable[..., Any] | None:
    """The runtime's entry, of whichever runtime this process has loaded first; None if it has none."""
    if torch.__config__.parallel_info().find("ATen parallel backend: OpenMP") < 0:
        return None
    found: Any = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if found is not None:
        found.argtypes = [_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        found.restype = None
    return found  # type: ignore[no-any-return]
