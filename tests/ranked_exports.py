"""Exports of what two ranks serve together: the bytes of an export from one rank, which are the checkpoint's.

python -m tests.ranked_exports           # every case; one line of JSON each
python -m tests.ranked_exports tied
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import reload_plugin
from tests import exports, oracle, two_ranks
from tests.checkpoints import read_tensors

SMALL = "100KB"
"""Of a file, so that tensors of both ranks lie in one."""
ON_ONE = {"tied": "tied", "experts": "experts", "stages": "tied", "shared_out": "experts"}
"""Each case of ``two_ranks``, and the one that is the same model where one rank holds it."""


@contextlib.contextmanager
def served(kind: str, root: Path, ranks: int) -> Iterator[tuple[Any, Path]]:
    """An engine that was started on A and reloaded with B by an iterator, B's folder gone; and B's copy."""
    case = two_ranks.CASES[ON_ONE[kind] if ranks == 1 else kind]
    folders = oracle.write(case, root / f"{ranks}")
    started = (
        oracle.running(case, folders["A"]) if ranks == 1 else two_ranks.started(case, folders["A"], "mp")
    )
    with started as llm:
        oracle.reload_from_stream(llm, folders["B"])
        kept = root / f"kept-{ranks}"
        folders["B"].rename(kept)
        yield llm, kept


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Each file's."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("model*"))}


def export_one(kind: str, root: Path) -> dict[str, bytes]:
    """What one rank writes."""
    with served(kind, root, 1) as (llm, _):
        reload_plugin.export_checkpoint(llm, root / "one", max_shard_size=SMALL)
    return bytes_of(root / "one")


def check(kind: str, root: Path) -> None:
    """Raises AssertionError if two ranks write anything else than one, or what they write is not served."""
    expected = export_one(kind, root)
    with served(kind, root, 2) as (llm, b):
        report = reload_plugin.export_checkpoint(llm, root / "two", max_shard_size=SMALL)
        assert bytes_of(root / "two") == expected
        weights = read_tensors(b)
        assert exports.differing(read_tensors(root / "two"), weights) == {}
        assert set(report.tiers.values()) <= {"plan", "inverse"}
        assert len(set(report.files.values())) > 2
        assert reload_plugin.verify(llm, root / "two").serves
        check_refused(llm, root)
        assert reload_plugin.verify(llm, root / "two").serves
    with oracle.running(two_ranks.CASES[ON_ONE[kind]], root / "two") as llm:
        assert reload_plugin.verify(llm, b).serves


def check_refused(llm: Any, root: Path) -> None:
    """A rank that cannot write, or serves something else, ends the export of both; nothing is written."""
    before = bytes_of(root / "two")
    assert before
    llm.collective_rpc(spoil_writes, kwargs={"rank": 1})
    found = ""
    try:
        reload_plugin.export_checkpoint(llm, root / "two")
    except reload_plugin.ReloadError as error:
        found = str(error)
    llm.collective_rpc(mend)
    assert "No space is left" in found, found
    assert bytes_of(root / "two") == before
    assert sorted(entry.name for entry in root.glob(".two*")) == []
    reload_plugin.export_checkpoint(llm, root / "two", max_shard_size=SMALL)
    assert bytes_of(root / "two") == before


def spoil_writes(worker: Any, rank: int) -> None:
    """On one rank the disk is full."""

    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    if worker.rank == rank:
        worker.spoiled = mock.patch("reload_plugin.export.planned_files._pwrite", full)
        worker.spoiled.start()


def mend(worker: Any) -> None:
    """The inverse of ``spoil_writes``."""
    if (spoiled := vars(worker).pop("spoiled", None)) is not None:
        spoiled.stop()


def run(kind: str, root: Path, check_it: Callable[[str, Path], None] = check) -> str:
    """What went wrong, with the traceback; empty if nothing did."""
    try:
        check_it(kind, root)
    except BaseException:  # noqa: BLE001 - told to whoever started this
        return traceback.format_exc()
    return ""


def main(kinds: list[str]) -> None:
    """See the module."""
    for kind in kinds or ON_ONE:
        started = time.monotonic()
        root = Path(tempfile.mkdtemp())
        try:
            error = run(kind, root)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        print(json.dumps([kind, round(time.monotonic() - started, 1), error]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
