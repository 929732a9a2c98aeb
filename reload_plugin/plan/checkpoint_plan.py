"""Where each checkpoint tensor goes, learnt by running the model's own loader on meta tensors.

Nothing is read and nothing is written: the served weights stay where they are, and a checkpoint that
does not fit is refused here. A plan holds no storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..device.gc_pause import gc_paused
from ..errors import SERVES_OLD, ReloadError, SourceError, weights_error
from ..record.model_record import complete_record_of
from ..record.placement import placement
from .arrivals import Loaded
from .copy_plan import CopyPlan
from .dry_run import DryRun
from .known_checkpoint import KnownCheckpoint
from .mismatches import Mismatches
from .source import TensorInfo


class PlanUnavailableError(Exception):
    """The model's loader looks at values, so it cannot be run on meta tensors.

    Attributes:
        deferred_groups: what was learnt before: names of groups that the loader comes back to.

    """

    def __init__(self, reason: str, deferred_groups: frozenset[str] = frozenset()) -> None:
        super().__init__(reason)
        self.deferred_groups = deferred_groups


@dataclass(frozen=True)
class Plan:
    """What a checkpoint would do to a model."""

    infos: dict[str, TensorInfo]
    order: tuple[str, ...] = field(repr=False)
    """Names in the order in which the layers need them."""
    names_of_group: dict[str, frozenset[str]] = field(repr=False)
    """Group name -> every weight that goes into it; empty for loaders that collect weights first."""
    coverage: dict[str, str]
    """Parameter -> ``whole``, ``part`` or ``none``."""
    copy_plan: CopyPlan | None
    """How to load it without the model's loader; None when the loader has to run."""
    placement: object
    mismatches: Mismatches
    kept: dict[str, str]
    ignored: dict[str, str]
    deferred_groups: frozenset[str] = frozenset()
    """Names of groups that have to stay open until all weights have come, because the loader comes back to
    them."""

    @property
    def staging_bytes(self) -> int:
        """Bytes of the checkpoint, an upper bound of what it needs in load format."""
        return sum(info.meta().nbytes for info in self.infos.values())

    def is_of(self, infos: Iterable[TensorInfo], placement: object) -> bool:
        """Whether the plan was made for exactly these tensors on this placement."""
        return self.placement == placement and list(self.infos.values()) == list(infos)

    def raise_mismatches(self, source: str) -> None:
        """Raise WeightsError with every offender, if there is one."""
        if self.mismatches:
            raise weights_error(source, SERVES_OLD, **vars(self.mismatches))


def make_plan(
    model: nn.Module,
    infos: Iterable[TensorInfo],
    source: str,
    expected: KnownCheckpoint | None = None,
) -> Plan:
    """Trace the model's loader over ``infos``. Touches neither storage nor served weights.

    Args:
        model: a recorded model.
        infos: names, shapes and dtypes of the checkpoint.
        source: what to call it in messages.
        expected: what is known of the checkpoint the engine started with.

    Raises:
        PlanUnavailableError: the loader needs values.

    """
    listed: Sequence[TensorInfo] = list(infos)
    if not listed:
        raise SourceError(f"{source} holds no tensors. {SERVES_OLD}")
    with gc_paused():
        with DryRun(model, expected) as dry_run:
            try:
                dry_run.load([listed])
            except (NotImplementedError, ReloadError) as error:
                raise PlanUnavailableError(str(error), dry_run.deferred_groups) from error
            if any("meta" in reason for reason in dry_run.mismatches.misshapen.values()):
                reason = next(iter(dry_run.mismatches.misshapen.values()))
                raise PlanUnavailableError(reason, dry_run.deferred_groups)
            kept, ignored = dry_run.account()
            coverage, copy_plan = dry_run.coverage(), dry_run.copy_plan()
        if copy_plan is not None and not _does_the_same_alone(model, listed, dry_run.loaded, expected):
            dry_run.loaded.repeatable, copy_plan = False, None
        return _plan(model, listed, dry_run, coverage, copy_plan, kept, ignored)


def _does_the_same_alone(
    model: nn.Module, infos: Sequence[TensorInfo], together: Loaded, expected: KnownCheckpoint | None
) -> bool:
    """Whether the loader, given nothing but one of the weights that take it at each reload, writes what it
    wrote when that one came among all others: it may have had that from elsewhere, like the zeros for biases
    that vLLM's GLM-ASR writes when a part of the model is over and the first weight of the next has come.
    """
    alone = [[info] for info in infos if info.name in together.computed]
    if not alone:
        return True
    with DryRun(model, expected) as dry_run:
        try:
            dry_run.load(alone)
        except (NotImplementedError, ReloadError):
            return False
        return dry_run.loaded.computed == together.computed and not dry_run.mismatches


def _plan(
    model: nn.Module,
    infos: Sequence[TensorInfo],
    dry_run: DryRun,
    coverage: dict[str, str],
    copy_plan: CopyPlan | None,
    kept: dict[str, str],
    ignored: dict[str, str],
) -> Plan:
    record, written = complete_record_of(model), dry_run.loaded.written
    first: dict[str, int] = {}
    members: dict[int, set[str]] = {}
    for info in infos:
        indices = {record.group_of[parameter] for parameter in written.get(info.name, ())}
        first[info.name] = min(indices, default=-1)
        for index in indices:
            members.setdefault(index, set()).add(info.name)
    repeatable = dry_run.loaded.repeatable
    # Layer by layer; but a loader that keeps weights back may be one that minds what comes after what.
    order = sorted(first, key=first.__getitem__) if repeatable else list(first)
    known = {record.groups[index].name: frozenset(members.pop(index)) for index in list(members)}
    return Plan(
        infos={info.name: info for info in infos},
        order=tuple(order),
        names_of_group=known if repeatable else {},
        coverage=coverage,
        copy_plan=copy_plan,
        placement=placement(record),
        mismatches=dry_run.mismatches,
        kept=kept,
        ignored=ignored,
        deferred_groups=dry_run.deferred_groups,
    )
