"""vLLM's own unit tests, without this plugin and with it: every test has to end the same way.

    python -m tests.vllm_own FOLDER

FOLDER holds vLLM's source of the version that is installed: a checkout of its tag, or its source distribution
unpacked, which has the tests too. They run in an environment of their own, made when it is missing (extra
`vllm-tests`). Tests that want a GPU skip themselves; those that want a model of the hub fail, both times.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import environment

FILES = (
    "tests/distributed/test_packed_tensor.py",
    "tests/distributed/test_weight_transfer.py",
    "tests/distributed/test_weight_transfer_m2n.py",
    "tests/distributed/test_weight_transfer_nccl_uid.py",
    "tests/entrypoints/rl/state_transitions/test_sleep.py",
    "tests/entrypoints/rl/weight_transfer/test_offline.py",
    "tests/entrypoints/rl/weight_transfer_metrics/test_weight_operation_metrics.py",
    "tests/model_executor/model_loader/test_checkpoint_weight_patch.py",
    "tests/model_executor/model_loader/test_reload.py",
    "tests/model_executor/test_sleep_mode_tensor_ownership.py",
    "tests/v1/worker/test_gpu_worker_weight_transfer.py",
    "tests/v1/worker/test_sleep_mode_backend.py",
)
"""What they guard: transfer engines, sleep backends, layerwise reload, checkpoint patches."""

RUN = "import sys, pytest, vllm.plugins as p; p.load_general_plugins(); sys.exit(pytest.main(sys.argv[1:]))"
"""vLLM loads its plugins when an engine starts. Most of these tests start none, so it is done first."""


def outcomes(python: Path, source: Path, plugin: bool) -> dict[str, str]:
    """How each test ended: passed, skipped or failed."""
    files = [name for name in FILES if (source / name).exists()]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "outcomes.xml"
        variables = os.environ | {
            "RELOAD_PLUGIN": str(int(plugin)),
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "PYTHONPATH": f"{environment.ROOT}{os.pathsep}{source}",
        }
        pytest = ["-q", "-W", "ignore", "--timeout", "120", "-p", "no:cacheprovider", "-c", os.devnull]
        command = [python, "-c", RUN, *pytest, "--rootdir", source, "--junitxml", said, *files]
        subprocess.run(command, cwd=source, env=variables, stdout=sys.stderr, check=False)
        return {case.get("classname") + "::" + case.get("name"): outcome(case) for case in cases(said)}


def cases(report: Path) -> list[ET.Element]:
    return list(ET.parse(report).iter("testcase"))


def outcome(case: ET.Element) -> str:
    for tag, ended in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if case.find(tag) is not None:
            return ended
    return "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with vLLM's own tests/")
    source = parser.parse_args().source.resolve()
    python = environment.ready_with("vllm-tests")
    without, with_it = (outcomes(python, source, plugin) for plugin in (False, True))
    for label, found in (("without the plugin", without), ("with the plugin", with_it)):
        counted = collections.Counter(found.values())
        print(f"{label}: " + ", ".join(f"{counted[kind]} {kind}" for kind in ("passed", "failed", "skipped")))
    changed = [name for name in sorted({*without, *with_it}) if without.get(name) != with_it.get(name)]
    for name in changed:
        print(f"{name}: {without.get(name)} without, {with_it.get(name)} with")
    print("every test ends the same way" if not changed else f"{len(changed)} tests end another way")
    return 1 if changed or not without else 0


if __name__ == "__main__":
    sys.exit(main())
