"""Readers of checkpoints: each gives names, shapes and dtypes first, and (name, tensor) pairs later."""

from .base import Ranged, Room, Source, Span, Stream, TensorInfo
from .folder import open_folder, open_source
from .kept import HostCopy, Overlay, SpillFile

__all__ = [
    "HostCopy",
    "Overlay",
    "Ranged",
    "Room",
    "Source",
    "Span",
    "SpillFile",
    "Stream",
    "TensorInfo",
    "open_folder",
    "open_source",
]
