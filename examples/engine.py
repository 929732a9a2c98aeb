"""Start a vLLM engine, ask it, and run a function in a process of its own.

The engine lives in the caller's process, so that `collective_rpc` can take an iterator of tensors.
"""

import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Token ids, no text: the models are random and have no tokenizer.
PROMPTS = ([5, 17, 42, 7], [1, 2, 3, 5, 8, 13, 21, 34, 55])


def prepare(plugin: bool | None = None) -> None:
    """Set the environment variables that vLLM reads; call it before vLLM is imported.

    `plugin` switches this package on or off; None leaves RELOAD_PLUGIN as it is.
    """
    os.environ.update(environ(plugin))
    warnings.simplefilter("ignore", FutureWarning)  # of vLLM's imports, about torch
    for noisy in (
        "torchao",
        "torch.utils._pytree",
    ):  # which kernels a CPU lacks, and what torchao still calls
        logging.getLogger(noisy).setLevel(logging.ERROR)


def environ(plugin: bool | None = None) -> dict[str, str]:
    """The environment variables that `prepare` sets, for a process that is started later."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the caller's process
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the prompts are short
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # nothing here comes from a hub
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    settings["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    if plugin is not None:
        settings["RELOAD_PLUGIN"] = "1" if plugin else "0"
    return settings


@contextmanager
def engine(folder: str | Path, **options: Any) -> Iterator[Any]:
    """Start an engine on the checkpoint in `folder`; shut it down at the end, so that another can start."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "bfloat16",
        "enable_prefix_caching": False,  # cached keys and values are those of the old weights
        "enforce_eager": True,  # starts in seconds
        "generation_config": "vllm",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "seed": 0,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
    }
    llm = LLM(str(folder), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answer(llm: Any, tokens: int = 8) -> dict[str, list]:
    """Greedy answers to `PROMPTS`: tokens, and the logprobs of the best five tokens at each step."""
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=tokens, temperature=0, logprobs=5, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = [output.outputs[0] for output in llm.generate(prompts, greedy, use_tqdm=False)]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        # Pairs (token, logprob). JSON keeps every bit of a float.
        "logprobs": [
            [sorted((token, entry.logprob) for token, entry in step.items()) for step in output.logprobs]
            for output in outputs
        ],
    }


def in_child(script: str | Path, job: dict, plugin: bool, **variables: str) -> Any:
    """Run `script --child JOB ANSWER` in a process of its own and return the JSON that it writes to ANSWER.

    An engine per process keeps the sides of a comparison apart: patches, caches, warm memory, crashes.

    Raises:
        RuntimeError: the process died; the message holds the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "job.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, str(script), "--child", str(asked), str(answered)],
            env=os.environ | environ(plugin) | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode or not answered.exists():
            raise RuntimeError(f"a child of {script} died, status {done.returncode}:\n{done.stdout[-4000:]}")
        return json.loads(answered.read_text())


def as_child(work: Any) -> bool:
    """In a process that `in_child` started, write `work(**job)` to its answer file; else return False."""
    if sys.argv[1:2] != ["--child"]:
        return False
    asked, answered = map(Path, sys.argv[2:4])
    answered.write_text(json.dumps(work(**json.loads(asked.read_text()))))
    return True
