"""Running a model's own ``load_weights`` to the end, over weights that it may reject."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from ..errors import ReloadError
from .mismatches import RejectedWeightError
from .tracer import LoadTrace

LIMIT = 10_000
"""Offenders after which a stream is not read any further."""


class Feed(Protocol):
    """Weights that a loader takes one by one."""

    exhausted: bool
    """Whether there are no more of them, or too many were rejected."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


def load_all(load_weights: Callable[[Any], Any], feed: Feed, trace: LoadTrace) -> None:
    """Run the model's loader over the feed, going on after each weight it rejects.

    Rejected weights end up in ``trace.mismatches``; whatever else the source or a late write raises
    goes through. After the first problem nothing more is written, the rest is only checked.
    """
    while not feed.exhausted:
        seen = len(trace.loaded.shapes)
        try:
            load_weights(feed)
            return
        except RejectedWeightError:
            pass
        except ReloadError:
            raise
        except Exception as error:  # noqa: BLE001 - loaders raise anything; every offender is collected
            _note_rejection(trace, error)
        if len(trace.loaded.shapes) == seen and trace.mismatches.count > LIMIT:
            return


def _note_rejection(trace: LoadTrace, error: Exception) -> None:
    """Sort what a vLLM loader raised: no place for this name, or not in this shape."""
    name = trace.current
    reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
    lost = isinstance(error, (KeyError, AttributeError)) or "no module or parameter named" in str(error)
    (trace.mismatches.unexpected if lost else trace.mismatches.misshapen)[name] = reason
