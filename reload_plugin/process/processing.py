"""Load format to kernel format: vLLM's own processing, run on one group of layers at a time."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .. import vllm_api
from ..device.output_reuse import ReusableOutputs
from ..errors import ProcessingError, ReloadError
from ..record.model_record import ModelRecord
from ..record.staged_group import StagedGroup
from .native_handles import NativeWatch

ProcessWeights = Callable[..., None]
"""vLLM's ``process_weights_after_loading(model, model_config, target_device)``, unpatched."""


def process_group(
    staged: StagedGroup,
    record: ModelRecord,
    original: ProcessWeights,
    watch: NativeWatch,
    outputs: ReusableOutputs,
) -> None:
    """Process a loaded group; afterwards its layers are in kernel format with the new values.

    Layers of online quantization are processed twice, as in a cold start: once as at the end of their
    weights, and once with all layers.

    Args:
        staged: the group.
        record: of the model.
        original: vLLM's own processing.
        watch: records native handles; paused before and after.
        outputs: offers served buffers to packing kernels as their outputs; then a failure may leave the
            group's served values half written, and ``staged.overwritten`` is not empty.

    Raises:
        ProcessingError: ``process_weights_after_loading`` raised.

    """
    staged.materialise()
    if staged.group.needs_no_processing:
        staged.overwritten = staged.written_served_storages()
        staged.processed = True
        return
    watch.captured = []
    watch.paused = not staged.group.effect
    try:
        with outputs.offered(staged.replaceable) as staged.overwritten:
            for layer in staged.group.layers:
                module = layer.ref()
                if module is not None and layer.online:
                    vllm_api.process_online(module)
            vllm_api.process_layers(original, staged.layers, record.model_config, record.target_device)
    except ReloadError:
        raise
    except Exception as error:
        raise ProcessingError(
            f"Processing {staged.group.name or 'the model'} raised {type(error).__name__}: {error}. "
            "The engine serves what it served before."
        ) from error
    finally:
        watch.paused = True
        staged.overwritten = staged.overwritten | staged.written_served_storages()
        staged.captured = watch.captured
    staged.processed = True


def process_tail(model: nn.Module, record: ModelRecord, original: ProcessWeights) -> None:
    """Run the model's own hook, the last part of the tail of PWAL; nothing if the model has none.

    Every layer has to show its new values.

    Raises:
        ProcessingError: the hook raised.

    """
    try:
        vllm_api.process_layers(original, [], record.model_config, record.target_device, model)
    except ReloadError:
        raise
    except Exception as error:
        raise ProcessingError(
            f"{type(model).__name__}.process_weights_after_loading raised {type(error).__name__}: {error}. "
            "The engine serves what it served before."
        ) from error
