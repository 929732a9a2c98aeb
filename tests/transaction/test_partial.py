"""Partial updates: only layers that get other weights are loaded, and the rest keeps what it has."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import reload_plugin
from reload_plugin.errors import PartialUpdateError, ReloadError
from reload_plugin.transaction import partial
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.vllm_hooks import plugin
from tests import oracle
from tests.checkpoints import read_tensors
from tests.processor import skip_without
from tests.transaction.test_session import A, B, Hooked, Method, Model, Packing, cold, identities, values
from tests.zoo import case_named

Act = Callable[[nn.Module, torch.Tensor], None]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    """And it stays: an engine that a later module starts in this process would not do it again."""
    plugin.register()


def label(other: nn.Module, weight: torch.Tensor) -> None:
    other.label = float(weight.sum())


def replace_helper(other: nn.Module, weight: torch.Tensor) -> None:
    other.quant_method = type(other.quant_method)()
    other.quant_method.seen = float(weight.sum())


def entangled(base: type[Method], act: Act) -> Callable[[], nn.Module]:
    """A model whose first layer, when it is processed, does something to the other one."""

    class Meddling(base):
        fails = False

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            super().process_weights_after_loading(layer)
            for other in layer.others:
                act(other, layer.weight.data)
            if self.fails:
                raise RuntimeError("after meddling")

    class Entangled(Model):
        def __init__(self) -> None:
            super().__init__(base)
            self.first.quant_method = Meddling()
            self.first.others = (self.lm_head,)
            self.lm_head.others = ()

    return Entangled


def mixture() -> dict[str, torch.Tensor]:
    return A | {"first.weight": B["first.weight"]}


def update(model: nn.Module, **how: object) -> reload_plugin.ReloadReport:
    weights = iter([("first.weight", B["first.weight"])])
    return reload_plugin.reload_weights(model, weights, partial=True, **how)


def keep(model: nn.Module) -> None:
    """The weights as they came stay with the engine."""
    reload_plugin.reload_weights(model, iter(A.items()), keep_load_format="host")


def test_only_layers_that_get_other_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[object] = []
    plain = partial.plan_listing
    monkeypatch.setattr(partial, "plan_listing", lambda *args: traced.append(args) or plain(*args))
    model = cold(lambda: Model(Packing), A)
    keep(model)
    places = identities(model)
    for turn in range(3):
        report = update(model)
        assert len(traced) == 1, f"where weights go is known from the first update on, {turn}"
        assert (report.tensors, report.companions) == (1, 0)
        assert values(model) == values(cold(lambda: Model(Packing), mixture()))
        assert identities(model) == places
    reload_plugin.reload_weights(model, iter(A.items()))
    assert values(model) == values(cold(lambda: Model(Packing), A))


def test_the_models_own_hook_sees_what_changed() -> None:
    model = cold(Hooked, A)
    keep(model)
    assert update(model).tensors == 1
    assert values(model) == values(cold(Hooked, mixture()))
    assert not state_of(model).outcome.has_cross_group_effects


class Sharing(Model):
    """One weight goes to both layers, and each has one of its own."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            half = slice(2, 4) if name == "both" else slice(2)
            for layer in ("first", "lm_head") if name == "both" else (name,):
                getattr(self, layer).weight.data[half].copy_(tensor)
        return set()


def test_a_layer_that_shares_a_weight_with_one_that_changes_is_loaded_too() -> None:
    ours = {name: torch.randn(2, 3) for name in ("first", "lm_head", "both")}
    model = cold(Sharing, ours)
    reload_plugin.reload_weights(model, iter(ours.items()), keep_load_format="host")
    ours["first"] = torch.randn(2, 3)
    report = reload_plugin.reload_weights(model, iter([("first", ours["first"])]), partial=True)
    assert report.companions == 2
    assert values(model) == values(cold(Sharing, ours))


