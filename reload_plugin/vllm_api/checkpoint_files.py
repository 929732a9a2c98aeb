"""The weights that a cold start would read: files, buckets, dummy weights."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from .symbols import DUMMY, REPOSITORIES, RUNAI, RUNAI_LOADER, get

_READABLE = frozenset(
    {"auto", "hf", "safetensors", "pt", "mistral", "npcache", "fastsafetensors", "instanttensor"}
)


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
    _, files, *_ = loader._prepare_weights(
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


def _disk_load_config(load_config: Any) -> Any:
    """The engine's load config, or the default one when the engine did not start from files."""
    if load_config.load_format in _READABLE:
        return load_config
    return dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})
