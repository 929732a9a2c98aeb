"""A folder (or file) of weights, by the rules a cold start uses to find them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import _vllm
from ..errors import ReloadError, SourceError
from ..memory import HostPool
from .base import Room, Source, Stream, TensorInfo
from .safetensors_files import SafetensorsSource

NEXT = "Give a folder of safetensors files (model.safetensors, or files with an index)."


class EngineReaderSource:
    """Anything else that vLLM's own default loader reads; its names are known only while it is read."""

    def __init__(self, vllm_config: Any, model_config: Any, model: nn.Module, path: str) -> None:
        self.description = path
        self._arguments = (vllm_config, model_config, model, path)

    def infos(self) -> Sequence[TensorInfo] | None:
        return None

    def read(
        self, order: Sequence[str] | None = None, pool: HostPool | None = None, room: Room | None = None
    ) -> Stream:
        assert order is None, "a source without a listing has one order"
        del pool, room  # vLLM's readers allocate for themselves
        yield from _vllm.all_weights(*self._arguments)

    def unchanged(self) -> bool:
        return False


def open_folder(path: str, vllm_config: Any, model_config: Any, model: nn.Module) -> Source:
    """The weights a cold start on ``path`` would load.

    Args:
        path: local folder, single safetensors file, or the name of a repository that vLLM resolves.
        vllm_config: config of the engine; its load config says which files count.
        model_config: config of the model being reloaded.
        model: the model; some name patterns of their own.

    Raises:
        SourceError: nothing is there, or not whole.

    """
    place = Path(path)
    if place.is_file() and place.suffix == ".safetensors":
        return SafetensorsSource([path], path)
    if place.is_dir():
        _check_index(place)
    elif place.is_absolute() or path.startswith(".") or place.exists() or path.count("/") != 1:
        raise SourceError(f"There is no folder {path}. {NEXT}")
    try:
        files = _vllm.weight_files(vllm_config, model, path)
    except ReloadError:
        raise
    except Exception as error:
        raise SourceError(f"{path} holds no weights that vLLM finds: {error}. {NEXT}") from error
    special = bool(getattr(model, "secondary_weights", ()))
    if special or not all(file.endswith(".safetensors") for file in files):
        return EngineReaderSource(vllm_config, model_config, model, path)
    return SafetensorsSource(files, path)


def _check_index(folder: Path) -> None:
    """An index that names files which are not there is a half-written folder."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{index} is not a safetensors index: {type(error).__name__}: {error}.") from error
    missing = sorted(str(file) for file in files if not (folder / str(file)).exists())
    if missing:
        raise SourceError(f"{index} names {missing[0]} and {len(missing) - 1} more files that are not there.")
