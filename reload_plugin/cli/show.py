"""What a person sees and what a machine reads: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import ReloadError

FINE, NO, TROUBLE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: done, or yes; no (different, does not fit, something is wrong); trouble; Ctrl-C."""

Tick = Callable[[int, int], None]
"""Called with what is done and what there is."""


class CommandError(ReloadError):
    """Something a person can put right.

    Args:
        fact: what is wrong, with its place.
        step: what to do next.

    """

    def __init__(self, fact: str, step: str) -> None:
        super().__init__(f"{fact} {step}")
        self.fact, self.step = fact, step

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.fact, self.step)


def complain(error: BaseException, debug: bool) -> None:
    """One line on stderr that says what is wrong, and one that says what to do. With ``debug``, where."""
    if debug:
        traceback.print_exception(error)
    fact, step = _fact_and_step(error)
    print(f"reload-plugin: {_one_line(fact)}\n  next: {_one_line(step)}", file=sys.stderr)


def _fact_and_step(error: BaseException) -> tuple[str, str]:
    """Errors of this package end in a sentence that says what to do."""
    if isinstance(error, CommandError):
        return error.fact, error.step
    if not isinstance(error, ReloadError):
        fact = f"{type(error).__name__}: {error}"
        return (
            f"this should not have happened: {fact}",
            "Run it again with --debug and report what it prints.",
        )
    text = _one_line(str(error))
    fact, dot, step = text.rstrip().removesuffix(".").rpartition(". ")
    return (fact + ".", step + ".") if dot else (text, "Run it again with --debug to see where.")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def as_json(value: Any) -> None:
    """Print a value for a machine."""
    print(json.dumps(value, indent=2, ensure_ascii=True, default=str))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under headings; in plain columns where stdout is no terminal."""
    if not sys.stdout.isatty():
        cells = [list(map(str, row)) for row in (columns, *rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        for line in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(*columns, box=None, header_style="bold")
    for row in rows:
        shown.add_row(*(Text(str(cell)) for cell in row))
    Console().print(shown)


@contextlib.contextmanager
def progress(what: str, unit_bytes: bool = True) -> Iterator[Tick]:
    """A bar on stderr while something runs, if that is a terminal; else nothing."""
    if not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    counts = DownloadColumn() if unit_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _silent(done: int, total: int) -> None:
    """No bar."""


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A line with the seconds that have passed, on stderr, if that is a terminal."""
    with progress(what, unit_bytes=False):
        yield


def human(nbytes: float) -> str:
    """Bytes with a unit that leaves few digits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
