"""vLLM's configs, and a model made from one without an engine."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .loading import loading_context
from .symbols import CONFIGS, LOADER_UTILS, get


@contextlib.contextmanager
def one_rank(model: str, engine: dict[str, Any]) -> Iterator[Any]:
    """The config of an engine on ``model``, and this process as its only rank. Nothing is loaded."""
    arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "load_format": "auto", **engine}
    config = get("vllm.engine.arg_utils", "EngineArgs")(model=model, **arguments).create_engine_config()
    distributed = "vllm.distributed"
    with tempfile.TemporaryDirectory() as folder, get("vllm.config", "set_current_vllm_config")(config):
        get(distributed, "init_distributed_environment")(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        get(distributed, "initialize_model_parallel")(1, 1)
        try:
            yield config
        finally:
            get(distributed, "destroy_model_parallel")()
            get(distributed, "destroy_distributed_environment")()


def spreads_experts(config: Any) -> bool:
    """Whether each rank has experts of its own, and not a share of every one."""
    return bool(getattr(getattr(config, "parallel_config", None), "enable_expert_parallel", False))


def prefetches_weights(config: Any) -> bool:
    """Whether vLLM's prefetch offloader serves the weights: parameters are then buffers that layers share,
    and their values come from copies on the host before each layer runs.
    """
    offload = getattr(config, "offload_config", None)
    group_size = getattr(getattr(offload, "prefetch", None), "offload_group_size", 0)
    return group_size > 0 and getattr(offload, "offload_backend", "auto") != "uva"


def construct_on_meta(config: Any, watching: contextlib.AbstractContextManager[object]) -> nn.Module:
    """The model of a config, as ``initialize_model`` makes it, without memory.

    vLLM keeps rotary embeddings for the next model of the process; those on meta are taken out again.
    """
    tables: dict[Any, Any] = get("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT")
    before = dict(tables)
    tables.clear()
    try:
        with watching, loading_context(config, config.model_config.dtype), torch.device("meta"):
            model: nn.Module = get(LOADER_UTILS, "initialize_model")(config)
        return model
    finally:
        tables.clear()
        tables.update(before)


def full_config(raw: dict[str, Any], model_config: Any) -> dict[str, Any] | None:
    """A config.json with every default filled in, by the class that vLLM reads it with.

    Legacy spellings of rotary settings arrive at the present ones. The engine's ``hf_overrides`` are applied
    where they are a function. None when there is no class for it, or the class refuses it.
    """
    try:
        classes = get(CONFIGS, "_CONFIG_REGISTRY")
        kind = raw["model_type"]
        cls = classes[kind] if kind in classes else get("transformers", "CONFIG_MAPPING")[kind]
        config = cls.from_dict(copy.deepcopy(raw))
        overrides = getattr(model_config, "hf_overrides", None)
        if callable(overrides):
            config = overrides(config)
        get(CONFIGS, "patch_rope_parameters")(config)
        filled: dict[str, Any] = config.to_dict()
    except Exception:  # noqa: BLE001 - classes of anyone's; the caller compares the plain texts then
        return None
    return filled


def captures_graphs(vllm_config: Any) -> bool:
    """Whether an engine of this config captures CUDA graphs, which hold the addresses of its weights."""
    if getattr(getattr(vllm_config, "model_config", None), "enforce_eager", False):
        return False
    mode = getattr(getattr(vllm_config, "compilation_config", None), "cudagraph_mode", None)
    return getattr(mode, "name", "NONE") != "NONE"


def has_sleep_mode(vllm_config: Any) -> bool:
    """Whether the weights of an engine of this config lie in memory that vLLM's ``sleep`` gives back."""
    return bool(getattr(getattr(vllm_config, "model_config", None), "enable_sleep_mode", False))
