"""The digest of everything that a model's kernels read.

Computing it reads all weights, so it is computed lazily on the first ``status`` call unless ``digest=True``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch

from ..device.hashing import Hash, form_of
from ..process.native_handles import Handles, handle_in
from ..record.late_bound import LateBound
from ..record.model_record import HolderRecord, ModelRecord
from ..record.module_state import holds_nothing, owns_native, reachable, values_of
from ..record.snapshot import ABSENT, tables_of
from ..tensors import storage_id

logger = logging.getLogger("vllm.reload_plugin")


def digest_of(record: ModelRecord, handles: Handles, forget: bool = True) -> str | None:
    """XXH3-128 (hex) over the present values of all recorded state of a model's layers.

    It covers parameters, buffers, derived state (packed weights, scales as numbers, closures, helper objects)
    and the constructor arguments of native handles. It does not cover what is bound after the start (KV
    caches, adapters). Two engines on one kind of device that serve the same weights have the same digest.

    Args:
        record: of the model.
        handles: known native handles, with the digests of their constructor arguments.
        forget: whether handles that no layer holds are removed from ``handles``.

    Returns:
        None when a native handle is unknown or its arguments were not hashed (``digest=False``), or when a
        value cannot be hashed. The latter is logged and does not raise, because the new weights are served
        already.

    """
    builder = _DigestBuilder(handles, record.late_bound)
    try:
        for layer in record.layers:
            if not layer.has_keys:
                continue
            alive = [(holder, held) for holder in layer.holders if (held := holder.ref()) is not None]
            own = {id(held) for _, held in alive}
            for holder, held in alive:
                builder.add_holder(f"{layer.name}.{holder.path}", holder, held, own)
        return builder.close(forget)
    except Exception as error:  # noqa: BLE001 - tensors of any kind; no digest is worth a failed reload
        logger.warning("What is served has no digest: %s: %s", type(error).__name__, error)
        return None


class _DigestBuilder:
    """Hashes one model, each tensor's values once."""

    def __init__(self, handles: Handles, late: LateBound) -> None:
        self._late = late
        self._total = Hash()
        self._handles = handles
        self._found: set[int] = set()
        self._known = True
        """Whether the arguments of every native handle so far are hashed."""
        self._seen: dict[tuple[object, ...], str] = {}

    def close(self, forget: bool) -> str | None:
        """The digest, or None where a native handle is unknown. Removes unused handles if ``forget``."""
        for gone in self._handles.keys() - self._found if forget else ():
            del self._handles[gone]
        return self._total.digest().hex() if self._known else None

    def add_holder(self, path: str, holder: HolderRecord, held: object, others: Collection[int] = ()) -> None:
        """Hash what a holder holds, except ``others`` (by identity): helper objects that are hashed
        separately.
        """
        if not holder.keys:
            return
        tables = tables_of(held)
        for key in holder.keys:
            kind, name = key
            if self._late.is_late(held, name):
                continue
            value = tables[kind].get(name, ABSENT)
            if holds_nothing(type(value)):
                if isinstance(value, (bool, int, float)):
                    self._total.add_text(f"{path}.{name} {value!r};")
                continue
            if id(value) in others:
                continue
            if not holder.is_bound_late(key, value):
                self._add(f"{path}.{key[1]}", value)

    def _add(self, path: str, value: object) -> None:
        for found in (value,) if isinstance(value, torch.Tensor) else reachable(value):
            if isinstance(found, torch.Tensor):
                self._total.add_text(f"{path};")
                if not self._is_handle(found):
                    self._add_tensor(path, found)
            elif owns_native(found):
                held = [part for part in values_of(found) if isinstance(part, torch.Tensor)]
                self._known &= any(self._is_handle(tensor) for tensor in held)

    def _is_handle(self, tensor: torch.Tensor) -> bool:
        handle = handle_in(tensor)
        if handle is None or handle not in self._handles:
            return False
        made_of = self._handles[handle]
        self._found.add(handle)
        self._known &= made_of is not None
        self._total.add_digest(made_of or b"")
        return True

    def _add_tensor(self, path: str, tensor: torch.Tensor) -> None:
        stored = storage_id(tensor) if tensor.numel() else None
        place = (stored, tensor.data_ptr(), form_of(tensor)) if stored else None
        before = self._seen.setdefault(place, path) if place is not None else path
        if before != path:
            self._total.add_text(f"as {before};")
        else:
            self._total.add_tensor(tensor)
