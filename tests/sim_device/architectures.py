"""vLLM's architectures on the simulated device: ``python -m tests.sim_device.architectures [NAME ...]``.

Names are classes of transformers, or ``all``; without one, those of ``KINDS``. Each model is tiny and random,
and made without an engine around it. It is started on A and reloaded to B and to A by each road; values have
to be those of a cold start, and every tensor the object at the address it was.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reload_plugin
from reload_plugin.vllm_hooks import live
from tests import oracle
from tests.architectures import case_of, everything
from tests.checkpoints import read_tensors
from tests.engine.gpu_methods import walker
from tests.sim_device.models import (
    DENSE,
    DEVICE,
    GUARD,
    ROW_OF,
    Weights,
    on_host,
    on_two_streams,
    start,
    through_one_buffer,
)
from tests.zoo import Case

KINDS = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    "BloomForCausalLM",
    "FalconForCausalLM",
    "GPTNeoXForCausalLM",
    "StableLmForCausalLM",
    "CohereForCausalLM",
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "OlmoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "MambaForCausalLM",
    "Mamba2ForCausalLM",
    "JambaForCausalLM",
    "BambaForCausalLM",
    "BertModel",
    "RobertaForSequenceClassification",
    "ModernBertModel",
    "Qwen2VLForConditionalGeneration",
    "WhisperForConditionalGeneration",
)
NOT_WEIGHTS = (GUARD, ".attn_backend:", "compilation_config.", "name_or_path:")
"""Parts of lines of differences that say nothing of weights: classes that vLLM makes for each model, what
other models of the process have counted, and the folder of the start."""
SECONDS = 240
"""After which an architecture is given up."""


@contextlib.contextmanager
def built(case: Case, folder: Path) -> Iterator[nn.Module]:
    """The model of a case on the device, as vLLM makes, loads and processes it."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.model_executor.model_loader import get_model

    from tests.engine.gpu_methods import driver

    options = oracle.ENGINE_KWARGS | dict(case.engine_kwargs)
    with driver.machine(ROW_OF[DENSE], DEVICE):
        config = EngineArgs(model=str(folder), **options).create_engine_config()
        config.device_config.device, config.device_config.device_type = torch.device(DEVICE), DEVICE
        _ROPE_DICT.clear()  # shared by all models of a process
        with set_current_vllm_config(config):
            yield get_model(vllm_config=config)


# -- roads ----------------------------------------------------------------------------------------


def from_folder(model: nn.Module, folder: Path) -> None:
    reload_plugin.reload_weights(model, weights_path=str(folder))


def from_iterator(model: nn.Module, folder: Path) -> None:
    reload_plugin.reload_weights(model, iter(pairs_of(folder)))


def from_reused_buffer(model: nn.Module, folder: Path) -> None:
    reload_plugin.reload_weights(model, through_one_buffer(pairs_of(folder)))


def in_chunks(model: nn.Module, folder: Path) -> None:
    with reload_plugin.restore_for_reloading(model):
        for chunk in on_two_streams(pairs_of(folder)):
            model.load_weights(chunk)


def by_live_push(model: nn.Module, folder: Path) -> None:
    for name, tensor in pairs_of(folder):
        model.load_weights([(name, tensor.to(DEVICE))])
    live.before_forward_pass(model)


ROADS: dict[str, Callable[[nn.Module, Path], None]] = {
    "folder": from_folder,
    "host iterator": from_iterator,
    "reused buffer": from_reused_buffer,
    "chunks on two streams": in_chunks,
    "live push": by_live_push,
}


def pairs_of(folder: Path) -> Weights:
    return list(read_tensors(folder).items())


# -- what is asked --------------------------------------------------------------------------------


def tried(name: str, root: Path) -> dict[str, str]:
    """Road -> what was wrong; empty where nothing was. What cannot be started stands under ``start``."""
    try:
        case = case_of(name)
        folders = oracle.write(case, root)
        cold = {letter: _cold(case, folders[letter]) for letter in "AB"}
    except Exception as error:  # noqa: BLE001 - of transformers or vLLM, before anything is reloaded
        return {"start": _first_line(error)}
    found = {}
    for road, reload in ROADS.items():
        try:
            with built(case, folders["A"]) as model:
                before = walker.take_picture(model)
                for letter in "BA":
                    reload(model, folders[letter])
                    found[road] = _differing(cold[letter], model, before)
                    if found[road]:
                        break
        except Exception as error:  # noqa: BLE001 - whatever it is stands in the table
            found[road] = _first_line(error)
            if "-v" in sys.argv:
                traceback.print_exc()
        model = None
        gc.collect()
    return found


def _cold(case: Case, folder: Path) -> walker.Picture:
    with built(case, folder) as model:
        return on_host(walker.take_picture(model))


def _differing(cold: walker.Picture, model: nn.Module, before: walker.Picture) -> str:
    torch.accelerator.synchronize()
    now = walker.take_picture(model)
    found = walker.differences(cold, on_host(now))
    lines = [line for line in found if not any(part in line for part in NOT_WEIGHTS)]
    lines += walker.moved(before, now)
    return "; ".join(lines[:3])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def _give_up(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main(names: list[str]) -> int:
    """Print a line for each that was not right, and a table. Returns 1 if anything was wrong."""
    start()
    signal.signal(signal.SIGALRM, _give_up)
    counts: dict[str, collections.Counter[str]] = {road: collections.Counter() for road in ROADS}
    started, left_out = time.monotonic(), 0
    for name in names:
        root = Path(tempfile.mkdtemp())
        signal.alarm(SECONDS)
        found = tried(name, root)
        signal.alarm(0)
        shutil.rmtree(root)
        torch.accelerator.empty_cache()
        left_out += "start" in found
        for road, what in found.items():
            if road in counts:
                counts[road]["right" if not what else "wrong"] += 1
            if what:
                print(f"{name}, {road}: {what}", flush=True)
    print("| road | right | wrong |\n|---|---|---|")
    for road, count in counts.items():
        print(f"| {road} | {count['right']} | {count['wrong']} |")
    print(f"{left_out} of {len(names)} do not start here; {time.monotonic() - started:.0f} s")
    return int(any(count["wrong"] for count in counts.values()))


if __name__ == "__main__":
    asked = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    sys.exit(main(list(everything()) if asked == ["all"] else asked or list(KINDS)))
