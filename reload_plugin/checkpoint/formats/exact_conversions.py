"""transformers' tables of conversions, with checks and repairs that make undoing them exact."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...errors import ExportError

Seen = Callable[[Sequence[torch.Tensor]], None]


def exact_conversions(model: Any, seen: Seen) -> list[Any] | None:
    """The conversions that transformers applied to a model, or would apply; None for no conversion.

    Copies: of each one that is undone by an operation, the first step of undoing checks that all sources are
    there, and experts that are taken apart keep their dimensions of size 1.

    Args:
        model: a ``PreTrainedModel``.
        seen: called in that first step with all tensors that are converted together.

    Raises:
        ExportError: this transformers has no such tables.

    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter
    except ImportError as error:
        raise ExportError(
            f"This transformers has no tables of weight conversions ({error}). Nothing was written. Install "
            "transformers 5, or save with save_original_format=False."
        ) from error
    found = getattr(model, "_weight_conversions", None)
    if found is None:  # not made by from_pretrained: as transformers does, prefixes stay as they are
        tables = get_model_conversion_mapping(model, add_legacy=False)
        found = [entry for entry in tables if not isinstance(entry, PrefixChange)]
    if not found:
        return None
    return [_exact(entry, seen) if isinstance(entry, WeightConverter) else entry for entry in found]


def _exact(converter: Any, seen: Seen) -> Any:
    """A copy of a converter whose inverse is checked."""
    whole_experts, complete = _operations()
    exact = copy.copy(converter)
    operations = [whole_experts(op) for op in converter.operations]
    exact.operations = [*operations, complete(seen)]
    return exact


@functools.cache
def _operations() -> tuple[Callable[[Any], Any], Callable[[Seen], Any]]:
    """Operations that subclass transformers' own, which is imported when it is used."""
    from transformers.core_model_loading import ConversionOps, MergeModulelist, SplitModulelist

    class Split(SplitModulelist):
        """Takes stacked experts apart; only the stacked dimension goes (5.19 drops all of size 1)."""

        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            whole = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
            made: dict[str, torch.Tensor] = super().convert(whole, *args, **kwargs)
            shapes = {tuple(t.shape[: self.dim] + t.shape[self.dim + 1 :]) for t in whole.values()}
            if len(shapes) == 1:
                shape = shapes.pop()
                return {key: tensor.reshape(shape) for key, tensor in made.items()}
            return made

    class Merge(MergeModulelist):
        @property
        def reverse_op(self) -> Any:
            return Split(self.dim)

    class Complete(ConversionOps):
        """Passes tensors on if every source of the conversion is among them."""

        def __init__(self, seen: Seen) -> None:
            self._seen = seen

        def __deepcopy__(self, memo: object) -> Any:
            return self  # transformers copies a converter for each of its outputs

        def convert(
            self, input_dict: dict[str, Any], source_patterns: list[str], **kwargs: Any
        ) -> dict[str, Any]:
            missing = [pattern for pattern in source_patterns if pattern not in input_dict]
            if missing:
                name = kwargs.get("full_layer_name", "")
                raise ExportError(
                    f"{name} cannot be made: {', '.join(missing)} is missing beside {', '.join(input_dict)}. "
                    "Nothing was written. Put the weights back, or save with save_original_format=False.",
                    {name: f"{', '.join(missing)} is missing"},
                )
            self._seen([tensor for found in input_dict.values() for tensor in _listed(found)])
            return input_dict

        @property
        def reverse_op(self) -> Any:
            return self

    def whole_experts(operation: Any) -> Any:
        return Merge(operation.dim) if type(operation) is MergeModulelist else operation

    return whole_experts, Complete


def _listed(found: Any) -> list[torch.Tensor]:
    return found if isinstance(found, list) else [found]
