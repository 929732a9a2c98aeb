"""``export`` and ``verify``: what a running vLLM server serves, over HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..export.answers import reports_in
from ..export.verify import worst
from ..report import ExportReport, VerifyReport
from .server import Server, ServerError, path_on_server
from .show import FINE, NO, CommandError, as_json, human, table, waiting


def export(server: Server, directory: str, options: dict[str, Any], in_json: bool) -> int:
    """``export``: let a server write what it serves to a folder of its machine."""
    place = str(Path(directory).absolute())
    with waiting(f"exporting to {place}"):
        found = _asked(server, "export_checkpoint", directory=place, **options)
    report = ExportReport.model_validate(found[0])
    if in_json:
        as_json(report.model_dump(mode="json"))
        return FINE
    count = len(set(report.files.values()))
    print(
        f"{report.directory}: {report.tensors:,} tensors, {human(report.nbytes)} in {count} files, "
        f"from {report.source}, {report.seconds:.1f} s"
    )
    for tier, number in sorted(Counter(report.tiers.values()).items()):
        print(f"  {number:,} {_TIERS[tier]}")
    if report.omitted:
        print(f"  {len(report.omitted):,} left out, which the model does not use: {_some(report.omitted)}")
    if report.largest_error:
        print(f"  largest error of a dequantized tensor: {max(report.largest_error.values()):.3g}")
    return FINE


_TIERS = {
    "source": "copied from the files that were loaded",
    "kept": "from the copy that was kept",
    "plan": "from parameters that hold them as they were loaded",
    "inverse": "by a proven inverse of the processing",
    "dequantized": "dequantized: not exact",
    "converted": "converted back",
}


def verify(server: Server, checkpoint: str, in_json: bool) -> int:
    """``verify``: exit code 1 where a server serves something else than a checkpoint."""
    path = path_on_server(checkpoint)
    with waiting(f"verifying {path}"):
        found = _asked(server, "verify_checkpoint", path=path)
    report = worst([VerifyReport.model_validate(answer) for answer in found])
    if in_json:
        as_json(report.model_dump(mode="json"))
        return FINE if report.serves else NO
    verdict = "serves" if report.serves else "does not serve"
    print(f"{server.url} {verdict} {path}: {report.equal:,} of {report.tensors:,} tensors are equal")
    rows: list[tuple[object, ...]] = []
    for name, one in report.different.items():
        where = "" if one.first is None else f", first at {list(one.first)}"
        rows.append(("different", name, "" if one.elements is None else f"{one.elements:,} elements{where}"))
    rows += [("not verifiable", name, why) for name, why in report.not_verifiable.items()]
    rows += [("ignored", name, why) for name, why in report.ignored.items()]
    rows += [("layer", name, why) for name, why in report.layers.items()]
    if rows:
        table(("", "name", "what"), rows)
    return FINE if report.serves else NO


def _asked(server: Server, method: str, **kwargs: Any) -> list[Any]:
    """The reports of all ranks, of a call that this package adds to vLLM's workers.

    Raises:
        CommandError: the server has no such call, or it failed there in a way that this package does not
            know.
        ReloadError: what this package raised there.

    """
    server.status()  # says what is wrong where the package is not loaded
    try:
        return reports_in(server.rpc(method, **kwargs))
    except ServerError as error:
        raise CommandError(
            f"{server.url} could not do it: {error}.",
            "Install the same version of this package there and here; its log says more.",
        ) from error


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
