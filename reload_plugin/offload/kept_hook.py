"""A hook of Accelerate's whose weights stay in their module and are copied to the execution device to run."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import find_device, send_to_device, set_module_tensor_to_device
from torch import nn

from ..checkpoint.formats.offloading import hooks_of
from .collected import like
from .placement import Placement

_Away = tuple[dict[str, torch.Tensor | None], str, torch.Tensor]
"""A module's dictionary, a name in it, and the tensor that belongs there."""


class KeptHook(AlignDevicesHook):
    """Takes the place of an offloading hook.

    What is kept is a real tensor of its module at rest: the hook has no copy of it. For a forward pass a copy
    on the execution device takes its place, and is dropped afterwards, also when the pass raises; nothing is
    copied back. Where gradients are recorded the copy is a differentiable one, so that they reach the kept
    parameter. On the execution device itself nothing is moved. Other tensors of the hook (those on disk) are
    brought and taken away as before.

    ``offload`` is False where everything is kept: then the modules are as those of any model, for whoever
    asks the hook. ``init_hook`` and ``detach_hook`` move nothing.

    Args:
        hook: the hook whose settings it has.
        kept: name, as the hook's mapping has it, and placement of what stays in its module.
        rest: names of what does not.

    Attributes:
        kept_names: what ``placements`` takes from the module and not from the mapping.

    """

    def __init__(self, hook: AlignDevicesHook, kept: Mapping[str, Placement], rest: Sequence[str]) -> None:
        super().__init__()
        self.__dict__.update(hook.__dict__)
        self.offload = bool(rest)
        self.kept_names = frozenset(kept)
        self._kept = [(place.module, place.attribute, place.is_buffer) for place in kept.values()]
        self._rest = tuple(rest)
        old = getattr(hook, "original_devices", {})
        self.original_devices = {name: old[name] for name in rest if name in old}
        self._away: list[_Away] = []
        self._device: torch.device | None = None
        if not rest:
            self.weights_map = None

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is attached: weights are in place already."""
        own = module.__dict__
        if "_old_forward" in own:
            own["_old_forward"] = _guarded(own["_old_forward"], lambda: self._take_away(module))
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is removed: what is kept stays as it is."""
        self._put_back()
        own = module.__dict__
        if "_old_forward" in own:
            own["_old_forward"] = _unguarded(own["_old_forward"])
        super().detach_hook(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring the weights and the inputs to the execution device."""
        if self.io_same_device:
            self.input_device = find_device([args, kwargs])
        self._put_back()
        self._bring()
        self.tied_pointers_to_remove: set[Any] = set()
        for name in self._rest:
            value = self.weights_map[name]  # type: ignore[index]
            set_module_tensor_to_device(
                module,
                name,
                self.execution_device,
                value=value,
                fp16_statistics=self._maybe_get_fp16_statistics(name, value),
            )
        return send_to_device(args, self.execution_device), send_to_device(
            kwargs, self.execution_device, skip_keys=self.skip_keys
        )

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Drop the copies; bring the output to where the inputs were."""
        self._take_away(module)
        if self.io_same_device and self.input_device is not None:
            output = send_to_device(output, self.input_device, skip_keys=self.skip_keys)
        return output

    def _bring(self) -> None:
        if self.execution_device is None:
            return
        if self._device is None:  # with its index, as tensors have it
            self._device = torch.empty(0, device=self.execution_device).device
        device = self._device
        copies: dict[int, torch.Tensor] = {}
        for held, attribute, tensor in self._tensors():
            if tensor.device == device:
                continue
            if id(tensor) not in copies:
                copies[id(tensor)] = _copy_on(device, tensor)
            self._away.append((held, attribute, tensor))
            held[attribute] = copies[id(tensor)]

    def _tensors(self) -> Iterator[_Away]:
        for module, attribute, is_buffer in self._kept:
            held: Any = module._buffers if is_buffer else module._parameters
            tensor = held.get(attribute)
            if tensor is not None:
                yield held, attribute, tensor

    def _take_away(self, module: nn.Module) -> None:
        self._put_back()
        for name in self._rest:
            set_module_tensor_to_device(module, name, "meta")

    def _put_back(self) -> None:
        while self._away:
            held, attribute, tensor = self._away.pop()
            held[attribute] = tensor


def _copy_on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on another device, of the same class."""
    if type(tensor) is torch.Tensor:
        return tensor.to(device)
    if type(tensor) is nn.Parameter:
        if tensor.requires_grad and torch.is_grad_enabled():
            return tensor.to(device)
        return nn.Parameter(tensor.detach().to(device), requires_grad=tensor.requires_grad)
    return like(tensor, tensor.detach().to(device))


def _guarded(forward: Callable[..., Any], take_away: Callable[[], None]) -> Callable[..., Any]:
    """A forward method after which weights are taken away also if it raises."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except BaseException:
            take_away()
            raise

    run._reload_plugin_guards = forward  # type: ignore[attr-defined]
    return run


def _unguarded(forward: Callable[..., Any]) -> Callable[..., Any]:
    inner: Callable[..., Any] = getattr(forward, "_reload_plugin_guards", forward)
    return inner


def replace_hooks(model: nn.Module, kept: Collection[str], places: Iterable[Placement]) -> int:
    """Put a ``KeptHook`` in the place of every hook that covers something kept; assignments only.

    Args:
        model: its modules show what is kept already.
        kept: full names.
        places: of the model, as they were before.

    Returns:
        How many hooks were replaced.

    """
    covered: dict[int, list[Placement]] = defaultdict(list)
    for place in places:
        for hook in place.hooks:
            covered[id(hook)].append(place)
    replaced = 0
    for at, module in model.named_modules():
        hook = module.__dict__.get("_hf_hook")
        made = hook if hook is None else _replaced(hook, covered, kept, at)
        if made is not hook:
            module.__dict__["_hf_hook"] = made
            replaced += 1
            for single in hooks_of(module):
                if isinstance(single, KeptHook):
                    single.init_hook(module)
    return replaced


def _replaced(hook: Any, covered: Mapping[int, list[Placement]], kept: Collection[str], at: str) -> Any:
    """The hook that takes the place of one of a module's; the hook itself if it keeps nothing."""
    inner = getattr(hook, "hooks", None)
    if inner is not None:
        made = [_replaced(single, covered, kept, at) for single in inner]
        same = all(one is other for one, other in zip(made, inner, strict=True))
        return hook if same else type(hook)(*made)
    start = len(at) + 1 if at else 0
    places = {place.name[start:]: place for place in covered.get(id(hook), ())}
    stay = {name: place for name, place in places.items() if place.name in kept}
    if not stay:
        return hook
    _forget(hook.weights_map, stay)
    return KeptHook(hook, stay, [name for name in places if name not in stay])


def _forget(mapping: Any, names: Iterable[str]) -> None:
    """Let Accelerate's loader drop what the modules hold now. The caller's own dictionary is not changed."""
    prefix = ""
    while hasattr(mapping, "dataset") and hasattr(mapping, "prefix"):
        prefix, mapping = f"{mapping.prefix}{prefix}", mapping.dataset
    dropped = {f"{prefix}{name}" for name in names}
    if hasattr(mapping, "state_dict") and hasattr(mapping, "all_keys"):
        mapping.state_dict = {key: value for key, value in mapping.state_dict.items() if key not in dropped}
        mapping.all_keys = [key for key in mapping.all_keys if key not in dropped]
