"""A second process for vLLM, because the operations it finds once cannot be taken away again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


class Worker:
    """Runs functions one at a time. A crash costs the call that crashed; the next one starts afresh."""

    def __init__(self, initializer: Callable[[], None]) -> None:
        self._initializer = initializer
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Wait until the call is over and return it, done or failed."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=self._initializer)
        call = self._pool.submit(function, *args)
        if isinstance(call.exception(), BrokenProcessPool):
            self._pool = None
        return call

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
