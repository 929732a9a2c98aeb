"""A vLLM model built, loaded and processed without an engine, by vLLM's own `BaseModelLoader.load_model`."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from tests.engine.gpu_methods.checkpoints import MODELS, Spec, on_disk, weights
from tests.engine.gpu_methods.cuda_like import cuda_like
from tests.engine.gpu_methods.operations import register
from tests.engine.gpu_methods.rows import Row
from tests.engine.gpu_methods.stand_ins import stand_ins

OPERATIONS: list[torch.library.Library] = []


class SpecLoader(BaseModelLoader):
    """Loads one generation of a checkpoint that exists as specs only."""

    def __init__(self, config: VllmConfig, specs: dict[str, Spec], generation: str) -> None:
        super().__init__(config.load_config)
        self.specs, self.generation = specs, generation

    def download_model(self, model_config: Any) -> None:
        """Nothing to fetch."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        model.load_weights(weights(self.specs, self.generation))


@dataclass
class Built:
    """A model together with the configuration that must be current whenever its methods run."""

    model: nn.Module
    config: VllmConfig
    specs: dict[str, Spec]

    def reload(self, generation: str) -> Any:
        """Put other weights into the model with the plugin."""
        import reload_plugin

        with set_current_vllm_config(self.config):
            return reload_plugin.reload_weights(self.model, weights_iterator=weights(self.specs, generation))


def start_process() -> None:
    """One rank, no network: what a worker does before it builds a model."""
    import vllm.v1.worker.gpu_worker

    OPERATIONS.extend(register())
    with cuda_like(9, 0):
        import vllm.model_executor.layers.quantization.online.base  # noqa: F401 - asks the platform when imported
    rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel(1, 1)
    gc.collect()
    gc.freeze()  # vLLM collects twice a load; searching all of its modules would dominate the tests


@contextmanager
def machine(row: Row, device: str = "cpu") -> Iterator[None]:
    """Provide the platform and operations that the row needs, and memory that reads as NaN until written."""
    before = torch.are_deterministic_algorithms_enabled(), os.environ.copy()
    os.environ.update(row.environment)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory
    try:
        with cuda_like(*row.capability, device), stand_ins(row.packages):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        os.environ.clear()
        os.environ.update(before[1])


def build(row: Row, generation: str, device: str = "cpu") -> Built:
    """cold(generation) of the row's model on a device; to be called inside `machine(row, device)`."""
    tiny = MODELS[row.model]
    specs = on_disk(tiny, row.packing, row.extra)
    with tempfile.TemporaryDirectory() as folder:
        hf_config = dict(tiny.config)
        if row.quantization_config:
            hf_config["quantization_config"] = row.quantization_config
        (Path(folder) / "config.json").write_text(json.dumps(hf_config))
        config = _engine_config(folder, row)
    config.device_config.device, config.device_config.device_type = torch.device(device), device
    _ROPE_DICT.clear()  # shared by all models of a process
    with set_current_vllm_config(config):
        loader = SpecLoader(config, specs, generation)
        model = loader.load_model(config, config.model_config)
    return Built(model, config, specs)


def _engine_config(folder: str, row: Row) -> VllmConfig:
    return EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        **{"dtype": "bfloat16"} | row.engine,
    ).create_engine_config()
