"""vLLM up to 0.29: a quantization maps names of scales only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .until_0_30 import CallsUntil030


class CallsUntil029(CallsUntil030):
    """Calls of vLLM 0.28 and 0.29."""

    def quantization_mappers(self, quant_config: Any) -> Iterator[Any]:
        """See ``Calls``."""
        yield quant_config.get_cache_scale_mapper()
