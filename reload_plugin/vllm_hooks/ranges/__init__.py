"""What calls this package in vLLM and what differs between its versions, one file a range of versions.

The newest range is the base, as in ``vllm_api.ranges``.
"""

from __future__ import annotations

from ...vllm_api import Minor
from .newest import Hooks

__all__ = ["Hooks", "hooks_for"]


def hooks_for(minor: Minor | None) -> Hooks:
    """The hooks that fit a version of vLLM. Chosen once, when the plugin is registered."""
    from .until_0_28 import HooksUntil028
    from .until_0_31 import HooksUntil031

    last: tuple[tuple[Minor, type[Hooks]], ...] = (((0, 28), HooksUntil028), ((0, 31), HooksUntil031))
    return next((hooks for until, hooks in last if minor is not None and minor <= until), Hooks)()
