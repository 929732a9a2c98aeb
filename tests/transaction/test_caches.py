"""Caches that depend on the weights: reset when asked, kind by kind, and the report tells how it went."""

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import reload_plugin
from reload_plugin import vllm_api
from reload_plugin.transaction import status as monitor
from tests import oracle
from tests.zoo import case_named

CASE = case_named("llama_tied")
BLOCK = 32
"""Tokens that one block of the KV cache holds."""
PROMPT = list(range(20, 20 + 3 * BLOCK + 5))
"""Three whole blocks, which can be shared, and some tokens more."""
KINDS = ("prefix", "encoder", "multimodal")
NOT_BY_US = "not reset by the reload"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return oracle.write(CASE, tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[object]:
    """Started on B with a prefix cache that is empty."""
    options = {"enable_prefix_caching": True, "block_size": BLOCK, "max_model_len": 4 * BLOCK}
    with oracle.running(CASE, folders["B"], **options) as llm:
        yield llm


Answer = tuple[list[int], list[dict]]


def ask(llm: object) -> tuple[Answer, int]:
    """Tokens and logprobs after `PROMPT`, and how many tokens of it came from the prefix cache."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=5)
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    found = output.outputs[0]
    return (list(found.token_ids), [oracle.plain(p) for p in found.logprobs]), output.num_cached_tokens


@pytest.fixture(scope="module")
def cold_b(engine: object) -> Answer:
    """What the engine answers first of all, on the weights that it was started with."""
    found, cached = ask(engine)
    assert cached == 0
    return found


@pytest.fixture
def on_a(engine: object, cold_b: Answer, folders: dict[str, Path]) -> object:
    """The engine on A, with keys and values of A for `PROMPT` in its prefix cache."""
    assert engine.reset_prefix_cache()
    reload_plugin.reload_engine(engine, str(folders["A"]), reset_caches=("prefix",))
    found, cached = ask(engine)
    assert (cached, found != cold_b) == (0, True)
    assert ask(engine)[1] == 3 * BLOCK
    return engine


def caches(states: list[reload_plugin.ReloadStatus]) -> dict[str, str]:
    """What the report says of each cache."""
    (state,) = states
    return state.report.caches


def test_a_prefix_cache_that_is_reset_gives_the_answer_of_a_cold_start(
    on_a: object, cold_b: Answer, folders: dict[str, Path]
) -> None:
    states = reload_plugin.reload_engine(on_a, str(folders["B"]), reset_caches=("prefix",))
    assert caches(states)["prefix"] == "reset"
    assert caches(reload_plugin.status(on_a)) == caches(states)
    assert ask(on_a) == (cold_b, 0)


def test_a_prefix_cache_that_is_not_reset_goes_on_with_the_old_weights_and_the_report_says_so(
    on_a: object, cold_b: Answer, folders: dict[str, Path]
) -> None:
    states = reload_plugin.reload_engine(on_a, str(folders["B"]))
    assert caches(states)["prefix"].startswith(NOT_BY_US)
    assert "reset_prefix_cache()" in caches(states)["prefix"]
    found, cached = ask(on_a)
    assert cached == 3 * BLOCK
    assert found != cold_b, "the old keys and values answer like the new ones, so nothing here could fail"
    assert on_a.reset_prefix_cache()
    assert ask(on_a) == (cold_b, 0)


def test_a_prefix_cache_that_a_running_request_holds_is_not_said_to_be_reset(
    on_a: object, cold_b: Answer, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM refuses then. The weights are the new ones all the same, and the report gives the reason."""
    from vllm import SamplingParams

    engine = on_a.llm_engine
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    request = engine.add_request("running", {"prompt_token_ids": PROMPT}, params)
    engine.step()
    try:
        with caplog.at_level("WARNING", logger=monitor.logger.name):
            monitor.logger.addHandler(caplog.handler)
            states = reload_plugin.reload_engine(on_a, str(folders["B"]), reset_caches=("prefix",))
    finally:
        monitor.logger.removeHandler(caplog.handler)
        engine.abort_request([request], internal=True)
    said = "not reset: running requests hold parts of it; reset it when they have ended"
    assert caches(states)["prefix"] == caches(reload_plugin.status(on_a))["prefix"] == said
    assert states[0].source == str(folders["B"])
    assert "The prefix cache holds results of the old weights" in caplog.text
    found, cached = ask(on_a)
    assert (cached, found != cold_b) == (3 * BLOCK, True)
    assert on_a.reset_prefix_cache()
    assert ask(on_a) == (cold_b, 0)


# --- kind by kind ---


@pytest.mark.parametrize("asked", [(), *((kind,) for kind in KINDS), KINDS], ids="+".join)
def test_each_kind_is_reset_by_its_own_call_and_no_other(
    asked: tuple[str, ...], engine: object, folders: dict[str, Path]
) -> None:
    called: list[str] = []
    names = {"prefix": "reset_prefix_cache", "encoder": "reset_encoder_cache", "multimodal": "reset_mm_cache"}

    def noting(kind: str) -> Callable[..., object]:
        call = getattr(engine.llm_engine, names[kind])
        return lambda *arguments: called.append(kind) or call(*arguments)

    with patch.multiple(engine.llm_engine, **{names[kind]: noting(kind) for kind in KINDS}):
        states = reload_plugin.reload_engine(engine, str(folders["B"]), reset_caches=asked)
    assert called == list(asked)
    assert {kind for kind, outcome in caches(states).items() if outcome == "reset"} == set(asked)
    assert caches(states).keys() == set(KINDS)


def outputs_of_encoders(llm: object) -> tuple[int, int]:
    """How many the worker holds, and how many the scheduler believes it holds."""
    runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return len(runner.encoder_cache), len(scheduler.encoder_cache_manager.cached)


def pretend_an_encoder_ran(llm: object) -> None:
    """The output of an encoder, in the worker and in the scheduler's list; the model takes text alone."""
    runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
    runner.encoder_cache["image"] = torch.zeros(2)
    llm.llm_engine.engine_core.engine_core.scheduler.encoder_cache_manager.cached["image"] = set()
    assert outputs_of_encoders(llm) == (1, 1)


def test_outputs_of_encoders_are_reset_in_the_worker_and_in_the_scheduler_when_asked(
    engine: object, folders: dict[str, Path]
) -> None:
    pretend_an_encoder_ran(engine)
    states = reload_plugin.reload_engine(engine, str(folders["B"]))
    assert outputs_of_encoders(engine) == (0, 1)
    assert "emptied in the worker" in caches(states)["encoder"]
    assert "the scheduler still lists" in caches(states)["encoder"]
    pretend_an_encoder_ran(engine)
    states = reload_plugin.reload_engine(engine, str(folders["B"]), reset_caches=("encoder",))
    assert outputs_of_encoders(engine) == (0, 0)
    assert caches(states)["encoder"] == "reset"


def test_a_reload_that_no_runner_made_says_that_the_encoders_outputs_are_the_old_ones(
    engine: object, folders: dict[str, Path]
) -> None:
    runner = engine.collective_rpc(lambda worker: worker.model_runner)[0]
    pretend_an_encoder_ran(engine)
    report = reload_plugin.reload_weights(oracle.model_of(engine), weights_path=str(folders["B"]))
    assert outputs_of_encoders(engine) == (1, 1)
    assert all(said.startswith(NOT_BY_US) for said in report.caches.values())
    assert report.caches == caches(reload_plugin.status(engine))
    runner.encoder_cache.clear()
    engine.llm_engine.reset_encoder_cache()


def test_a_reset_that_fails_is_told_and_the_new_weights_are_served(
    engine: object, cold_b: Answer, folders: dict[str, Path]
) -> None:
    """The reload is over by then: an error would say that the old weights are served."""

    def broken() -> None:
        raise RuntimeError("no such cache")

    reload_plugin.reload_engine(engine, str(folders["A"]))
    with patch.object(engine.llm_engine, "reset_mm_cache", broken):
        states = reload_plugin.reload_engine(
            engine, str(folders["B"]), reset_caches=("multimodal", "prefix"), weight_version="B"
        )
    assert caches(states)["multimodal"] == "not reset: RuntimeError: no such cache"
    assert caches(states)["prefix"] == "reset"
    assert (states[0].weight_version, ask(engine)[0]) == ("B", cold_b)


def test_a_cache_that_does_not_exist_is_refused_before_anything_is_reloaded(
    engine: object, folders: dict[str, Path]
) -> None:
    before = reload_plugin.status(engine)[0].version
    with pytest.raises(reload_plugin.ReloadError, match="No cache is called prefixes"):
        reload_plugin.reload_engine(engine, str(folders["A"]), reset_caches=("prefix", "prefixes"))
    assert reload_plugin.status(engine)[0].version == before


@pytest.mark.parametrize(("module", "cls"), vllm_api.RUNNERS)
def test_both_runners_empty_their_outputs_of_encoders_after_a_reload(module: str, cls: str) -> None:
    import importlib
    import inspect

    runner = getattr(importlib.import_module(module), cls)
    assert "self.reset_encoder_cache()" in inspect.getsource(inspect.unwrap(runner.reload_weights))
