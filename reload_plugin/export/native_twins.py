"""Whether two native handles hold the same packed weights, which no tensor shows."""

from __future__ import annotations

from typing import Any

import torch

from ..process.native_handles import Handles, handle_in
from ..record.module_state import values_of


class NativeTwins:
    """Compares owners of native handles by the digests of what their handles were made from.

    Args:
        handles: handle -> digest of its constructor's arguments, of the model.

    """

    def __init__(self, handles: Handles) -> None:
        self._handles = handles

    def equal(self, served: object, new: object) -> bool:
        """Whether both were made from the same bits. False where that is not known of one of them."""
        ours, theirs = self._digests(served), self._digests(new)
        return None not in ours and len(ours) > 0 and ours == theirs

    def known(self, owner: object) -> bool:
        """Whether it is known what all handles of an owner were made from."""
        found = self._digests(owner)
        return len(found) > 0 and None not in found

    def _digests(self, owner: Any) -> list[bytes | None]:
        tensors = (value for value in values_of(owner) if isinstance(value, torch.Tensor))
        return [self._handles.get(handle) for tensor in tensors if (handle := handle_in(tensor))]
