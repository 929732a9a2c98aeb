"""Running a model's own ``load_weights`` to the end, over weights that it may reject."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from .. import vllm_api
from ..errors import SERVES_OLD, ReloadError
from .mismatches import RejectedWeightError
from .tracer import LoadTrace

LIMIT = 10_000
"""Offenders after which a stream is not read any further."""


class Feed(Protocol):
    """Weights that a loader takes one by one."""

    exhausted: bool
    """Whether there are no more of them, or too many were rejected."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


def run_loader(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
    """Call the model's own ``load_weights``, also with a part of a checkpoint. Returns what it returns."""
    load_weights: Any = type(model).load_weights  # type: ignore[attr-defined]
    with vllm_api.partial_loading():  # what is missing is found by its slots
        return load_weights(model, weights)


def load_all(load_weights: Callable[[Any], Any], feed: Feed, trace: LoadTrace) -> None:
    """Run the model's loader over the feed, going on after each weight it rejects.

    Rejected weights end up in ``trace.mismatches``; whatever else the source or a late write raises
    goes through. After the first problem nothing more is written, the rest is only checked.

    Raises:
        ReloadError: memory ran out while a weight was loaded, which says nothing about the weight.

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
        except Exception as error:
            if _is_out_of_memory(error):
                reason = f"{type(error).__name__}: {error}"
                raise ReloadError(
                    f"Memory ran out while {trace.current!r} was loaded ({reason}). {SERVES_OLD}"
                ) from error
            _note_rejection(trace, error)  # loaders raise anything; every offender is collected
        if len(trace.loaded.shapes) == seen and trace.mismatches.count > LIMIT:
            return


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a loader raised for want of memory. Of the CPU's allocator only the text tells."""
    texts = ("can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(t in str(error) for t in texts)


def _note_rejection(trace: LoadTrace, error: Exception) -> None:
    """Sort what a vLLM loader raised: no place for this name, or not in this shape."""
    name = trace.current
    reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
    lost = isinstance(error, (KeyError, AttributeError)) or "no module or parameter named" in str(error)
    (trace.mismatches.unexpected if lost else trace.mismatches.misshapen)[name] = reason
