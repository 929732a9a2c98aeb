"""Finds the model's state dict in a trainer's file, and strips the names of wrapping modules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ...errors import SHOWN, SourceError
from .values import StoredTensor

Leaf = TypeVar("Leaf")

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What DistributedDataParallel, torch.compile, FSDP1 and activation checkpointing put into names."""

_BESIDE = re.compile(
    r".*(optim|sched|rng|random_state|scaler|dataloader|callback|epoch|global_step).*"
    r"|train_state|loops|steps?|iterations?|args|config|hparams|hyper_parameters|version|amp|lr|loss|metrics",
    re.IGNORECASE | re.DOTALL,
)
"""Entries of a trainer's file that hold no weights."""

_FLAT_OPTIMIZER = re.compile(r"(optim|optimizer|optimizers|lr_scheduler|dataloader|train_state)\.")
"""Names of such entries in a checkpoint that was flattened."""

DEEPEST = 6
"""Dicts inside dicts that are looked into."""


def weights_in(
    tree: Any, leaf: type[Leaf] | tuple[type[Leaf], ...], where: str, within: str | None = None
) -> dict[str, Leaf]:
    """Name -> tensor of the one state dict in ``tree``, with the names that the bare model has.

    Args:
        tree: what was saved: a state dict, or dicts with one in them.
        leaf: class of the tensors.
        where: what messages call it.
        within: dotted path of the dict to take, where there is more than one.

    Raises:
        SourceError: there is none, or more than one, or two names become one.

    """
    found = dict(_candidates(tree, leaf, (), set()))
    if within is not None:
        path = tuple(within.split(".")) if within else ()
        chosen = found.get(path)
        if chosen is None:
            raise SourceError(
                f"{where} holds no weights under {within!r}. It holds {_listed(found) or 'no state dict'}."
            )
        return unwrapped(chosen, where)
    if not found:
        raise SourceError(
            f"{where} holds no weights: no dict of names and tensors is in it, optimizer states aside. Save "
            "the model's state dict."
        )
    if len(found) > 1:
        raise SourceError(
            f"{where} holds more than one set of weights: {_listed(found)}. Save the one to load in a "
            "file of its own, or name it: open_source(path, within=...) is an iterator of its weights."
        )
    return unwrapped(next(iter(found.values())), where)


def unwrapped(weights: Mapping[str, Leaf], where: str) -> dict[str, Leaf]:
    """The weights under the names that the bare model has.

    Raises:
        SourceError: two names become one and are not the same tensor, or the names are those of
            parameters that were flattened into one.

    """
    found: dict[str, Leaf] = {}
    origin: dict[str, str] = {}
    for name, tensor in weights.items():
        if name.rpartition(".")[2] in ("_flat_param", "flat_param") or "_flat_param_" in name:
            raise SourceError(
                f"{where} holds {name}: parameters that FSDP flattened into one, without their names. Save "
                "it with StateDictType.SHARDED_STATE_DICT or FULL_STATE_DICT."
            )
        bare = bare_name(name)
        if bare in found and found[bare] != tensor:
            raise SourceError(
                f"{where} holds {origin[bare]} and {name}, which are both {bare} in the bare model and are "
                "not the same tensor. Save the model without its wrappers."
            )
        found.setdefault(bare, tensor)
        origin.setdefault(bare, name)
    return found


def bare_name(name: str) -> str:
    """A parameter's name without the modules that wrap others."""
    return ".".join(piece for piece in name.split(".") if piece not in WRAPPERS) or name


def _candidates(
    tree: Any, leaf: Any, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each dict that has tensors of its own, with its path, from the outermost inwards."""
    if type(tree) is not dict or id(tree) in seen or len(path) > DEEPEST:
        return
    seen.add(id(tree))
    if "param_groups" in tree:  # an optimizer's
        return
    inside = [
        found
        for name, value in tree.items()
        if type(name) is str and type(value) is dict and not _BESIDE.fullmatch(name)
        for found in _candidates(value, leaf, (*path, name), seen)
    ]
    loose = {
        name: value
        for name, value in tree.items()
        if type(name) is str and isinstance(value, leaf) and not _FLAT_OPTIMIZER.match(name)
    }
    if inside or any(type(value) is dict for value in tree.values()):
        loose = {name: value for name, value in loose.items() if not _BESIDE.fullmatch(name) or "." in name}
    if loose:
        yield path, loose
    yield from inside


def _listed(found: Mapping[tuple[str, ...], Mapping[str, Any]]) -> str:
    texts = [
        f"{'.'.join(path) if path else 'the top level'} ({len(weights)} tensors)"
        for path, weights in found.items()
    ]
    more = f", and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def steps_in(
    tree: Any, path: tuple[Any, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[str, int | StoredTensor]]:
    """(dotted path, number) of the training steps that a trainer's file says it was saved at.

    Optimizers keep the number in a tensor of one element.
    """
    seen = set() if seen is None else seen
    if type(tree) is not dict or id(tree) in seen or len(path) > DEEPEST:
        return
    seen.add(id(tree))
    for name, value in tree.items():
        counts = type(value) is int or (isinstance(value, StoredTensor) and math.prod(value.shape) == 1)
        if counts and name in _STEPS:
            yield ".".join(map(str, (*path, name))), value
        yield from steps_in(value, (*path, name), seen)


_STEPS = frozenset({"step", "steps", "global_step", "global_steps", "iteration", "last_epoch", "_step_count"})
