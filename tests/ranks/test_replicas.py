"""Replicas of one engine (`data_parallel_size=2`): all of them commit a reload, or none does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama_tied"])
def test_replicas_reload_together(tmp_path: Path, case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.replicas", str(tmp_path), case],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    found = json.loads(lines[-1])
    assert found.pop("start") == ["A", "A"]
    version = 0
    for step in ("reload 0", "reload 1", "reload 2"):
        letter, served, told = found.pop(step)
        version += 1
        assert served == [letter] * 2
        assert [(replica, number) for replica, number, _ in told] == [(0, version), (1, version)]
        assert told[0][2] == told[1][2] is not None
    for replica in (0, 1):
        error, served, told = found.pop(f"replica {replica} fails")
        assert f"replica {replica}" in error, error
        assert "the disk is gone" in error
        assert served == ["B", "B"]
        assert [number for _, number, _ in told] == [version] * 2
    letter, served, told = found.pop("afterwards")
    assert served == ["A", "A"]
    assert [number for _, number, _ in told] == [version + 1] * 2
    assert not found
