"""vLLM up to 0.30: ``WeightsMapper.map_name`` was not public."""

from __future__ import annotations

from typing import Any

from .newest import Calls


class CallsUntil030(Calls):
    """Calls of vLLM 0.30."""

    def map_name(self, mapper: Any, name: str) -> str | None:
        """See ``Calls``."""
        mapped: str | None = mapper._map_name(name)
        return mapped
