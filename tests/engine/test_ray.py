"""vLLM's Ray executor on two ranks, in the environment of the frameworks (see `test_frameworks`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import environment

from tests import rank_scenarios


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """What went wrong in each scenario, by model and name; all run in one engine a model."""
    python = environment.ready_with("frameworks")
    done = subprocess.run(
        [python, "-m", "tests.rank_scenarios", str(tmp_path_factory.mktemp("ray")), "--executor", "ray"],
        capture_output=True,
        text=True,
        cwd=environment.ROOT,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    found = {(kind, name): error for kind, name, _, error in lines}
    assert done.returncode == 0, f"{list(found)}\n{done.stderr[-6000:]}"
    return found


EACH = [(kind, scenario.__name__) for kind, chosen in rank_scenarios.RAY.items() for scenario in chosen]


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scenario"), EACH)
def test_with_ray_on_two_ranks(scenarios: dict[tuple[str, str], str], kind: str, scenario: str) -> None:
    assert scenarios[kind, scenario] == ""
