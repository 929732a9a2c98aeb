"""What this package calls in vLLM and what differs between its versions, one file a range of versions.

The newest range is the base. Each older range is a subclass of the next newer one and holds what that one
changed, so a range that nobody supports any more goes by deleting its file.
"""

from __future__ import annotations

from ..versions import Minor, minor_of, version
from .newest import Calls

__all__ = ["Calls", "calls", "choose"]

_chosen: Calls | None = None
"""What fits the installed vLLM; one a process, as vLLM is."""


def choose(minor: Minor | None) -> Calls:
    """From now on ``calls`` answers for that version; without one, for the newest."""
    global _chosen
    _chosen = _range_of(minor)()
    return _chosen


def calls() -> Calls:
    """The calls that fit the installed vLLM. Chosen when the plugin is registered, or at the first use."""
    return _chosen or choose(minor_of(version()))


def _range_of(minor: Minor | None) -> type[Calls]:
    from .until_0_24 import CallsUntil024
    from .until_0_25 import CallsUntil025
    from .until_0_26 import CallsUntil026
    from .until_0_27 import CallsUntil027
    from .until_0_29 import CallsUntil029
    from .until_0_30 import CallsUntil030

    last: tuple[tuple[Minor, type[Calls]], ...] = (
        ((0, 24), CallsUntil024),
        ((0, 25), CallsUntil025),
        ((0, 26), CallsUntil026),
        ((0, 27), CallsUntil027),
        ((0, 29), CallsUntil029),
        ((0, 30), CallsUntil030),
    )
    return next((calls for until, calls in last if minor is not None and minor <= until), Calls)
