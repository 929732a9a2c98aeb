"""vLLM up to 0.25: no updates of draft models, and parameters keep the rank that they were stamped with."""

from __future__ import annotations

from typing import Any

from torch import nn

from .until_0_26 import CallsUntil026


class CallsUntil025(CallsUntil026):
    """Calls of vLLM 0.25."""

    def after_processing(self, layer: nn.Module) -> None:
        """See ``Calls``."""

    def reset_update_target(self, engine: Any) -> None:
        """See ``Calls``."""
