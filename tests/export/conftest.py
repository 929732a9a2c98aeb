"""Fixtures of the tests that replace a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from reload_plugin.export import target
from tests.offloaded_saves import scratch_folder


@pytest.fixture
def work() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield Path(folder)


@pytest.fixture(params=["exchanged", "inside"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the folder is replaced: in one step, or file by file where it cannot be exchanged."""
    if request.param == "inside":
        monkeypatch.setattr(target, "_is_mounted", lambda _: True)
    return str(request.param)
