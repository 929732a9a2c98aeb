"""Options of a reload: the policy, what is checked, what is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import SERVES_OLD, ReloadError

ReloadPolicy = Literal["auto", "device", "host", "spill", "reread", "streaming"]
"""Name of a policy; see ``POLICIES``."""


@dataclass(frozen=True)
class Policy:
    """How a reload is committed, and what the rollback source is until then."""

    name: ReloadPolicy
    strategy: Literal["staged", "streaming", "undo"]
    """Name of the commit strategy; see ``commit.strategies``."""
    rollback: Literal["device", "host", "spill", "reread", "none"]
    """``device``: the served weights stay unchanged until the commit; the results are prepared beside them,
    in memory of the device that serves. ``host``: the served weights are in host memory: they stay unchanged
    where the CPU serves; from a device they are saved just before they are overwritten. ``reread``: the old
    source is read again. ``spill``: the same, and the new weights are written to a file first. ``none``: no
    rollback source; after a failure the engine refuses to serve.
    """
    extra_memory: str
    """Peak extra memory. ``one layer`` means its staging and a fixed budget of 128 MiB."""

    @property
    def needs_rollback_source(self) -> bool:
        """Whether the source of the served weights has to be readable."""
        return self.rollback in ("spill", "reread")

    @property
    def undoes(self) -> bool:
        """Whether the engine serves the old weights after a failure."""
        return self.rollback != "none"


POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("device", "staged", "device", "one kernel-format copy and one layer"),
        Policy("host", "undo", "host", "one layer, and one kernel-format copy in host memory"),
        Policy("spill", "streaming", "spill", "one layer, and disk for the file"),
        Policy("reread", "streaming", "reread", "one layer"),
        Policy("streaming", "streaming", "none", "one layer"),
    )
}
"""The policies that a caller can name. ``auto`` is ``reread`` where the old and the new weights are both in
files. Else, on a CPU, ``host`` if there is memory for it, else ``spill``; on a device ``device`` if there is
memory for it, else ``host``, and never a file."""

POLICY_OF_CPU = Policy("host", "staged", "host", "one kernel-format copy and one layer")
"""What ``device`` and ``host`` mean where the CPU serves: its memory is the host's."""


Wanted = bool | Literal["later"]
"""True computes the digest in the reload, for its report. ``later`` computes it on the first ``status`` call;
the reload hashes only the arguments of native handles. False hashes nothing.
"""


class Together(BaseModel):
    """Several engines that reload together; whoever pushes to all of them makes this, see ``ranks.joint``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str
    """``host:port`` of a TCPStore, where all ranks of all engines vote."""
    reload_id: str
    """Never used again."""
    first: int
    """The number of this engine's first rank among all."""
    replica: int = 0
    """The number of this engine's first replica."""
    names: tuple[str, ...]
    """What to call each rank in messages."""
    seconds: float
    """How long a rank waits for the others, once it is ready."""


class ReloadOptions(BaseModel):
    """Options of one reload; see ``reload_weights``."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    policy: ReloadPolicy = "auto"
    whole_model: bool = False
    partial: bool = False
    check_finite: bool = False
    manifest: Mapping[str, tuple[Sequence[int], torch.dtype]] | None = None
    weight_version: str | None = None
    keep_load_format: Literal["host", "spill"] | None = None
    spill_dir: str | None = None
    digest: Wanted = True
    require_marker: str | None = None
    progress: bool | None = None
    together: Together | None = None


ROAD_OPTIONS = "RELOAD_PLUGIN_OPTIONS"
"""Environment variable: JSON of options for roads that have no arguments (live pushes, layerwise updates,
transfer engines)."""
_OF_ROADS = frozenset({"policy", "check_finite", "keep_load_format", "spill_dir"})


def road_options() -> ReloadOptions:
    """Options from ``RELOAD_PLUGIN_OPTIONS``. The digest is made when asked for: nobody gets the report.

    Raises:
        ReloadError: it is not a JSON object, or not one of options of these roads.

    """
    text = os.environ.get(ROAD_OPTIONS, "")
    try:
        given = json.loads(text) if text else {}
    except ValueError as error:
        raise ReloadError(f"{ROAD_OPTIONS} is not JSON ({error}): {text!r}. {SERVES_OLD}") from error
    if not isinstance(given, dict) or given.keys() - _OF_ROADS:
        raise ReloadError(
            f"{ROAD_OPTIONS} is {text!r}; it has to be a JSON object of {', '.join(sorted(_OF_ROADS))}. "
            f"{SERVES_OLD}"
        )
    return options(**given, digest="later")


OPTION_NAMES = frozenset(ReloadOptions.model_fields)


def options(**given: object) -> ReloadOptions:
    """Checked options.

    Raises:
        ReloadError: an option does not exist or has a value that is not allowed.

    """
    try:
        return ReloadOptions(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ReloadError(
            f"These options are not valid: {wrong}. Options are {', '.join(sorted(OPTION_NAMES))}; "
            f"policies are {', '.join(get_args(ReloadPolicy))}. The engine serves what it served before."
        ) from error
