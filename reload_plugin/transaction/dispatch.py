"""Running code of our own where the watch over the model's loader would only cost time."""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import _disable_current_modes


def untraced() -> contextlib.AbstractContextManager[object]:
    """A context without dispatch modes; does nothing where none is active, which is quicker."""
    if not torch._C._len_torch_dispatch_stack():
        return contextlib.nullcontext()
    return _disable_current_modes()
