"""GRPO with TRL, vLLM in the trainer's process, on a CPU: a policy learns to say even numbers.

    python examples/trl_grpo.py            # a dense model with tied embeddings
    python examples/trl_grpo.py --experts  # a mixture of experts

Every optimizer step TRL pushes the policy into the engine by `model.load_weights`, one tensor a call. Nothing
here is about that: the plugin is installed, so the engine serves the new policy, whole, from the next request
on. The picture shows the reward, and how far the engine's logprobs are from the trainer's: as far as bf16
rounds. Needs the extra `trl` (see examples/README.md); under five minutes on two cores.
"""

import argparse
import json
import os
import socket
import sys
from pathlib import Path


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


for name, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": free_port(),
}.items():
    os.environ.setdefault(name, value)

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

WORDS = ["<pad>", "<eos>", *map(str, range(254))]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "tie_word_embeddings": False,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    words = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def write_model(folder: Path, experts: bool) -> None:
    """A tiny Qwen 3 with random weights, as transformers saves it."""
    set_seed(0)
    kind = ("qwen3_moe", SIZES | EXPERTS) if experts else ("qwen3", SIZES)
    config = AutoConfig.for_model(kind[0], **kind[1])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def even(completions: list[str], **_: object) -> list[float]:
    """The share of even numbers in each completion."""
    words = [[int(word) for word in text.split() if word.isdigit()] for text in completions]
    return [sum(word % 2 == 0 for word in found) / max(1, len(found)) for found in words]


def train(folder: Path, steps: int, experts: bool, learning_rate: float = 1e-2) -> GRPOTrainer:
    """Write a model, and train it with TRL as its documents say."""
    write_model(folder / "start", experts)
    prompts = Dataset.from_dict({"prompt": [f"{n} {n + 1} {n + 2}" for n in range(100)]})
    config = GRPOConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        bf16=False,
        fp16=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        max_completion_length=16,
        per_device_train_batch_size=16,
        num_generations=8,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = GRPOTrainer(
        model=str(folder / "start"),
        reward_funcs=even,
        args=config,
        train_dataset=prompts,
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


def draw(history: list[dict], path: Path) -> None:
    """Reward, and the gap between the engine's logprobs and the trainer's, by optimizer step."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5))
    above.plot([row["reward"] for row in history])
    above.set_ylabel("reward")
    below.semilogy([row["sampling/sampling_logp_difference/mean"] for row in history], label="mean")
    below.semilogy([row["sampling/sampling_logp_difference/max"] for row in history], label="max")
    below.set_ylabel("|engine - trainer|, logprob")
    below.set_xlabel("optimizer step")
    below.legend()
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="GRPO with TRL on a CPU.")
    parser.add_argument("--experts", action="store_true", help="a mixture of experts")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--folder", type=Path, default=Path("trl_grpo"), help="where everything is written")
    asked = parser.parse_args(arguments)
    trainer = train(asked.folder, asked.steps, asked.experts)
    history = [row for row in trainer.state.log_history if "reward" in row]
    draw(history, asked.folder / "grpo.png")
    (asked.folder / "history.json").write_text(json.dumps(history))
    first, last = history[0]["reward"], history[-1]["reward"]
    print(f"reward {first:.2f} -> {last:.2f} in {len(history)} steps; {asked.folder / 'grpo.png'}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
