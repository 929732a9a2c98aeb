"""What is asked of each row, in the process where vLLM lives. Answers are lists of lines; empty is good."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from tests.engine.gpu_methods import driver, walker
from tests.engine.gpu_methods.rows import NEWER, ROWS, Row

# Tensors that no weight decides, by the last part of their path.
CONSTANT = {
    "cos_sin_cache": "rotary positions",
    "_q_scale": "1.0 where the checkpoint has no such scale",
    "_k_scale": "the same",
    "_v_scale": "the same",
    "_prob_scale": "the same",
    "_k_scale_cpu": "the same",
    "_v_scale_cpu": "the same",
    "weight_shape": "N and K",
    "w13_weight_shape": "N and K of each expert",
    "w2_weight_shape": "N and K of each expert",
    "qzeros": "8 everywhere in a symmetric checkpoint that has none",
    "ab_strides1": "strides of an expert's weight",
    "ab_strides2": "the same",
    "c_strides1": "the same",
    "gemm1_alpha": "constants of the activation function",
    "gemm1_beta": "the same",
    "gemm1_clamp_limit": "the same",
    "expert_substitution_routes": "which experts are constants",
}
CONSTANT_IN = {
    "online nvfp4 experts": {"alpha_or_gscale", "w13_input_scale", "w2_input_scale"},
}

# Whole containers of such tensors, by a part of the path.
CONSTANT_UNDER = {"._cache_permute_indices": "row orders of a kernel's layout"}

# Scales of the KV cache have constant values only where the checkpoint has none.
KV_SCALES = {"_k_scale", "_v_scale", "_k_scale_cpu", "_v_scale_cpu"}


@dataclass(frozen=True)
class Cold:
    """What two cold starts on A and one on B show.

    `repeated`: differences of the two on A. `missing`: expected classes that the model does not hold.
    `same`: tensors that A and B leave equal although a weight should decide them.
    """

    repeated: list[str]
    missing: list[str]
    same: list[str]


@dataclass(frozen=True)
class Warm:
    """Differences from the cold model after each reload, and the tensors that moved during any of them."""

    differences: dict[str, list[str]]
    moved: list[str]


def _row(name: str) -> Row:
    return next(row for row in ROWS + NEWER if row.name == name)


def start() -> None:
    """Called once in the process."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(1)
    driver.start_process()


def start_with_plugin() -> None:
    """The same with the plugin in place before the first model is built."""
    start()
    from reload_plugin.vllm_hooks import plugin

    plugin.register()


def _cold_picture(row: Row, generation: str) -> walker.Picture:
    return walker.take_picture(driver.build(row, generation).model)


def cold(name: str) -> Cold:
    row = _row(name)
    with driver.machine(row):
        one, again, other = (_cold_picture(row, generation) for generation in "AAB")
    names = {state.rsplit(".", 1)[-1] for state in one.states.values() if isinstance(state, str)}
    same = [path for path in walker.unchanged(one, other) if not _constant(row, path)]
    return Cold(walker.differences(one, again), sorted(set(row.expect) - names), sorted(same))


def _constant(row: Row, path: str) -> bool:
    last = re.split(r"[.\[]", path)[-1].rstrip("]")
    if last in KV_SCALES and row.extra:
        return False
    if any(part in path for part in CONSTANT_UNDER):
        return True
    return last in CONSTANT or last in CONSTANT_IN.get(row.name, ())


def warm(name: str) -> Warm:
    """A, then reloads with A, B and A again, each compared with a cold start on the same weights."""
    row = _row(name)
    with driver.machine(row):
        expected = {generation: _cold_picture(row, generation) for generation in "AB"}
        built = driver.build(row, "A")
        before = walker.take_picture(built.model)
        differences, moved = {}, []
        for step, generation in (("A to A", "A"), ("A to B", "B"), ("A to B to A", "A")):
            built.reload(generation)
            after = walker.take_picture(built.model)
            differences[step] = walker.differences(expected[generation], after)
            moved += [f"{step}: {line}" for line in walker.moved(before, after)]
    return Warm(differences, moved)
