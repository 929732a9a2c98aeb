"""Values that no checkpoint holds and no record keeps, saved before the memory they are in is discarded."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch

from .model_record import ModelRecord, TensorRecord
from .tensor_layout import AsServed


class UnloadedValues:
    """Copies, in host memory, of large tensors that the constructor computed (rotary tables).

    A reload takes their values from the served tensors. vLLM's level 2 of sleep saves buffers by itself, its
    ``discard`` nothing.

    Args:
        record: of the model whose memory is about to be discarded.

    """

    def __init__(self, record: ModelRecord) -> None:
        self._saved: list[tuple[weakref.ref[torch.Tensor], torch.Tensor]] = [
            (weakref.ref(tensor), tensor.detach().to("cpu", copy=True))
            for one in computed_by_constructor(record)
            if (tensor := one.ref()) is not None and not tensor.is_meta
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Copy them into the tensors, whose memory is there again; queued on the current stream."""
        for ref, values in self._saved:
            if (tensor := ref()) is not None and tensor.shape == values.shape:
                tensor.detach().copy_(values)


def computed_by_constructor(record: ModelRecord) -> Iterator[TensorRecord]:
    """Tensors whose initial values are large and computed. Parameters count where the construction was
    watched: else nobody knows whether they had values at all.
    """
    for layer in record.layers:
        for tensor in layer.tensors:
            if isinstance(tensor.format.initial, AsServed) and (tensor.traced or not tensor.is_parameter):
                yield tensor
