"""Nested state dicts as a flat table of tensors and a JSON tree that says where each belongs; no pickle."""

from .build import unflatten
from .form import Structure
from .table import flatten, lay_out
from .torch_file import NestedFile

__all__ = ["NestedFile", "Structure", "flatten", "lay_out", "unflatten"]
