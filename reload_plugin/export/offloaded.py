"""Saves a transformers model, wherever Accelerate or compressed-tensors keep its weights."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.dtypes import torch_name
from ..checkpoint.formats.conversion_groups import (
    ConversionGroup,
    Conversions,
    conversions_of,
    unconverted,
)
from ..checkpoint.formats.model_weights import FileWeight, HeldWeight, LiveWeight
from ..checkpoint.formats.saved_weights import SavedWeights, saved_weights_of
from ..checkpoint.formats.weight_reader import WeightReader
from ..errors import ExportError, SourceError, export_error
from ..report import ExportReport, Tier
from .companions import write_companions
from .outputs import ExportPlan, OutputGroup, plan_export
from .target import saved_weights
from .writer import write_export


def save_offloaded(
    model: Any,
    directory: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    save_original_format: bool = True,
) -> ExportReport:
    """Save a transformers model as ``save_pretrained`` would, from wherever its weights are.

    For models in memory, dispatched over devices, CPU and disk by ``device_map``, offloaded by
    ``cpu_offload`` or ``disk_offload`` of Accelerate, or by compressed-tensors. Weights that transformers
    fused, split or stacked when it loaded them become what they were, by transformers' own operations,
    however files are split. What will be written is known before a byte is: an operation that cannot be
    undone, or a weight without values, is an error. Peak memory beyond the model's own: the largest group of
    weights that are converted together, as it is and as it was, and 64 MiB.

    The folder is replaced whole or not touched: killed or out of space at any time, the old one still loads.
    Its files that are no weights stay. It may be the folder that the model is offloaded from: the model then
    goes on with the new files. Files that are deleted while they are read are read to their end.

    Args:
        model: a ``PreTrainedModel``. It is not changed.
        directory: a folder; made if it does not exist, a symbolic link is followed.
        max_shard_size: largest file, in bytes or as ``"5GB"``; a larger tensor gets a file of its own.
        save_original_format: whether to write names and shapes of the checkpoint that the model was loaded
        from
            (and that other libraries load). False writes the model's own, which only transformers loads.

    Returns:
        What was written. Every tensor is exact: ``source`` where its bytes were copied, ``converted`` where
        transformers' operations were undone.

    Raises:
        ExportError: it cannot be saved, or writing failed; the old folder is as it was.

    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    _refuse_others(model)
    try:
        saved = saved_weights_of(model)
        weights = saved.kept
        infos = [weight.info for weight in weights.values()]
        conversions = conversions_of(model, infos) if save_original_format else unconverted(infos)
        with WeightReader(weights) as reader:
            plan = plan_export(
                [_output_group(group, conversions, weights, reader) for group in conversions.groups],
                max_shard_size,
            )
            moved = _moved(Path(os.path.realpath(directory)), saved, conversions, plan)
            written = write_export(
                directory,
                plan,
                beside=lambda folder: write_companions(model, folder),
                description=type(model).__name__,
                before_commit=reader.check_unchanged,
            )
            _point_to(moved)
    except SourceError as error:
        raise ExportError(f"{error} Nothing was written.") from error
    tiers: dict[str, Tier] = {
        info.name: "source" if group.renamed else "converted"
        for group in conversions.groups
        for info in group.outputs
    }
    dtypes = {info.name: torch_name(info.dtype) for group in plan.groups for info in group.outputs}
    files = plan.file_of
    return ExportReport(
        source=type(model).__name__,
        directory=str(directory),
        tensors=len(files),
        nbytes=plan.nbytes,
        tiers={name: tiers[name] for name in files},
        dtypes={name: dtypes[name] for name in files},
        files=files,
        copied=written.copied,
        replaced=written.replaced,
        peak_bytes=plan.peak_bytes,
        seconds=written.seconds,
    )


def _refuse_others(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "save_pretrained"):
        raise ExportError(f"{name} is no transformers model. Nothing was written. Pass a PreTrainedModel.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ExportError(
            f"{name} has adapters. Nothing was written. Merge or delete them first, or save them alone with "
            "save_pretrained."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        _refuse_quantizer(name, quantizer)


def _refuse_quantizer(name: str, quantizer: Any) -> None:
    from transformers.quantizers.base import HfQuantizer

    method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
    if not quantizer.is_serializable():
        raise ExportError(
            f"{name} is quantized with {method}, which cannot be saved. Nothing was written. Save the model "
            "before it is quantized."
        )
    if type(quantizer).get_state_dict_and_metadata is not HfQuantizer.get_state_dict_and_metadata:
        raise ExportError(
            f"{name} is quantized with {method}, whose weights transformers rearranges when it saves them. "
            "Nothing was written. Use save_pretrained."
        )


def _output_group(
    group: ConversionGroup, conversions: Conversions, weights: Mapping[str, HeldWeight], reader: WeightReader
) -> OutputGroup:
    fetched = [
        weights[name].info.nbytes for name in group.sources if not isinstance(weights[name], LiveWeight)
    ]
    return OutputGroup(
        group.outputs,
        lambda: conversions.convert(group, reader.fetch),
        0 if group.renamed else sum(fetched),
    )


# -- the folder that the model is offloaded from --------------------------------------------------


def _moved(
    folder: Path, saved: SavedWeights, conversions: Conversions, plan: ExportPlan
) -> list[tuple[Any, dict[str, str]]]:
    """Entries of the model's index of offloaded weights that the save makes wrong, and their new content.

    Raises:
        ExportError: a file would go whose weights are not in the new ones as the model needs them.

    """
    going = set(saved_weights(folder)) if folder.is_dir() else set()
    output_of = {group.sources[0]: group.outputs[0].name for group in conversions.groups if group.renamed}
    output_of |= {copy: output_of[name] for copy, name in saved.tied_to.items() if name in output_of}
    file_of = plan.file_of
    moved, needed = [], {}
    for name, weight in (*saved.kept.items(), *saved.left_out.items()):
        if not isinstance(weight, FileWeight) or not _lies_in(weight, folder, going):
            continue
        if name in output_of and "safetensors_file" in weight.entry:
            new = {
                "safetensors_file": str(folder / file_of[output_of[name]]),
                "weight_name": output_of[name],
                "dtype": torch_name(weight.info.dtype),
            }
            moved.append((weight.entry, new))
        else:
            needed[name] = f"is read from {Path(weight.file).name}"
    if needed:
        raise export_error(
            f"would no longer be in {folder}, where the model reads them",
            "Nothing was written. Save to another folder, or with save_original_format=False.",
            needed,
        )
    return moved


def _lies_in(weight: FileWeight, folder: Path, names: Collection[str]) -> bool:
    path = Path(os.path.realpath(weight.file))
    return path.parent == folder and path.name in names


def _point_to(moved: Sequence[tuple[Any, dict[str, str]]]) -> None:
    """From now on the model reads its offloaded weights from the new files."""
    for entry, new in moved:
        entry.update(new)
