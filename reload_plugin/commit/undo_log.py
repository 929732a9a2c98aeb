"""The undo log: old kernel-format values, saved in host memory just before they are overwritten."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..device.host_copies import HostCopies
from ..device.ops import ops_for
from ..device.pinned import PinnedBlocks
from ..record.snapshot import ABSENT, Key, Snapshot, read, write
from .group_commit import Commit, exchange_contents


class UndoLog:
    """What brings the old values of a session's committed groups back.

    Every storage is saved once, whole. The log owns the host memory; it holds the served storages, which stay
    where they are, and attributes that were replaced.

    Args:
        device: that serves.
        blocks: pinned memory of the engine.

    """

    def __init__(self, device: torch.device, blocks: PinnedBlocks) -> None:
        self.nbytes = 0
        """Bytes of host memory."""
        self._device = device
        self.copies = HostCopies(device, blocks)
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Storage (by identity) -> (its bytes, their old values on the host)."""
        self._inverses: list[Callable[[], object]] = []

    def save(self, storage: torch.UntypedStorage) -> None:
        """Queue a copy of a served storage, unless that was done before. Then it may be overwritten by work
        that is queued later on the same stream.
        """
        if storage._cdata in self._saved or not storage.nbytes():
            return
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        # Some attributes of layers are on the CPU (the host's copies of scales).
        kept = whole.clone() if ops_for(storage.device).on_host else self.copies.copy(whole)
        self._saved[storage._cdata] = whole, kept
        self.nbytes += kept.nbytes

    def save_before(self, commit: Commit) -> None:
        """Save everything that a commit is about to change."""
        for served, _ in commit.copies:
            self.save(served.untyped_storage())
        for served, _, _ in commit.moves:
            self._inverses.append(_setting_data(served, served.data))
        for holder, other in commit.exchanges:
            self._inverses.append(_exchanging(holder, other))
        contents: dict[int, Snapshot] = {}
        for holder, key, _ in commit.writes:
            if id(holder) not in contents:
                contents[id(holder)] = read(holder)
            self._inverses.append(_writing(holder, key, contents[id(holder)].get(key, ABSENT)))
        for cell, _ in commit.cells:
            self._inverses.append(_setting_cell(cell, cell.cell_contents))
        for tensor, _, _ in commit.tensor_attributes:
            self._inverses.append(_setting_class(tensor, type(tensor), tensor.__dict__))

    def keep(self) -> None:
        """The new values stay: give the memory back."""
        self.copies.finish(drop=True)
        self._saved, self._inverses = {}, []

    def roll_back(self) -> None:
        """Serve the old values again. Allocates no memory on the device."""
        self.copies.finish()
        with torch.inference_mode(False), torch.no_grad():
            for inverse in reversed(self._inverses):
                inverse()
            for whole, kept in self._saved.values():
                whole.copy_(kept)
        self._saved, self._inverses = {}, []


def _setting_data(tensor: torch.Tensor, data: torch.Tensor) -> Callable[[], object]:
    def undo() -> None:
        tensor.data = data

    return undo


def _exchanging(holder: object, other: object) -> Callable[[], object]:
    return lambda: exchange_contents(holder, other)


def _writing(holder: object, key: Key, before: object) -> Callable[[], object]:
    return lambda: write(holder, key, before)


def _setting_cell(cell: object, content: object) -> Callable[[], object]:
    return lambda: setattr(cell, "cell_contents", content)


def _setting_class(tensor: torch.Tensor, cls: type, attributes: dict[str, object]) -> Callable[[], object]:
    def undo() -> None:
        tensor.__class__ = cls
        tensor.__dict__ = attributes

    return undo
