"""Reloads in the engines people run: LoRA, a draft model, separate processes, an HTTP server with curl."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reload_plugin
from reload_plugin import vllm_api
from reload_plugin.record.model_record import record_of
from tests import oracle
from tests.checkpoints import read_tensors
from tests.zoo import case_named

CASE = case_named("llama_tied")
TOKENS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return oracle.write(CASE, tmp_path_factory.mktemp("faces"))


# --- LoRA ---


def write_adapter(folder: Path, config: dict) -> Path:
    """A rank-8 adapter for q_proj and v_proj in PEFT's format."""
    generator = torch.Generator().manual_seed(5)
    width, kv = config["hidden_size"], config["hidden_size"] // 2
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, out in (("q_proj", width), ("v_proj", kv)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, width, generator=generator) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, 8, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


def lora_answers(llm: object, adapter: Path) -> list:
    """Greedy tokens and logprobs, without and with the adapter."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=3, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in oracle.PROMPTS]
    found = []
    for request in (None, LoRARequest("adapter", 1, str(adapter))):
        outputs = llm.generate(prompts, params, lora_request=request, use_tqdm=False)
        found.append(
            [(o.outputs[0].token_ids, [oracle.plain(p) for p in o.outputs[0].logprobs]) for o in outputs]
        )
    return found


def test_with_a_loaded_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["A"] / "config.json").read_text())
    adapter = write_adapter(tmp_path / "adapter", config)
    options = {"enable_lora": True, "max_lora_rank": 8}
    with oracle.running(CASE, folders["A"], **options) as llm:
        on_a = lora_answers(llm, adapter)
        names = [name for name, _ in oracle.model_of(llm).named_parameters()]
        assert any(".base_layer." in name for name in names), "LoRA did not wrap any layer"
        oracle.reload_from_folder(llm, folders["B"])
        warm = lora_answers(llm, adapter)
        assert [name for name, _ in oracle.model_of(llm).named_parameters()] == names
        oracle.reload_from_stream(llm, folders["A"])
        assert lora_answers(llm, adapter) == on_a
    with oracle.running(CASE, folders["B"], **options) as llm:
        assert lora_answers(llm, adapter) == warm
    assert warm[0] != warm[1], "the adapter changes nothing, so this could not fail"
    assert warm != on_a


# --- a draft model ---


def test_the_target_is_reloaded_and_the_draft_is_not(folders: dict[str, Path]) -> None:
    draft = {"model": str(folders["A"]), "num_speculative_tokens": 2, "method": "draft_model"}
    with oracle.running(CASE, folders["A"], speculative_config=draft) as llm:
        model = llm.collective_rpc(lambda worker: worker.model_runner.drafter.model)[0]
        assert record_of(model) is not None
        assert model is not oracle.model_of(llm)
        before = oracle.live_tensors(model)
        on_a = oracle.answer(llm)
        oracle.reload_from_folder(llm, folders["B"])
        warm = oracle.answer(llm)
        after = oracle.live_tensors(model)
        assert {p: (t.digest, t.address) for p, t in before.items()} == {
            p: (t.digest, t.address) for p, t in after.items()
        }
    with oracle.running(CASE, folders["B"], speculative_config=draft) as llm:
        assert oracle.differing_answers(warm, oracle.answer(llm)) == []
    assert oracle.differing_answers(warm, on_a)


def test_a_push_reaches_target_and_draft_each_for_itself(folders: dict[str, Path]) -> None:
    """As checkpoint-engine does: both in one RPC, both processed with the config of the target."""

    def push(worker: object, folder: str) -> None:
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        runner = worker.model_runner
        weights = list(read_tensors(Path(folder)).items())
        for start in range(0, len(weights), 5):
            runner.model.load_weights(weights[start : start + 5])
            runner.drafter.model.load_weights(weights[start : start + 5])
        for model in (runner.model, runner.drafter.model):
            process_weights_after_loading(model, worker.model_config, torch.device("cpu"))

    def draft_on(letter: str) -> dict[str, object]:
        return {"model": str(folders[letter]), "num_speculative_tokens": 2, "method": "draft_model"}

    def looked_at(llm: object) -> list[dict[str, str]]:
        models = llm.collective_rpc(lambda w: (w.model_runner.model, w.model_runner.drafter.model))[0]
        return [{path: one.digest for path, one in oracle.live_tensors(model).items()} for model in models]

    with oracle.running(CASE, folders["B"], speculative_config=draft_on("B")) as llm:
        cold, answers = looked_at(llm), oracle.answer(llm)
    with oracle.running(CASE, folders["A"], speculative_config=draft_on("A")) as llm:
        for letter in "BAB":
            llm.collective_rpc(push, args=(str(folders[letter]),))
        assert looked_at(llm) == cold
        assert oracle.differing_answers(oracle.answer(llm), answers) == []


def write_eagle(folder: Path, target: Path, seed: int) -> dict[str, torch.Tensor]:
    """A random EAGLE drafter of one layer without embedding and head: vLLM shares the target's."""
    config = json.loads((target / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    shapes = {
        "fc": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj": (heads * size, hidden),
        "layers.0.self_attn.k_proj": (config["num_key_value_heads"] * size, hidden),
        "layers.0.self_attn.v_proj": (config["num_key_value_heads"] * size, hidden),
        "layers.0.self_attn.o_proj": (hidden, heads * size),
        "layers.0.mlp.gate_proj": (inner, hidden),
        "layers.0.mlp.up_proj": (inner, hidden),
        "layers.0.mlp.down_proj": (hidden, inner),
        "layers.0.post_attention_layernorm": (hidden,),
    }
    made = torch.Generator().manual_seed(seed)
    weights = {
        f"{name}.weight": (torch.randn(shape, generator=made) * 0.05).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed = {"num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | changed))
    return weights


def test_a_drafter_that_shares_embedding_and_head_with_its_target(tmp_path: Path) -> None:
    """EAGLE: vLLM replaces modules of the drafter by the target's after its weights were processed."""
    case = case_named("llama")
    targets = oracle.write(case, tmp_path / "targets")
    drafters = {letter: write_eagle(tmp_path / letter, targets["A"], ord(letter)) for letter in "XY"}

    def drafter(letter: str) -> dict[str, object]:
        return {"model": str(tmp_path / letter), "num_speculative_tokens": 2, "method": "eagle"}

    def looked_at(llm: object) -> list[dict[str, str]]:
        models = llm.collective_rpc(lambda w: (w.model_runner.model, w.model_runner.drafter.model))[0]
        assert models[0].model.embed_tokens is models[1].model.embed_tokens
        assert models[0].lm_head is models[1].lm_head
        return [{path: one.digest for path, one in oracle.live_tensors(model).items()} for model in models]

    def push_drafter(worker: object, weights: dict[str, torch.Tensor]) -> None:
        worker.model_runner.drafter.model.load_weights(list(weights.items()))

    with oracle.running(case, targets["B"], speculative_config=drafter("Y")) as llm:
        cold, answers = looked_at(llm), oracle.answer(llm)
    with oracle.running(case, targets["A"], speculative_config=drafter("X")) as llm:
        at_first = looked_at(llm)
        assert at_first != cold
        oracle.reload_from_folder(llm, targets["B"])
        llm.collective_rpc(push_drafter, args=(drafters["Y"],))
        assert oracle.differing_answers(oracle.answer(llm), answers) == []
        assert looked_at(llm) == cold
        oracle.model_of(llm).load_weights(list(read_tensors(targets["A"]).items()))
        llm.collective_rpc(push_drafter, args=(drafters["X"],))
        oracle.answer(llm)
        assert looked_at(llm) == at_first


# --- the V2 model runner ---


def test_the_v2_runner_calls_our_reload() -> None:
    """It does not start without Triton, so what can be shown here is that its reload is ours."""
    import importlib

    from reload_plugin.vllm_hooks import plugin

    plugin.register()
    for module, _ in vllm_api.RUNNERS:
        bound = importlib.import_module(module).reload_weights
        assert bound is vllm_api.get(vllm_api.INPLACE, "reload_weights")
        assert hasattr(bound, "__wrapped__")


# --- separate processes ---

IN_PROCESSES = """
import json, sys
from tests import oracle
from pathlib import Path

case, a, b = oracle.case_named("llama_tied"), Path(sys.argv[1]), Path(sys.argv[2])

def main():
    llm = oracle.start(case, a)
    found = {"A": oracle.answer(llm)}
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": "/nowhere/at/all"})
    except Exception as error:
        found["error"] = str(error)
    found["still A"] = oracle.answer(llm)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(b)})
    found["B"] = oracle.answer(llm)
    print("FOUND " + json.dumps(found))

if __name__ == "__main__":
    main()
"""


def environment(**more: str) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return {
        **os.environ,
        "PYTHONPATH": root,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **more,
    }


def as_json(value: object) -> object:
    return json.loads(json.dumps(value))


@pytest.fixture(scope="module")
def cold(folders: dict[str, Path]) -> tuple[list, str]:
    """What a cold start on B answers, and the digest of what its kernels read."""
    with oracle.running(CASE, folders["B"]) as llm:
        return oracle.answer(llm), reload_plugin.status(llm, digest=True)[0].digest


@pytest.fixture(scope="module")
def cold_b(cold: tuple[list, str]) -> list:
    return cold[0]


def test_an_engine_in_processes_of_its_own(folders: dict[str, Path], cold_b: list, tmp_path: Path) -> None:
    script = tmp_path / "processes.py"
    script.write_text(IN_PROCESSES)
    out = subprocess.run(
        [sys.executable, str(script), str(folders["A"]), str(folders["B"])],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"),
    )
    assert "FOUND " in out.stdout, out.stdout[-2000:] + out.stderr[-4000:]
    found = json.loads(out.stdout.split("FOUND ")[1].splitlines()[0])
    assert "There is no folder /nowhere/at/all" in found["error"]
    assert found["still A"] == found["A"] != found["B"]
    assert found["B"] == as_json(cold_b)


# --- the HTTP server ---


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words `t0`, `t1`, ...: enough for a server to start."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1").save_pretrained(folder)


def curl(port: int, path: str, body: dict | None = None, expect: int = 200) -> dict:
    """POST with the command line tool, as examples/README.md shows it; GET without a body."""
    data = [] if body is None else ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    out = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_code}", *data, f"http://127.0.0.1:{port}{path}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    text, _, code = out.stdout.rpartition("\n")
    assert int(code or 0) == expect, (code, text, out.stderr)
    return json.loads(text) if text.strip() else {}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    for folder in folders.values():
        write_tokenizer(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    # Not `vllm serve`: the command looks for a distribution named `vllm`, and the CPU build has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folders["A"])]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "bfloat16"]
    command += ["--max-model-len", "96", "--max-num-seqs", "4", "--no-enable-prefix-caching"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "policy"]
    variables = environment(VLLM_SERVER_DEV_MODE="1", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=variables) as process:
        try:
            wait_until_healthy(port, process, log)
            yield port
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_until_healthy(port: int, process: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-4000:]
        probe = subprocess.run(
            ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{port}/health"],
            capture_output=True,
            text=True,
        )
        if probe.stdout == "200":
            return
        time.sleep(0.5)
    raise AssertionError("the server did not start: " + log.read_text()[-4000:])


def served_tokens(port: int) -> list:
    """Greedy tokens and logprobs of the first prompt, over HTTP."""
    body = {
        "model": "policy",
        "prompt": oracle.PROMPTS[0],
        "max_tokens": oracle.TOKENS,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
    }
    choice = curl(port, "/v1/completions", body)["choices"][0]
    return [choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]]


def status(port: int, **how: object) -> dict:
    """What the one rank says over HTTP."""
    (state,) = curl(port, "/collective_rpc", {"method": "reload_status", "kwargs": how})["results"]
    return state


def test_over_http_with_curl(
    server: int, folders: dict[str, Path], cold_b: list, cold: tuple[list, str]
) -> None:
    on_a = served_tokens(server)
    started = status(server)
    assert (started["version"], started["source"], started["report"]) == (0, "the engine's start", None)
    assert started["since"] < time.time()
    options = {"weights_path": str(folders["B"]), "weight_version": "step 12", "digest": True}
    curl(server, "/collective_rpc", {"method": "reload_weights", "kwargs": options})
    warm = served_tokens(server)
    state = status(server)
    assert (state["state"], state["version"], state["weight_version"]) == ("serving", 1, "step 12")
    assert state["digest"] == state["report"]["digest"] == cold[1]
    assert started["since"] < state["since"] < time.time()
    assert state["report"]["source"] == state["source"] == str(folders["B"])
    assert state["report"]["caches"].keys() == {"prefix", "encoder", "multimodal"}
    curl(
        server,
        "/collective_rpc",
        {"method": "reload_weights", "kwargs": {"weights_path": "/nowhere/at/all"}},
        expect=500,
    )
    failed = status(server)
    assert "There is no folder /nowhere/at/all" in failed["last_error"]
    assert failed == state | {"last_error": failed["last_error"]}, "a reload that failed changed the state"
    assert served_tokens(server) == warm
    assert warm != on_a
    assert warm[0] == [f"t{token}" for token in cold_tokens(cold_b)]
    curl(server, "/collective_rpc", {"method": "reload_weights"})
    assert served_tokens(server) == on_a
    healed = status(server, digest=True)
    assert (healed["version"], healed["weight_version"], healed["last_error"]) == (2, None, None)
    assert len(healed["digest"]) == 32
    assert healed["digest"] != state["digest"]


def cold_tokens(answers: list) -> list[int]:
    """The sampled tokens of the first prompt in an in-process answer."""
    first = answers[0]
    return list(first["tokens"] if isinstance(first, dict) else first[0])
