"""Sets everything up and runs every check: `python3 tests/run.py [ARGUMENT OF PYTEST ...]`.

The checks are lint, format, types and tests. All of them run; the exit status is that of the first to fail.
Needs a Python from 3.11 to 3.14 and pip's package index; nothing else.
"""

import os
import subprocess
import sys
from pathlib import Path

if not (3, 11) <= sys.version_info[:2] < (3, 15):
    sys.exit(f"vLLM 0.32 needs a Python from 3.11 to 3.14; this is {sys.version.split()[0]}.")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import environment

PROCESSES = ["-n", str(min(2, os.cpu_count() or 1)), "--dist", "loadfile"]
"""Processes of pytest. Each holds engines of up to 3 GB; the tests of a file share theirs."""
THREADS = {"OMP_NUM_THREADS": "1"}
"""One thread an engine: two threads that wait for each other on a busy machine are ten times slower."""


def main(arguments: list[str]) -> int:
    """Run the checks, pytest last. Nothing follows its closing line unless something failed."""
    try:
        python = environment.ready()
    except environment.SetupError as error:
        sys.exit(f"set-up failed: {error}")
    checks = (
        ("lint", ["ruff", "check"]),
        ("format", ["ruff", "format", "--check"]),
        ("types", ["mypy"]),
        ("tests", ["pytest", *PROCESSES, *arguments]),
    )
    failed = {named[0]: status for named in checks if (status := check(str(python), *named))}
    if failed:
        print(f"=== FAILED: {', '.join(failed)}", flush=True)
    return next(iter(failed.values()), 0)


def check(python: str, label: str, command: list[str]) -> int:
    """Run one tool of the environment and return its exit status."""
    print(f"=== {label}: {' '.join(command)}", flush=True)
    command = [python, "-m", *command]
    variables = THREADS | os.environ
    return subprocess.run(
        command, cwd=environment.ROOT, stdin=subprocess.DEVNULL, env=variables, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
