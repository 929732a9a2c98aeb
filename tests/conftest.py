"""The files that take longest run first, so that both processes of pytest end at about the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

LONGEST = (
    "engine/test_oracle.py",
    "test_benchmarks.py",
    "engine/test_frameworks.py",
    "test_examples.py",
    "engine/test_compiled.py",
    "engine/test_models.py",
    "vllm_api/test_vllm_contract.py",
    "checkpoint/test_trainers.py",
    "vllm_hooks/test_worker_and_server.py",
    "checkpoint/test_rank_files.py",
    "engine/test_roads.py",
)
"""Files of more than a hundred seconds each, by `--durations`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """See above; the order within a file stays. `tests/run.py` tells xdist to keep to it."""
    root = Path(__file__).parent
    rank = {root / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
