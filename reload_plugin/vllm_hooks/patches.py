"""Replacing functions and methods of vLLM, and putting them back."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

from .. import vllm_api

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Patch:
    """A replaced name of a module or class."""

    owner: Any
    name: str
    original: object
    replacement: object


# One list a process, because what it describes is the process's: modules and classes of vLLM, which all
# engines of a process share. It says nothing of any engine.
_patches: list[Patch] = []
_additions: list[tuple[type, str]] = []
"""(class, name) of methods that were not there before"""


def replace_function(module: str, name: str, wrap: Wrap) -> None:
    """Replace a function in its module and wherever an imported module bound it by name."""
    original = vllm_api.get(module, name)
    replacement = functools.wraps(original)(wrap(original))
    for binder, attribute in list(vllm_api.binders_of(original)):
        _replace(binder, attribute, original, replacement)


def replace_method(module: str, cls: str, name: str, wrap: Wrap) -> None:
    """Replace a method of a class, if vLLM has imported it and it has that method, and only once."""
    owner = getattr(sys.modules.get(module), cls, None)
    if owner is not None and hasattr(owner, name):
        replace_own_method(owner, name, wrap)


def replace_method_of_all(module: str, cls: str, name: str, wrap: Wrap) -> None:
    """As ``replace_method``, and in every subclass that has the method too.

    Ray makes a subclass of an actor's class with copies of all its methods, so a patch of the class itself is
    not seen by actors.
    """
    replace_method(module, cls, name, wrap)
    waiting = list(getattr(sys.modules.get(module), cls).__subclasses__())
    while waiting:
        owner = waiting.pop()
        waiting += owner.__subclasses__()
        if name in vars(owner):
            replace_own_method(owner, name, wrap)


def replace_own_method(owner: type, name: str, wrap: Wrap) -> None:
    """Replace a method that a class has, itself or by inheritance, and only once."""
    if not any(patch.owner is owner and patch.name == name for patch in _patches):
        original = getattr(owner, name)
        _replace(owner, name, original, functools.wraps(original)(wrap(original)))


def _replace(owner: Any, name: str, original: object, replacement: object) -> None:
    setattr(owner, name, replacement)
    _patches.append(Patch(owner, name, original, replacement))


def add_method(owner: type, function: Callable[..., Any]) -> None:
    """Give a class a method under the function's name, unless it has one of that name."""
    name = function.__name__
    if not hasattr(owner, name):
        setattr(owner, name, function)
        _additions.append((owner, name))


def undo_all() -> None:
    """Put back everything that was replaced and take out what was added.

    A name that somebody else has replaced since is left to them: their function calls ours, or does without.
    """
    for patch in reversed(_patches):
        if vars(patch.owner).get(patch.name) is patch.replacement:
            setattr(patch.owner, patch.name, patch.original)
        # Modules that were imported since then bound the replacement by its name.
        for binder, attribute in list(vllm_api.binders_of(patch.replacement)):
            setattr(binder, attribute, patch.original)
    for owner, name in _additions:
        delattr(owner, name)
    _patches.clear()
    _additions.clear()


def patched() -> list[str]:
    """What is patched now, as ``module.name``."""
    return [f"{patch.owner.__name__}.{patch.name}" for patch in _patches]
