"""Drafters with a quantized copy of the target's head (vLLM from 0.33 on), in the process where vLLM lives.

Target and drafter are models without an engine; the copy, its kernel's processing, and what a worker does
around an update of the drafter are vLLM's own. Answers are lists of lines; empty is good.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.engine.gpu_methods import checkpoints as disk
from tests.engine.gpu_methods import driver
from tests.engine.gpu_methods.checkpoints import weights
from tests.engine.gpu_methods.rows import Row

ROW = Row("a drafter's head", "llama", disk.plain, ())


def reload_all(target: driver.Built, generation: str) -> None:
    target.reload(generation)


def push(target: driver.Built, generation: str) -> None:
    """Two calls of ``model.load_weights``, and the processing of the whole model."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    items = list(weights(target.specs, generation))
    for part in (items[:5], items[5:]):
        target.model.load_weights(part)
    process_weights_after_loading(target.model, target.config.model_config, torch.device("cpu"))


def layerwise(target: driver.Built, generation: str) -> None:
    """What worker extensions call by themselves."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(target.model)
    target.model.load_weights(weights(target.specs, generation))
    finalize_layerwise_reload(target.model, target.config.model_config)


def kernel_format(target: driver.Built, generation: str) -> None:
    """The tensors of another engine, as they are served there."""
    import reload_plugin

    served = driver.build(ROW, generation).model.named_parameters()
    reload_plugin.reload_weights(target.model, weights_iterator=served, is_checkpoint_format=False)


ROADS: dict[str, Callable[[driver.Built, str], None]] = {
    "reload": reload_all,
    "push": push,
    "layerwise": layerwise,
    "kernel format": kernel_format,
}


def copy_of(built: driver.Built, quantization: str) -> nn.Module:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization.online.lm_head import quantized_lm_head_copy

    with set_current_vllm_config(built.config):
        return quantized_lm_head_copy(built.model.lm_head, quantization)


def drafter_of(target: driver.Built, quantization: str) -> nn.Module:
    drafter = nn.Module()
    drafter.lm_head = copy_of(target, quantization)
    return drafter


def tensors(head: nn.Module) -> dict[str, list[int]]:
    """The bytes of each tensor of a copy."""
    found = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    return {name: tensor.detach().reshape(-1).view(torch.uint8).tolist() for name, tensor in found.items()}


def differing(wanted: nn.Module, head: nn.Module) -> list[str]:
    one, other = tensors(wanted), tensors(head)
    assert one.keys() == other.keys()
    return [name for name in one if one[name] != other[name]]


def by_road(quantization: str, road: str) -> list[str]:
    """What of a drafter's copy is not that of a start on B, or has moved, after its target went to B."""
    from vllm.config import set_current_vllm_config

    with driver.machine(ROW):
        cold, target = driver.build(ROW, "B"), driver.build(ROW, "A")
        drafter = drafter_of(target, quantization)
        assert differing(copy_of(cold, quantization), drafter.lm_head), "A and B quantize to the same head"
        before = {name: (tensor, tensor.data_ptr()) for name, tensor in drafter.lm_head.named_parameters()}
        with set_current_vllm_config(target.config):
            ROADS[road](target, "B")
        now = dict(drafter.lm_head.named_parameters())
        moved = [name for name, (t, at) in before.items() if now[name] is not t or t.data_ptr() != at]
        return differing(copy_of(cold, quantization), drafter.lm_head) + [f"{name} moved" for name in moved]


def worker_of(target: driver.Built, drafter: driver.Built) -> Any:
    """vLLM's worker with both models and the transfer engine for files, as far as updates need it."""
    from vllm.v1.worker.gpu_worker import Worker

    from reload_plugin.vllm_hooks.transfer_engine import engine_class

    runner = types.SimpleNamespace(
        get_model=lambda: target.model, get_draft_model=lambda: drafter.model, reset_lora_state=lambda: None
    )
    worker = Worker.__new__(Worker)
    config = target.config
    engine = engine_class()(None, config, torch.device("cpu"), target.model)
    vars(worker).update(
        vllm_config=config,
        parallel_config=config.parallel_config,
        model_runner=runner,
        weight_transfer_engine=engine,
        speculative_config=types.SimpleNamespace(draft_model_config=config.model_config),
        rank=0,
        _weight_update_active=False,
        _weight_update_is_draft=False,
    )
    return worker


def aborted_updates_of_the_drafter(quantization: str) -> list[str]:
    """What a drafter serves in place of its copy after each of two updates of it that were aborted."""
    with driver.machine(ROW):
        target, drafter = driver.build(ROW, "A"), driver.build(ROW, "A")
        copy = drafter.model.lm_head = copy_of(target, quantization)
        worker = worker_of(target, drafter)
        found = []
        for number in (1, 2):
            worker.start_draft_weight_update()
            assert drafter.model.lm_head is target.model.lm_head, "vLLM lends no head any more"
            assert worker.abort_weight_update(), "no update was open"
            if drafter.model.lm_head is not copy:
                found.append(f"after abort {number}: {type(drafter.model.lm_head.quant_method).__name__}")
        return found
