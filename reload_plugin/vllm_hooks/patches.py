"""Replacing functions and methods of vLLM, and putting them back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from .. import vllm_api

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]

_patches: list[tuple[Any, str, object]] = []
"""(module or class, name, what was there before)"""
_additions: list[tuple[type, str]] = []
"""(class, name) of methods that were not there before"""


def replace_function(module: str, name: str, wrap: Wrap) -> None:
    """Replace a function in its module and wherever vLLM bound it by name."""
    original = vllm_api.get(module, name)
    replacement = functools.wraps(original)(wrap(original))
    for binder, attribute in list(vllm_api.binders_of(original)):
        setattr(binder, attribute, replacement)
        _patches.append((binder, attribute, original))


def replace_method(module: str, cls: str, name: str, wrap: Wrap) -> None:
    """Replace a method of a class, if its module is imported and the method is not replaced already."""
    owner = getattr(sys.modules.get(module), cls, None)
    if owner is None or any(where is owner and what == name for where, what, _ in _patches):
        return
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrap(original)))
    _patches.append((owner, name, original))


def add_method(owner: type, function: Callable[..., Any]) -> None:
    """Give a class a method under the function's name, unless it has one of that name."""
    name = function.__name__
    if not hasattr(owner, name):
        setattr(owner, name, function)
        _additions.append((owner, name))


def undo_all() -> None:
    """Put back everything that was replaced and take out what was added."""
    for module, name, original in reversed(_patches):
        setattr(module, name, original)
    for owner, name in _additions:
        delattr(owner, name)
    _patches.clear()
    _additions.clear()


def patched() -> list[str]:
    """What is patched now, as ``module.name``."""
    return [f"{module.__name__}.{name}" for module, name, _ in _patches]
