"""The CUDA operations that processing calls, in plain torch, registered under their own names.

A stand-in keeps three properties of the operation it replaces: shapes and dtypes, determinism, and that every
input value matters to the output. Numbers and layouts are not those of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
OVERLOADS = frozenset({"scaled_fp4_quant.out"})  # the operation itself stands before it in the list
_COPRIME = 1_000_003  # a prime, so that multiplying by it permutes the indices of any tensor used here


def permuted(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """The elements in a fixed, scattered order, as new contiguous memory of the given shape."""
    count = tensor.numel()
    order = torch.arange(count, device=tensor.device) * _COPRIME % count
    assert count % _COPRIME, "the stride must not divide the size"
    size = tensor.element_size()
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    flat = tensor.contiguous().view(-1).view(as_integers)
    return flat[order].view(tensor.dtype).view(*(shape or tensor.shape))


def _marlin_repack(
    weight: torch.Tensor, k: int, n: int, bits: int, eight_bit_a: bool = False
) -> torch.Tensor:
    assert weight.numel() * (32 // bits) == k * n, (weight.shape, k, n, bits)
    return permuted(weight, k // 16, n * 16 // (32 // bits))


def _machete_prepack(
    weight: torch.Tensor, a_type: torch.dtype, b_type: int, scales_type: torch.dtype | None
) -> torch.Tensor:
    """Keeps the column-major layout that the kernel asks of its input."""
    return permuted(weight.t()).t()


def to_fp8(values: torch.Tensor) -> torch.Tensor:
    return values.float().clamp(-FP8_MAX, FP8_MAX).to(FP8)


def static_fp8(
    out: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, group_shape: list[int] | None = None
) -> None:
    out.copy_(to_fp8(values.float() / scale))


def dynamic_fp8(out: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:
    scale.copy_((values.float().abs().amax() / FP8_MAX).view(scale.shape))
    static_fp8(out, values, scale)


def token_fp8(
    out: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bound: torch.Tensor | None = None
) -> None:
    scale.copy_(values.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / FP8_MAX)
    static_fp8(out, values, scale)


def _gptq_shuffle(weight: torch.Tensor, bits: int) -> None:
    weight.copy_(permuted(weight))


def _marlin_gemm(
    a: torch.Tensor,
    out: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    *rest: object,
) -> torch.Tensor:
    """A product with the packed bytes taken for numbers: MLA reads kv_b_proj back through this."""
    n, k = rest[-5], rest[-4]
    values = permuted(weight).view(torch.uint8).float()
    dense = values.flatten().repeat_interleave(k * n // values.numel()).view(k, n)
    return (a.float() @ (dense * scales.float().mean())).to(a.dtype)


def _scaled_fp4_quant(
    values: torch.Tensor, scale: torch.Tensor, swizzled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("vLLM writes into memory of its own")


def _scaled_fp4_quant_out(
    values: torch.Tensor,
    scale: torch.Tensor,
    swizzled: bool,
    *,
    output: torch.Tensor,
    output_scale: torch.Tensor,
) -> None:
    """Groups of 16 along the last axis; scales go wherever the padded scale tensor begins."""
    groups = (values.float() * scale.float()).unflatten(-1, (-1, 16))
    peaks = groups.abs().amax(-1)
    codes = (
        (groups / peaks.clamp_min(1e-6).unsqueeze(-1) * 7)
        .round()
        .to(torch.int8)
        .add(8)
        .to(torch.uint8)
        .flatten(-2)
    )
    output.copy_(codes[..., 0::2] | codes[..., 1::2] << 4)
    flat = output_scale.view(torch.uint8).view(-1)
    flat.zero_()[: peaks.numel()] = to_fp8(peaks / peaks.amax() * FP8_MAX).view(torch.uint8).flatten()


_MARLIN_GEMM = (
    "marlin_gemm(Tensor a, Tensor? c, Tensor w, Tensor? bias, Tensor scales, Tensor? a_scales, "
    "Tensor? global_scale, Tensor? zeros, Tensor workspace, int kind, SymInt m, SymInt n, SymInt k, "
    "bool atomic, bool fp32, bool zp_float) -> Tensor"
)
_FP4_OUT = (
    "scaled_fp4_quant.out(Tensor x, Tensor scale, bool swizzled, *, Tensor(a!) output, "
    "Tensor(b!) output_scale) -> ()"
)

_TENSOR_OPS: dict[str, Callable] = {
    "gptq_marlin_repack(Tensor w, SymInt k, SymInt n, int bits, bool a8) -> Tensor": _marlin_repack,
    "awq_marlin_repack(Tensor w, SymInt k, SymInt n, int bits, bool a8) -> Tensor": _marlin_repack,
    "machete_prepack_B(Tensor w, ScalarType a, int b, ScalarType? scales) -> Tensor": _machete_prepack,
    "gptq_shuffle(Tensor(a!) w, int bits) -> ()": _gptq_shuffle,
    _MARLIN_GEMM: _marlin_gemm,
    "scaled_fp4_quant(Tensor x, Tensor scale, bool swizzled) -> (Tensor, Tensor)": _scaled_fp4_quant,
    _FP4_OUT: _scaled_fp4_quant_out,
}


def _capability_ops() -> dict[str, Callable[[int], bool]]:
    """What the compiled library answers about a capability (major * 10 + minor)."""
    return {
        "cutlass_scaled_mm_supports_fp8": lambda capability: capability >= 89,
        "cutlass_scaled_mm_supports_block_fp8": lambda capability: capability >= 90,
        "cutlass_scaled_mm_supports_fp4": lambda capability: capability >= 100,
        "cutlass_group_gemm_supported": lambda capability: capability >= 90,
    }


def register() -> list[torch.library.Library]:
    """Define each operation that the installed vLLM lacks. The returned handles keep them defined."""
    library = torch.library.Library("_C", "FRAGMENT")
    for schema, function in _TENSOR_OPS.items():
        name = schema.split("(")[0]
        if not hasattr(torch.ops._C, name.partition(".")[0]) or name in OVERLOADS:
            library.define(schema)
            library.impl(name, function, "CPU")
    for name, answer in _capability_ops().items():
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}(int capability) -> bool")
            library.impl(name, answer, "CompositeExplicitAutograd")
    return [library]
