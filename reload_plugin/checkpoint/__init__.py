"""Sources of weights: each lists names, shapes and dtypes first, and reads (name, tensor) pairs later.

``open_folder`` finds weights by vLLM's rules, ``open_source`` without an engine; both use ``detect``, which
knows every format. A format is a ``FileSource`` in ``formats/`` that says where tensors lie; ``io/`` reads
them, ``pickle/`` lists files of torch.save without running them. ``dtypes`` and ``sharding`` hold the tables
and the arithmetic that several formats need, ``stores`` the sources made from streams, ``sidecar`` and
``config`` what is checked beside the weights.
"""

from ..plan.source import Destinations, DirectRead, Ranged, Source, Span, Stream, TensorInfo
from .detect import open_source
from .file_source import FileSource
from .folder import open_folder, open_start, start_stamps
from .formats.transformers_model import from_transformers
from .stores import (
    DummyWeights,
    HostCopy,
    Overlay,
    Rereadable,
    SpillFile,
    close_source,
    held_open,
    overlaid_sources,
    spill_to_file,
)

__all__ = [
    "Destinations",
    "DirectRead",
    "DummyWeights",
    "FileSource",
    "HostCopy",
    "Overlay",
    "Ranged",
    "Rereadable",
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
