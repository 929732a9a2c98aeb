"""A transformers model in memory as a source, under the names and in the shapes of its checkpoints.

transformers 5 fuses and stacks weights while it loads them (the experts of a mixture become one tensor); its
own tables are used to undo that. Weights that Accelerate has put on the CPU or on disk are fetched as they
are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...device.host_memory import HostPool
from ...errors import SourceError
from ...plan.source import Destinations, Stream, TensorInfo, layer_order

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
Tensors = dict[str, torch.Tensor]


def from_transformers(model: Any) -> TransformersSource:
    """The weights of a live transformers model, as its own ``save_pretrained`` would name them.

    Tied weights come once, dtypes stay. Where nothing has to be undone, what is read is the model's memory
    itself and not a copy. At most one layer is fetched and converted at a time.

    Args:
        model: a ``PreTrainedModel``; weights may be offloaded by Accelerate.

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
        held = _held(model, self.description)
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in held.items()}
        whole = _reverted(model, shapes, self.description)
        self._infos = {
            name: TensorInfo(name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in sorted(whole.items(), key=lambda item: layer_order(item[0]))
        }
        self._groups = _groups(model, shapes, self._infos, self.description)
        self._group_of = {name: group for group, names in enumerate(self._groups.values()) for name in names}

    @property
    def files(self) -> Sequence[str]:
        """None: the weights are in memory, or where Accelerate has put them."""
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

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.read()

    def read(
        self,
        order: Sequence[str] | None = None,
        pool: HostPool | None = None,
        destinations: Destinations | None = None,
    ) -> Stream:
        """Tensors may share memory with the model: they are to be read, not written."""
        del pool, destinations
        sources = list(self._groups)
        current, tensors = -1, Tensors()
        for name in self._infos if order is None else order:
            if self._group_of[name] != current:
                tensors.clear()
                current = self._group_of[name]
                held = _held(self._model, self.description)
                fetched = {key: _fetched(self._model, key, held[key]) for key in sources[current]}
                tensors = _reverted(self._model, fetched, self.description)
                del fetched
            found = tensors[name]
            info = self._infos[name]
            if tuple(found.shape) != info.shape or found.dtype != info.dtype:
                raise SourceError(
                    f"{name} of {self.description} changed while it was read. Stop training meanwhile."
                )
            yield name, found.detach()

    def unchanged(self) -> bool:
        """Never: a live model may be trained at any time, and nothing would tell."""
        return False


def _held(model: Any, description: str) -> Tensors:
    """The state dict as it is saved: ignored names and all but one of tied weights left out."""
    from transformers import modeling_utils

    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    found = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    found = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    for copy, original in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if copy in found and original in found and found[copy].is_meta:  # offloading unties them
            del found[copy]
    try:
        kept: Tensors = modeling_utils.remove_tied_weights_from_state_dict(found, model)
    except (AttributeError, RuntimeError) as error:
        raise SourceError(
            f"{description} has weights that cannot be told apart: {error}. Clone those that share memory "
            "without being tied."
        ) from error
    return kept


def _reverted(model: Any, tensors: Mapping[str, torch.Tensor], description: str) -> Tensors:
    """``tensors`` under the names of the checkpoint; weights that were fused come apart again."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise SourceError(
            f"This transformers cannot name the checkpoint of {description}: {error}. Install "
            "transformers 5, or save the model with save_pretrained and give the folder."
        ) from error
    with torch.no_grad():
        found: Tensors = revert_weight_conversion(model, dict(tensors))
    return found


def _groups(
    model: Any, shapes: Tensors, infos: Mapping[str, TensorInfo], description: str
) -> dict[tuple[str, ...], list[str]]:
    """Names in the model -> names in the checkpoint, layer by layer where layers can be undone one by one."""
    by_layer: dict[str, list[str]] = {}
    for name in shapes:
        match = _LAYER.search(name)
        by_layer.setdefault(name[: match.end()] if match else name, []).append(name)
    groups = {}
    for names in by_layer.values():
        made = _reverted(model, {name: shapes[name] for name in names}, description)
        groups[tuple(names)] = list(made)
        if any(key not in infos or infos[key].shape != tuple(t.shape) for key, t in made.items()):
            break
    listed = [name for names in groups.values() for name in names]
    if len(listed) != len(infos) or set(listed) != infos.keys():
        return {tuple(shapes): list(infos)}
    return groups


def _fetched(model: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight with its values, from wherever Accelerate has put them."""
    if not tensor.is_meta:
        return tensor
    from transformers.integrations.accelerate import load_offloaded_parameter

    try:
        found: torch.Tensor = load_offloaded_parameter(model, name)
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise SourceError(
            f"{name} is on meta, and no hook of Accelerate's holds its values: {error}. Load the model's "
            "weights before reading them."
        ) from error
    return found
