"""Readers of checkpoints: each gives names, shapes and dtypes first, and (name, tensor) pairs later."""

from ..plan.source import Destinations, DirectRead, Ranged, Source, Span, Stream, TensorInfo
from .detect import open_source
from .file_source import Checkpoint
from .folder import open_folder, open_start, start_stamps
from .formats.transformers_model import from_transformers
from .stores import (
    DummyWeights,
    HostCopy,
    Overlay,
    Rereadable,
    SpillFile,
    give_back,
    in_a_file,
    kept_open,
    layers_of,
)

__all__ = [
    "Checkpoint",
    "Destinations",
    "DirectRead",
    "DummyWeights",
    "HostCopy",
    "Overlay",
    "Ranged",
    "Rereadable",
    "Source",
    "Span",
    "SpillFile",
    "Stream",
    "TensorInfo",
    "from_transformers",
    "give_back",
    "in_a_file",
    "kept_open",
    "layers_of",
    "open_folder",
    "open_source",
    "open_start",
    "start_stamps",
]
