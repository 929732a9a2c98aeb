"""A transformers model in memory as a source, under the names and in the shapes of its checkpoints.

transformers 5 fuses and stacks weights while it loads them (the experts of a mixture become one tensor); its
own tables are used to undo that. Weights that Accelerate or compressed-tensors have put on the CPU or on disk
are fetched as they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...device.host_memory import HostPool
from ...errors import ExportError, SourceError
from ...plan.source import Destinations, Stream, TensorInfo, layer_order
from .conversion_groups import conversions_of
from .saved_weights import saved_weights_of
from .weight_reader import WeightReader


def from_transformers(model: Any) -> TransformersSource:
    """The weights of a live transformers model, as its own ``save_pretrained`` would name them.

    Tied weights come once, dtypes stay. Where nothing has to be undone, what is read is the model's memory
    itself and not a copy. At most one group of weights that are converted together is fetched at a time.

    Args:
        model: a ``PreTrainedModel``; weights may be offloaded by Accelerate or compressed-tensors.

    Raises:
        SourceError: it is no such model, or this transformers cannot name its checkpoint.

    """
    return TransformersSource(model)


class TransformersSource:
    """See ``from_transformers``."""

    format = "transformers"

    def __init__(self, model: Any) -> None:
        self.description = f"the model {type(model).__name__}"
        if not isinstance(model, torch.nn.Module) or not hasattr(model, "save_pretrained"):
            raise SourceError(f"{self.description} is no transformers model. Pass its (name, tensor) pairs.")
        self._model = model
        try:
            weights = saved_weights_of(model).kept
            self._conversions = conversions_of(model, [weight.info for weight in weights.values()])
        except ExportError as error:
            raise SourceError(
                f"{self.description} cannot be read under the names of its checkpoint: {error}"
            ) from error
        outputs = [info for group in self._conversions.groups for info in group.outputs]
        outputs.sort(key=lambda info: layer_order(info.name))
        self._infos = {info.name: info for info in outputs}
        self._group_of = {info.name: group for group in self._conversions.groups for info in group.outputs}

    @property
    def files(self) -> Sequence[str]:
        """None: the weights are in memory, or where they were offloaded to."""
        return []

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self._infos.values())

    def names(self) -> Sequence[str]:
        """Every name, by the number of the layer and then by name."""
        return list(self._infos)

    def infos(self) -> Sequence[TensorInfo]:
        """Every tensor, in the order of the layers."""
        return list(self._infos.values())

    def __iter__(self) -> Stream:
        return self.read()

    def read(
        self,
        order: Sequence[str] | None = None,
        pool: HostPool | None = None,
        destinations: Destinations | None = None,
    ) -> Stream:
        """Tensors may share memory with the model: they are to be read, not written."""
        del pool, destinations
        current, tensors = None, dict[str, torch.Tensor]()
        with WeightReader(self._weights_now()) as reader:
            for name in self._infos if order is None else order:
                group = self._group_of[name]
                if group is not current:
                    tensors.clear()
                    current = group
                    tensors = self._conversions.convert(group, reader.fetch)
                found = tensors[name]
                info = self._infos[name]
                if tuple(found.shape) != info.shape or found.dtype != info.dtype:
                    raise SourceError(
                        f"{name} of {self.description} changed while it was read. Stop training meanwhile."
                    )
                yield name, found.detach()
            reader.check_unchanged()

    def _weights_now(self) -> Any:
        """Where the weights are now: an optimizer may have put others in their place."""
        try:
            return saved_weights_of(self._model).kept
        except ExportError as error:
            raise SourceError(f"{self.description} cannot be read: {error}") from error

    def unchanged(self) -> bool:
        """Never: a live model may be trained at any time, and nothing would tell."""
        return False
