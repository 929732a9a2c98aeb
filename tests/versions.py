"""The core of the tests on every minor version of vLLM, each in an environment of its own.

    python -m tests.versions               # prints the table
    python -m tests.versions --table 0.29  # puts one row into tests/README.md and leaves the others

Run it with the interpreter of `.venv`. Environments are made when they are asked for, and kept.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests import run

import environment  # isort: skip - `tests.run` makes it importable

README = Path(__file__).with_name("README.md")
HEAD = "| vLLM | starts | oracle: own | oracle | roads | updates | survives | command line | symbols | date |"
RULE = "|---" * HEAD.count(" |") + "|"
COLUMNS = {
    "oracle": "test_oracle",
    "roads": "test_roads",
    "updates": "test_transfer_engine",
    "survives": "test_faults",
    "command line": "test_cli",
    "symbols": "test_vllm_contract",
}
"""Column -> the file whose tests it counts."""


def row(minor: str) -> str:
    """One row of the table: tests that passed, of those that ran. Cases that are skipped do not start."""
    python = str(environment.ready_for(minor))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run.check(
            python,
            f"tests on vLLM {minor}",
            [
                "pytest",
                *run.PROCESSES,
                "-m",
                "not alone",
                *run.CORE,
                "-k",
                run.ONE_MODEL,
                f"--junitxml={report}",
            ],
        )
        counts = counted(report)
    skipped = counts["test_oracle", "skipped"]
    starts = f"{len(run.CASES) - skipped} of {len(run.CASES)}"
    cells = [passed_of(counts, module) for module in COLUMNS.values()]
    today = dt.datetime.now(dt.UTC).date().isoformat()
    return f"| {minor} | {starts} | {own(python, minor)} | {' | '.join(cells)} | {today} |"


def counted(report: Path) -> Counter[tuple[str, str]]:
    """(test module, outcome) -> tests, of a report in JUnit's XML."""
    counts: Counter[tuple[str, str]] = Counter()
    for case in ET.parse(report).getroot().iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        outcomes = {child.tag for child in case} & {"failure", "error", "skipped"}
        counts[module, min(outcomes, default="passed")] += 1
    return counts


def passed_of(counts: Counter[tuple[str, str]], module: str) -> str:
    """`right` where all passed, else how many of how many."""
    passed = counts[module, "passed"]
    ran = passed + counts[module, "failure"] + counts[module, "error"]
    return f"{passed}/{ran}" if ran else "–"


def own(python: str, minor: str) -> str:
    """How many of the cases that start vLLM's own reload gets right."""
    from tests.zoo import MOVED, RIGHT, case_named

    cases = [name for name in run.CASES if minor not in case_named(name).unstartable]
    code = (
        "import json, pathlib, sys, tempfile; from tests import oracle\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    found = oracle.run_in_subprocesses(sys.argv[1:], pathlib.Path(folder), plugin=False)\n"
        "    print(json.dumps([result.verdict for result in found]))"
    )
    variables = os.environ | {"RELOAD_PLUGIN": "0"}
    out = subprocess.run(
        [python, "-c", code, *cases],
        cwd=environment.ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    verdicts = re.findall(r"\w+", out.stdout.splitlines()[-1])
    return f"{sum(verdict in (RIGHT, MOVED) for verdict in verdicts)}/{len(cases)}"


def put(rows: dict[str, str], text: str) -> str:
    """The document with these rows in its table; rows of other versions stay."""
    before, found, after = text.partition(HEAD + "\n" + RULE + "\n")
    if not found:
        raise ValueError(f"{README} has no table that begins with {HEAD}")
    lines = after.splitlines(keepends=True)
    old = list(_table_rows(lines))
    kept = {line.split("|")[1].strip(): line for line in old} | {
        minor: line + "\n" for minor, line in rows.items()
    }
    ordered = sorted(kept, key=lambda minor: [int(part) for part in minor.split(".")])
    return before + found + "".join(kept[minor] for minor in ordered) + "".join(lines[len(old) :])


def _table_rows(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield line


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions")
    parser.add_argument("minors", nargs="*", default=[*run.IN_TURN, "0.32"])
    parser.add_argument("--table", action="store_true", help="write the rows into tests/README.md")
    asked = parser.parse_args(arguments)
    if not asked.table:
        print(HEAD, RULE, sep="\n", flush=True)
    for minor in asked.minors:
        started = time.monotonic()
        line = row(minor)
        print(f"{minor}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        if asked.table:
            README.write_text(put({minor: line}, README.read_text()))
        print(line, flush=True)


if __name__ == "__main__":
    main()
