"""Policy gradients on a running engine: roll out, learn, push the new weights into it, and repeat.

The task: a prompt names one of four classes, and each token of the answer that belongs to it earns its share
of the reward. A random policy gets a quarter. Every step the engine writes the rollouts and says how likely
each token was; the trainer works that out for itself from the weights it pushed, in the engine's dtype. The
two may differ by rounding. If they differ by more, the engine does not serve the weights it was given, and
the loop stops.

The policy ties its head to its embeddings: the case where a CPU engine, with vLLM's own reload, keeps its old
head. `RELOAD_PLUGIN=0 python examples/rl_loop.py --keep-going` runs the loop with that reload.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import engine
import torch
from safetensors.torch import save_file
from tqdm import trange

CLASSES = 4
VOCABULARY = 64
LENGTH = 12  # tokens of an answer
GROUP = 16  # answers to one prompt; each is compared with the mean of its group
# How far two bf16 implementations of one small model may be apart: this many times the rounding of its
# largest logit (of 1, where all are smaller). Sums run in another order in each. An old head soon passes it.
ROUNDINGS = 2


def new_policy() -> torch.nn.Module:
    """A random transformer of 70,000 weights, in fp32: small steps would vanish in bf16."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


def served(policy: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights in the engine's dtype, one at a time. The tied head is not among them."""
    for name, weight in policy.named_parameters():
        yield name, weight.detach().to(torch.bfloat16)


def roll_out(llm) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the engine answer every prompt `GROUP` times.

    Returns the tokens, prompt first, int64 [CLASSES · GROUP, 1 + LENGTH], and the engine's logprob of each
    token of the answers, fp32 [CLASSES · GROUP, LENGTH].
    """
    from vllm import SamplingParams

    sampling = SamplingParams(n=GROUP, max_tokens=LENGTH, logprobs=0, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": [wanted]} for wanted in range(CLASSES)]
    tokens, logprobs = [], []
    for wanted, request in enumerate(llm.generate(prompts, sampling, use_tqdm=False)):
        for answer in request.outputs:
            tokens.append([wanted, *answer.token_ids])
            logprobs.append(
                [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
            )
    return torch.tensor(tokens), torch.tensor(logprobs)


def logits_of(policy: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The policy's logits for each token but the first, fp32 [rows, tokens - 1, VOCABULARY]."""
    return policy(input_ids=tokens).logits[:, :-1].float()


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How likely each token but the first was, fp32 [rows, tokens - 1]."""
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def compare(policy: torch.nn.Module, tokens: torch.Tensor, by_engine: torch.Tensor) -> tuple[float, float]:
    """The largest gap between the engine's logprobs and the trainer's, in nats, and what rounding explains.

    The trainer's come from a twin of the policy whose weights and arithmetic are bf16, as the engine's are.
    """
    from transformers import AutoModelForCausalLM

    twin = AutoModelForCausalLM.from_config(policy.config).to(torch.bfloat16).eval()
    twin.load_state_dict(policy.state_dict())
    with torch.no_grad():
        logits = logits_of(twin, tokens)
    gap = (logprobs_of(logits, tokens) - by_engine).abs().max().item()
    return gap, ROUNDINGS * torch.finfo(torch.bfloat16).eps * max(1.0, logits.abs().max().item())


def reward_of(tokens: torch.Tensor) -> torch.Tensor:
    """The share of each answer's tokens that are in the class its prompt names, fp32 [rows], from 0 to 1."""
    return (tokens[:, 1:] % CLASSES == tokens[:, :1]).float().mean(dim=1)


def learn(policy: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """One step of REINFORCE: answers better than the mean of their group become likelier."""
    rewards = reward_of(tokens).view(CLASSES, GROUP)
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)).view(-1, 1)
    loss = -(advantages * logprobs_of(logits_of(policy, tokens), tokens)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(steps: int, keep_going: bool) -> list[dict[str, float]]:
    """Run the loop. Returns what `one_step` returned, one entry a step."""
    policy = new_policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    history = []
    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(served(policy)), Path(folder) / "model.safetensors")
        policy.config.architectures = [type(policy).__name__]
        policy.config.save_pretrained(folder)
        with (
            engine.engine(folder, max_model_len=64, max_num_seqs=CLASSES * GROUP) as llm,
            trange(steps, unit="step", file=sys.stdout) as progress,
        ):
            for step in progress:
                history.append(one_step(llm, policy, optimizer))
                if not keep_going:
                    check(step, **history[-1])
                progress.set_postfix_str("reward {reward:.2f}, gap {gap:.4f}".format(**history[-1]))
    return history


def one_step(llm, policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Roll out, compare logprobs, learn, push.

    Returns the mean reward, the largest logprob gap, the limit for it, and the seconds of the reload.
    """
    tokens, by_engine = roll_out(llm)
    gap, limit = compare(policy, tokens, by_engine)
    learn(policy, optimizer, tokens)
    started = time.perf_counter()
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": served(policy)})
    seconds = time.perf_counter() - started
    return {"reward": reward_of(tokens).mean().item(), "gap": gap, "limit": limit, "seconds": seconds}


def check(step: int, gap: float, limit: float, **_: float) -> None:
    """Stop when the engine and the trainer are further apart than rounding explains."""
    if gap > limit:
        raise SystemExit(
            f"step {step}: the engine's logprobs are up to {gap:.3f} from the trainer's; rounding explains "
            f"{limit:.3f}. The engine does not serve the weights that were pushed."
        )


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Draw reward and logprob gap by step."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5.5), layout="constrained")
    above.plot([step["reward"] for step in history], color="tab:blue")
    above.axhline(1 / CLASSES, color="grey", linestyle=":", label="random policy")
    above.set(
        ylabel="mean reward", ylim=(0, 1.02), title="REINFORCE on a running engine, reloaded every step"
    )
    above.legend(loc="lower right")
    below.semilogy([max(step["gap"], 1e-5) for step in history], color="tab:red")
    below.semilogy([step["limit"] for step in history], color="grey", linestyle=":", label="bf16 rounding")
    below.set(xlabel="step", ylabel="largest logprob gap\nengine to trainer (nats)")
    below.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Read the command line, train, draw the plot and print a summary."""
    parser = argparse.ArgumentParser(description="policy gradients on a running engine")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "output", help="folder for the plot"
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="go on when the engine serves other weights"
    )
    arguments = parser.parse_args()
    engine.prepare()
    history = train(arguments.steps, arguments.keep_going)
    plot(history, arguments.output / "rl_loop.png")
    (arguments.output / "rl_loop.json").write_text(json.dumps(history))
    worst = max(history, key=lambda step: step["gap"] / step["limit"])
    print(
        f"reward {history[0]['reward']:.3f} → {history[-1]['reward']:.3f} in {len(history)} steps; "
        f"largest logprob gap {worst['gap']:.4f} where rounding explains {worst['limit']:.4f}; "
        f"plot: {arguments.output / 'rl_loop.png'}"
    )


if __name__ == "__main__":
    main()
