"""The dtypes that checkpoint files can hold, by the names that each kind of file gives them.

The only tables of dtype names: safetensors headers, torch's own names (in pickles of ``torch.save`` and of
``torch.distributed.checkpoint``, and in the structure of a nested state dict), and torch's storage classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

METADATA_KEY = "__metadata__"
"""The entry of a safetensors header that is no tensor; no tensor can have this name."""

SAFETENSORS_NAMES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""dtype -> its name in a safetensors header; tensors of other dtypes are stored as bytes."""

SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
"""Name in a safetensors header -> dtype (format description of the safetensors project)."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
"""Attribute of ``torch`` -> dtype, aliases (``half``) included: what pickles name."""

TORCH_STORAGE_DTYPES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
"""Class that ``torch.save`` names for a tensor's storage -> dtype of its elements (``torch/storage.py``)."""


def torch_name(dtype: torch.dtype) -> str:
    """The key of a dtype in ``TORCH_DTYPES``: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
