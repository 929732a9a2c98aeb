"""Readers of checkpoints: each gives names, shapes and dtypes first, and (name, tensor) pairs later."""

from .base import Source, TensorInfo
from .folder import open_folder

__all__ = ["Source", "TensorInfo", "open_folder"]
