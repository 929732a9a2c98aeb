"""Where things are in vLLM: modules and names, looked up when they are used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import nn

LOADER_UTILS = "vllm.model_executor.model_loader.utils"
RELOAD = "vllm.model_executor.model_loader.reload"
LAYERWISE = RELOAD + ".layerwise"
INPLACE = RELOAD + ".inplace"
ATTENTION = "vllm.model_executor.layers.attention"
ATTENTION_BASE = "vllm.model_executor.layers.attention_layer_base"
DUMMY = "vllm.model_executor.model_loader.dummy_loader"
WEIGHT_UTILS = "vllm.model_executor.model_loader.weight_utils"
TORCH_UTILS = "vllm.utils.torch_utils"
CONFIGS = "vllm.transformers_utils.config"
REPOSITORIES = "vllm.transformers_utils.repo_utils"
TRANSFER = "vllm.distributed.weight_transfer"
MODEL_UTILS = "vllm.model_executor.models.utils"
MTP = "vllm.model_executor.model_loader.mtp_validation"
QUANTIZATION = "vllm.model_executor.layers.quantization.base_config"
RUNAI = "vllm.transformers_utils.runai_utils"
RUNAI_LOADER = "vllm.model_executor.model_loader.runai_streamer_loader"
RUNNERS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
)
"""Both model runners, as (module, class); the CPU runners derive from them."""
COPIED_HEADS = "vllm.model_executor.layers.quantization.online.lm_head"
EXPERT_BALANCER = ("vllm.distributed.eplb.eplb_state", "EplbState")
GROUP_COORDINATOR = ("vllm.distributed.parallel_state", "GroupCoordinator")
WORKER = ("vllm.v1.worker.gpu_worker", "Worker")
PROCESSES = "vllm.v1.executor.multiproc_executor"
EXECUTOR = (PROCESSES, "MultiprocExecutor")
WORKER_PROCESS = (PROCESSES, "WorkerProc")
ENGINE = ("vllm.v1.engine.llm_engine", "LLMEngine")
ENGINE_CORE = ("vllm.v1.engine.core", "EngineCore")
CLIENTS = "vllm.v1.engine.core_client"
REPLICAS = (CLIENTS, "DPLBAsyncMPClient")
"""What a front end asks its replicas through, where vLLM balances their load."""
RUN_METHOD = ("vllm.v1.serial_utils", "run_method")


def get(module: str, name: str) -> Any:
    """One of vLLM's objects by module and name."""
    return getattr(importlib.import_module(module), name)


def binders_of(function: object) -> Iterator[tuple[ModuleType, str]]:
    """Every imported module that binds ``function`` by name, and the name; this package's own left out.

    Trainers bind vLLM's functions too (``from vllm... import initialize_layerwise_reload``). Only the
    dictionaries of modules are read: some modules import or fail when they are asked for an attribute.
    """
    own = __name__.partition(".")[0]
    for name, module in list(sys.modules.items()):
        # The type and not isinstance, which asks an object of anybody's for its class.
        if name.partition(".")[0] == own or not issubclass(type(module), ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if value is function:
                yield module, attribute


def attach(model: nn.Module, name: str, value: object) -> None:
    """Set an instance attribute without going through ``nn.Module.__setattr__``."""
    model.__dict__[name] = value
