"""Processing that keeps a parameter's object and changes what is in it is an effect like any other.

vLLM from 0.33 on does so in most of its methods; the stand-ins here do it on any version.
"""

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import nn

from reload_plugin import reload_weights, vllm_api
from reload_plugin.errors import PartialUpdateError
from reload_plugin.record.model_record import Group, ModelRecord, record_of
from tests.transaction.test_session import A, B, Method, Model, cold, identities, registered, values  # noqa: F401 - a fixture among them

MINOR = vllm_api.minor_of(vllm_api.version())

pytestmark = pytest.mark.usefixtures("registered")


@torch.library.custom_op("reload_plugin_tests::double_in_place", mutates_args={"weight"})
def double_in_place(weight: torch.Tensor) -> None:
    weight.mul_(2)


class Copying(Method):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data.copy_(layer.weight.data.flip(0))


class Rebinding(Method):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data = layer.weight.data * 2


class Retyping(Method):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data = layer.weight.data.to(torch.float64)


class Transposing(Method):
    """The same memory, seen the other way round."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data = layer.weight.data.t()


class Writing(Method):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        torch.mul(layer.weight.data, 3, out=layer.weight.data)


class Filling(Method):
    """Through a view of a part."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data[1:, :2].view(-1, 2).add_(layer.weight.data[:1, :2])


class Calling(Method):
    """An operator of somebody's own, whose schema says what it writes to."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        double_in_place(layer.weight.data)


class Together(Method):
    """A list of tensors."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        torch._foreach_add_([layer.weight.data], 1.0)


class Reading(Method):
    """Leaves everything as it is."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert layer.weight.data.abs().sum() > 0


CHANGING = (Copying, Rebinding, Retyping, Transposing, Writing, Filling, Calling, Together)


def record(model: nn.Module) -> ModelRecord:
    found = record_of(model)
    assert found is not None
    return found


def group_of(model: nn.Module, tensor: str = "first.weight") -> Group:
    return record(model).group_with(tensor)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("method", CHANGING)
def test_it_is_an_effect(method: type[Method], trace: bool) -> None:
    model = cold(lambda: Model(method), A, trace)
    group = group_of(model)
    assert group.effect
    assert not group.plain
    assert not group.needs_no_processing


@pytest.mark.parametrize("method", [Method, Reading])
def test_processing_that_changes_nothing_has_none(method: type[Method]) -> None:
    group = group_of(cold(lambda: Model(method), A))
    assert not group.effect
    assert group.plain


@pytest.mark.parametrize("policy", ["host", "streaming"])
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("method", CHANGING)
def test_a_reload_equals_a_start_and_nothing_moves(method: type[Method], trace: bool, policy: str) -> None:
    def make() -> nn.Module:
        return Model(method)

    model = cold(make, A, trace)
    before = identities(model)
    for checkpoint in (A, B, B, A):
        reload_weights(model, iter(checkpoint.items()), policy=policy)
        assert values(model) == values(cold(make, checkpoint, trace))
        assert identities(model) == before


# --- values that the constructor computed and no checkpoint has ---


class Table(nn.Module):
    """Too many values to keep a copy of, unless processing changes them."""

    def __init__(self, change: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.quant_method = Processed(change)
        self.weight = nn.Parameter(torch.empty(4, 3), requires_grad=False)
        self.register_buffer("table", torch.arange(40_000.0).sin())


class Processed(Method):
    def __init__(self, change: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.change = change

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.change(layer)


def scale_in_place(layer: nn.Module) -> None:
    layer.table.mul_(2)
    layer.table.mul_(layer.weight.data.sum())


def scale_by_other_data(layer: nn.Module) -> None:
    layer.table.data = layer.table.data * 2 * layer.weight.data.sum()


class WithTable(Model):
    change: Callable[[nn.Module], None]

    def __init__(self) -> None:
        super().__init__(Method)
        self.first = Table(type(self).change)


@pytest.mark.parametrize("change", [scale_in_place, scale_by_other_data])
@pytest.mark.parametrize("trace", [False, True])
def test_values_of_the_constructor_are_processed_once_and_not_again(
    change: Callable[[nn.Module], None], trace: bool
) -> None:
    made = type("WithThisTable", (WithTable,), {"change": staticmethod(change)})
    model = cold(made, A, trace)
    before = identities(model)
    for checkpoint in (A, B, A):
        reload_weights(model, iter(checkpoint.items()))
        assert values(model) == values(cold(made, checkpoint, trace))
        assert identities(model) == before


# --- a part of a layer ---


class Normalising(Method):
    """Divides by the largest value: weights that are normalised already come out as they are."""

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        layer.register_parameter("weight", nn.Parameter(torch.empty(4, 3), requires_grad=False))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data.div_(layer.weight.data.abs().max())


class Halves(Model):
    """The rows of the first layer come as two weights."""

    def __init__(self) -> None:
        super().__init__(Normalising)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.startswith("first."):
                    start = 0 if name == "first.upper" else 2
                    self.first.weight.data[start : start + 2].copy_(tensor)
                else:
                    yield name, tensor

        return super().load_weights(others())


def halved(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    upper, lower = checkpoint["first.weight"].split(2)
    return {"first.upper": upper, "first.lower": lower, "lm_head.weight": checkpoint["lm_head.weight"]}


def test_a_part_of_a_layer_that_is_processed_in_place_is_not_mixed_with_processed_values() -> None:
    """A rehearsal on what is served would see no change, so only the recorded effect tells."""
    model = cold(Halves, halved(A))
    served = values(model)
    with pytest.raises(PartialUpdateError, match="first"):
        reload_weights(model, iter([("first.upper", 9 * B["first.weight"][:2])]), partial=True)
    assert values(model) == served


# --- what comes last ---


class Absorbing(Model):
    """The model's own hook writes into a layer that was processed before."""

    def __init__(self) -> None:
        super().__init__(Copying)

    def process_weights_after_loading(self) -> None:
        self.first.weight.data.add_(self.lm_head.weight.data)


@pytest.mark.skipif(MINOR < (0, 27), reason="vLLM calls no hook of the model")
def test_what_the_models_hook_writes_to_is_taken_after_it() -> None:
    model = cold(Absorbing, A)
    assert group_of(model).late
    assert not group_of(model, "lm_head.weight").late
    for checkpoint in (B, A):
        reload_weights(model, iter(checkpoint.items()))
        assert values(model) == values(cold(Absorbing, checkpoint))
