"""Memory that is needed, and memory that there is, before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..device.ops import ops_for
from ..errors import OffloadError

Needs = Mapping[torch.device, int]
"""Device -> bytes that will be allocated there."""
_HOST = torch.device("cpu")


def needs_of(target: torch.device, nbytes: int, largest: int) -> Needs:
    """What it takes to bring values to a device.

    Args:
        target: the device.
        nbytes: of all values that are not there yet.
        largest: bytes of the largest of them, which may exist twice for a moment, and is read on the host.

    """
    if not nbytes:
        return {target: 0}
    return {_HOST: largest, target: nbytes + largest}


_NOTHING_CHANGED = "Nothing was changed. Free memory there, or name another device."


def refuse_if_short(needs: Needs, doing: str, then: str = _NOTHING_CHANGED) -> dict[str, int]:
    """Compare what is needed with what there is, host, device and control group.

    Args:
        needs: see ``Needs``.
        doing: what the memory is for, as the subject of a sentence.
        then: how things stand, and what to do.

    Returns:
        Device -> bytes that are available.

    Raises:
        OffloadError: it does not suffice.

    """
    available = {device: ops_for(device).free_bytes() for device in needs}
    short = [device for device, nbytes in needs.items() if nbytes > available[device]]
    if short:
        lines = [f"{needs[d]:,} bytes on {d}, where {available[d]:,} are available" for d in short]
        raise OffloadError(f"{doing} needs {' and '.join(lines)}. {then}")
    return {str(device): nbytes for device, nbytes in available.items()}
