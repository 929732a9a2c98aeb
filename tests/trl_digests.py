"""TRL's `GRPOTrainer` with vLLM in its process, and what the engine serves; one JSON line at the end.

    python tests/trl_digests.py dense|experts STEPS FOLDER
    python tests/trl_digests.py cold FOLDER/end

Run by `engine/test_frameworks.py` with the interpreter of `.venv-frameworks`.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import trl_grpo

import torch  # isort: skip
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

import reload_plugin

PROMPT = [5, 6, 7, 8, 9, 10]


def logprobs(llm: LLM) -> torch.Tensor:
    """Of the tokens of one prompt, as the engine has them."""
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = llm.generate([{"prompt_token_ids": PROMPT}], asked, use_tqdm=False)[0].prompt_logprobs
    return torch.tensor(
        [position[token].logprob for position, token in zip(found[1:], PROMPT[1:], strict=True)]
    )


def trainers_logprobs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1].float()
    return logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]


def main() -> None:
    kind, steps, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    trainer = trl_grpo.train(folder, steps, kind == "experts")
    engine = trainer.vllm_generation.llm
    trainer.vllm_generation.sync_weights()  # the last step's weights, which nothing was generated with
    last = logprobs(engine)
    trainer.model.to(torch.bfloat16).save_pretrained(folder / "end")
    trl_grpo.tokenizer().save_pretrained(folder / "end")
    said = reload_plugin.status(engine)[0]
    start = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    rows = [row for row in trainer.state.log_history if "reward" in row]
    answer = {
        "steps": len(rows),
        "gaps": [row["sampling/sampling_logp_difference/max"] for row in rows]
        + [float((last - trainers_logprobs(trainer.model.float())).abs().max())],
        "moved": float((last - trainers_logprobs(start)).abs().max()),
        "version": said.version,
        "known": said.known,
        "warm": said.digest,
    }
    print(json.dumps(answer), flush=True)


def cold(folder: str) -> None:
    """The digest of an engine that is started on what the trainer saved, with TRL's options."""
    engine = LLM(model=folder, max_model_len=64, max_num_batched_tokens=4096, gpu_memory_utilization=0.3)
    print(json.dumps(reload_plugin.status(engine)[0].digest), flush=True)


if __name__ == "__main__":
    cold(sys.argv[2]) if sys.argv[1] == "cold" else main()
