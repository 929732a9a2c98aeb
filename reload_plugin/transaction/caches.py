"""Caches of an engine that depend on its weights, and what a reload can say about each."""

from __future__ import annotations

CACHES = {
    "prefix": "not reset by the reload; reset_prefix_cache() on the engine drops it",
    "encoder": "not reset by the reload; reset_encoder_cache() on the engine drops it",
    "multimodal": "not reset by the reload; reset_mm_cache() on the engine drops it",
}
"""Caches that depend on the weights of an engine, and what a reload of one model can say about each."""


EMPTIED_BY_RUNNER = {
    "encoder": "emptied in the worker by vLLM's runner; the scheduler still lists what it held: "
    "reset_encoder_cache() on the engine resets both",
}
"""What both of vLLM's runners do after the weights changed."""
