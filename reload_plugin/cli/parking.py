"""``park`` and ``unpark``: where the weights of a running vLLM server live, over HTTP."""

from __future__ import annotations

import contextlib
from typing import Any

from ..errors import ReloadError
from ..export.answers import reports_in
from ..offload.park import ParkReport
from .server import Pause, Server, ServerError, resume
from .show import FINE, CommandError, as_json, human, waiting


def park(server: Server, pause: Pause, in_json: bool) -> int:
    """``park``: pause the server, then park every rank, or none."""
    server.status()  # says what is wrong where the package is not loaded
    if pause == "none":
        raise CommandError("A parked server cannot serve.", "Give --pause wait, keep or abort.")
    with waiting("pausing"):
        server.post(f"pause?mode={pause}")
    try:
        with waiting("parking"):
            reports = _asked(server, "park_weights")
            if any(report.sleeps for report in reports):
                server.post("sleep?level=1")
    except BaseException:
        with contextlib.suppress(ReloadError):
            server.rpc("unpark_weights")
        resume(server)
        raise
    _show(server, reports, "are in host memory", in_json)
    return FINE


def unpark(server: Server, in_json: bool) -> int:
    """``unpark``: bring the weights of every rank back, then end the pause."""
    server.status()
    with waiting("bringing the weights back"):
        if any(report.sleeps for report in _asked(server, "parked_weights")):
            server.post("wake_up")
        reports = _asked(server, "unpark_weights")
    resume(server)
    _show(server, reports, f"are on {reports[0].device}", in_json)
    return FINE


def _show(server: Server, reports: list[ParkReport], where: str, in_json: bool) -> None:
    if in_json:
        as_json([report.model_dump(mode="json") for report in reports])
        return
    nbytes, seconds = sum(r.nbytes for r in reports), max(r.seconds for r in reports)
    print(f"The weights of {server.url} {where}: {human(nbytes)} moved in {seconds:.1f} s")
    packed = {name for report in reports for name in report.packed}
    if packed:
        print(f"  {len(packed):,} parameters are packed by kernels of the CPU, and no tensor shows them")
    if any(report.written for report in reports):
        print("  they were written to while they were parked, so their source is unknown now")


def _asked(server: Server, method: str, **kwargs: Any) -> list[ParkReport]:
    try:
        return [ParkReport.model_validate(one) for one in reports_in(server.rpc(method, **kwargs))]
    except ServerError as error:
        raise CommandError(
            f"{server.url} could not do it: {error}.",
            "Install the same version of this package there and here; its log says more.",
        ) from error
