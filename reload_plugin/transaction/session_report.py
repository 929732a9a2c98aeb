"""The report of a session that committed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..report import ReloadReport

if TYPE_CHECKING:
    from .session import ReloadSession


def make_report(session: ReloadSession, kept: dict[str, str], ignored: dict[str, str]) -> ReloadReport:
    """What a session did; what only its caller knows is added by ``ReportBuilder``."""
    parts = session.parts
    generation = parts.record.generation
    return ReloadReport(
        source=session.source,
        policy=parts.strategy.name,
        tensors=session.loaded.count,
        nbytes=session.loaded.nbytes,
        replayed=parts.completeness.replayed,
        computed=parts.completeness.computed,
        layers=len(session.touched_groups),
        kept=kept,
        ignored=ignored,
        moved=tuple(parts.log.moved),
        staging_bytes=parts.gauge.peak,
        seconds=parts.clock.seconds(),
        version=generation.version,
        weight_version=session.weight_version,
        digest=generation.digest,
        spilled_bytes=parts.intake.spilled_bytes,
    )
