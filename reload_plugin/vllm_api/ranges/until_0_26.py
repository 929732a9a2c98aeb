"""vLLM up to 0.26: fewer layers are processed last, and nothing counts the layers of a draft model."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from ..symbols import ATTENTION, get
from .until_0_27 import CallsUntil027


class CallsUntil026(CallsUntil027):
    """Calls of vLLM 0.26."""

    def completeness_unchecked(self) -> AbstractContextManager[Any]:
        """See ``Calls``."""
        return contextlib.nullcontext()

    def _last_classes(self) -> tuple[type, ...]:
        return tuple(get(ATTENTION, name) for name in ("Attention", "MLAAttention", "MMEncoderAttention"))
