"""Order of work on a device, whatever stream the caller is on, and when a caller's buffer was read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .ops import DeviceOps, ops_for
from .uploads import Copier


class WorkOrder:
    """Orders the calls of one session, which may come on different streams.

    Args:
        ops: of the device that the session works on.
        staging: tensors over all memory that the session holds on the device now, one for each storage.

    """

    def __init__(self, ops: DeviceOps, staging: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._ops, self._staging = ops, staging
        self._last: torch.Stream | None = None
        self._several = False

    def enter(self) -> None:
        """A call begins: what was queued in earlier calls comes before what this one queues.

        Staging that was allocated on another stream is recorded on this one, so that it is not handed out
        again while this stream uses it.
        """
        now = self._ops.current_stream()
        if now is None:
            return
        if self._last is not None and now != self._last:
            self._several = True
            now.wait_stream(self._last)
            for tensor in self._staging():
                if tensor.device.type != "cpu":  # of weights that vLLM offloads to the host
                    tensor.record_stream(now)
        self._last = now

    def settle(self) -> None:
        """Wait until memory that was used on several streams is not used any more, before it is freed."""
        if self._several:
            self._ops.fence()


class SourceReads:
    """The copies from the weight that came last; its owner may overwrite it after ``wait``.

    Args:
        ops: of the device that weights are copied to.
        copier: copies them.

    """

    def __init__(self, ops: DeviceOps, copier: Copier) -> None:
        self._ops, self._copier = ops, copier
        self._last: torch.Event | None = None

    def note(self, tensor: torch.Tensor) -> None:
        """All copies from ``tensor`` were asked for. Its memory is not handed out again before they are
        done.
        """
        self._copier.sources_read()
        self._last = self._ops.mark_read(tensor)

    def wait(self) -> None:
        """Wait until the copies are done; work that was queued after ``note`` is not waited for."""
        last, self._last = self._last, None
        if last is not None:
            last.synchronize()


def copy_for_later(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the model's loader may keep for as long as it likes: where ``tensor`` is, or in host
    memory where the device has little left.
    """
    # A loader that is a chain of generators keeps two weights, and their layers need memory as well.
    ops = ops_for(tensor.device)
    scarce = not ops.on_host and not tensor.is_meta and ops.free_bytes() < 8 * tensor.nbytes
    return tensor.detach().to("cpu", copy=True) if scarce else tensor.detach().clone()
