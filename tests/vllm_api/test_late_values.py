"""Attributes that vLLM's layers set at their first forward pass, found in its sources.

A reload makes those anew that are made of weights, and leaves the others to the runtime. One that is new in a
release has to be looked at: is it made of weights?
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm

from reload_plugin import vllm_api

FOLDERS = ("v1/attention/backends", "model_executor/layers")
FILES = ("model_executor/models/gemma4_mtp.py",)

OF_THE_RUNTIME = {
    (0, 32): {
        "_chunked_prefill_workspace_size",
        "_cp_kv_cache_interleave_size",
        "_empty_topk_weights",
        "_mla_counter_bytes",
        "_noncausal_prefill_wrapper",
        "_prefill_main",
        "_prefill_wrapper",
        "_workspace_buffer",
        "aot_sliding_window",
        "current_group",
        "decode_swa_indices_noncausal",
        "fused_moe_impl",
        "persistent_kv_indices",
        "persistent_physical_to_logical",
        "persistent_rswa_kv_indices",
    },
}
"""Minor version -> lazily set attributes that no weight is in: workspaces, handles, tables of the batch."""


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """Attributes of ``self`` that a statement assigns, and what."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in targets:
            if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                yield target.attr, node.value


def _is_none(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _asked_for_none(node: ast.AST) -> Iterator[str]:
    """Attributes of ``self`` in ``if self.a is None``."""
    for compare in ast.walk(node.test) if isinstance(node, ast.If) else ():
        if isinstance(compare, ast.Compare) and isinstance(compare.ops[0], ast.Is):
            left = compare.left
            if _is_none(compare.comparators[0]) and isinstance(left, ast.Attribute):
                yield left.attr


def lazily_set(text: str) -> set[str]:
    """Attributes that ``__init__`` sets to None, and another method sets where they are None."""
    found: set[str] = set()
    for cls in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)):
        methods = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
        first = [node for method in methods if method.name == "__init__" for node in ast.walk(method)]
        unset = {name for node in first for name, value in _assigned(node) if _is_none(value)}
        for method in methods:
            if method.name in ("__init__", "process_weights_after_loading"):
                continue
            nodes = list(ast.walk(method))
            asked = {name for node in nodes for name in _asked_for_none(node)}
            made = {name for node in nodes for name, value in _assigned(node) if not _is_none(value)}
            found |= unset & asked & made
    return found


@functools.cache
def of_this_version() -> frozenset[str]:
    root = Path(vllm.__file__).parent
    paths = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    paths += [root / file for file in FILES if (root / file).exists()]
    return frozenset().union(*(lazily_set(path.read_text()) for path in paths))


def test_the_search_finds_what_it_is_meant_to() -> None:
    lazy = """
class A:
    def __init__(self):
        self.a: float | None = None
        self.b = None
        self.c = 1
    def forward(self):
        if self.a is None:
            self.a = 2.0
        if self.c is None:
            self.c = 3
"""
    assert lazily_set(lazy) == {"a"}


def test_every_value_that_is_made_anew_is_set_by_a_first_pass() -> None:
    unknown = set(vllm_api.LATE_VALUES) - of_this_version()
    assert unknown <= {"o_sf_scale", "_stable_full_lm_head_weight"}, "set by other conditions than being None"


def test_every_lazily_set_attribute_was_looked_at() -> None:
    minor = vllm_api.minor_of(vllm_api.version())
    if minor not in OF_THE_RUNTIME:
        pytest.skip(f"the attributes of vLLM {vllm_api.version()} have not been looked at")
    assert of_this_version() - set(vllm_api.LATE_VALUES) == OF_THE_RUNTIME[minor]
