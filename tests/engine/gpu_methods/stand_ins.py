"""Python functions of vLLM replaced while a row runs, and vLLM's cached answers forgotten before and after.

Triton kernels are the main case: vLLM calls them through Python functions, which are the place to replace.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from vllm.utils import deep_gemm

from tests.engine.gpu_methods import libraries, operations


def scaled_fp8_quant(
    input: torch.Tensor,  # noqa: A002 - called by name
    scale: torch.Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: torch.Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: torch.Tensor | None = None,
    group_shape: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for three operations that the CPU library declares without arguments."""
    out = input.new_empty(input.shape, dtype=operations.FP8) if output is None else output
    if scale is not None:
        operations.static_fp8(out, input, scale)
    elif use_per_token_if_dynamic:
        scale = input.new_empty(input.shape[0], 1, dtype=torch.float32)
        operations.token_fp8(out, input, scale)
    else:
        scale = input.new_empty(1, dtype=torch.float32)
        operations.dynamic_fp8(out, input, scale)
    return out, scale


def downcast_to_mxfp(source: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Groups of 32 along the last axis: a shared power of two, and four bits a value, two values a byte."""
    assert axis in (-1, source.dim() - 1), axis
    groups = source.float().unflatten(-1, (-1, 32))
    exponents = torch.frexp(groups.abs().amax(-1, keepdim=True)).exponent
    codes = (
        (groups * torch.exp2(-exponents.float()) * 7)
        .round()
        .to(torch.int8)
        .add(8)
        .to(torch.uint8)
        .flatten(-2)
    )
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    scales = (exponents.squeeze(-1) + 127).to(torch.uint8)
    return packed, scales, tuple(scales.shape)


PATCHES: dict[str, object] = {
    "vllm._custom_ops.scaled_fp8_quant": scaled_fp8_quant,
    "vllm.model_executor.layers.quantization.utils.mxfp4_utils.downcast_to_mxfp": downcast_to_mxfp,
    "vllm.model_executor.kernels.linear.scaled_mm.cutlass.CUTLASS_BLOCK_FP8_SUPPORTED": True,
}

_ANSWERING = ("vllm.utils", "vllm.model_executor.layers", "vllm.model_executor.kernels", "vllm.platforms")


def forget_answers() -> None:
    """Empty vLLM's caches of questions about the machine, and what it resolved from DeepGEMM."""
    for name, module in list(sys.modules.items()):
        if name.startswith(_ANSWERING):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    for name in [name for name in vars(deep_gemm) if name.startswith("_") and name.endswith("_impl")]:
        setattr(deep_gemm, name, None)
    deep_gemm.DeepGemmQuantScaleFMT._oracle_cache = None


@contextmanager
def stand_ins(packages: tuple[str, ...]) -> Iterator[None]:
    """Within, `PATCHES` are in place and the named packages are installed."""
    with ExitStack() as stack:
        stack.callback(forget_answers)
        for target, value in PATCHES.items():
            stack.enter_context(mock.patch(target, value))
        for package in packages:
            stack.enter_context(libraries.installed(package))
        forget_answers()
        yield
