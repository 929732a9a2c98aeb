"""Stand-ins for two optional packages that vLLM looks for before it offers their kernels.

Each is a module tree with the functions that processing calls and, under the names that vLLM checks for,
functions that only a forward pass would call. The latter raise, so that a test which strays there fails.
"""

from __future__ import annotations

import enum
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tests.engine.gpu_methods.operations import permuted


class ActivationType(enum.Enum):
    Gelu, Relu, Silu, Swiglu, Geglu, SwigluBias, Relu2 = range(7)


class RoutingMethodType(enum.IntEnum):
    Default = 0


def _forward_only(name: str) -> Callable:
    def missing(*_: object, **__: object) -> None:
        raise AssertionError(f"{name} belongs to a forward pass, which this test never runs")

    return missing


def _row_order(rows: int) -> torch.Tensor:
    return permuted(torch.arange(rows))


def _row_indices(matrix: torch.Tensor, tile: int = 128, *_: object, **__: object) -> torch.Tensor:
    return _row_order(matrix.shape[0])


def _cached_row_indices(
    cache: dict, matrix: torch.Tensor, tile: int, *_: object, **__: object
) -> torch.Tensor:
    """The real function fills the caller's dictionary too, which then outlives the load."""
    return cache.setdefault((tile, tuple(matrix.shape)), _row_order(matrix.shape[0]))


def _shuffled_rows(matrix: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return matrix[_row_order(matrix.shape[0])]


def _interleaved(scales: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """Flat, as the real function returns it."""
    return permuted(scales).flatten()


def _interleaved_same_shape(weight: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return permuted(weight)


def _packed_scales(
    sf: torch.Tensor,
    mn: int,
    k: int,
    recipe: tuple[int, int, int],
    num_groups: int | None = None,
    **_: object,
) -> torch.Tensor:
    """Exponents of float32 scales, four to an int32, a row for each output, rows fastest in memory."""
    rows = sf.repeat_interleave(recipe[1], dim=-2)[..., :mn, :].contiguous()
    exponents = (rows.view(torch.int32) >> 23).to(torch.uint8)
    padded = torch.nn.functional.pad(exponents, (0, -exponents.shape[-1] % 4)).contiguous()
    return padded.view(torch.int32).mT.contiguous().mT


def _deep_gemm() -> dict[str, dict[str, object]]:
    forward = (
        "fp8_gemm_nt",
        "m_grouped_fp8_gemm_nt_contiguous",
        "m_grouped_fp8_gemm_nt_masked",
        "fp8_einsum",
    )
    return {
        "deep_gemm": {name: _forward_only(name) for name in forward}
        | {
            "transform_sf_into_required_layout": _packed_scales,
            "get_mk_alignment_for_contiguous_layout": lambda: 128,
        }
    }


_TRTLLM = (
    "trtllm_fp8_block_scale_moe",
    "trtllm_fp8_per_tensor_scale_moe",
    "trtllm_fp4_block_scale_moe",
    "trtllm_mxint4_block_scale_moe",
    "trtllm_bf16_moe",
    "cutlass_fused_moe",
)


def _flashinfer() -> dict[str, dict[str, object]]:
    interleave = {"block_scale_interleave": _interleaved, "nvfp4_block_scale_interleave": _interleaved}
    shuffles = dict.fromkeys(("shuffle_matrix_a", "shuffle_matrix_sf_a", "reorder_rows_for_gated_act_gemm"))
    indices = ("get_shuffle_matrix_a_row_indices", "get_reorder_rows_for_gated_act_gemm_row_indices")
    cached = ("_maybe_get_cached_w3_w1_permute_indices", "get_w2_permute_indices_with_cache")
    return {
        "flashinfer": interleave
        | dict.fromkeys(shuffles, _shuffled_rows)
        | {"RoutingMethodType": RoutingMethodType, "fp4_quantize": _forward_only("fp4_quantize")},
        "flashinfer.fp4_quantization": interleave,
        "flashinfer.quantization": {},
        "flashinfer.quantization.fp4_quantization": interleave,
        "flashinfer.utils": dict.fromkeys(indices, _row_indices),
        "flashinfer.fused_moe": {name: _forward_only(name) for name in _TRTLLM}
        | {
            "interleave_moe_weights_for_sm90_mixed_gemm": _interleaved_same_shape,
            "interleave_moe_scales_for_sm90_mixed_gemm": _interleaved_same_shape,
        },
        "flashinfer.fused_moe.core": dict.fromkeys(indices, _row_indices)
        | dict.fromkeys(cached, _cached_row_indices)
        | {"ActivationType": ActivationType},
    }


PACKAGES = {"deep_gemm": _deep_gemm, "flashinfer": _flashinfer}


@contextmanager
def installed(package: str) -> Iterator[None]:
    """Within, the package's modules can be imported and found by `importlib.util.find_spec`."""
    tree = PACKAGES[package]()
    try:
        for name, members in tree.items():
            sys.modules[name] = _module(name, members)
        yield
    finally:
        for name in tree:
            sys.modules.pop(name, None)


def _module(name: str, members: dict[str, object]) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(members)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module
