"""OLMo's safetensors: nested dicts whose paths are the tensors' names, pickled and then in base64.

``olmo/safetensors_util.py`` writes each name as URL-safe base64 of the pickle of ((key, ...), is pickled); a
value that is no tensor is pickled too, into bytes. The paths are read without running them, the values not.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection

from ...errors import SourceError
from ...plan.source import TensorInfo
from ..file_source import FileSource
from ..io.locations import ContiguousLocation
from ..pickle.state_dicts import weights_in
from ..pickle.unpickling import unpickle
from .safetensors_files import SafetensorsSource

_LONGEST_NAME = 1 << 16


class OlmoSource(FileSource):
    """A safetensors file of OLMo, under the dotted names of its state dict.

    Raises:
        SourceError: a name is a pickle that asks for anything but text and numbers, or there is no state
            dict in it.

    """

    def __init__(self, plain: SafetensorsSource, within: str | None = None) -> None:
        super().__init__(plain.description, "olmo")
        self.stamps, self.paths = dict(plain.stamps), dict(plain.paths)
        tree: dict[str, object] = {}
        for place in plain.locations:
            path, is_pickled = _decoded(place.info.name, plain.description)
            if not is_pickled:
                _put(tree, path, place, plain.description)
        for name, place in weights_in(tree, ContiguousLocation, plain.description, within).items():
            info = TensorInfo(name, place.info.shape, place.info.dtype)
            self._locations[name] = ContiguousLocation(info, place.file, place.start, place.nbytes)


def is_olmo(names: Collection[str]) -> bool:
    """Whether all names are pickles in base64."""
    return bool(names) and all(_pickle_of(name) is not None for name in names)


def _pickle_of(name: str) -> bytes | None:
    """The pickle (protocol 2 or later, ended) that a name is, if it is one."""
    if len(name) > _LONGEST_NAME or not name.startswith("gA"):  # base64 of the first byte of every pickle
        return None
    try:
        found = base64.b64decode(name, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    return found if found[:1] == b"\x80" and found[-1:] == b"." else None


def _decoded(name: str, where: str) -> tuple[tuple[str, ...], bool]:
    data = _pickle_of(name)
    try:
        found = unpickle(data or b"", tensors=False, plain=False)
        keys, is_pickled = found
        if type(keys) is not tuple or not keys or type(is_pickled) is not bool:
            raise ValueError("it is no path")
        if not all(type(key) in (str, int) for key in keys):
            raise ValueError("its path has other keys than text and numbers")
    except (ValueError, TypeError) as error:
        raise SourceError(
            f"{where} has a name that is a pickle in base64 and no path of OLMo's: {error}. Save the weights "
            "under plain names with safetensors.torch.save_file."
        ) from error
    return tuple(map(str, keys)), is_pickled


def _put(tree: dict[str, object], path: tuple[str, ...], place: ContiguousLocation, where: str) -> None:
    inside = tree
    for key in path[:-1]:
        found = inside.setdefault(key, {})
        if not isinstance(found, dict):
            raise SourceError(f"{where} holds {'.'.join(path)} inside another tensor. Write the file again.")
        inside = found
    if path[-1] in inside:
        raise SourceError(f"{where} holds {'.'.join(path)} twice. Write the file again.")
    inside[path[-1]] = place
