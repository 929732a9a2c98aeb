"""Sets everything up and runs every check: `python3 tests/run.py [--vllm MINOR] [ARGUMENT OF PYTEST ...]`.

The checks are lint, format, types and tests. All of them run; the exit status is that of the first to fail.
Without arguments the core of the tests runs on one more minor version of vLLM too, another one each day.
`--vllm 0.29` runs the core of the tests, or the tests that the other arguments name, on that version only.
Needs a Python from 3.11 to 3.14 and pip's package index; nothing else.
"""

import datetime as dt
import os
import subprocess
import sys
import time
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

IN_TURN = ("0.28", "0.29", "0.30", "0.31")
"""Minor versions of vLLM that take turns, a day each. They share the torch of the one that has the suite."""
TURN = "RELOAD_PLUGIN_TEST_TURN"
"""Environment variable: a number that takes the place of the day, for the turn."""
IN_TURN_SECONDS = 1500
"""After so many seconds the tests on the other minor version are ended, with a failure."""
CASES = ("llama", "llama_tied", "qwen3_moe", "deepseek_v2", "gemma3", "w8a8_dynamic", "mamba2", "mixtral")
ROADS = "tests/engine/test_roads.py"
FAULTS = "tests/engine/test_faults.py::test_the_engine_survives_at_every_place"
CORE = (
    "tests/vllm_api/test_vllm_contract.py",
    "tests/vllm_hooks/test_runners.py",
    "tests/vllm_hooks/test_transfer_engine.py",
    "tests/cli/test_cli.py",
    *(f"tests/engine/test_oracle.py::test_warm_equals_cold[{case}]" for case in CASES),
    ROADS,
    FAULTS,
)
"""The core of the tests: symbols, every kind of model once, roads, chunked updates, faults, command line."""
ONE_MODEL = "not (test_roads or test_faults) or (llama_tied and not line)"
"""The roads and the faults on one model, and Ctrl-C not at every line."""


def main(arguments: list[str]) -> int:
    """Run the checks, pytest last. Nothing follows its closing line unless something failed."""
    minor, arguments = _minor_in(arguments)
    try:
        python = environment.ready_for(minor) if minor else environment.ready()
    except environment.SetupError as error:
        sys.exit(f"set-up failed: {error}")
    if minor:
        return _on(str(python), minor, arguments)
    checks = (
        ("lint", ["ruff", "check"]),
        ("format", ["ruff", "format", "--check"]),
        ("types", ["mypy"]),
        ("tests", ["pytest", *PROCESSES, "-m", "not alone", *arguments]),
        ("tests that need all cores", ["pytest", "-m", "alone", *arguments]),
    )
    statuses = {label: check(str(python), label, command) for label, command in checks}
    if not arguments:
        statuses |= _in_turn()
    harmless = (0, NO_TESTS) if arguments else (0,)
    failed = {label: status for label, status in statuses.items() if status not in harmless}
    if failed:
        print(f"=== FAILED: {', '.join(failed)}", flush=True)
    return next(iter(failed.values()), 0)


def _minor_in(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The minor version after `--vllm`, if it is there, and the other arguments."""
    if arguments[:1] != ["--vllm"]:
        return None, arguments
    if len(arguments) == 1:
        sys.exit("--vllm wants a minor version of vLLM: --vllm 0.29")
    return arguments[1], arguments[2:]


def _in_turn() -> dict[str, int]:
    """The core of the tests on the minor version whose turn it is."""
    turn = int(os.environ.get(TURN, dt.datetime.now(dt.UTC).toordinal()))
    minor = IN_TURN[turn % len(IN_TURN)]
    started = time.monotonic()
    print(f"=== vLLM {minor}, whose turn it is ({TURN}={turn}) of {', '.join(IN_TURN)}", flush=True)
    try:
        python = environment.ready_for(minor)
    except environment.SetupError as error:
        print(f"set-up of vLLM {minor} failed: {error}", flush=True)
        return {f"vLLM {minor}": 1}
    left = IN_TURN_SECONDS - (time.monotonic() - started)
    return {f"vLLM {minor}": _on(str(python), minor, [], left)}


def _on(python: str, minor: str, arguments: list[str], seconds: float | None = None) -> int:
    """Tests on another minor version: those that are named, or the core."""
    which = arguments or [*CORE, "-k", ONE_MODEL]
    return check(python, f"tests on vLLM {minor}", ["pytest", *PROCESSES, "-m", "not alone", *which], seconds)


def check(python: str, label: str, command: list[str], seconds: float | None = None) -> int:
    """Run one tool of the environment and return its exit status."""
    print(f"=== {label}: {' '.join(command)}", flush=True)
    command = [python, "-m", *command]
    variables = VARIABLES | os.environ
    try:
        return subprocess.run(
            command,
            cwd=environment.ROOT,
            stdin=subprocess.DEVNULL,
            env=variables,
            check=False,
            timeout=seconds,
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"=== {label}: ended after {seconds:.0f} s", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
