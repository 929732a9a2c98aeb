"""Progress bars on a terminal for what reads or writes weights; nothing goes to logs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

from ..checkpoint import DirectRead, Source, Stream

logger = logging.getLogger("vllm.reload_plugin")

STEPS = 200
"""A bar of known length is redrawn at most so often."""
STEP = 16 << 20
"""Bytes between two redraws where the length is not known."""


def with_progress(
    weights: Stream, source: Source, wanted: bool | None, names: Collection[str] | None = None
) -> Stream:
    """The same stream, with a bar on stderr that counts the bytes read.

    Args:
        weights: what ``source.read`` gave; closed together with what is returned.
        source: its listing gives the length of the bar, its description the text beside it.
        wanted: whether to show a bar; None for only on rank 0 and only if stderr is a terminal. Without a bar
            the stream itself is returned, which costs nothing.
        names: what is read of the source; None for all.

    """
    bar = None
    if _is_watched() if wanted is None else wanted:
        bar = _opened(lambda: (_length(source, names), f"reloading {source.description}"))
    return weights if bar is None else cast("Stream", _Counted(weights, bar))


@contextlib.contextmanager
def byte_bar(total: int, text: str, wanted: bool | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for the block; yields what is to be called with the bytes of each piece that is done.

    Args:
        total: length of the bar in bytes.
        text: shown beside it.
        wanted: as for ``with_progress``.

    """
    bar = _opened(lambda: (total, text)) if (_is_watched() if wanted is None else wanted) else None
    if bar is None:
        yield lambda _: None
        return
    try:
        yield bar.add
    finally:
        bar.close()


class _ByteBar:
    """Counts bytes and redraws a bar in steps; a terminal that fails ends the bar and nothing else."""

    def __init__(self, bar: Any) -> None:
        self._bar: Any = bar
        self._step = (bar.total or STEP * STEPS) // STEPS
        self._new = 0
        """Bytes since the last redraw."""

    def add(self, nbytes: int) -> None:
        """So many bytes more are done."""
        self._new += nbytes
        if self._new > self._step:
            self._draw()

    def close(self) -> None:
        """Draw what is left and end the bar."""
        self._draw()
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(Exception):
                bar.close()

    def _draw(self) -> None:
        new, self._new = self._new, 0
        if self._bar is not None:
            try:
                self._bar.update(new)
            except Exception as error:  # noqa: BLE001 - a closed or full stderr; the reload goes on
                logger.debug("Progress is not shown any more: %s: %s", type(error).__name__, error)
                self._bar.disable = True
                self._bar = None


class _Counted:
    """Passes a stream on, keeps none of its tensors, and counts their bytes."""

    def __init__(self, weights: Stream, bar: _ByteBar) -> None:
        self._weights = weights
        self._bar = bar

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            item = next(self._weights)
        except BaseException:
            self._bar.close()
            raise
        # A direct read stands for several tensors; everything else is a (name, tensor) pair.
        self._bar.add(item.nbytes if isinstance(item, DirectRead) else item[1].nbytes)
        return item

    def close(self) -> None:
        """Close the stream and the bar."""
        try:
            self._weights.close()
        finally:
            self._bar.close()


def _is_watched() -> bool:
    """Whether stderr is a terminal and this is rank 0."""
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()
    except (OSError, ValueError, AttributeError):  # closed, or something that only writes
        return False
    return terminal and _rank() == 0


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _length(source: Source, names: Collection[str] | None) -> int | None:
    infos = source.infos()
    chosen = None if names is None else set(names)
    return (
        None if infos is None else sum(info.nbytes for info in infos if chosen is None or info.name in chosen)
    )


def _opened(described: Callable[[], tuple[int | None, str]]) -> _ByteBar | None:
    """A bar of tqdm, which vLLM's own loaders use, without its monitor thread; None where it cannot be shown.

    Args:
        described: gives the length of the bar and its text.

    """
    try:
        total, text = described()
        tqdm: Any = importlib.import_module("tqdm").tqdm  # it comes without types
        without_thread: Any = type("Bar", (tqdm,), {"monitor_interval": 0})
        rank = _rank()
        text += f" (rank {rank})" if rank else ""
        units = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
        return _ByteBar(without_thread(total=total, desc=text, dynamic_ncols=True, **units))
    except Exception as error:  # noqa: BLE001 - of any terminal; no bar is worth a failed reload
        logger.debug("No progress is shown: %s: %s", type(error).__name__, error)
        return None
