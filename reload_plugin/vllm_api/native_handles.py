"""Handles of native objects that vLLM's operators make from weights."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def _native_constructor_names() -> tuple[str, ...]:
    """vLLM operators that take tensors and return an integer: handles of native objects."""
    found = set()
    for schema in torch._C._jit_get_all_schemas():
        library, _, name = schema.name.partition("::")
        returns = [str(value.type) for value in schema.returns]
        if library == "_C" and returns == ["int"] and any(str(a.type) == "Tensor" for a in schema.arguments):
            found.add(name)
    return tuple(sorted(found))


_POINTS_INTO: dict[str, tuple[int, ...]] = {
    "create_onednn_mm_handler": (),
    "create_onednn_scaled_mm_handler": (1,),
}
"""Arguments whose memory a handle goes on reading (vLLM's csrc/cpu/dnnl_helper.cpp: weights are packed
into memory of the handle's own, scales are read where they are). Of constructors not listed: all."""


def native_constructors() -> list[tuple[Any, str, tuple[int, ...] | None]]:
    """Constructors of native handles: namespace, name, and the arguments the handle points into."""
    library = torch.ops._C
    names = [name for name in _native_constructor_names() if hasattr(library, name)]
    return [(library, name, _POINTS_INTO.get(name)) for name in names]


def release_native(name: str, handle: int) -> None:
    """Release what a constructor of native handles made, where nobody has it yet who would."""
    if name in _POINTS_INTO:
        torch.ops._C.release_dnnl_matmul_handler(handle)
