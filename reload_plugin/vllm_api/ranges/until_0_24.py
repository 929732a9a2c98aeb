"""vLLM 0.24: the worker opens and finishes weight updates, and a transfer engine only receives weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .until_0_25 import CallsUntil025


class CallsUntil024(CallsUntil025):
    """Calls of vLLM 0.24."""

    def quantization_mappers(self, quant_config: Any) -> Iterator[Any]:
        """See ``Calls``. A quantization without scales has no mapper."""
        mapper = quant_config.get_cache_scale_mapper()
        if mapper is not None:
            yield mapper

    def transfer_methods(self, cls: type) -> dict[str, Any]:
        """See ``Calls``."""
        return super().transfer_methods(cls) | {
            "__init__": _init,
            "parse_update_info": _parsing(vars(cls)["parse_update_info"]),
        }


def _init(self: Any, config: Any, parallel_config: Any, model: nn.Module) -> None:
    self.config, self.parallel_config, self.model = config, parallel_config, model


def _parsing(parse: Callable[[Any, object], Any]) -> Callable[[Any, object], Any]:
    """``parse_update_info``, whose answer says that whole tensors come."""

    def parse_update_info(self: Any, update_dict: object) -> Any:
        parsed = parse(self, update_dict)
        object.__setattr__(parsed, "update_kind", "dense")
        return parsed

    return parse_update_info
