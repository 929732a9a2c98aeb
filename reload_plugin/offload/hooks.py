"""Accelerate's hooks, and the caches of compressed-tensors, taken off a model and put back as they were.

Accelerate's own ``remove_hook_from_module`` moves values while it removes hooks one by one; here values are
somebody else's matter, and taking off is a few assignments that cannot fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..checkpoint.formats.offloading import hooks_of, is_cache

_FORWARD = ("forward", "_hf_hook", "_old_forward", "_original_forward_func")
_MOVERS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""Methods that ``dispatch_model`` wraps, so that a dispatched model refuses to be moved."""
_MAP = "hf_device_map"


class Dispatch:
    """What makes a model a dispatched one, except for the values: hooks, wrapped methods, the device map.

    Args:
        model: any; one without hooks has nothing to take off.

    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        found = ((name, module, _attributes_of(module)) for name, module in model.named_modules())
        self._modules = {name: (module, saved) for name, module, saved in found if saved}
        self.hooks = sum(
            is_cache(module._parameters) or any(map(_is_accelerates, hooks_of(module)))
            for module, _ in self._modules.values()
        )
        """How many modules have a hook that brings weights or inputs to a device, or a cache."""

    def take_off(self) -> None:
        """Make it an ordinary model. Hooks that are not about devices stay."""
        for module, _ in self._modules.values():
            _take_hooks_off(module)
            for key in _MOVERS:
                _unwrap(module, key)
            module.__dict__.pop(_MAP, None)
            if is_cache(module._parameters):
                _take_cache_off(module)

    def put_back(self) -> None:
        """The same objects in the same places. Tensors of the modules are not touched."""
        for module, saved in self._modules.values():
            if not _is_graph(module):
                module.__dict__.pop("forward", None)
            for key, value in saved.items():
                if key == "forward" and _is_graph(module):
                    type(module).forward = value
                else:
                    module.__dict__[key] = value
        drop_stale_ties(self._model)

    def missing_modules(self) -> list[str]:
        """Names under which the model has other modules by now, or none."""
        present: Mapping[str, nn.Module] = dict(self._model.named_modules())
        return [name for name, (module, _) in self._modules.items() if present.get(name) is not module]


def drop_stale_ties(model: nn.Module) -> None:
    """Let hooks forget which addresses belong to tied weights.

    ``dispatch_model`` notes the addresses that tied weights had on the CPU. When a weight moves to a device,
    that memory is freed, and a weight that is read from a file later may lie there: the hook would take the
    tied weight for it. Hooks note addresses anew in each forward pass.
    """
    fresh: dict[int, Any] = {}
    for module in model.modules():
        for hook in hooks_of(module):
            if getattr(hook, "tied_params_map", None) is not None:
                hook.tied_params_map = fresh


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    """Attributes of an instance that a dispatch adds or replaces; empty for a module that has none."""
    own = module.__dict__
    keys: tuple[str, ...] = tuple(key for key in _MOVERS if _is_wrapper(own.get(key)))
    if "_hf_hook" in own or "_original_forward_func" in own:
        keys += _FORWARD
    keys += (_MAP,)
    if is_cache(module._parameters):
        keys += ("_parameters", "_buffers")
    found = {key: own[key] for key in keys if key in own}
    if "_hf_hook" in own and _is_graph(module):
        found["forward"] = type(module).forward
    return found


def _take_hooks_off(module: nn.Module) -> None:
    own = module.__dict__
    if "_hf_hook" not in own:
        return
    foreign = [hook for hook in hooks_of(module) if not _is_accelerates(hook)]
    if foreign:
        from accelerate.hooks import SequentialHook

        own["_hf_hook"] = foreign[0] if len(foreign) == 1 else SequentialHook(*foreign)
        return
    del own["_hf_hook"]
    if "_old_forward" in own:
        _set_forward(module, own.pop("_old_forward"))


def _take_cache_off(module: nn.Module) -> None:
    """Plain dictionaries of the same names take the place of the caches; the values come from the caller."""
    own = module.__dict__
    for key in ("_parameters", "_buffers"):
        own[key] = dict(own[key].offloaded_values)
    if "_original_forward_func" in own:
        _set_forward(module, own.pop("_original_forward_func").__get__(module))


def _set_forward(module: nn.Module, forward: Any) -> None:
    """Set a forward method; an attribute of the instance only where it is not the class's own."""
    if _is_graph(module):
        type(module).forward = forward
    elif getattr(forward, "__func__", None) is type(module).forward:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def _unwrap(module: nn.Module, key: str) -> None:
    """Take the wrappers of ``dispatch_model`` off a method."""
    method: Any = module.__dict__.get(key)
    if not _is_wrapper(method):
        return
    while _is_wrapper(method):
        method = method.__wrapped__
    if getattr(method, "__func__", None) is getattr(type(module), key, None):
        del module.__dict__[key]
    else:
        module.__dict__[key] = method


def _is_wrapper(method: Any) -> bool:
    code = getattr(method, "__code__", None)
    return (
        code is not None and "dispatch_model.<locals>" in code.co_qualname and hasattr(method, "__wrapped__")
    )


def _is_accelerates(hook: Any) -> bool:
    """Whether a hook moves weights and inputs between devices. Others (casting, a user's own) are none."""
    return any(cls.__name__ in ("AlignDevicesHook", "CpuOffload") for cls in type(hook).__mro__)


def _is_graph(module: nn.Module) -> bool:
    """Modules of ``torch.fx`` have their forward method in a class of their own."""
    return "GraphModuleImpl" in str(type(module))
