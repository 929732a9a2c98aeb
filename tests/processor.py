"""What vLLM's CPU build can do on the processor at hand. It comes in several: with AVX-512 and without."""

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tests.zoo import Case


@functools.cache
def has_operator(name: str) -> bool:
    """Whether vLLM's library of kernels has an operator; the one without AVX-512 has no INT4 weights."""
    if not name:
        return True
    import vllm._custom_ops  # noqa: F401  loads the library

    return hasattr(torch.ops._C, name)


def skip_without(operator: str) -> None:
    """Skip the test at hand where vLLM's kernels lack an operator that it needs."""
    if not has_operator(operator):
        import pytest  # benchmarks use this file too, without it

        pytest.skip(f"vLLM's kernels for this processor have no {operator}")


@functools.cache
def packs_bf16() -> bool:
    """Whether oneDNN takes bf16 weights. Where the processor does not multiply them, vLLM leaves them as they
    come: processing has no effect on linear layers then, there are no native handles, and vLLM's own reload
    gets tied embeddings right.
    """
    if not has_operator("create_onednn_mm_handler"):
        return False
    try:
        handle = torch.ops._C.create_onednn_mm_handler(torch.ones(32, 32, dtype=torch.bfloat16).t(), 1)
    except RuntimeError:
        return False
    torch.ops._C.release_dnnl_matmul_handler(handle)
    return True


@functools.cache
def packs_with_amx() -> bool:
    """Whether vLLM packs linear layers for AMX, by kernels that keep the packed weight as a tensor in a
    closure: there are no native handles then.
    """
    return bool(torch.cpu._is_amx_tile_supported()) and has_operator("convert_weight_packed")


def minor_of_vllm() -> str:
    """The installed minor version of vLLM: ``0.32``."""
    from reload_plugin import vllm_api

    return vllm_api.name_of(vllm_api.minor_of(vllm_api.version()))


def skip_unstartable(case: "Case") -> None:
    """Skip the test at hand where the installed vLLM cannot start a case on a CPU."""
    import pytest

    if reason := case.unstartable.get(minor_of_vllm()):
        pytest.skip(f"vLLM {minor_of_vllm()} cannot start {case.name} on a CPU: {reason}")
