"""vLLM from 0.31 on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..symbols import ATTENTION, MTP, get


class Calls:
    """Calls of vLLM that differ between versions."""

    def map_name(self, mapper: Any, name: str) -> str | None:
        """What a ``WeightsMapper`` makes of a checkpoint name; None where the weight is dropped."""
        mapped: str | None = mapper.map_name(name)
        return mapped

    def quantization_mappers(self, quant_config: Any) -> Iterator[Any]:
        """The ``WeightsMapper`` of a quantization: names of scales, and metadata that kernels do not use."""
        yield quant_config.get_cache_scale_mapper()
        yield quant_config.get_checkpoint_weight_mapper()

    def is_deferred_attention_layer(self, module: nn.Module) -> bool:
        """Whether vLLM processes this module after all others (attention and the like)."""
        return ATTENTION in sys.modules and bool(get(ATTENTION, "is_deferred_attention_layer")(module))

    def completeness_unchecked(self) -> AbstractContextManager[Any]:
        """Inside, draft models do not count the layers that they get."""
        context: AbstractContextManager[Any] = get(MTP, "disable_mtp_completeness_check")()
        return context

    def after_processing(self, layer: nn.Module) -> None:
        """What follows on the processing of one layer, where vLLM does it layer by layer."""
        update: Any = getattr(layer, "update_param_tp_status", None)
        if update is not None:
            update()

    def transfer_methods(self, cls: type) -> dict[str, Any]:
        """What vLLM's ``WeightTransferEngine`` wants beside the methods of ``cls``, which is one."""
        return {"__module__": cls.__module__}

    def reset_update_target(self, engine: Any) -> None:
        """A transfer engine updates the worker's model again, where it was a draft model."""
        engine.reset_weight_update_target()
