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
VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads of OpenMP that wait give their core away: the other process of pytest needs it."""
NO_TESTS = 5
"""pytest's exit status where nothing was selected."""


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
        ("tests", ["pytest", *PROCESSES, "-m", "not alone", *arguments]),
        ("tests that need all cores", ["pytest", "-m", "alone", *arguments]),
    )
    statuses = {label: check(str(python), label, command) for label, command in checks}
    harmless = (0, NO_TESTS) if arguments else (0,)
    failed = {label: status for label, status in statuses.items() if status not in harmless}
    if failed:
        print(f"=== FAILED: {', '.join(failed)}", flush=True)
    return next(iter(failed.values()), 0)


def check(python: str, label: str, command: list[str]) -> int:
    """Run one tool of the environment and return its exit status."""
    print(f"=== {label}: {' '.join(command)}", flush=True)
    command = [python, "-m", *command]
    variables = VARIABLES | os.environ
    return subprocess.run(
        command, cwd=environment.ROOT, stdin=subprocess.DEVNULL, env=variables, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
