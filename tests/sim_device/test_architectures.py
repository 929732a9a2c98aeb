"""A few of vLLM's architectures on the simulated device, by every road."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.sim_device.architectures import ROADS, tried
from tests.sim_device.device import SimDevice
from tests.sim_device.models import start
from tests.sim_device.process import on_sim


@pytest.mark.parametrize(
    "name",
    [
        "Gemma3ForCausalLM",
        "GPT2LMHeadModel",
        "BloomForCausalLM",
        "Qwen3MoeForCausalLM",
        "DeepseekV3ForCausalLM",
        "MambaForCausalLM",
        "WhisperForConditionalGeneration",
    ],
)
@on_sim(start)
def test_a_reload_is_a_cold_start_and_moves_nothing(sim: SimDevice, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert tried(name, Path(folder)) == dict.fromkeys(ROADS, "")
