"""vLLM up to 0.27: it asks by class which layers are processed last, and transfer engines also send."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..symbols import ATTENTION, ATTENTION_BASE, get
from .until_0_29 import CallsUntil029


class CallsUntil027(CallsUntil029):
    """Calls of vLLM 0.27."""

    def is_deferred_attention_layer(self, module: nn.Module) -> bool:
        """See ``Calls``. It is the same question as vLLM asks in ``process_weights_after_loading``."""
        if ATTENTION not in sys.modules or not hasattr(module, "process_weights_after_loading"):
            return False
        return isinstance(module, self._last_classes())

    def _last_classes(self) -> tuple[type, ...]:
        return (get(ATTENTION_BASE, "AttentionLayerBase"), get(ATTENTION, "MMEncoderAttention"))

    def transfer_methods(self, cls: type) -> dict[str, Any]:
        """See ``Calls``."""
        return super().transfer_methods(cls) | {"trainer_send_weights": staticmethod(_send_nothing)}


def _send_nothing(*_: Any, **__: Any) -> None:
    raise NotImplementedError("Files are not sent by a trainer: write a checkpoint and name its path.")
