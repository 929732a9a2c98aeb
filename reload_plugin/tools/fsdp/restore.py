"""Fill an FSDP model from a checkpoint: each rank reads its own slices, and all ranks are filled or none.

What has to be written is worked out from how FSDP lays a model out; what was read is noted as it is read. A
table of positions holds one against the other: padding is not asked for, and NaN is a value.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ...checkpoint import Source, open_source
from ...ranks.votes import VOTE_TIMEOUT
from .coordinator import Coordinator
from .filling import Filling
from .layout import Rename, drop_gathered, needs_of, targets_of


class RestoreReport(BaseModel):
    """What ``restore_fsdp`` did on one rank."""

    model_config = ConfigDict(frozen=True)

    source: str
    rank: int
    tensors: int
    """Tensors of the checkpoint that this rank holds a part of."""
    elements: int
    """Elements written on this rank; every one that is not padding, each once."""
    bytes_read: int
    bytes_of_ranks: tuple[int, ...]
    """``bytes_read`` of every rank."""
    staged_bytes: int
    """Host memory that held this rank's new values until every rank had its own."""
    whole: dict[str, str]
    """Tensor -> why it was read whole although this rank needs a part of it."""
    missing: tuple[str, ...]
    """Of the model and not in the checkpoint (with ``strict=False``); they kept their values."""
    ignored: dict[str, str]
    """Of the checkpoint -> why it was not used."""
    seconds: float


def restore_fsdp(
    model: nn.Module,
    source: Source | str | Path,
    *,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
    timeout: float = VOTE_TIMEOUT,
    group: Any = None,
) -> RestoreReport:
    """Fill a model wrapped by FSDP1 (``FullyShardedDataParallel``) or FSDP2 (``fully_shard``) in place.

    To be called on every rank of ``group``, outside of ``summon_full_params``. Parameters, and buffers that a
    state dict has, are written where they lie, sharded, replicated or offloaded; but only when every rank has
    read all that it needs. Until then they are as they were, on all ranks. IoVec are read from formats whose
    tensors lie in one piece in a file; of others whole tensors are read, one at a time, and the report says
    so.

    Extra memory, on the host: what this rank holds of the model, in the model's dtypes; and 32 MiB where it
    is cast, or the largest tensor that has to be read whole.

    Args:
        model: on its device already (``to_empty`` a model that was made on meta). Its wrappers do not count
            in names: ``_fsdp_wrapped_module.`` and the like are left out.
        source: a checkpoint that every rank can read, or its path.
        rename: name in the model -> name in the checkpoint.
        strict: False lets weights be missing or unexpected; the report lists them.
        cast: True converts floating values to the model's dtype; else another dtype is an error.
        timeout: seconds that a rank waits for the others.
        group: process group; None for all processes.

    Returns:
        What was read and written here, and how many bytes every rank read.

    Raises:
        WeightsError: weights are missing, unexpected or misshapen, all of them named, on every rank; nothing
            was changed.
        RanksDisagreeError: another rank failed or did not answer; nothing was changed.
        SourceError: the checkpoint cannot be read here; nothing was changed.
        UnsupportedError: parts of the model are laid out in a way that is not known; nothing was changed.
        SessionError: the model's full parameters are summoned; nothing was changed.
        ReloadError: anything else; says what the model holds.

    """
    started = time.perf_counter()
    council = Coordinator(group, timeout)
    filling = council.agree(lambda: _checked(model, source, rename or str, strict, cast))

    def commit() -> None:
        filling.commit()
        drop_gathered(model)

    bytes_of_ranks = council.commit(filling.stage, commit)
    return RestoreReport(
        **filling.counts,
        rank=council.rank,
        bytes_of_ranks=bytes_of_ranks,
        seconds=time.perf_counter() - started,
    )


def _checked(
    model: nn.Module, source: Source | str | Path, rename: Rename, strict: bool, cast: bool
) -> Filling:
    """A restore that fits, with nothing read yet but what is tied."""
    opened = open_source(source) if isinstance(source, (str, Path)) else source
    with torch.no_grad():
        targets = list(targets_of(model, rename))
        filling = Filling(opened, targets, strict, cast)
        filling.check_tied()
        filling.expect(needs_of(model, targets))
    return filling
