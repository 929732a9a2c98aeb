"""The report of a session that committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..device.ops import ops_for
from ..report import ReloadReport
from .caches import CACHES
from .session_parts import SessionParts

if TYPE_CHECKING:
    from .session import ReloadSession


@dataclass(frozen=True)
class ReportFacts:
    """What only the caller of a session knows of the reload."""

    rollback: str | None = None
    """Where the old weights were until the commit; None for where the strategy has them."""
    planned_seconds: float | None = None
    """Seconds of the plan, where there was one to make."""
    kept_by_plan: Mapping[str, str] | None = None
    """Parameter -> rule, of what the plan says no weight comes for; None without a plan: what the last reload
    kept and groups that were complete by name keep again."""
    spilled_bytes: int = 0
    """Bytes that the caller wrote to a file first."""
    sent: int | None = None
    """For a partial update: how many weights came."""


def _place_of_old_values(parts: SessionParts) -> str:
    if parts.strategy.has_undo_log or ops_for(parts.record.target_device).on_host:
        return "host"
    return "none" if parts.strategy.commits_each_group else "device"


def make_report(session: ReloadSession, kept: dict[str, str], ignored: dict[str, str]) -> ReloadReport:
    """What a session did. ``kept`` and ``ignored`` are the account of its slots."""
    parts, facts = session.parts, session.facts
    generation, completeness = parts.state.generation, parts.completeness
    before = facts.kept_by_plan
    if before is None:
        last = parts.state.outcome.kept.items()
        before = {name: rule for name, rule in last if completeness.was_complete_by_name(name)}
    seconds = parts.clock.seconds()
    if facts.planned_seconds is not None:
        seconds["plan"] = facts.planned_seconds
    return ReloadReport(
        source=session.source,
        policy=parts.strategy.name,
        old_generation=facts.rollback or _place_of_old_values(parts),
        tensors=session.loaded.count,
        nbytes=session.loaded.nbytes,
        bytes_read=None if facts.spilled_bytes else parts.intake.destinations.bytes_read,
        replayed=completeness.replayed,
        computed=completeness.computed,
        layers=len(session.touched_groups),
        kept={**before, **kept},
        ignored=ignored,
        moved=tuple(parts.log.moved),
        staging_bytes=parts.gauge.peak,
        seconds=seconds,
        version=generation.version,
        weight_version=session.weight_version,
        digest=generation.digest,
        spilled_bytes=facts.spilled_bytes or parts.screening.spilled_bytes,
        partial=facts.sent is not None,
        companions=0 if facts.sent is None else session.loaded.count - facts.sent,
        caches=CACHES,
    )
