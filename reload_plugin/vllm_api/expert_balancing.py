"""vLLM's balancing of experts over ranks (EPLB), which moves them while the engine serves."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

_balancers: weakref.WeakSet[Any] = weakref.WeakSet()
"""The ``EplbState`` of each engine of this process; nothing that is reached from a model leads to it."""


def note_balancer(balancer: Any) -> None:
    """An ``EplbState`` got a model. Held weakly."""
    _balancers.add(balancer)


def models_being_rearranged() -> Iterator[nn.Module]:
    """Models whose experts a thread is moving: vLLM has decided on new places, and not taken all of them."""
    for balancer in list(_balancers):
        for state in getattr(balancer, "model_states", {}).values():
            if getattr(state, "rebalanced", False) or getattr(state, "pending_result", None) is not None:
                yield state.model