@pytest.mark.parametrize("policy", ["auto", "streaming"])
@pytest.mark.parametrize("act", [label, replace_helper])
def test_layers_that_change_others_are_seen_and_all_are_loaded(act: Act, policy: str) -> None:
    make = entangled(Packing, act)
    model = cold(make, A)
    keep(model)
    places = identities(model)
    for tried in (False, True):
        state = state_of(model)
        assert state.outcome.has_cross_group_effects == tried
        report = update(model, policy=policy)
        state_of(model).before_forward_pass()
        assert report.tensors == len(A)
        assert values(model) == values(cold(make, mixture()))
        assert identities(model) == places


def test_an_update_in_place_that_would_change_other_layers_is_refused() -> None:
    """Nobody has the other layer's weights, so it could not be loaded as well."""
    make = entangled(Method, label)
    model = cold(make, A)
    reload_plugin.reload_weights(model, iter(A.items()), policy="host")
    before = values(model)
    with pytest.raises(PartialUpdateError, match="also changes lm_head"):
        update(model)
    assert values(model) == before
    reload_plugin.reload_weights(model, iter(B.items()))
    assert values(model) == values(cold(make, B))


def test_what_a_failed_update_did_to_other_layers_is_undone() -> None:
    make = entangled(Packing, label)
    model = cold(make, A)
    keep(model)
    before, places = values(model), identities(model)
    type(model.first.quant_method).fails = True
    try:
        with pytest.raises(ReloadError, match="after meddling"):
            update(model)
    finally:
        type(model.first.quant_method).fails = False
    assert values(model) == before
    assert identities(model) == places


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2", "nemotron_h", "w4a16", "meta_experts"])
def test_several_partial_updates_equal_one_whole_update(name: str, tmp_path: Path) -> None:
    case = case_named(name)
    skip_without(case.needs)
    folders = oracle.write(case, tmp_path)
    ours, theirs = read_tensors(folders["A"]), read_tensors(folders["B"])
    drawn = random.Random(name)
    fewest = len(ours)
    with oracle.built(case, folders["A"]) as model:
        for _ in range(2):
            for step in range(4):
                some = {one: theirs[one] for one in drawn.sample(sorted(theirs), 1 + step % 2)}
                ours |= some
                save_file(some, tmp_path / "update.safetensors")
                how = {"weights_path": str(tmp_path / "update.safetensors")} if step == 3 else {}
                report = reload_plugin.reload_weights(
                    model, None if how else iter(some.items()), partial=True, **how
                )
                fewest = min(fewest, report.tensors)
            after = {path: live.digest for path, live in oracle.live_tensors(model).items()}
            whole = reload_plugin.reload_weights(model, iter(ours.items()), keep_load_format="spill")
            assert after == {path: live.digest for path, live in oracle.live_tensors(model).items()}
            assert report.digest == whole.digest, "what native handles were made of"
        assert fewest < len(ours)
        assert not state_of(model).outcome.has_cross_group_effects


def test_a_weight_that_nobody_uses_is_no_companion(tmp_path: Path) -> None:
    case = case_named("llama_tied")
    folders = oracle.write(case, tmp_path)
    unused = "model.layers.0.self_attn.rotary_emb.inv_freq"
    some = {"model.norm.weight": read_tensors(folders["B"])["model.norm.weight"], unused: torch.ones(4)}
    with oracle.built(case, folders["A"]) as model:
        report = reload_plugin.reload_weights(model, iter(some.items()), partial=True)
        companions = report.tensors - len(some)
        assert report.companions == companions >= 0
        assert unused in report.ignored


def test_a_refusal_that_knows_of_no_companions_asks_for_none() -> None:
    """Nothing was reloaded before, and the start left no files: all that is known of the layers came."""
    model = cold(Model, A)
    before = values(model)
    with pytest.raises(reload_plugin.PartialUpdateError, match="Reload once in full with keep") as refused:
        reload_plugin.reload_weights(model, iter(B.items()), partial=True)
    assert "Send these as well" not in str(refused.value)
    assert values(model) == before
