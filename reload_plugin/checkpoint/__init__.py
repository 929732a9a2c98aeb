"""Readers of checkpoints: each gives names, shapes and dtypes first, and (name, tensor) pairs later."""

from ..plan.source import Destinations, DirectRead, Ranged, Source, Span, Stream, TensorInfo
from .detect import open_source
from .file_source import FileSource
from .folder import open_folder, open_start, start_stamps
from .formats.transformers_model import from_transformers
from .stores import HostCopy, Overlay, SpillFile, close_source, held_open, overlaid_sources, spill_to_file

__all__ = [
    "Destinations",
    "DirectRead",
    "FileSource",
    "HostCopy",
    "Overlay",
    "Ranged",
    "Source",
    "Span",
    "SpillFile",
    "Stream",
    "TensorInfo",
    "close_source",
    "from_transformers",
    "held_open",
    "open_folder",
    "open_source",
    "open_start",
    "overlaid_sources",
    "spill_to_file",
    "start_stamps",
]
