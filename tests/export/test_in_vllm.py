"""What ``save_offloaded`` writes starts in vLLM as the checkpoint it was loaded from does."""

from __future__ import annotations

from pathlib import Path

import pytest

from reload_plugin.export.offloaded import save_offloaded
from tests import oracle
from tests.export.placements import PLACEMENTS
from tests.offloaded_saves import quiet
from tests.zoo import case_named


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_save_from_disk_serves_the_same(tmp_path: Path, name: str) -> None:
    quiet()
    case = case_named(name)
    original = oracle.write(case, tmp_path)["A"]
    model = PLACEMENTS["full disk"](original, tmp_path / "scratch")
    report = save_offloaded(model, tmp_path / "out", max_shard_size="100KB")
    assert len(set(report.files.values())) > 5
    assert "converted" in report.tiers.values()
    with oracle.running(case, original, load_format="auto") as llm:
        before = oracle.snapshot(llm, case)
    with oracle.running(case, tmp_path / "out", load_format="auto") as llm:
        assert oracle.compare_values("", oracle.snapshot(llm, case), before) == []
