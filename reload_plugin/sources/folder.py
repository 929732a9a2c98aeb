"""A folder (or file) of weights, by the rules a cold start uses to find them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import _vllm
from ..errors import ReloadError, SourceError
from ..memory import HostPool
from .base import Room, Source, Stream, TensorInfo
from .json_files import open_regular, strict_json
from .safetensors_files import SafetensorsSource
from .sidecar import refuse_stale

NEXT = "Give a folder of safetensors files (model.safetensors, or files with an index)."
TWO_SAVES = (
    "The folder is half written or holds files of two saves. "
    "Save or copy it again; reload when that is finished."
)


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
        SourceError: nothing is there, or not whole, or the index and the files disagree.

    """
    place = Path(path)
    index = None
    if place.is_file() and place.suffix == ".safetensors":
        refuse_stale([path])
        return SafetensorsSource([path], path)
    if place.is_dir():
        index = _index_of(place, vllm_config)
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
    refuse_stale(files)
    source = SafetensorsSource(files, path)
    if index is not None:
        _check_index(*index, source.file_of, [Path(file).name for file in files])
    return source


def open_source(path: str | Path) -> Source:
    """The checkpoint at ``path``, for use without an engine.

    Args:
        path: a safetensors file, or a folder of them.

    Raises:
        SourceError: nothing is there, or it is not whole, or no format that is known.

    """
    place = Path(path)
    files = sorted(map(str, place.glob("*.safetensors"))) if place.is_dir() else [str(place)]
    if not files:
        raise SourceError(f"{path} holds no safetensors files. {NEXT}")
    refuse_stale(file for file in files if file.endswith(".safetensors"))
    return SafetensorsSource(files, str(path))


def _index_of(folder: Path, vllm_config: Any) -> tuple[Path, dict[str, str]] | None:
    """The index of a folder and its table (tensor -> file name), if it has one.

    Raises:
        SourceError: the index is something else, or names files that are not there.

    """
    try:
        present = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise SourceError(f"The folder {folder} cannot be read: {error}. {NEXT}") from error
    name = _vllm.index_name(vllm_config, present)
    if name is None or name not in present:
        return None
    index = folder / name
    try:
        with open_regular(index) as handle:
            table = strict_json(handle.read())["weight_map"]
        files = set(table.values())
        if not all(type(file) is str for file in files):
            raise ValueError("its weight_map is not a table of file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(f"{index} is not a safetensors index: {reason}. {TWO_SAVES}") from error
    missing = sorted(files - present)
    if missing:
        raise SourceError(f"{index} names {_some(missing, 'files')} that are not there. {TWO_SAVES}")
    return index, table


def _check_index(index: Path, table: Mapping[str, str], held: Mapping[str, str], read: Sequence[str]) -> None:
    """Every tensor in the file that the index says, and no other. Files that are not read do not count.

    A cold start takes whatever the files hold; where the index says otherwise they are not of one save.
    """
    listed = {name: file for name, file in table.items() if file in read}
    elsewhere = sorted(n for n, file in listed.items() if n not in held or Path(held[n]).name != file)
    if elsewhere:
        raise SourceError(
            f"{index} says that {listed[elsewhere[0]]} holds {_some(elsewhere, 'tensors')}; it does not. "
            f"{TWO_SAVES}"
        )
    unlisted = sorted(held.keys() - listed.keys())
    if unlisted:
        raise SourceError(
            f"{held[unlisted[0]]} holds {_some(unlisted, 'tensors')} that {index.name} does not list. "
            f"{TWO_SAVES}"
        )


def _some(names: Sequence[str], kind: str) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more {kind}"
