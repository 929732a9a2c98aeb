"""What only a GPU shows: CUDA graphs over reloads, FP8 made from bf16 online, experts, addresses.

Not run where there is no CUDA device. Small shapes that the kernels take; the same oracle as on the CPU.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.zoo import Case, case_named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = ("llama", "llama_tied", "mixtral", "qwen2_moe")
GRAPHS = {"enforce_eager": False, "kv_cache_memory_bytes": 256 << 20}
"""Compiled, with CUDA graphs captured at the start and replayed after each reload."""
EAGER = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
FP8 = {"quantization": "fp8"}


def with_options(name: str, **options: object) -> Case:
    """A case of the zoo, started with other options."""
    case = case_named(name)
    return dataclasses.replace(case, engine_kwargs=dict(case.engine_kwargs) | options)


def differences(case: Case, root: Path) -> Iterator[oracle.Difference]:
    """Start on A, reload B, A and B by folder, stream and folder again; each against a cold start."""
    folders = oracle.write(case, root)
    cold = {}
    for letter in "AB":
        with oracle.running(case, folders[letter]) as llm:
            cold[letter] = oracle.snapshot(llm, case)
    with oracle.running(case, folders["A"]) as llm:
        start = oracle.snapshot(llm, case)
        steps = (
            ("B", oracle.reload_from_folder),
            ("A", oracle.reload_from_stream),
            ("B", oracle.reload_from_folder),
        )
        for number, (letter, reload) in enumerate(steps):
            reload(llm, folders[letter])
            now = oracle.snapshot(llm, case)
            yield from oracle.compare_values(f"{number} to {letter}", now, cold[letter])
            yield from oracle.compare_places(f"{number} to {letter}", start, now)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_warm_equals_cold(name: str, mode: dict[str, object], tmp_path: Path) -> None:
    assert list(differences(with_options(name, **mode), tmp_path)) == []


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("mode", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_bf16_checkpoints_become_fp8_again(name: str, mode: dict[str, object], tmp_path: Path) -> None:
    """Online quantization: the trainer sends bf16, the kernels read FP8."""
    assert list(differences(with_options(name, **mode, **FP8), tmp_path)) == []


def test_reloads_leave_no_memory_behind(tmp_path: Path) -> None:
    case = with_options("llama", **GRAPHS)
    folders = oracle.write(case, tmp_path)
    with oracle.running(case, folders["A"]) as llm:
        for letter in "BA":
            oracle.reload_from_stream(llm, folders[letter])
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for letter in "BABABABA":
            oracle.reload_from_stream(llm, folders[letter])
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before
