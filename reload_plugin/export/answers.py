"""What a worker answers to a call by name: a report as JSON, or an error that keeps its class.

Executors and HTTP routes pass on the text of an exception at best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel

from .. import errors
from ..errors import ExportError, ReloadError

_FAILED = "failed"


def told(call: Callable[[], BaseModel | None]) -> dict[str, Any] | None:
    """The report of a call as JSON; if it raised an error of this package, that."""
    try:
        report = call()
    except ReloadError as error:
        tensors = error.tensors if isinstance(error, ExportError) else {}
        return {_FAILED: type(error).__name__, "message": str(error), "tensors": tensors}
    return None if report is None else report.model_dump(mode="json")


def reports_in(answers: Iterable[Any]) -> list[dict[str, Any]]:
    """The reports in the answers of all ranks.

    Raises:
        ReloadError: of the class that a rank raised; where others failed because of it, that of its own.

    """
    found = [answer for answer in answers if answer is not None]
    failed = [answer for answer in found if _FAILED in answer]
    for answer in sorted(failed, key=lambda answer: answer[_FAILED] == errors.RanksDisagreeError.__name__):
        cls = getattr(errors, str(answer[_FAILED]), ReloadError)
        if cls is ExportError:
            raise ExportError(answer["message"], answer["tensors"])
        raise cls(answer["message"])
    return found
