"""Values that vLLM makes of weights at the first forward pass, and keeps."""

from __future__ import annotations

from collections.abc import Mapping

LATE_VALUES: Mapping[str, str | None] = {
    "bmm1_scale": None,  # FlashInfer's attention, dense and MLA
    "bmm2_scale": None,
    "o_sf_scale": None,
    "softmax_scale": None,  # TokenSpeed's MLA
    "_combined_gate_weight": "_maybe_fuse_gate_weights",  # experts with a gate for the shared one
    "_stable_full_lm_head_weight": None,  # Gemma 4's drafter, with tensor parallelism
}
"""Attribute that is None until then -> the method without arguments that sets it, where there is one."""
