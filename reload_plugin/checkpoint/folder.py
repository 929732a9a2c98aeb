"""Opening a folder, a file, a repository or a bucket, by the rules with which a cold start finds weights."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import vllm_api
from ..device.host_memory import HostPool
from ..errors import ReloadError, SourceError
from ..plan.source import Destinations, Source, Stream, TensorInfo
from .detect import NEXT, check_marker, check_numbers, is_plain, open_source, plain_safetensors
from .formats.fast_files import FastSafetensors
from .formats.fast_readers import READERS
from .formats.safetensors_files import SafetensorsSource
from .formats.safetensors_index import check_index, read_index
from .formats.torch_source import TorchSource
from .io.stamps import Stamp, stamp_of

logger = logging.getLogger("vllm.reload_plugin")


class UnlistedSource:
    """Weights that one of vLLM's loaders reads; their names are known only while reading.

    Args:
        description: the path, for messages.
        weights: starts reading; returns (name, tensor) pairs in the loader's order, in memory of its own.

    """

    def __init__(self, description: str, weights: Callable[[], Iterator[Any]]) -> None:
        self.description = description
        self._weights = weights

    def infos(self) -> Sequence[TensorInfo] | None:
        return None

    def read(
        self,
        order: Sequence[str] | None = None,
        pool: HostPool | None = None,
        destinations: Destinations | None = None,
    ) -> Stream:
        assert order is None, "a source without a listing has one order"
        del pool, destinations
        yield from self._weights()

    def unchanged(self) -> bool:
        return False


def _of_bucket(path: str, vllm_config: Any, require_marker: str | None) -> Source:
    if vllm_api.load_format(vllm_config) != "runai_streamer":
        raise SourceError(
            f"{path} is in a bucket, and the engine was not started with load_format='runai_streamer'. "
            "Start it so, or give a folder on this machine."
        )
    if require_marker is not None:
        raise SourceError(
            f"A marker (require_marker) cannot be looked for in a bucket: {path}. Leave it out."
        )
    return UnlistedSource(path, functools.partial(vllm_api.stored_weights, vllm_config, path))


def open_folder(
    path: str, vllm_config: Any, model_config: Any, model: nn.Module, require_marker: str | None = None
) -> Source:
    """The weights a cold start on ``path`` would load, or what else ``open_source`` finds there.

    Args:
        path: local folder, single file, or the name of a repository that vLLM resolves; the engine's own
            model path is read at the engine's revision.
        vllm_config: config of the engine; its load config says which safetensors files count.
        model_config: config of the model being reloaded.
        model: the model; some name patterns of their own.
        require_marker: name of a file that the trainer writes last; without it the folder is refused.

    Raises:
        SourceError: nothing is there, or not whole, or the index and the files disagree.

    """
    place = Path(path)
    if vllm_api.is_object_storage(path):
        return _of_bucket(path, vllm_config, require_marker)
    if place.is_file():
        return open_source(path, require_marker=require_marker)
    if place.is_dir():
        if require_marker is not None:
            check_marker(place, require_marker)
        return _of_folder(place, vllm_config, model_config, model)
    if place.is_absolute() or path.startswith(".") or place.exists() or path.count("/") != 1:
        raise SourceError(f"There is no folder {path}. {NEXT}")
    files = _weight_files(path, vllm_config, model, vllm_api.revision_of(path, model_config))
    return _of_files(path, files, vllm_config, model_config, model)


def open_start(vllm_config: Any, model_config: Any, model: nn.Module) -> Source:
    """The checkpoint in the engine's own model path, at its revision. A cached repository asks no hub.

    Raises:
        SourceError: as ``open_folder``.

    """
    path = model_config.model
    folder = vllm_api.local_folder(path, vllm_api.revision_of(path, model_config), vllm_config)
    return open_folder(path if folder is None else str(folder), vllm_config, model_config, model)


def start_stamps(vllm_config: Any, model_config: Any, model: nn.Module) -> dict[str, Stamp] | None:
    """Size, time and inode of the weight files that an engine has just started from, by the loader's rules.

    A source of ``open_start`` with the same stamps reads the weights of the start again. None where the
    engine did not start from files on this machine.
    """
    if not vllm_api.starts_from_files(vllm_config):
        return None
    path = getattr(model_config, "model", "")
    folder = vllm_api.local_folder(path, vllm_api.revision_of(path, model_config), vllm_config)
    if folder is None:
        return None
    try:
        return {file: stamp_of(file) for file in _weight_files(str(folder), vllm_config, model)}
    except SourceError as error:
        logger.info(
            "The weights of the start cannot be read again, so reloads keep a copy of them: %s", error
        )
        return None


def _of_folder(folder: Path, vllm_config: Any, model_config: Any, model: nn.Module) -> Source:
    index = _index_of(folder, vllm_config)
    held = [name for name in _names(folder) if name.endswith(".safetensors")]
    if not any(map(is_plain, held)) and not getattr(model, "secondary_weights", ()):
        return open_source(folder)
    files = _weight_files(str(folder), vllm_config, model)
    if index is None:
        check_numbers(folder, [Path(file).name for file in files])
    source = _of_files(str(folder), files, vllm_config, model_config, model)
    if index is not None and isinstance(source, SafetensorsSource):
        check_index(*index, source.file_of, [Path(file).name for file in files])
    return source


def _of_files(
    path: str, files: Sequence[str], vllm_config: Any, model_config: Any, model: nn.Module
) -> Source:
    """The files that vLLM would read: with our readers where they know the format, else with vLLM's."""
    unlisted = functools.partial(vllm_api.all_weights, vllm_config, model_config, model, path)
    if getattr(model, "secondary_weights", ()):
        return UnlistedSource(path, unlisted)
    if all(file.endswith(".safetensors") for file in files):
        load_format = vllm_api.load_format(vllm_config)
        if load_format not in READERS:
            return plain_safetensors(files, path)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        fast = functools.partial(FastSafetensors, load_format=load_format, device=device)
        return plain_safetensors(files, path, opened=fast)
    if all(file.endswith((".bin", ".pt", ".pth")) for file in files):
        return TorchSource(files, path)
    return UnlistedSource(path, unlisted)


def _weight_files(path: str, vllm_config: Any, model: nn.Module, revision: str | None = None) -> list[str]:
    try:
        return vllm_api.weight_files(vllm_config, model, path, revision)
    except ReloadError:
        raise
    except Exception as error:
        raise SourceError(f"{path} holds no weights that vLLM finds: {error}. {NEXT}") from error


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def _index_of(folder: Path, vllm_config: Any) -> tuple[Path, dict[str, str]] | None:
    """The index that a cold start on a folder obeys, if it has one."""
    try:
        present = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise SourceError(f"The folder {folder} cannot be read: {error}. {NEXT}") from error
    name = vllm_api.index_name(vllm_config, present)
    return None if name is None else read_index(folder, name, present)
