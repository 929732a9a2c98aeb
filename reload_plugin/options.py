"""How a caller wants a reload done: the policy, what is checked, what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ReloadError

ReloadPolicy = Literal["auto", "host", "spill", "reread", "streaming"]
"""What a failure costs, and what the way back costs. All but ``streaming`` are all or nothing.

=============  ==========================================================  ============================
policy         where the old generation is until the new one is whole      extra memory at the peak
=============  ==========================================================  ============================
``host``       served; the new one is prepared beside it, then committed   one kernel-format copy, one layer
``spill``      in its own source; the new weights go to a file first       one layer (and disk for the file)
``reread``     in its own source; the new weights are in files already     one layer
``streaming``  nowhere: after a failure the engine refuses to serve        one layer
``auto``       ``reread`` where both are in files; else ``host`` if there is memory for it, else ``spill``
=============  ==========================================================  ============================

One layer means its staging and a fixed budget of 128 MiB.
"""


Wanted = bool | Literal["later"]
"""True hashes in the reload, for its report; ``later`` leaves all to who asks for the status but what native
handles are made of; False hashes nothing.
"""


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


OPTION_NAMES = frozenset(ReloadOptions.model_fields)


def options(**given: object) -> ReloadOptions:
    """Checked options.

    Raises:
        ReloadError: an option that does not exist, or a value it cannot have.

    """
    try:
        return ReloadOptions(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ReloadError(
            f"These options of a reload cannot be: {wrong}. Options are {', '.join(sorted(OPTION_NAMES))}; "
            f"policies are {', '.join(get_args(ReloadPolicy))}. The engine serves what it served before."
        ) from error
